"""The shape of a model, from its recipe or from the ``config.json`` in its folder."""

from dataclasses import fields
from pathlib import Path

from milepost.common.errors import UserError
from milepost.configuration.schema import Architecture as Shape
from milepost.configuration.schema import Model
from milepost.qwen3_5.architecture import Architecture

# What a recipe does not declare: the checkpoint alone decides it.
UNDECLARED = {
    "max_sequence_length",
    "norm_epsilon",
    "rotary_base",
    "rotary_percent",
    "full_attention_interval",
    "linear_conv_kernel_dim",
    "mtp_num_layers",
}


def text_config(shape: Shape) -> dict:
    """The text model's part of the ``config.json`` that a checkpoint of this shape has."""
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.ffn,
        "shared_expert_intermediate_size": shape.shared_expert_ffn,
    }
    return {
        "model_type": "qwen3_5_moe_text" if shape.experts else "qwen3_5_text",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": shape.tied_embeddings,
        "num_attention_heads": shape.attention_heads,
        "num_key_value_heads": shape.key_value_groups,
        "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.linear_key_heads,
        "linear_num_value_heads": shape.linear_value_heads,
        "linear_key_head_dim": shape.linear_head_dim,
        "linear_value_head_dim": shape.linear_head_dim,
        "full_attention_interval": 4,
        "rope_theta": 1e7,
        "mtp_num_hidden_layers": 1,
        **(experts if shape.experts else {"intermediate_size": shape.ffn}),
    }


def architecture_of(model: Model) -> Architecture | None:
    """The declared shape of a model, or else the shape in its local folder; None if neither is known."""
    if model.architecture:
        return Architecture.from_config(text_config(model.architecture))
    folder = Path(model.source.folder).expanduser() if model.source.folder else None
    return Architecture.from_folder(folder) if folder and (folder / "config.json").is_file() else None


def require_shape(folder: Path, shape: Shape) -> None:
    """Refuse (`UserError`) a checkpoint in ``folder`` whose ``config.json`` has another shape than ``shape``."""
    declared, found = Architecture.from_config(text_config(shape)), Architecture.from_folder(folder)
    for name in (field.name for field in fields(Architecture) if field.name not in UNDECLARED):
        if getattr(found, name) != getattr(declared, name):
            raise UserError(
                f"{folder / 'config.json'}: {name} is {getattr(found, name)}, and the model's architecture declares"
                f" {getattr(declared, name)}: correct the model's source, or its architecture"
            )
