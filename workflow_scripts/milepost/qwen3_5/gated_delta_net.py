"""Gated DeltaNet, the linear attention in three of every four layers."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as MegatronGatedDeltaNet
from megatron.core.ssm.gated_delta_net import tensor_a2a_cp2hp, tensor_a2a_hp2cp
from megatron.core.ssm.gated_delta_net.common import _build_head_perm_for_split_sections
from torch import Tensor, nn

from milepost.qwen3_5 import kernels
from milepost.qwen3_5.fusion import fused
from milepost.qwen3_5.packed import Packed


class GatedDeltaNet(MegatronGatedDeltaNet):
    """Megatron-Core's layer (parameters, shards and checkpoints) with its own forward pass for packs.

    Megatron-Core's forward pass splits every sequence separately for context parallelism, syncs with the GPU in every
    layer to check boundaries, and runs only on CUDA. ``A_log`` is always fp32: in bf16 its rounding changes how long a
    head remembers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        in_model_dtype = self.A_log
        self.A_log = nn.Parameter(in_model_dtype.detach().float())
        self.A_log.tensor_model_parallel, self.A_log.partition_dim = True, 0

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        self.gated_delta_rule = kernels.gated_delta_rule

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move or cast the module, but keep ``A_log`` in fp32."""
        exact = self.A_log.detach()
        super()._apply(fn, recurse)
        if self.A_log.dtype != torch.float32:
            self.A_log.data = exact.to(self.A_log.device)
        return self

    def forward(
        self, hidden_states: Tensor, attention_mask: None, packed_seq_params: Packed, **_: Any
    ) -> tuple[Tensor, None]:
        """(R / shards, 1, hidden) -> the same; shards: context parallel, times tensor parallel if sequence parallel."""
        projected, _ = self.in_proj(hidden_states)  # (R / cp, 1, features / tp)
        projected = self._gather_rows(projected)[:, 0]  # (R, features / tp / cp)
        qkv, gate, beta, alpha = projected.split(self.feat_dim_split, dim=-1)
        attended = self._attend(qkv, alpha, beta, packed_seq_params)  # (R, Hv, Dv)
        gate = gate.unflatten(-1, (-1, self.value_head_dim))
        normed = self.out_norm(attended, gate)
        return self.out_proj(self._scatter_rows(normed.flatten(1)[:, None]))

    def _attend(self, qkv: Tensor, alpha: Tensor, beta: Tensor, packed: Packed) -> Tensor:
        sections = [self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp]
        weight = self._own_heads(self.conv1d.weight, sections).squeeze(1)  # (channels, taps)
        qkv = kernels.causal_convolution(qkv, weight, packed)  # (T, channels)
        alpha, beta = packed.spread(alpha), packed.spread(beta)
        query, key, value = qkv.split([section // self.cp_size for section in sections], dim=-1)
        a_log, dt_bias = (self._own_heads(x, [len(x)]) for x in (self.A_log, self.dt_bias))
        log_decay, beta = _log_decay_and_beta(alpha, beta, a_log=a_log, dt_bias=dt_bias)  # (T, Hv) each
        attended = self.gated_delta_rule(
            query.unflatten(-1, (-1, self.key_head_dim)),
            key.unflatten(-1, (-1, self.key_head_dim)),
            value.unflatten(-1, (-1, self.value_head_dim)),
            log_decay,
            beta,
            packed,
        )
        return packed.collect(attended)

    def _own_heads(self, parameter: Tensor, sections: list[int]) -> Tensor:
        """This context-parallel rank's share of each section of a parameter's rows."""
        if self.cp_size == 1:
            return parameter
        rank = self.pg_collection.cp.rank()
        return torch.cat([section.chunk(self.cp_size)[rank] for section in parameter.split(sections)])

    def _gather_rows(self, projected: Tensor) -> Tensor:
        """All-to-all: every context-parallel rank receives all rows of its share of the heads."""
        if self.cp_size == 1:
            return projected
        order = _build_head_perm_for_split_sections(self.in_proj_split_sections, self.cp_size, projected.device)
        return tensor_a2a_cp2hp(
            projected.index_select(-1, order), 0, -1, self.pg_collection.cp, undo_attention_load_balancing=False
        )

    def _scatter_rows(self, attended: Tensor) -> Tensor:
        """The inverse of `_gather_rows`: this rank's rows with all heads."""
        return tensor_a2a_hp2cp(attended, 0, -1, self.pg_collection.cp, redo_attention_load_balancing=False)


@fused
def _log_decay_and_beta(alpha: Tensor, beta: Tensor, *, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The log-decay of the state, in fp32, and the strength of the update: (T, Hv) each."""
    return -a_log.exp() * F.softplus(alpha.float() + dt_bias), beta.sigmoid()
