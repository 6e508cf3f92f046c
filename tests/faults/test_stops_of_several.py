"""Several processes that torchrun started are asked to end: each ends in its own time."""

import json
import signal
import time

import psutil

import grpo_run
from checkpoints.manifest import read_manifest
from stages import launcher

SLOW_TO_END = """
import os, pathlib, signal, sys, time

folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]

def save(*_):
    time.sleep(33)  # torchrun itself would end its patience after 30
    (folder / f"saved-{rank}").touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
(folder / f"ready-{rank}").touch()
time.sleep(300)
"""


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.1)


def test_a_process_that_saves_itself_is_not_cut_off(tmp_path, environment):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_TO_END)
    processes = psutil.Popen([*launcher(2), str(script), str(tmp_path)], env=environment)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, processes)
    processes.send_signal(signal.SIGTERM)
    time.sleep(1)
    processes.send_signal(signal.SIGTERM)  # as when a Ctrl-C comes from the terminal and from Snakemake
    processes.wait(timeout=120)
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_training_of_two_processes_that_is_asked_to_end_saves_itself(root, tmp_path, environment):
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    command = [str(root / "tests" / "grpo_run.py"), *grpo_run.arguments(tmp_path, tmp_path / "run")]
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    with log.open("w") as written:
        run = psutil.Popen([*launcher(2), *command], env=environment, stdout=written, stderr=written)
        wait_for(lambda: metrics.exists() and '"loss"' in metrics.read_text(), run)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=120) != 0
    done = [json.loads(line)["rollout"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert f"stopped after {done[-1]} rollouts" in log.read_text()
    read_manifest(tmp_path / "run" / f"checkpoint-{done[-1]:06d}" / "manifest.json").require(digests=True)
