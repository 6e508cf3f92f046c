"""Preflight refuses runs that would fail hours later, and no others."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from milepost.common.errors import UserError
from milepost.common.files import write_json
from milepost.configuration.layers import read_yaml
from milepost.configuration.loading import load
from milepost.configuration.memory import GIB, disk_gib, host_gib
from milepost.configuration.preflight import Machine, check_jobs, hub_cache, shortcomings, table
from milepost.configuration.provenance import Provenance
from milepost.configuration.shape import text_config
from settings import DRAFTING, configured


def node(gpu_gib: float, free_disk_gib: float = 4000) -> Machine:
    return Machine((gpu_gib,) * 8, host_memory_gib=1500, free_disk_gib=free_disk_gib, missing_packages=())


@pytest.mark.parametrize(
    ("changes", "gpu_gib", "weights"),
    [
        ({}, 80, "50.1"),
        ({}, 141, None),
        ({"gpus_per_engine": 2}, 80, None),
        ({"mem_fraction_static": 0.63}, 80, None),
        ({"mem_fraction_static": 0.63, "speculation": DRAFTING}, 80, "50.9"),  # the MTP layer's too
    ],
)
def test_an_engine_needs_room_for_its_weights(changes, gpu_gib, weights):
    model = configured({"per_model": {"27B": {"engine": changes}}}).models["27B"]
    faults = shortcomings(model, node(gpu_gib))
    if weights is None:
        assert faults == []
        return
    (fault,) = faults
    assert fault.startswith(f"needs {weights} GiB of each GPU for the engine's weights")
    assert "engine.mem_fraction_static" in fault and "engine.gpus_per_engine" in fault and "\n" not in fault


def test_an_evaluation_alone_needs_room_for_the_engine_s_weights_alone():
    model = configured().models["27B"]
    assert any("engine.mem_fraction_static" in fault for fault in shortcomings(model, node(80)))
    assert shortcomings(model, node(80), {"evaluate"}) == []
    (fault,) = shortcomings(model, node(48), {"evaluate"})
    assert "evaluation.mem_fraction_static gives the engine 40.8 of 48" in fault


def test_a_model_without_an_architecture_is_measured_by_its_folder(root, tmp_path):
    """A model file without an architecture."""
    models, shape = tmp_path / "models", configured().models["9B"].architecture
    models.mkdir()
    write_json(tmp_path / "config.json", text_config(shape))
    settings = read_yaml(root / "config/models/9B.yaml") | {"source": {"folder": str(tmp_path)}}
    del settings["architecture"]
    write_json(models / "mine.yaml", settings)  # JSON is YAML
    load_mine = partial(load, root / "config/config.yaml", models)
    mine = load_mine({"models": ["mine"]}).models["mine"]
    assert disk_gib(mine, "train") == disk_gib(configured().models["9B"], "train") > 0
    assert shortcomings(mine, node(141)) == []
    assert any("GiB a GPU to train" in fault for fault in shortcomings(mine, node(20)))
    with pytest.raises(UserError, match=r"parallel\.tensor: 8 does not divide the 4 key-value groups"):
        load_mine({"models": ["mine"], "per_model": {"mine": {"parallel": {"tensor": 8}}}})


def test_a_training_that_goes_on_needs_no_disk_for_the_checkpoints_it_has(root, tmp_path, monkeypatch):
    configuration = configured({"results": str(tmp_path)})
    provenance = Provenance(configuration, root / "workflow_scripts")
    needed = disk_gib(configuration.models["4B"], "train")
    monkeypatch.setattr(Machine, "here", lambda results: node(141, free_disk_gib=needed / 2))
    jobs = [("train", {"model": "4B"})]

    def hold(work, checkpoint, share):
        file = tmp_path / "4B/grpo/grpo" / work / checkpoint / "weights/0.distcp"
        file.parent.mkdir(parents=True)
        with file.open("wb") as content:
            content.truncate(int(share * needed * GIB))  # takes no room itself

    hold("of-other-settings", "checkpoint-000020", 2)
    with pytest.raises(UserError, match=f"the results need about {needed:.0f} GiB of disk"):
        check_jobs(jobs, configuration, provenance)
    work = "the-run"
    monkeypatch.setattr(provenance, "run", lambda model: tmp_path / model / "grpo/grpo" / work)
    hold(work, "checkpoint-000020", 0.3)
    hold(work, ".checkpoint-000040.partial", 0.3)  # removed when the training continues
    check_jobs(jobs, configuration, provenance)
    hold(work, "checkpoint-000060", 5)
    with pytest.raises(UserError, match="the results need about"):  # one run's surplus makes no room for another run
        check_jobs([*jobs, ("train", {"model": "9B"})], configuration, provenance)


@pytest.mark.parametrize(("share", "fits"), [(0.89, True), (0.90, False)])
def test_an_engine_leaves_room_for_the_weights_that_it_is_sent(share, fits):
    """9B's are 8.3 GiB on each of two GPUs; with 5 GiB to send them and 1.5 of context, 126 of 141 are left."""
    model = configured({"per_model": {"9B": {"engine": {"mem_fraction_static": share}}}}).models["9B"]
    assert shortcomings(model, node(141), {"evaluate"}) == []
    faults = shortcomings(model, node(141), {"train"})
    if fits:
        assert faults == []
    else:
        (fault,) = faults
        assert re.match(r"needs about \d+ GiB a GPU to train and 142 to roll out, and the smallest has 141: ", fault)


def test_training_must_fit_the_smallest_of_the_gpus():
    model, whole = configured().models["9B"], node(141)
    assert shortcomings(model, whole, {"train"}) == []
    fault, *_ = shortcomings(model, replace(whole, gpus=(*whole.gpus[:7], 40)), {"train"})
    assert "GiB a GPU to train" in fault and "the smallest has 40" in fault


@pytest.mark.parametrize(
    ("lacking", "fault"),
    [
        ({}, None),
        ({"gpus": (141,) * 7}, "needs 8 GPUs and this machine has 7"),
        ({"gpus": ()}, "needs 8 GPUs and this machine has none"),
        ({"host_memory_gib": 191}, "needs 192 GiB of memory and there are 191"),
        ({"host_memory_gib": 192}, None),
        ({"missing_packages": ("fla",)}, "needs fla, not installed"),
        ({"has_compiler": False}, "needs a C compiler"),
        ({"has_cuda_toolkit": False}, "needs a CUDA toolkit"),
    ],
    ids=str,
)
def test_what_a_machine_lacks_is_listed(lacking, fault):
    found = shortcomings(configured().models["9B"], replace(node(141), **lacking))
    assert [text.startswith(fault) for text in found] == [True] if fault else found == []


def test_a_model_on_the_cpu_needs_nothing_of_a_gpu_machine():
    laptop = Machine((), 16, 100, ("sglang",), has_compiler=False, has_cuda_toolkit=False)
    assert shortcomings(configured().models["tiny"], laptop) == []


@pytest.mark.parametrize(
    ("stages", "bytes_each"),
    [
        (("train",), 4 * 14),
        (("download", "convert", "train", "export"), 2 + 2 + 4 * 14 + 2),
        (("convert", "evaluate"), 2),
    ],
)
def test_the_disk_that_the_jobs_take_together_must_be_free(root, tmp_path, monkeypatch, stages, bytes_each):
    """4B has 4,326,350,848 parameters with its MTP layer."""
    configuration = configured({"results": str(tmp_path)})
    provenance = Provenance(configuration, root / "workflow_scripts")
    jobs, needed = [(stage, {"model": "4B", "weights": "base"}) for stage in stages], bytes_each * 4_326_350_848 / 2**30
    monkeypatch.setattr(Machine, "here", lambda results: node(141, free_disk_gib=needed + 0.01))
    check_jobs(jobs, configuration, provenance)
    monkeypatch.setattr(Machine, "here", lambda results: node(141, free_disk_gib=needed - 0.01))
    with pytest.raises(UserError, match=f"need about {needed:.0f} GiB of disk and {needed - 0.01:.0f} are free"):
        check_jobs(jobs, configuration, provenance)


def test_the_disk_of_two_models_adds_up(root, tmp_path, monkeypatch):
    """Their checkpoints take 226 and 1425 GiB."""
    configuration = configured({"results": str(tmp_path)})
    provenance = Provenance(configuration, root / "workflow_scripts")
    monkeypatch.setattr(Machine, "here", lambda results: node(141, free_disk_gib=1500))
    four, twenty_seven = (("train", {"model": name}) for name in ("4B", "27B"))
    for job in (four, twenty_seven):
        check_jobs([job], configuration, provenance)
    with pytest.raises(UserError, match="need about 1651 GiB of disk and 1500 are free"):
        check_jobs([four, twenty_seven], configuration, provenance)


def test_the_machine_s_own_disk_and_memory_are_in_gib(tmp_path, monkeypatch):
    monkeypatch.setattr("milepost.common.files.shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 2**30))
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr("milepost.configuration.preflight.os.sysconf", pages.__getitem__)
    machine = Machine.here(str(tmp_path / "results" / "not-there-yet"))
    assert (machine.free_disk_gib, machine.host_memory_gib) == (3, 4)


def test_preflight_warn_prints_and_goes_on(root, tmp_path, monkeypatch, capsys):
    configuration = configured({"results": str(tmp_path), "preflight": "warn"})
    monkeypatch.setattr(Machine, "here", lambda results: node(141, free_disk_gib=1))
    check_jobs([("train", {"model": "4B"})], configuration, Provenance(configuration, root / "workflow_scripts"))
    assert re.fullmatch(r"warning: the results need about \d+ GiB of disk and 1 are free\n", capsys.readouterr().err)


def test_the_table_says_what_the_readme_does(root, monkeypatch):
    """Host memory, and the disk of everything: weights from the Hub, converted and exported, and four checkpoints."""
    readme = (root / "README.md").read_text()
    figures = [re.search(rf"^\| {row} \| (.+) \|$", readme, re.MULTILINE)[1].split(" | ") for row in
               ("host memory, GiB", "disk for everything, GiB")]  # fmt: skip
    monkeypatch.setattr(Machine, "here", lambda results: node(141, free_disk_gib=600))
    lines = table(configured()).splitlines()
    rows = dict(zip(("4B", "9B", "27B", "35B_A3B"), zip(*figures, strict=True), strict=True))
    for name, (memory, disk) in rows.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        ready = "ready" if int(disk) <= 600 else "lacks what is named below"
        assert re.search(rf" {memory} +{disk} +{ready}$", line), line
    assert f"27B: the results need about {rows['27B'][1]} GiB of disk and 600 are free" in lines
    assert not any(line.startswith("9B: ") for line in lines)


def test_the_table_says_whether_the_gpus_of_other_nodes_would_do(monkeypatch):
    """Even without GPUs on this machine, and with the recomputation that those nodes need."""
    monkeypatch.setattr(Machine, "here", lambda results: replace(node(141), gpus=()))
    lines = table(configured({"models": ["4B", "27B", "tiny"]})).splitlines()
    assert re.search(r"recompute +8 x 80 GB +8 x 141 GB +host", lines[2])
    four, twenty_seven, tiny = lines[3:6]
    assert re.search(r" yes, none +yes, none +128 ", four)
    assert re.search(r" no +yes, selective +448 ", twenty_seven)
    assert "yes" not in tiny and tiny.endswith("ready")
    (reason,) = [line for line in lines if line.startswith("27B: on 8 x 80 GB: ")]
    assert "needs 50.1 GiB of each GPU for the engine's weights" in reason


def test_a_gpu_of_unknown_memory_is_assumed_to_be_as_configured():
    untold = replace(node(141), gpus=(None,) * 8)
    faults = {
        gib: shortcomings(
            configured({"per_model": {"27B": {"hardware": {"gpu_memory_gib": gib}}}}).models["27B"], untold
        )
        for gib in (80, 141)
    }
    assert faults[141] == []
    assert "gives the engine 40.0 of 80" in faults[80][0]
    told = replace(untold, gpus=(None, 141.0))
    assert told.gpu_memory_gib(configured().models["27B"]) == 141


def test_a_conversion_and_an_export_need_host_memory_for_the_weights(root):
    """The estimates are at least the measured values, and little more."""
    lines = map(json.loads, (root / "benchmarks/results/conversion.jsonl").read_text().splitlines())
    measured = [(line["model"], line["value"]) for line in lines if line["name"] == "host_memory_gib"]
    models = configured().models
    assert {name for name, _ in measured} == {"4B", "27B"}
    for name, gib in measured:
        assert gib < host_gib(models[name], "convert") < 1.25 * gib
    laptop = Machine((), 40, 4000, (), is_limited=True)
    for stage in ("convert", "export"):
        (fault,) = shortcomings(models["27B"], laptop, {stage})
        assert fault == f"needs 54 GiB of memory to {stage} and there are 40, the cgroup's limit"
        assert shortcomings(models["27B"], replace(laptop, host_memory_gib=54), {stage}) == []
    (fault,) = shortcomings(models["4B"], replace(node(141), host_memory_gib=100), {"convert", "train"})
    assert fault == "needs 128 GiB of memory and there are 100"


def test_a_container_s_limit_counts_instead_of_the_machine_s_memory(monkeypatch):
    monkeypatch.setattr("milepost.configuration.cgroups.memory_limit", lambda: 2**30)
    machine = Machine.here("results")
    assert (machine.host_memory_gib, machine.is_limited) == (1, True)
    monkeypatch.setattr("milepost.configuration.cgroups.memory_limit", lambda: 2**60)
    machine = Machine.here("results")
    assert machine.host_memory_gib > 1 and not machine.is_limited


def test_the_hub_s_cache_has_a_disk_of_its_own(root, tmp_path, monkeypatch):
    """4B's weights are 8.06 GiB: once in the cache, and converted in the results."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    configuration = configured({"results": str(tmp_path)})
    jobs = [("download", {"model": "4B"}), ("convert", {"model": "4B"})]

    def check(results, cache):
        machine = replace(node(141, free_disk_gib=results), free_cache_gib=cache)
        monkeypatch.setattr(Machine, "here", lambda results: machine)
        check_jobs(jobs, configuration, Provenance(configuration, root / "workflow_scripts"))

    check(8.1, 8.1)
    check(16.2, None)
    with pytest.raises(UserError, match=r"^the results need about 16 GiB of disk and 16 are free"):
        check(16.0, None)
    with pytest.raises(UserError, match=r"^the results need about 8 GiB of disk and 8 are free"):
        check(8.0, 100)
    with pytest.raises(
        UserError, match=r"^the downloads need about 8 GiB .* 8 are free in the Hub's cache .*/home/hub"
    ):
        check(100, 8.0)
    blob = hub_cache() / "models--Qwen--Qwen3.5-4B/blobs/1f"
    blob.parent.mkdir(parents=True)
    with blob.open("wb") as file:
        file.truncate(8 * GIB)  # takes no room itself
    check(100, 0.1)
    blob.rename(f"{blob}.12345678.incomplete")  # fetched again
    with pytest.raises(UserError, match="the downloads need about 8 GiB"):
        check(100, 0.1)


def test_a_local_folder_s_weights_take_no_disk(tmp_path):
    model = configured({"per_model": {"4B": {"source": {"folder": str(tmp_path)}}}}).models["4B"]
    assert disk_gib(model, "download") == 0 < disk_gib(model, "convert")


def test_the_cache_s_disk_is_told_from_the_results_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not there yet"))
    assert Machine.here(str(tmp_path / "results")).free_cache_gib is None
    monkeypatch.setenv("HF_HOME", "/proc")  # a separate file system, without room
    assert Machine.here(str(tmp_path / "results")).free_cache_gib == 0


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"XDG_CACHE_HOME": "/cache"},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$PLACE/hf", "XDG_CACHE_HOME": "/cache"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/home"},
        {"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "/old"},
    ],
    ids=str,
)
def test_the_cache_is_where_the_client_has_it(monkeypatch, given):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given | {"PLACE": "/place"}).items():
        monkeypatch.setenv(name, value)
    asked = [sys.executable, "-c", "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"]
    said = subprocess.run(asked, env=os.environ, text=True, capture_output=True, check=True).stdout
    assert str(hub_cache()) == said.strip()


def test_more_gpus_than_a_node_has_are_refused_as_the_settings_are_read():
    with pytest.raises(
        UserError, match=r"9B: hardware\.gpus: a training takes the GPUs of one node, 8 at most, not 16"
    ):
        configured({"per_model": {"9B": {"hardware": {"gpus": 16}}}})


def test_preflight_lists_everything_that_is_missing():
    model = configured().models["27B"]
    laptop = Machine((), 16, 100, missing_packages=("sglang",), has_compiler=False, has_cuda_toolkit=False)
    assert shortcomings(model, laptop) == [
        "needs 8 GPUs and this machine has none",
        "needs 448 GiB of memory and there are 16",
        "needs sglang, not installed: run `make setup` on the GPU machine",
        "needs a C compiler, gcc or clang: install one, or name yours in the variable CC",
        "needs a CUDA toolkit (nvcc), with which SGLang builds kernels: install one, or set CUDA_HOME",
    ]
    node = Machine(gpus=(141.0,) * 8, host_memory_gib=1500, free_disk_gib=4000, missing_packages=())
    assert shortcomings(model, node) == []
    small = Machine(gpus=(24.0,) * 8, host_memory_gib=1500, free_disk_gib=4000, missing_packages=())
    advice = "lower training.max_tokens_per_gpu or engine.mem_fraction_static, or raise parallel.tensor"
    assert advice in shortcomings(model, small)[0]


def test_preflight_finds_the_cuda_toolkit_by_its_variables_or_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not Machine.here("results").has_cuda_toolkit
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch(mode=0o755)
    assert Machine.here("results").has_cuda_toolkit
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert Machine.here("results").has_cuda_toolkit


def test_preflight_refuses_or_warns(root, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs = [("train", {"model": "9B"})]

    def check(overrides=None):
        configuration = configured(overrides or ())
        check_jobs(jobs, configuration, Provenance(configuration, root / "workflow_scripts"))

    with pytest.raises(UserError, match=r"9B needs 8 GPUs .*preflight: warn. in the configuration starts it anyway"):
        check()
    check({"preflight": "warn"})
    assert capsys.readouterr().err.startswith("warning: 9B needs 8 GPUs")
