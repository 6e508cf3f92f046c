"""Sharing nodes: on this machine each GPU job has its own GPUs; under Slurm each training has its own node.

Stand-ins for Slurm's commands record their arguments.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from clones import clone

MODELS = ("4B", "9B", "27B", "35B_A3B")
SBATCH = """#!/bin/sh
case "$*" in *--version*) echo "slurm 23.02"; exit;; esac
echo "$@" >> "$SUBMITTED"
echo $$
"""
SBATCH_THAT_RUNS = """#!/bin/sh
case "$*" in *--version*) echo "slurm 23.02"; exit;; esac
echo "$@" >> "$SUBMITTED"
for wrapped; do :; done
sh -c "${wrapped#--wrap=}" >/dev/null 2>&1 && state=COMPLETED || state=FAILED
echo "$$|$state" >> "$SUBMITTED.states"
echo $$
"""
SACCT = """#!/bin/sh
cat "$SUBMITTED.states"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def downloaded(tmp_path):
    """A working folder in which only the trainings of all models are left to do."""
    paths = [f"results/{model}/{name}.json" for name in ("download", "convert") for model in MODELS]
    for number, path in enumerate([*paths, "results/data/dapo-math-17k.json", "results/data/aime-2024.json"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (number + 1, number + 1))  # outputs are newer than their inputs
    return tmp_path


@pytest.fixture
def slurm(tmp_path):
    """An environment with Slurm's commands, and the file of sbatch's arguments, one line per job."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "sacct", "sinfo", "scontrol", "scancel"):
        (commands / name).write_text(SBATCH if name == "sbatch" else "#!/bin/sh\n")
        (commands / name).chmod(0o755)
    submitted = tmp_path / "submitted"
    return os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "SUBMITTED": str(submitted)}, submitted


@pytest.fixture
def begin(snakefile, downloaded):
    """Start Snakemake, wait until ``enough`` is true of what it has said, then end it at once."""

    def call(enough, *arguments, environment=os.environ):
        where = ("--snakefile", str(snakefile), "--directory", str(downloaded), "--rerun-triggers", "mtime")
        log = downloaded / "log"
        with log.open("w") as written:
            run = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *where, *arguments],
                cwd=snakefile.parent,
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


@pytest.mark.parametrize("flags", [(), ("--resources", "mem_mb=100000000"), ("--workflow-profile", "none")])
def test_jobs_that_need_all_gpus_never_start_at_once(begin, flags):
    said = begin(
        lambda said: re.search(r"^Execute \d+ jobs", said, flags=re.MULTILINE),
        *("--cores", "256", *flags, "--config", "preflight=warn", "per_model={4B: {hardware: {gpus: 4}}}"),
        *("--allowed-rules", "evaluate", "--", *(f"results/{model}/eval/aime-2024/base.json" for model in MODELS)),
    )
    assert re.findall(r"^Execute (\d+) jobs", said, flags=re.MULTILINE) == ["1"]


SETS = ("aime-2024", "dapo-math-17k", "sums-train", "sums-evaluation")
NVIDIA_SMI = """#!/bin/sh
for gpu in GPU-aaaa GPU-bbbb; do echo "$gpu, 81559, [N/A]"; done
"""
RECORDER = """
import json, os, sys, time
manifest = sys.argv[sys.argv.index("--manifest") + 1]
began = time.time()
time.sleep(float(os.environ.get("SECONDS_OF_A_JOB", 1)))
with open(manifest, "w") as file:
    json.dump({"gpus": os.environ["CUDA_VISIBLE_DEVICES"].split(","), "began": began, "ended": time.time()}, file)
"""


@pytest.fixture
def spans(tmp_path):
    """Evaluate tiny_gpu on four data sets with two GPUs and a script that only records which GPUs it had, and when."""
    workflow = clone(tmp_path / "workflow")
    (workflow / "workflow_scripts/evaluate_model.py").write_text(RECORDER)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    for path in ("tiny_gpu/download.json", *(f"data/{name}.json" for name in SETS)):
        (workflow / "results" / path).parent.mkdir(parents=True, exist_ok=True)
        (workflow / "results" / path).touch()

    def run(*flags, gpus=1, **variables):
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}"} | variables
        given = f"per_model={{tiny_gpu: {{hardware: {{gpus: {gpus}, host_memory_gib: 1, cores: 1}}}}}}"
        targets = [f"results/tiny_gpu/eval/{name}/base.json" for name in SETS]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "snakemake", "--cores", "16", "--rerun-triggers", "mtime"),
                *(*flags, "--config", "preflight=warn", given, "--allowed-rules", "evaluate", "--", *targets),
            ],
            cwd=workflow,
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((workflow / target).read_text()) for target in targets]

    return run


def overlaps(spans):
    """The GPUs of each two jobs that ran at the same time."""
    return [
        (one["gpus"], other["gpus"])
        for one, other in itertools.combinations(spans, 2)
        if one["began"] < other["ended"] and other["began"] < one["ended"]
    ]


def test_jobs_with_one_gpu_run_side_by_side_each_on_its_own(spans):
    found = overlaps(spans("--resources", "mem_mb=100000000", SECONDS_OF_A_JOB="10"))
    assert found and all(sorted(one + other) == ["0", "1"] for one, other in found)


def test_the_visible_gpus_limit_the_choice(spans):
    found = spans(CUDA_VISIBLE_DEVICES="GPU-b")
    assert {tuple(job["gpus"]) for job in found} == {("GPU-b",)} and not overlaps(found)


def test_no_gpu_is_shared_even_if_snakemake_is_given_more(spans):
    found = spans("--resources", "gpu=64", "gpu_host_gib=1000", gpus=2)
    assert all(job["gpus"] == ["0", "1"] for job in found) and not overlaps(found)


def test_every_training_is_submitted_to_a_node_of_its_own(begin, root, slurm):
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
        # A failed job is submitted again, not restarted in what may be the last of its time.
        assert "--retries 0" in job
        asked = job.split("--wrap")[0].split()
        # One task with all of its node's cores: with more tasks, such as one per GPU, each would request these cores.
        assert {"--nodes=1", "--gpus=8", "--cpus-per-task=64", "--exclusive", "--signal=TERM@1800"} <= set(asked)
        assert not any(word.startswith("--ntasks") for word in asked)


def test_a_training_that_fits_no_node_of_its_partition_is_not_submitted(snakefile, root, downloaded, slurm):
    environment, submitted = slurm
    (downloaded / "bin/sinfo").write_text("#!/bin/sh\necho 'main*|gpu:h100:4|2063937|128'\n")
    where = ("--snakefile", str(snakefile), "--directory", str(downloaded), "--rerun-triggers", "mtime")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", *where, "--workflow-profile", str(root / "profiles" / "slurm")),
            *("--allowed-rules", "train", "train_9B", "--", "train_9B"),
        ],
        env=environment,
        cwd=snakefile.parent,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1
    assert "error: 9B asks for 8 GPUs (hardware.gpus), and the nodes of Slurm's partition main have at most 4" in (
        done.stdout + done.stderr
    )
    assert not submitted.exists()


@pytest.fixture
def fetch_through_slurm(snakemake, snakefile, root, tmp_path, slurm):
    """Fetch a problem set without a network in a job that the given ``sbatch`` sends; the run and how often it sent."""
    environment, submitted = slurm

    def call(sbatch):
        for name, content in {"sbatch": sbatch, "srun": SRUN, "sacct": SACCT}.items():
            (tmp_path / "bin" / name).write_text(content)
            (tmp_path / "bin" / name).chmod(0o755)
        done = snakemake(
            *("--workflow-profile", str(root / "profiles" / "slurm"), "--retries", "2"),
            *("--slurm-no-account", "--slurm-status-command", "sacct"),
            *("--slurm-init-seconds-before-status-checks", "1", "--", "results/data/aime-2024.json"),
            cwd=tmp_path,
            snakefile=snakefile,
            **environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        )
        return done, submitted.read_text().count("\n")

    return call


def test_a_mistake_found_by_a_slurm_job_is_printed_last_and_not_retried(fetch_through_slurm, tmp_path):
    done, sent = fetch_through_slurm(SBATCH_THAT_RUNS)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and sent == 1, done.stderr
    assert line.startswith("error: ") and done.stderr.count(line) == 1, done.stderr
    assert line == (tmp_path / "results/logs/data/aime-2024.log").read_text().splitlines()[-1]


def test_a_job_that_slurm_refuses_is_resubmitted_despite_an_earlier_run_s_mistake(fetch_through_slurm, tmp_path):
    mistake = tmp_path / "results/logs/data/aime-2024.error"
    mistake.parent.mkdir(parents=True)
    mistake.write_text("error: a mistake that has been mended\n")
    refuse = "echo 'invalid partition' >&2; exit 1\n"
    done, sent = fetch_through_slurm(SBATCH.replace("echo $$\n", refuse))
    assert done.returncode == 1 and sent == 3, done.stderr
    assert "mended" not in done.stderr and "invalid partition" in done.stderr


def test_a_crashed_job_is_tried_again_and_its_logs_and_times_are_kept(snakemake, snakefile, tmp_path):
    blocked = tmp_path / "results/data/sums"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the job needs a folder")
    arguments = (
        *("--directory", str(tmp_path), "--cores", "1"),
        *("--config", "datasets={sums: {problems: {split: train, rows: 3}, file: sums.jsonl}}"),
        *("--", "results/data/sums.json"),
    )
    crashed = snakemake(*arguments, snakefile=snakefile)
    assert crashed.returncode != 0
    assert crashed.stderr.count("Job 0: sums") == 3, crashed.stderr
    blocked.unlink()
    snakemake(*arguments, snakefile=snakefile, check=True)
    logs = tmp_path / "results/logs/data"
    assert (logs / "sums.history.log").read_text().count("FileExistsError: ") == 3
    assert (logs / "sums.history.log").read_text().count("----") == 4
    attempts = [line.split("\t") for line in (logs / "sums.attempts.tsv").read_text().splitlines()]
    assert attempts[0] == ["began", "host", "status", "seconds", "total_seconds"]
    assert [row[2] for row in attempts[1:]] == ["1", "1", "1", "0"]
    assert int(attempts[-1][4]) == sum(int(row[3]) for row in attempts[1:])
