"""Run download.py against a local Hub, and the model that this Hub hosts."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer
from milepost.checkpoints.manifest import read_manifest
from stages import job_arguments

SCRIPTS = Path(__file__).parents[1] / "workflow_scripts"
# The real script, with shorter waits between retries.
IMPATIENT = """
import download
from milepost.common.errors import run
from milepost.hub import faults

faults.WAITS = (0, 0.1, 0.2)
run(download.main)
"""
TOKEN = "hf_goodtoken"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
MODEL = {
    "config.json": b'{"model_type": "qwen3_5"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "extra/vocab.json": b"{}",
    "README.md": b"# hello",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "extra/optimizer.pt": b"pickle",
}
WANTED = {name for name in MODEL if not re.search(r"README|\.py$|\.bin|\.pt$", name)}
LFS = {name for name in MODEL if name.endswith(".safetensors")} | {"tokenizer.json", "pytorch_model.bin"}


class Run:
    """Runs download.py in one folder, with one Hub cache."""

    def __init__(self, folder: Path, hub: HubServer | None) -> None:
        self.folder, self.home = folder, folder / "home"
        self.endpoint = hub.address if hub else "http://127.0.0.1:9"  # nothing listens there
        self.manifest = folder / "results" / "tiny" / "download.json"
        self.labels = "math"

    def __call__(self, config: dict, every_row: bool = False, **environment: str) -> subprocess.CompletedProcess:
        """Run the script; its output must never contain a token."""
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                IMPATIENT,
                *job_arguments(config, every_row=every_row, labels=self.labels),
                *("--name", "tiny", "--folder", str(self.folder / "results/hub")),
                "--manifest",
                str(self.manifest),
            ],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPTS), "HF_HOME": str(self.home)}
            | {"HF_ENDPOINT": self.endpoint, "HOME": str(self.folder)}
            | environment,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=self.as_a_user,
        )
        written = self.manifest.read_text() if self.manifest.exists() else ""
        assert TOKEN not in result.stdout + result.stderr + written
        return result

    def model(self, repo: str = "Qwen/tiny", revision: str = "main", **environment: str) -> subprocess.CompletedProcess:
        return self({"source": {"repo": repo, "revision": revision}}, **environment)

    def succeeds(self, result: subprocess.CompletedProcess):
        assert result.returncode == 0, result.stderr
        return read_manifest(self.manifest).require(digests=True)

    def fails(self, result: subprocess.CompletedProcess, *words: str) -> None:
        """Assert that the run ended in one line that contains ``words``, without a manifest."""
        assert result.returncode == 65, result.stderr
        assert "Traceback" not in result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), last
        assert not self.manifest.exists()

    @staticmethod
    def as_a_user() -> None:
        """Drop the capabilities that let root ignore file modes (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; takes effect at the next exec

    @property
    def cached(self) -> list[str]:
        return [file.name for file in self.home.rglob("blobs/*")]
