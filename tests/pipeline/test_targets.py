"""The targets and messages of the four recipes, on a machine without GPUs."""

import json
import re

import pytest

from clones import clone
from milepost.common.working_folder import claim

MODELS = ("4B", "9B", "27B", "35B_A3B", "0.8B", "2B", "tiny", "tiny_gpu", "tiny_moe")
STAGES = ("download", "convert", "evaluate", "train", "export", "eval")


def said(done):
    return done.stdout + done.stderr


def test_every_model_has_every_target_and_each_says_what_it_does(snakemake, root):
    models = {path.stem for path in (root / "config/models").glob("*.yaml")}
    assert models >= set(MODELS)
    listed = snakemake("--list-target-rules", check=True).stdout
    targets = dict(re.findall(r"^(\S+) \((.+)\)$", listed, flags=re.MULTILINE))
    wanted = {f"{stage}_{model}" for stage in STAGES for model in (*models, "all")}
    assert wanted | {
        "report",
        "tables",
        "comparison",
        "compare",
        "plots",
        "page",
        "all",
        "preflight",
        "check_reward",
        "progress",
    } == set(targets)
    assert targets["train_9B"] == "9B: train with GRPO."


@pytest.mark.parametrize("target", ["eval_all", "all", "train_35B_A3B", "eval_tiny_moe"])
def test_the_dag_resolves_completely(snakemake, tmp_path, target, snakefile):
    done = snakemake("-n", "--directory", str(tmp_path), "--", target, snakefile=snakefile)
    assert done.returncode == 0, said(done)
    models = MODELS[:4] if target in ("all", "eval_all") else [target.split("_", 1)[1]]
    for model in models:
        for message in ("fetch the starting weights", "convert to Megatron torch_dist", "train with GRPO"):
            assert re.search(rf"^Job \d+: {model}: {message}$", said(done), flags=re.MULTILINE), (model, message)


@pytest.mark.parametrize("interval", [20, 0])
def test_a_training_waits_for_its_validation_set_if_it_has_one(snakemake, tmp_path, snakefile, interval):
    given = f"per_model={{9B: {{validation: {{interval: {interval}}}}}}}"
    done = snakemake(
        *("-n", "-p", "--directory", str(tmp_path), "--config", given, "--", "train_9B"), snakefile=snakefile
    )
    fetched = set(re.findall(r"^Job \d+: (\S+): fetch the problem set$", said(done), flags=re.MULTILINE))
    assert fetched == {"dapo-math-17k"} | ({"aime-2024"} if interval else set())
    command = next(line for line in said(done).splitlines() if "/train.py --job" in line)
    assert ("--validation results/data/aime-2024.json" in command) == bool(interval)
    assert "--data results/data/dapo-math-17k.json" in command


def test_without_a_target_everything_is_made(snakemake, tmp_path, snakefile):
    done = snakemake("-n", "--directory", str(tmp_path), "--config", "models=[tiny]", snakefile=snakefile)
    assert re.search(r"^all +1$", said(done), flags=re.MULTILINE), said(done)


def test_a_job_takes_its_settings_from_a_file_that_only_a_real_run_writes(snakemake, tmp_path, snakefile):
    dataset = "{problems: {split: train, rows: 3}, file: sums.jsonl, instruction: null}"  # read as YAML: null is None
    arguments = ("--cores", "1", "--directory", str(tmp_path), "--config", f"datasets={{sums: {dataset}}}")
    target = ("--", "results/data/sums.json")
    for flags in (("-n",), ("-n", "-p"), ("--summary",), ("--list-changes", "params")):
        done = snakemake(*flags, *arguments, *target, snakefile=snakefile, check=True)
        assert not (tmp_path / "results").exists(), flags
        assert '"config"' not in said(done)
    done = snakemake(*arguments, *target, snakefile=snakefile, check=True)
    job = json.loads((tmp_path / "results/jobs/data/sums.json").read_text())
    assert job["config"]["dataset"]["problems"] == {"split": "train", "seed": 0, "rows": 3}
    assert job["config"]["dataset"]["instruction"] is None
    assert json.loads((tmp_path / "results/data/sums.json").read_text())["provenance"] == job | {"inputs": {}}
    assert (tmp_path / "results/data/sums/sums.jsonl").read_text().count("\n") == 3


def test_clone_and_results_may_have_any_name(snakemake, tmp_path):
    results = 'it\'s "ü" $HOME'
    given = ("--config", f"results={results}", "datasets={sums: {problems: {split: train, rows: 3}, file: sums.jsonl}}")
    folder = clone(tmp_path / "it's ü {x} $HOME")
    done = snakemake("--cores", "1", *given, "--", f"{results}/data/sums.json", cwd=folder)
    assert done.returncode == 0, said(done)
    assert (folder / results / "data/sums/sums.jsonl").read_text().count("\n") == 3
    assert (folder / results / "logs/data/sums.history.log").is_file()


def test_a_clone_whose_name_no_search_path_can_hold_is_refused(snakemake, tmp_path):
    done = snakemake("-n", "--", "train_tiny", cwd=clone(tmp_path / "a:b"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "a:b: PATH and PYTHONPATH can't hold a folder with a colon in its name: move the clone"
    )


def test_a_configuration_that_is_not_yaml_is_named_with_the_line(snakemake, tmp_path):
    clone(tmp_path)
    file = tmp_path / "config/config.yaml"
    file.write_text(file.read_text().replace("run: grpo", "run: grpo: x"))
    done = snakemake("-n", cwd=tmp_path)
    assert re.search(r"^error: .*config/config.yaml: not valid YAML: .* line \d+", said(done), flags=re.MULTILINE)


def test_the_mixture_of_experts_is_converted_by_torchrun_with_its_mtp_layer(snakemake, tmp_path, snakefile):
    done = snakemake("-n", "-p", "--directory", str(tmp_path), "--", "convert_35B_A3B", snakefile=snakefile)
    command = next(line for line in said(done).splitlines() if "/convert.py --job" in line)
    assert "torchrun --standalone --nproc-per-node=8" in command and "--mtp-num-layers 1" in command


def test_training_without_the_gpus_it_needs_ends_before_any_download(snakemake, tmp_path, snakefile):
    done = snakemake(
        "--cores", "all", "--directory", str(tmp_path), "--", "train_9B",
        snakefile=snakefile, CUDA_VISIBLE_DEVICES="",
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
    assert "error: --config: optimizer.lr: unknown key, did you mean 'learning_rate'?" in said(done)
    assert "Traceback" not in said(done)


def test_the_linter_reports_only_that_rules_name_no_environment(snakemake):
    """One locked environment serves every rule, so no rule names one: docs/limits.md says why."""
    lints = set(re.findall(r"^ +\* (.+):$", said(snakemake("--lint")), flags=re.MULTILINE))
    assert lints == {"Specify a conda environment or container for each rule."}


def test_progress_is_shown_while_another_run_holds_the_folder(snakemake, tmp_path, snakefile):
    arguments = ("--cores", "1", "--directory", str(tmp_path), "--config", "models=[tiny]", "--", "progress")
    folder = tmp_path / ".snakemake"
    (folder / "locks").mkdir(parents=True)
    locks = {folder / "locks/0.input.lock": "results/tiny/convert.json\n"}
    locks[folder / "locks/0.output.lock"] = "results/tiny/grpo/grpo/train.json\n"
    with claim(folder):  # as the run does that trains
        for lock, content in locks.items():
            lock.write_text(content)
        snakemake(*arguments, snakefile=snakefile, check=True)
        snakemake(*arguments, snakefile=snakefile, check=True)  # a second call makes the page again
        assert {lock: lock.read_text() for lock in (folder / "locks").iterdir()} == locks
    assert "No rollout yet: tiny/grpo" in (tmp_path / "results/progress.html").read_text()
    assert (tmp_path / "results/logs/progress.history.log").read_text().count("open it in a browser") == 2
