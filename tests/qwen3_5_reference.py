"""Tiny random Qwen3.5 models in transformers as a reference, and their weights under our model's names."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig, modeling_qwen3_5
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, modeling_qwen3_5_moe

from milepost.qwen3_5.architecture import Architecture
from precision import in_float64

for module in (modeling_qwen3_5, modeling_qwen3_5_moe):  # plain torch, also where flash-linear-attention is installed
    module.chunk_gated_delta_rule = module.fused_recurrent_gated_delta_rule = module.FusedRMSNormGated = None

TEXT = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
DENSE = {"intermediate_size": 512}
MOE = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}


def reference(kind: str, *, router_spread: float = 0.5, **changes) -> tuple[Architecture, nn.Module]:
    """A transformers model in fp32, every weight random (also those that start at 0 or 1), and its architecture.

    Routing is by default far from ties, so that rounding never sends a token elsewhere.
    """
    dense = kind == "dense"
    config_class, model_class = (
        (Qwen3_5TextConfig, Qwen3_5ForCausalLM) if dense else (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM)
    )
    text = TEXT | (DENSE if dense else MOE) | {"tie_word_embeddings": dense} | changes
    torch.manual_seed(0)
    model = model_class(config_class(**text)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = router_spread if "mlp.gate.weight" in name else 0.05
            parameter.add_(torch.randn_like(parameter) * spread)
    if not dense:
        model.set_experts_implementation("eager")  # the faster ones don't support float64
    model_type = "qwen3_5_text" if dense else "qwen3_5_moe_text"
    architecture = Architecture.from_config(
        {"text_config": text | {"model_type": model_type, "mtp_num_hidden_layers": 1}}
    )
    return architecture, model


def widened(model: nn.Module) -> nn.Module:
    """The same transformers model entirely in float64, including its rotary frequencies."""
    with in_float64():
        wide = type(model)(model.config)
    wide.load_state_dict(model.state_dict())
    return wide


def megatron_names(architecture: Architecture, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (or gradients) of the transformers model as unsharded parameters of ours."""
    result = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    if not architecture.tie_embeddings:
        result["output_layer.weight"] = weights["lm_head.weight"]
    for layer, kind in enumerate(architecture.layer_kinds):
        hub = {
            name.removeprefix(f"model.layers.{layer}."): w for name, w in weights.items() if f"layers.{layer}." in name
        }
        ours = {
            "input_layernorm.weight": hub["input_layernorm.weight"],
            "pre_mlp_layernorm.weight": hub["post_attention_layernorm.weight"],
        }
        ours |= _full_attention(architecture, hub) if kind == "full_attention" else _linear_attention(hub)
        ours |= _experts(hub) if architecture.is_moe else _mlp(hub, "mlp.", "mlp.")
        result |= {f"decoder.layers.{layer}.{name}": weight for name, weight in ours.items()}
    return result


def _full_attention(architecture: Architecture, hub: dict[str, Tensor]) -> dict[str, Tensor]:
    groups, dim, hidden = architecture.num_query_groups, architecture.head_dim, architecture.hidden_size
    heads = architecture.num_attention_heads // groups
    query_and_gate = hub["self_attn.q_proj.weight"].view(groups, heads, 2, dim, hidden).transpose(1, 2)
    key, value = (hub[f"self_attn.{x}_proj.weight"].view(groups, dim, hidden) for x in "kv")
    return {
        "self_attention.linear_qkv.weight": torch.cat(
            [query_and_gate.reshape(groups, -1, hidden), key, value], 1
        ).flatten(0, 1),
        "self_attention.linear_proj.weight": hub["self_attn.o_proj.weight"],
        "self_attention.q_layernorm.weight": hub["self_attn.q_norm.weight"],
        "self_attention.k_layernorm.weight": hub["self_attn.k_norm.weight"],
    }


def _linear_attention(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    projections = [hub[f"linear_attn.in_proj_{x}.weight"] for x in ("qkv", "z", "b", "a")]
    return {
        "self_attention.in_proj.weight": torch.cat(projections),
        "self_attention.conv1d.weight": hub["linear_attn.conv1d.weight"],
        "self_attention.A_log": hub["linear_attn.A_log"],
        "self_attention.dt_bias": hub["linear_attn.dt_bias"],
        "self_attention.out_norm.weight": hub["linear_attn.norm.weight"],
        "self_attention.out_proj.weight": hub["linear_attn.out_proj.weight"],
    }


def _mlp(hub: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}linear_fc1.weight": torch.cat([hub[f"{theirs}gate_proj.weight"], hub[f"{theirs}up_proj.weight"]]),
        f"{ours}linear_fc2.weight": hub[f"{theirs}down_proj.weight"],
    }


def _experts(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "mlp.router.weight": hub["mlp.gate.weight"],
        "mlp.experts.linear_fc1.weight": hub["mlp.experts.gate_up_proj"],
        "mlp.experts.linear_fc2.weight": hub["mlp.experts.down_proj"],
        "mlp.shared_experts.gate_weight": hub["mlp.shared_expert_gate.weight"],
    } | _mlp(hub, "mlp.shared_expert.", "mlp.shared_experts.")


def mtp_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The MTP layer: its transformer layer is a copy of decoder layer 3, the rest random."""
    prefix = "decoder.layers.3."
    layer = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    hidden = weights["decoder.final_layernorm.weight"].shape[0]
    torch.manual_seed(3)
    own = {f"{norm}.weight": torch.randn(hidden) * 0.1 for norm in ("enorm", "hnorm", "final_layernorm")}
    own["eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.05
    own |= {f"mtp_model_layer.{name}": weight.detach().clone() for name, weight in layer.items()}
    return {f"mtp.layers.0.{name}": weight for name, weight in own.items()}


class Places(NamedTuple):
    """A rank's (number, group size) in each of its parallel groups."""

    tensor: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)
    expert_tensor: tuple[int, int] = (0, 1)


def shard(name: str, whole: Tensor, architecture: Architecture, places: Places) -> Tensor:
    """A rank's shard of a whole parameter (or its gradient)."""
    if ".experts." in name:
        mine = _cut(whole, 0, places.expert)
        parts, axis = (mine.chunk(2, 1), 1) if name.endswith("fc1.weight") else ((mine,), 2)
        return torch.cat([_cut(part, axis, places.expert_tensor) for part in parts], axis)
    parts = _components(name, whole, architecture)
    if parts is None:
        return whole
    axis = 1 if name.endswith(ROW_PARALLEL) else 0
    return torch.cat([_cut(part, axis, places.tensor) for part in parts], axis)


def _cut(whole: Tensor, axis: int, place: tuple[int, int]) -> Tensor:
    return whole.chunk(place[1], axis)[place[0]]


ROW_PARALLEL = ("linear_proj.weight", "out_proj.weight", "linear_fc2.weight")
COLUMN_PARALLEL = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "eh_proj.weight")


def _components(name: str, whole: Tensor, architecture: Architecture) -> tuple[Tensor, ...] | None:
    """The parts of a parameter that tensor-parallel ranks split separately; None for a replicated parameter."""
    key = architecture.linear_num_key_heads * architecture.linear_key_head_dim
    value = architecture.linear_num_value_heads * architecture.linear_value_head_dim
    heads = architecture.linear_num_value_heads
    if name.endswith(".in_proj.weight"):
        return whole.split([key, key, value, value, heads, heads])
    if name.endswith("conv1d.weight"):
        return whole.split([key, key, value])
    if name.endswith("linear_fc1.weight"):
        return whole.chunk(2)
    if name.endswith((*ROW_PARALLEL, *COLUMN_PARALLEL, "A_log", "dt_bias")):
        return (whole,)
    return None


def load(
    model: nn.Module,
    whole: dict[str, Tensor],
    architecture: Architecture,
    places: Places | None = None,
    first_layer: int = 0,
) -> None:
    """Set this rank's parameters from ``whole``, which has the names of an unsharded model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = shard(name, whole[whole_name(name, first_layer)], architecture, places or Places())
            assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
            parameter.copy_(value)


def whole_name(name: str, first_layer: int) -> str:
    """The name in an unsharded model: a pipeline stage counts its own layers from 0."""
    return re.sub(r"decoder\.layers\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) + first_layer}", name)
