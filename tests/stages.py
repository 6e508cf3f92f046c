"""Run the entry scripts that move weights, in this process or in their own."""

import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from milepost.checkpoints.manifest import write_manifest

SCRIPTS = Path(__file__).parents[1] / "workflow_scripts"


def script(name: str) -> str:
    """The path of an entry script."""
    return str(SCRIPTS / f"{name}.py")


def download_manifest(hub: Path, manifest: Path) -> Path:
    """Write the manifest of a download for a folder that a test made."""
    files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
    return write_manifest(manifest, "download", hub, files, {}, {"repo": "owner/name"}).path


@functools.cache
def _jobs() -> tempfile.TemporaryDirectory:
    """A temporary folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="jobs-")


def job_arguments(config: dict, **more: Any) -> list[str]:
    """The option that passes an entry script its settings."""
    content = json.dumps({"config": config, "code": "c", "upstream": {}, **more})
    path = Path(_jobs().name, f"{hashlib.sha256(content.encode()).hexdigest()}.json")
    path.write_text(content)
    return ["--job", str(path)]


def convert_arguments(download: Path, folder: Path, mtp_num_layers: int = 1) -> list[str]:
    return [
        *job_arguments({"conversion": {}}),
        *("--hub", str(download), "--mtp-num-layers", str(mtp_num_layers)),
        *("--folder", str(folder), "--manifest", f"{folder}.json"),
    ]


def export_arguments(download: Path, weights: Path, folder: Path) -> list[str]:
    return [
        *job_arguments({}),
        *("--hub", str(download), "--weights", str(weights), "--folder", str(folder), "--manifest", f"{folder}.json"),
    ]


def call(monkeypatch, main, arguments: list[str]) -> None:
    """Run an entry script's ``main`` here."""
    monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
    main()


def launcher(processes: int) -> list[str]:
    """The command that starts several processes on this machine."""
    return [sys.executable, "-P", "-m", "milepost.launch.torchrun", "--standalone", f"--nproc-per-node={processes}"]


def torchrun(processes: int, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a module or a script in several processes of this machine; its output is shown if it fails."""
    done = subprocess.run([*launcher(processes), *arguments], text=True, capture_output=True, timeout=500, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def torchrun_until(
    due: Callable[[], bool], then: Callable[[psutil.Popen], object], *arguments: str, **options
) -> tuple[int, str]:
    """Run in two processes, disturb them once a condition holds, and return their exit status and output."""
    with tempfile.TemporaryFile("w+") as log:
        run = psutil.Popen([*launcher(2), *arguments], stdout=log, stderr=log, **options)
        while not due():
            if run.poll() is not None:
                break
            time.sleep(0.05)
        else:
            then(run)
        status = run.wait(timeout=120)
        log.seek(0)
        printed = log.read()
    assert due(), printed[-6000:]
    return status, printed


def kill_the_second_rank(run: psutil.Popen) -> None:
    next(process for process in run.children() if process.environ().get("RANK") == "1").kill()


def flip_a_bit(file: Path) -> bytes:
    """Damage a file in its middle; return its previous content."""
    whole = file.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return whole


def assert_same_files(one: Path, other: Path) -> None:
    """Assert that both folders hold the same files, byte for byte."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def unmeasured(log: Path) -> list[dict]:
    """The lines of a log without measured times and memory, which differ between runs."""
    kinds = ("second", "idle_share", "_memory_")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(kind in key for kind in kinds)} for row in rows]
