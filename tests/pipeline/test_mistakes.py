"""A user's mistake ends in one line, printed once and last, that names what they wrote."""

import re

import pytest

from milepost.configuration import runs
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance


@pytest.fixture
def said(snakemake, snakefile, tmp_path):
    """Run the workflow in a user's folder, assert that it fails, and return the printed lines."""
    (tmp_path / "mine.yaml").write_text("optimizer: {lr: 1.0e-6}\n")
    (tmp_path / "good.yaml").write_text("run: grpo\n")
    (tmp_path / "other.yaml").write_text("hardware: {gpus: 6}\n")
    (tmp_path / "broken.yaml").write_text("run: [\n")
    (tmp_path / "list.yaml").write_text("- run\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "2 + 2?"}], "label": "4"}\nno JSON\n')
    (tmp_path / "empty").mkdir()

    def run(*arguments, **environment):
        done = snakemake(*arguments, cwd=tmp_path, snakefile=snakefile, **environment)
        lines = (done.stdout + done.stderr).splitlines()
        assert done.returncode == 1, lines
        assert not any("Traceback" in line for line in lines), "\n".join(lines)
        return lines

    return run


# Name -> (command line, the whole error line).
MISTAKES = {
    "an unknown key": (
        ["--config", "optimizer={lr: 1}"],
        "--config: optimizer.lr: unknown key, did you mean 'learning_rate'?",
    ),
    "an unknown key in a file": (
        ["--configfile", "mine.yaml"],
        "mine.yaml: optimizer.lr: unknown key, did you mean 'learning_rate'?",
    ),
    "settings that do not fit the project's": (
        ["--config", "hardware={gpus: 6}"],
        "--config: hardware.gpus: parallel: tensor 4 x pipeline 1 x context 1 = 4 does not divide the 6 training"
        " processes (of 27B; settings of one model alone belong to per_model)",
    ),
    "the same in the first of two files": (
        ["--configfile", "other.yaml", "--config", "training={rollouts: 5}"],
        "other.yaml: hardware.gpus: parallel: tensor 4 x pipeline 1 x context 1 = 4 does not divide the 6 training"
        " processes (of 27B; settings of one model alone belong to per_model)",
    ),
    "a run's name that is a number": (
        ["--config", "run=1.10"],
        "--config: run: text is expected, and 1.1 is none: begin it with a letter, or quote it in a file",
    ),
    "a model listed twice": (["--config", "models=[9B, 9B]"], "--config: models: 9B: given twice"),
    "a data set listed twice": (
        ["--config", "evaluation={datasets: [aime-2024, aime-2024]}"],
        "--config: evaluation.datasets: aime-2024: given twice",
    ),
    "no colour": (
        ["--config", "plots={color_base: blau}"],
        "--config: plots.color_base: no colour: give one like '#0b7285' or 'teal' (matplotlib's names), not 'blau'",
    ),
    "infinity": (
        ["--config", "reward={max_seconds: .inf}"],
        "--config: reward.max_seconds: Input should be a finite number, not inf",
    ),
    "processes that do not divide the experts": (
        ["--config", "per_model={35B_A3B: {conversion: {processes: 7}}}"],
        "--config: per_model: 35B_A3B: conversion.processes: 7 does not divide the 256 experts (of 35B_A3B; settings of"
        " one model alone belong to per_model)",
    ),
    "wandb without its package": (
        ["--config", "training={wandb_project: mine}"],
        "training.wandb_project is set, but wandb is not installed: unset the key, or run"
        " `.venv-uv/bin/uv pip install --python .venv/bin/python wandb`",
    ),
    "a missing configfile": (
        ["--configfile", "none.yaml"],
        "--configfile none.yaml: no such file; if it is a target, put -- before it",
    ),
    "a broken configfile": (
        ["--configfile", "broken.yaml"],
        "broken.yaml: not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in"
        ' "<unicode string>", line 2, column 1: ^',
    ),
    "a configfile that is a list": (["--configfile", "list.yaml"], "list.yaml: a mapping of settings is expected"),
    "a data set's folder that is not there": (
        ["--config", "datasets={sums-train: {folder: gone, file: rows.jsonl}}"],
        "gone: no such folder: correct datasets.sums-train.folder",
    ),
    "a data set's file that is not there": (
        ["--config", "datasets={sums-train: {folder: ., file: gone.jsonl}}"],
        ".: holds no file gone.jsonl; there: rows.jsonl: correct datasets.sums-train.file",
    ),
    "a bad row": (
        ["--config", "datasets={sums-train: {folder: ., file: rows.jsonl}}"],
        "rows.jsonl: 1 of 2 rows are unusable: not JSON: Expecting value (line 2): correct them at the source, or raise"
        " max_bad_share",
    ),
    "a bad row in a set to evaluate on, even if a training would tolerate it": (
        [
            "--config",
            "datasets={sums-evaluation: {folder: ., file: rows.jsonl, max_bad_share: 0.5}}",
            "--",
            "eval_tiny",
        ],
        "rows.jsonl: 1 of 2 rows are unusable: not JSON: Expecting value (line 2): correct them at the source",
    ),
    "a model's folder that is not there": (
        ["--config", "per_model={tiny: {source: {folder: gone}}}"],
        "gone: no such folder: correct source.folder of tiny",
    ),
    "a model's folder without a model": (
        ["--config", "per_model={tiny: {source: {folder: empty}}}"],
        "empty: holds no .safetensors file: name a checkpoint in Transformers' format as source",
    ),
    "a run that is not finished, in a comparison": (
        ["--config", "compare=[[tiny/base, tiny/gone]]", "--", "compare"],
        "--config: compare: no finished run 'gone' (tiny has none): correct the name, or make the run with"
        " `snakemake train_tiny --config run=gone`",
    ),
    "a run that is not finished, in the report": (
        ["--config", "models=[tiny]", "runs=[gone]", "--", "all"],
        "--config: runs: no finished run 'gone' (tiny has none): correct the name, or make the run with"
        " `snakemake train_tiny --config run=gone`",
    ),
    "a mistyped target": (
        ["--", "train_tny"],
        "nothing makes 'train_tny', did you mean 'train_tiny'?: snakemake --list-target-rules lists the targets",
    ),
    "a target in lower case": (
        ["--", "eval_4b"],
        "nothing makes 'eval_4b', did you mean 'eval_4B'?: snakemake --list-target-rules lists the targets",
    ),
    "a target taken for a second configfile": (
        ["--configfile", "good.yaml", "train_tiny"],
        "--configfile train_tiny: no such file; if it is a target, put -- before it",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_dry_run_ends_in_the_line_that_names_the_mistake(said, what):
    arguments, line = MISTAKES[what]
    if "--" not in arguments and "train_tiny" not in arguments:
        arguments = [*arguments, "--", "train_tiny"]
    lines = said("-n", *arguments)
    assert lines[-1] == f"error: {line}"
    assert [shown for shown in lines if "error" in shown.lower()] == lines[-1:]


def test_a_run_can_be_made_that_runs_and_compare_already_name(snakemake, snakefile, tmp_path):
    given = ["models=[tiny]", "runs=[next]", "compare=[[tiny/base, tiny/next]]"]
    done = snakemake("-n", "--config", *given, "run=grpo", "--", "train_tiny", cwd=tmp_path, snakefile=snakefile)
    assert done.returncode == 0, done.stderr


def test_a_mistake_found_by_a_job_is_printed_once_and_not_retried(said, tmp_path):
    lines = said(
        *("--cores", "1", "--", "results/data/aime-2024.json"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")
    )
    log = tmp_path / "results/logs/data/aime-2024.log"
    assert lines[-1] == log.read_text().strip().splitlines()[-1] and lines[-1].startswith("error: ")
    assert lines.count(lines[-1]) == 1
    assert sum(line.startswith("Job 0: aime-2024: fetch") for line in lines) == 1
    assert not any("--job" in line or "set -euo pipefail" in line for line in lines)


def made(results, *paths):
    for path in paths:
        (results / path).parent.mkdir(parents=True, exist_ok=True)
        (results / path).write_text("{}")


TRAINING_NEEDS = ("tiny/download.json", "tiny/convert.json", "data/sums-train.json", "data/sums-evaluation.json")


def test_problem_sets_are_fetched_before_a_training_that_could_start(said, tmp_path):
    made(tmp_path / "results", *TRAINING_NEEDS)
    lines = said(
        *("--cores", "16", "--rerun-triggers", "mtime", "--"),
        *("results/tiny/grpo/grpo/train.json", "results/tiny/eval/aime-2024/base.json"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "home"),
    )
    assert [line.split(": ", 1)[1] for line in lines if re.match(r"Job \d+: ", line)] == [
        "aime-2024: fetch the problem set"
    ]


def test_fewer_rollouts_than_a_run_has_are_refused_and_its_result_stays(said, snakemake, snakefile, root, tmp_path):
    results, target = tmp_path / "results", "results/tiny/grpo/grpo/train.json"
    configuration = load(root / "config/config.yaml", root / "config/models", {})
    job = Provenance(configuration, root / "workflow_scripts").job("train", model="tiny")
    run = runs.open_run(results / "tiny/grpo/grpo", job | {"inputs": {}})
    (run / "checkpoint-000004").mkdir()
    made(results, *TRAINING_NEEDS, "tiny/grpo/grpo/train.json")
    fewer, asked = "per_model={tiny: {training: {rollouts: 3}}}", ("--", target)
    snakemake("--touch", "--forceall", *asked, cwd=tmp_path, snakefile=snakefile, check=True)  # as if it were made
    for flags in (["-n"], ["--cores", "1"]):
        lines = said(*flags, "--config", fewer, *asked)
        assert lines[-1] == (
            "error: tiny: training.rollouts is 3 and the run 'grpo' has 4 already: ask for at least as many, or give"
            " another run a name of its own (run: ...)"
        )
        assert (tmp_path / target).read_text() == "{}"
