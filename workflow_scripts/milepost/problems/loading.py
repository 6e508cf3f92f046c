"""Read a problem set: the rows of its files that pass the filter, each as a chat and a label."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from milepost.common.errors import SHOWN, UserError, few
from milepost.common.labels import READERS, LabelReader
from milepost.problems.formats import Row, is_read_by_line, read_rows
from milepost.problems.rows import (
    HALF_A_PAIR,
    MISSING,
    ChoiceKeys,
    lettered_choices,
    passes,
    read_answer,
    read_messages,
    value_at,
)


@dataclass(frozen=True)
class Problem:
    """One usable row.

    Attributes:
        messages: the chat that asks.
        label: the answer that is right; None where the reward needs none.
        line: where it stands in its file, from 1: the line, or in parquet and JSON the row.
        row: all of it, as plain JSON.
        place: ``line`` in words; it names the file where the set has several.
    """

    messages: list[dict[str, str]]
    label: str | None
    line: int
    row: dict[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True)
class BadRow:
    """An unusable row: its place in words, and what is wrong."""

    place: str
    reason: str


@dataclass(frozen=True)
class ProblemSet:
    """What the files of a set hold.

    Attributes:
        problems: the usable rows.
        bad: the unusable ones.
        read: how many rows were read, those that did not pass the filter included.
        keys: those of the first row.
        is_whole: whether all rows of the set were read.
    """

    problems: list[Problem]
    bad: list[BadRow]
    read: int
    keys: list[str] = field(default_factory=list)
    is_whole: bool = True


class RowSettings(Protocol):
    """How the rows of a problem set read (`configuration.schema.Dataset`)."""

    prompt_key: str
    label_key: str
    label_after: str | None
    choices: ChoiceKeys | None
    system: str | None
    instruction: str | None
    filter: dict[str, Any]
    unique_prompts: bool
    max_bad_share: float

    @property
    def row_count(self) -> int | None: ...

    @property
    def row_slice(self) -> tuple[int, int | None]: ...


def load_problem_set(
    root: Path,
    files: Sequence[str],
    settings: RowSettings,
    labels: str = "math",
    *,
    max_bad_share: float | None = None,
    instructed: bool = True,
    at_most: int | None = None,
) -> ProblemSet:
    """Read a problem set; a `UserError` if `require_problems` refuses it.

    Args:
        files: the names of its files below ``root``, in the order in which they are read.
        labels: how the reward reads them, a name of `common.labels.READERS`.
        max_bad_share: overrides the one in the settings.
        instructed: add the instruction to prompts that do not ask for an answer as the reward reads it.
        at_most: read no more than this many rows, and refuse the set only if they are reason enough.
    """
    found = read_problems(root, files, settings, labels, at_most)
    share = settings.max_bad_share if max_bad_share is None else max_bad_share
    require_problems(source_of(root, files), found, settings, share)
    if instructed and settings.instruction:
        asks = READERS[labels].asks
        problems = [p if says_how_to_answer(p, asks) else _instructed(p, settings.instruction) for p in found.problems]
        return replace(found, problems=problems)
    return found


def read_problems(
    root: Path, files: Sequence[str], settings: RowSettings, labels: str = "math", at_most: int | None = None
) -> ProblemSet:
    """The rows of ``files`` that pass the filter and are in the slice, in order."""
    chosen = _Filtered(root, files, settings, at_most)
    problems, bad = [], []
    for file, row in itertools.islice(chosen, *settings.row_slice):
        place = f"{'line' if is_read_by_line(file) else 'row'} {row.number}"
        place = place if len(files) == 1 else f"{file}, {place}"
        try:
            if row.fault:
                raise ValueError(row.fault)
            problems.append(_problem(row, settings, READERS[labels], place))
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            bad.append(BadRow(place, reason))
    if chosen.read and not chosen.passed and chosen.is_whole:
        raise UserError(f"{source_of(root, files)}: {chosen.nothing_passed()}")
    return ProblemSet(problems, bad, chosen.read, chosen.keys, chosen.is_whole)


def require_problems(source: str, found: ProblemSet, settings: RowSettings, max_bad_share: float) -> None:
    """Raise a `UserError` for too many bad rows, another number of rows than is wanted, or repeated prompts."""
    problems, bad, total = found.problems, found.bad, len(found.problems) + len(found.bad)
    # The first rows alone don't tell the share of bad rows in the whole set, unless all of them are bad.
    borne = max_bad_share * total if found.is_whole or not max_bad_share else found.read - 1
    if len(bad) > borne:
        said = f"{len(bad)} of {total} rows are unusable: {'; '.join(kinds_of(bad)[:3])}"
        if not problems and found.keys and bad[0].reason.startswith("no '"):
            raise UserError(f"{source}: {said}: the rows have {few(found.keys)}: correct prompt_key and label_key")
        remedy = ", or raise max_bad_share" if max_bad_share else ""
        raise UserError(f"{source}: {said}: correct them at the source{remedy}")
    if found.is_whole:
        _require_number(source, found, settings)
    if settings.unique_prompts:
        seen: dict[str, Problem] = {}
        for problem in problems:
            first = seen.setdefault(json.dumps(problem.messages, sort_keys=True), problem)
            if first is not problem:
                raise UserError(f"{source}: {problem.place} repeats the prompt of {first.place}: remove one of them")


def _require_number(source: str, found: ProblemSet, settings: RowSettings) -> None:
    """Raise a `UserError` for another number of rows than is wanted."""
    problems, total = found.problems, len(found.problems) + len(found.bad)
    start, end = settings.row_slice
    if end is not None and total < end - start:
        passing = " that pass the filter" if settings.filter else ""
        raise UserError(f"{source}: only {total} rows{passing} are in rows {start}:{end}: correct `rows`")
    if not problems:
        raise UserError(f"{source}: no usable row: use another file")
    wanted = settings.row_count
    if wanted is not None and len(problems) != wanted:
        raise UserError(
            f"{source}: {len(problems)} usable rows instead of {wanted}: use the right file, or correct `rows`"
        )


def kinds_of(bad: list[BadRow]) -> list[str]:
    """Describe each kind of bad row, the most frequent first: what is wrong, how many rows, and where the first is."""
    places: dict[str, list[str]] = {}
    for row in bad:
        places.setdefault(row.reason, []).append(row.place)
    return [
        f"{reason} ({found[0]})" if len(found) == 1 else f"{reason} ({len(found)} rows, the first in {found[0]})"
        for reason, found in sorted(places.items(), key=lambda kind: -len(kind[1]))
    ]


def says_how_to_answer(problem: Problem, asks: tuple[str, ...]) -> bool:
    r"""Whether a chat contains one of ``asks``, such as ``\boxed``: the reward finds an answer that is so given."""
    return any(mark in message["content"] for message in problem.messages for mark in asks)


class _Filtered:
    """The rows of several files that pass the filter, and what was seen of the others.

    A row that can't be read passes, so that it is reported.
    """

    def __init__(self, root: Path, files: Sequence[str], settings: RowSettings, at_most: int | None) -> None:
        self._root, self._files, self._wanted, self._at_most = root, files, settings.filter, at_most
        self._seen: dict[str, set[str]] = {key: set() for key in settings.filter}
        self.keys: list[str] = []
        self.read = self.passed = 0
        self.is_whole = True

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for file in self._files:
            for row in read_rows(self._root / file):
                if self.read == self._at_most:
                    self.is_whole = False
                    return
                self.read += 1
                readable = isinstance(row.values, dict)
                self.keys = self.keys or (list(row.values) if readable else [])
                if not readable or passes(row.values, self._wanted):
                    self.passed += 1
                    yield file, row
                else:
                    self._note(row.values)

    def nothing_passed(self) -> str:
        """Why no row passes: a key that no row has, or values other than the wanted ones."""
        for key, seen in self._seen.items():
            if not seen:
                return f"no row has the filter's {key!r}: they have {few(self.keys)}: correct the filter"
        seen = "; ".join(f"{key}: {few(sorted(values))}" for key, values in self._seen.items())
        return f"none of {self.read} rows passes `filter`: they have {seen}: correct the filter"

    def _note(self, row: dict[str, Any]) -> None:
        for key, seen in self._seen.items():
            if len(seen) <= SHOWN and (value := value_at(row, key)) is not MISSING:
                seen.add(json.dumps(value, ensure_ascii=False)[:40])


def _problem(row: Row, settings: RowSettings, labels: LabelReader, place: str) -> Problem:
    """The problem that a row poses; a `ValueError` says why it poses none."""
    values = row.values
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    messages = read_messages(values, settings.prompt_key)
    if settings.choices:
        question = messages[-1]["content"].strip()
        choices, letter = lettered_choices(values, question, settings.choices)
        messages[-1] = messages[-1] | {"content": f"{question}\n\n{choices}"}
        label = labels.read(letter)
    else:
        label = read_answer(values, settings.label_key, settings.label_after, labels)
    prompt = "".join(message["content"] for message in messages)
    for key, text in ((settings.prompt_key, prompt), (settings.label_key, label or "")):
        if HALF_A_PAIR.search(text):
            raise ValueError(f"{key!r} has half of a surrogate pair, which is no character")
    if settings.system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": settings.system})
    return Problem(messages, label, row.number, values, place)


def _instructed(problem: Problem, instruction: str) -> Problem:
    """The problem with the instruction appended to its question."""
    *before, question = problem.messages
    return replace(problem, messages=[*before, question | {"content": f"{question['content']}\n\n{instruction}"}])


def source_of(root: Path, files: Sequence[str]) -> str:
    """What errors call a set: its file, or the folder of several."""
    return str(root / files[0]) if len(files) == 1 else str(root)
