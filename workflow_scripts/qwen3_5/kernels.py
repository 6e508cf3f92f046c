"""The kernels' door: attention, causal convolution and the gated delta rule on packs, on CPU and on CUDA.

Callers see three functions. On CUDA they are torch's flash attention and flash-linear-attention's Triton kernels; on
CPU they are batched torch operations, because a pack of a tiny model holds hundreds of short sequences and a Python
loop over them would cost more than the arithmetic. No function lets a sequence see another one of its pack.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_5.packed import Bucket, ChunkLayout, Packed

CHUNK = 64  # tokens whose mutual influence in the delta rule is solved at once


def causal_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """Causal softmax attention within each sequence of a pack.

    Args:
        query: (T, Hq, D); key, value: (T, Hk, D), each key head serving Hq / Hk consecutive query heads.

    Returns:
        (T, Hq, D).
    """
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        boundaries, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        return varlen_attn(query, key, value, boundaries, boundaries, longest, longest, window_size=(-1, 0))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = torch.zeros_like(query)
    for bucket in packed.buckets():
        attended = F.scaled_dot_product_attention(*(_pad(x, bucket) for x in (query, key, value)), is_causal=True)
        rows = attended.transpose(1, 2).flatten(0, 1)[bucket.slots]  # (n, H, D)
        output = rows if bucket.tokens is None else output.index_copy(0, bucket.tokens, rows)
    return output


def causal_convolution(x: Tensor, weight: Tensor, packed: Packed) -> Tensor:
    """Depthwise causal convolution along each sequence, then SiLU: (T, C) and weight (C, K) to (T, C)."""
    if x.is_cuda:
        from fla.modules.causal_conv1d import causal_conv1d

        convolved, _ = causal_conv1d(
            x=x[None],
            weight=weight,
            activation="silu",
            cu_seqlens=packed.boundaries,
            cu_seqlens_cpu=packed.host_boundaries,
        )
        return convolved[0]
    return F.silu(_CausalConvolution.apply(x, weight, packed.positions))


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, packed: Packed) -> Tensor:
    """The gated delta rule over each sequence from a zero state, queries and keys scaled to unit length first.

    With S the state (Dk, Dv) of a value head, for every token in turn (Yang et al. 2024, arXiv:2412.06464):
    S <- exp(decay) S; S <- S + beta k (v - S^T k)^T; output = S^T q / sqrt(Dk).

    Args:
        query, key: (T, Hk, Dk); value: (T, Hv, Dv), each key head serving Hv / Hk consecutive value heads.
        decay: (T, Hv) logarithm of the gate, at most 0, fp32; beta: (T, Hv).

    Returns:
        (T, Hv, Dv).
    """
    if query.is_cuda:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        output, _ = chunk_gated_delta_rule(
            *(x.contiguous()[None] for x in (query, key, value)),
            g=decay.contiguous()[None],
            beta=beta.contiguous()[None],
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=packed.boundaries,
            cu_seqlens_cpu=packed.host_boundaries,
        )
        return output[0]
    return _chunked_delta_rule(query, key, value, decay, beta, packed).to(value.dtype)


def _pad(x: Tensor, bucket: Bucket) -> Tensor:
    """(T, H, D) to (B, H, L, D), zeros at the end of the shorter sequences, where causality keeps them unseen."""
    rows = x if bucket.tokens is None else x[bucket.tokens]
    padded = x.new_zeros(bucket.count * bucket.length, *x.shape[1:]).index_copy(0, bucket.slots, rows)
    return padded.view(bucket.count, bucket.length, *x.shape[1:]).transpose(1, 2)


def _chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, packed: Packed
) -> Tensor:
    """The rule in chunks (arXiv:2412.06464, section 3.3), all chunks of all sequences at once, then the states in turn.

    Within a chunk every token's correction u depends on the earlier ones through a unit lower triangular system. Its
    solution for a zero state needs no other chunk; what a state S from before adds to it is -w S.
    """
    layout = packed.chunks(min(CHUNK, max(8, 1 << (max(packed.lengths) - 1).bit_length())))
    precision = torch.promote_types(query.dtype, torch.float32)
    groups = value.shape[1] // key.shape[1]

    def chunk(x: Tensor) -> Tensor:  # (T, H, D) to (N, H, C, D); N chunks of C tokens
        padded = x.new_zeros(sum(layout.counts) * layout.size, *x.shape[1:]).index_copy(0, layout.slots, x)
        return padded.view(-1, layout.size, *x.shape[1:]).transpose(1, 2)

    def per_value_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(groups, 1)

    query, key, value, decay, beta = (x.to(precision) for x in (query, key, value, decay, beta))
    query = chunk(_unit(query) * query.shape[-1] ** -0.5)  # (N, Hk, C, Dk)
    key = chunk(_unit(key))
    value = chunk(value)  # (N, Hv, C, Dv)
    decay = chunk(decay[..., None])[..., 0].cumsum(-1)  # (N, Hv, C) from the start of the chunk
    beta = chunk(beta[..., None])  # (N, Hv, C, 1)

    fade = _fade(decay[..., :, None] - decay[..., None, :]).tril()  # (N, Hv, C, C)
    system = beta * per_value_head(key @ key.transpose(-1, -2)) * fade  # the solver takes its diagonal for 1
    attention = per_value_head(query @ key.transpose(-1, -2)) * fade
    wanted = value * beta
    u = _Solve.apply(system, wanted)  # (N, Hv, C, Dv)
    if len(layout.counts) == 1:
        return _tokens(attention @ u, layout)

    from_start = _fade(decay)[..., None]
    to_end = _fade(decay[..., -1:] - decay)[..., None]
    key, query = per_value_head(key), per_value_head(query)
    later = slice(layout.counts[0], None)  # the chunks that have a state from before
    w = _Solve.apply(system[later], (key * beta * from_start)[later])
    return _tokens(
        _pass_states(attention, u, w, query * from_start, key * to_end, from_start[:, :, -1:], layout), layout
    )


def _pass_states(
    attention: Tensor, u: Tensor, w: Tensor, query: Tensor, key: Tensor, fade: Tensor, layout: ChunkLayout
) -> Tensor:
    """Run the states through the chunks of each sequence, sequences side by side.

    Args:
        attention: (N, Hv, C, C); u: (N, Hv, C, Dv); query, key: (N, Hv, C, Dk) faded from the start and to the end of
            their chunk; fade: (N, Hv, 1, 1) over the chunk; w: (N less the first chunks, Hv, C, Dk).

    Returns:
        the outputs (N, Hv, C, Dv).
    """
    attention, u, query, key, fade = (x.split(layout.counts) for x in (attention, u, query, key, fade))
    w = w.split(layout.counts[1:])
    state = key[0].transpose(-1, -2) @ u[0]  # (n, Hv, Dk, Dv)
    outputs = [attention[0] @ u[0]]
    for number, count in enumerate(layout.counts[1:], 1):
        state = state[:count]
        correction = u[number] - w[number - 1] @ state
        outputs.append(attention[number] @ correction + query[number] @ state)
        state = fade[number] * state + key[number].transpose(-1, -2) @ correction
    return torch.cat(outputs)


class _CausalConvolution(torch.autograd.Function):
    """x (T, C), weight (C, K), positions (T,): the sum over k of weight[:, K - 1 - k] x[t - k], as far as t - k is
    in the sequence. Written out, it saves no product for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, positions)
        output = x * weight[:, -1]
        for back in range(1, min(weight.shape[1], len(x))):
            earlier = x[:-back].masked_fill((positions[back:] < back)[:, None], 0)
            output[back:].addcmul_(earlier, weight[:, -1 - back])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, positions = ctx.saved_tensors
        of_x, of_weight = gradient * weight[:, -1], torch.zeros_like(weight)
        of_weight[:, -1] = torch.linalg.vecdot(gradient, x, dim=0)
        for back in range(1, min(weight.shape[1], len(x))):
            later = gradient[back:].masked_fill((positions[back:] < back)[:, None], 0)
            of_x[:-back].addcmul_(later, weight[:, -1 - back])
            of_weight[:, -1 - back] = torch.linalg.vecdot(later, x[:-back], dim=0)
        return of_x, of_weight, None


class _Solve(torch.autograd.Function):
    """x of (I + L) x = b, with L what ``system`` (..., C, C) has below its diagonal and b (..., C, D).

    torch's own triangular solver starts threads for every one of thousands of small matrices.
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
    """(I + L)^-1, with L what (..., C, C) has below its diagonal; C a power of two, at least 8.

    Small blocks on the diagonal by forward substitution, side by side; then two and two of them make a larger one:
    the inverse of [[A, 0], [B, D]] is [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    size = 8
    blocks = system.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (..., C / 8, 8, C / 8, 8)
    lower = blocks.diagonal(dim1=-4, dim2=-2).movedim((-3, -2), (0, 1)).contiguous()  # (8, 8, ..., C / 8)
    inverse = torch.zeros_like(lower)
    for row in range(size):
        inverse[row, row] = 1
        for column in range(row):
            inverse[row].addcmul_(lower[row, column], inverse[column], value=-1)
    inverse = inverse.movedim((0, 1), (-2, -1)).contiguous()  # (..., C / 8, 8, 8)
    while size < system.shape[-1]:
        first, second = inverse[..., 0::2, :, :].contiguous(), inverse[..., 1::2, :, :].contiguous()
        blocks = system.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))[..., 1, :, :, 0, :]
        below = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()  # (..., C / 2 / size, size, size)
        corner = second @ (below @ first)
        inverse = torch.cat([F.pad(first, (0, size)), torch.cat([corner.neg_(), second], -1)], -2)
        size *= 2
    return inverse[..., 0, :, :]


def _fade(decay: Tensor) -> Tensor:
    """exp(decay) for decay <= 0, and 0 below 1e-30: denormal numbers would slow down every product they enter.

    (Above 0 lies the future, cut off later; it is clamped, lest its infinities make gradients of NaN.)
    """
    return F.threshold(decay.clamp(-70, 0).exp(), 1e-30, 0.0)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _tokens(chunks: Tensor, layout: ChunkLayout) -> Tensor:
    """(N, H, C, D) back to (T, H, D)."""
    return chunks.transpose(1, 2).flatten(0, 1)[layout.slots]
