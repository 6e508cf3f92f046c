"""The kernels' door: attention, causal convolution and the gated delta rule on packs, on CPU and on CUDA.

Callers see three functions. On CUDA they are torch's flash attention and flash-linear-attention's Triton kernels; on
CPU they are batched torch operations, because a pack of a tiny model holds hundreds of short sequences and a Python
loop over them would cost more than the arithmetic. No function lets a sequence see another one of its pack.
"""

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
        from fla.modules.convolution import causal_conv1d

        convolved, _ = causal_conv1d(
            x=x.contiguous()[None], weight=weight, activation="silu", cu_seqlens=packed.cu_seqlens_q.long()
        )
        return convolved[0]
    taps = weight.shape[1]
    convolved = x * weight[:, -1]
    for back in range(1, min(taps, len(x))):
        earlier = F.pad(x[:-back], (0, 0, back, 0)).masked_fill((packed.positions < back)[:, None], 0)
        convolved = convolved + earlier * weight[:, taps - 1 - back]
    return F.silu(convolved)


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

        groups = value.shape[1] // key.shape[1]
        output, _ = chunk_gated_delta_rule(
            query.repeat_interleave(groups, 1)[None],
            key.repeat_interleave(groups, 1)[None],
            value.contiguous()[None],
            g=decay.contiguous()[None],
            beta=beta.contiguous()[None],
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=packed.cu_seqlens_q.long(),
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

    future = torch.ones(layout.size, layout.size, dtype=torch.bool, device=query.device).triu(1)
    fade = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()  # (N, Hv, C, C)
    system = beta * per_value_head(key @ key.transpose(-1, -2)) * fade  # the solver takes its diagonal for 1
    attention = per_value_head(query @ key.transpose(-1, -2)) * fade
    wanted = value * beta
    if len(layout.counts) == 1:
        return _tokens(attention @ _solve(system, wanted), layout)

    key, query = per_value_head(key), per_value_head(query)
    solved = _solve(system, torch.cat([wanted, key * beta * decay.exp()[..., None]], -1))
    u, w = solved.split([value.shape[-1], key.shape[-1]], -1)
    key_at_end = key * (decay[..., -1:] - decay).exp()[..., None]
    return _tokens(_pass_states(attention, u, w, query * decay.exp()[..., None], key_at_end, decay, layout), layout)


def _pass_states(
    attention: Tensor, u: Tensor, w: Tensor, query: Tensor, key_at_end: Tensor, decay: Tensor, layout: ChunkLayout
) -> Tensor:
    """Run the states through the chunks of each sequence, sequences side by side; the outputs (N, Hv, C, Dv)."""
    state, outputs, start = None, [], 0
    for number, count in enumerate(layout.counts):
        here = slice(start, start + count)
        correction = u[here]
        if number == 0:
            outputs.append(attention[here] @ correction)
        else:
            state = state[:count]
            correction = correction - w[here] @ state
            outputs.append(attention[here] @ correction + query[here] @ state)
        if number + 1 < len(layout.counts):
            written = key_at_end[here].transpose(-1, -2) @ correction  # (n, Hv, Dk, Dv)
            faded = 0 if number == 0 else state * decay[here, :, -1].exp()[..., None, None]
            state = faded + written
        start += count
    return torch.cat(outputs)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _tokens(chunks: Tensor, layout: ChunkLayout) -> Tensor:
    """(N, H, C, D) back to (T, H, D)."""
    return chunks.transpose(1, 2).flatten(0, 1)[layout.slots]
