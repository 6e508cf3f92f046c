"""An engine that loses its weights during a run gets them from all processes again, and results do not change."""

import pytest

import grpo_run
from milepost.grpo import run_state
from stages import torchrun, unmeasured


@pytest.mark.slow
def test_all_processes_send_the_weights_again_to_a_restarted_engine(root, tmp_path, environment):
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    for worker in ("grpo_run.py", "distributed/restarted_engine_worker.py"):
        work = tmp_path / worker.split("/")[-1]
        command_line = grpo_run.arguments(
            tmp_path, work, training={"rollouts": 2}, parallel={"tensor": 2}, hardware={"processes": 2}
        )
        torchrun(2, str(root / "tests" / worker), *command_line, env=environment)
    plain, restarted = tmp_path / "grpo_run.py", tmp_path / "restarted_engine_worker.py"
    assert unmeasured(restarted / "metrics.jsonl") == unmeasured(plain / "metrics.jsonl")
    assert (restarted / "samples.jsonl").read_bytes() == (plain / "samples.jsonl").read_bytes()
    saved = [run_state.newest(work) for work in (plain, restarted)]
    for rank in range(2):
        states = [(folder / f"optimizer/rank-0000{rank}.safetensors").read_bytes() for folder in saved]
        assert states[0] == states[1]
