"""Responses and their grading, for tests."""

from collections.abc import Iterable, Mapping, Sequence

import pytest

from milepost.configuration.rewards import ThinkBlock
from milepost.problems.loading import Problem
from milepost.rewards.base import Response, Verdict
from milepost.rewards.grader import Grader


def response(text: str, label=None, think_block: ThinkBlock = "required", **row) -> Response:
    """A response of this text to a question that says nothing."""
    problem = Problem([{"role": "user", "content": "?"}], label, 1, row)
    return Response.of(problem, text, "stop", len(text), think_block)


def graded(grader: Grader, pairs: Iterable[tuple[str, object]]) -> list[Verdict]:
    """The verdicts on (text, label)."""
    return grader.grade([response(text, label, grader.settings.think_block) for text, label in pairs])


def as_parameters(groups: Mapping[str, Sequence[tuple[str, str]]]) -> list:
    """A pytest parameter for each (answer, label) of the named groups."""
    return [
        pytest.param(answer, label, id=f"{name}: {answer} | {label}")
        for name, pairs in groups.items()
        for answer, label in pairs
    ]
