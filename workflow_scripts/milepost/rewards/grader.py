"""Grade responses by the configured reward: a kind, a user's function, or a weighted sum of those."""

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from milepost.configuration.rewards import Part, Reward
from milepost.rewards.base import Grade, Response, Verdict
from milepost.rewards.choice import ChoiceReward
from milepost.rewards.exact import ExactReward
from milepost.rewards.math import MathReward
from milepost.rewards.user import UserReward


class Grader:
    """Grades responses; a context manager, which ends the processes that it starts."""

    def __init__(self, settings: Reward) -> None:
        self.settings = settings
        self.parts = [(part, _start(part, settings)) for part in settings.parts]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _, reward in self.parts:
            reward.close()

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """Return one verdict per response; call `settle` after all those of a rollout or an evaluation.

        Raises:
            UserError: a user's function can't be loaded.
        """
        graded = [reward.grade(responses) for _, reward in self.parts]
        verdicts = map(self._sum, zip(*graded, strict=True)) if self.settings.sum else graded[0]
        return [replace(verdict, correct_from=self.settings.correct_from) for verdict in verdicts]

    def settle(self) -> None:
        """End a rollout or an evaluation; `UserError` if a user's function failed more often than ``max_error_share``
        allows."""
        for _, reward in self.parts:
            if isinstance(reward, UserReward):
                reward.settle()

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        """The weighted sum of the parts' verdicts; answer and reason come from the first part of a built-in kind.

        If a function failed, the reward is ``on_error`` regardless of the other parts.
        """
        parts = [part for part, _ in self.parts]
        named = {part.title: verdict for part, verdict in zip(parts, verdicts, strict=True)}
        for part, verdict in zip(parts, verdicts, strict=True):
            if part.function and verdict.failed:
                return Verdict(self.settings.on_error, None, verdict.reason, named)
        reward = sum(part.weight * verdict.reward for part, verdict in zip(parts, verdicts, strict=True))
        leading = next((number for number, part in enumerate(parts) if part.kind), 0)
        return Verdict(reward, verdicts[leading].answer, verdicts[leading].reason, named)


def _start(part: Part, settings: Reward) -> Grade:
    """Start the reward of one part; a new kind needs one more case here, and its file."""
    match part.kind:
        case "math":
            return MathReward(settings.max_seconds)
        case "choice":
            return ChoiceReward()
        case "exact":
            return ExactReward(part.trim, part.fold_case)
        case None:
            return UserReward(part.where, part.batch, settings)
