"""The training loop of GRPO: sample, grade, learn, hand the new weights to the engine, and again.

Rank 0 drives the engine and the grader and keeps the logs (`Driver`); what it decides and what it sampled goes to all
ranks, which learn from it together.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.common.errors import UserError
from milepost.common.interrupts import Interrupted, Interrupts
from milepost.configuration.schema import Algorithm, Sampling, Training
from milepost.grpo import run_state
from milepost.grpo.data import PromptCursor
from milepost.grpo.learner import Learner
from milepost.grpo.metrics import RunLog, equal_rewards, peak_memory, warn
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import Sample, TrainingSequence, collect, statistics, to_training
from milepost.rewards.grader import Grader
from milepost.rollout.engine import RolloutEngine, SamplingParams, request_seed
from milepost.rollout.prompts import decode

KEPT_GROUPS = 2  # prompts of every rollout whose samples are kept to read
FIRST_ROLLOUTS = 3  # after which rewards that are all equal are told
ALARMING_LOG_PROB_DIFF = 0.1  # mean |trainer - engine|; rounding to bf16 explains a few hundredths
PATIENCE = timedelta(days=7)  # of the ranks that wait while rank 0 samples


@dataclass(frozen=True)
class Rollout:
    """Responses to learn from, and what rank 0 has to say of them once they are.

    Attributes:
        statistics: of the rewards and the responses, by metric.
        tokens: sampled and in prompts, of all responses.
        seconds: by phase.
    """

    sequences: list[TrainingSequence]
    statistics: dict[str, float]
    tokens: int
    seconds: dict[str, float]


@dataclass
class Driver:
    """What rank 0 alone does: prompts, sampling, rewards, validation, logs."""

    training: Training
    algorithm: Algorithm
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    engine: RolloutEngine
    replay_routing: bool
    tokenizer: PreTrainedTokenizerBase
    grader: Grader
    cursor: PromptCursor
    log: RunLog
    validate: Callable[[RolloutEngine, int], dict[str, float]]
    validation_interval: int  # rollouts; 0 for never
    interrupts: Interrupts
    bar: tqdm

    def validate_if_due(self, progress: Progress) -> bool:
        """Evaluate the weights as they are, unless that was done or it is not their turn; whether it was done now."""
        if not progress.validation_due(self.validation_interval):
            return False
        began = time.perf_counter()
        try:
            with self.interrupts.abandonable():
                metrics = self.validate(self.engine, progress.rollout)
        except Interrupted:
            return False
        progress.score = metrics["validation_average"]
        self.log.metrics(progress.rollout, metrics | {"seconds_validation": time.perf_counter() - began})
        return True

    def rollout(self, number: int) -> Rollout | None:
        """Sample and grade rollout ``number``; None if the process was asked to end meanwhile."""
        began = time.perf_counter()
        group = self.training.samples_per_prompt
        requests = [
            # ``place`` in its rollout, not the prompt's own: a small data set may hold a prompt at several.
            (prompt, request_seed(self.training.seed, number, place, sample))
            for place, prompt in enumerate(self.cursor.take(self.training.prompts_per_rollout))
            for sample in range(group)
        ]
        params = SamplingParams(
            max_new_tokens=self.sampling.max_response_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            stop_token_ids=self.stop_token_ids,
            with_routing=self.replay_routing,
        )
        done = tqdm(total=len(requests), desc=f"rollout {number}", unit="sample", leave=False, mininterval=1)
        try:
            with done, self.interrupts.abandonable():
                samples = collect(
                    self.engine, params, requests, self.tokenizer, self.grader, lambda index, completion: done.update()
                )
        except Interrupted:
            return None
        sampled = time.perf_counter()
        self.engine.sleep()
        seconds = {"seconds_rollout": sampled - began, "seconds_sleep_wake": time.perf_counter() - sampled}
        self._keep(number, samples)
        return Rollout(
            sequences=to_training(samples, group, self.algorithm.std_epsilon),
            statistics=statistics(samples, group),
            tokens=sum(len(sample.prompt.ids) + len(sample.completion.token_ids) for sample in samples),
            seconds=seconds,
        )

    def _keep(self, number: int, samples: list[Sample]) -> None:
        for sample in samples[: KEPT_GROUPS * self.training.samples_per_prompt]:
            self.log.sample(sample.row(number, decode(self.tokenizer, sample.prompt.ids)))

    def report(
        self, progress: Progress, rollout: Rollout, metrics: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """Log a rollout that has been learned from; ``metrics`` and ``seconds`` are of the learning."""
        seconds = {name: rollout.seconds.get(name, 0.0) + seconds.get(name, 0.0) for name in rollout.seconds | seconds}
        total = sum(seconds.values())
        rates = {"tokens_per_second": rollout.tokens / total, **seconds, "seconds_step": total}
        self.log.metrics(progress.rollout, rollout.statistics | metrics | rates)
        shown = {name: f"{rollout.statistics[name]:.3f}" for name in ("reward_mean", "pass_rate")}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        first_are_done = progress.rollout == min(FIRST_ROLLOUTS, self.training.rollouts)
        if first_are_done and (warning := equal_rewards(self.log)):
            warn(warning)
        if metrics.get("log_prob_diff", 0.0) > ALARMING_LOG_PROB_DIFF:
            warn(
                f"rollout {progress.rollout}: the log-probs of engine and trainer differ by"
                f" {metrics['log_prob_diff']:.3f} on average: they no longer compute the same model"
            )


class WeightsWanted:
    """What rank 0 says, instead of what the others wait for, when all are to send the weights again."""


@dataclass
class Loop:
    """A run, as every rank sees it; ``driver`` on rank 0 alone."""

    work: Path
    training: Training
    progress: Progress
    learner: Learner
    push_weights: Callable[[], None]
    provenance: dict[str, Any]
    interrupts: Interrupts
    driver: Driver | None
    saved: Path | None  # the checkpoint that the run goes on from
    control: dist.ProcessGroup | None  # all ranks, where there are several: see `control_group`
    failure: Exception | None = None  # of what rank 0 does alone, or too many bad steps: raised once the run is saved
    sending: bool = False  # while rank 0 does so all ranks are in it, too

    def run(self) -> Path:
        """Train until ``training.rollouts`` rollouts are done and saved; gives the last checkpoint.

        Raises:
            SystemExit: the process was asked to end, or rank 0 failed; the run is saved and can be continued.
            UserError: too many bad steps in a row; the run is saved, as above.
            Exception: on rank 0, whatever ended a rollout or a validation; the run is saved, as above.
        """
        progress, driver = self.progress, self.driver
        if driver:
            driver.engine.weights_wanted = self._weights_wanted
        self._send_weights()
        unsaved = False
        while True:
            if driver:
                unsaved |= bool(self._attempt(driver.validate_if_due, progress))
            stop = self._exit_status()
            stop, save = self._from_rank_0((stop, unsaved and (stop or self._save_due())))
            if save:
                self._save()
                unsaved = False
            if stop:
                if driver:
                    print(f"stopped after {progress.rollout} rollouts: run again to go on from there", file=sys.stderr)
                raise self.failure or SystemExit(stop)
            if progress.rollout >= self.training.rollouts:
                return self.saved
            rollout = driver and self._attempt(driver.rollout, progress.rollout + 1)
            sequences = self._from_rank_0(rollout and rollout.sequences)
            if sequences is None:
                continue
            self._learn(sequences, rollout)
            unsaved = True

    def _attempt(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What rank 0 does while the others wait; None if it fails, which ends the run."""
        if self.failure:
            return None
        try:
            return work(*arguments)
        except Exception as error:
            if self.sending:
                raise  # the others can't be told: they wait for what is sent
            warn(f"{error if isinstance(error, UserError) else repr(error)}: the run is saved, and ends")
            self.failure = error
            self.driver.engine.close()  # what is saved may need the memory
            return None

    def _exit_status(self) -> int:
        """0 to go on."""
        if self.failure:
            return 1
        return self.interrupts.exit_status if self.interrupts.requested else 0

    def _learn(self, sequences: list[TrainingSequence], rollout: Rollout | None) -> None:
        """Train on a rollout, hand the new weights to the engine, and count the rollout as done."""
        progress, driver, optimizer = self.progress, self.driver, self.learner.optimizer
        times = [time.perf_counter()]
        optimizer.wake()
        times.append(time.perf_counter())
        metrics = self.learner.learn(sequences, progress) | peak_memory()
        times.append(time.perf_counter())
        optimizer.sleep(weights=False)
        if driver:
            driver.engine.wake()
        times.append(time.perf_counter())
        self.push_weights()
        times.append(time.perf_counter())
        optimizer.sleep()
        times.append(time.perf_counter())
        woke, trained, made_room, synced, slept = (later - earlier for earlier, later in pairwise(times))
        progress.rollout += 1
        progress.score = None
        if driver:
            progress.cursor = driver.cursor.state()
            seconds = {"seconds_train": trained, "seconds_sync": synced, "seconds_sleep_wake": woke + made_room + slept}
            driver.report(progress, rollout, metrics, seconds)
        if progress.bad_steps_in_a_row >= self.training.max_bad_steps:
            # Skipped steps change no weights: what is saved now is what the last good one left.
            self.failure = UserError(
                f"{self.work}: {progress.bad_steps_in_a_row} steps in a row had a NaN or infinite loss or gradient and"
                f" were skipped; the weights before them are saved ({run_state.folder_name(progress.rollout)}): look at"
                " samples.jsonl, lower optimizer.learning_rate for a new run, or raise training.max_bad_steps to go on"
            )

    def _send_weights(self) -> None:
        """Hand the weights to the engine while the trainer is asleep."""
        self.learner.optimizer.wake(weights_only=True)
        self.push_weights()
        self.learner.optimizer.sleep()

    def _weights_wanted(self) -> None:
        """On rank 0: a restarted part of the engine needs the weights, while the other ranks wait for a decision."""
        with self.interrupts.held():  # the others are in it, too
            self.sending = True
            from_rank_0(WeightsWanted(), self.control)
            self._send_weights()
            self.sending = False

    def _from_rank_0(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank; weights that are wanted meanwhile are sent."""
        while isinstance(value := from_rank_0(value, self.control), WeightsWanted):
            self._send_weights()
        return value

    def _save_due(self) -> bool:
        rollout = self.progress.rollout
        return rollout > 0 and (rollout % self.training.save_interval == 0 or rollout >= self.training.rollouts)

    def _save(self) -> None:
        if self.driver:
            self.progress.log_bytes = self.driver.log.sync()
        model, optimizer = self.learner.policy.model, self.learner.optimizer
        optimizer.wake(weights_only=True)
        self.saved = run_state.save(self.work, self.progress, model, optimizer, self.provenance)
        optimizer.sleep()
        if self.driver:
            run_state.prune(self.work, self.training.keep_checkpoints)


def control_group() -> dist.ProcessGroup | None:
    """All ranks, over the CPU, that may wait for rank 0 as long as it takes; None for one. Every rank calls it."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None


def from_rank_0(value: Any, control: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's ``value``, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]
