"""The rule-based math reward: 1 for a response whose one boxed answer is the label's, else 0."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Self

from configuration.schema import Reward
from rewards.answers import SYMBOL, Answer, balanced, extract, read_answer, same_text
from rewards.workers import Question, SympyWorkers

MAX_SYMPY_CHARACTERS = 300  # of an answer that only sympy can read: longer ones are wrong

CLOSED_COMMANDS = (
    r"\\(?:frac|sqrt|cdot|times|div|binom|pi|log|ln|exp|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan"
    r"|lfloor|rfloor|lceil|rceil)(?![a-zA-Z])"
)
CLOSED_FORM = re.compile(  # digits, operators, brackets, e, functions, the base of \log and the degree of \sqrt
    rf"(?:[0-9.+\-*/^(){{}}! ]|(?<![a-zA-Z])e(?![a-zA-Z])|{CLOSED_COMMANDS}"
    r"|(?<=\\log)\s*_\s*(?=[0-9{])|(?<=\\sqrt)\[[0-9]+\])+"
)
DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
BASED_NUMBER = re.compile(r"[0-9]\s*\}?\s*_")  # math-verify drops the base of 3_3


@dataclass(frozen=True)
class Verdict:
    """What the grader makes of one response.

    Attributes:
        correct: the reward.
        answer: what was answered, in a spelling that is the same for equal numbers (``33`` for ``33.0``); None where
            there is no answer.
        reason: ``correct``; ``wrong``; ``several_answers`` (a hedge such as "33 or 34"); ``no_think_end`` (the
            reasoning never ended); ``no_box``; ``too_long``; ``grading_timeout`` or ``grading_error`` (sympy could
            not tell in time, or at all).
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
        answer = read_answer(content)
        if answer is None:
            return Verdict(False, None, "too_long")
        wanted = _read_label(label)
        if wanted is None:
            return Verdict(False, answer.key, "wrong")
        decided = _compare(answer, wanted)
        if isinstance(decided, Question):
            return answer.key, decided
        return Verdict(decided == "correct", answer.key, decided)


@lru_cache(maxsize=4096)
def _read_label(label: str | int) -> Answer | None:
    if isinstance(label, int) and label.bit_length() > 3000:  # Python refuses to print beyond 4,300 digits
        return None
    return read_answer(str(label), name=SYMBOL)


def _compare(answer: Answer, label: Answer) -> str | Question:
    """``correct``, a reason why not, or what to ask sympy."""
    if answer.value is not None and label.value is not None:
        return "correct" if answer.value == label.value else "wrong"
    as_text = label.value is None  # a number is not: without its space, 3 3 would be 33
    if as_text and same_text(answer.text, label.text):
        return "correct"
    if answer.undefined:
        return "wrong"
    if answer.parts != label.parts:
        return "several_answers" if answer.parts > label.parts else "wrong"
    closed = [CLOSED_FORM.fullmatch(side) is not None for side in (label.right, answer.right)]
    if as_text and all(closed) and same_text(answer.right, label.right):
        return "correct"
    if len(answer.text) > MAX_SYMPY_CHARACTERS:
        return "too_long"
    if not balanced(answer.text):
        return "wrong"
    if all(closed):
        return Question(_exact(label.right), _exact(answer.right), closed=True)
    if any(closed) or len(label.text) == 1 or BASED_NUMBER.search(answer.text) or BASED_NUMBER.search(label.text):
        return "wrong"  # a number is no expression in unknowns, and the letter of a choice has its case
    return Question(label.text, answer.text, closed=False)


def _exact(text: str) -> str:
    """Decimals as fractions: sympy would make floating point of them."""
    return DECIMAL.sub(lambda match: f"(\\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}})", text)


def _verdict(answer: str, told: str) -> Verdict:
    reason = {"equal": "correct", "different": "wrong"}.get(told, f"grading_{told}")
    return Verdict(reason == "correct", answer, reason)
