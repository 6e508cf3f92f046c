"""Callbacks of the training loop: validation and logs on rank 0, and checkpoints, which every rank writes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.common.durations import duration
from milepost.common.interrupts import Interrupted, Interrupts
from milepost.grpo import overlong, run_state
from milepost.grpo.groups import Group
from milepost.grpo.metrics import METRICS, RunLog, equal_rewards, warn
from milepost.grpo.optimizer import Optimizer
from milepost.grpo.pace import Pace
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import Rollout, statistics
from milepost.grpo.settings import Settings
from milepost.rollout.prompts import decode

KEPT_GROUPS = 2  # prompts per rollout whose samples go to samples.jsonl
FIRST_ROLLOUTS = 3  # warn after these if all rewards were equal
ALARMING_LOG_PROB_DIFF = 0.1  # mean |trainer - engine|; rounding to bf16 explains a few hundredths


class Validation:
    """Evaluates the weights that the engine holds, every ``validation.interval`` rollouts."""

    def __init__(
        self, interval: int, evaluate: Callable[[int], dict[str, float]], logs: "Logs", interrupts: Interrupts
    ) -> None:
        """``evaluate`` takes the number of finished rollouts and returns metrics."""
        self.interval, self.evaluate, self.logs, self.interrupts = interval, evaluate, logs, interrupts

    def run_if_due(self, progress: Progress) -> None:
        """Evaluate these weights if it is due and they have no score yet."""
        if not progress.validation_due(self.interval):
            return
        began = time.perf_counter()
        try:
            with self.interrupts.abandonable():
                metrics = self.evaluate(progress.rollout)
        except Interrupted:
            return
        progress.score = metrics["validation_average"]
        self.logs.validated(progress, metrics | {"seconds_validation": time.perf_counter() - began})


class Logs:
    """Logs every rollout: metrics, a few samples, the progress bar with the time that is left, and warnings."""

    def __init__(self, settings: Settings, log: RunLog, bar: tqdm, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings, self.training = settings, settings.training
        self.log, self.bar, self.tokenizer = log, bar, tokenizer
        self.pace = Pace(self.training.rollouts, settings.validation.interval, self.training.save_interval)
        for row in log.lines[METRICS].read():  # of a run that goes on
            self.pace.add(row)
        self._save: dict[str, float] = {}

    def drawn(self, number: int, rollout: Rollout) -> None:
        """Log the samples of the first prompts, before training on them."""
        for sample in rollout.samples[: KEPT_GROUPS * self.training.samples_per_prompt]:
            self.log.sample(sample.row(number, decode(self.tokenizer, sample.prompt.ids)))

    def validated(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Log a validation."""
        self.log.metrics(progress.rollout, metrics)
        self.pace.add({"rollout": progress.rollout} | metrics)

    def saved(self, seconds: float) -> None:
        """Log with the next rollout how long a checkpoint took: a run that goes on from it has no later lines."""
        self._save = {"seconds_save": seconds}

    def learned(
        self, progress: Progress, rollout: Rollout, metrics: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """Log a rollout after training on it; ``metrics`` and ``seconds`` (by phase) are the training's."""
        phases = {name: rollout.seconds.get(name, 0.0) + seconds.get(name, 0.0) for name in rollout.seconds | seconds}
        total = sum(phases.values())
        rates = {"tokens_per_second": rollout.tokens / total, "seconds_step": total}
        rates |= {f"seconds_{name}": value for name, value in phases.items()} | self._save
        self._save = {}
        of_rollout = statistics(rollout.generated, self.training.samples_per_prompt) | rollout.flow
        completions, rewards = [s.completion for s in rollout.samples], [s.reward for s in rollout.samples]
        of_rollout |= overlong.statistics(completions, rewards, self.settings)
        self.pace.add({"rollout": progress.rollout} | rates)
        left = self.pace.seconds_left()
        self.log.metrics(progress.rollout, of_rollout | metrics | rates | {"seconds_left": left})
        shown = [f"{name}={of_rollout[name]:.3f}" for name in ("reward_mean", "pass_rate")]
        self.bar.set_postfix_str(", ".join([f"about {duration(left)} left", *shown]), refresh=False)
        self.bar.update()
        first_are_done = progress.rollout == min(FIRST_ROLLOUTS, self.training.rollouts)
        if first_are_done and (warning := equal_rewards(self.log)):
            warn(warning)
        if metrics.get("log_prob_diff", 0.0) > ALARMING_LOG_PROB_DIFF:
            warn(
                f"rollout {progress.rollout}: the log-probs of engine and trainer differ by"
                f" {metrics['log_prob_diff']:.3f} on average: they no longer compute the same model; stop the run and"
                " check it with engine.check_weights: true"
            )


class Checkpoints:
    """Saves the run when it is due; keeps the last few checkpoints and the best one.

    Attributes:
        last: the checkpoint that was saved last, at first the one that the run resumed from.
    """

    def __init__(
        self, work: Path, settings: Settings, progress: Progress, provenance: dict[str, Any], last: Path | None
    ) -> None:
        self.work, self.training, self.provenance = work, settings.training, provenance
        self.last = last
        self._saved = _state_of(progress)  # nothing to save until the state changes

    def due(self, progress: Progress, ends: bool) -> bool:
        """Whether to save now; ``ends`` says that the run ends here."""
        rollout = progress.rollout
        in_turn = rollout > 0 and (rollout % self.training.save_interval == 0 or rollout >= self.training.rollouts)
        return _state_of(progress) != self._saved and (ends or in_turn)

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: Optimizer,
        log: RunLog | None = None,
        waiting: Sequence[Group] = (),
    ) -> None:
        """Save the run state and delete old checkpoints.

        Every rank calls this, rank 0 with its ``log`` and the groups that go on in the next rollout.
        """
        if log:
            progress.log_bytes = log.sync()
        optimizer.wake(weights_only=True)
        self.last = run_state.save(self.work, progress, model, optimizer, self.provenance, waiting)
        optimizer.sleep()
        if log:
            run_state.prune(self.work, self.training.keep_checkpoints)
        self._saved = _state_of(progress)


def _state_of(progress: Progress) -> tuple[int, float | None]:
    return progress.rollout, progress.score
