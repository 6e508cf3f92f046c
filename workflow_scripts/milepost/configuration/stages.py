"""What the results of each stage are made from: settings, code, packages, and the results of other stages."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from milepost.common import versions
from milepost.common.errors import UserError
from milepost.common.files import sha256_of
from milepost.configuration import runs
from milepost.configuration.code import digest, user_code_digest
from milepost.configuration.loading import Configuration
from milepost.configuration.schema import Dataset, Reward
from milepost.configuration.weights import BASE, run_of
from milepost.problems.selection import files_in_folder

OF_TRAINING = {"mem_fraction_static", "check_weights", "replay_routing"}  # of the engine; only a training reads them
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
)


class Parts(NamedTuple):
    """What a result is made from.

    Attributes:
        config: its slice of the settings.
        scripts: the entry script, and other files that `code_digest` must include.
        packages: those whose versions count.
        upstream: name -> (stage, the arguments that identify its result).
    """

    config: dict[str, Any]
    scripts: list[str]
    packages: tuple[str, ...]
    upstream: dict[str, tuple[str, dict[str, str]]]


class Stages:
    """The parts of every result that a configuration asks for."""

    def __init__(self, configuration: Configuration, scripts: Path):
        self._configuration = configuration
        self._scripts = scripts

    def parts(self, stage: str, **which: str) -> Parts:
        """Those of one result; ``which`` identifies it, as in `Provenance`."""
        return getattr(self, f"_{stage}")(**which)

    def _dataset(self, name: str) -> Parts:
        dataset = self._configuration.datasets[name]
        # The reward is read by what trains and evaluates: with another one the set need not be fetched again.
        config = {"dataset": dataset.model_dump(mode="json", exclude={"reward"}), "name": name}
        if dataset.folder:
            config["content"] = _contents(dataset, name)
        return Parts(config, [f"{dataset.script}.py"], (), {})

    def _download(self, model: str) -> Parts:
        settings = self._configuration.models[model]
        config = {"source": settings.source}
        if not settings.source.tiny:
            config["architecture"] = settings.architecture
        packages = versions.CONVERTING if settings.source.tiny else ()
        return Parts(config, [f"{settings.source.script}.py"], packages, {})

    def _convert(self, model: str) -> Parts:
        conversion = self._configuration.models[model].conversion
        # The tensors do not depend on the number of processes.
        config = {"conversion": conversion.model_dump(mode="json", include={"mtp_num_layers"})}
        upstream = {"download": ("download", {"model": model})}
        return Parts(config, ["convert.py"], versions.CONVERTING, upstream)

    def _train(self, model: str) -> Parts:
        settings = self._configuration.models[model]
        config = {section: getattr(settings, section) for section in TRAIN_SECTIONS}
        sets = settings.training.datasets
        graded_by = {name: _graded_by(self._configuration.reward(model, name)) for name in sets}
        config |= graded_by[sets[0]]
        if others := {name: by for name, by in graded_by.items() if by != graded_by[sets[0]]}:
            config["reward_of"] = {name: by["reward"] for name, by in others.items()}
            config["reward_code"] = {k: v for by in graded_by.values() for k, v in by.get("reward_code", {}).items()}
        config["training"] = settings.training.model_dump(mode="json", exclude={"on_code_change"})  # see `job`
        config["hardware"] = settings.hardware.model_dump(mode="json", include={"gpus", "processes"})
        if replay := settings.training.replay:
            files = runs.saved_rollouts(Path(replay).expanduser(), settings.training.rollouts)
            config["replayed"] = digest([[file.name, _content(file)] for file in files if file.is_file()])
        upstream = {
            "download": ("download", {"model": model}),
            "convert": ("convert", {"model": model}),
            **{"dataset" if len(sets) == 1 else f"dataset {name}": ("dataset", {"name": name}) for name in sets},
        }
        if settings.validation.interval:
            upstream["validation"] = ("dataset", {"name": settings.validation.dataset})
            validation = _graded_by(self._configuration.reward(model, settings.validation.dataset))
            if validation["reward"] != config["reward"]:
                config |= {f"validation_{key}": value for key, value in validation.items()}
        return Parts(config, ["train.py", engine_file(settings.engine.kind)], versions.TRAINING, upstream)

    def _export(self, model: str, weights: str | None = None) -> Parts:
        run = run_of(weights or self._configuration.run)
        upstream = {"download": ("download", {"model": model}), "train": self.training(model, run)}
        return Parts({}, ["export.py"], versions.CONVERTING, upstream)

    def _evaluate(self, model: str, dataset: str, weights: str) -> Parts:
        settings = self._configuration.models[model]
        config = {
            "evaluation": settings.evaluation.model_copy(update={"datasets": [dataset]}),
            "engine": settings.evaluation_engine.model_dump(mode="json", exclude=OF_TRAINING),
            **_graded_by(self._configuration.reward(model, dataset)),
            "hardware": {"gpus": settings.evaluation_gpus},
        }
        if weights == BASE:
            source = {"download": ("download", {"model": model})}
        else:
            source = {"export": ("export", {"model": model, "weights": weights})}
        upstream = source | {"dataset": ("dataset", {"name": dataset})}
        packages = (*versions.SAMPLING, *versions.GRADING)
        return Parts(config, ["evaluate_model.py", engine_file(settings.engine.kind)], packages, upstream)

    def _check_reward(self) -> Parts:
        rewards = [reward.model_dump(mode="json") for reward in self._configuration.rewards()]
        return Parts({"answers": self._configuration.answers, "rewards": rewards}, ["check_reward.py"], (), {})

    def _progress(self) -> Parts:
        config = {"plots": self._configuration.plots, "trainings": self._configuration.trainings}
        return Parts(config, ["make_progress.py"], (), {})

    def _tables(self) -> Parts:
        return Parts(
            {"compare": self._configuration.compare}, ["make_tables.py"], versions.STATISTICS, self._reported()
        )

    def _comparison(self) -> Parts:
        config, upstream = {"compare": self._configuration.compare}, self._reported(self._configuration.compared)
        return Parts(config, ["make_tables.py"], versions.STATISTICS, upstream)

    def _plots(self) -> Parts:
        config = {"plots": self._configuration.plots, "compare": self._configuration.compare}
        return Parts(config, ["make_plots.py"], versions.STATISTICS, self._reported())

    def _report(self) -> Parts:
        upstream = {"tables": ("tables", {}), "plots": ("plots", {})}
        folder = self._scripts / "milepost/reporting/templates"
        templates = sorted(file.relative_to(self._scripts).as_posix() for file in folder.iterdir())
        config = {"compare": self._configuration.compare}
        return Parts(config, ["make_report.py", *templates], versions.STATISTICS, upstream)

    def training(self, model: str, run: str) -> tuple[str, dict[str, str]]:
        """A stage's upstream: the run that is trained, or another one that is finished."""
        return "train", {"model": model, **({} if run == self._configuration.run else {"run": run})}

    def _reported(self, scores: list[tuple[str, str, str]] | None = None) -> dict[str, tuple[str, dict[str, str]]]:
        """The evaluations and trainings that tables, plots and report are made from, or those of some scores."""
        scores = self._configuration.evaluations if scores is None else scores
        evaluations = {
            f"evaluate {model} {dataset} {weights}": (
                "evaluate",
                {"model": model, "dataset": dataset, "weights": weights},
            )
            for model, dataset, weights in scores
        }
        trainings = self._configuration.trainings_of(scores)
        return evaluations | {f"train {model} {run}": self.training(model, run) for model, run in trainings}


def _graded_by(reward: Reward) -> dict[str, Any]:
    """A reward as part of a record: its settings and, of a user's functions, the code by file."""
    files = {function.file: user_code_digest(function.path) for function in reward.functions if function.path.is_file()}
    return {"reward": reward.model_dump(mode="json"), **({"reward_code": files} if files else {})}


def engine_file(kind: str) -> str:
    """The file of a rollout engine. It is loaded by its name at run time, so following imports does not find it."""
    return f"milepost/rollout/{kind}_engine.py"


def _contents(dataset: Dataset, name: str) -> dict[str, str] | None:
    """The digests of a local set's files by their names; None if they can't be told, as the download will say."""
    folder = Path(dataset.folder).expanduser()
    try:
        return {file: _content(folder / file) for file in files_in_folder(folder, dataset, name)}
    except (UserError, OSError):
        return None


@functools.cache
def _content(file: Path) -> str:
    return sha256_of(file)
