"""GRPO's training loop. A rollout on its way from prompts to new weights, and the file of each step:

    prompts        data.py           the next ones, in an order that the seed decides            rank 0
    -> rollout     sampler.py        a group of responses to each, sampled by the engine            |
    -> grade       sampler.py        a reward for each response                                     |
    -> advantages  advantages.py     each reward relative to its group                              |
    -> packs       policy.py         sequences packed, and distributed over the ranks          every rank
    -> loss        losses.py         from the log-probs of the response tokens                      |
    -> step        learner.py        gradients reduced and clipped, Adam's update                   |
    -> sync        weight_sync.py    the new weights into the engine                                |
    -> log         callbacks.py      metrics, samples, warnings                                  rank 0

Only rank 0 has the engine, the grader and the logs (`Lead`); the other ranks wait for what it broadcasts.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from milepost.common.errors import UserError
from milepost.common.interrupts import Interrupts
from milepost.grpo.callbacks import Checkpoints, Logs, Validation
from milepost.grpo.learner import Learner
from milepost.grpo.metrics import peak_memory, warn
from milepost.grpo.replay import Replay
from milepost.grpo.run_state import Progress, folder_name
from milepost.grpo.sampler import Sampler
from milepost.grpo.samples import Rollout, TrainingSequence
from milepost.grpo.settings import Settings

PATIENCE = timedelta(days=7)  # how long the other ranks wait while rank 0 samples


@dataclass(frozen=True)
class Lead:
    """What only rank 0 has."""

    sampler: Sampler | Replay
    validation: Validation
    logs: Logs


class ResendWeights:
    """Broadcast by rank 0 in place of the expected value when all ranks must send the weights again."""


@dataclass
class Loop:
    """A run on one rank; only rank 0 has a ``lead``."""

    settings: Settings
    progress: Progress
    learner: Learner
    push_weights: Callable[[], None]
    checkpoints: Checkpoints
    interrupts: Interrupts
    lead: Lead | None
    control: dist.ProcessGroup | None  # all ranks, or None for a single one: see `control_group`
    failure: Exception | None = None  # of rank 0's own work, or too many bad steps: raised once the run is saved
    sending: bool = False  # whether rank 0 is sending weights, a collective of all ranks

    def run(self) -> Path:
        """Train until ``training.rollouts`` rollouts are done and saved; return the last checkpoint.

        Raises:
            SystemExit: the process was asked to end, or rank 0 failed; the run is saved and can be resumed.
            UserError: too many bad steps in a row; the run is saved as well.
            Exception: on rank 0, the error that ended a rollout or a validation; the run is saved as well.
        """
        progress, lead = self.progress, self.lead
        if lead:
            lead.sampler.engine.weights_wanted = self._weights_wanted
        self._send_weights()
        while True:
            if lead:
                self._attempt(lead.validation.run_if_due, progress)
            self._save_or_end()
            if progress.rollout >= self.settings.training.rollouts:
                return self.checkpoints.last
            rollout = lead and self._attempt(self._draw, progress.rollout + 1)
            sequences = self._from_rank_0(rollout and rollout.sequences)
            if sequences is None:  # interrupted, or rank 0 failed
                continue
            metrics, seconds = self._learn(sequences)
            if lead:
                progress.cursor = lead.sampler.cursor.state()
                lead.logs.learned(progress, rollout, metrics, seconds)

    def _draw(self, number: int) -> Rollout | None:
        rollout = self.lead.sampler.draw(number)
        if rollout:
            self.lead.logs.drawn(number, rollout)
        return rollout

    def _learn(self, sequences: list[TrainingSequence]) -> tuple[dict[str, float], dict[str, float]]:
        """Train on a rollout and send the new weights to the engine; return metrics, and seconds by phase."""
        progress, optimizer, seconds = self.progress, self.learner.optimizer, Counter()
        with timed(seconds, "sleep_wake"):
            optimizer.wake()
        with timed(seconds, "train"):
            learns = self.settings.training.mode != "rollout_only"
            metrics = (self.learner.learn(sequences, progress) if learns else {}) | peak_memory()
        with timed(seconds, "sleep_wake"):
            optimizer.sleep(weights=False)
            if self.lead:
                self.lead.sampler.engine.wake()
        with timed(seconds, "sync"):
            self.push_weights()
        with timed(seconds, "sleep_wake"):
            optimizer.sleep()
        progress.rollout += 1
        progress.score = None
        if progress.bad_steps_in_a_row >= self.settings.training.max_bad_steps:
            # Skipped steps change no weights, so what is saved now are the weights after the last good step.
            self.failure = UserError(
                f"{self.checkpoints.work}: {progress.bad_steps_in_a_row} steps in a row had a NaN or infinite loss or"
                f" gradient and were skipped; the weights before them are saved ({folder_name(progress.rollout)}): look"
                " at samples.jsonl, lower optimizer.learning_rate for a new run, or raise training.max_bad_steps to go"
                " on"
            )
        return metrics, dict(seconds)

    def _save_or_end(self) -> None:
        """Save the run if that is due; end it if it failed or was asked to end. Rank 0 decides."""
        status = 1 if self.failure else self.interrupts.exit_status if self.interrupts.requested else 0
        status, save = self._from_rank_0((status, self.checkpoints.due(self.progress, ends=bool(status))))
        if save:
            of_lead, began = (self.lead.logs.log, self.lead.sampler.waiting) if self.lead else (), time.perf_counter()
            self.checkpoints.save(self.progress, self.learner.policy.model, self.learner.optimizer, *of_lead)
            if self.lead:
                self.lead.logs.saved(time.perf_counter() - began)
        if status:
            if self.lead:
                done = self.progress.rollout
                print(f"stopped after {done} rollouts: run again to go on from there", file=sys.stderr)
            raise self.failure or SystemExit(status)

    # ---- rank 0 and the others -----------------------------------------------------------------------------------

    def _attempt(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do rank 0's own work while the others wait; return None if it fails, which ends the run."""
        if self.failure:
            return None
        try:
            return work(*arguments)
        except Exception as error:
            if self.sending:
                raise  # the other ranks are in the collective and can't be told
            warn(f"{error if isinstance(error, UserError) else repr(error)}: the run is saved, and ends")
            self.failure = error
            self.lead.sampler.engine.close()  # saving may need its memory
            return None

    def _send_weights(self) -> None:
        """Send the weights to the engine while the optimizer sleeps."""
        self.learner.optimizer.wake(weights_only=True)
        self.push_weights()
        self.learner.optimizer.sleep()

    def _weights_wanted(self) -> None:
        """Send the weights to a restarted engine worker; called on rank 0 while the others wait for a broadcast."""
        with self.interrupts.held():  # all ranks take part
            self.sending = True
            from_rank_0(ResendWeights(), self.control)
            self._send_weights()
            self.sending = False

    def _from_rank_0(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank; sends the weights whenever rank 0 asks for that instead."""
        while isinstance(value := from_rank_0(value, self.control), ResendWeights):
            self._send_weights()
        return value


@contextlib.contextmanager
def timed(seconds: Counter[str], phase: str) -> Iterator[None]:
    """Add the duration of the context to ``seconds[phase]``."""
    began = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - began


def control_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks that may wait for rank 0 for days; None for a single rank. Every rank calls this."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None


def from_rank_0(value: Any, control: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's ``value`` on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]
