"""Processes that compare expressions with sympy, and may be killed at any time."""

import json
import logging
import os
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import LifoQueue

from milepost.common.errors import UserError
from milepost.rewards import sympy_worker
from milepost.rewards.comparison import Statement

log = logging.getLogger(__name__)

COMMAND = [sys.executable, "-s", "-P", "-B", "-m", sympy_worker.__name__]  # -B: writes no files
PACKAGES = Path(__file__).parents[2]  # where it finds this package
STARTUP_SECONDS = 120  # importing sympy takes 1 to 3 s, more where the machine is busy
MAX_WORKERS = 4


@dataclass(frozen=True)
class Question:
    """Does the answer state what the label states, as far as sympy can prove it."""

    label: Statement
    answer: Statement

    def as_json(self, max_seconds: float) -> bytes:
        """The question as a worker reads it, a line."""
        row = {"label": self.label, "answer": self.answer, "max_seconds": max_seconds}
        return json.dumps(row).encode() + b"\n"


class SympyWorkers:
    """Up to `MAX_WORKERS` worker processes, started when first needed and again after one was killed."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.count = min(MAX_WORKERS, os.cpu_count() or 1)
        self.idle: LifoQueue[_Worker] = LifoQueue()  # the last that answered is running already
        self.workers = [_Worker() for _ in range(self.count)]
        for worker in self.workers:
            self.idle.put(worker)

    def ask(self, questions: list[Question]) -> list[str]:
        """Each question's verdict: ``equal``, ``different``, ``timeout`` or ``error``."""
        if len(questions) < 2:
            return [self._ask(question) for question in questions]
        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(self._ask, questions))

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _ask(self, question: Question) -> str:
        worker = self.idle.get()
        try:
            return worker.ask(question, self.max_seconds)
        finally:
            self.idle.put(worker)


@cache
def _warn_once() -> None:
    log.warning("the kernel takes no seccomp filter: the grader's workers are confined by limits of resources alone")


class _Worker:
    """One process of ``sympy_worker.py``, spoken to by lines; a script of its own, so it never imports torch."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, question: Question, max_seconds: float) -> str:
        self.start()
        try:
            self.process.stdin.write(question.as_json(max_seconds))
            word = self.read(max_seconds)
        except BrokenPipeError:
            word = ""
        if word not in ("equal", "different"):
            self.stop()  # after an error as well: what a library keeps of it, memory above all, goes along
        return {None: "timeout", "": "error"}.get(word, word)

    def start(self) -> None:
        if self.process and self.process.poll() is None:
            return
        self.stop()
        keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**keep, "PYTHONPATH": str(PACKAGES), "OMP_NUM_THREADS": "1"},  # no tokens, no keys
            start_new_session=True,  # Ctrl-C is for the parent, which may want its last verdicts
        )
        word = self.read(STARTUP_SECONDS)
        if word not in ("ready", "unfiltered"):
            self.stop()
            raise UserError(
                f"{sympy_worker.__name__} does not start under {sys.executable}: is sympy installed? Build the"
                " environment from the lock file again"
            )
        if word == "unfiltered":
            _warn_once()

    def read(self, seconds: float) -> str | None:
        """The next line; None when it did not come in time, an empty string when the process has ended."""
        deadline, line = time.monotonic() + seconds, b""
        answer = select.poll()  # not select(), which takes no descriptor above 1023: a rank can have more open
        answer.register(self.process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not answer.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
            received = os.read(self.process.stdout.fileno(), 4096)
            if not received:
                return ""
            line += received
        return line.decode().strip()

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None
