"""Grade a file of answers, to try a reward before it costs GPU time: ``snakemake check_reward``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from milepost.common.errors import UserError
from milepost.common.labels import READERS
from milepost.configuration.rewards import Reward
from milepost.problems.loading import Problem
from milepost.rewards.base import Response, Verdict
from milepost.rewards.grader import Grader

SHOWN = 40  # characters of each text in the table; a response's last ones


def verdict_table(file: Path, reward: Reward) -> str:
    """A readable table of a reward's verdicts on the answers in a file.

    Each line of the file is a JSON object with the text ``response`` and, if the reward needs one, a ``label``. It may
    also have ``prompt`` (text, or a list of messages), ``row`` (the data set's row; by default the object itself),
    ``finish`` and ``tokens``. A training's samples.jsonl has this format.
    """
    answers = read_answers(file, reward)
    with Grader(reward.model_copy(update={"max_error_share": 1.0})) as grader:
        verdicts = grader.grade([response for _, response in answers])
    rows = [_row(line, response, verdict) for (line, response), verdict in zip(answers, verdicts, strict=True)]
    mean = sum(verdict.reward for verdict in verdicts) / len(verdicts)
    correct, failed = (sum(getattr(verdict, name) for verdict in verdicts) for name in ("correct", "failed"))
    failures = f", grading failed for {failed}" if failed else ""
    return (
        f"reward: {json.dumps(reward.model_dump(mode='json', exclude_defaults=True))}\n"
        f"{tabulate(rows, headers='keys', disable_numparse=True)}\n"
        f"{len(verdicts)} answers, mean reward {mean:.4g}, {correct} correct{failures}\n"
    )


def read_answers(file: Path, reward: Reward) -> list[tuple[int, Response]]:
    """The answers in a file, each with its line number (from 1); a `UserError` names the first invalid line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{error.strerror}: correct the path" if isinstance(error, OSError) else "not UTF-8: save it as UTF-8"
        raise UserError(f"answers: {file}: {reason}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append((number, _read(json.loads(line), reward)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: {error}: correct that line") from None
    if not found:
        raise UserError(f'{file}: holds no answer: give one per line, {{"response": "...", "label": "..."}}')
    return found


def _read(answer: Any, reward: Reward) -> Response:
    if not isinstance(answer, Mapping) or not isinstance(answer.get("response"), str):
        raise ValueError('a JSON object with a text "response" is expected')
    reader = READERS[reward.labels]
    if reader.required and "label" not in answer:
        raise ValueError('no "label", which the reward needs')
    try:
        label = reader.read(answer.get("label"))
    except ValueError as error:
        raise ValueError(f'"label" {error}') from None
    prompt, row = answer.get("prompt", ""), answer.get("row", answer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    finish, tokens = answer.get("finish", "stop"), answer.get("tokens", 0)
    return Response.of(Problem(messages, label, 0, row), answer["response"], finish, tokens, reward.think_block)


def _row(line: int, response: Response, verdict: Verdict) -> dict[str, str]:
    return {
        "line": str(line),
        "label": _short(response.label or "–"),
        "answer": _short(verdict.answer or "–"),
        "reward": f"{verdict.reward:.4g}",
        **{name: f"{part.reward:.4g}" for name, part in verdict.parts.items()},
        "correct": "yes" if verdict.correct else "no",
        "reason": "; ".join(
            dict.fromkeys(filter(None, [verdict.reason, *(part.reason for part in verdict.parts.values())]))
        ),
        "the response ends": _short(response.response[-SHOWN:]),
    }


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
