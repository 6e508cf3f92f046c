"""The folder that an SGLang server loads: SGLang 0.5.16 knows Qwen3.5 only together with its vision tower."""

import shutil
from pathlib import Path

from milepost.common.files import read_json, write_json

CONFIG = "config.json"
# A vision tower that is never given weights and never runs, as small as SGLang builds one.
VISION = {
    "deepstack_visual_indexes": [],
    "depth": 1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "in_channels": 3,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def folder_to_serve(folder: Path, logs: Path) -> Path:
    """``folder``, or for a checkpoint of the text model alone one of links below ``logs``, with another config.json.

    The names of the tensors stay: SGLang takes them with and without ``language_model``.
    """
    text = read_json(folder / CONFIG)
    if "text_config" in text:
        return folder
    family = text["model_type"].removesuffix("_text")
    architecture = "Qwen3_5Moe" if family == "qwen3_5_moe" else "Qwen3_5"
    served = logs / "model"
    shutil.rmtree(served, ignore_errors=True)
    served.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != CONFIG:
            (served / file.name).symlink_to(file.resolve())
    write_json(
        served / CONFIG,
        {
            "architectures": [f"{architecture}ForConditionalGeneration"],
            "model_type": family,
            "text_config": text,
            "tie_word_embeddings": text.get("tie_word_embeddings", False),
            "vision_config": VISION | {"model_type": family, "out_hidden_size": text["hidden_size"]},
        },
    )
    return served
