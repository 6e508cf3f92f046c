"""Fixtures shared by several suites."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clones import clone
from milepost.common.files import allow_open_files

ROOT = Path(__file__).resolve().parents[1]

# Tests run in parallel, one per core: more threads would wait for each other, and must not spin meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nothing is compiled on a CPU, and importing dynamo takes a third as long as importing Megatron-Core.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Some processes go through many layouts, and torch keeps the sockets of every group until the process ends.
allow_open_files()


def pytest_collection_modifyitems(items):
    """Skip GPU tests, visibly, if there are too few GPUs: ``gpu`` needs one, ``gpu(n)`` n of them."""
    marks = {item: mark for item in items if (mark := item.get_closest_marker("gpu"))}
    if not marks:
        return
    import torch

    for item, mark in marks.items():
        (wanted,) = mark.args or (1,)
        if torch.cuda.device_count() < wanted:
            needs = "an NVIDIA GPU" if wanted == 1 else f"{wanted} NVIDIA GPUs"
            item.add_marker(pytest.mark.skip(reason=f"needs {needs}"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For processes that tests start: the scripts' modules and the tests' on the path, one thread each."""
    paths = [ROOT / "workflow_scripts", ROOT / "tests"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def snakefile(tmp_path_factory) -> Path:
    """The Snakefile of a clone: no test reads the settings that a user keeps in the repository."""
    return clone(tmp_path_factory.mktemp("clone")) / "Snakefile"


@pytest.fixture(scope="session")
def snakemake(snakefile):
    """Run the workflow of a clone: ``snakemake(*arguments, cwd=..., snakefile=...)`` -> CompletedProcess."""
    home = snakefile.parent

    def call(*arguments, cwd=home, snakefile=None, check=False, **environment):
        command = [sys.executable, "-m", "snakemake", *(["-s", str(snakefile)] if snakefile else []), *arguments]
        return subprocess.run(
            command, cwd=cwd, text=True, capture_output=True, check=check, env=os.environ | environment, timeout=900
        )

    return call


@pytest.fixture(scope="module")
def one_process():
    """Megatron-Core's groups over only this process."""
    from milepost.qwen3_5.build import finalize, initialize

    initialize()
    yield
    finalize()


@pytest.fixture(scope="module")
def math_grader():
    """A grader of math answers, patient enough for a busy machine."""
    from milepost.configuration.schema import Reward
    from milepost.rewards.grader import Grader

    with Grader(Reward(max_seconds=10)) as grader:
        yield grader
