r"""The reward for multiple choice: one letter, in a ``\boxed{}`` or after ``Answer:``."""

import re
from collections.abc import Sequence

from milepost.common.labels import one_letter
from milepost.rewards.answers import last_box
from milepost.rewards.base import NO_THINK_END, Response, Verdict

STATED = re.compile(r"\banswer[*_ ]*+[::][*_]*+\s*+([^\n]*+)", re.IGNORECASE)


class ChoiceReward:
    """1 for a response that chooses the label's letter and no other, else 0."""

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        return [_grade(response) for response in responses]

    def close(self) -> None:
        """Nothing to do: it starts no process."""


def _grade(response: Response) -> Verdict:
    """Grade one response.

    The reason is ``correct``, ``wrong``, ``no_think_end``, ``no_choice`` (neither a box nor an ``Answer:``),
    ``no_letter`` (its content is not a single letter), or ``several_answers`` (a box and an ``Answer:`` with different
    letters). The last of several boxes counts, and the last of several ``Answer:``.
    """
    if not response.is_answered:
        return Verdict(0.0, None, NO_THINK_END)
    # "Answer: \boxed{B}" is one statement, the box's.
    stated = [text for text in STATED.findall(response.answer) if text and "\\boxed" not in text]
    boxed = last_box(response.answer)
    found = [one_letter(text) for text in (*stated[-1:], *([] if boxed is None else [boxed]))]
    if not found:
        return Verdict(0.0, None, "no_choice")
    if None in found:
        return Verdict(0.0, None, "no_letter")
    if len(set(found)) > 1:
        return Verdict(0.0, None, "several_answers")
    is_right = found[0] == one_letter(response.label or "")
    return Verdict(float(is_right), found[0], "correct" if is_right else "wrong")
