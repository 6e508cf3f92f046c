"""From the YAML files and the command line to one checked `Configuration`.

What one model is trained with comes from four layers, each laid over the one before:

1. the sections that all models share, in ``config/config.yaml``;
2. the model's own file, ``config/models/<model>.yaml``;
3. what the user gives with ``--configfile``, each over the one before, and with ``--config``;
4. the section ``per_model: {<model>: ...}``, wherever it is given.

Every fault is a `UserError` of one line that names the file, the key, the value and what is allowed.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from milepost.common.errors import UserError
from milepost.configuration import layout
from milepost.configuration.rewards import Labels
from milepost.configuration.schema import NAME, Dataset, Model, ModelSource, Plots, Reward, Root

# Keys that take one another's place: where something is from, and what a reward is.
ALTERNATIVES = (frozenset(ModelSource.places + Dataset.places), frozenset(Reward.ways))
RETYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
SHARED = tuple(name for name in Model.model_fields if name not in ("source", "architecture"))
TAKEN = {  # by targets, or by what lies beside the models' results
    *("all", "data", "hub", "jobs", "logs", "benchmarks", "caches", "tables", "plots"),
}
EXPECTED = {  # where pydantic's own words are about Python
    "model_type": "a section of settings is expected",
    "dict_type": "a section of settings is expected",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
}


@dataclass(frozen=True)
class Layer:
    """One source of settings: where it is written, and what it says."""

    origin: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """All settings, checked.

    Attributes:
        listed: the models that ``*_all`` targets and the report cover.
        run: the name of the training run.
        results: the folder of everything that is made.
        preflight: whether a run that this machine seems too small for is refused, or warned of.
        datasets: name -> where a problem set comes from.
        models: name -> settings, for every file in config/models/.
        faults: name -> what is wrong with a model that is not listed; using it is an error, not using it is none.
        plots: how plots look.
        answers: the file that check_reward grades.
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

    @property
    def scored(self) -> set[str]:
        """The problem sets that listed models are evaluated or validated on: every row of them is needed."""
        models = [self.models[name] for name in self.listed]
        validated = {model.validation.dataset for model in models if model.validation.interval}
        return validated.union(*(model.evaluation.datasets for model in models))

    def reward(self, model: str, dataset: str) -> Reward:
        """What a model's responses to a problem set are graded by: the set's own reward, or else the model's."""
        return self.datasets[dataset].reward or self.models[model].reward

    def rewards(self) -> list[Reward]:
        """Each reward that grades a listed model's responses, once."""
        used = [self.reward(name, dataset) for name in self.listed for dataset in sorted(_sets(self.models[name]))]
        return [reward for number, reward in enumerate(used) if reward not in used[:number]]

    def labels(self, dataset: str) -> Labels:
        """How the labels of a problem set are read while it is fetched: by the least strict reward that grades it."""
        read = {self.reward(name, dataset).labels for name, model in self.models.items() if dataset in _sets(model)}
        return next((labels for labels in ("any", "exact", "choice") if labels in read), "math")


def _sets(model: Model) -> set[str]:
    """The problem sets that a model is trained, validated and evaluated on."""
    validated = [model.validation.dataset] if model.validation.interval else []
    return {model.training.dataset, *validated, *model.evaluation.datasets}


def load(shared: Path, models_folder: Path, user: Sequence[Layer] | dict[str, Any]) -> Configuration:
    """Read and check everything.

    Args:
        shared: config/config.yaml.
        models_folder: config/models, one file a model.
        user: the user's own settings (`user_layers`), or a mapping of what ``--config`` alone says.
    """
    base = Layer(_name(shared), read_yaml(shared))
    if isinstance(user, dict):
        user = [Layer("--config", user)]
    root = _check(Root, [base, *user], base)
    known = {file.stem: file for file in sorted(models_folder.glob("*.yaml"))}
    for name, file in known.items():
        if name in TAKEN or not re.match(NAME, name):
            raise UserError(f"{_name(file)}: a model can't be called {name!r}: give the file another name")
    for key in [*(("models", name) for name in root.models), *(("per_model", name) for name in root.per_model)]:
        if key[1] not in known:
            raise UserError(
                f"{_origin([base, *user], key)}: {key[0]}: unknown model {key[1]!r}{nearest(key[1], known)}"
            )
    models, faults = {}, {}
    for name, file in known.items():
        try:
            models[name] = _model(name, Layer(_name(file), read_yaml(file)), base, user, root.datasets)
        except UserError as error:
            if name in root.models:
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
    )


def user_layers(files: Sequence[Path], given: dict[str, Any], folder: Path | None = None) -> list[Layer]:
    """The user's ``--configfile``, each over the one before, and over them ``given``, Snakemake's ``--config``.

    Files below ``folder``, where the user is, are called by their path from there.

    What stands within something in ``--config`` Snakemake leaves as text: it is read as YAML would read it.
    """

    def typed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: typed(content) for key, content in value.items()}
        if isinstance(value, list):
            return [typed(content) for content in value]
        plain = isinstance(value, str) and yaml.resolver.Resolver().resolve(yaml.ScalarNode, value, (True, False))
        return yaml.safe_load(value) if value and plain in RETYPED else value

    layers = [
        Layer(str(file.relative_to(folder) if folder and file.is_relative_to(folder) else file), read_yaml(file))
        for file in files
    ]
    content = {key: typed(value) if isinstance(value, dict | list) else value for key, value in given.items()}
    return [*layers, Layer("--config", content)] if content else layers


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; anything else is a `UserError`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping of settings is expected, not {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML takes the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"a second {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _model(name: str, own: Layer, base: Layer, user: Sequence[Layer], datasets: dict[str, Dataset]) -> Model:
    def shared(layer: Layer) -> Layer:
        return Layer(layer.origin, {key: layer.content[key] for key in SHARED if key in layer.content})

    layers = [shared(base), own, *map(shared, user)]
    for layer in (base, *user):
        particular = (layer.content.get("per_model") or {}).get(name)
        if particular is not None:
            layers.append(Layer(f"{layer.origin}: per_model: {name}", particular))
    model = _check(Model, layers, own)
    if fault := layout.fault(model):
        where = _culprit(layers, lambda content: layout.fault(Model.model_validate(content)) is not None)
        where = where or f"{_origin(layers, tuple(fault.key.split('.')))}: {fault.key}"
        said = fault.message if where.endswith(f": {fault.key}") else str(fault)
        raise UserError(f"{where}: {said} (of {name}; settings of one model alone belong to per_model)")
    for key, names in (
        (("training", "dataset"), [model.training.dataset]),
        (("validation", "dataset"), [model.validation.dataset]),
        (("evaluation", "datasets"), model.evaluation.datasets),
    ):
        for dataset in names:
            if dataset not in datasets:
                raise UserError(
                    f"{_origin(layers, key)}: {'.'.join(key)}: unknown dataset {dataset!r}{nearest(dataset, datasets)}"
                )
    return model


def _check(kind: type[BaseModel], layers: list[Layer], home: Layer) -> Any:
    """All layers as one ``kind``; what is missing is ``home``'s to say."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer.content)
    # The root holds the shared sections too; they are checked once for each model.
    if kind is Root:
        merged = {key: value for key, value in merged.items() if key not in SHARED}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = _written(first["loc"], merged) if first["type"] != "missing" else tuple(map(str, first["loc"]))
        known = [*kind.model_fields, *(SHARED if kind is Root else ())] if len(key) == 1 else _keys(kind, key[:-1])
        origin = home.origin if first["type"] == "missing" else _origin(layers, key)
        raise UserError(f"{origin}: {'.'.join(key) or kind.__name__}: {_say(first, key, known)}") from None


def _culprit(layers: list[Layer], is_wrong: Callable[[dict[str, Any]], bool]) -> str | None:
    """The layer with which settings that fit until then become wrong, and the one key of it that does it.

    Settings that do not fit together were all written by somebody: to blame is who wrote last. None where the project's
    own files are wrong already, or are not whole without the user's.
    """

    def wrong(layers: list[Layer]) -> bool:
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = merge(merged, layer.content)
        return is_wrong(merged)

    try:
        for count in range(2, len(layers)):
            if wrong(layers[:count]):
                return None
            layer = layers[count]
            if wrong(layers[: count + 1]):
                for key in _leaves(layer.content):
                    if not wrong([*layers[:count], Layer(layer.origin, _without(layer.content, key))]):
                        return f"{layer.origin}: {'.'.join(key)}"
                return layer.origin
    except ValidationError:
        pass
    return None


def _leaves(content: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of all values that are no sections."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key)


def _without(content: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = key
    if not rest:
        return {name: value for name, value in content.items() if name != first}
    return content | {first: _without(content[first], tuple(rest))}


def _written(place: tuple[int | str, ...], content: Any) -> tuple[str, ...]:
    """The key of a fault without what pydantic adds of its own: which of several types it tried."""
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
        return "missing"
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


def _origin(layers: list[Layer], key: tuple[str, ...]) -> str:
    """Where the value at ``key`` was written last."""
    for depth in range(len(key), 0, -1):
        for layer in reversed(layers):
            content: Any = layer.content
            for part in key[: depth - 1]:
                content = content.get(part) if isinstance(content, dict) else None
            if isinstance(content, dict) and key[depth - 1] in content:
                return layer.origin
    return layers[0].origin


def nearest(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'rollouts'?``: the one of ``known`` that ``name`` stands for; a list of them where none does."""
    known = [*known]
    short = [key for key in known if key.startswith(name) or "".join(word[0] for word in key.split("_")) == name]
    close = short or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _name(path: Path) -> str:
    """A configuration file as the user knows it: config/config.yaml, config/models/9B.yaml."""
    return path.as_posix()[path.as_posix().rfind("config/") :] if "config/" in path.as_posix() else path.name


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``: mappings are merged, everything else is replaced. Neither is changed.

    A source (``source``, or an entry of ``datasets``) names one place, so naming another place drops the first one. A
    reward is one kind, function or sum likewise.
    """
    result = copy.copy(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            replaced = {name for keys in ALTERNATIVES if keys & value.keys() for name in keys - value.keys()}
            old = {name: content for name, content in old.items() if name not in replaced}
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result
