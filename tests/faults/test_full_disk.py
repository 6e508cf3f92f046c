"""Every stage on a full disk: a one-line error, the last good state is kept, and with more room it resumes.

The disk is a small tmpfs, mounted where only the test's processes see it.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_run
from hub_runs import checkpoint
from hub_server import serve
from milepost.checkpoints.manifest import read_manifest
from settings import section
from stages import convert_arguments, export_arguments, job_arguments, script

MAY_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not MAY_MOUNT, reason="mounting a small disk needs root")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = grpo_run.prepare(tmp_path_factory.mktemp("full"), rows=16)
    grpo_run.convert_model(folder)
    return folder


@pytest.fixture
def on_a_disk(environment, tmp_path):
    """Run a command on a disk of ``small`` KiB, then on 100 MiB; return the first run's output and the final files."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def call(small: int, command: list[str], **more: str) -> tuple[str, Path]:
        run = shlex.join([sys.executable, *command])
        script = f"""
            mount -t tmpfs -o size={small}k tmpfs {disk}
            {run} > {tmp_path}/first.log 2>&1; echo $? > {tmp_path}/first.code
            find {disk} -type f ! -name '.*.lock' > {tmp_path}/first.files
            mount -o remount,size=100m {disk}
            {run} > {tmp_path}/second.log 2>&1; echo $? > {tmp_path}/second.code
            cp -a {disk}/. {tmp_path}/kept
        """
        env = environment | {"TQDM_DISABLE": "1"} | more
        subprocess.run(["unshare", "-m", "bash", "-c", script], env=env, check=True, timeout=300)
        first, second = (tmp_path / f"{name}.log" for name in ("first", "second"))
        assert (tmp_path / "first.code").read_text() == "65\n", first.read_text()
        assert "Traceback" not in first.read_text()
        assert (tmp_path / "second.code").read_text() == "0\n", second.read_text()
        return first.read_text().strip().splitlines()[-1], tmp_path / "kept"

    call.disk, call.files = disk, tmp_path / "first.files"
    return call


def test_download(on_a_disk):
    settings = {"source": {"repo": "Qwen/tiny", "revision": "main"}}
    command = [
        *(script("download"), *job_arguments(settings, mtp=False), "--name", "tiny"),
        *("--folder", str(on_a_disk.disk / "hub"), "--manifest", str(on_a_disk.disk / "download.json")),
    ]
    with serve() as hub:
        hub.host("Qwen/tiny", checkpoint(shards=1, padding=2**21), {"model.safetensors"})
        line, kept = on_a_disk(1024, command, HF_ENDPOINT=hub.address, HF_HOME=str(on_a_disk.disk / "home"))
    assert " MiB to download, but only 1.0 MiB free" in line and "make room, or set HF_HOME" in line
    read_manifest(kept / "download.json").require(digests=True)


def test_conversion(prepared, on_a_disk):
    arguments = convert_arguments(prepared / "download.json", on_a_disk.disk / "torch_dist")
    line, kept = on_a_disk(200, [script("convert"), *arguments])
    assert line.startswith("error: ") and "needs" in line and "MiB are free: make room and run again" in line
    assert not on_a_disk.files.read_text()
    read_manifest(kept / "torch_dist.json").require(digests=True)


def test_export(prepared, on_a_disk):
    arguments = export_arguments(prepared / "download.json", prepared / "torch_dist.json", on_a_disk.disk / "hf")
    line, kept = on_a_disk(200, [script("export"), *arguments])
    assert "needs" in line and "MiB are free: make room and run again" in line
    assert not on_a_disk.files.read_text()
    read_manifest(kept / "hf.json").require(digests=True)


def test_a_training_keeps_its_last_checkpoint_and_goes_on_from_it(prepared, on_a_disk):
    one_checkpoint = 4 * sum(file.stat().st_size for file in (prepared / "torch_dist").iterdir()) // 1024
    changes = {"training": {"save_interval": 1, "rollouts": 3}, "validation": {"interval": 0}}
    command = [grpo_run.__file__, *grpo_run.arguments(prepared, on_a_disk.disk / "work", **changes)]
    line, kept = on_a_disk(int(1.8 * one_checkpoint), command)
    assert "needs" in line and "MiB are free: make room and run again" in line
    assert "checkpoint-000001/manifest.json" in on_a_disk.files.read_text()
    straight = prepared / "straight"
    grpo_run.run(grpo_run.arguments(prepared, straight, **changes))
    for name in ("samples.jsonl", "checkpoint-000003/optimizer/rank-00000.safetensors"):
        assert (kept / "work" / name).read_bytes() == (straight / name).read_bytes(), name


def test_an_evaluation_keeps_its_samples_and_samples_the_others(prepared, on_a_disk):
    sections = {
        "evaluation": {"samples_per_problem": 40, "max_response_tokens": 40, "pass_at": [1]},
        "engine": {"kind": "cpu", "max_running_requests": 8},
        "reward": {},
    }
    config = {name: section(name, **changes).model_dump(mode="json") for name, changes in sections.items()}
    results = on_a_disk.disk / "base"
    line, kept = on_a_disk(
        12,
        [
            *(script("evaluate_model"), *job_arguments(config, sampler={})),
            *("--model", str(prepared / "download.json"), "--data", str(prepared / "evaluation.json")),
            *("--samples", f"{results}.jsonl", "--manifest", f"{results}.json"),
        ],
    )
    assert "the disk is full: make room and run again" in line
    assert on_a_disk.files.read_text().split() == [f"{results}.jsonl"]
    read_manifest(kept / "base.json").require(digests=True)
    assert len((kept / "base.jsonl").read_text().split("\n")) == 2 * 40 + 1
