"""Corrections by name: weights for tokens that the engine sampled with another probability than the trainer computes.

Engine and trainer round differently, so the engine's distribution mu is not quite the policy pi. Importance weights,
rho = pi / mu, make up for it: unbounded they are unbiased, but a few tokens may outweigh all others.

A new one is a function ``(log_ratio (N,), responses, bounds) -> (importance (N,), weight (N,))`` here, with its name in
`CORRECTIONS` and in `configuration.training.Correction`. ``log_ratio`` is log pi - log mu of each token, pi being the
policy before the first step. The weight, which is never differentiated, multiplies the token's policy loss; the
denominators of means stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from milepost.grpo.responses import Responses

MAX_LOG_RATIO = 20.0  # nats between two probabilities of one token, or two of one response: exp is 4.9e8

Bounds = tuple[float, float]


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, with its argument held within ``MAX_LOG_RATIO``.

    Beyond 88 a ratio in fp32 is infinite, and times an advantage of 0 not a number. Outside the bounds the gradient is
    0, as in verl (``compute_policy_loss`` in trainer/ppo/core_algos.py); within them nothing changes.
    """
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def token_truncate(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling (TIS, Yao et al. 2025): each token's rho, clipped to the bounds."""
    importance = bounded_exp(log_ratio)
    return importance, importance.clamp(*bounds)


def token_mask(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """IcePop (arXiv 2510.18855): each token's rho, and 0 outside the bounds."""
    importance = bounded_exp(log_ratio)
    return importance, _masked(importance, bounds)


def sequence_truncate(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The product of rho over the response, clipped to the bounds: unbiased as far as they allow."""
    importance = bounded_exp(responses.sums(log_ratio))
    return importance, importance.clamp(*bounds)


def sequence_mask(log_ratio: Tensor, responses: Responses, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The product of rho over the response, and 0 outside the bounds."""
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
