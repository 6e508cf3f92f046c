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
models: [tiny, Qwen3.6-27B]
results: elsewhere
run: mine
hardware: {gpus: 4}
per_model: {9B: {training: {rollouts: 5}, parallel: {tensor: 1}}}
"""


@pytest.fixture(scope="module")
def with_a_model(tmp_path_factory):
    """A copy of the repository with another recipe, config/models/Qwen3.6-27B.yaml, and a config/local.yaml."""
    folder = clone(tmp_path_factory.mktemp("repository"), "tests", "benchmarks", "pyproject.toml", "README.md")
    models = folder / "config/models"
    (models / "Qwen3.6-27B.yaml").write_text((models / "27B.yaml").read_text().replace("Qwen3.5-27B", "Qwen3.6-27B"))
    (folder / "config/local.yaml").write_text(LOCAL)
    return folder


def test_a_new_model_has_all_targets_and_local_yaml_applies(snakemake, with_a_model):
    done = snakemake("-n", "--", "eval_Qwen3.6-27B", cwd=with_a_model)
    assert "Qwen3.6-27B: train with GRPO" in done.stdout + done.stderr
    assert "elsewhere/Qwen3.6-27B/eval/aime-2024/mine.json" in done.stdout + done.stderr


def test_a_new_model_and_local_yaml_break_no_test(with_a_model):
    of_settings = sorted((with_a_model / "tests/unit").glob("test_configuration_*.py"))
    assert of_settings
    files = [
        *of_settings,
        *(with_a_model / f"tests/unit/test_{name}.py" for name in ("recipes", "preflight", "memory")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), *TARGETS],
        cwd=with_a_model,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("where", ["../mine/models", "~/mine/models", "{}/mine/models"])
def test_a_model_in_a_folder_outside_of_the_clone_has_all_targets(snakemake, snakefile, tmp_path, root, where):
    (tmp_path / "mine/models").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    recipe = (root / "config/models/27B.yaml").read_text()
    (tmp_path / "mine/models/Qwen3.6-27B.yaml").write_text(recipe.replace("Qwen3.5-27B", "Qwen3.6-27B"))
    given = ("--config", f"models_folder={where.format(tmp_path)}", "--directory", str(tmp_path / "work"))
    listed = snakemake("--list-target-rules", *given, snakefile=snakefile, HOME=str(tmp_path), check=True).stdout
    for stage in ("download", "convert", "train", "export", "eval"):
        assert re.search(rf"^{stage}_Qwen3\.6-27B \(Qwen3\.6-27B: ", listed, flags=re.MULTILINE), listed
    done = snakemake("-n", *given, "--", "train_Qwen3.6-27B", snakefile=snakefile, HOME=str(tmp_path), check=True)
    assert "Qwen3.6-27B: train with GRPO" in done.stdout + done.stderr
    assert "results/Qwen3.6-27B/grpo/grpo/train.json" in done.stdout + done.stderr
