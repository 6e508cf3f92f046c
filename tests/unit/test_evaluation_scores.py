"""Scores of known samples equal those counted by hand."""

import json

import pytest

from milepost.configuration.schema import Reward
from milepost.evaluation.sampling import Sample
from milepost.evaluation.scores import scores
from milepost.problems.loading import Problem
from milepost.rewards.base import Verdict
from milepost.rewards.grader import Grader
from settings import section

SETTINGS = section("evaluation", samples_per_problem=4, pass_at=[1, 2, 4], bootstrap_samples=500)
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


def test_each_answer_is_graded_by_the_label_of_its_own_problem():
    """The order of the samples does not matter."""
    responses = boxed("33", "33", "33", "34", "33", "33", "33", "34")
    result = scored(responses)
    assert [problem["correct"] for problem in result["per_problem"]] == [
        [True, True, True, False],
        [False, False, False, True],
    ]
    assert [problem["label"] for problem in result["per_problem"]] == ["33", "34"]
    assert result["average"] == 0.5 and result["majority"] == 0.5


def test_an_interval_stays_within_the_possible_scores():
    result = scored(boxed("33", "33", "33", "33", "34", "34", "34", "33"))
    assert result["average"] == 7 / 8 and result["interval"][1] == 1 and result["interval"][0] == 0


class Fixed:
    """A grader with given verdicts, since grading errors can't be produced at will."""

    settings = Reward()

    def __init__(self, *reasons):
        self.verdicts = [Verdict(reason == "correct", None, reason) for reason in reasons]

    def grade(self, responses):
        return self.verdicts

    def settle(self):
        pass


def test_shares_are_of_all_samples_and_every_kind_of_grading_error_counts():
    reasons = ("correct", "grading_timeout", "grading_error", "wrong", "no_box", "too_long", "correct", "no_think_end")
    samples = [
        Sample(number // 4, number % 4, 0, [], "", number, "length" if number == 5 else "stop", 0.5)
        for number in range(8)
    ]
    result = scores(PROBLEMS, samples, SETTINGS, Fixed(*reasons))
    shares = ("average", "grading_error_share", "no_box_share", "no_think_end_share", "truncated_share")
    assert [result[share] for share in shares] == [2 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8]
    assert [problem["tokens"] for problem in result["per_problem"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [problem["finish"] for problem in result["per_problem"]] == [
        ["stop"] * 4,
        ["stop", "length", "stop", "stop"],
    ]
    assert [problem["reasons"] for problem in result["per_problem"]] == [list(reasons[:4]), list(reasons[4:])]
    assert result["mean_tokens"] == 3.5


def test_float_rewards_are_averaged_and_correct_from_a_threshold_on(tmp_path):
    """The interval of such rewards is not clipped to [0, 1], and no share of missing boxes is reported."""
    (tmp_path / "mine.py").write_text("def f(sample): return float(sample.answer)\n")
    reward = Reward(function=f"{tmp_path}/mine.py:f", correct_from=2.0)
    samples = [
        Sample(number // 4, number % 4, 0, [], f"</think>{value}", 10, "stop", 0.5)
        for number, value in enumerate([3, 3, 3, 3, -1, 2, 1.5, -0.5])
    ]
    with Grader(reward) as grader:
        result = scores(PROBLEMS, samples, SETTINGS, grader)
    assert result["average"] == (3 + 0.5) / 2
    low, high = result["interval"]
    assert low < 0 and high > 3  # t(1) is 12.7, the standard error 1.25
    assert result["pass_at"]["1"] == (1 + 1 / 4) / 2
    assert [problem["rewards"] for problem in result["per_problem"]] == [[3, 3, 3, 3], [-1, 2, 1.5, -0.5]]
    assert result["per_problem"][1]["correct"] == [False, True, False, False]
    assert [result[name] for name in ("majority", "no_box_share", "no_think_end_share", "several_answers_share")] == [
        None
    ] * 4
    json.dumps(result, allow_nan=False)


def test_a_sum_is_scored_by_its_total_and_votes_by_the_answer_of_its_kind(tmp_path):
    (tmp_path / "mine.py").write_text("def f(sample): return (-len(sample.answer), 'long')\n")
    reward = Reward(sum=[{"kind": "math"}, {"function": f"{tmp_path}/mine.py:f", "weight": 0.01}], correct_from=0.5)
    texts = [*boxed("33", "34", "33"), "</think>no box"]
    samples = [Sample(0, number, 0, [], text, 10, "stop", 0.5) for number, text in enumerate(texts)]
    with Grader(reward) as grader:
        result = scores(PROBLEMS[:1], samples, SETTINGS, grader)
    assert result["average"] == pytest.approx((2 - 0.01 * (3 * len(r"\boxed{33}") + len("no box"))) / 4)
    assert (result["majority"], result["no_box_share"], result["pass_at"]["1"]) == (1, 1 / 4, 1 / 2)
    assert result["per_problem"][0]["parts"][1] == {
        "math": {"reward": 0, "reason": "wrong"},
        "f": {"reward": -10, "reason": "long"},
    }
