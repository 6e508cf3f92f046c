"""Find mistakes before the first job starts, in a run and in a dry run alike.

`configuration.preflight` checks the machine, in real runs only.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from milepost.checkpoints.inspection import Inspection
from milepost.common.contents import content_of
from milepost.common.errors import UserError
from milepost.configuration import runs
from milepost.configuration.loading import Configuration, nearest
from milepost.configuration.provenance import Provenance
from milepost.configuration.rewards import Function, Reward
from milepost.configuration.schema import Dataset
from milepost.configuration.weights import checkpoint_of, run_of, train_manifest
from milepost.problems.loading import load_problem_set
from milepost.problems.selection import files_in_folder

FIRST_ROWS = 20_000  # of a local problem set, read in less than a second; the dataset step reads all

Job = tuple[str, dict[str, str]]  # its rule, its wildcards


def mistyped(targets: Iterable[str], rules: Sequence[str], said: str) -> str:
    """The error for an unknown target, if that is what Snakemake ``said``; otherwise an empty text."""
    for target in targets:
        if f"No rule to produce {target} " in said and target not in rules:
            close = nearest(target, rules).partition(";")[0]  # without the list of all rules
            return f"nothing makes {target!r}{close}: snakemake --list-target-rules lists the targets"
    return ""


def check_inputs(jobs: Sequence[Job], configuration: Configuration, provenance: Provenance) -> None:
    """Refuse (`UserError`) jobs that would fail because of the user's files or settings.

    Args:
        jobs: every job that is about to run.
    """

    @functools.cache  # many jobs may read one set, which may be large
    def check_rows(dataset: str, max_bad_share: float, labels: str) -> None:
        _check_rows(dataset, configuration.datasets[dataset], max_bad_share, labels)

    def labels_of(model: str, dataset: str) -> str:
        """How the reward of a model's responses reads labels, once the reward's own files are checked."""
        reward = configuration.reward(model, dataset)
        check_functions(reward)
        return reward.labels

    for rule, wildcards in jobs:
        if rule == "dataset":
            dataset = configuration.datasets[wildcards["name"]]
            check_rows(wildcards["name"], dataset.max_bad_share, configuration.labels(wildcards["name"]))
        elif rule == "download":
            _check_folder(wildcards["model"], configuration)
        elif rule == "train":
            settings = configuration.models[wildcards["model"]]
            for name in settings.training.datasets:
                labels = labels_of(wildcards["model"], name)
                check_rows(name, configuration.datasets[name].max_bad_share, labels)
            if settings.validation.interval:
                labels = labels_of(wildcards["model"], settings.validation.dataset)
                check_rows(settings.validation.dataset, 0.0, labels)
            _check_training(wildcards["model"], configuration, provenance)
        elif rule == "export":
            _check_checkpoint(wildcards["model"], wildcards["weights"], configuration, provenance)
        elif rule == "evaluate":
            check_rows(wildcards["dataset"], 0.0, labels_of(wildcards["model"], wildcards["dataset"]))
        elif rule == "check_reward":
            for reward in configuration.rewards():
                check_functions(reward)
            if configuration.answers is None:
                raise UserError("give the file of answers to grade: --config 'answers=answers.jsonl'")


def _check_rows(name: str, dataset: Dataset, max_bad_share: float, labels: str) -> None:
    """Check the rows of a local set, the first of a large one; a score needs every row, training tolerates bad ones."""
    if dataset.folder:
        folder = Path(dataset.folder).expanduser()
        files = files_in_folder(folder, dataset, name)
        load_problem_set(folder, files, dataset, labels, max_bad_share=max_bad_share, at_most=FIRST_ROWS)


def check_functions(reward: Reward) -> None:
    """`check_function` of each of a reward's functions."""
    for function in reward.functions:
        check_function(function)


def check_function(function: Function) -> None:
    """Refuse (`UserError`) a function whose file is missing, can't be parsed, or does not define it."""
    try:
        tree = ast.parse(function.path.read_bytes(), filename=function.file)
    except OSError:
        raise UserError(f"{function.path}: no such file: correct reward.function {function}") from None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{function.file}{line}: {getattr(error, 'msg', error)}: correct the file") from None
    names = dict(_bound_at_top(tree.body))
    if function.name not in names and "*" not in names:
        functions = [name for name, node in names.items() if isinstance(node, ast.FunctionDef)]
        raise UserError(f"{function.file}: has no function {function.name!r}{nearest(function.name, functions)}")
    if isinstance(names.get(function.name), ast.AsyncFunctionDef | ast.ClassDef):
        raise UserError(f"{function.file}: {function.name!r} is not a plain function: define it with `def`")


def _bound_at_top(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a module's statements define, each with its statement, including those in an `if` or `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _bound_at_top(getattr(node, block, ()))


def _check_folder(model: str, configuration: Configuration) -> None:
    settings = configuration.models[model]
    if settings.source.folder:
        folder = Path(settings.source.folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: correct source.folder of {model}")
        Inspection(settings.architecture, settings.uses_mtp).check_folder(folder)


def _check_training(model: str, configuration: Configuration, provenance: Provenance) -> None:
    training = configuration.models[model].training
    if training.wandb_project:
        require_wandb()
    if training.replay:
        files = runs.saved_rollouts(Path(training.replay).expanduser(), training.rollouts)
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(
                f"{missing[0]}: no such rollout: correct training.replay of {model}, or lower training.rollouts to what"
                " it holds"
            )
    run = provenance.run(model)
    if run and (done := runs.rollouts(run)) > training.rollouts:
        raise UserError(
            f"{model}: training.rollouts is {training.rollouts} and the run {configuration.run!r} has {done} already:"
            " ask for at least as many, or give another run a name of its own (run: ...)"
        )


def _check_checkpoint(model: str, weights: str, configuration: Configuration, provenance: Provenance) -> None:
    """Of a run that is finished and not to be trained further."""
    run = run_of(weights)
    if (trained := provenance.training(model, run)).fresh:
        manifest, download = (
            train_manifest(configuration.results, model, run),
            provenance.state("download", model=model),
        )
        runs.checkpoint_name(manifest.parent / trained.made["root"], trained.made["facts"], checkpoint_of(weights))
        if download.fresh:
            runs.require_same_start(manifest, trained.made["provenance"], content_of(download.made))


def require_wandb() -> None:
    """Refuse (`UserError`) to log to Weights & Biases if its package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "training.wandb_project is set, but wandb is not installed: unset the key, or run"
            " `.venv-uv/bin/uv pip install --python .venv/bin/python wandb`"
        )
