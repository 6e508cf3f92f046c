"""The tiny model's weights and files, with the names, dtypes and layout of a Qwen3.5 repository on the Hub.

Transformers builds the text model and the vision tower, independently of this pipeline; the MTP layer, which it drops,
is added here under the Hub's names.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration, modeling_qwen3_5
from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, modeling_qwen3_5_moe

from milepost.common.files import atomic_write, write_json
from milepost.configuration.schema import TinyModel
from milepost.tiny.tokenizer import END_OF_TEXT, TURN_END, VOCABULARY, token_id, write_tokenizer

# With flash-linear-attention installed, Transformers would use its norm, which runs only on GPUs.
modeling_qwen3_5.FusedRMSNormGated = modeling_qwen3_5_moe.FusedRMSNormGated = None

FULL_ATTENTION_INTERVAL = 4  # three Gated DeltaNet layers, then one of gated attention
SHARDS = 2  # one would do, but real checkpoints have several files with an index
FLOAT32_TENSORS = (
    ".linear_attn.A_log",
    ".linear_attn.norm.weight",
)  # fp32 on the Hub, where all other tensors are bf16


def model_config(tiny: TinyModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json: every key of a real Qwen3.5, with small sizes."""
    dense = tiny.kind == "dense"
    family = "qwen3_5" if dense else "qwen3_5_moe"
    feed_forward = (
        {"intermediate_size": 2 * tiny.hidden, "mlp_only_layers": []}
        if dense
        else {
            "moe_intermediate_size": tiny.hidden // 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": tiny.hidden // 2,
        }
    )
    frequencies = tiny.head_dim // 8  # a quarter of the channels rotate, in pairs
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": tiny.dtype,
        "eos_token_id": token_id(tokenizer, END_OF_TEXT),
        "full_attention_interval": FULL_ATTENTION_INTERVAL,
        "head_dim": tiny.head_dim,
        "hidden_act": "silu",
        "hidden_size": tiny.hidden,
        "initializer_range": 0.02,
        "layer_types": [
            "linear_attention" if (layer + 1) % FULL_ATTENTION_INTERVAL else "full_attention"
            for layer in range(tiny.layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": tiny.head_dim,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": tiny.head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "model_type": f"{family}_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [len(range(axis, frequencies, 3)) for axis in range(3)],  # time, height, width in turn
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": dense,
        "use_cache": True,
        "vocab_size": VOCABULARY,
        **feed_forward,
    }
    vision = {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "model_type": family,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": tiny.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration" if dense else "Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": dense,
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_config": vision,
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
    }


def random_model(tiny: TinyModel, config: dict[str, Any]) -> PreTrainedModel:
    """Transformers' randomly initialized model for ``config`` in fp32, including the vision tower."""
    torch.manual_seed(tiny.seed)
    config = copy.deepcopy(config)  # Transformers modifies the dictionaries that it is given
    config["text_config"]["dtype"] = "bfloat16"  # it draws in this type: the same weights, however they are stored
    if tiny.kind == "dense":
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config)).float()
    else:
        model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**config)).float()
    for layer in model.model.language_model.layers:
        if hasattr(layer, "linear_attn"):
            lengthen_memory(layer.linear_attn)
    return model


@torch.no_grad()
def lengthen_memory(linear_attention: nn.Module) -> None:
    """Initialize ``dt_bias`` so that states last tens to thousands of tokens; Transformers' last less than one.

    A state decays by exp(-A softplus(a + dt_bias)) per token, with A up to 16 and a near 0 at first. As in Mamba, the
    time step softplus(dt_bias) is drawn log-uniformly between 0.001 and 0.1.
    """
    step = torch.empty_like(linear_attention.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
    linear_attention.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    linear_attention.A_log.clamp_(min=math.log(0.001))  # transformers may draw an A of 0


def hub_tensors(tiny: TinyModel, model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors with the Hub's names and, unless ``tiny`` asks for fp32, dtypes; the MTP layer is untrained."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors |= _mtp_tensors(tiny, model)
    dtype = getattr(torch, tiny.dtype)
    return {
        name: tensor.detach().to(torch.float32 if name.endswith(FLOAT32_TENSORS) else dtype).contiguous()
        for name, tensor in tensors.items()
    }


def _mtp_tensors(tiny: TinyModel, model: PreTrainedModel) -> dict[str, Tensor]:
    """A randomly initialized MTP layer: the projection of (embedding, hidden), and one layer of full attention."""
    torch.manual_seed(tiny.seed + 1)
    config, hidden = model.config.text_config, tiny.hidden
    text_model = type(model.model.language_model)
    layer = text_model(config).float().layers[FULL_ATTENTION_INTERVAL - 1]
    tensors = {
        "mtp.fc.weight": nn.init.normal_(torch.empty(hidden, 2 * hidden), std=config.initializer_range),
        "mtp.pre_fc_norm_embedding.weight": torch.zeros(hidden),
        "mtp.pre_fc_norm_hidden.weight": torch.zeros(hidden),
        "mtp.norm.weight": torch.zeros(hidden),
    }
    for name, tensor in layer.state_dict().items():
        tensors |= _unpacked_experts(f"mtp.layers.0.{name}", tensor)
    return tensors


def _unpacked_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split packed experts, which the Hub stores one by one in the MTP layer; other tensors pass unchanged."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".mlp.experts"):
        return {name: tensor}
    unpacked = {}
    for expert, weights in enumerate(tensor):  # gate_up_proj: (E, 2 * F, H); down_proj: (E, H, F)
        if last == "down_proj":
            unpacked[f"{prefix}.{expert}.down_proj.weight"] = weights
        else:
            gate, up = weights.chunk(2)
            unpacked[f"{prefix}.{expert}.gate_proj.weight"] = gate
            unpacked[f"{prefix}.{expert}.up_proj.weight"] = up
    return unpacked


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write all files of the repository into ``folder``."""
    write_side_files(folder, config, tokenizer)
    _write_shards(folder, tensors)


def write_side_files(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write all files but the weights."""
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _generation_config(tokenizer))
    write_json(folder / "preprocessor_config.json", _preprocessor_config("Qwen2VLImageProcessorFast"))
    write_json(folder / "video_preprocessor_config.json", _preprocessor_config("Qwen3VLVideoProcessor"))
    write_tokenizer(tokenizer, folder)


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors, in order, to shards of about equal size, and the index."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    files = [f"model.safetensors-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in range(SHARDS)]
    weight_map, written = {}, 0
    for name, tensor in tensors.items():
        weight_map[name] = files[written * SHARDS // total]
        written += tensor.nbytes
    for file in files:
        content = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        atomic_write(folder / file, save(content, metadata={"format": "pt"}))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end_of_text = token_id(tokenizer, END_OF_TEXT)
    return {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [token_id(tokenizer, TURN_END), end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.95,
    }


def _preprocessor_config(processor: str) -> dict[str, Any]:
    """How images or videos become patches; the pipeline only passes this file on."""
    kind = "video_processor_type" if "Video" in processor else "image_processor_type"
    return {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        kind: processor,
    }
