"""A worker computes and answers within time and memory limits; anything else that its code tries is refused."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from milepost.rewards import workers as workers_module
from milepost.rewards.answers import read_answer
from milepost.rewards.workers import Question, SympyWorkers

SOURCES = Path(__file__).parents[2] / "workflow_scripts"
QUESTION = Question(read_answer("x").statement, read_answer("y").statement)
SLOW = Question(read_answer("33").statement, read_answer("e^{e^{e^{e^e}}}").statement)  # 10^(10^(10^6)) digits

# What an exploit in sympy could run; each raises where it is refused.
ATTACKS = {
    "fork": "os.waitpid(os.fork() or os._exit(0), 0)",
    "execute": "subprocess.run([sys.executable, '--version'])",
    "open a socket": "socket.socket().close()",
    "open a pair of sockets": "socket.socketpair()",
    "write a file": "open('file', 'w').close()",
    "append to a file": "open('victim', 'a').close()",
    "delete a file": "os.unlink('doomed')",
    "change a file's mode": "os.chmod('victim', 0o600)",
    "signal another process": "os.kill(parent, 0)",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))",
    "limit another process": "resource.prlimit(parent, resource.RLIMIT_CPU)",
    "take memory": "mmap.mmap(-1, 1200 * 2**20)",  # asked for, not touched: that takes seconds on some machines
    "fill a file": "os.write(written, b'x')",
    "compute without end": "any(iter(int, unconfined))",
}
HIJACKED = """
import mmap, os, resource, signal, socket, subprocess, sys
sys.path.append({sources!r})
from milepost.rewards import confinement, symbolic, sympy_worker
attacks, unconfined, parent = {attacks!r}, 1, os.getppid()
written = os.open('filled', os.O_WRONLY | os.O_CREAT)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def attack(label, answer):
    if label[0] == 'symbol':  # a question; before them the worker warms up
        exec(attacks[int(label[1].removeprefix('x_'))])
    return True
symbolic.equal = attack
{change}
sympy_worker.main()
"""


def outcomes(folder, attacks=ATTACKS, change=""):
    """A worker's first word, and the answer for each attack, run as a question of its own.

    ``equal`` means that it succeeded, ``error`` that it was refused, and no answer that the worker ended.
    """
    for name in ("victim", "doomed"):
        (folder / name).touch()
    code = HIJACKED.format(sources=str(SOURCES), attacks=list(attacks.values()), change=change)
    questions = [Question(read_answer(f"x_{{{place}}}").statement, QUESTION.answer) for place in range(len(attacks))]
    shown = subprocess.run(
        [sys.executable, "-I", "-B", "-c", code],
        input=b"".join(question.as_json(1) for question in questions),
        capture_output=True,
        timeout=120,
        cwd=folder,
    )
    first, *words = shown.stdout.decode().split()
    return first, dict(zip(attacks, words, strict=False))


def test_a_worker_can_do_nothing_but_compute(tmp_path):
    *refused, endless = ATTACKS
    assert endless == "compute without end"  # which ends the worker, and so comes last
    assert outcomes(tmp_path) == ("ready", dict.fromkeys(refused, "error"))


def test_without_confinement_the_same_succeeds(tmp_path):
    """Shows that the test above would fail if nothing were refused."""
    unconfined = "sympy_worker.confine = lambda: True; unconfined = 0"
    assert outcomes(tmp_path, change=unconfined) == ("ready", dict.fromkeys(ATTACKS, "equal"))


def test_resource_limits_hold_if_the_kernel_supports_no_filter(tmp_path):
    limited = {name: ATTACKS[name] for name in ("take memory", "fill a file", "fork")}
    unfiltered = "confinement._install_filter = lambda: False; os.getuid() or os.setuid(65534)"  # root may always fork
    assert outcomes(tmp_path, limited, unfiltered) == ("unfiltered", dict.fromkeys(limited, "error"))


@pytest.mark.parametrize("change", ["", "confinement._install_filter = lambda: False"], ids=["filtered", "unfiltered"])
def test_a_worker_that_computes_without_end_is_ended_by_the_kernel(tmp_path, change):
    """Even if the parent is gone: the limit is on processor time."""
    endless = {"compute without end": ATTACKS["compute without end"], "answer": "pass"}
    assert outcomes(tmp_path, endless, change)[1] == {}


def test_a_question_ends_when_its_time_is_up_and_the_next_is_answered():
    workers = SympyWorkers(max_seconds=1)
    try:
        assert workers.ask([QUESTION]) == ["different"]
        start = time.monotonic()
        assert workers.ask([SLOW]) == ["timeout"]
        assert time.monotonic() - start < 120  # 1 s, and a guard against a hang
        assert workers.ask([QUESTION]) == ["different"]
    finally:
        workers.close()


def test_a_worker_imports_no_torch_and_holds_no_secrets(environment):
    """The process that parses a model's text imports nothing heavy and holds no token that the text could steal."""
    code = (
        "from milepost.rewards.answers import read_answer\n"
        "from milepost.rewards.workers import SympyWorkers, Question\n"
        "statements = [read_answer(text).statement for text in ('x', 'y')]\n"
        "workers = SympyWorkers(30); print(workers.ask([Question(*statements)]))\n"
        "pid = next(w.process.pid for w in workers.workers if w.process)\n"
        "print('torch' in open(f'/proc/{pid}/maps').read(), 'HF_TOKEN' in open(f'/proc/{pid}/environ').read())\n"
        "workers.close()"
    )
    env = environment | {"HF_TOKEN": "secret"}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["['different']", "False False"]


def test_a_kernel_without_filters_is_reported_once(monkeypatch, caplog, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("print('unfiltered', flush=True)\nfor _ in __import__('sys').stdin: print('equal', flush=True)\n")
    monkeypatch.setattr("milepost.rewards.workers.COMMAND", [sys.executable, script])
    workers_module._warn_once.cache_clear()
    workers = SympyWorkers(max_seconds=30)
    try:
        assert workers.ask([QUESTION] * 4) == ["equal"] * 4
    finally:
        workers.close()
    assert len([record for record in caplog.records if "seccomp" in record.message]) == 1
