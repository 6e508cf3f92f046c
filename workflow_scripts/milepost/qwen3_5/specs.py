"""Megatron-Core's layer specs of the model: which module is used where."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from milepost.qwen3_5 import kernels
from milepost.qwen3_5.architecture import Architecture, LayerKind
from milepost.qwen3_5.attention import CoreAttention, SelfAttention
from milepost.qwen3_5.experts import Experts, MoELayer
from milepost.qwen3_5.gated_delta_net import GatedDeltaNet
from milepost.qwen3_5.mtp import MtpLayer
from milepost.qwen3_5.norms import GatedRMSNorm, ZeroCenteredRMSNorm

ZeroCenteredHeadNorm = partial(ZeroCenteredRMSNorm, over_heads=True)

ATTENTION: dict[LayerKind, ModuleSpec] = {
    "full_attention": ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=ZeroCenteredHeadNorm,
            k_layernorm=ZeroCenteredHeadNorm,
        ),
    ),
    "linear_attention": ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear,
            out_norm=ModuleSpec(module=GatedRMSNorm, params={"over_heads": True}),
            out_proj=RowParallelLinear,
        ),
    ),
}


class SwiGLU(nn.Module):
    """silu(gate) * up, for an input whose first half of columns is the gate and whose second half is up."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return kernels.swiglu(gate_up)


_MLP = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU)


def layer_spec(architecture: Architecture, kind: LayerKind, dispatcher: str) -> ModuleSpec:
    """One decoder layer with the given attention; see `qwen3_5.experts.MoELayer` for ``dispatcher``."""
    if architecture.is_moe:
        shared = partial(SharedExpertMLP, submodules=_MLP)
        mlp = partial(
            MoELayer,
            submodules=MoESubmodules(experts=Experts, shared_experts=shared),
            dispatcher=dispatcher,
        )
    else:
        mlp = partial(MLP.as_mlp_submodule, submodules=_MLP)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ZeroCenteredRMSNorm,
            self_attention=ATTENTION[kind],
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ZeroCenteredRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_stock_names(architecture, kind),
        ),
    )


def _stock_names(architecture: Architecture, kind: LayerKind) -> dict[str, str]:
    """Names in distributed checkpoints, where Megatron-Core's own layers (of Transformer Engine) have others.

    These compute a norm within the projection that follows it.
    """
    projection = "linear_qkv" if kind == "full_attention" else "in_proj"
    names = {"input_layernorm.": f"self_attention.{projection}.layer_norm_"}
    return names if architecture.is_moe else names | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def decoder_spec(architecture: Architecture, layers: range, dispatcher: str) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage, and the final norm."""
    kinds = architecture.layer_kinds
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(architecture, kinds[layer], dispatcher) for layer in layers],
        layer_norm=ZeroCenteredRMSNorm,
    )


def mtp_spec(architecture: Architecture, dispatcher: str) -> ModuleSpec:
    """The multi-token-prediction layer, with full attention."""
    layer = ModuleSpec(
        module=MtpLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=ZeroCenteredRMSNorm,
            hnorm=ZeroCenteredRMSNorm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=layer_spec(architecture, "full_attention", dispatcher),
            layer_norm=ZeroCenteredRMSNorm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
