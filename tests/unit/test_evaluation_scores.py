"""Scores say of known samples what a reader would count by hand."""

import json

import pytest

from common.problems import Problem
from configuration.schema import Evaluation, Reward
from evaluation.sampling import Sample
from evaluation.scores import scores
from rewards.math import Grader

SETTINGS = Evaluation(samples_per_problem=4, pass_at=[1, 2, 4], bootstrap_samples=500)
PROBLEMS = [Problem([{"role": "user", "content": label}], label, 1) for label in ("33", "34")]


def scored(responses, problems=PROBLEMS):
    samples = [
        Sample(number // 4, number % 4, 0, [], text, 10, "length" if "</think>" not in text else "stop", 0.5)
        for number, text in enumerate(responses)
    ]
    with Grader(Reward()) as grader:
        return scores(problems, samples, SETTINGS, grader)


def boxed(*answers):
    return [f"reasoning</think>\\boxed{{{answer}}}" for answer in answers]


def test_scores_are_those_counted_by_hand():
    result = scored([*boxed("33", "33.0"), "cut off", "</think>no box", *boxed("33", "34", "33, 34"), "cut off"])
    assert (result["average"], result["majority"]) == (3 / 8, (1 + 1 / 3) / 2)  # 33, 34 and the hedge tie
    assert result["standard_error"] == pytest.approx(1 / 8)  # problem means 1/2 and 1/4
    assert result["pass_at"] == pytest.approx({"1": 3 / 8, "2": (5 / 6 + 1 / 2) / 2, "4": 1})
    shares = ("truncated", "no_think_end", "no_box", "several_answers", "grading_error")
    assert [result[f"{share}_share"] for share in shares] == [2 / 8, 2 / 8, 1 / 8, 1 / 8, 0]
    assert (result["mean_tokens"], result["total_tokens"], result["seconds"], result["tokens_per_second"]) == (
        10,
        80,
        4,
        20,
    )
    assert result["per_problem"][0]["answers"] == ["33", "33", None, None]
    json.dumps(result, allow_nan=False)


def test_one_problem_scores_without_an_error():
    result = scored(boxed("33", "33", "33", "33"), PROBLEMS[:1])
    assert (result["average"], result["standard_error"], result["interval"]) == (1, None, None)
    json.dumps(result, allow_nan=False)


def test_a_problem_that_lacks_samples_is_refused():
    with pytest.raises(ValueError, match="same number of samples"):
        scored(boxed("33", "33", "33", "33", "34"))
