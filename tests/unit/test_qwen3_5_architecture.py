"""config.json files that are read correctly, and those that are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture

ROOT = Path(__file__).resolve().parents[2]

# The keys that are read from the text_config of the released dense 9B and of the 35B-A3B.
COMMON = {
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "head_dim": 256,
    "num_attention_heads": 16,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000000, "partial_rotary_factor": 0.25},
}
DENSE_9B = COMMON | {
    "model_type": "qwen3_5_text",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
MOE_35B = COMMON | {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
}
EVERY_FOURTH = [*["linear_attention"] * 3, "full_attention"] * 8


def read(text: dict) -> Architecture:
    return Architecture.from_config({"text_config": text})


def test_the_released_models_have_the_sizes_in_their_names():
    assert read(DENSE_9B).parameters() == pytest.approx(9e9, rel=0.03)
    assert read(MOE_35B).parameters() == pytest.approx(35e9, rel=0.03)
    assert read(MOE_35B).active_parameters() == pytest.approx(3e9, rel=0.2)
    assert read(DENSE_9B).active_parameters() == read(DENSE_9B).parameters()


def test_every_fourth_layer_is_full_attention():
    kinds = read(DENSE_9B).layer_kinds
    assert [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] == list(range(3, 32, 4))


def test_a_folder_is_read_and_a_missing_file_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": MOE_35B, "vision_config": {}}))
    assert Architecture.from_folder(tmp_path).is_moe
    with pytest.raises(UserError, match=r"absent.config\.json"):
        Architecture.from_folder(tmp_path / "absent")


def test_tied_embeddings_may_be_stated_beside_text_config():
    text = {key: value for key, value in DENSE_9B.items() if key != "tie_word_embeddings"}
    assert Architecture.from_config({"text_config": text, "tie_word_embeddings": True}).tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"hidden_size": None}, "hidden_size"),
        ({"layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e7}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e7}, "linear"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is inf"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_types": ["linear_attention"] * 32}, "layer_types names no full_attention"),
        ({"layer_types": EVERY_FOURTH[:31]}, "layer_types"),
        ({"layer_types": EVERY_FOURTH, "full_attention_interval": 2}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads 24"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers 2"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        read(DENSE_9B | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok 257 is more than num_experts 256"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
    ],
)
def test_what_would_be_computed_wrongly_in_a_mixture_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as refused:
        read(MOE_35B | change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("interval", [1, 2, 4, 8])
def test_layer_types_alone_say_which_layers_have_full_attention(interval):
    """Transformers uses the list, and the interval only if there is no list."""
    kinds = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(32)]
    text = {key: value for key, value in DENSE_9B.items() if key != "full_attention_interval"}
    assert read(text | {"layer_types": kinds}).layer_kinds == tuple(kinds)
    assert read(text).full_attention_interval == 4  # as in Transformers, if there is neither


@pytest.mark.parametrize("kinds", [["full_attention", "linear_attention"], ["linear_attention", "full_attention"] * 15])
def test_layer_types_that_are_not_regular_are_refused(kinds):
    text = {key: value for key, value in DENSE_9B.items() if key != "full_attention_interval"}
    irregular = [*kinds, *["linear_attention"] * (32 - len(kinds))]
    with pytest.raises(UserError, match="layer_types"):
        read(text | {"layer_types": irregular})


def test_reading_an_architecture_imports_no_torch():
    code = "import sys, milepost.qwen3_5.architecture; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "workflow_scripts"}, cwd=ROOT)
