"""Run download.py against a local Hub, and the model that this Hub hosts."""

import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hub_server import HubServer
from milepost.checkpoints.manifest import read_manifest
from stages import job_arguments
from tiny_hub import make_tiny_hub, write_weights

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


@functools.cache
def checkpoint(shards: int = 2, padding: int = 0) -> dict[str, bytes]:
    """The files of a tiny Qwen3.5; with ``padding`` its vision tower is that many bytes larger."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = make_tiny_hub(Path(folder))
        Path(folder, "model.safetensors").unlink()
        if padding:
            tensors["model.visual.padding"] = torch.zeros(padding, dtype=torch.uint8)
        write_weights(Path(folder), tensors, shards)
        described = ("config.json", "model*.safetensors", "*.index.json")
        return {file.name: file.read_bytes() for pattern in described for file in Path(folder).glob(pattern)}


def config_json(**changes) -> bytes:
    """Its config.json with changed keys of the text model."""
    content = json.loads(MODEL["config.json"])
    return json.dumps(content | {"text_config": content["text_config"] | changes}).encode()


MODEL = checkpoint() | {
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "extra/vocab.json": b"{}",
    "README.md": b"# hello",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "extra/optimizer.pt": b"pickle",
}
WEIGHTS = checkpoint(shards=1)["model.safetensors"]
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
                *job_arguments(config, every_row=every_row, labels=self.labels, mtp=False),
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
