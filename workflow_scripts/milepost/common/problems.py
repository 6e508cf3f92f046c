"""Read problem sets: JSON lines, each with a chat prompt and a label."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from milepost.common.errors import UserError
from milepost.common.labels import READERS, LabelReader

ROLES = ("system", "user", "assistant")
HALF_A_PAIR = re.compile("[\ud800-\udfff]")

BadRows = list[tuple[int, str]]  # (line number from 1, what is wrong) of every unusable row


@dataclass(frozen=True)
class Problem:
    """One usable row.

    Attributes:
        messages: the chat that asks.
        label: the answer that is right; None where the reward needs none.
        line: where it stood in the file, from 1.
        row: all of it, as JSON gave it.
    """

    messages: list[dict[str, str]]
    label: str | None
    line: int
    row: dict[str, Any] = field(default_factory=dict)


class ProblemSet(Protocol):
    """A problem set's settings (`configuration.schema.Dataset`)."""

    prompt_key: str
    label_key: str
    instruction: str | None
    rows: int | None
    unique_prompts: bool
    max_bad_share: float


def load_problem_set(
    path: Path | str, known: ProblemSet, labels: str = "math", *, max_bad_share: float | None = None
) -> tuple[list[Problem], BadRows]:
    """The usable rows of a file and the unusable ones; a `UserError` if `require_problems` refuses it.

    Args:
        labels: how the reward reads them, a name of `common.labels.READERS`.
        max_bad_share: in the place of what is known.
    """
    problems, bad = read_problems(path, known.prompt_key, known.label_key, labels)
    share = known.max_bad_share if max_bad_share is None else max_bad_share
    require_problems(path, problems, bad, rows=known.rows, unique=known.unique_prompts, max_bad_share=share)
    if known.instruction:
        asks = READERS[labels].asks
        problems = [p if says_how_to_answer(p, asks) else _instructed(p, known.instruction) for p in problems]
    return problems, bad


def read_problems(
    path: Path | str, prompt_key: str, label_key: str, labels: str = "math"
) -> tuple[list[Problem], BadRows]:
    """Read every row of a file, in its order; blank lines are none."""
    problems, bad = [], []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: correct the path") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                problems.append(_read_row(line, prompt_key, label_key, READERS[labels], number))
            except (ValueError, RecursionError) as error:
                bad.append((number, _reason(error)))
    return problems, bad


def require_problems(
    path: Path | str,
    problems: list[Problem],
    bad: BadRows,
    *,
    rows: int | None = None,
    unique: bool = False,
    max_bad_share: float = 0.0,
) -> None:
    """Raise a `UserError` for too many bad rows, a number of rows other than ``rows``, or repeated prompts."""
    if bad and len(bad) > max_bad_share * (len(bad) + len(problems)):
        found = f"{len(bad)} of {len(bad) + len(problems)} rows are unusable: {'; '.join(kinds_of(bad)[:3])}"
        remedy = ", or raise max_bad_share" if max_bad_share else ""
        raise UserError(f"{path}: {found}: correct them at the source{remedy}")
    if not problems:
        raise UserError(f"{path}: no usable row: use another file")
    if rows is not None and len(problems) != rows:
        raise UserError(f"{path}: {len(problems)} usable rows instead of {rows}: use the right file, or correct `rows`")
    if unique:
        seen: dict[str, int] = {}
        for problem in problems:
            first = seen.setdefault(json.dumps(problem.messages, sort_keys=True), problem.line)
            if first != problem.line:
                raise UserError(f"{path}: line {problem.line} repeats the prompt of line {first}: remove one of them")


def kinds_of(bad: BadRows) -> list[str]:
    """Describe each kind of bad row, the most frequent first: what is wrong, how many rows, and the first line."""
    lines: dict[str, list[int]] = {}
    for line, reason in bad:
        lines.setdefault(reason, []).append(line)
    return [
        f"{reason} (line {found[0]})"
        if len(found) == 1
        else f"{reason} ({len(found)} rows, the first in line {found[0]})"
        for reason, found in sorted(lines.items(), key=lambda kind: -len(kind[1]))
    ]


def says_how_to_answer(problem: Problem, asks: tuple[str, ...]) -> bool:
    r"""Whether a chat contains one of ``asks``, such as ``\boxed``: the reward finds an answer that is so given."""
    return any(mark in message["content"] for message in problem.messages for mark in asks)


def _instructed(problem: Problem, instruction: str) -> Problem:
    """The problem with the instruction appended to its question."""
    *before, question = problem.messages
    return replace(problem, messages=[*before, question | {"content": f"{question['content']}\n\n{instruction}"}])


def _read_row(line: bytes, prompt_key: str, label_key: str, labels: LabelReader, number: int) -> Problem:
    row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key in (prompt_key, label_key) if labels.required else (prompt_key,):
        if key not in row:
            raise ValueError(f"no {key!r}")
    messages = _messages(row[prompt_key], prompt_key)
    try:
        label = labels.read(row.get(label_key))
    except ValueError as error:
        raise ValueError(f"{label_key!r} {error}") from None
    for key, text in ((prompt_key, "".join(message["content"] for message in messages)), (label_key, label or "")):
        if HALF_A_PAIR.search(text):
            raise ValueError(f"{key!r} has half of a surrogate pair, which is no character")
    return Problem(messages, label, number, row)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key is refused, since it leaves open which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name}")


def _messages(value: Any, key: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{key!r} has a message without a role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f"{key!r} has a message without text")
    if value[-1]["role"] != "user":
        raise ValueError(f"{key!r} does not end with the user's message")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
