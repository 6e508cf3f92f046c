"""Hub format -> torch_dist and back: byte for byte, with little memory, and mistakes end in one line."""

import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

import convert
import export
from milepost.checkpoints import mapping, torch_dist
from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.checkpoints.shards import untouched
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from milepost.qwen3_5.packed import pack
from precision import assert_as_precise, computing_in
from stages import assert_same_files, call, convert_arguments, download_manifest, export_arguments, flip_a_bit
from tiny_hub import DENSE, MOE, make_tiny_hub, write_weights

VARIANTS = {
    "dense": dict(kind=DENSE),
    "moe": dict(kind=MOE, shards=3),
    "moe-separate": dict(kind=MOE, fused_experts=False, fused_mtp_experts=True, shards=2),
}


@pytest.fixture
def model_in_one_process():
    """`initialize` and `finalize` around a test that builds a model itself."""
    initialize()
    yield build_model
    finalize()


def converted(monkeypatch, tmp_path, mtp_num_layers=1, **variant):
    """(download manifest, convert manifest) of a tiny model."""
    hub = tmp_path / "hub"
    make_tiny_hub(hub, **variant)
    download = download_manifest(hub, tmp_path / "download.json")
    call(monkeypatch, convert.main, convert_arguments(download, tmp_path / "torch_dist", mtp_num_layers))
    return download, tmp_path / "torch_dist.json"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mtp_num_layers", [1, 0])
def test_a_round_trip_gives_back_every_file_byte_for_byte(monkeypatch, tmp_path, variant, mtp_num_layers):
    download, weights = converted(monkeypatch, tmp_path, mtp_num_layers, **VARIANTS[variant])
    call(monkeypatch, export.main, export_arguments(download, weights, tmp_path / "hf" / "run.1"))
    assert_same_files(tmp_path / "hub", tmp_path / "hf" / "run.1")

    conversion = read_manifest(weights).require(digests=True)
    assert conversion.kind == "convert" and conversion.facts["mtp_num_layers"] == mtp_num_layers
    assert conversion.facts["dtype"] == "bfloat16" and conversion.provenance["code"] == "c"
    exported = read_manifest(tmp_path / "hf" / "run.1.json").require(digests=True)
    assert exported.kind == "export" and exported.facts["repo"] == "owner/name"
    assert set(exported.files) == set(read_manifest(download).files)


@pytest.mark.numerical
@pytest.mark.parametrize("kind", [DENSE, MOE])
@torch.no_grad()
def test_the_converted_model_computes_what_transformers_computes(tmp_path, request, kind):
    with pytest.MonkeyPatch.context() as patch:
        _, weights = converted(patch, tmp_path, kind=kind)
    model_in_one_process = request.getfixturevalue("model_in_one_process")  # a conversion creates its own groups
    ids = torch.randint(0, 280, (70,), generator=torch.Generator().manual_seed(0))

    def transformers_logits(dtype):
        options = {"dtype": dtype, "experts_implementation": "eager"}  # the faster ones don't support float64
        with computing_in(dtype):
            model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub", **options).eval()
            return model(input_ids=ids[None]).logits[0]

    def our_logits(dtype):
        with computing_in(dtype):
            model = model_in_one_process(Architecture.from_folder(tmp_path / "hub"), dtype=dtype)
        torch_dist.load(model, read_manifest(weights).root)
        input_ids, position_ids, packed = pack([ids])
        with computing_in(dtype):
            return model(input_ids, position_ids, None, packed_seq_params=packed)[0]

    reference, exact = transformers_logits(torch.float32), transformers_logits(torch.float64)
    assert_as_precise(our_logits(torch.float32), reference, exact)
    assert_as_precise(our_logits(torch.float64), reference, exact)


def test_trained_weights_are_exported_in_the_hubs_types(monkeypatch, tmp_path):
    download, weights = converted(monkeypatch, tmp_path, kind=DENSE, shards=2)
    hub, work = HubCheckpoint(tmp_path / "hub"), tmp_path / "grpo" / "fingerprint"
    architecture = Architecture.from_folder(tmp_path / "hub")
    initialize()
    model = build_model(architecture, dtype=torch.float32)  # without the MTP layer, which is copied unchanged
    torch_dist.load(model, read_manifest(weights).root)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    torch_dist.save(model, work / "checkpoint-000003" / "weights")
    finalize()
    files = [str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()]
    facts = {"weights": "checkpoint-000003/weights"}
    write_manifest(tmp_path / "grpo" / "train.json", "train", work, files, {}, facts)

    call(monkeypatch, export.main, export_arguments(download, tmp_path / "grpo" / "train.json", tmp_path / "hf"))
    exported = HubCheckpoint(tmp_path / "hf")
    passed = untouched(hub, 0)
    for name, entry in hub.entries.items():
        before, after = hub.read(name), exported.read(name)
        assert exported.entries[name] == entry
        assert after.equal(before if name in passed else (before.float() * 1.001).to(before.dtype)), name
    assert exported.read("model.language_model.layers.0.linear_attn.A_log").dtype == torch.float32


def test_a_checkpoint_in_other_types_comes_back_exactly(monkeypatch, tmp_path):
    hub = tmp_path / "hub"
    tensors = make_tiny_hub(hub, DENSE)
    # fp32 norms next to bf16 matrices, and values that bf16 can't represent.
    tensors = {
        name: value.float() * 1.0001 if "norm" in name and "visual" not in name else value
        for name, value in tensors.items()
    }
    write_weights(hub, tensors)
    download = download_manifest(hub, tmp_path / "download.json")
    call(monkeypatch, convert.main, convert_arguments(download, tmp_path / "torch_dist"))
    call(monkeypatch, export.main, export_arguments(download, tmp_path / "torch_dist.json", tmp_path / "hf"))
    assert_same_files(hub, tmp_path / "hf")


def test_a_weight_that_became_nan_is_not_exported(monkeypatch, tmp_path):
    download, _ = converted(monkeypatch, tmp_path, kind=DENSE)
    initialize()
    model = build_model(Architecture.from_folder(tmp_path / "hub"))
    mapping.from_hub(model, Architecture.from_folder(tmp_path / "hub"), HubCheckpoint(tmp_path / "hub"))
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[5, 5] = float("nan")
    torch_dist.save(model, tmp_path / "broken")
    finalize()
    write_manifest(tmp_path / "broken.json", "convert", tmp_path / "broken", [], {})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        call(monkeypatch, export.main, export_arguments(download, tmp_path / "broken.json", tmp_path / "hf"))
    finalize()
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.json").exists()


def test_a_download_with_a_flipped_bit_is_not_converted(monkeypatch, tmp_path):
    make_tiny_hub(tmp_path / "hub")
    download = download_manifest(tmp_path / "hub", tmp_path / "download.json")
    flip_a_bit(tmp_path / "hub" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: its sha256 is not"):
        call(monkeypatch, convert.main, convert_arguments(download, tmp_path / "torch_dist"))
    assert not (tmp_path / "torch_dist").exists() and not (tmp_path / "torch_dist.json").exists()


def test_a_download_is_not_taken_for_weights(monkeypatch, tmp_path):
    make_tiny_hub(tmp_path / "hub")
    download = download_manifest(tmp_path / "hub", tmp_path / "download.json")
    with pytest.raises(UserError, match="'download': give one of a conversion or a training"):
        call(monkeypatch, export.main, export_arguments(download, download, tmp_path / "hf"))


@pytest.mark.parametrize(("kind", "processes", "allowed"), [(DENSE, 2, True), (DENSE, 4, False), (MOE, 3, False)])
def test_a_number_of_processes_that_does_not_divide_the_model_is_named(tmp_path, kind, processes, allowed):
    make_tiny_hub(tmp_path, kind)
    architecture = Architecture.from_folder(tmp_path)
    if allowed:
        assert convert.layout(architecture, processes).tensor == processes
    else:
        with pytest.raises(UserError, match=f"^conversion.processes: {processes} does not divide"):
            convert.layout(architecture, processes)


def test_a_checkpoint_of_another_model_is_named(tmp_path, model_in_one_process):
    make_tiny_hub(tmp_path / "small")
    make_tiny_hub(tmp_path / "large", layers=8)
    small, large = (model_in_one_process(Architecture.from_folder(tmp_path / name)) for name in ("small", "large"))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    torch_dist.save(small, tmp_path / "weights")
    with pytest.raises(UserError, match=r"weights: has no tensor decoder\.layers\.4\."):
        torch_dist.load(large, tmp_path / "weights")
    with pytest.raises(UserError, match="not a torch_dist checkpoint"):
        torch_dist.load(small, tmp_path / "absent")


def test_a_cut_torch_dist_file_is_named(tmp_path, model_in_one_process):
    make_tiny_hub(tmp_path / "hub")
    model = model_in_one_process(Architecture.from_folder(tmp_path / "hub"))
    torch_dist.save(model, tmp_path / "weights")
    file = tmp_path / "weights" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="weights: damaged"):
        torch_dist.load(model, tmp_path / "weights")


class Evil:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_metadata_that_would_run_something_is_refused_before_it_does(tmp_path, model_in_one_process):
    make_tiny_hub(tmp_path / "hub")
    model = model_in_one_process(Architecture.from_folder(tmp_path / "hub"))
    torch_dist.save(model, tmp_path / "weights")
    evil = Evil()
    evil.folder = str(tmp_path / "was here")
    (tmp_path / "weights" / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=r"\.metadata can't be read \(it would call posix\.mkdir\)"):
        torch_dist.load(model, tmp_path / "weights")
    assert not (tmp_path / "was here").exists()


def test_a_second_save_replaces_the_first_and_leaves_nothing_beside_it(tmp_path, model_in_one_process):
    make_tiny_hub(tmp_path / "hub")
    model = model_in_one_process(Architecture.from_folder(tmp_path / "hub"))
    (tmp_path / ".weights.partial").mkdir()
    (tmp_path / ".weights.partial" / "left-over").touch()
    for value in (1.0, 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        torch_dist.save(model, tmp_path / "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch_dist.load(model, tmp_path / "weights")
    assert all(parameter.eq(2).all() for parameter in model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "weights"]
    assert not (tmp_path / "weights" / "left-over").exists()


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, model_in_one_process):
    make_tiny_hub(tmp_path / "hub")
    model = model_in_one_process(Architecture.from_folder(tmp_path / "hub"))
    torch_dist.save(model, tmp_path / "weights")
    before = {path: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            torch_dist.save(model, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in (tmp_path / "weights").iterdir()} == before


# The kernel's peak resident memory of this process; getrusage's is inherited from the parent.
MEASURE = """
import re, sys
import convert

def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = resident("VmRSS")
convert.main()
print(resident("VmHWM") - before)
"""


def test_conversion_takes_little_more_memory_than_the_weights(environment, tmp_path):
    make_tiny_hub(tmp_path / "hub", MOE, hidden=2048, layers=8, vocabulary=32768)
    download = download_manifest(tmp_path / "hub", tmp_path / "download.json")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *convert_arguments(download, tmp_path / "torch_dist")],
        env=environment,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    taken = int(done.stdout.splitlines()[-1])
    weights = sum(entry["bytes"] for entry in read_manifest(tmp_path / "torch_dist.json").files.values())
    assert weights > 250 * 2**20
    assert taken < 1.3 * weights
