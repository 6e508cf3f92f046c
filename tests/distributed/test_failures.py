"""A user's mistake ends in one line, whichever process finds it, and no process waits for another."""

import subprocess

import pytest

import grpo_run
from stages import launcher


@pytest.mark.slow
def test_an_error_in_any_process_is_one_line(root, tmp_path, environment):
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    worker = str(root / "tests" / "distributed" / "failing_worker.py")
    for failing in ("1", "0,1"):
        command_line = grpo_run.arguments(
            tmp_path, tmp_path / failing, training={"rollouts": 1}, hardware={"processes": 2}
        )
        ended = subprocess.run(
            [*launcher(2), worker, failing, *command_line], capture_output=True, text=True, env=environment, timeout=200
        )
        assert ended.returncode == 65
        said = [line for line in ended.stderr.splitlines() if "error: " in line]
        assert said in [[f"error: rank {rank}: no room"] for rank in failing.split(",")], ended.stderr[-4000:]
        # No traceback of the other's broken connection or of the launcher follows the line.
        assert "Traceback" not in ended.stderr
        assert ended.stderr.rstrip().splitlines()[-1] == said[0]
