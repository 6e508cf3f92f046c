"""Trainings whose responses outlive a rollout, and replace groups: a kill in any rollout leaves no trace."""

import pytest

import grpo_run
from milepost.common.files import read_json, write_json
from milepost.grpo import run_state
from stages import unmeasured

SETTINGS = {
    "training": {"rollouts": 5, "save_interval": 1, "dynamic_sampling": True},
    "sampling": {"over_sampling": 2.0, "max_age": 2},
    "validation": {"interval": 0},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = grpo_run.prepare(tmp_path_factory.mktemp("grpo"))
    grpo_run.convert_model(folder)
    grpo_run.run(grpo_run.arguments(folder, folder / "straight", **SETTINGS))
    return folder


def state(work):
    """The run's last checkpoint, by the digests of its files; the logs' lengths depend on times."""
    newest = run_state.newest(work)
    files = read_json(newest / "manifest.json")["files"]
    parts = ("weights/__0_0.distcp", "optimizer/rank-00000.safetensors", run_state.GROUPS)
    return newest.name, [files[part]["sha256"] for part in parts], run_state.read_progress(newest).cursor


def test_a_training_that_is_killed_again_and_again_ends_in_the_same_bytes(prepared, tmp_path):
    command_line = grpo_run.arguments(prepared, tmp_path / "run", **SETTINGS)
    for grading in (4, 7):  # each time from the last checkpoint on: a few groups further
        grpo_run.run_until_killed(command_line, grading)
    grpo_run.run(command_line)
    assert state(tmp_path / "run") == state(prepared / "straight")
    assert unmeasured(tmp_path / "run/metrics.jsonl") == unmeasured(prepared / "straight/metrics.jsonl")
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (prepared / "straight/samples.jsonl").read_bytes()


def test_a_run_that_forgets_what_it_carried_ends_elsewhere(prepared, tmp_path):
    """The control of the test above: the carried groups decide what comes."""
    stopped = SETTINGS | {"training": SETTINGS["training"] | {"rollouts": 2}}
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "run", **stopped))
    checkpoint = run_state.newest(tmp_path / "run")
    (checkpoint / run_state.GROUPS).unlink()
    manifest = read_json(checkpoint / "manifest.json")
    del manifest["files"][run_state.GROUPS]
    write_json(checkpoint / "manifest.json", manifest)
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "run", **SETTINGS))
    assert state(tmp_path / "run")[1][:2] != state(prepared / "straight")[1][:2]
