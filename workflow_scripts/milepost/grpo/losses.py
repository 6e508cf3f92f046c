"""Losses by name: what each response token adds to the loss of an optimizer step.

To add a policy loss, write a function like `ppo` here and add its name to `POLICY_LOSSES` and to
`configuration.training.PolicyLoss`; an estimate of the KL divergence likewise.

Every token carries its weight in the step's mean (`aggregations`), computed from global counts before packing. So the
loss of a pack is a weighted sum, and the sum over packs and data-parallel ranks does not depend on the packing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from milepost.configuration.schema import Algorithm

MAX_LOG_RATIO = 20.0  # bound on a token's log ratio, in nats: exp(20) is 4.9e8
MAX_KL = 10.0  # bound on a token's k3 estimate, in nats


@dataclass(frozen=True)
class TokenBatch:
    """The loss's inputs for N response tokens, besides their log-probs; every tensor is (N,)."""

    weights: Tensor
    advantages: Tensor
    rollout_log_probs: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None


def has_kl_loss(algorithm: Algorithm) -> bool:
    """Whether the loss includes the KL divergence from the reference, the starting weights."""
    return algorithm.use_kl_loss and algorithm.kl_coefficient > 0


def probability_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """New over old probability of each token (N,), from their logarithms.

    The log ratio is clamped to ``MAX_LOG_RATIO``: beyond 88 exp is infinite in fp32, and NaN times an advantage of 0.
    Where the clamp is active the gradient is 0, as in verl (``compute_policy_loss`` in trainer/ppo/core_algos.py).
    """
    return torch.exp((log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def ppo(ratio: Tensor, advantages: Tensor, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate loss (arXiv 1707.06347, eq. 7), negated, with separate lower and upper bounds.

    Args:
        ratio: (N,) new over old probability.
        advantages: (N,)
        algorithm: the ratio is clipped to between ``1 - clip`` and ``1 + clip_high``.

    Returns:
        the loss of each token (N,), and whether it was clipped (N,).
    """
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - algorithm.clip, 1.0 + algorithm.clip_high)
    return torch.maximum(free, clipped), clipped > free


POLICY_LOSSES: dict[str, Callable[[Tensor, Tensor, Algorithm], tuple[Tensor, Tensor]]] = {"ppo": ppo}


def low_variance_kl(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token, never negative (Schulman 2020, "Approximating KL").

    It is clamped to ``MAX_KL``, and its log ratio to ``MAX_LOG_RATIO``, as in verl (``kl_penalty`` in trainer/ppo/
    core_algos.py): a token with a log ratio of 19 would otherwise count 1.8e8. Where a clamp is active the gradient is
    0.
    """
    log_ratio = (reference_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.exp(log_ratio) - log_ratio - 1.0).clamp(max=MAX_KL)


KL_ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"low_var_kl": low_variance_kl}


def grpo_loss(
    log_probs: Tensor, entropy: Tensor | None, batch: TokenBatch, algorithm: Algorithm
) -> tuple[Tensor, dict[str, Tensor]]:
    """The contribution of N response tokens to the loss of an optimizer step.

    Without old log-probs the trained policy is the one that sampled: the ratio is exactly 1, and its gradient is that
    of the log-prob.

    Args:
        log_probs: (N,) of the policy, with gradient.
        entropy: (N,) of the policy; None if it is not needed.

    Returns:
        the loss, a scalar to sum over packs and data-parallel ranks; and weighted sums of the metrics. Summed in the
        same way and divided by the sum of ``weight``, those are means.
    """
    weights = batch.weights
    old_log_probs = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
    ratio = probability_ratio(log_probs, old_log_probs)
    token_loss, clipped = POLICY_LOSSES[algorithm.loss](ratio, batch.advantages, algorithm)
    metrics = {
        "weight": weights,
        "clip_fraction": weights * clipped,
        "ratio": weights * ratio,
        "log_prob_diff": weights * (old_log_probs - batch.rollout_log_probs).abs(),
    }
    if batch.reference_log_probs is not None:
        kl = KL_ESTIMATES[algorithm.kl_type](log_probs, batch.reference_log_probs)
        metrics["kl"] = weights * kl
        if has_kl_loss(algorithm):
            token_loss = token_loss + algorithm.kl_coefficient * kl
    if entropy is not None:
        metrics["entropy"] = weights * entropy
        if algorithm.entropy_coefficient:
            token_loss = token_loss - algorithm.entropy_coefficient * entropy
    loss = (weights * token_loss).sum()
    return loss, {name: values.detach().sum() for name, values in metrics.items()}
