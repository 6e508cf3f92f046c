"""The whole DAG under random kills of every kind: its results equal those of an undisturbed run, bit for bit.

The same command is started again and again. Some runs are stopped as a user or a scheduler would (SIGINT to all,
SIGTERM), others as in a crash (SIGKILL of Snakemake, of a job's process, of everything at once).
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from stages import unmeasured

KILLS = 12
SECRETS = {"HF_TOKEN": "hf_nobodymayreadthis", "WANDB_API_KEY": "0123456789nobodymayreadthat"}
SETTINGS = {
    "models": ["tiny"],
    "datasets": {
        "sums-train": {"problems": {"split": "train", "seed": 0, "rows": 32}},
        "sums-evaluation": {"problems": {"split": "evaluation", "seed": 0, "rows": 4}},
    },
    "per_model": {
        "tiny": {
            "source": {"tiny": {"warm_up": {"steps": 3, "batch_size": 4}}},
            "training": {
                "prompts_per_rollout": 3,
                "samples_per_prompt": 2,
                "global_batch": 6,
                "rollouts": 6,
                "save_interval": 1,
            },
            # After so short a warm-up no response is right; the entropy bonus still gives every response a gradient.
            "algorithm": {"entropy_coefficient": 0.01},
            "validation": {"interval": 3, "samples_per_problem": 1, "max_response_tokens": 8},
            "sampling": {"max_response_tokens": 8},
            "evaluation": {"samples_per_problem": 2, "pass_at": [1, 2], "max_response_tokens": 8},
        }
    },
}


class Run:
    """The pipeline in a separate folder."""

    def __init__(self, snakefile: Path, folder: Path, targets: tuple[str, ...] = ("report", "export_tiny")) -> None:
        self.folder, self.log = folder, folder / "log"
        folder.mkdir()
        (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
        self.command = [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--cores", "2"),
            *("--directory", str(folder), "--configfile", str(folder / "settings.yaml"), "--rerun-incomplete"),
            *("--", *targets),
        ]

    def start(self) -> psutil.Popen:
        with self.log.open("ab") as log:
            return psutil.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | SECRETS,
                start_new_session=True,
                # Tests that run in the background may inherit an ignored Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def finish(self) -> None:
        assert self.start().wait(timeout=400) == 0, self.log.read_text()[-5000:]

    def outcome(self) -> dict[str, object]:
        """Everything that interruptions must not change: weights, metrics, samples, tables."""
        results = self.folder / "results"
        tiny = results / "tiny"
        (work,) = (path for path in tiny.glob("grpo/grpo/*") if path.is_dir())
        weights = {path.name: path.read_bytes() for path in sorted((tiny / "hf/grpo").glob("*.safetensors"))}
        samples = {path.name: unmeasured(path) for path in sorted(tiny.glob("eval/*/*.jsonl"))}
        assert weights and len(samples) == 2
        return {
            "weights": weights,
            "metrics": unmeasured(work / "metrics.jsonl"),
            "training samples": (work / "samples.jsonl").read_bytes(),
            "evaluation samples": {name: sorted(rows, key=json.dumps) for name, rows in samples.items()},
            "tables": (results / "tables/scores.csv").read_bytes(),
        }

    def tells(self) -> list[Path]:
        """The files, including logs and reports, that contain a secret of the environment."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS.values())]


def jobs(session: int) -> list[psutil.Process]:
    """The rule processes of a Snakemake run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        try:
            if "--job" in words and words[1:2] and words[1].endswith(".py") and os.getsid(process.pid) == session:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def strike(snakemake: psutil.Popen, draw: random.Random) -> str:
    """Kill part of a run in one of these ways."""
    running = jobs(snakemake.pid)
    way = draw.choice(["Ctrl-C", "SIGTERM", "snakemake", "everything", *(["job", "job asked"] if running else [])])
    if way.startswith("job"):
        victim = draw.choice(running)
        victim.send_signal(signal.SIGKILL if way == "job" else signal.SIGTERM)
        return f"{victim.info['cmdline'][2]}: {way}"
    if way == "Ctrl-C":
        os.killpg(snakemake.pid, signal.SIGINT)
    elif way == "SIGTERM":
        snakemake.terminate()
    elif way == "snakemake":
        snakemake.kill()  # its jobs go on
    else:
        os.killpg(snakemake.pid, signal.SIGKILL)
    return way


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_random_kills_change_no_result(snakefile, tmp_path):
    calm = Run(snakefile, tmp_path / "calm")
    calm.finish()
    expected = calm.outcome()

    draw, done, number = random.Random(20), [], 0
    storm = Run(snakefile, tmp_path / "storm-0")
    while len(done) < KILLS:
        snakemake, code = storm.start(), None
        while code is None and len(done) < KILLS:
            try:
                code = snakemake.wait(timeout=draw.choice([draw.uniform(0.2, 3), draw.uniform(3, 14)]))
            except psutil.TimeoutExpired:
                done.append(strike(snakemake, draw))
                if ": job" not in done[-1]:  # Snakemake itself was interrupted or killed
                    code = snakemake.wait(timeout=120)
        if code == 0:
            assert storm.outcome() == expected, done
            number += 1
            storm = Run(snakefile, tmp_path / f"storm-{number}")
        elif code is None:  # the last kills were of jobs: it may go on
            snakemake.wait(timeout=300)
    storm.finish()
    assert storm.outcome() == expected, done
    assert calm.tells() == storm.tells() == []
    print("\n".join(done))


@pytest.mark.slow
def test_a_training_saves_itself_when_slurm_signals_all_processes(snakefile, tmp_path):
    """Slurm sends SIGTERM to every process of a job at once, and kills what is left when the first one has ended."""
    run = Run(snakefile, tmp_path / "warned", targets=("train_tiny",))
    snakemake = run.start()

    def trained() -> bool:
        return any('"loss"' in file.read_text() for file in run.folder.glob("results/tiny/grpo/grpo/*/metrics.jsonl"))

    while not trained():
        assert snakemake.poll() is None, run.log.read_text()[-5000:]
        time.sleep(0.1)
    os.killpg(snakemake.pid, signal.SIGTERM)
    assert snakemake.wait(timeout=120) != 0
    assert jobs(snakemake.pid) == [], "Snakemake ended before its job"
    stopped = re.search(r"stopped after (\d+) rollouts", run.log.read_text())
    assert stopped and list(run.folder.glob(f"results/tiny/grpo/grpo/*/checkpoint-{int(stopped[1]):06d}"))
