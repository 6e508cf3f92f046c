"""Train on one rollout: its optimizer steps, and when one is skipped."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from milepost.grpo.aggregations import StepTotals
from milepost.grpo.metrics import warn
from milepost.grpo.optimizer import Optimizer, learning_rate_at
from milepost.grpo.policy import MicroBatch, Policy
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import TrainingSequence
from milepost.grpo.settings import Settings

PER_STEP = (
    *("loss", "mtp_loss", "grad_norm", "idle_share", "seconds_optimizer"),
    *("expert_load_max", "expert_load_min", "expert_imbalance", "routing_agreement"),
)
MEANS = (
    *("clip_fraction", "ratio", "kl", "entropy", "log_prob_diff", "log_prob_diff_older", "engine_kl"),
    "fresh_share",
    *("importance_mean", "importance_square", "importance_clipped_share"),
)


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's packs, and counts over all ranks."""

    batches: list[MicroBatch]
    totals: StepTotals
    learns: bool  # False if its packs serve only the metrics


class Learner:
    """Updates the weights from a rollout's sequences. Every rank has one and calls it with the same sequences."""

    def __init__(self, policy: Policy, optimizer: Optimizer, settings: Settings) -> None:
        self.policy, self.optimizer, self.settings = policy, optimizer, settings

    def learn(self, sequences: Sequence[TrainingSequence], progress: Progress) -> dict[str, float]:
        """Take the rollout's optimizer steps, count them in ``progress``, and return the training metrics.

        With a single step the trained policy is the one that sampled, so its own log-probs are the old ones. With
        several steps the old log-probs are computed before the first, unless the engine's are used.
        """
        size = self.settings.training.global_batch
        steps = [self._prepare(sequences[start : start + size]) for start in range(0, len(sequences), size)]
        several = len(steps) > 1 and not self.settings.ratio_against_engine
        old = several or self.settings.algorithm.old_log_prob_forward
        steps = [replace(step, batches=self.policy.with_past_log_probs(step.batches, old)) for step in steps]
        reports = [self._step(step, progress) for step in steps if step.batches]
        if not any(step.learns for step in steps):
            warn(
                f"rollout {progress.rollout + 1}: no response that counts in the loss has an advantage, so there is"
                " nothing to learn: step skipped"
            )
        return _summary(reports) | {"bad_steps": progress.bad_steps}

    def _prepare(self, sequences: Sequence[TrainingSequence]) -> Step:
        """Pack a step's sequences, without filtered ones and those whose gradient is exactly zero.

        A response with advantage 0 has no gradient unless another term of the loss gives it one; it still counts in the
        means. A step without any gradient is skipped, because Adam's momentum and weight decay would change the weights
        all the same.
        """
        policy = self.policy
        sequences = [sequence for sequence in sequences if not sequence.is_filtered]
        totals = StepTotals(
            responses=len(sequences),
            tokens=sum(sequence.response_length for sequence in sequences),
            constant_length=self.settings.algorithm.constant_length or self.settings.sampling.max_response_tokens,
        )
        learns = any(policy.learns_without_advantage or sequence.advantage for sequence in sequences)
        if not (policy.learns_without_advantage or policy.measures_every_response):
            sequences = [sequence for sequence in sequences if sequence.advantage]
        return Step(policy.micro_batches(sequences, totals) if sequences else [], totals, learns)

    def _step(self, step: Step, progress: Progress) -> dict[str, float]:
        self.optimizer.zero_grad()
        report = self.policy.accumulate_gradients(step.batches, step.totals)
        if not step.learns:
            return report | {"grad_norm": 0.0, "learning_rate": 0.0, "seconds_optimizer": 0.0}
        began = time.perf_counter()
        self.optimizer.reduce()
        report["learning_rate"] = learning_rate_at(progress.optimizer_step + 1, self.settings.optimizer)
        finite = math.isfinite(report["loss"])
        report["grad_norm"] = self.optimizer.step(report["learning_rate"]) if finite else math.nan
        report["seconds_optimizer"] = time.perf_counter() - began
        if math.isfinite(report["grad_norm"]):
            progress.optimizer_step += 1
            progress.bad_steps_in_a_row = 0
        else:
            progress.bad_steps += 1
            progress.bad_steps_in_a_row += 1
            warn(
                f"rollout {progress.rollout + 1}: loss {report['loss']}, gradient norm {report['grad_norm']}: step"
                f" skipped ({progress.bad_steps_in_a_row} in a row)"
            )
        return report


def _summary(reports: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a rollout from those of its steps: token-weighted means of ``MEANS``, plain means otherwise."""
    if not reports:
        return {"loss": 0.0, "grad_norm": 0.0, "clip_fraction": 0.0, "learning_rate": 0.0}
    weight = sum(report["weight"] for report in reports)
    means = {name: sum(r[name] for r in reports) / weight for name in MEANS if name in reports[0]}
    if fresh := means.get("fresh_share"):  # of fresh tokens alone, and of the others
        means["log_prob_diff"] /= fresh
        means["log_prob_diff_older"] /= 1.0 - fresh if fresh < 1.0 else 1.0
    per_step = [name for name in PER_STEP if name in reports[0]]
    if "importance_mean" in means:
        # The effective sample size (Kish 1965), as a share of the tokens, or responses.
        means["importance_ess"] = means["importance_mean"] ** 2 / means.pop("importance_square")
        means["importance_max"] = max(report["importance_max"] for report in reports)
    averages = {name: sum(report[name] for report in reports) / len(reports) for name in per_step}
    return averages | means | {"learning_rate": reports[-1]["learning_rate"]}
