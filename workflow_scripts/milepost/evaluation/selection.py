"""How much the best of several validations flatters a checkpoint: a maximum of noisy scores is too high."""

import json
import math
from dataclasses import dataclass

from scipy import integrate, stats

from milepost.checkpoints.manifest import Manifest
from milepost.configuration.rewards import Reward

SMALL_BIAS = 0.01  # of a share: what more problems should bring it down to


@dataclass(frozen=True)
class Selection:
    """The choice of a run's best checkpoint by validation.

    Attributes:
        run: the name of the run.
        checkpoint: the best one.
        score: its validation score.
        validations: how many checkpoints it was chosen from.
        standard_error: of its score, over problems; None where the run's log has none.
        dataset: the problem set of the validations.
        is_share: whether scores are shares of correct samples.
    """

    run: str
    checkpoint: str
    score: float
    validations: int
    standard_error: float | None
    dataset: str
    is_share: bool

    @property
    def bias(self) -> float | None:
        """By how much the best score would exceed the truth if all checkpoints were equally good.

        It is an upper bound: all validations ask the same problems, and the part of the standard error that comes from
        their choice raises or lowers all scores alike.
        """
        return None if self.standard_error is None else expected_maximum(self.validations) * self.standard_error

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return f"{100 * value:.1f} points" if self.is_share else f"{value:.3g}"

        score = f"{100 * self.score:.1f}%" if self.is_share else f"{self.score:.3g}"
        text = f"{self.run}@best is {self.checkpoint}, {score} on {self.dataset}"
        if self.validations == 1:
            return f"{text}, the only checkpoint that was validated."
        text += f", the best of {self.validations} validations. The best of several noisy scores is too high"
        if self.bias is None:
            return f"{text}; by how much can't be told, since the log of this run has no standard errors."
        text += (
            f": if all {self.validations} checkpoints were equally good, it would exceed their true score by up to"
            f" {shown(self.bias)} (its standard error is {shown(self.standard_error)}). Four times as many problems"
            " would halve that"
        )
        if self.is_share and self.bias > 2 * SMALL_BIAS:
            text += f", {math.ceil((self.bias / SMALL_BIAS) ** 2)} times as many would bring it to 1 point"
        return f"{text}. A score on other problems does not have this bias."


def expected_maximum(count: int) -> float:
    """The expected maximum of ``count`` independent standard normal variables."""
    above = integrate.quad(lambda x: 1 - stats.norm.cdf(x) ** count, 0, math.inf)[0]
    below = integrate.quad(lambda x: stats.norm.cdf(x) ** count, -math.inf, 0)[0]
    return above - below


def selection(trained: Manifest) -> Selection | None:
    """How the best checkpoint of a training was chosen; None if none was validated."""
    best, config = trained.facts.get("best"), trained.provenance["config"]
    if not best:
        return None
    lines = (trained.root / trained.facts["metrics"]).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("validation_average") is not None]
    validated = {row["rollout"]: row for row in rows if row["rollout"] > 0}  # before it, there is no checkpoint
    at = validated.get(int(best["checkpoint"].rpartition("-")[2]), {})
    return Selection(
        run=trained.path.parent.name,
        checkpoint=best["checkpoint"],
        score=best["score"],
        validations=max(len(validated), 1),
        standard_error=at.get("validation_standard_error"),
        dataset=config["validation"]["dataset"],
        is_share=Reward.model_validate(config.get("validation_reward") or config.get("reward") or {}).is_share,
    )
