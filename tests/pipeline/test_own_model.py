"""A user's own models and settings, inside and outside the clone."""

import re
import subprocess
import sys

import pytest

from clones import clone

TARGETS = [
    f"tests/pipeline/test_targets.py::test_{name}"
    for name in (
        "every_model_has_every_target_and_each_says_what_it_does",
        "a_training_waits_for_its_validation_set_if_it_has_one",
        "preflight_can_be_asked_by_itself",
    )
]


# Settings that would change any test that reads them: other models, another folder, too few GPUs for 35B-A3B.
LOCAL = """
models: [tiny, 2B]
results: elsewhere
run: mine
hardware: {gpus: 4}
per_model: {9B: {training: {rollouts: 5}, parallel: {tensor: 1}}}
"""


@pytest.fixture(scope="module")
def with_2b(tmp_path_factory):
    """A copy of the repository with a fifth recipe, config/models/2B.yaml, and a config/local.yaml."""
    folder = clone(tmp_path_factory.mktemp("repository"), "tests", "benchmarks", "pyproject.toml", "README.md")
    models = folder / "config/models"
    (models / "2B.yaml").write_text((models / "9B.yaml").read_text().replace("Qwen3.5-9B", "Qwen3.5-2B"))
    (folder / "config/local.yaml").write_text(LOCAL)
    return folder


def test_a_new_model_has_all_targets_and_local_yaml_applies(snakemake, with_2b):
    done = snakemake("-n", "--", "eval_2B", cwd=with_2b)
    assert "2B: train with GRPO" in done.stdout + done.stderr
    assert "elsewhere/2B/eval/aime-2024/mine.json" in done.stdout + done.stderr


def test_a_new_model_and_local_yaml_break_no_test(with_2b):
    files = [with_2b / "tests/unit" / f"test_{name}.py" for name in ("configuration", "recipes", "preflight", "memory")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), *TARGETS],
        cwd=with_2b,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("where", ["../mine/models", "~/mine/models", "{}/mine/models"])
def test_a_model_in_a_folder_outside_of_the_clone_has_all_targets(snakemake, snakefile, tmp_path, root, where):
    (tmp_path / "mine/models").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    recipe = (root / "config/models/9B.yaml").read_text()
    (tmp_path / "mine/models/2B.yaml").write_text(recipe.replace("Qwen3.5-9B", "Qwen3.5-2B"))
    given = ("--config", f"models_folder={where.format(tmp_path)}", "--directory", str(tmp_path / "work"))
    listed = snakemake("--list-target-rules", *given, snakefile=snakefile, HOME=str(tmp_path), check=True).stdout
    for stage in ("download", "convert", "train", "export", "eval"):
        assert re.search(rf"^{stage}_2B \(2B: ", listed, flags=re.MULTILINE), listed
    done = snakemake("-n", *given, "--", "train_2B", snakefile=snakefile, HOME=str(tmp_path), check=True)
    assert "2B: train with GRPO" in done.stdout + done.stderr
    assert "results/2B/grpo/grpo/train.json" in done.stdout + done.stderr
