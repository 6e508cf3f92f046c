"""Find mistakes before the first job starts, in a run and in a dry run alike.

What the machine lacks is found by `configuration.preflight`, which only a real run asks.
"""

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from milepost.common.errors import UserError
from milepost.common.problems import load_problem_set
from milepost.configuration import runs
from milepost.configuration.loading import Configuration, nearest
from milepost.configuration.provenance import Provenance
from milepost.configuration.schema import Dataset

Job = tuple[str, dict[str, str]]  # its rule, its wildcards


def mistyped(targets: Iterable[str], rules: Sequence[str], said: str) -> str:
    """The error for a target that nothing makes, if that is what Snakemake ``said``; otherwise an empty text."""
    for target in targets:
        if f"No rule to produce {target} " in said and target not in rules:
            close = nearest(target, rules).partition(";")[0]  # not all that there are
            return f"nothing makes {target!r}{close}: snakemake --list-target-rules lists the targets"
    return ""


def check_inputs(jobs: Sequence[Job], configuration: Configuration, provenance: Provenance) -> None:
    """Refuse (`UserError`) jobs that are sure to fail, judging by the user's files and settings.

    Args:
        jobs: every job that is about to run.
    """

    @functools.cache  # many jobs may read one set, which may be large
    def check_rows(dataset: str, max_bad_share: float) -> None:
        _check_rows(configuration.datasets[dataset], max_bad_share)

    for rule, wildcards in jobs:
        if rule == "dataset":
            dataset = configuration.datasets[wildcards["name"]]
            _check_place(wildcards["name"], dataset)
            check_rows(wildcards["name"], dataset.max_bad_share)
        elif rule == "download":
            _check_folder(wildcards["model"], configuration)
        elif rule == "train":
            validation = configuration.models[wildcards["model"]].validation
            if validation.interval:
                check_rows(validation.dataset, 0.0)
            _check_training(wildcards["model"], configuration, provenance)
        elif rule == "evaluate":
            check_rows(wildcards["dataset"], 0.0)


def _check_place(name: str, dataset: Dataset) -> None:
    if dataset.folder:
        folder = Path(dataset.folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: correct datasets.{name}.folder")
        if not (folder / dataset.file).is_file():
            raise UserError(f"{folder / dataset.file}: no such file: correct datasets.{name}.folder or .file")


def _check_rows(dataset: Dataset, max_bad_share: float) -> None:
    """Of a local set; a score, unlike a training, needs every row."""
    if dataset.folder and (file := Path(dataset.folder).expanduser() / dataset.file).is_file():
        load_problem_set(file, dataset, max_bad_share=max_bad_share)


def _check_folder(model: str, configuration: Configuration) -> None:
    source = configuration.models[model].source
    if source.folder:
        folder = Path(source.folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: correct source.folder of {model}")
        for pattern in ("config.json", "*.safetensors"):
            if not any(folder.glob(pattern)):
                raise UserError(f"{folder}: has no {pattern}: correct source.folder of {model}, or complete the folder")


def _check_training(model: str, configuration: Configuration, provenance: Provenance) -> None:
    training = configuration.models[model].training
    if training.wandb_project:
        require_wandb()
    run = provenance.run(model)
    if run and (done := runs.rollouts(run)) > training.rollouts:
        raise UserError(
            f"{model}: training.rollouts is {training.rollouts} and the run {configuration.run!r} has {done} already:"
            " ask for at least as many, or give another run a name of its own (run: ...)"
        )


def require_wandb() -> None:
    """Refuse (`UserError`) to log to Weights & Biases where its package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "training.wandb_project is set, but wandb is not installed: unset the key, or run"
            " `.venv-uv/bin/uv pip install --python .venv/bin/python wandb`"
        )
