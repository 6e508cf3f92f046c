"""Validate the settings in the YAML files and on the command line; the result is one `Configuration`.

The settings of one model come in layers. Each layer overrides those before it:

1. ``config/config.yaml``: the sections that all models share;
2. ``config/local.yaml``, if the user has one: the same sections, changed without editing a tracked file;
3. the model's own file, ``config/models/<model>.yaml`` or one in the user's ``models_folder``;
4. ``per_model: {<model>: ...}`` in config.yaml, then in local.yaml;
5. each ``--configfile``, then ``--config``: first its shared sections, then its ``per_model``.

So later layers always win, and within one file or command line ``per_model`` wins over the shared sections.
`configuration.layers` reads and merges them. Every error is a one-line `UserError` that names the file, the key, the
value and what is allowed.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from milepost.common.errors import UserError
from milepost.configuration import layout
from milepost.configuration.layers import (
    Layer,
    culprit,
    merge_layers,
    origin_of,
    read_layer,
    read_yaml,
    shown_path,
    value_at,
)
from milepost.configuration.rewards import Labels
from milepost.configuration.schema import NAME, Dataset, Model, Plots, Reward, Root
from milepost.configuration.weights import BASE, LAST, finished_runs, run_of

SHARED = tuple(name for name in Model.model_fields if name not in ("source", "architecture"))
TAKEN = {  # names of targets (train_all) and of the folders beside the models' own
    *("all", "data", "hub", "jobs", "logs", "benchmarks", "caches", "tables", "plots"),
}
EXPECTED = {  # replaces pydantic's messages about Python types
    "model_type": "a section of settings is expected",
    "dict_type": "a section of settings is expected",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
}


@dataclass(frozen=True)
class Configuration:
    """All settings, checked.

    Attributes:
        listed: the models that the ``*_all`` targets and the report cover.
        run: the name of the training run.
        results: the folder that all results go to.
        preflight: whether to refuse jobs that do not seem to fit this machine, or only to warn.
        datasets: name -> where a problem set comes from.
        models: name -> settings, one for each valid file in config/models/ and in the user's ``models_folder``.
        faults: name -> the error in a model that is not listed; it is raised only if that model is used.
        plots: the style of the plots.
        answers: the file that check_reward grades.
        runs: the weights of finished runs that are shown beside those of ``run``.
        compare: pairs of (model, weights) to compare.
        origins: where the user wrote ``runs`` and ``compare``, which are checked when a target needs them.
    """

    listed: list[str]
    run: str
    results: str
    preflight: Literal["refuse", "warn"]
    datasets: dict[str, Dataset]
    models: dict[str, Model]
    faults: dict[str, str]
    plots: Plots
    answers: str | None
    runs: list[str]
    compare: list[tuple[tuple[str, str], tuple[str, str]]]
    origins: dict[str, str]

    @property
    def covered(self) -> list[str]:
        """The models that tables, plots and report are about: those listed, and those compared with them."""
        return list(dict.fromkeys([*self.listed, *(model for pair in self.compare for model, _ in pair)]))

    @property
    def scored(self) -> set[str]:
        """The problem sets that covered models are evaluated or validated on; every row of these must be usable."""
        return set().union(*(self.models[name].scored_sets for name in self.covered))

    def reward(self, model: str, dataset: str) -> Reward:
        """The reward for a model's responses to a problem set: the set's own if it has one, else the model's."""
        return self.datasets[dataset].reward or self.models[model].reward

    def rewards(self) -> list[Reward]:
        """The distinct rewards that grade covered models' responses."""
        used = [
            self.reward(name, dataset) for name in self.covered for dataset in sorted(self.models[name].problem_sets)
        ]
        return [reward for number, reward in enumerate(used) if reward not in used[:number]]

    def labels(self, dataset: str) -> Labels:
        """How to read the labels of a problem set when it is fetched: by the least strict reward that grades it."""
        read = {
            self.reward(name, dataset).labels for name, model in self.models.items() if dataset in model.problem_sets
        }
        return next((labels for labels in ("any", "exact", "choice") if labels in read), "math")

    def trained(self, model: str) -> str:
        """The name of the weights that export_X and eval_X make: of the run's checkpoint that ``export`` names."""
        checkpoint = self.models[model].export.checkpoint
        return self.run if checkpoint == LAST else f"{self.run}@{checkpoint}"

    def has_run(self, model: str, run: str) -> bool:
        """Whether a run is the one to train, or one that is finished."""
        return run == self.run or run in finished_runs(self.results, model)

    def shown(self, model: str) -> list[str]:
        """The weights of a listed model that tables, plots and report show."""
        further = [weights for weights in self.runs if self.has_run(model, run_of(weights))]
        return list(dict.fromkeys([BASE, self.trained(model), *further]))

    def shared_sets(self, *models: str) -> list[str]:
        """The problem sets that all of these models are evaluated on."""
        first, *others = (self.models[model].evaluation.datasets for model in models)
        return [name for name in first if all(name in sets for sets in others)]

    @property
    def evaluations(self) -> list[tuple[str, str, str]]:
        """(model, dataset, weights) of each score in tables, plots and report, in their order."""
        listed = [
            (model, dataset, weights)
            for model in self.listed
            for dataset in self.models[model].evaluation.datasets
            for weights in self.shown(model)
        ]
        return list(dict.fromkeys([*listed, *self.compared]))

    @property
    def compared(self) -> list[tuple[str, str, str]]:
        """(model, dataset, weights) of each score that ``compare`` asks for."""
        scores = [
            (model, dataset, weights)
            for pair in self.compare
            for dataset in self.shared_sets(*(model for model, _ in pair))
            for model, weights in pair
        ]
        return list(dict.fromkeys(scores))

    @staticmethod
    def trainings_of(evaluations: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
        """(model, run) of each training whose weights are scored."""
        scored = [(model, run_of(weights)) for model, _, weights in evaluations if weights != BASE]
        return list(dict.fromkeys(scored))

    @property
    def trainings(self) -> list[tuple[str, str]]:
        """(model, run) of each training in tables, plots and report."""
        return self.trainings_of(self.evaluations)


def load(
    shared: Path, models_folder: Path, user: Sequence[Layer] | dict[str, Any], local: Path | None = None
) -> Configuration:
    """Read and validate all settings.

    Args:
        shared: config/config.yaml.
        models_folder: config/models, one file per model.
        user: the layers of the command line (`user_layers`), or a mapping in place of ``--config``.
        local: config/local.yaml, read if it exists.
    """
    kept = [read_layer(shared)]
    if local and local.exists():
        kept.append(read_layer(local))
    if isinstance(user, dict):
        user = [Layer("--config", user)]
    root = _check(Root, [*kept, *user], kept[0])
    files = _model_files(models_folder, root.models_folder, origin_of([*kept, *user], ("models_folder",)))
    compare = [tuple(tuple(weights.split("/")) for weights in pair) for pair in root.compare]
    compared = [model for pair in compare for model, _ in pair]
    for key in [
        *(("models", name) for name in root.models),
        *(("per_model", name) for name in root.per_model),
        *(("compare", name) for name in compared),
    ]:
        if key[1] not in files:
            raise UserError(
                f"{origin_of([*kept, *user], key)}: {key[0]}: unknown model {key[1]!r}{nearest(key[1], files)}"
            )
    models, faults = {}, {}
    for name, (origin, file) in files.items():
        try:
            models[name] = _model(name, Layer(origin, read_yaml(file, origin)), kept, user, root.datasets)
        except UserError as error:
            if name in (*root.models, *compared):
                raise
            faults[name] = str(error)
    return Configuration(
        listed=root.models,
        run=root.run,
        results=root.results,
        preflight=root.preflight,
        datasets=root.datasets,
        models=models,
        faults=faults,
        plots=root.plots,
        answers=root.answers,
        runs=root.runs,
        compare=compare,
        origins={key: origin_of([*kept, *user], (key,)) for key in ("runs", "compare")},
    )


def _model_files(shipped: Path, own: str | None, origin: str) -> dict[str, tuple[str, Path]]:
    """Name -> (the path that errors show, the file), from config/models/ and from the user's ``models_folder``."""
    files = {file.stem: (shown_path(file), file) for file in sorted(shipped.glob("*.yaml"))}
    if own is not None:
        folder = Path(own).expanduser()
        if not folder.is_dir():
            raise UserError(f"{origin}: models_folder: no such folder: {own}: create it, or correct the path")
        for file in sorted(folder.glob("*.yaml")):
            if file.stem in files:
                raise UserError(
                    f"{Path(own, file.name)}: {files[file.stem][0]} defines the model {file.stem!r} already: give this"
                    f" file another name, or change single settings with per_model: {{{file.stem}: ...}}"
                )
            files[file.stem] = str(Path(own, file.name)), file
    for name, (known_as, _) in files.items():
        if name in TAKEN or not re.match(NAME, name):
            raise UserError(f"{known_as}: a model can't be called {name!r}: give the file another name")
    return files


def _model(name: str, own: Layer, kept: Sequence[Layer], user: Sequence[Layer], datasets: dict[str, Dataset]) -> Model:
    """The settings of one model.

    Args:
        own: the model's file.
        kept: config.yaml, and local.yaml if there is one.
        user: the layers of the command line.
    """

    def shared(layer: Layer) -> Layer:
        return Layer(layer.origin, {key: layer.content[key] for key in SHARED if key in layer.content})

    def particular(layer: Layer) -> list[Layer]:
        settings = (layer.content.get("per_model") or {}).get(name)
        return [] if settings is None else [Layer(f"{layer.origin}: per_model: {name}", settings)]

    layers = [*map(shared, kept), own]
    layers += [part for layer in kept for part in particular(layer)]
    layers += [part for layer in user for part in (shared(layer), *particular(layer))]
    model = _check(Model, layers, own)
    if fault := layout.fault(model):
        where = culprit(layers, own, lambda content: layout.fault(Model.model_validate(content)) is not None)
        where = where or f"{origin_of(layers, tuple(fault.key.split('.')))}: {fault.key}"
        said = fault.message if where.endswith(f": {fault.key}") else str(fault)
        raise UserError(f"{where}: {said} (of {name}; settings of one model alone belong to per_model)")
    for key, names in (
        (("training", "dataset"), model.training.datasets),
        (("validation", "dataset"), [model.validation.dataset]),
        (("evaluation", "datasets"), model.evaluation.datasets),
    ):
        for dataset in names:
            if dataset not in datasets:
                where = f"{origin_of(layers, key)}: {'.'.join(key)}"
                raise UserError(f"{where}: unknown dataset {dataset!r}{nearest(dataset, datasets)}")
    return model


def _check(kind: type[BaseModel], layers: Sequence[Layer], own: Layer) -> Any:
    """Merge the layers and validate them as a ``kind``; ``own`` is the layer that a missing key belongs in."""
    merged = merge_layers(layers)
    # The shared sections are validated as part of each model.
    if kind is Root:
        merged = {key: value for key, value in merged.items() if key not in SHARED}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = _written(first["loc"], merged) if first["type"] != "missing" else tuple(map(str, first["loc"]))
        known = [*kind.model_fields, *(SHARED if kind is Root else ())] if len(key) == 1 else _keys(kind, key[:-1])
        origin = _home(layers, key, own) if first["type"] == "missing" else origin_of(layers, key)
        raise UserError(f"{origin}: {'.'.join(key) or kind.__name__}: {_say(first, key, known)}") from None


def _home(layers: Sequence[Layer], key: tuple[str, ...], own: Layer) -> str:
    """Where a missing key belongs: in config.yaml if its section is shared, else in the layer that has its section."""
    *section, _ = key
    if key[0] in SHARED and len(section) < 2:
        return layers[0].origin
    began = [layer.origin for layer in layers if section and isinstance(value_at(layer.content, section), dict)]
    return [*began, own.origin][0]


def _written(place: tuple[int | str, ...], content: Any) -> tuple[str, ...]:
    """The key as the user wrote it: pydantic's location without the type names that it adds for unions."""
    key: list[str] = []
    for part in place:
        try:
            content = content[part]
        except (LookupError, TypeError):
            break
        key.append(str(part))
    return tuple(key)


def _say(error: dict[str, Any], key: tuple[str, ...], known: list[str]) -> str:
    if error["type"] == "extra_forbidden":
        homes = [section for section in SHARED if len(key) == 1 and key[0] in _keys(Model, (section,))]
        return f"unknown key, did you mean {homes[0]}.{key[0]}?" if homes else f"unknown key{nearest(key[-1], known)}"
    if error["type"] == "missing":
        return "missing: it has no default, so give it here"
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float | date):
        return f"text is expected, and {error['input']!s} is none: begin it with a letter, or quote it in a file"
    message = EXPECTED.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    shown = error["input"]
    of_the_whole = error["type"] == "value_error" and isinstance(shown, list)
    says_it = error["type"] == "too_short" or of_the_whole or isinstance(shown, dict | BaseModel)
    return message if says_it else f"{message}, not {shown!r}"


def _keys(kind: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The known keys of the section at ``path``."""
    for part in path:
        if part in kind.model_fields:
            annotation = kind.model_fields[part].annotation
            options = [annotation, *get_args(annotation)]
            kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), kind)
    return list(kind.model_fields)


def nearest(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'rollouts'?``: the entry of ``known`` that is closest to ``name``, or all if none is close."""
    known = [*known]
    short = [key for key in known if key.startswith(name) or "".join(word[0] for word in key.split("_")) == name]
    close = short or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
