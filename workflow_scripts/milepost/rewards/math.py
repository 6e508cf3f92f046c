"""The rule-based math reward: 1 for a response whose one boxed answer is the label's, else 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Self

from milepost.configuration.schema import Reward
from milepost.rewards.answers import Answer, extract, read_answer
from milepost.rewards.arithmetic import MAX_BITS
from milepost.rewards.comparison import Undecided, exactly, same_statement
from milepost.rewards.latex import OutOfBounds
from milepost.rewards.workers import Question, SympyWorkers


@dataclass(frozen=True)
class Verdict:
    """What the grader makes of one response.

    Attributes:
        correct: the reward.
        answer: what was answered, in a spelling that is the same for equal numbers (``33`` for ``33.0``); None where
            there is no answer.
        reason: ``correct``; ``wrong``; ``several_answers`` (a hedge such as "33 or 34"); ``no_think_end`` (the
            reasoning never ended); ``no_box``; ``too_long`` or ``too_deep`` (beyond what any answer needs);
            ``grading_timeout`` or ``grading_error`` (sympy could not tell in time, or at all).
    """

    correct: bool
    answer: str | None
    reason: str


class Grader:
    """Grades responses: exact arithmetic here, anything else by sympy in processes that may be killed.

    A context manager, because those processes end with it; they start when the first answer needs them.
    """

    def __init__(self, settings: Reward) -> None:
        self.settings = settings
        self.workers = SympyWorkers(settings.max_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.workers.close()

    def grade(self, pairs: Sequence[tuple[str, str | int]]) -> list[Verdict]:
        """One verdict for each (response text, label). No text raises, or takes more than bounded time and memory."""
        results = [self._read(response, label) for response, label in pairs]
        questions = list({result[1]: None for result in results if not isinstance(result, Verdict)})
        told = dict(zip(questions, self.workers.ask(questions), strict=True))
        return [result if isinstance(result, Verdict) else _verdict(result[0], told[result[1]]) for result in results]

    def _read(self, response: str, label: str | int) -> Verdict | tuple[str, Question]:
        """The verdict, or the answer and the question that decides it."""
        content, reason = extract(response, self.settings.think_block)
        if content is None:
            return Verdict(False, None, reason)
        try:
            answer = read_answer(content)
        except OutOfBounds as error:
            return Verdict(False, None, error.reason)
        wanted = _read_label(label)
        decided = "wrong" if wanted is None else _compare(wanted, answer)
        if isinstance(decided, Question):
            return answer.key, decided
        return Verdict(decided == "correct", answer.key, decided)


@lru_cache(maxsize=4096)
def _read_label(label: str | int) -> Answer | None:
    """The label; None where it is longer or deeper than any answer, and so matches none."""
    if isinstance(label, int) and label.bit_length() > MAX_BITS:
        return None
    try:
        return read_answer(str(label), is_label=True)
    except OutOfBounds:
        return None


def _compare(label: Answer, answer: Answer) -> str | Question:
    """``correct``, a reason why not, or what to ask sympy."""
    try:
        if same_statement(label.statement, answer.statement, exactly):
            return "correct"
    except Undecided:
        return Question(label.statement, answer.statement)
    return "several_answers" if answer.parts > max(1, label.parts) else "wrong"


def _verdict(answer: str, told: str) -> Verdict:
    reason = {"equal": "correct", "different": "wrong"}.get(told, f"grading_{told}")
    return Verdict(reason == "correct", answer, reason)
