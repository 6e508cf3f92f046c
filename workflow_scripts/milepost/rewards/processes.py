"""Pools of worker processes that answer lines of text, in parallel, and may be killed at any time."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import IO

PACKAGES = Path(__file__).parents[2]  # the folder from which a worker imports this package
CHUNK = 2**16


class LineProcess:
    """A process that answers each line with one line; `spawn` starts it, and restarts it after it has ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def spawn(self, command: Sequence[str | Path], environment: dict[str, str], stderr: int | IO | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent to handle, which may need the last verdicts
        )
        os.set_blocking(self.process.stdin.fileno(), False)

    def ask(self, line: bytes, seconds: float) -> str | None:
        """The answer to a line; None if it does not come in time, an empty string if the process has ended."""
        deadline = time.monotonic() + seconds
        pipe, left = self.process.stdin.fileno(), memoryview(line)
        room = select.poll()  # not select(), which fails for descriptors above 1023: a rank can have more open
        room.register(pipe, select.POLLOUT)
        try:
            while left:
                if not room.poll(_milliseconds(deadline)):
                    return None
                left = left[os.write(pipe, left[:CHUNK]) :]
        except BrokenPipeError:
            return ""
        return self.read(deadline - time.monotonic())

    def read(self, seconds: float) -> str | None:
        """The next line; None if it does not come in time, an empty string if the process has ended."""
        deadline, parts = time.monotonic() + seconds, [b""]
        answer = select.poll()
        answer.register(self.process.stdout, select.POLLIN)
        while not parts[-1].endswith(b"\n"):
            if not answer.poll(_milliseconds(deadline)):
                return None
            parts.append(os.read(self.process.stdout.fileno(), CHUNK))
            if not parts[-1]:
                return ""
        return b"".join(parts).decode().strip()

    def kill(self) -> None:
        """Kill the process and all that it started; a pending `read` then returns."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> int | None:
        """Kill the process, forget it, and return its exit status."""
        if self.process is None:
            return None
        self.kill()
        status = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return status


class Pool[Worker: LineProcess]:
    """Workers among which questions are distributed."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self.idle: LifoQueue[Worker] = (
            LifoQueue()
        )  # last in, first out: the worker that answered last is running already
        self.is_abandoned = False  # set while `ask` fails, so that no worker retries
        for worker in self.workers:
            self.idle.put(worker)

    def ask[Question, Answer](
        self, ask: Callable[[Worker, Question], Answer], questions: Sequence[Question]
    ) -> list[Answer]:
        """Ask each question of the next idle worker; an exception here, such as a signal's, kills the workers."""

        def of_idle(question: Question) -> Answer:
            worker = self.idle.get()
            try:
                return ask(worker, question)
            except BaseException:
                worker.kill()  # its late answer would be read as the next question's
                raise
            finally:
                self.idle.put(worker)

        if len(questions) == 1:
            return [of_idle(questions[0])]
        threads = ThreadPoolExecutor(len(self.workers))
        try:
            return list(threads.map(of_idle, questions))
        except BaseException:
            self.is_abandoned = True
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in self.workers:
                worker.kill()
            raise
        finally:
            threads.shutdown()
            self.is_abandoned = False

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()


def _milliseconds(deadline: float) -> float:
    return 1000 * max(0.0, deadline - time.monotonic())
