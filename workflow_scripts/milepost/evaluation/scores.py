"""Compute scores from samples, and run a whole evaluation."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from milepost.common.problems import Problem
from milepost.configuration.schema import Evaluation
from milepost.evaluation.estimators import correct_counts, majority, mean_with_error, pass_at
from milepost.evaluation.sampling import Sample, SampleFile, origin_of, prompts_digest, sample_problems
from milepost.rewards.math import Grader, Verdict
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
    return scores(problems, samples, settings, grader)


def scores(
    problems: Sequence[Problem], samples: Sequence[Sample], settings: Evaluation, grader: Grader
) -> dict[str, Any]:
    """Grade samples and estimate, as plain JSON.

    Shares are of 1. ``prompts`` is the digest of what was asked; ``average`` (avg@n) with ``standard_error`` and
    ``interval`` (95%, t) over problems; ``pass_at`` by k; ``majority`` (maj@n); of all samples ``truncated_share`` (cut
    off by the cap), ``no_think_end_share``, ``no_box_share``, ``several_answers_share`` and ``grading_error_share``;
    tokens, seconds of sampling and tokens a second; ``per_problem`` with each problem's label and, by sample,
    ``correct``, ``answers`` (as they vote), ``reasons``, ``tokens`` and ``finish``.
    """
    verdicts = grader.grade([(sample.response, problems[sample.problem].label) for sample in samples])
    rows: list[list[tuple[Sample, Verdict]]] = [[] for _ in problems]
    for sample, verdict in zip(samples, verdicts, strict=True):
        rows[sample.problem].append((sample, verdict))
    counts, number = correct_counts([[verdict.correct for _, verdict in row] for row in rows])
    estimate = mean_with_error(counts / number, bounds=(0, 1))
    votes = [majority([verdict.answer for _, verdict in row], [verdict.correct for _, verdict in row]) for row in rows]
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
        "majority": mean(votes),
        "truncated_share": _share(sample.finish == "length" for sample in samples),
        "no_think_end_share": _share(reason == "no_think_end" for reason in reasons),
        "no_box_share": _share(reason == "no_box" for reason in reasons),
        "several_answers_share": _share(reason == "several_answers" for reason in reasons),
        "grading_error_share": _share(reason.startswith("grading_") for reason in reasons),
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
        "correct": [verdict.correct for _, verdict in row],
        "answers": [verdict.answer for _, verdict in row],
        "reasons": [verdict.reason for _, verdict in row],
        "tokens": [sample.tokens for sample, _ in row],
        "finish": [sample.finish for sample, _ in row],
    }
