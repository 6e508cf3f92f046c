"""The math reward: 1 for a response whose single boxed answer equals the label, else 0."""

from collections.abc import Sequence
from functools import lru_cache

from milepost.rewards.answers import Answer, extract, read_answer
from milepost.rewards.arithmetic import MAX_BITS
from milepost.rewards.base import Response, Verdict
from milepost.rewards.comparison import Undecided, exactly, same_statement
from milepost.rewards.latex import OutOfBounds
from milepost.rewards.workers import Question, SympyWorkers


class MathReward:
    """Grades responses by exact arithmetic in this process, or else by sympy in worker processes.

    The workers start when the first answer needs them.
    """

    def __init__(self, max_seconds: float) -> None:
        self.workers = SympyWorkers(max_seconds)

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """Return one verdict per response. No text raises, and time and memory are bounded for any text.

        The answer of a verdict is normalized (``33`` for ``33.0``). The reason is ``correct``, ``wrong``,
        ``several_answers`` (a hedge such as "33 or 34"), ``no_think_end`` (the reasoning never ended), ``no_box``,
        ``too_long`` or ``too_deep`` (beyond what any answer needs), or ``grading_timeout`` or ``grading_error`` (sympy
        could not decide in time, or at all).
        """
        results = [_read(response) for response in responses]
        questions = list({result[1]: None for result in results if not isinstance(result, Verdict)})
        told = dict(zip(questions, self.workers.ask(questions), strict=True)) if questions else {}
        return [result if isinstance(result, Verdict) else _verdict(result[0], told[result[1]]) for result in results]

    def close(self) -> None:
        self.workers.close()


def _read(response: Response) -> Verdict | tuple[str, Question]:
    """The verdict, or the answer and the question for sympy that decides it."""
    content, reason = extract(response)
    if content is None:
        return Verdict(0.0, None, reason)
    try:
        answer = read_answer(content)
    except OutOfBounds as error:
        return Verdict(0.0, None, error.reason)
    wanted = _read_label(response.label)
    decided = "wrong" if wanted is None else _compare(wanted, answer)
    if isinstance(decided, Question):
        return answer.key, decided
    return Verdict(float(decided == "correct"), answer.key, decided)


@lru_cache(maxsize=4096)
def _read_label(label: str | int) -> Answer | None:
    """Parse the label; None if it is too long or nested too deeply, so that no answer matches it."""
    if isinstance(label, int) and label.bit_length() > MAX_BITS:
        return None
    try:
        return read_answer(str(label), is_label=True)
    except OutOfBounds:
        return None


def _compare(label: Answer, answer: Answer) -> str | Question:
    """``correct``, the reason why it is not, or the question for sympy."""
    try:
        if same_statement(label.statement, answer.statement, exactly):
            return "correct"
    except Undecided:
        return Question(label.statement, answer.statement)
    return "several_answers" if answer.parts > max(1, label.parts) else "wrong"


def _verdict(answer: str, told: str) -> Verdict:
    reason = {"equal": "correct", "different": "wrong"}.get(told, f"grading_{told}")
    return Verdict(float(reason == "correct"), answer, reason)
