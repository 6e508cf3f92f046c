"""Generated checkpoints: loadable by Transformers, with the Hub's names and dtypes, the same for the same seed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open

import make_tiny
from milepost.checkpoints.manifest import Manifest, read_manifest
from milepost.common.files import read_json
from milepost.tiny.checkpoint import lengthen_memory
from stages import job_arguments

STEPS = 2


def make(folder: Path, **tiny) -> Manifest:
    """Run the script in this process, as ``results/tiny/download.json`` below ``folder``."""
    manifest = folder / "results/tiny/download.json"
    with pytest.MonkeyPatch.context() as patch:
        places = ["--name", "tiny", "--folder", str(folder / "results/hub"), "--manifest", str(manifest)]
        patch.setattr("sys.argv", ["make_tiny.py", *job_arguments({"source": {"tiny": tiny}}), *places])
        make_tiny.main()
    return read_manifest(manifest).require(digests=True)


@pytest.fixture(scope="module", params=["dense", "moe"])
def made(request, tmp_path_factory) -> Manifest:
    warm_up = {"steps": STEPS, "batch_size": 4}
    return make(tmp_path_factory.mktemp(request.param), kind=request.param, warm_up=warm_up)


def tensors_of(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Name -> tensor, read through the index."""
    weight_map = read_json(manifest.root / "model.safetensors.index.json")["weight_map"]
    tensors = {}
    for file in set(weight_map.values()):
        with safe_open(manifest.root / file, framework="pt") as shard:
            assert {name for name, holder in weight_map.items() if holder == file} == set(shard.keys())
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def test_the_manifest_lists_all_files_and_their_digest_names_the_folder(made):
    assert made.kind == "download" and set(made.files) == {file.name for file in made.root.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < set(made.files)
    assert made.facts["repo"] is None and made.root.name == f"tiny@{made.facts['commit']}"
    assert made.facts["tiny"]["warm_up"]["steps"] == STEPS
    assert [path.name for path in made.root.parent.iterdir()] == [made.root.name]  # no partial folder stays


@pytest.mark.parametrize("auto_class", [transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM])
def test_transformers_finds_every_tensor_it_wants_and_no_other(made, auto_class):
    model, info = auto_class.from_pretrained(made.root, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    logits = model(input_ids=torch.arange(70)[None]).logits
    assert logits.shape == (1, 70, 512) and logits.isfinite().all()


def test_two_tensors_of_linear_attention_are_float32_and_all_else_bfloat16(made):
    tensors = tensors_of(made)
    float32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    expected = {f"model.language_model.layers.{n}.linear_attn.{t}" for n in range(3) for t in ("A_log", "norm.weight")}
    assert float32 == expected
    assert {tensor.dtype for name, tensor in tensors.items() if name not in expected} == {torch.bfloat16}


def test_a_model_asked_for_in_float32_is_stored_unrounded(made, tmp_path):
    exact = tensors_of(make(tmp_path, **made.facts["tiny"] | {"dtype": "float32"}))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    for name, rounded in tensors_of(made).items():
        assert exact[name].to(rounded.dtype).equal(rounded), name


def test_the_parts_of_the_architecture_are_there_under_the_hub_s_names(made):
    tensors, config = tensors_of(made), read_json(made.root / "config.json")
    moe, layer = made.facts["tiny"]["kind"] == "moe", "model.language_model.layers"
    assert [kind[:4] for kind in config["text_config"]["layer_types"]] == ["line", "line", "line", "full"]
    assert f"{layer}.2.linear_attn.conv1d.weight" in tensors and f"{layer}.3.self_attn.q_norm.weight" in tensors
    assert tensors[f"{layer}.3.self_attn.q_proj.weight"].shape == (2 * 4 * 32, 128)  # each head's query and its gate
    assert any(name.startswith("model.visual.blocks.1.") for name in tensors)
    assert ("lm_head.weight" in tensors) is moe is not config["tie_word_embeddings"]
    assert tensors["mtp.fc.weight"].shape == (128, 256) and "mtp.layers.0.self_attn.k_proj.weight" in tensors
    if moe:  # packed in the trunk, one by one in the MTP layer
        assert tensors[f"{layer}.0.mlp.experts.gate_up_proj"].shape == (8, 2 * 64, 128)
        assert tensors[f"{layer}.0.mlp.experts.down_proj"].shape == (8, 128, 64)
        assert tensors["mtp.layers.0.mlp.experts.7.up_proj.weight"].shape == (64, 128)
        assert tensors["mtp.layers.0.mlp.experts.7.down_proj.weight"].shape == (128, 64)
        assert f"{layer}.0.mlp.shared_expert_gate.weight" in tensors


def test_every_state_decays_though_a_rate_of_zero_was_drawn():
    layer = SimpleNamespace(A_log=torch.tensor([-torch.inf, 2.0]), dt_bias=torch.empty(2))
    lengthen_memory(layer)
    assert layer.A_log.isfinite().all() and layer.A_log[1] == 2.0


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(made, tmp_path):
    tiny = made.facts["tiny"]
    again = make(tmp_path / "again", **tiny)
    assert again.files == made.files and again.root.name == made.root.name
    other = make(tmp_path / "other", **tiny | {"seed": 1})
    assert other.root.name != made.root.name


def test_the_warm_up_trains_the_text_model_alone(made, tmp_path):
    start = make(tmp_path, **made.facts["tiny"] | {"warm_up": {"steps": 0}})
    before, after = tensors_of(start), tensors_of(made)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("model.language_model.", "lm_head.")) for name in changed)
    assert {name for name in before if name.endswith("proj.weight")} & changed
