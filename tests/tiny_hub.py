"""Random tiny Qwen3.5 checkpoints in the Hub's format: vision tower, MTP layer, FP32 ``A_log``, both expert layouts."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DENSE, MOE = "dense", "moe"
LAYERS, HIDDEN, EXPERTS, EXPERTS_PER_TOKEN = 4, 64, 4, 2


def tiny_config(kind: str, layers: int = LAYERS, hidden: int = HIDDEN, vocabulary: int = 288):
    """The transformers config of a tiny model: dense with tied embeddings, or a mixture of experts without."""
    from transformers.models.qwen3_5 import Qwen3_5Config
    from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig

    text = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        full_attention_interval=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1e7,
            partial_rotary_factor=0.25,
            mrope_section=[2, 1, 1],
            mrope_interleaved=True,
        ),
        tie_word_embeddings=kind == DENSE,
        mtp_num_hidden_layers=1,
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=hidden,
        patch_size=4,
        num_position_embeddings=16,
    )
    if kind == DENSE:
        text["intermediate_size"] = 2 * hidden
        return Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    text |= dict(
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
    )
    return Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def make_tiny_hub(
    folder: Path,
    kind: str = DENSE,
    *,
    fused_experts: bool = True,
    fused_mtp_experts: bool = False,
    shards: int = 1,
    seed: int = 0,
    **config,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint to ``folder``; return its tensors."""
    from transformers.models.qwen3_5 import Qwen3_5ForConditionalGeneration
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForConditionalGeneration

    configuration = tiny_config(kind, **config)
    model_class = Qwen3_5ForConditionalGeneration if kind == DENSE else Qwen3_5MoeForConditionalGeneration
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in model_class(configuration).state_dict().items()}
    if kind == DENSE:
        shapes.pop("lm_head.weight", None)
    layers, hidden = configuration.text_config.num_hidden_layers, configuration.text_config.hidden_size
    last = f"model.language_model.layers.{layers - 1}."
    shapes |= {name.replace(last, "mtp.layers.0."): shape for name, shape in shapes.items() if name.startswith(last)}
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        shapes[f"mtp.{norm}.weight"] = (hidden,)

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        spread = 0.05 if len(shape) > 1 else 0.2
        values = torch.randn(shape, generator=random) * spread
        fused = fused_mtp_experts if name.startswith("mtp.") else fused_experts
        if name.endswith("A_log"):
            tensors[name] = values + 0.5
        elif ".mlp.experts." in name and not fused:
            tensors |= _one_tensor_an_expert(name, values.bfloat16())
        else:
            tensors[name] = values.bfloat16()

    folder.mkdir(parents=True, exist_ok=True)
    configuration.architectures = [model_class.__name__]
    configuration.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 1.0}')
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    write_weights(folder, tensors, shards)
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write ``tensors`` as one file, or as ``shards`` files with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: value for number, (name, value) in enumerate(tensors.items()) if number % shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _one_tensor_an_expert(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split ``experts.gate_up_proj`` (E, 2F, H) or ``experts.down_proj`` (E, H, F) by expert and projection."""
    prefix, projection = name.rsplit(".", 1)
    parts = {}
    for expert, value in enumerate(values):
        if projection == "gate_up_proj":
            gate, up = value.chunk(2)
            parts[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
            parts[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
        else:
            parts[f"{prefix}.{expert}.down_proj.weight"] = value.clone()
    return parts
