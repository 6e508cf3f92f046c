"""Several processes under torchrun are interrupted: each may take its time to end."""

import json
import signal
import time

import grpo_run
import stages
from milepost.checkpoints.manifest import read_manifest
from stages import torchrun_until

# The pipeline's torchrun, with torch's own timeout of 30 seconds reduced to 1.
HASTY = """
import sys

from torch.distributed.elastic.multiprocessing.api import PContext

from milepost.launch.torchrun import main

*others, patience = PContext.close.__defaults__
assert patience == 30, "torch has another patience than torchrun.py says"
PContext.close.__defaults__ = (*others, 1)
main(sys.argv[1:])
"""
SLOW_TO_END = """
import os, pathlib, signal, sys, time

folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]

def save(*_):
    time.sleep(4)
    (folder / f"saved-{rank}").touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
(folder / f"ready-{rank}").touch()
time.sleep(300)
"""


def test_a_process_that_saves_itself_is_not_cut_off(tmp_path, environment, monkeypatch):
    (tmp_path / "hasty.py").write_text(HASTY)
    (tmp_path / "slow.py").write_text(SLOW_TO_END)
    python, _, _, _, *options = stages.launcher(2)
    monkeypatch.setattr(stages, "launcher", lambda processes: [python, str(tmp_path / "hasty.py"), *options])

    def stop_twice(run) -> None:  # as when a Ctrl-C comes from the terminal and from Snakemake
        run.send_signal(signal.SIGTERM)
        time.sleep(1)
        run.send_signal(signal.SIGTERM)

    def ready() -> bool:
        return len(list(tmp_path.glob("ready-*"))) == 2

    torchrun_until(ready, stop_twice, str(tmp_path / "slow.py"), str(tmp_path), env=environment)
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_training_of_two_processes_of_which_the_first_fails_saves_itself(root, tmp_path, environment):
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    status, printed = torchrun_until(
        (tmp_path / "run" / "checkpoint-000003" / "manifest.json").exists,
        lambda run: None,
        str(root / "tests" / "grpo_run.py"),
        *grpo_run.arguments(tmp_path, tmp_path / "run", hardware={"processes": 2}),
        env=environment | {"FAIL_AT": "5"},  # in rollout 4
    )
    assert status != 0
    assert "stopped after 3 rollouts" in printed and "error: the grader is out of breath" in printed
    read_manifest(tmp_path / "run" / "checkpoint-000003" / "manifest.json").require(digests=True)


def test_an_interrupted_training_of_two_processes_saves_itself(root, tmp_path, environment):
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    status, printed = torchrun_until(
        lambda: metrics.exists() and '"loss"' in metrics.read_text(),
        lambda run: run.send_signal(signal.SIGTERM),
        str(root / "tests" / "grpo_run.py"),
        *grpo_run.arguments(tmp_path, tmp_path / "run", hardware={"processes": 2}),
        env=environment,
    )
    assert status != 0
    done = [json.loads(line)["rollout"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert f"stopped after {done[-1]} rollouts" in printed
    read_manifest(tmp_path / "run" / f"checkpoint-{done[-1]:06d}" / "manifest.json").require(digests=True)
