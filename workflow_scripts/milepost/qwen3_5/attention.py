"""Full attention with an output gate, in every fourth layer."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from torch import Tensor, nn

from milepost.qwen3_5 import kernels
from milepost.qwen3_5.fusion import fused
from milepost.qwen3_5.packed import Packed


class SelfAttention(MegatronSelfAttention):
    """Megatron-Core's layer (parameters, shards and checkpoints) with its own forward pass for packs.

    Megatron-Core's forward pass applies rotary embeddings in a Python loop over the sequences of a pack, and needs
    Transformer Engine for context parallelism. Here context parallelism exchanges heads for tokens, as in Gated
    DeltaNet.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        rotary_pos_emb: Tensor,
        packed_seq_params: Packed,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """(R / shards, 1, hidden) -> the same; ``rotary_pos_emb`` (longest, 1, 1, rotated) holds angles."""
        query, key, value, gate = self.get_query_key_value_tensors(hidden_states, output_gate=True)
        query, key, value = (x.squeeze(1) for x in (query, key, value))  # (R / cp, heads, D)
        if self.pg_collection.cp.size() > 1:
            query, key, value = self._gather_rows(query, key, value)  # (R, heads / cp, D)
        angles = rotary_pos_emb[packed_seq_params.collect(packed_seq_params.positions), 0]  # (R, 1, rotated)
        cos, sin = angles.cos(), angles.sin()
        attended = self.core_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, packed_seq_params)
        attended = attended.flatten(1)  # (R, heads / cp * D)
        if self.pg_collection.cp.size() > 1:
            attended = all_to_all_hp2sp(attended, self.pg_collection.cp)
        return self.linear_proj(_gate(gate.flatten(2).squeeze(1), attended)[:, None])

    def _gather_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All-to-all: every context-parallel rank receives all rows of its share of the heads."""
        group = self.pg_collection.cp
        size, dim = group.size(), tensors[0].shape[-1]
        # Repeat a key head that several ranks need.
        tensors = tuple(x.repeat_interleave(max(1, size // x.shape[1]), 1) for x in tensors)
        heads = [x.shape[1] // size for x in tensors]
        # (R / cp, cp, heads of one rank, D): the data for each rank is contiguous.
        together = torch.cat([x.unflatten(1, (size, -1)) for x in tensors], 2)
        return all_to_all_sp2hp(together.flatten(1), group).unflatten(-1, (-1, dim)).split(heads, 1)


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, causal within each sequence of a pack: (R, heads, D) -> (R, heads, D)."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        query, key, value = (packed.spread(x) for x in (query, key, value))
        return packed.collect(kernels.causal_attention(query, key, value, packed))


@fused
def _gate(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) * x."""
    return (gate.float().sigmoid() * x).to(x.dtype)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to the first dimensions of every head: x (T, heads, D), cos and sin (T, 1, R <= D)."""
    turned, rest = x.float().split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1).to(x.dtype)
