"""What every reward is given, a `Response`, and what it gives back, a `Verdict`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from milepost.configuration.rewards import ThinkBlock

THINK_MARK = re.compile(r"<(/?)think>")
NO_THINK_END = "no_think_end"  # the reason of a verdict on a response whose reasoning never ended
ERROR = "grading_"  # begins every reason that says that grading failed


class Asked(Protocol):
    """A problem that was asked: `problems.loading.Problem`, or what a training keeps of one."""

    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]
    label: str | None


@dataclass(frozen=True)
class Response:
    """One response, as a reward sees it; a user's function is given the same.

    Attributes:
        row: the data set's whole row, as its JSON gives it.
        prompt: the chat that was asked, a list of ``{"role", "content"}``.
        label: the row's label, as the reward's kind reads it; None where there is none.
        response: all of the response's text.
        reasoning: the text before the think block's end.
        answer: the text behind it; empty where the reasoning never ended.
        is_answered: whether the reasoning ended, so that ``answer`` is what the model wanted to say.
        finish: ``stop``, or ``length`` where the response was cut off by the cap.
        tokens: how many tokens were sampled.
    """

    row: Mapping[str, Any]
    prompt: Sequence[Mapping[str, str]]
    label: str | None
    response: str
    reasoning: str
    answer: str
    is_answered: bool
    finish: Literal["stop", "length"]
    tokens: int

    @classmethod
    def of(
        cls, asked: Asked, text: str, finish: Literal["stop", "length"], tokens: int, think_block: ThinkBlock
    ) -> Self:
        """The response ``text`` to what was asked, split where its reasoning ends."""
        reasoning, answer = split_reasoning(text, think_block)
        return cls(
            row=asked.row,
            prompt=asked.messages,
            label=asked.label,
            response=text,
            reasoning=reasoning,
            answer=answer or "",
            is_answered=answer is not None,
            finish=finish,
            tokens=tokens,
        )


@dataclass(frozen=True)
class Verdict:
    """What a reward makes of one response.

    Attributes:
        reward: what the response earns.
        answer: what was answered, in a spelling that is the same for equal answers, which a majority vote counts; None
            where there is no answer.
        reason: in a word or a sentence; `no_think_end` where the reasoning never ended, ``grading_...`` where grading
            failed.
        parts: of a sum the verdict of each part, by its name.
        correct_from: the reward from which the response is correct.
    """

    reward: float
    answer: str | None
    reason: str
    parts: Mapping[str, "Verdict"] = field(default_factory=dict)
    correct_from: float = 1.0

    @property
    def correct(self) -> bool:
        return self.reward >= self.correct_from

    @property
    def failed(self) -> bool:
        """Whether the response could not be graded."""
        return self.reason.startswith(ERROR)

    def parts_as_json(self) -> dict[str, dict[str, Any]]:
        """The parts as logs keep them."""
        return {name: {"reward": part.reward, "reason": part.reason} for name, part in self.parts.items()}


class Grade(Protocol):
    """What a reward's kind does: one verdict for each response, in their order."""

    def grade(self, responses: Sequence[Response]) -> list[Verdict]: ...

    def close(self) -> None:
        """End the processes that it started."""


def split_reasoning(response: str, think_block: ThinkBlock) -> tuple[str, str | None]:
    """The text before the end of the reasoning and the text behind it, which is None where the reasoning never ended.

    With ``think_block="required"`` a response begins within its reasoning; with ``"optional"`` it does where it has a
    think mark. The reasoning ends at its ``</think>``; one more behind it, that nothing opened, takes nothing away.
    """
    marks = list(THINK_MARK.finditer(response))
    thinking, start = bool(marks) or think_block == "required", 0
    thought, said = [], []
    for mark in marks:
        (thought if thinking else said).append(response[start : mark.start()])
        thinking, start = not mark[1], mark.end()
    if thinking:
        return response, None
    return "\n".join(thought), "\n".join([*said, response[start:]])
