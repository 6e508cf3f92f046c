"""A reward that is a function in a user's file, called in worker processes with time and memory limits."""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from itertools import batched, chain
from typing import Any

from milepost.common.errors import UserError
from milepost.configuration.rewards import Function, Reward
from milepost.rewards import user_worker
from milepost.rewards.base import ERROR, Response, Verdict
from milepost.rewards.processes import PACKAGES, LineProcess, Pool

log = logging.getLogger(__name__)

STARTUP_SECONDS = 300  # a file may import torch, or load a model
BATCH = 1024  # the most samples per call, under batch: true
LONGEST_PAUSE = 30  # seconds before a retry; the first pause is 1 s, and each later one is twice as long
SHOWN = 300  # characters of the sample that is shown with an error

Outcome = dict[str, Any]  # as `user_worker` writes it


class UserReward:
    """Calls the function for each response, or for lists of them.

    A call fails if it raises, takes too long, or returns anything but a finite number; its responses get the reward
    ``settings.on_error``. Each kind of failure is shown once, with a sample; too many failures are a `UserError`.
    """

    def __init__(self, function: Function, batch: bool, settings: Reward) -> None:
        self.function, self.batch, self.settings = function, batch, settings
        self.pool = Pool([_Worker(function, batch, settings) for _ in range(settings.processes)])
        self.shown: set[str] = set()
        self.graded, self.errors = 0, []  # since the last `settle`: responses, and what went wrong with some

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """Return one verdict per response, with the function's own reason; `UserError` if the file can't be loaded."""
        if not responses:
            return []
        calls = list(batched(responses, BATCH if self.batch else 1))
        outcomes = list(chain.from_iterable(self.pool.ask(self._attempt, calls)))
        failed = [number for number, outcome in enumerate(outcomes) if "error" in outcome]
        for number in failed:
            self._show(outcomes[number]["error"], responses[number])
        self.graded += len(responses)
        self.errors += [outcomes[number]["error"] for number in failed]
        return [self._verdict(outcome) for outcome in outcomes]

    def settle(self) -> None:
        """Begin to count anew; `UserError` if more than ``max_error_share`` of the responses so far failed."""
        graded, errors = self.graded, self.errors
        self.graded, self.errors = 0, []
        if len(errors) > self.settings.max_error_share * graded:
            raise UserError(
                f"{self.function} failed on {len(errors)} of {graded} samples, more than reward.max_error_share"
                f" {self.settings.max_error_share:g} allows: {errors[0]}; correct the function, or raise that share"
            )

    def close(self) -> None:
        self.pool.close()

    def _attempt(self, worker: "_Worker", responses: Sequence[Response]) -> list[Outcome]:
        """Call the function, and again for the responses that failed while retries are left."""
        outcomes = worker.call(responses)
        for retry in range(self.settings.retries):
            failed = [number for number, outcome in enumerate(outcomes) if "error" in outcome]
            if not failed or self.pool.is_abandoned:
                break
            time.sleep(min(2**retry, LONGEST_PAUSE))
            again = worker.call([responses[number] for number in failed])
            for number, outcome in zip(failed, again, strict=True):
                outcomes[number] = outcome
        return outcomes

    def _verdict(self, outcome: Outcome) -> Verdict:
        if "error" in outcome:
            kind = "timeout" if outcome["error"].startswith(TimeoutError.__name__) else "error"
            return Verdict(self.settings.on_error, None, f"{ERROR}{kind}")
        return Verdict(outcome["reward"], None, outcome["reason"])

    def _show(self, error: str, response: Response) -> None:
        kind = error.partition(":")[0]
        if kind not in self.shown:
            self.shown.add(kind)
            log.warning(
                "warning: %s: %s; the sample earns %g. Label %r, prompt %r, the response ends %r",
                self.function,
                error,
                self.settings.on_error,
                response.label,
                str(response.prompt[-1]["content"])[:SHOWN] if response.prompt else "",
                response.response[-SHOWN:],
            )


class _Worker(LineProcess):
    """One process of ``user_worker.py``. It inherits the whole environment, since a judge may need API keys."""

    def __init__(self, function: Function, batch: bool, settings: Reward) -> None:
        super().__init__()
        self.function, self.batch, self.settings = function, batch, settings

    def call(self, responses: Sequence[Response]) -> list[Outcome]:
        """The function's outcome for each response; the same error for all if the process ended."""
        self.start()
        seconds = self.settings.max_seconds
        samples = [{field.name: getattr(response, field.name) for field in fields(Response)} for response in responses]
        line = self.ask(json.dumps({"samples": samples, "max_seconds": seconds}).encode() + b"\n", seconds)
        if line:
            outcomes = json.loads(line)
            if any(outcome.get("error", "").startswith(MemoryError.__name__) for outcome in outcomes):
                self.stop()  # also frees the memory
            return outcomes
        status = self.stop()
        if line is None:
            error = f"{TimeoutError.__name__}: a call took more than reward.max_seconds {seconds:g}"
        else:
            error = f"ProcessError: its process ended with status {status}"
        return [{"error": error}] * len(responses)

    def start(self) -> None:
        if self.is_running:
            return
        self.stop()
        function = self.function
        memory = int(self.settings.memory_gib * 2**30)
        arguments = [function.path, function.name, str(self.batch), str(memory)]
        path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-B", "-m", user_worker.__name__, *arguments]
        self.spawn(command, os.environ | {"PYTHONPATH": path})
        line = self.read(STARTUP_SECONDS)
        error = json.loads(line).get("error") if line else "it took too long" if line is None else "its process ended"
        if error:
            self.stop()
            raise UserError(f"{function.file} can't be loaded: {error}: correct the file")
