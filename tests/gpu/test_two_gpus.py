"""Training on two GPUs with SGLang engines on the same GPUs, with a killed rank and a killed server."""

import json

import pytest

import grpo_run
from gpu.sglang_arguments import ARGUMENTS
from listeners import listeners
from milepost.checkpoints.manifest import read_manifest
from stages import kill_the_second_rank, torchrun, torchrun_until

pytestmark = [pytest.mark.gpu(2), pytest.mark.slow, pytest.mark.timeout(1800)]
LAYOUTS = {
    "dense": {"parallel": {"tensor": 2}},  # two engines, each with weights from both ranks
    "moe": {"parallel": {"expert": 2}, "engine": {"gpus_per_engine": 2, "expert_parallel": 2}},
}
ENGINE = {
    "kind": "sglang",
    "mem_fraction_static": 0.3,
    "check_weights": True,
    "server_arguments": ARGUMENTS,
}
LOG_PROB_DIFF = {"dense": 0.02, "moe": 0.03}  # rounding sends some tokens to other experts


def logged(work) -> list[dict]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_two_gpus_train_and_go_on_after_a_rank_was_killed(root, tmp_path, environment, kind):
    grpo_run.prepare(tmp_path, kind, hidden=256, head_dim=64)
    grpo_run.convert_model(tmp_path)
    command_line = grpo_run.arguments(
        tmp_path,
        tmp_path / "run",
        training={"rollouts": 4, "save_interval": 1, "dtype": "bfloat16"},
        validation={"interval": 0},
        hardware={"gpus": 2},
        parallel=LAYOUTS[kind]["parallel"],
        engine=ENGINE | LAYOUTS[kind].get("engine", {}),
    )
    script = str(root / "tests" / "grpo_run.py")
    saved = (tmp_path / "run" / "checkpoint-000002").exists
    status, _ = torchrun_until(saved, kill_the_second_rank, script, *command_line, env=environment)
    assert status != 0
    assert len(logged(tmp_path / "run")) < 4
    with listeners() as seen:
        torchrun(2, script, *command_line, env=environment)
    assert seen.loopback and not seen.open, seen.open
    read_manifest(tmp_path / "run.json").require(digests=True)
    rows = logged(tmp_path / "run")
    assert [row["rollout"] for row in rows] == [1, 2, 3, 4]
    assert max(row["log_prob_diff"] for row in rows) < LOG_PROB_DIFF[kind]


def test_the_restart_of_one_server_keeps_no_memory_of_the_other_gpu(root, tmp_path, environment):
    """A bucket that only the restarted server receives must not wait for the other."""
    grpo_run.prepare(tmp_path, "dense", hidden=256, head_dim=64)
    print(torchrun(2, str(root / "tests" / "gpu" / "restart_worker.py"), str(tmp_path / "hub"), env=environment).stdout)
