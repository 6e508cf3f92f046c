"""Estimate a model's accuracy from n samples of each of P problems, with uncertainties.

Problems are independent, but samples of one problem are not, so all errors here are over problems
(Miller 2024, arXiv 2411.00640).
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

BOOTSTRAP_BATCH = 1000  # resamples in memory at once
ROUNDING = 1e-12  # a smaller spread of shares is rounding error


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its uncertainty; the errors are None for a single problem.

    Attributes:
        value: the mean, between 0 and 1.
        standard_error: standard deviation of the problems' means over the root of their number.
        interval: t interval with P - 1 degrees of freedom, clipped to the possible range; None if all problems have the
            same mean.
    """

    value: float
    standard_error: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """Trained minus base over the same problems, of shares between -1 and 1; without a spread only ``value`` is known.

    Attributes:
        bootstrap_interval: BCa bootstrap over problems, see `bootstrap_interval`.
        p_value: of the two-sided paired t test.
    """

    bootstrap_interval: tuple[float, float] | None
    p_value: float | None


def correct_counts(correct: Sequence[Sequence[bool]]) -> tuple[np.ndarray, int]:
    """The number of correct samples of each problem (P,), and of samples, which must be the same for all problems."""
    counts = {len(samples) for samples in correct}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every problem needs the same number of samples, not {sorted(counts)}")
    return np.array([sum(map(bool, samples)) for samples in correct]), counts.pop()


def mean_with_error(
    values: ArrayLike, confidence: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """The mean of per-problem values (P,), each within ``bounds``, with standard error and t interval."""
    values = np.asarray(values, dtype=float)
    mean, problems = float(values.mean()), len(values)
    if problems < 2:
        return Estimate(mean, None, None)
    error = float(values.std(ddof=1)) / math.sqrt(problems)
    if error < ROUNDING:  # problems with equal means say nothing about the spread of others
        return Estimate(mean, 0.0, None)
    reach = float(stats.t.ppf((1 + confidence) / 2, problems - 1)) * error
    lowest, highest = bounds
    return Estimate(mean, error, (max(lowest, mean - reach), min(highest, mean + reach)))


def bootstrap_interval(
    values: ArrayLike, samples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean of per-problem values (P,), not all equal, from ``samples`` resamples.

    Bias-corrected and accelerated (BCa; Efron 1987), so it may be skewed and lies within the values' range. Like a
    percentile interval it is too narrow for few problems: the resamples' spread is sqrt((P - 1) / P) of the unbiased
    estimate, and it has normal tails instead of a t interval's longer ones. With 30 problems only 93 of 100 such
    intervals contain the truth instead of 95. So the nominal confidence is raised as in Hesterberg (2015, arXiv
    1411.5279), for P = 30 from 0.95 to 0.9625. None with too few problems or resamples.
    """
    problems = len(values)
    widened = math.sqrt(problems / (problems - 1)) * stats.t.ppf((1 + confidence) / 2, problems - 1)
    with warnings.catch_warnings(action="ignore"):  # about NaN for too few problems
        found = stats.bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            n_resamples=samples,
            batch=BOOTSTRAP_BATCH,
            confidence_level=1 - 2 * stats.norm.sf(widened),
            method="BCa",
            rng=seed,
        ).confidence_interval
    return None if math.isnan(found.low + found.high) else (float(found.low), float(found.high))


def pass_at(counts: ArrayLike, samples: int, k: int) -> np.ndarray:
    """Each problem's unbiased estimate of the probability that at least one of k samples is correct, (P,).

    1 - C(n - c, k) / C(n, k) for c correct of n samples (Chen et al. 2021, arXiv 2107.03374), in exact integers.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    draws = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(correct), k) / draws for correct in np.asarray(counts)])


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """maj@n of one problem: whether the most frequent answer of its n samples is correct.

    Samples without an answer do not vote. Tied answers share the vote, so the result may be a fraction.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    right = {answer for answer, is_right in zip(answers, correct, strict=True) if is_right}
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(answer in right for answer in winners) / len(winners)


def paired_difference(
    base: ArrayLike,
    trained: ArrayLike,
    bootstrap_samples: int,
    seed: int,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> PairedDifference:
    """Trained minus base from both models' means of the same problems, (P,) each; ``bounds`` are a difference's.

    Pairing cancels the problems' difficulty, which makes up most of either score's spread. With as few problems as AIME
    has, the t interval relies on the mean being nearly normal, so a bootstrap over problems is reported too.
    """
    base, trained = np.asarray(base, dtype=float), np.asarray(trained, dtype=float)
    if base.shape != trained.shape:
        raise ValueError(f"{len(base)} problems of base, {len(trained)} of trained: pairs need the same ones")
    differences = trained - base  # (P,)
    estimate = mean_with_error(differences, confidence, bounds)
    value, error = estimate.value, estimate.standard_error
    if estimate.interval is None:
        return PairedDifference(value, error, None, None, None)
    return PairedDifference(
        value,
        error,
        estimate.interval,
        bootstrap_interval(differences, bootstrap_samples, seed, confidence),
        p_value=float(2 * stats.t.sf(abs(value) / error, len(differences) - 1)),
    )
