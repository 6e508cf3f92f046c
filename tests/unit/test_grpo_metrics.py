"""The metrics and training sequences of a rollout, against values computed by hand."""

import math

import pytest
import torch

from milepost.grpo.data import Prompt
from milepost.grpo.learner import _summary
from milepost.grpo.metrics import expert_metrics
from milepost.grpo.samples import Sample, statistics, to_training
from milepost.rewards.base import Verdict
from milepost.rollout.engine import Completion, Drafting
from settings import training_settings


def sample(correct, tokens=2, finish="stop", drafting=None, prompt=(5, 6)):
    completion = Completion([9] * tokens, [-0.5] * tokens, finish, drafting)
    return Sample(Prompt("mine", "line 1", list(prompt), "4"), completion, "text", Verdict(correct, None, "fixed"))


ROLLOUT = [
    *(sample(True, 1), sample(False, 2), sample(False, 3), sample(False, 4, "length")),
    *(sample(False, 5), sample(False, 6), sample(False, 7), sample(False, 8, "length")),
    *(sample(True, 9), sample(True, 10), sample(True, 11), sample(True, 12, "length")),
]


def test_statistics_are_those_counted_by_hand():
    assert statistics(ROLLOUT, 4) == pytest.approx(
        {
            "reward_mean": 5 / 12,
            "reward_min": 0.0,
            "reward_max": 1.0,
            "pass_rate": 2 / 3,
            "grading_failed_share": 0.0,
            "groups_without_spread": 2 / 3,
            "response_length_mean": 6.5,
            "truncated_share": 3 / 12,
        }
    )


def test_acceptance_is_over_all_passes_not_the_mean_of_responses():
    drafted = [
        sample(True, 30, drafting=Drafting(passes=10, drafted=20, accepted=19)),
        sample(False, 2, drafting=Drafting(passes=2, drafted=4, accepted=1)),
    ]
    found = statistics([*drafted, sample(True), sample(True)], 2)
    assert found["acceptance_length"] == pytest.approx(32 / 12)
    assert found["acceptance_rate"] == pytest.approx(20 / 24)
    assert "acceptance_length" not in statistics(ROLLOUT, 4)


def test_advantages_compare_the_answers_to_one_prompt():
    settings = training_settings(
        training={"samples_per_prompt": 4, "global_batch": 128}, algorithm={"std_epsilon": 0.0}
    )
    sequences = to_training(ROLLOUT, settings)
    advantages = [sequence.advantage for sequence in sequences]
    assert advantages == pytest.approx([1.5, -0.5, -0.5, -0.5, *[0.0] * 8])  # 1 of 4: a mean of 1/4, a deviation of 1/2
    first = sequences[1]
    assert first.ids.tolist() == [5, 6, 9, 9] and first.log_probs.tolist() == [-0.5, -0.5]
    assert (first.prompt_length, first.response_length) == (2, 2)


def test_expert_metrics_are_means_over_the_layers():
    load = torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1], [10, 30, 20, 20]])
    found = expert_metrics(load, None)
    assert found == pytest.approx(
        {
            "expert_load_max": (4 + 1 + 1.5) / 3,
            "expert_load_min": (0 + 1 + 0.5) / 3,
            "expert_imbalance": (math.sqrt(3) + 0 + math.sqrt(1 / 8)) / 3,
        }
    )
    assert expert_metrics(load, 0.75)["routing_agreement"] == 0.75
    assert expert_metrics(None, None) == {}


def test_means_over_tokens_weigh_each_step_by_its_tokens():
    """Each step reports sums over its tokens, and the sum of their weights as ``weight``."""
    steps = [
        {"loss": 1.0, "grad_norm": 2.0, "weight": 1.0, "clip_fraction": 0.5, "kl": 0.3, "learning_rate": 1e-6},
        {"loss": 3.0, "grad_norm": 4.0, "weight": 3.0, "clip_fraction": 0.5, "kl": 0.1, "learning_rate": 2e-6},
    ]
    assert _summary(steps) == pytest.approx(
        {"loss": 2.0, "grad_norm": 3.0, "clip_fraction": 0.25, "kl": 0.1, "learning_rate": 2e-6}
    )


def test_float_rewards_and_the_parts_of_a_sum_are_averaged():
    def graded(total, math, brief, reason="correct"):
        parts = {"math": Verdict(math, None, ""), "brief": Verdict(brief, None, "")}
        verdict = Verdict(total, None, reason, parts, correct_from=0.9)
        return Sample(Prompt("mine", "line 1", [5], None), Completion([9], [-0.5], "stop"), "text", verdict)

    rollout = [
        graded(0.95, 1.0, -0.5),
        graded(-0.1, 0.0, -1.0),
        graded(0.5, 1.0, -5.0),
        graded(0, 0, 0, "grading_error"),
    ]
    found = statistics(rollout, 2)
    assert found["reward_mean"] == pytest.approx(1.35 / 4)
    assert (found["reward_min"], found["reward_max"]) == (-0.1, 0.95)
    assert (found["reward_math"], found["reward_brief"]) == (0.5, -6.5 / 4)
    assert (found["pass_rate"], found["groups_without_spread"], found["grading_failed_share"]) == (0.5, 0, 0.25)
    settings = training_settings(training={"samples_per_prompt": 2, "global_batch": 64})
    first, second = (sequence.advantage for sequence in to_training(rollout, settings)[:2])
    assert first == pytest.approx(-second) and first > 0
    row = rollout[0].row(3, "prompt")
    assert row["reward"] == 0.95 and row["parts"]["brief"] == {"reward": -0.5, "reason": ""}
