"""The gated delta rule on CPU, in chunks (Yang et al. 2024, arXiv:2412.06464, section 3.3)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.qwen3_5.packed import ChunkLayout, Packed

CHUNK = 64  # tokens per triangular system
BLOCK = 8  # a chunk's length is a multiple of this
FORGOTTEN = (-69.0, -torch.inf)  # smaller log-decays count as -inf: denormal numbers slow down all that follows


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, packed: Packed
) -> Tensor:
    """`qwen3_5.kernels.gated_delta_rule` in fp32 or better: all chunks in parallel, then the states sequentially.

    Within a chunk each token's correction u depends on the earlier ones through a unit lower triangular system. Its
    solution for a zero initial state needs no other chunk; an initial state S adds -w S to it.
    """
    layout = packed.chunks(min(CHUNK, -(-max(packed.lengths) // BLOCK) * BLOCK))
    precision = torch.promote_types(query.dtype, torch.float32)
    groups = value.shape[1] // key.shape[1]

    def chunk(x: Tensor) -> Tensor:  # (T, H, D) -> (N, H, C, D): N chunks of C tokens
        padded = x.new_zeros(sum(layout.counts) * layout.size, *x.shape[1:]).index_copy(0, layout.slots, x)
        return padded.view(-1, layout.size, *x.shape[1:]).transpose(1, 2)

    def per_value_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(groups, 1)

    query, key, value, log_decay, beta = (x.to(precision) for x in (query, key, value, log_decay, beta))
    query = chunk(_unit(query) * query.shape[-1] ** -0.5)  # (N, Hk, C, Dk)
    key = chunk(_unit(key))
    value = chunk(value)  # (N, Hv, C, Dv)
    log_decay = chunk(log_decay[..., None])[..., 0].cumsum(-1)  # (N, Hv, C) from the start of the chunk
    beta = chunk(beta[..., None])  # (N, Hv, C, 1)

    decay = _PairwiseDecay.apply(log_decay).unflatten(1, (-1, groups))  # (N, Hk, Hv / Hk, C, C)
    attention = ((query @ key.transpose(-1, -2))[:, :, None] * decay).flatten(1, 2)  # (N, Hv, C, C)
    # The solver assumes a diagonal of 1.
    system = ((key @ key.transpose(-1, -2))[:, :, None] * (decay * beta.unflatten(1, (-1, groups)))).flatten(1, 2)
    wanted = value * beta
    u = _Solve.apply(system, wanted)  # (N, Hv, C, Dv)
    if len(layout.counts) == 1:
        return _tokens(attention @ u, layout)

    from_start = _decay(log_decay)[..., None]
    to_end = _decay(log_decay[..., -1:] - log_decay)[..., None]
    key, query = per_value_head(key), per_value_head(query)
    later = slice(layout.counts[0], None)  # the chunks with an earlier chunk, hence an initial state
    w = _Solve.apply(system[later], (key * beta * from_start)[later])
    return _tokens(
        _pass_states(attention, u, w, query * from_start, key * to_end, from_start[:, :, -1:], layout), layout
    )


def _pass_states(
    attention: Tensor, u: Tensor, w: Tensor, query: Tensor, key: Tensor, decay: Tensor, layout: ChunkLayout
) -> Tensor:
    """Carry the states through the chunks of each sequence, all sequences in parallel.

    Args:
        attention: (N, Hv, C, C); u: (N, Hv, C, Dv); query, key: (N, Hv, C, Dk), decayed from the start or to the end of
            their chunk; decay: (N, Hv, 1, 1) over the chunk; w: (N minus the first chunks, Hv, C, Dk).

    Returns:
        The outputs (N, Hv, C, Dv).
    """
    attention, u, query, key, decay = (x.split(layout.counts) for x in (attention, u, query, key, decay))
    w = w.split(layout.counts[1:])
    state = key[0].transpose(-1, -2) @ u[0]  # (n, Hv, Dk, Dv)
    outputs = [attention[0] @ u[0]]
    for number, count in enumerate(layout.counts[1:], 1):
        state = state[:count]
        correction = u[number] - w[number - 1] @ state
        outputs.append(attention[number] @ correction + query[number] @ state)
        state = decay[number] * state + key[number].transpose(-1, -2) @ correction
    return torch.cat(outputs)


class _PairwiseDecay(torch.autograd.Function):
    """exp(d_i - d_j) for j <= i, else 0: (..., C) -> (..., C, C), for ``d`` non-increasing along C."""

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor) -> Tensor:
        difference = log_decay[..., :, None] - log_decay[..., None, :]
        decay = F.threshold_(difference, *FORGOTTEN).exp_().tril_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        weighted = gradient * ctx.saved_tensors[0]
        return weighted.sum(-1) - weighted.sum(-2)


class _Solve(torch.autograd.Function):
    """Solve (I + L) x = b, where L is the part of ``system`` (..., C, C) below its diagonal and b is (..., C, D).

    torch's triangular solver would start threads for each of thousands of small matrices.
    """

    @staticmethod
    def forward(ctx: Any, system: Tensor, right: Tensor) -> Tensor:
        inverse = _invert_unit_lower(system)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        inverse, solution = ctx.saved_tensors
        of_right = inverse.transpose(-1, -2) @ gradient
        return (of_right @ solution.transpose(-1, -2)).tril_(-1).neg_(), of_right


def _invert_unit_lower(system: Tensor) -> Tensor:
    """(I + L)^-1, where L is the part of ``system`` (..., C, C) below its diagonal and C is a multiple of `BLOCK`.

    The diagonal blocks are inverted by forward substitution, in parallel; then neighbours are merged, since the inverse
    of [[A, 0], [B, D]] is [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    blocks = system.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # (..., C / 8, 8, C / 8, 8)
    lower = blocks.diagonal(dim1=-4, dim2=-2).movedim((-3, -2), (0, 1)).contiguous()  # (8, 8, ..., C / 8)
    small = torch.zeros_like(lower)
    for row in range(BLOCK):
        small[row, row] = 1
        for column in range(row):
            small[row].addcmul_(lower[row, column], small[column], value=-1)
    inverse = torch.zeros_like(system)
    blocks = inverse.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    blocks.diagonal(dim1=-4, dim2=-2).copy_(small.movedim((0, 1), (-3, -2)))
    _join_blocks(inverse, system, 0, system.shape[-1])
    return inverse


def _join_blocks(inverse: Tensor, system: Tensor, start: int, end: int) -> None:
    """Fill in the inverse below its diagonal blocks, from ``start`` to ``end``."""
    if end - start == BLOCK:
        return
    middle = start + (1 << (end - start - 1).bit_length()) // 2  # splits off the largest power of two below the length
    _join_blocks(inverse, system, start, middle)
    _join_blocks(inverse, system, middle, end)
    first, second = inverse[..., start:middle, start:middle], inverse[..., middle:end, middle:end]
    inverse[..., middle:end, start:middle] = (second @ (system[..., middle:end, start:middle] @ first)).neg_()


def _decay(log_decay: Tensor) -> Tensor:
    """exp(log_decay) for log_decay <= 0."""
    return F.threshold(log_decay, *FORGOTTEN).exp()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _tokens(chunks: Tensor, layout: ChunkLayout) -> Tensor:
    """(N, H, C, D) -> (T, H, D)."""
    return chunks.transpose(1, 2).flatten(0, 1).index_select(0, layout.slots)
