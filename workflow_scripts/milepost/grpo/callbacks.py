"""What hangs on the training loop: rank 0's validation and logs, and the checkpoints, which every rank writes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.common.interrupts import Interrupted, Interrupts
from milepost.grpo import run_state
from milepost.grpo.groups import Group
from milepost.grpo.metrics import RunLog, equal_rewards, warn
from milepost.grpo.optimizer import Optimizer
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import Rollout, statistics
from milepost.grpo.settings import Settings
from milepost.rollout.prompts import decode

KEPT_GROUPS = 2  # prompts of every rollout whose samples are kept to read
FIRST_ROLLOUTS = 3  # after which a warning says if all rewards were equal
ALARMING_LOG_PROB_DIFF = 0.1  # mean |trainer - engine|; rounding to bf16 explains a few hundredths


class Validation:
    """Evaluates the weights that the engine holds, every ``validation.interval`` rollouts."""

    def __init__(
        self, interval: int, evaluate: Callable[[int], dict[str, float]], log: RunLog, interrupts: Interrupts
    ) -> None:
        """``evaluate`` takes the number of rollouts so far and returns metrics."""
        self.interval, self.evaluate, self.log, self.interrupts = interval, evaluate, log, interrupts

    def run_if_due(self, progress: Progress) -> None:
        """Evaluate, unless these weights have a score or it is not their turn."""
        if not progress.validation_due(self.interval):
            return
        began = time.perf_counter()
        try:
            with self.interrupts.abandonable():
                metrics = self.evaluate(progress.rollout)
        except Interrupted:
            return
        progress.score = metrics["validation_average"]
        self.log.metrics(progress.rollout, metrics | {"seconds_validation": time.perf_counter() - began})


class Logs:
    """Reports every rollout: metrics, some samples to read, the progress bar, and warnings."""

    def __init__(self, settings: Settings, log: RunLog, bar: tqdm, tokenizer: PreTrainedTokenizerBase) -> None:
        self.training, self.log, self.bar, self.tokenizer = settings.training, log, bar, tokenizer

    def drawn(self, number: int, rollout: Rollout) -> None:
        """Keep the samples of the first prompts, before anything is learned from them."""
        for sample in rollout.samples[: KEPT_GROUPS * self.training.samples_per_prompt]:
            self.log.sample(sample.row(number, decode(self.tokenizer, sample.prompt.ids)))

    def learned(
        self, progress: Progress, rollout: Rollout, metrics: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """Log a rollout that has been learned from; ``metrics`` and ``seconds`` (by phase) are of the learning."""
        phases = {name: rollout.seconds.get(name, 0.0) + seconds.get(name, 0.0) for name in rollout.seconds | seconds}
        total = sum(phases.values())
        rates = {"tokens_per_second": rollout.tokens / total, "seconds_step": total}
        rates |= {f"seconds_{name}": value for name, value in phases.items()}
        of_rollout = statistics(rollout.generated, self.training.samples_per_prompt) | rollout.flow
        self.log.metrics(progress.rollout, of_rollout | metrics | rates)
        shown = {name: f"{of_rollout[name]:.3f}" for name in ("reward_mean", "pass_rate")}
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


class Checkpoints:
    """Saves the run when it is due; keeps the last checkpoints and the best one.

    Attributes:
        last: the checkpoint that the run goes on from, or the last one that was saved.
    """

    def __init__(
        self, work: Path, settings: Settings, progress: Progress, provenance: dict[str, Any], last: Path | None
    ) -> None:
        self.work, self.training, self.provenance = work, settings.training, provenance
        self.last = last
        self._saved = _state_of(progress)  # to begin with there is nothing to lose

    def due(self, progress: Progress, ends: bool) -> bool:
        """Whether to save now; ``ends``: the run ends here."""
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
        """Save the run state and remove what is no longer kept.

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
