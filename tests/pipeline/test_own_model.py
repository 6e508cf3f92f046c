"""A user's model file next to the shipped ones."""

import shutil
import subprocess
import sys

import pytest

PARTS = (
    "Snakefile",
    "rules",
    "config",
    "profiles",
    "workflow_scripts",
    "tests",
    "benchmarks",
    "pyproject.toml",
    "README.md",
)
TARGETS = "tests/pipeline/test_targets.py::test_every_model_has_every_target_and_each_says_what_it_does"


@pytest.fixture(scope="module")
def with_2b(root, tmp_path_factory):
    """A copy of the repository with a fifth recipe, config/models/2B.yaml."""
    folder = tmp_path_factory.mktemp("repository")
    for part in PARTS:
        (shutil.copytree if (root / part).is_dir() else shutil.copy)(root / part, folder / part)
    models = folder / "config/models"
    (models / "2B.yaml").write_text((models / "9B.yaml").read_text().replace("Qwen3.5-9B", "Qwen3.5-2B"))
    return folder


def test_it_has_all_targets(snakemake, with_2b):
    done = snakemake("-n", "--", "eval_2B", cwd=with_2b)
    assert "2B: train with GRPO" in done.stdout + done.stderr


def test_it_turns_no_test_of_the_configuration_red(with_2b):
    files = [with_2b / "tests/unit" / f"test_{name}.py" for name in ("configuration", "recipes", "preflight", "memory")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), TARGETS],
        cwd=with_2b,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
