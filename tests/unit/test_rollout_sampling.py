"""One sampling step: the random numbers, top-k and top-p."""

import numpy as np
import pytest
import torch

from milepost.common.errors import UserError
from milepost.rollout.engine import SamplingParams
from milepost.rollout.sampling import sample, seed_words, uniforms

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(**params):
    """The tokens sampled for a grid of uniform numbers, with their frequencies."""
    grid = (torch.arange(1000).double() + 0.5) / 1000
    tokens, _ = sample(PROBS.log().repeat(1000, 1), grid, SamplingParams(max_new_tokens=1, **params))
    return torch.bincount(tokens, minlength=len(PROBS)) / 1000


def test_uniform_numbers_are_uniform_over_seeds_and_positions():
    seeds, positions = np.meshgrid(seed_words(list(range(300))), np.arange(300), indexing="ij")
    grid = uniforms(seeds.ravel(), positions.ravel()).reshape(300, 300)
    assert 0 <= grid.min() < grid.max() < 1
    counts = np.histogram(grid, bins=100, range=(0, 1))[0]
    assert abs(((counts - 900) ** 2 / 900).sum() - 99) < 4 * (2 * 99) ** 0.5
    # Numbers of neighbouring positions and seeds are independent: 90,000 pairs in 10 x 10 cells each.
    for left, right in [(grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])]:
        cells = np.histogram2d(left.ravel(), right.ravel(), bins=10, range=[(0, 1)] * 2)[0]
        expected = left.size / 100
        assert abs(((cells - expected) ** 2 / expected).sum() - 99) < 4 * (2 * 99) ** 0.5


def test_uniform_numbers_never_change():
    # A change of these numbers would break the resumption of existing runs.
    expected = [0.6524484863740322, 0.9435642308648544, 0.510562089893682, 0.778038700176834]
    found = uniforms(seed_words([0, 1, -1, 2**70 + 5]), np.array([0, 1, 2, 3]))
    assert found.tolist() == expected


def test_whole_distribution_without_truncation():
    torch.testing.assert_close(drawn(), PROBS, atol=1e-3, rtol=0)


def test_top_k_keeps_the_most_likely():
    torch.testing.assert_close(drawn(top_k=2), torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65, atol=2e-3, rtol=0)
    assert drawn(top_k=1)[1] == 1


def test_top_p_keeps_the_token_that_reaches_it():
    torch.testing.assert_close(drawn(top_p=0.6), torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65, atol=2e-3, rtol=0)
    torch.testing.assert_close(drawn(top_p=0.7), torch.tensor([0, 0.4, 0, 0.25, 0.2]) / 0.85, atol=2e-3, rtol=0)
    assert drawn(top_p=0.01)[1] == 1


def test_top_k_and_top_p_hold_together():
    assert (drawn(top_k=3, top_p=0.5) > 0).tolist() == [False, True, False, True, False]
    assert (drawn(top_k=1, top_p=0.99) > 0).tolist() == [False, True, False, False, False]


def test_temperature_zero_takes_the_most_likely_token_and_its_plain_log_prob():
    tokens, log_probs = sample(PROBS.log()[None], torch.tensor([0.99]).double(), SamplingParams(1, temperature=0))
    assert tokens.tolist() == [1]
    assert log_probs.tolist() == pytest.approx([np.log(0.4)])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_draws_never_give_an_impossible_token(uniform):
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, -torch.inf])
    tokens, log_probs = sample(logits[None], torch.tensor([uniform]).double(), SamplingParams(max_new_tokens=1))
    assert tokens.item() in (1, 2)
    assert log_probs.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=1, temperature=t) for t in (0.0, 1.0)])
def test_logits_that_are_not_finite_are_refused(bad, params):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(UserError, match="logits are not finite"):
        sample(logits, torch.zeros(2, dtype=torch.float64), params)
