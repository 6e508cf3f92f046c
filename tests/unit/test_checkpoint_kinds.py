"""Checkpoints as other tools save them: downloaded, converted, changed, exported and loaded; and those refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM

import convert
import download
import evaluate_model
import export
import grpo_run
import train
from milepost.checkpoints import torch_dist
from milepost.checkpoints.headers import INDEX
from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.checkpoints.shards import untouched
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from milepost.rollout.cpu_model import CpuModel
from precision import assert_as_precise, computing_in
from settings import section
from stages import call, convert_arguments, export_arguments, job_arguments
from tiny_hub import DENSE, MOE, make_tiny_hub, tiny_config, write_weights

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def text_only(folder: Path, kind: str) -> None:
    """As Transformers saves the text model alone: other names, one tensor an expert, no vision, no MTP layer."""
    torch.manual_seed(0)
    model_class = Qwen3_5ForCausalLM if kind == DENSE else Qwen3_5MoeForCausalLM
    model_class(tiny_config(kind).text_config).bfloat16().save_pretrained(folder)


def with_head(folder: Path, change: float = 0.0) -> None:
    """Store a tied head as a tensor of its own, equal to the embedding, or different in one value with ``change``."""
    tensors = make_tiny_hub(folder)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][100, 3] += change
    write_weights(folder, tensors, shards=2)
    (folder / "model.safetensors").unlink()


def in_dtype(folder: Path, dtype: torch.dtype) -> None:
    write_weights(folder, {name: value.to(dtype) for name, value in make_tiny_hub(folder).items()})


def without_mtp(folder: Path) -> None:
    write_weights(folder, {name: value for name, value in make_tiny_hub(folder).items() if not name.startswith("mtp.")})


def without_index(folder: Path) -> None:
    make_tiny_hub(folder, MOE, shards=3)
    (folder / INDEX).unlink()


KINDS = {
    "text-only": lambda folder: text_only(folder, DENSE),
    "text-only-moe": lambda folder: text_only(folder, MOE),
    "tied-head": with_head,
    "no-mtp": without_mtp,
    "no-index": without_index,
    "float32": lambda folder: in_dtype(folder, torch.float32),
    "float16": lambda folder: in_dtype(folder, torch.float16),
}


def fetched(monkeypatch, folder: Path, *, mtp: bool = False) -> Path:
    """The manifest that download.py writes of a local folder; ``mtp``: the settings need an MTP layer."""
    for variable in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(variable)
    manifest = folder.parent / "download.json"
    job = job_arguments({"source": {"folder": str(folder)}}, mtp=mtp)
    places = ["--name", "mine", "--folder", str(folder.parent / "hub"), "--manifest", str(manifest)]
    call(monkeypatch, download.main, [*job, *places])
    return manifest


def trained(weights: Path, folder: Path, architecture: Architecture) -> Path:
    """The manifest of a training that has made every weight larger by a thousandth."""
    initialize()
    model = build_model(architecture, dtype=torch.float32)
    torch_dist.load(model, read_manifest(weights).root)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    torch_dist.save(model, folder / "checkpoint-000001" / "weights")
    finalize()
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return write_manifest(
        folder / "train.json", "train", folder, files, {}, {"weights": "checkpoint-000001/weights"}
    ).path


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_trains_and_is_exported_as_it_came(monkeypatch, tmp_path, kind):
    KINDS[kind](tmp_path / "mine")
    source = read_manifest(fetched(monkeypatch, tmp_path / "mine"))
    hub, architecture = HubCheckpoint(source.root), Architecture.from_folder(source.root)
    call(monkeypatch, convert.main, convert_arguments(source.path, tmp_path / "torch_dist", 0))
    weights = trained(tmp_path / "torch_dist.json", tmp_path / "run", architecture)
    call(monkeypatch, export.main, export_arguments(source.path, weights, tmp_path / "hf"))

    exported, passed = HubCheckpoint(tmp_path / "hf"), untouched(hub, 0)
    assert exported.entries == hub.entries  # the same names, types, shapes and files
    for name in hub:
        before, after = hub.read(name), exported.read(name)
        assert after.equal(before if name in passed else (before.float() * 1.001).to(before.dtype)), name
    added = {INDEX} if kind == "no-index" else set()  # without which no other tool reads several files
    assert set(read_manifest(tmp_path / "hf.json").require(digests=True).files) == set(source.files) | added

    ids = list(range(1, 71))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, experts_implementation="eager", dtype=torch.float32
    )
    assert not any(info.values()), info
    reference = model(input_ids=torch.tensor([ids])).logits[0, -1]
    with computing_in(torch.float64):
        exact = model.double()(input_ids=torch.tensor([ids])).logits[0, -1]
    assert_as_precise(CpuModel(tmp_path / "hf").prefill([ids])[0][0], reference, exact)


def test_a_training_and_evaluations_of_a_fine_tune_made_elsewhere(monkeypatch, tmp_path):
    """All at once: the text model alone, in fp16, its tied head stored, no MTP layer, files without an index."""
    grpo_run.prepare(tmp_path)
    hub = tmp_path / "hub"
    original = HubCheckpoint(hub)
    tensors = {
        name.replace("language_model.", ""): original.read(name).half()
        for name in original
        if name.startswith("model.language_model.")
    }
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
    for file in (*original.headers, INDEX):
        (hub / file).unlink()
    write_weights(hub, tensors, shards=3)
    (hub / INDEX).unlink()
    (hub / "config.json").write_text(json.dumps(json.loads((hub / "config.json").read_text())["text_config"]))
    fetched(monkeypatch, hub)

    call(monkeypatch, convert.main, convert_arguments(tmp_path / "download.json", tmp_path / "torch_dist", 0))
    monkeypatch.setattr(train, "Grader", grpo_run.FixedReward)
    settings = {"training": {"rollouts": 1, "save_interval": 1}, "validation": {"interval": 0}}
    call(monkeypatch, train.main, grpo_run.arguments(tmp_path, tmp_path / "run", **settings))
    weights = tmp_path / "run.json"
    call(monkeypatch, export.main, export_arguments(tmp_path / "download.json", weights, tmp_path / "hf"))

    before, after = HubCheckpoint(hub), HubCheckpoint(tmp_path / "hf")
    assert after.entries == before.entries
    assert not after.read(HEAD).equal(before.read(HEAD)) and after.read(HEAD).equal(
        after.read("model.embed_tokens.weight")
    )
    sections = {
        "evaluation": {"samples_per_problem": 2, "max_response_tokens": 8, "pass_at": [1]},
        "engine": {"kind": "cpu"},
        "reward": {},
    }
    config = {name: section(name, **changes).model_dump(mode="json") for name, changes in sections.items()}
    for model in ("download", "hf"):
        scores = tmp_path / "eval" / f"{model}.json"
        scores.parent.mkdir(exist_ok=True)
        places = ["--model", str(tmp_path / f"{model}.json"), "--data", str(tmp_path / "evaluation.json")]
        places += ["--samples", str(scores.with_suffix(".jsonl")), "--manifest", str(scores)]
        call(monkeypatch, evaluate_model.main, [*job_arguments(config, sampler={}), *places])
        assert read_manifest(scores).require(digests=True).facts["average"] == 0


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewritten(folder: Path, change) -> None:
    """A plain checkpoint whose tensors ``change`` replaces."""
    tensors = make_tiny_hub(folder)
    change(tensors)
    write_weights(folder, tensors)


def adapter(folder: Path) -> None:
    make_tiny_hub(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def quantized(folder: Path) -> None:
    make_tiny_hub(folder)
    change_config(folder, quantization_config={"quant_method": "fp8"})


def other_family(folder: Path) -> None:
    make_tiny_hub(folder)
    change_config(folder, model_type="qwen3_next", text_config={"model_type": "qwen3_next"})


def pruned(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop("model.language_model.layers.1.linear_attn.A_log"))


def in_fp8(folder: Path) -> None:
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    rewritten(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))


def unmerged(folder: Path) -> None:
    name = "model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    rewritten(folder, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))


def in_pickles(folder: Path) -> None:
    make_tiny_hub(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def in_gguf(folder: Path) -> None:
    make_tiny_hub(folder)
    (folder / "model.safetensors").rename(folder / "model-Q8_0.gguf")


def twice(folder: Path) -> None:
    make_tiny_hub(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())


def cut(folder: Path) -> None:
    make_tiny_hub(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])


# What is wrong -> how such a checkpoint is made, and what the line says.
REFUSED = {
    "adapter": (adapter, "holds an adapter (adapter_config.json), not a model's weights: merge it into its base model"),
    "quantized": (quantized, "quantized (quantization_config: fp8 in config.json): choose one whose weights are bf16"),
    "fp8": (in_fp8, "layers.0.mlp.up_proj.weight is stored as F8_E4M3, which can't be trained: choose one whose"),
    "other-family": (other_family, "not a Qwen3.5 text model (model_type 'qwen3_next'): choose a Qwen3.5 checkpoint"),
    "pruned": (pruned, "has no tensor model.language_model.layers.1.linear_attn.A_log (1 missing), which config.json"),
    "unmerged": (
        unmerged,
        "no rule covers the tensor model.language_model.layers.0.mlp.up_proj.lora_A.weight (1 such)",
    ),
    "other-head": (
        lambda folder: with_head(folder, 0.5),
        "lm_head.weight differs from model.language_model.embed_tokens",
    ),
    "pickles": (
        in_pickles,
        "its weights are pickles only (pytorch_model.bin), which are never loaded: choose one with",
    ),
    "gguf": (in_gguf, "holds no .safetensors file but model-Q8_0.gguf: name a checkpoint in Transformers' format"),
    "twice": (twice, "is in a.safetensors and in b.safetensors, and no model.safetensors.index.json says which counts"),
    "cut": (cut, "but its header needs"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_can_t_be_used_is_refused_in_one_line(monkeypatch, tmp_path, reason):
    make, line = REFUSED[reason]
    make(tmp_path / "mine")
    with pytest.raises(UserError) as caught:
        fetched(monkeypatch, tmp_path / "mine")
    assert line in str(caught.value) and str(tmp_path / "mine") in str(caught.value)
    assert "download" not in str(caught.value)  # it is a folder of the user's own
    assert not (tmp_path / "hub").exists() and not (tmp_path / "download.json").exists()


def test_without_an_mtp_layer_the_settings_that_need_one_are_named(monkeypatch, tmp_path):
    without_mtp(tmp_path / "mine")
    with pytest.raises(UserError, match=r"mine: has no MTP layer .* set conversion: \{mtp_num_layers: 0\}, mtp: \{tra"):
        fetched(monkeypatch, tmp_path / "mine", mtp=True)
    download_manifest = fetched(monkeypatch, tmp_path / "mine")
    with pytest.raises(UserError, match="has no MTP layer"):
        call(monkeypatch, convert.main, convert_arguments(download_manifest, tmp_path / "torch_dist", 1))
    finalize()
