"""Compute scores from samples, and run a whole evaluation."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from milepost.configuration.schema import Evaluation
from milepost.evaluation.estimators import correct_counts, majority, mean_with_error, pass_at
from milepost.evaluation.sampling import Sample, SampleFile, origin_of, prompts_digest, sample_problems
from milepost.problems.loading import Problem
from milepost.rewards.base import NO_THINK_END, Response, Verdict
from milepost.rewards.grader import Grader
from milepost.rollout.engine import RolloutEngine


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: tuple[int, ...],
    problems: Sequence[Problem],
    settings: Evaluation,
    grader: Grader,
    samples_path: Path | str,
    sampler: dict[str, Any],
) -> dict[str, Any]:
    """Sample from a running engine, grade and score; returns `scores`.

    ``sampler`` is plain JSON that identifies the engine's weights; an interrupted evaluation of the same weights
    resumes from ``samples_path``.
    """
    file = SampleFile.open(samples_path, origin_of(sampler, problems))
    samples = sample_problems(engine, tokenizer, stop_token_ids, problems, settings, file)
    found = scores(problems, samples, settings, grader)
    file.write_grades(found["per_problem"])
    return found


def scores(
    problems: Sequence[Problem], samples: Sequence[Sample], settings: Evaluation, grader: Grader
) -> dict[str, Any]:
    """Grade samples and estimate, as plain JSON.

    Shares are of 1. ``prompts`` is the digest of what was asked; ``average`` (avg@n, the mean reward) with
    ``standard_error`` and ``interval`` (95%, t) over problems; ``pass_at`` by k; ``majority`` (maj@n), None where the
    reward reads no answers that could vote; of all samples ``truncated_share`` (cut off by the cap) and
    ``grading_error_share``, and, None where the reward looks for no such thing, ``no_think_end_share``,
    ``no_box_share`` and ``several_answers_share``; tokens, seconds of sampling and tokens a second; ``per_problem``
    with each problem's label and, by sample, ``rewards``, ``correct``, ``answers`` (as they vote), ``reasons``,
    ``tokens``, ``finish`` and, of a sum, ``parts``.
    """
    reward = grader.settings
    verdicts = grader.grade(
        [
            Response.of(problems[sample.problem], sample.response, sample.finish, sample.tokens, reward.think_block)
            for sample in samples
        ]
    )
    grader.settle()
    rows: list[list[tuple[Sample, Verdict]]] = [[] for _ in problems]
    for sample, verdict in zip(samples, verdicts, strict=True):
        rows[sample.problem].append((sample, verdict))
    counts, number = correct_counts([[verdict.correct for _, verdict in row] for row in rows])
    means = [mean(verdict.reward for _, verdict in row) for row in rows]
    estimate = mean_with_error(means, bounds=(0, 1) if reward.is_share else (-math.inf, math.inf))
    votes = [majority([verdict.answer for _, verdict in row], [verdict.correct for _, verdict in row]) for row in rows]
    kinds = {part.kind for part in reward.parts} - {None}
    reasons = [verdict.reason for verdict in verdicts]
    tokens, seconds = sum(sample.tokens for sample in samples), sum(sample.seconds for sample in samples)
    return {
        "problems": len(problems),
        "samples_per_problem": number,
        "prompts": prompts_digest(problems),
        "average": estimate.value,
        "standard_error": estimate.standard_error,
        "interval": estimate.interval,
        "pass_at": {str(k): float(pass_at(counts, number, k).mean()) for k in settings.pass_at},
        "majority": mean(votes) if kinds else None,
        "truncated_share": _share(sample.finish == "length" for sample in samples),
        "no_think_end_share": _share(reason == NO_THINK_END for reason in reasons) if kinds else None,
        "no_box_share": _share(reason == "no_box" for reason in reasons) if "math" in kinds else None,
        "several_answers_share": _share(reason == "several_answers" for reason in reasons)
        if kinds & {"math", "choice"}
        else None,
        "grading_error_share": _share(verdict.failed for verdict in verdicts),
        "mean_tokens": tokens / len(samples),
        "total_tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": tokens / seconds if seconds else None,
        "per_problem": [_problem_facts(problem, row) for problem, row in zip(problems, rows, strict=True)],
    }


def _share(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def _problem_facts(problem: Problem, row: list[tuple[Sample, Verdict]]) -> dict[str, Any]:
    return {
        "label": problem.label,
        "rewards": [verdict.reward for _, verdict in row],
        "correct": [verdict.correct for _, verdict in row],
        "answers": [verdict.answer for _, verdict in row],
        "reasons": [verdict.reason for _, verdict in row],
        "tokens": [sample.tokens for sample, _ in row],
        "finish": [sample.finish for sample, _ in row],
        **({"parts": parts} if any(parts := [verdict.parts_as_json() for _, verdict in row]) else {}),
    }
