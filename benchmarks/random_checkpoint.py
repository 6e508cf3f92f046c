"""Write a checkpoint of a model's full size with random weights, for machines without the real ones.

It has all parts of a Qwen3.5 repository on the Hub: configuration, a (small) tokenizer, vision tower, MTP layer.
Use it in the pipeline with ``source: {folder: ...}``.

    PYTHONPATH=workflow_scripts python benchmarks/random_checkpoint.py 4B results/random/4B [--shard-gib 4]
"""

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from milepost.common.files import write_json
from milepost.configuration.layers import read_yaml
from milepost.configuration.schema import Architecture, TinyModel
from milepost.configuration.shape import text_config
from milepost.tiny.checkpoint import FLOAT32_TENSORS, FULL_ATTENTION_INTERVAL, model_config, write_side_files
from milepost.tiny.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "num_position_embeddings": 2304}
INTO_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")
EMBEDDING = "model.language_model.embed_tokens.weight"
FINAL_NORM = "model.language_model.norm.weight"
SAFETENSORS_DTYPE = {torch.bfloat16: "BF16", torch.float32: "F32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of config/models/, e.g. 4B")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-gib", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = read_yaml(ROOT / "config" / "models" / f"{arguments.model}.yaml")
    shape = Architecture.model_validate(settings["architecture"])
    write_checkpoint(arguments.folder, shape, int(arguments.shard_gib * 2**30), arguments.seed)


def write_checkpoint(folder: Path, shape: Architecture, shard_bytes: int, seed: int) -> None:
    """Write a complete repository of a model of this shape."""
    tokenizer = train_tokenizer()
    config = true_config(shape, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    write_side_files(folder, config, tokenizer)
    write_weights(folder, config, shard_bytes, seed)


def true_config(shape: Architecture, tokenizer: Any) -> dict[str, Any]:
    """``config.json`` of a model of this shape; keys that the shape does not determine are as in tiny models."""
    config = model_config(TinyModel(kind="moe" if shape.experts else "dense", head_dim=shape.head_dim), tokenizer)
    text = text_config(shape)
    kinds = [
        "full_attention" if (n + 1) % FULL_ATTENTION_INTERVAL == 0 else "linear_attention" for n in range(shape.layers)
    ]
    config["text_config"] |= text | {"layer_types": kinds}
    config["vision_config"] |= VISION | {"out_hidden_size": shape.hidden}
    config["tie_word_embeddings"] = shape.tied_embeddings
    return config


def tensor_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name -> shape of every tensor of the Hub's checkpoint: transformers' model, and the MTP layer that it lacks."""
    moe = config["model_type"] == "qwen3_5_moe"
    config_class, model_class = (
        (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)
        if moe
        else (Qwen3_5Config, Qwen3_5ForConditionalGeneration)
    )
    with torch.device("meta"):
        model = model_class(config_class(**copy.deepcopy(config)))  # transformers modifies its argument
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    text = config["text_config"]
    hidden, full = text["hidden_size"], f"model.language_model.layers.{FULL_ATTENTION_INTERVAL - 1}."
    for name in [name for name in shapes if name.startswith(full)]:
        shapes |= _one_by_one(name.replace(full, "mtp.layers.0."), shapes[name])
    shapes["mtp.fc.weight"] = torch.Size((hidden, 2 * hidden))
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        shapes[f"mtp.{norm}.weight"] = torch.Size((hidden,))
    return shapes


def _one_by_one(name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """Split packed experts, which the Hub stores one by one in the MTP layer."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".mlp.experts"):
        return {name: shape}
    names = ("down_proj",) if last == "down_proj" else ("gate_proj", "up_proj")
    one = torch.Size((shape[1] // len(names), shape[2]))
    return {f"{prefix}.{expert}.{part}.weight": one for expert in range(shape[0]) for part in names}


def write_weights(folder: Path, config: dict[str, Any], shard_bytes: int, seed: int) -> None:
    """Draw the tensors one by one, each straight into its shard."""
    shapes = tensor_shapes(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = shape.numel() * _dtype(name).itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map, total = {}, 0
    with tqdm(
        total=sum(shape.numel() * _dtype(name).itemsize for name, shape in shapes.items()),
        unit="B",
        unit_scale=True,
        mininterval=1,
    ) as bar:
        for number, names in enumerate(shards):
            file = f"model.safetensors-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                start, end = end, end + shapes[name].numel() * _dtype(name).itemsize
                header[name] = {
                    "dtype": SAFETENSORS_DTYPE[_dtype(name)],
                    "shape": list(shapes[name]),
                    "data_offsets": [start, end],
                }
            content = json.dumps(header).encode()
            content += b" " * (-len(content) % 8)
            with (folder / file).open("wb") as stream:
                stream.write(len(content).to_bytes(8, "little") + content)
                for name in names:
                    values = _draw(name, shapes[name], config, generator).cpu().view(-1).view(torch.uint8)
                    stream.write(memoryview(values.numpy()))
                    bar.update(len(values))
            weight_map |= dict.fromkeys(names, file)
            total += end
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.endswith(FLOAT32_TENSORS) else torch.bfloat16


def _draw(name: str, shape: torch.Size, config: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Draw values like a trained model's start: long-lived states, norms of one, matrices that preserve row norms.

    Projections into the residual stream are scaled down by sqrt(2 x layers) (Radford et al. 2019, GPT-2), and
    embeddings have size 1, so that each layer adds a little. Otherwise bf16 rounding would route tokens to other
    experts, more in every layer, until no two programs agree on the logits. With tied embeddings the last layer adds a
    lot, or every token would predict itself.
    """
    device, text, tied = generator.device, config["text_config"], config["tie_word_embeddings"]
    if name.endswith("A_log"):
        values = torch.empty(shape, device=device).uniform_(1, 16, generator=generator).log()
    elif name.endswith("dt_bias"):
        step = torch.empty(shape, device=device).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
        values = step + torch.log(-torch.expm1(-step))
    elif name.endswith("linear_attn.norm.weight") or ("visual" in name and "norm" in name and name.endswith("weight")):
        values = torch.ones(shape, device=device)
    elif name == FINAL_NORM and tied:  # the norm scales by 1 + weight, so logits have a spread of 1
        values = torch.full(shape, shape[0] ** -0.5 - 1, device=device)
    elif len(shape) == 1:
        values = torch.zeros(shape, device=device)
    else:
        layers, spread = text["num_hidden_layers"], text["hidden_size"] ** -0.5
        if name == EMBEDDING:
            spread = 1.0
        elif tied and name.endswith(f"layers.{layers - 1}.mlp.down_proj.weight"):
            spread = 30 * text["intermediate_size"] ** -0.5
        elif name.endswith(INTO_RESIDUAL):
            spread /= math.sqrt(2 * layers)
        values = torch.empty(shape, dtype=_dtype(name), device=device).normal_(std=spread, generator=generator)
    return values.to(_dtype(name))


if __name__ == "__main__":
    main()
