"""Attention, causal convolution, the gated delta rule and SwiGLU on packs, on CPU and on CUDA.

CUDA uses torch's flash attention and flash-linear-attention's Triton kernels. The CPU uses batched torch operations: a
tiny model's pack holds hundreds of short sequences, and a Python loop over them would cost more than the arithmetic.
Sequences of a pack never see each other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.qwen3_5.delta_rule import chunked_delta_rule
from milepost.qwen3_5.fusion import fused
from milepost.qwen3_5.packed import Bucket, Packed


def causal_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """Causal softmax attention within each sequence of a pack.

    Args:
        query: (T, Hq, D); key, value: (T, Hk, D); Hq / Hk consecutive query heads share a key head.

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
        rows = attended.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots)  # (n, H, D)
        output = rows if bucket.tokens is None else output.index_copy(0, bucket.tokens, rows)
    return output


def causal_convolution(x: Tensor, weight: Tensor, packed: Packed) -> Tensor:
    """Depthwise causal convolution along each sequence, then SiLU: rows (R, C), weight (C, K) -> tokens (T, C)."""
    if x.is_cuda:
        from fla.modules.causal_conv1d import causal_conv1d

        convolved, _ = causal_conv1d(
            x=packed.spread(x)[None],
            weight=weight,
            activation="silu",
            cu_seqlens=packed.boundaries,
            cu_seqlens_cpu=packed.host_boundaries,
        )
        return convolved[0]
    earlier = [packed.earlier_rows(back) for back in range(1, weight.shape[1])]
    return packed.spread(F.silu(_CausalConvolution.apply(x, weight, *earlier)))


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, packed: Packed
) -> Tensor:
    """The gated delta rule over each sequence from a zero state; queries and keys are scaled to unit length first.

    With S the state (Dk, Dv) of a value head, for every token in turn (Yang et al. 2024, arXiv:2412.06464):
    S <- exp(log_decay) S; S <- S + beta k (v - S^T k)^T; output = S^T q / sqrt(Dk).

    Args:
        query, key: (T, Hk, Dk); value: (T, Hv, Dv); Hv / Hk consecutive value heads share a key head.
        log_decay: (T, Hv), logarithm of the gate, at most 0, in fp32; beta: (T, Hv).

    Returns:
        (T, Hv, Dv).
    """
    if query.is_cuda:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        output, _ = chunk_gated_delta_rule(
            *(x.contiguous()[None] for x in (query, key, value)),
            g=log_decay.contiguous()[None],
            beta=beta.contiguous()[None],
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=packed.boundaries,
            cu_seqlens_cpu=packed.host_boundaries,
        )
        return output[0]
    return chunked_delta_rule(query, key, value, log_decay, beta, packed).to(value.dtype)


@fused
def swiglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up * ``scale`` (N,): (N, ..., 2 F), gate columns before up columns -> (N, ..., F)."""
    gate, up = gate_up.chunk(2, -1)
    activated = F.silu(gate) * up
    return activated if scale is None else (activated * scale[:, None]).to(gate_up.dtype)


def _pad(x: Tensor, bucket: Bucket) -> Tensor:
    """(T, H, D) -> (B, H, L, D), zero-padded at the end, where causality hides the padding."""
    rows = x if bucket.tokens is None else x[bucket.tokens]
    padded = x.new_zeros(bucket.count * bucket.length, *x.shape[1:]).index_copy(0, bucket.slots, rows)
    return padded.view(bucket.count, bucket.length, *x.shape[1:]).transpose(1, 2)


class _CausalConvolution(torch.autograd.Function):
    """The sum over k < K of weight[:, K - 1 - k] x[k tokens before], for x (R, C) and weight (C, K).

    ``earlier`` holds for each k > 0 the index (R,) of that row; index R means zeros, before the first token. Written as
    one Function, it saves no products for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *earlier: Tensor) -> Tensor:
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        output = x * weight[:, -1]
        for back, rows in enumerate(earlier, 1):
            output.addcmul_(padded.index_select(0, rows), weight[:, -1 - back])
        ctx.save_for_backward(padded, weight, *earlier)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, *earlier = ctx.saved_tensors
        of_padded, of_weight = torch.zeros_like(padded), torch.zeros_like(weight)
        torch.mul(gradient, weight[:, -1], out=of_padded[:-1])
        of_weight[:, -1] = torch.linalg.vecdot(gradient, padded[:-1], dim=0)
        for back, rows in enumerate(earlier, 1):
            of_padded.index_add_(0, rows, gradient * weight[:, -1 - back])
            of_weight[:, -1 - back] = torch.linalg.vecdot(gradient, padded.index_select(0, rows), dim=0)
        return of_padded[:-1], of_weight, *(None for _ in earlier)
