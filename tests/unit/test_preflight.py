"""Preflight refuses what would fail hours later, and nothing that would have passed."""

import json
from functools import partial

import pytest

from common.errors import UserError
from common.files import write_json
from configuration.loading import load, read_yaml
from configuration.memory import GIB, disk_gib
from configuration.preflight import Machine, check_jobs, shortcomings
from configuration.provenance import Provenance
from configuration.shape import text_config


def configured(root, overrides=None):
    return load(root / "config/config.yaml", root / "config/models", overrides or {})


def node(gpu_gib: float, free_disk_gib: float = 4000) -> Machine:
    return Machine((gpu_gib,) * 8, host_memory_gib=1500, free_disk_gib=free_disk_gib, missing_packages=())


@pytest.mark.parametrize(
    ("changes", "gpu_gib", "weights"),
    [
        ({}, 80, "50.1"),
        ({}, 141, None),
        ({"gpus_per_engine": 2}, 80, None),
        ({"mem_fraction_static": 0.63}, 80, None),
        ({"mem_fraction_static": 0.63, "speculation": {}}, 80, "50.9"),  # the MTP layer's too
    ],
)
def test_an_engine_needs_room_for_its_weights(root, changes, gpu_gib, weights):
    model = configured(root, {"per_model": {"27B": {"engine": changes}}}).models["27B"]
    faults = shortcomings(model, node(gpu_gib))
    if weights is None:
        assert faults == []
        return
    (fault,) = faults
    assert fault.startswith(f"needs {weights} GiB of each GPU for the engine's weights")
    assert "engine.mem_fraction_static" in fault and "engine.gpus_per_engine" in fault and "\n" not in fault


def test_an_evaluation_alone_needs_room_for_the_engine_s_weights_alone(root):
    model = configured(root).models["27B"]
    assert any("engine.mem_fraction_static" in fault for fault in shortcomings(model, node(80)))
    assert shortcomings(model, node(80), {"evaluate"}) == []
    (fault,) = shortcomings(model, node(48), {"evaluate"})
    assert "evaluation.mem_fraction_static gives the engine 40.8 of 48" in fault


def test_a_model_of_one_s_own_is_measured_by_its_folder(root, tmp_path):
    """One that declares no architecture, as a newcomer's file does."""
    models, shape = tmp_path / "models", configured(root).models["9B"].architecture
    models.mkdir()
    write_json(tmp_path / "config.json", text_config(shape))
    settings = read_yaml(root / "config/models/9B.yaml") | {"source": {"folder": str(tmp_path)}}
    del settings["architecture"]
    write_json(models / "mine.yaml", settings)  # JSON is YAML
    load_mine = partial(load, root / "config/config.yaml", models)
    mine = load_mine({"models": ["mine"]}).models["mine"]
    assert disk_gib(mine, "train") == disk_gib(configured(root).models["9B"], "train") > 0
    assert shortcomings(mine, node(141)) == []
    assert any("GiB a GPU to train" in fault for fault in shortcomings(mine, node(20)))
    with pytest.raises(UserError, match=r"parallel\.tensor: 8 does not divide the 4 key-value groups"):
        load_mine({"models": ["mine"], "per_model": {"mine": {"parallel": {"tensor": 8}}}})


@pytest.mark.parametrize(
    ("job", "overrides"),
    [
        (("download", {"model": "9B"}), {"per_model": {"9B": {"source": {"folder": "{folder}"}}}}),
        (("dataset", {"name": "mine"}), {"datasets": {"mine": {"folder": "{folder}/..", "file": "nowhere"}}}),
    ],
)
def test_a_local_folder_that_is_not_there_is_missed_before_anything_runs(root, tmp_path, job, overrides):
    missing = tmp_path / "nowhere"
    configuration = configured(root, json.loads(json.dumps(overrides).replace("{folder}", str(missing))))
    provenance = Provenance(configuration, root / "workflow_scripts")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        check_jobs([job], configuration, provenance)
    missing.mkdir()
    check_jobs([job], configuration, provenance)


def test_a_training_that_goes_on_needs_no_disk_for_the_checkpoints_it_has(root, tmp_path, monkeypatch):
    configuration = configured(root, {"results": str(tmp_path)})
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
    work = provenance.work("4B")
    hold(work, "checkpoint-000020", 0.3)
    hold(work, ".checkpoint-000040.partial", 0.3)  # removed when the training goes on
    check_jobs(jobs, configuration, provenance)
    hold(work, "checkpoint-000060", 5)
    with pytest.raises(UserError, match="the results need about"):  # what is over makes no room for another's
        check_jobs([*jobs, ("train", {"model": "9B"})], configuration, provenance)
