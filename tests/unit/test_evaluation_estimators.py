"""Scores and their errors match their definitions: enumeration, textbook values and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from milepost.evaluation.estimators import (
    bootstrap_interval,
    correct_counts,
    majority,
    mean_with_error,
    paired_difference,
    pass_at,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    samples, correct, k = case
    outcomes = [True] * correct + [False] * (samples - correct)
    subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
    assert pass_at([correct], samples, k)[0] == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_does_not_overflow_at_many_samples():
    assert pass_at([1], 10_000, 5_000)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_than_was_sampled_is_refused(k):
    with pytest.raises(ValueError):
        pass_at([1], 4, k)


@pytest.mark.parametrize(
    ("answers", "correct", "value"),
    [
        (["33", "33", "34"], [True, True, False], 1),
        (["33", "34", "34"], [True, False, False], 0),
        (["33", "34"], [True, False], 1 / 2),
        (["33", "34", "35"], [True, False, False], 1 / 3),
        (["33", None, None, None], [True, False, False, False], 1),
        ([None, None], [False, False], 0),
    ],
)
def test_majority_shares_ties_and_ignores_those_who_do_not_answer(answers, correct, value):
    assert majority(answers, correct) == pytest.approx(value)


def test_standard_error_and_interval_are_the_textbook_ones():
    estimate = mean_with_error([0.0, 0.5, 1.0])
    assert estimate.value == 0.5
    assert estimate.standard_error == pytest.approx(0.5 / math.sqrt(3))
    reach = 4.302653 * 0.5 / math.sqrt(3)  # t with 2 degrees of freedom, 97.5%
    assert estimate.interval == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-6)
    of_thirty = mean_with_error(np.arange(30) % 2)
    assert (of_thirty.interval[1] - of_thirty.value) / of_thirty.standard_error == pytest.approx(2.045, abs=5e-4)


def test_a_single_problem_has_no_error():
    estimate = mean_with_error([0.25])
    assert (estimate.value, estimate.standard_error, estimate.interval) == (0.25, None, None)
    assert paired_difference([0.25], [0.5], 100, 0).p_value is None


@pytest.mark.parametrize("correct", [[[True], [True, False]], [[]], []])
def test_unequal_numbers_of_samples_are_refused(correct):
    with pytest.raises(ValueError, match="same number"):
        correct_counts(correct)


def test_pairing_takes_the_difficulty_of_the_problems_out_of_the_error():
    generator = np.random.default_rng(0)
    difficulty = generator.beta(0.6, 0.6, size=30)
    base, trained = (generator.binomial(16, np.clip(difficulty + gain, 0, 1)) / 16 for gain in (0.0, 0.05))
    unpaired = math.hypot(mean_with_error(base).standard_error, mean_with_error(trained).standard_error)
    paired = paired_difference(base, trained, 2000, seed=0)
    assert paired.standard_error < unpaired / 2
    assert paired.value == pytest.approx(trained.mean() - base.mean())


@pytest.mark.parametrize("problems", [10, 30])
def test_both_intervals_hold_the_true_difference_95_times_in_100(problems):
    """With 16 samples per problem, whose success probabilities before and after training are redrawn each time.

    Of 1000 intervals with a coverage of 0.95, between 927 and 973 contain the truth, in 999 of 1000 cases. With a
    coverage of 0.91, as of an uncorrected percentile or BCa bootstrap of 10 problems, fewer do.
    """
    generator, repetitions, truth = np.random.default_rng(problems), 1000, 0.5 * 0.15
    held = {"t": 0, "bootstrap": 0}
    for _ in range(repetitions):
        chance = generator.beta(0.6, 0.6, size=problems)  # most problems are always or never solved
        better = chance + (1 - chance) * 0.3 * generator.uniform(size=problems)
        base, trained = (generator.binomial(16, chances) / 16 for chances in (chance, better))
        found = paired_difference(base, trained, bootstrap_samples=1000, seed=int(generator.integers(2**31)))
        for name, (low, high) in (("t", found.interval), ("bootstrap", found.bootstrap_interval)):
            held[name] += low <= truth <= high
    low, high = stats.binom.interval(0.999, repetitions, 0.95)
    assert all(low <= count <= high for count in held.values()), held


def test_bootstrap_is_bca_at_a_confidence_raised_for_few_problems():
    """With many problems it is hardly raised; with 30 it is 0.9625."""
    generator = np.random.default_rng(2)
    for problems, confidence, near in ((2000, 0.95, 2e-3), (30, 0.9625, 1e-4)):
        values = generator.exponential(size=problems)  # skewed, so that BCa differs from percentiles
        expected = stats.bootstrap(
            (values,), np.mean, n_resamples=4000, confidence_level=confidence, method="BCa", batch=1000, rng=7
        ).confidence_interval
        assert bootstrap_interval(values, 4000, seed=7) == pytest.approx(expected, abs=near)


def test_bootstrap_repeats_with_its_seed():
    base, trained = np.random.default_rng(2).uniform(size=(2, 30))
    first, again, other = (paired_difference(base, trained, 1000, seed) for seed in (7, 7, 8))
    assert first == again != other
    assert first.interval == other.interval


def test_p_value_equals_the_two_sided_paired_t_test_s():
    base, trained = np.random.default_rng(3).binomial(8, [[0.4], [0.5]], size=(2, 30)) / 8
    expected = stats.ttest_rel(trained, base).pvalue
    assert expected < 0.5  # where one-sided and two-sided tests differ
    assert paired_difference(base, trained, 10, 0).p_value == pytest.approx(expected)
    assert paired_difference(trained, base, 10, 0).p_value == pytest.approx(expected)


def test_a_gain_is_positive_and_a_loss_negative():
    worse, better = [0.0, 0.25, 0.5, 0.25], [0.5, 0.5, 1.0, 0.5]
    gain, loss = paired_difference(worse, better, 500, 0), paired_difference(better, worse, 500, 0)
    assert (gain.value, loss.value) == (0.375, -0.375)
    assert gain.bootstrap_interval[0] > 0 > loss.bootstrap_interval[1]
    assert gain.interval == pytest.approx((-loss.interval[1], -loss.interval[0]))


def test_intervals_stay_within_the_bounds():
    worst, best = [0.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.5]
    assert mean_with_error(best, bounds=(0, 1)).interval[1] == 1
    for pair, end in (((worst, best), 1), ((best, worst), -1)):
        found = paired_difference(*pair, 500, 0)
        assert end in found.interval and max(map(abs, found.bootstrap_interval)) <= 1


def test_too_few_problems_or_resamples_allow_no_bootstrap():
    two = paired_difference([0.0, 0.0], [0.5, 1.0], 1000, 0)
    assert two.bootstrap_interval is None and two.interval[1] == 1 and two.p_value is not None
    assert bootstrap_interval([0.1, 0.2, 0.4], 1, 0) is None


def test_equal_models_have_no_difference():
    paired = paired_difference([0.5, 1.0], [0.5, 1.0], 100, 0)
    assert (paired.value, paired.standard_error, paired.bootstrap_interval, paired.p_value) == (0, 0, None, None)


def test_pairs_of_different_problems_are_refused():
    with pytest.raises(ValueError, match="problems"):
        paired_difference([0.5], [0.5, 1.0], 100, 0)


def test_problems_that_do_not_differ_allow_no_interval():
    estimate = mean_with_error([0.1 + 0.2 - 0.3] * 30)
    assert (estimate.standard_error, estimate.interval) == (0, None)
    difference = paired_difference([0.1] * 30, [0.3] * 30, bootstrap_samples=10, seed=0)
    assert (difference.interval, difference.bootstrap_interval, difference.p_value) == (None, None, None)
    assert difference.value == pytest.approx(0.2)
