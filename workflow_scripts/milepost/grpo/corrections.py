"""Corrections by name: importance weights for the difference between engine and trainer.

Engine and trainer round differently, so the engine samples from a distribution mu that is not exactly the policy pi.
Importance weights rho = pi / mu correct the bias, and bounds on them limit the variance.

To add one, write a function ``(log_ratio (N,), responses, bounds) -> (importance (N,), weight (N,))`` here and add its
name to `CORRECTIONS` and to `configuration.training.Correction`. ``log_ratio`` is log pi - log mu of each token, where
pi is the policy before the first step. The weight has no gradient and multiplies the policy loss of the token. It does
not change the denominators of means.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from milepost.grpo.responses import Responses

MAX_LOG_RATIO = 20.0  # bound on a log ratio, in nats: exp(20) is 4.9e8

Bounds = tuple[float, float]


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """A ratio of probabilities (N,) from its logarithm, which is clamped to ``MAX_LOG_RATIO``.

    Beyond 88 exp is infinite in fp32, and NaN times an advantage of 0. Where the clamp is active the gradient is 0, as
    in verl (``compute_policy_loss`` in trainer/ppo/core_algos.py).
    """
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def token_truncate(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling (TIS, Yao et al. 2025): each token's rho, clipped to the bounds."""
    importance = bounded_exp(log_ratio)
    return importance, importance.clamp(*bounds)


def token_mask(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """IcePop (arXiv 2510.18855): each token's rho, or 0 if it is out of bounds."""
    importance = bounded_exp(log_ratio)
    return importance, _masked(importance, bounds)


def sequence_truncate(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The product of rho over the response, clipped to the bounds; without bounds the gradient is unbiased."""
    importance = bounded_exp(responses.sums(log_ratio))
    return importance, importance.clamp(*bounds)


def sequence_mask(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The product of rho over the response, or 0 if it is out of bounds."""
    importance = bounded_exp(responses.sums(log_ratio))
    return importance, _masked(importance, bounds)


CORRECTIONS: dict[str, Callable[[Tensor, Responses, Bounds], tuple[Tensor, Tensor]]] = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}


def _masked(importance: Tensor, bounds: Bounds) -> Tensor:
    low, high = bounds
    return importance.where((importance >= low) & (importance <= high), 0.0)
