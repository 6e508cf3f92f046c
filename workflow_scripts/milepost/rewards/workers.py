"""Worker processes that compare expressions with sympy, and may be killed at any time."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

from milepost.common.errors import UserError
from milepost.rewards import sympy_worker
from milepost.rewards.comparison import Statement
from milepost.rewards.processes import PACKAGES, LineProcess, Pool

log = logging.getLogger(__name__)

COMMAND = [sys.executable, "-s", "-P", "-B", "-m", sympy_worker.__name__]  # -B: writes no files
STARTUP_SECONDS = 120  # importing sympy takes 1 to 3 s, more on a busy machine
MAX_WORKERS = 4


@dataclass(frozen=True)
class Question:
    """Whether sympy can prove that the answer equals the label."""

    label: Statement
    answer: Statement

    def as_json(self, max_seconds: float) -> bytes:
        """The question as a line for a worker."""
        row = {"label": self.label, "answer": self.answer, "max_seconds": max_seconds}
        return json.dumps(row).encode() + b"\n"


class SympyWorkers:
    """Up to `MAX_WORKERS` worker processes, started when first needed and restarted after one was killed."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.workers = [_Worker() for _ in range(min(MAX_WORKERS, os.cpu_count() or 1))]
        self.pool = Pool(self.workers)

    def ask(self, questions: list[Question]) -> list[str]:
        """Each question's verdict: ``equal``, ``different``, ``timeout`` or ``error``."""
        return self.pool.ask(lambda worker, question: worker.compare(question, self.max_seconds), questions)

    def close(self) -> None:
        self.pool.close()


@cache
def _warn_once() -> None:
    log.warning("the kernel takes no seccomp filter: the grader's workers are confined by limits of resources alone")


class _Worker(LineProcess):
    """One process of ``sympy_worker.py``, a separate program that never imports torch."""

    def compare(self, question: Question, max_seconds: float) -> str:
        self.start()
        word = self.ask(question.as_json(max_seconds), max_seconds)
        if word not in ("equal", "different"):
            self.stop()  # after an error as well, to free whatever a library keeps, above all memory
        return {None: "timeout", "": "error"}.get(word, word)

    def start(self) -> None:
        if self.is_running:
            return
        self.stop()
        keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        environment = {**keep, "PYTHONPATH": str(PACKAGES), "OMP_NUM_THREADS": "1"}  # no tokens or API keys
        self.spawn(COMMAND, environment, stderr=subprocess.DEVNULL)
        word = self.read(STARTUP_SECONDS)
        if word not in ("ready", "unfiltered"):
            self.stop()
            raise UserError(
                f"{sympy_worker.__name__} does not start under {sys.executable}: is sympy installed? Build the"
                " environment from the lock file again"
            )
        if word == "unfiltered":
            _warn_once()
