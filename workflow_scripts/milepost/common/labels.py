r"""Read the answer from a row's label, or say why no response could ever match it.

The reward decides what a label may be (`READERS`). For the math reward it is the expected content of ``\boxed{}``: a
number, an expression, a list, an interval, a few words. Two longer forms are unambiguous and accepted: a solution that
ends with ``#### 4``, as in GSM8K, and one with a single ``\boxed{4}``. Anything else that is longer than an answer is
refused, since no response could match it.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

MAX_CHARACTERS = 1000  # the grader reads no longer answers
MAX_WORDS = 8  # of an answer in words, such as "all real numbers except 3"

FINAL_ANSWER, BOX = "####", r"\boxed"
BACKSLASHES_OR_BRACE = re.compile(r"\\++(?:(boxed\s*+\{)|[{}])?|[{}]")
LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\b|[\s(\[{*_`$\"'])*(?P<letter>[A-Za-z])[\s)\]}*_`$\"'.:]*")
NO_WORD = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
WORD = re.compile(r"[^\W\d_]{2,}")
SENTENCE = re.compile(
    r"\b(?:is|are|was|were)\s*[$\d+-]|\bthe answer\b|\b(?:therefore|thus|hence|because)\b"
    r"|(?:[a-z]{3}|\d)[.!?]\s+[a-z]{2}|答案|因此|所以|。.",
    re.IGNORECASE,
)


def read_label(value: Any) -> str:
    """The answer in a label (a JSON value); ``8.0`` becomes 8, other floats their shortest decimal, ``["8"]`` is "8".

    Raises:
        ValueError: the label does not hold exactly one answer; the message is written to follow the label's key.
    """
    value = _only(value)
    if isinstance(value, float):
        return _shortest(value)
    answer = _extracted(read_text(value).strip())
    if len(answer) > MAX_CHARACTERS:
        raise ValueError(f"is longer than an answer may be, {MAX_CHARACTERS} characters")
    if not _fits_in_braces(answer):
        raise ValueError("has braces that do not match, so no box could hold it")
    if "\n" in answer and r"\begin" not in answer:
        raise ValueError("has several lines, so it is not a single answer")
    if len(WORD.findall(NO_WORD.sub(" ", answer))) > MAX_WORDS or SENTENCE.search(answer):
        raise ValueError("is prose, not a single answer")
    return answer


def read_text(value: Any) -> str:
    """A label as text, every character of it; a number in its shortest decimal spelling; a list's only element.

    Raises:
        ValueError: it is neither, or empty.
    """
    value = _only(value)
    if isinstance(value, list) and value:
        raise ValueError("is a list of several values, not a single answer")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is neither text nor a number")
    text = _shortest(value) if isinstance(value, float) else str(value)
    if not text.strip():
        raise ValueError("is empty")
    return text


def read_letter(value: Any) -> str:
    """The letter of a choice, ``B`` for ``(b)`` as well.

    Raises:
        ValueError: it is not one letter.
    """
    if letter := one_letter(read_text(value)):
        return letter
    raise ValueError("is not the one letter of a choice")


def one_letter(text: str) -> str | None:
    r"""The upper-case letter that a text is, with no more around it than marks: ``(B)``, ``**B.**``, ``\text{B}``."""
    found = LETTER.fullmatch(text)
    return found["letter"].upper() if found else None


def read_any(value: Any) -> str | None:
    """A label for a function that reads it as it likes: text or a number as above, anything else as JSON."""
    if value is None or value == "":
        return None
    return json.dumps(value) if isinstance(value, bool | list | dict) else read_text(value)


@dataclass(frozen=True)
class LabelReader:
    """How a reward reads labels, and how it recognizes a prompt that says how to answer.

    Attributes:
        read: from JSON's value to the label; a `ValueError` says what is wrong with it.
        required: whether a row without a label is unusable.
        asks: a prompt that contains one of these asks for an answer that the reward finds.
    """

    read: Callable[[Any], str | None]
    required: bool = True
    asks: tuple[str, ...] = ()


READERS = {
    "math": LabelReader(read_label, asks=(BOX,)),
    "choice": LabelReader(read_letter, asks=(BOX, "Answer:")),
    "exact": LabelReader(read_text),
    "any": LabelReader(read_any, required=False),
}


def _only(value: Any) -> Any:
    """The element of a list that has no other, as some data sets write their labels; else the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shortest(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError("is not a finite number")
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")


def _extracted(text: str) -> str:
    """The answer that a solution marks; the whole text if it marks none."""
    found = {answer for answer in (*_after_mark(text), *_boxed(text)) if answer}
    if len(found) > 1:
        raise ValueError("names several answers")
    if not found and (FINAL_ANSWER in text or BOX in text):
        raise ValueError(rf"has a {FINAL_ANSWER} or \boxed without an answer")
    return found.pop() if found else text


def _after_mark(text: str) -> Iterator[str]:
    for answer in text.split(FINAL_ANSWER)[1:]:
        yield _extracted(answer.strip()) if BOX in answer else answer.strip()


def _boxed(text: str) -> Iterator[str]:
    """The content of every complete box, in one pass; of nested boxes only the innermost."""
    opened: list[int | None] = []  # for each open brace: where its content starts if it is a box's
    innermost = -1
    for kind, brace in _braces(text):
        if kind != "}":
            opened.append(brace.end() if kind == BOX else None)
        elif opened and (start := opened.pop()) is not None:
            if start > innermost:
                yield text[start : brace.end() - 1].strip()
            innermost = max(innermost, start)


def _fits_in_braces(text: str) -> bool:
    """Whether braces around ``text`` close at its end, and not before or after."""
    depth = 0
    for kind, brace in _braces(text + "}"):
        depth += -1 if kind == "}" else 1
        if depth < 0:
            return brace.end() == len(text) + 1
    return False


def _braces(text: str) -> Iterator[tuple[str, re.Match]]:
    r"""Every grouping brace, as ``{``, ``}`` or, if it opens a box, ``\boxed``; ``\{`` and ``\}`` are literal."""
    for match in BACKSLASHES_OR_BRACE.finditer(text):
        backslashes = len(match[0]) - len(match[0].lstrip("\\"))
        if match[1]:
            yield BOX, match
        elif match[0][-1] in "{}" and backslashes % 2 == 0:
            yield match[0][-1], match
