"""Which jobs share a node: on this one, of jobs with GPUs one at a time; through Slurm each training has its own.

Commands that take Slurm's place write down what Snakemake asks of it.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

MODELS = ("4B", "9B", "27B", "35B_A3B")
SBATCH = """#!/bin/sh
case "$*" in *--version*) echo "slurm 23.02"; exit;; esac
echo "$@" >> "$SUBMITTED"
echo $$
"""


@pytest.fixture
def downloaded(tmp_path):
    """A working folder in which every model waits for its training alone."""
    paths = [f"results/{model}/{name}.json" for name in ("download", "convert") for model in MODELS]
    for number, path in enumerate([*paths, "results/data/dapo-math-17k.json", "results/data/aime-2024.json"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (number + 1, number + 1))  # what follows from something is younger
    return tmp_path


@pytest.fixture
def slurm(tmp_path):
    """An environment with Slurm's commands; the second result is where sbatch's arguments land, a line a job."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "sacct", "sinfo", "scontrol", "scancel"):
        (commands / name).write_text(SBATCH if name == "sbatch" else "#!/bin/sh\n")
        (commands / name).chmod(0o755)
    submitted = tmp_path / "submitted"
    return os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "SUBMITTED": str(submitted)}, submitted


@pytest.fixture
def begin(root, downloaded):
    """Start Snakemake, wait until ``enough`` is true of what it has said, then end it at once."""

    def call(enough, *arguments, environment=os.environ):
        where = ("--snakefile", str(root / "Snakefile"), "--directory", str(downloaded), "--rerun-triggers", "mtime")
        log = downloaded / "log"
        with log.open("w") as written:
            run = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *where, *arguments],
                cwd=root,
                env=environment,
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        try:
            until = time.monotonic() + 120
            while not enough(log.read_text()):
                assert time.monotonic() < until and run.poll() is None, log.read_text()
                time.sleep(0.2)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        return log.read_text()

    return call


def test_two_jobs_with_gpus_never_run_at_once_on_a_node(begin):
    said = begin(
        lambda said: re.search(r"^Execute \d+ jobs", said, flags=re.MULTILINE),
        *("--cores", "256", "--config", "preflight=warn", "per_model={4B: {hardware: {gpus: 4}}}"),
        *("--allowed-rules", "evaluate", "--", *(f"results/{model}/eval/aime-2024/base.json" for model in MODELS)),
    )
    assert re.findall(r"^Execute (\d+) jobs", said, flags=re.MULTILINE) == ["1"]


def test_every_training_is_sent_to_a_node_of_its_own(begin, root, slurm):
    environment, submitted = slurm
    begin(
        lambda _: submitted.exists() and submitted.read_text().count("\n") == len(MODELS),
        *("--workflow-profile", str(root / "profiles" / "slurm"), "--config", "preflight=warn"),
        *("--allowed-rules", "train", "train_all", "--", "train_all"),
        environment=environment,
    )
    jobs = submitted.read_text().splitlines()
    assert {model for model in MODELS for job in jobs if f"rule_train_wildcards_{model} " in job} == set(MODELS)
    for job in jobs:
        # Whatever fails there is sent anew, not begun again in what may be the last of its time.
        assert "--retries 0" in job
        asked = job.split("--wrap")[0].split()
        # One task with all of its node's cores: more tasks, one a GPU say, would ask for so many times the cores.
        assert {"--nodes=1", "--gpus=8", "--cpus-per-task=64", "--exclusive", "--signal=TERM@1800"} <= set(asked)
        assert not any(word.startswith("--ntasks") for word in asked)


def test_a_training_that_no_node_of_its_partition_can_hold_is_not_sent(root, downloaded, slurm):
    environment, submitted = slurm
    (downloaded / "bin/sinfo").write_text("#!/bin/sh\necho 'main*|gpu:h100:4|2063937|128'\n")
    where = ("--snakefile", str(root / "Snakefile"), "--directory", str(downloaded), "--rerun-triggers", "mtime")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", *where, "--workflow-profile", str(root / "profiles" / "slurm")),
            *("--allowed-rules", "train", "train_9B", "--", "train_9B"),
        ],
        env=environment,
        cwd=root,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1
    assert "error: 9B asks for 8 GPUs (hardware.gpus), and the nodes of Slurm's partition main have at most 4" in (
        done.stdout + done.stderr
    )
    assert not submitted.exists()


def test_a_failed_job_is_tried_again(root, tmp_path, environment):
    where = ("--snakefile", str(root / "Snakefile"), "--directory", str(tmp_path), "--cores", "1")
    (tmp_path / "damaged.jsonl").write_text("no JSON")
    broken = f"datasets={{broken: {{folder: {tmp_path}, file: damaged.jsonl}}}}"
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *where, "--config", broken, "--", "results/data/broken.json"],
        env=environment,
        cwd=root,
        text=True,
        capture_output=True,
    )
    assert done.returncode != 0
    assert done.stderr.count("Job 0: broken") == 3, done.stderr
