"""Losses by name: what each response token adds to the loss of an optimizer step.

To add a policy loss, write a function like `ppo` here and add its name to `POLICY_LOSSES` and to
`configuration.training.PolicyLoss`; an estimate of the KL divergence likewise. docs/algorithms.md compares them.

Every token carries its weight in the step's mean (`aggregations`), computed from global counts before packing. So the
loss of a pack is a weighted sum, and the sum over packs and data-parallel ranks does not depend on the packing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from milepost.configuration.schema import Algorithm
from milepost.grpo.corrections import CORRECTIONS, MAX_LOG_RATIO, bounded_exp
from milepost.grpo.responses import Responses

MAX_KL = 10.0  # bound on a token's k3 estimate, in nats
MAXIMA = ("importance_max",)  # metrics that are a maximum over tokens, not a mean


@dataclass(frozen=True)
class TokenBatch:
    """The loss's inputs for N response tokens, besides their log-probs; every tensor is (N,).

    Attributes:
        rollout_log_probs: the engine's, from sampling.
        old_log_probs: the trainer's before the first of several steps; None for a single step.
        fresh: whether the weights that are trained sampled the token; None if all tokens are fresh.
    """

    weights: Tensor
    advantages: Tensor
    rollout_log_probs: Tensor
    responses: Responses
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    fresh: Tensor | None = None


class Surrogate(NamedTuple):
    """A policy loss of N tokens, to be minimised; every tensor is (N,).

    Attributes:
        ratio: new over old probability, of the token or of its whole response.
        clipped: whether the loss of the token was clipped.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def has_kl_loss(algorithm: Algorithm) -> bool:
    """Whether the loss includes the KL divergence from the reference, the starting weights."""
    return algorithm.use_kl_loss and algorithm.kl_coefficient > 0


def ppo(log_probs: Tensor, old_log_probs: Tensor, batch: TokenBatch, algorithm: Algorithm) -> Surrogate:
    """PPO's clipped surrogate loss (arXiv 1707.06347, eq. 7), negated, with separate lower and upper bounds.

    The ratio is clipped to between ``1 - clip`` and ``1 + clip_high``. With ``dual_clip``, a token with a negative
    advantage has a loss of at most ``dual_clip`` times the advantage's size (arXiv 1912.09729).
    """
    ratio = bounded_exp(log_probs - old_log_probs)
    loss, clipped = _pessimistic(ratio, batch.advantages, algorithm)
    if algorithm.dual_clip is not None:
        ceiling = -algorithm.dual_clip * batch.advantages
        beyond = (batch.advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return Surrogate(loss, ratio, clipped)


def gspo(log_probs: Tensor, old_log_probs: Tensor, batch: TokenBatch, algorithm: Algorithm) -> Surrogate:
    """PPO's loss with one ratio per response: the geometric mean of its tokens' ratios (GSPO, arXiv 2507.18071).

    This is the paper's GSPO-token: each token's ratio has the response's value, and the gradient of its own log-prob.
    If all tokens of a response have the same weight, the gradient is that of GSPO.
    """
    log_ratio = batch.responses.means(log_probs.detach() - old_log_probs)
    ratio = bounded_exp(log_ratio + (log_probs - log_probs.detach()))
    loss, clipped = _pessimistic(ratio, batch.advantages, algorithm)
    return Surrogate(loss, ratio, clipped)


def cispo(log_probs: Tensor, old_log_probs: Tensor, batch: TokenBatch, algorithm: Algorithm) -> Surrogate:
    """REINFORCE with a clipped importance weight, so that no token loses its gradient (MiniMax-M1, arXiv 2506.13585).

    The weight is clipped above only, as in the paper's runs.
    """
    ratio = bounded_exp(log_probs.detach() - old_log_probs)
    bound = 1.0 + algorithm.clip_high
    return Surrogate(-ratio.clamp(max=bound) * batch.advantages * log_probs, ratio, ratio > bound)


POLICY_LOSSES: dict[str, Callable[[Tensor, Tensor, TokenBatch, Algorithm], Surrogate]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}


def _pessimistic(ratio: Tensor, advantages: Tensor, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """The larger of the losses with the ratio (N,) and with the clipped ratio, and whether that was the latter."""
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - algorithm.clip, 1.0 + algorithm.clip_high)
    return torch.maximum(free, clipped), clipped > free


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
    log_probs: Tensor,
    entropy: Tensor | None,
    batch: TokenBatch,
    algorithm: Algorithm,
    *,
    against_engine: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The contribution of N response tokens to the loss of an optimizer step.

    Without old log-probs the trained policy is the one that sampled: the ratio is exactly 1, and its gradient is that
    of the log-prob.

    Args:
        log_probs: (N,) of the policy, with gradient.
        entropy: (N,) of the policy; None if it is not needed.
        against_engine: use the engine's log-probs as the old ones.

    Returns:
        the loss, a scalar to sum over packs and data-parallel ranks; and weighted sums of the metrics. Summed in the
        same way and divided by the sum of ``weight``, those are means, except `MAXIMA`.
    """
    weights = batch.weights
    trainer = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
    old_log_probs = batch.rollout_log_probs if against_engine else trainer
    token_loss, ratio, clipped = POLICY_LOSSES[algorithm.loss](log_probs, old_log_probs, batch, algorithm)
    gap = trainer - batch.rollout_log_probs
    metrics = {"weight": weights, "clip_fraction": weights * clipped, "ratio": weights * ratio}
    if algorithm.correction == "none":
        importance = bounded_exp(gap)
    else:
        importance, correction = CORRECTIONS[algorithm.correction](gap, batch.responses, algorithm.correction_range)
        token_loss = correction * token_loss
        metrics["importance_clipped_share"] = weights * (correction != importance)
    metrics |= _engine_metrics(gap, importance, batch)
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
    sums = {name: values.detach().sum() for name, values in metrics.items()}
    return loss, sums | {"importance_max": torch.cat([importance, importance.new_zeros(1)]).max()}  # N may be 0


def _engine_metrics(gap: Tensor, importance: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """How far engine and trainer are apart, weighted: ``gap`` (N,) is the trainer's log-probs minus the engine's."""
    weights = batch.weights
    metrics = {
        "log_prob_diff": weights * gap.abs(),
        "engine_kl": weights * low_variance_kl(torch.zeros_like(gap), gap),
        "importance_mean": weights * importance,
        "importance_square": weights * importance.square(),
    }
    if batch.fresh is not None:  # older tokens differ, although engine and trainer compute alike
        metrics["fresh_share"] = weights * batch.fresh
        metrics["log_prob_diff"] = weights * batch.fresh * gap.abs()
        metrics["log_prob_diff_older"] = weights * ~batch.fresh * gap.abs()
    return metrics
