"""A job chooses among visible GPUs, and waits for those that other jobs hold."""

import os
import subprocess
import sys
import time

import pytest

from milepost.common.errors import UserError
from milepost.launch import with_gpus

UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine with three GPUs, and a separate lock folder."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {uuid}, 81559, [N/A]\n" for uuid in UUIDS))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(with_gpus, "LOCKS", tmp_path / "locks")


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        (None, dict(zip("012", UUIDS, strict=True))),
        ("2,0", {"2": UUIDS[2], "0": UUIDS[0]}),
        ("GPU-b", {"GPU-b": UUIDS[1]}),
        ("1,7,0", {"1": UUIDS[1]}),  # CUDA stops at an invalid entry
        ("", {}),
        ("MIG-1234", {"MIG-1234": "MIG-1234"}),
    ],
)
def test_a_gpu_is_identified_by_its_uuid_however_it_is_listed(driver, monkeypatch, listed, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert with_gpus.visible_devices(1) == devices


def test_more_gpus_than_are_visible_are_refused(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match=r"2 GPUs are needed, but only 1 are visible \(CUDA_VISIBLE_DEVICES: 1\)"):
        with_gpus.take(2, with_gpus.visible_devices(2))


def test_a_killed_job_releases_its_locks(driver, tmp_path, environment, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = (
        "import pathlib, sys; from milepost.launch import with_gpus;"
        f"with_gpus.LOCKS = pathlib.Path({str(tmp_path / 'locks')!r});"
        "sys.argv[1:] = ['3', 'sh', '-c', 'echo $CUDA_VISIBLE_DEVICES; exec sleep 100'];"
        "with_gpus.main()"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment | {"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "0,1,2\n"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code.replace("exec sleep 100", "")],
        env=environment | {"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "GPUs are in use: waiting until 3 of 0,1,2 are free" in waiting.stderr.readline()
    time.sleep(1)
    assert waiting.poll() is None
    job.kill()
    assert waiting.communicate(timeout=60)[0] == "0,1,2\n"
    job.wait()
