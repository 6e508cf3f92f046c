"""The input of every reward, a `Response`, and its output, a `Verdict`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from milepost.configuration.rewards import ThinkBlock

THINK_MARK = re.compile(r"<(/?)think>")
NO_THINK_END = "no_think_end"  # the reason of a verdict on a response whose reasoning never ended
ERROR = "grading_"  # the prefix of every reason for failed grading


class Asked(Protocol):
    """The problem that a response answers: `problems.loading.Problem`, or `grpo.data.Prompt`."""

    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]
    label: str | None


@dataclass(frozen=True)
class Response:
    """One response as rewards see it, including users' functions.

    Attributes:
        row: the whole row of the data set, parsed JSON.
        prompt: the chat, a list of ``{"role", "content"}``.
        label: the row's label as the reward's kind reads it; None if there is none.
        response: the whole text of the response.
        reasoning: the text before the end of the think block.
        answer: the text after it; empty if the reasoning never ended.
        is_answered: whether the reasoning ended, so that ``answer`` is the model's answer.
        finish: ``stop``, or ``length`` if the response was truncated at the maximum length.
        tokens: the number of sampled tokens.
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
        """The response ``text`` to ``asked``, split at the end of its reasoning."""
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
    """A reward's verdict on one response.

    Attributes:
        reward: a finite number.
        answer: the answer, normalized so that equal answers are equal texts for majority votes; None if there is none.
        reason: a word or a sentence; ``no_think_end`` if the reasoning never ended, ``grading_...`` if grading failed.
        parts: the verdict of each part of a sum, by name.
        correct_from: the response is correct if ``reward`` is at least this.
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
        """Whether grading failed."""
        return self.reason.startswith(ERROR)

    def parts_as_json(self) -> dict[str, dict[str, Any]]:
        """The parts as plain JSON, for logs."""
        return {name: {"reward": part.reward, "reason": part.reason} for name, part in self.parts.items()}


class Grade(Protocol):
    """A kind of reward: returns one verdict per response, in order."""

    def grade(self, responses: Sequence[Response]) -> list[Verdict]: ...

    def close(self) -> None:
        """End all processes that it started."""


def split_reasoning(response: str, think_block: ThinkBlock) -> tuple[str, str | None]:
    """Split a response into reasoning and answer; the answer is None if the reasoning never ended.

    With ``think_block="required"`` every response begins with reasoning; with ``"optional"`` only one that has a think
    tag. The reasoning ends at its ``</think>``; a further ``</think>`` without a ``<think>`` does not count.
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
