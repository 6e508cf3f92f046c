"""Sample the next token of every running sequence, with random numbers that depend only on the sequence.

The random number of a sequence's n-th token is a hash of (seed, n). There is no generator state, so a sequence's draws
do not depend on the rest of the batch, and a resumed run draws what the interrupted one would have drawn.
"""

import numpy as np
import torch
from torch import Tensor

from milepost.common.errors import UserError
from milepost.rollout.engine import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_words(seeds: list[int]) -> np.ndarray:
    """Convert seeds (any Python integers, taken modulo 2^64) to the 64-bit words that `uniforms` takes."""
    return np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) for each pair of seed word (n, uint64) and position (n): (n,) float64.

    SplitMix64 (Steele, Lea and Flood 2014): the stream that starts at mix(seed), at the given position. The seed
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
    """Draw one token per row.

    Args:
        logits: (n, V) float32; modified in place if there is a presence penalty or a temperature.
        uniform: (n,) float64 in [0, 1), one draw per row.
        params: temperature, top-p, top-k and presence penalty.
        present: (n, V) bool, the tokens already in a row's response; needed for a presence penalty.

    Returns:
        Tokens (n,) int64 and their log-probs (n,) float32 as `rollout.engine.Completion` defines them.

    Raises:
        UserError: a row of logits holds NaN or infinity.

    As in SGLang, top-k and top-p both apply to the full distribution: a token is kept if fewer than k tokens and less
    than p of the probability come before it.
    """
    if params.presence_penalty:
        logits.add_(present, alpha=-params.presence_penalty)
    if params.temperature not in (0, 1):
        logits.div_(params.temperature)
    log_probs = logits.log_softmax(-1)
    if log_probs[:, 0].isnan().any():  # one NaN or infinity spreads over its whole row
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or its training diverged: take an earlier"
            " checkpoint, or download the model again"
        )
    if params.temperature == 0:
        tokens = log_probs.argmax(-1)
    elif params.top_k == -1 and params.top_p == 1:
        tokens = _draw(log_probs.double().exp_(), uniform)
    else:
        tokens = _draw_from_top(log_probs, uniform, params)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of ``probs`` (n, V), not necessarily normalized, at ``uniform`` (n,)."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding could raise the product to the total, past the last token.
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
