"""Two simultaneous runs of the same result: the second names the first, and a dead holder never blocks."""

import os
import subprocess
import sys
import time

import pytest

from milepost.common.files import hold

HOLD = """
import sys, time
from milepost.common.files import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(environment, tmp_path):
    """Start another process that locks a result for some seconds."""
    started = []

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "result"), str(seconds)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_the_second_names_the_first_and_waits(holder, tmp_path, capfd):
    other, began = holder(1.0), time.monotonic()
    with hold(tmp_path / "result"):
        assert time.monotonic() - began > 0.5
    assert f"result: process {other.pid} on {os.uname().nodename} is working on it: waiting" in capfd.readouterr().err


def test_a_killed_holder_leaves_nothing_behind(holder, tmp_path, capfd):
    other = holder(60)
    other.kill()
    other.wait()
    with hold(tmp_path / "result"):
        pass
    assert not capfd.readouterr().err


def test_a_second_snakemake_names_the_first_and_a_killed_one_leaves_no_lock(
    snakefile, tmp_path, environment, snakemake
):
    left = tmp_path / ".snakemake/locks/0.output.lock"
    left.parent.mkdir(parents=True)
    left.touch()
    claim = (
        "from pathlib import Path; from milepost.common.working_folder import claim; kept = claim(Path('.snakemake'));"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", claim + "print(); input()"],
        cwd=tmp_path, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first.stdout.readline()
    assert not left.exists()  # no other run was there, so the lock was left behind
    left.touch()
    dry_run = ["-n", "--directory", str(tmp_path), "report"]
    assert f"note: process {first.pid} on" in snakemake(*dry_run, snakefile=snakefile, check=True).stderr
    assert left.exists()
    first.kill()
    first.wait()
    assert "note:" not in snakemake(*dry_run, snakefile=snakefile, check=True).stderr
    assert not left.exists()
