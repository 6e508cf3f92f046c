"""One of several training processes (see tests/grpo_run.py); none may wake its optimizer before the engine runs.

A starting engine takes a share of the free memory of all its GPUs, and SGLang refuses if these differ much.
"""

import sys
import time
from pathlib import Path

import grpo_run
import train
from milepost.grpo.cpu_optimizer import CpuAdam

RUNS = Path(sys.argv[1])
start_engine, wake = train.start_engine, CpuAdam.wake


def start_slowly(*arguments):
    time.sleep(2)
    engine = start_engine(*arguments)
    RUNS.touch()
    return engine


def wake_late(self, weights_only=False):
    assert RUNS.exists(), "woke while the engine was starting"
    wake(self, weights_only)


if __name__ == "__main__":
    train.start_engine, CpuAdam.wake = start_slowly, wake_late
    grpo_run.run(sys.argv[2:])
