"""Advantages against their formulas, written out answer by answer and token by token."""

import math

import pytest
import torch

from milepost.grpo.advantages import ADVANTAGES
from settings import algorithm

pytestmark = pytest.mark.numerical

EPSILON = 1e-6
REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.5, -0.25, 0.0, 3.0]]
LENGTHS = [[3, 1, 8, 2], [5, 5, 5, 5], [1, 9, 4, 2], [7, 1, 1, 6]]
OF_GROUPS = ["grpo", "dr_grpo", "rloo"]
OF_TOKENS = ["reinforce_plus_plus", "reinforce_plus_plus_baseline"]


def mean(values):
    return math.fsum(values) / len(values)


def deviation(values):
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def reference(name):
    """The advantages as the papers state them."""
    if name == "grpo":
        return [[(r - mean(group)) / (deviation(group) + EPSILON) for r in group] for group in REWARDS]
    if name == "dr_grpo":
        return [[r - mean(group) for r in group] for group in REWARDS]
    if name == "rloo":
        return [[r - mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)] for group in REWARDS]
    scores = REWARDS if name == "reinforce_plus_plus" else reference("dr_grpo")
    tokens = [
        score
        for group, lengths in zip(scores, LENGTHS, strict=True)
        for score, length in zip(group, lengths, strict=True)
        for _ in range(length)
    ]
    return [[(score - mean(tokens)) / (deviation(tokens) + EPSILON) for score in group] for group in scores]


def computed(name, rewards, lengths=LENGTHS):
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return ADVANTAGES[name](rewards, torch.as_tensor(lengths), algorithm(std_epsilon=EPSILON))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_those_of_the_formula(name):
    torch.testing.assert_close(computed(name, REWARDS), torch.tensor(reference(name), dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_rewards_that_are_all_equal_give_advantages_of_exactly_zero(name, value):
    """0.1 eight times has a mean that is not 0.1: divided by epsilon alone that rounding would be a signal."""
    assert torch.equal(computed(name, [[value] * 8] * 3, [[7] * 8] * 3), torch.zeros(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_group_without_spread_teaches_nothing_beside_others(name):
    assert torch.equal(computed(name, [[0.1] * 4, *REWARDS[1:]])[0], torch.zeros(4, dtype=torch.float64))


def test_a_group_without_spread_is_compared_with_the_others_by_reinforce_plus_plus():
    assert (computed("reinforce_plus_plus", REWARDS)[2] > 0).all()  # all of them right


@pytest.mark.parametrize("name", OF_TOKENS)
def test_whitened_advantages_have_mean_zero_and_deviation_one_over_tokens(name):
    advantages, lengths = computed(name, REWARDS), torch.tensor(LENGTHS)
    tokens = advantages.flatten().repeat_interleave(lengths.flatten())
    assert tokens.mean().item() == pytest.approx(0, abs=1e-12)
    assert tokens.std().item() == pytest.approx(1, rel=1e-5)
