"""Reading a problem set: JSON lines, each with a chat prompt and a label."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Problem:
    """One usable row: the chat that asks, the answer that is right, and where it stood in the file (from 1)."""

    messages: list[dict[str, str]]
    label: str
    line: int


class ProblemSet(Protocol):
    """What is known of a problem set's file (`configuration.schema.Dataset`)."""

    prompt_key: str
    label_key: str
    instruction: str | None
    rows: int | None
    unique_prompts: bool
    max_bad_share: float


def load_problem_set(
    path: Path | str, known: ProblemSet, *, max_bad_share: float | None = None
) -> tuple[list[Problem], int]:
    """The usable rows of a file and the number of the others; a `UserError` where `require_problems` refuses it.

    ``max_bad_share`` takes the place of what is known.
    """
    problems, bad = read_problems(path, known.prompt_key, known.label_key)
    share = known.max_bad_share if max_bad_share is None else max_bad_share
    require_problems(path, problems, bad, rows=known.rows, unique=known.unique_prompts, max_bad_share=share)
    if known.instruction:
        problems = [_asking_for_a_box(problem, known.instruction) for problem in problems]
    return problems, len(bad)


def read_problems(path: Path | str, prompt_key: str, label_key: str) -> tuple[list[Problem], list[tuple[int, str]]]:
    """Read every row of a file; blank lines are none.

    Returns:
        The usable rows in the file's order, and ``(line, what is wrong)`` of each of the others.
    """
    problems, bad = [], []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                problems.append(_read_row(line, prompt_key, label_key, number))
            except (ValueError, RecursionError) as error:
                bad.append((number, _reason(error)))
    return problems, bad


def require_problems(
    path: Path | str,
    problems: list[Problem],
    bad: list[tuple[int, str]],
    *,
    rows: int | None = None,
    unique: bool = False,
    max_bad_share: float = 0.0,
) -> None:
    """Refuse (`UserError`) a set with too many bad rows, another number of rows than ``rows``, or repeated prompts."""
    if bad and len(bad) > max_bad_share * (len(bad) + len(problems)):
        line, reason = bad[0]
        raise UserError(
            f"{path}: {len(bad)} of {len(bad) + len(problems)} rows are unusable, the first in line {line} ({reason}): "
            "correct them at the source"
        )
    if not problems:
        raise UserError(f"{path}: not one usable row: give another file")
    if rows is not None and len(problems) != rows:
        raise UserError(
            f"{path}: {len(problems)} usable rows instead of {rows}: is it the right file? Else correct `rows`"
        )
    if unique:
        seen: dict[str, int] = {}
        for problem in problems:
            first = seen.setdefault(json.dumps(problem.messages, sort_keys=True), problem.line)
            if first != problem.line:
                raise UserError(f"{path}: line {problem.line} repeats the prompt of line {first}: remove one of them")


def _asking_for_a_box(problem: Problem, instruction: str) -> Problem:
    """The problem with the instruction behind its question, unless its chat speaks of a box already."""
    if any("\\boxed" in message["content"] for message in problem.messages):
        return problem
    *before, question = problem.messages
    return replace(problem, messages=[*before, question | {"content": f"{question['content']}\n\n{instruction}"}])


def _read_row(line: bytes, prompt_key: str, label_key: str, number: int) -> Problem:
    row = json.loads(line.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key in (prompt_key, label_key):
        if key not in row:
            raise ValueError(f"no {key!r}")
    return Problem(_messages(row[prompt_key], prompt_key), _label(row[label_key], label_key), number)


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


def _label(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{key!r} is neither a string nor an integer")
    if not str(value).strip():
        raise ValueError(f"{key!r} is empty")
    return str(value)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
