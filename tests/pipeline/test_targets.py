"""What a user calls, and what Snakemake answers, for the four recipes on a machine without GPUs."""

import os
import re
import shutil
import subprocess

import pytest

MODELS = ("4B", "9B", "27B", "35B_A3B", "tiny", "tiny_gpu", "tiny_moe")
STAGES = ("download", "convert", "train", "export", "eval")


def said(done):
    return done.stdout + done.stderr


def test_every_model_has_every_target_and_each_says_what_it_does(snakemake, root):
    models = {path.stem for path in (root / "config/models").glob("*.yaml")}
    assert models >= set(MODELS)
    listed = snakemake("--list-target-rules", check=True).stdout
    targets = dict(re.findall(r"^(\S+) \((.+)\)$", listed, flags=re.MULTILINE))
    wanted = {f"{stage}_{model}" for stage in STAGES for model in (*models, "all")}
    assert wanted | {"report", "tables", "plots", "page", "all", "preflight"} == set(targets)
    assert targets["train_9B"] == "9B: train with GRPO."


@pytest.mark.parametrize("target", ["eval_all", "all", "train_35B_A3B", "eval_tiny_moe"])
def test_the_dag_resolves_completely(snakemake, tmp_path, target, root):
    done = snakemake("-n", "--directory", str(tmp_path), "--", target, snakefile=root / "Snakefile")
    assert done.returncode == 0, said(done)
    models = MODELS[:4] if target in ("all", "eval_all") else [target.split("_", 1)[1]]
    for model in models:
        for message in ("fetch the starting weights", "convert to Megatron torch_dist", "train with GRPO"):
            assert re.search(rf"^Job \d+: {model}: {message}$", said(done), flags=re.MULTILINE), (model, message)


def test_without_a_target_everything_is_made(snakemake, tmp_path, root):
    done = snakemake("-n", "--directory", str(tmp_path), "--config", "models=[tiny]", snakefile=root / "Snakefile")
    assert re.search(r"^all +1$", said(done), flags=re.MULTILINE), said(done)


def test_what_config_nests_is_read_as_yaml(snakemake, tmp_path, root):
    given = "engine={server_arguments: {disable_prefill_cuda_graph: false, random_seed: 3, grammar_backend: null}}"
    done = snakemake(
        *("-n", "-p", "--directory", str(tmp_path), "--config", given, "--", "train_9B"), snakefile=root / "Snakefile"
    )
    taken = '"server_arguments": {"disable_prefill_cuda_graph": false, "random_seed": 3, "grammar_backend": null}'
    assert taken in said(done)


def test_a_configuration_that_is_not_yaml_is_named_with_the_line(snakemake, tmp_path, root):
    for name in ("Snakefile", "rules", "config", "workflow_scripts"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "config").unlink()
    shutil.copytree(root / "config", tmp_path / "config")
    file = tmp_path / "config/config.yaml"
    file.write_text(file.read_text().replace("run: grpo", "run: grpo: x"))
    done = snakemake("-n", cwd=tmp_path)
    assert re.search(r"^error: .*config/config.yaml: not valid YAML: .* line \d+", said(done), flags=re.MULTILINE)


def test_conversion_of_the_mixture_of_experts_is_launched_by_torchrun_with_its_mtp_layer(snakemake, tmp_path, root):
    done = snakemake("-n", "-p", "--directory", str(tmp_path), "--", "convert_35B_A3B", snakefile=root / "Snakefile")
    command = next(line for line in said(done).splitlines() if " convert --provenance" in line)
    assert "torchrun --standalone --nproc-per-node=8" in command and "--mtp-num-layers 1" in command


def test_training_without_the_gpus_it_needs_ends_before_any_download(snakemake, tmp_path, root):
    done = snakemake(
        "--cores", "all", "--directory", str(tmp_path), "--", "train_9B",
        snakefile=root / "Snakefile", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in said(done).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "9B needs 8 GPUs and this machine has none" in lines[0]
    assert "Traceback" not in said(done)
    assert not (tmp_path / "results/hub").exists() and not list(tmp_path.glob("results/**/download.*"))


def test_preflight_can_be_asked_by_itself(snakemake):
    done = snakemake("--cores", "1", "--", "preflight")
    assert done.returncode == 0, said(done)
    assert "35B_A3B" in said(done) and "GiB" in said(done)


def test_a_mistake_in_the_configuration_ends_in_one_line(snakemake):
    done = snakemake("-n", "--config", "optimizer={lr: 1}", "--", "train_9B")
    assert done.returncode == 1
    assert "error: --config/--configfile: optimizer.lr: unknown key, did you mean 'learning_rate'?" in said(done)
    assert "Traceback" not in said(done)


@pytest.mark.parametrize(
    ("visible", "count", "seen"),
    [(None, 2, "0,1"), ("4,5,6,7", 2, "4,5"), ("GPU-a,GPU-b", 8, "GPU-a,GPU-b"), ("3,4", 0, ""), ("", 4, "")],
)
def test_a_job_sees_as_many_gpus_as_it_claims_of_those_that_are_visible(root, visible, count, seen):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    script = f"set -euo pipefail; source {root}/rules/job.sh; use_gpus {count}; printenv CUDA_VISIBLE_DEVICES"
    done = subprocess.run(["bash", "-c", script], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout == f"{seen}\n"


def test_the_linter_has_nothing_to_say_but_that_rules_name_no_environment(snakemake):
    """One locked environment serves every rule, so no rule names one: docs/limits.md says why."""
    lints = set(re.findall(r"^ +\* (.+):$", said(snakemake("--lint")), flags=re.MULTILINE))
    assert lints == {"Specify a conda environment or container for each rule."}
