"""Drawing the next token of every running sequence, each from random numbers of its own.

The random number of a sequence's n-th token is a hash of (seed, n): no generator state is kept, so a sequence's draws
do not depend on what else is in the batch, and a resumed run draws what the interrupted one would have drawn.
"""

import numpy as np
import torch
from torch import Tensor

from milepost.common.errors import UserError
from milepost.rollout.engine import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_words(seeds: list[int]) -> np.ndarray:
    """Seeds, any Python integers, as the 64-bit words that `uniforms` takes (equal modulo 2^64, equal words)."""
    return np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) for each pair of a seed word (n, uint64) and a position (n): (n,) float64.

    SplitMix64 (Steele, Lea and Flood 2014): its stream for the start value mix(seed), at the given position. The seed
    is mixed first because neighbouring seeds would otherwise share most of their streams.
    """
    hashed = _mix(_mix(seeds + _GOLDEN) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (hashed >> np.uint64(11)) * 2.0**-53


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def sample(
    logits: Tensor, uniform: Tensor, params: SamplingParams, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: (n, V) float32; changed in place where there is a presence penalty or a temperature.
        uniform: (n,) float64 in [0, 1), one draw a row.
        params: temperature, top-p, top-k and presence penalty.
        present: (n, V) bool, the tokens that a row's response already holds; needed with a presence penalty.

    Returns:
        Tokens (n,) int64 and their log-probs (n,) float32 as `rollout.engine.Completion` defines them.

    Raises:
        UserError: a row of logits holds NaN or infinity.

    Top-k and top-p are both measured on the full distribution, as SGLang does: a token stays when fewer than k tokens
    and less than p of the probability come before it.
    """
    if params.presence_penalty:
        logits.add_(present, alpha=-params.presence_penalty)
    if params.temperature not in (0, 1):
        logits.div_(params.temperature)
    log_probs = logits.log_softmax(-1)
    if log_probs[:, 0].isnan().any():  # one NaN or infinity spreads over its row
        raise UserError("the model's logits are not finite: its weights are damaged, or its training went wrong")
    if params.temperature == 0:
        tokens = log_probs.argmax(-1)
    elif params.top_k == -1 and params.top_p == 1:
        tokens = _draw(log_probs.double().exp_(), uniform)
    else:
        tokens = _draw_from_top(log_probs, uniform, params)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of ``probs`` (n, V), which need not sum to 1, at ``uniform`` (n,)."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding could carry the product up to the total, beyond the last token.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _draw_from_top(log_probs: Tensor, uniform: Tensor, params: SamplingParams) -> Tensor:
    ranked, order = log_probs.sort(dim=-1, descending=True, stable=True)
    probs = ranked.double().exp_()  # (n, V), most likely first
    if params.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs.masked_fill_(before >= params.top_p, 0)
    if params.top_k != -1:
        probs[:, params.top_k :] = 0
    return order.gather(-1, _draw(probs, uniform)[:, None])[:, 0]
