"""What each result depends on: its slice of the settings, its code, and the same of everything upstream.

Snakemake reruns a job when the value of one of its params changes. Every rule here has one param for that, the digest
`Provenance.key` of the record `Provenance.of`; settings that a stage does not read, comments, formatting and docstrings
are not in it, and a failed job upstream can't leave its consumers looking fresh.
"""

import ast
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from common.files import sha256_of
from configuration.loading import Configuration
from configuration.schema import Section

# A longer run, other checkpoints to keep or another look at progress continue the same training. So does less memory:
# whoever lowers it after it ran out wants the rollouts that there are.
CONTINUES = {
    "training": {
        *("rollouts", "save_interval", "keep_checkpoints", "max_bad_steps", "wandb_project"),
        *("max_tokens_per_gpu", "recompute", "log_prob_chunk"),
    },
    "engine": {"mem_fraction_static", "max_running_requests", "cuda_graph_batch_sizes"},
    "validation": None,
}
OF_TRAINING = {"mem_fraction_static", "check_weights", "replay_routing"}  # the engine's, beside a training alone
TRAIN_SECTIONS = (
    "training",
    "validation",
    "parallel",
    "algorithm",
    "optimizer",
    "mtp",
    "sampling",
    "engine",
    "experts",
    "reward",
)


class Provenance:
    """Answers for every stage what it depends on.

    Stages and what tells their results apart:
    ``dataset`` (name), ``download``, ``convert``, ``train``, ``export`` (model), ``evaluate`` (model, dataset,
    weights), ``tables``, ``plots``, ``report`` (none).
    """

    def __init__(self, configuration: Configuration, scripts: Path):
        self._configuration = configuration
        self._scripts = scripts

    @functools.cache  # noqa: B019  one instance lives as long as the process
    def of(self, stage: str, **which: str) -> dict[str, Any]:
        """The provenance of one result, which is plain JSON: ``{"code", "config", "upstream"}``."""
        config, scripts, upstream = getattr(self, f"_{stage}")(**which)
        return {
            "config": {k: v.model_dump(mode="json") if isinstance(v, Section) else v for k, v in config.items()},
            "code": code_digest(self._scripts, *scripts),
            "upstream": upstream,
        }

    def key(self, stage: str, **which: str) -> str:
        """A short digest of `of`: it changes when the result is stale, and results downstream refer to it."""
        return _digest(self.of(stage, **which))

    def work(self, model: str) -> str:
        """The name of a training's work folder: the same while the run may be continued, another otherwise."""
        record = self.of("train", model=model)
        config = {
            section: {key: value for key, value in content.items() if key not in (CONTINUES.get(section) or ())}
            for section, content in record["config"].items()
            if CONTINUES.get(section, ()) is not None
        }
        upstream = {name: key for name, key in record["upstream"].items() if not name.startswith("validation")}
        return _digest({"config": config, "code": record["code"], "upstream": upstream})

    def _dataset(self, name: str):
        dataset = self._configuration.datasets[name]
        config = {"dataset": dataset, "name": name}
        if dataset.folder:
            file = Path(dataset.folder).expanduser() / dataset.file
            config["content"] = _content(file) if file.is_file() else None  # the download says that it is missing
        return config, [f"{dataset.script}.py"], {}

    def _download(self, model: str):
        settings = self._configuration.models[model]
        config = {"source": settings.source}
        if not settings.source.tiny:
            config["architecture"] = settings.architecture
        return config, [f"{settings.source.script}.py"], {}

    def _convert(self, model: str):
        conversion = self._configuration.models[model].conversion
        return {"conversion": conversion}, ["convert.py"], {"download": self.key("download", model=model)}

    def _train(self, model: str):
        settings = self._configuration.models[model]
        config = {section: getattr(settings, section) for section in TRAIN_SECTIONS}
        config["hardware"] = settings.hardware.model_dump(mode="json", include={"gpus", "processes"})
        upstream = {
            "convert": self.key("convert", model=model),
            "dataset": self.key("dataset", name=settings.training.dataset),
        }
        if settings.validation.interval:
            upstream["validation"] = self.key("dataset", name=settings.validation.dataset)
        return config, ["train.py", engine_file(settings.engine.kind)], upstream

    def _export(self, model: str):
        return {}, ["export.py"], {"train": self.key("train", model=model)}

    def _evaluate(self, model: str, dataset: str, weights: str):
        settings = self._configuration.models[model]
        config = {
            "evaluation": settings.evaluation.model_dump(mode="json", exclude={"datasets"}),
            "engine": settings.engine.model_dump(mode="json", exclude=OF_TRAINING),
            "reward": settings.reward,
            "hardware": settings.hardware.model_dump(mode="json", include={"gpus"}),
        }
        source = "download" if weights == "base" else "export"
        upstream = {source: self.key(source, model=model), "dataset": self.key("dataset", name=dataset)}
        return config, ["evaluate.py", engine_file(settings.engine.kind)], upstream

    def _tables(self):
        return {}, ["make_tables.py", *self._templates()], self._evaluations()

    def _plots(self):
        return {"plots": self._configuration.plots}, ["make_plots.py"], self._evaluations() | self._trainings()

    def _report(self):
        return {}, ["make_report.py", *self._templates()], {"tables": self.key("tables"), "plots": self.key("plots")}

    def _templates(self) -> list[str]:
        folder = self._scripts / "reporting/templates"
        return sorted(file.relative_to(self._scripts).as_posix() for file in folder.iterdir())

    def _trainings(self) -> dict[str, str]:
        return {f"train {model}": self.key("train", model=model) for model in self._configuration.listed}

    def _evaluations(self) -> dict[str, str]:
        return {
            f"evaluate {model} {dataset} {weights}": self.key("evaluate", model=model, dataset=dataset, weights=weights)
            for model in self._configuration.listed
            for dataset in self._configuration.models[model].evaluation.datasets
            for weights in ("base", self._configuration.run)
        }


def engine_file(kind: str) -> str:
    """The one file of a rollout engine, which the code that calls it does not import by name."""
    return f"rollout/{kind}_engine.py"


@functools.cache
def code_digest(root: Path, *scripts: str) -> str:
    """Digest of the syntax trees of ``scripts`` and of every module below ``root`` that they import.

    Comments, formatting and docstrings do not count. ``configuration`` is left out: what it decides is in the slice.
    """
    waiting, trees = [root / script for script in scripts], {}
    while waiting:
        file = waiting.pop()
        if file in trees or file.relative_to(root).parts[0] == "configuration":
            continue
        trees[file], imported = _read(root, file)
        waiting += imported
    return _digest(sorted((file.relative_to(root).as_posix(), tree) for file, tree in trees.items()))


@functools.cache
def _read(root: Path, file: Path) -> tuple[str, list[Path]]:
    """Digest of one module's syntax tree, and the files below ``root`` that it imports, their packages included.

    Of a file in another language every byte counts.
    """
    if file.suffix != ".py":
        return hashlib.sha256(file.read_bytes()).hexdigest(), []
    tree = _without_docstrings(ast.parse(file.read_bytes(), filename=str(file)))
    package, names = file.relative_to(root).parent.parts, set()
    for node in ast.walk(tree):  # what is imported inside functions, too
        if isinstance(node, ast.Import):
            names.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            names.update((*module, alias.name) for alias in node.names)  # a module, or a name in the one before
    files = []
    for name in names:
        for depth in range(1, len(name) + 1):
            path = root.joinpath(*name[:depth])
            files += [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return _digest(ast.dump(tree)), files


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return tree


@functools.cache
def _content(file: Path) -> str:
    return sha256_of(file)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
