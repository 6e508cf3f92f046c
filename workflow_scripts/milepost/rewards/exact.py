"""The reward for text that equals the label."""

from collections.abc import Sequence

from milepost.rewards.base import NO_THINK_END, Response, Verdict


class ExactReward:
    """1 for a response whose whole answer is the label, else 0."""

    def __init__(self, trim: bool = True, fold_case: bool = True) -> None:
        self.trim, self.fold_case = trim, fold_case

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        return [self._grade(response) for response in responses]

    def close(self) -> None:
        """Nothing to do: it starts no process."""

    def _grade(self, response: Response) -> Verdict:
        if not response.is_answered:
            return Verdict(0.0, None, NO_THINK_END)
        answer = self._same(response.answer)
        is_right = answer == self._same(response.label or "")
        return Verdict(float(is_right), answer, "correct" if is_right else "wrong")

    def _same(self, text: str) -> str:
        """The normalized text, the same for all texts that count as equal."""
        text = text.strip() if self.trim else text
        return text.casefold() if self.fold_case else text
