"""Read the YAML files and the command line, and check them: the result is one `Configuration`.

The settings of one model come in layers. Each layer overrides those before it:

1. ``config/config.yaml``: the sections that all models share;
2. ``config/local.yaml``, if the user has one: the same sections, changed without editing a tracked file;
3. the model's own file, ``config/models/<model>.yaml`` or one in the user's ``models_folder``;
4. ``per_model: {<model>: ...}`` in config.yaml, then in local.yaml;
5. each ``--configfile``, then ``--config``: first its shared sections, then its ``per_model``.

So what is given later always wins, and within one file or command line ``per_model`` wins over the shared sections.
Every error is a `UserError` of one line that names the file, the key, the value and what is allowed.
"""

import copy
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from milepost.common.errors import UserError
from milepost.configuration import layout
from milepost.configuration.rewards import Labels
from milepost.configuration.schema import NAME, Dataset, Model, ModelSource, Plots, Reward, Root

# Keys that take one another's place: where something is from, which of its files count, and what a reward is.
ALTERNATIVES = (
    tuple({place} for place in {*ModelSource.places, *Dataset.places}),
    ({"file"}, {"subset", "split"}),
    tuple({way} for way in Reward.ways),
)
RETYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
SEXAGESIMAL = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float")}  # numbers with colons
SHARED = tuple(name for name in Model.model_fields if name not in ("source", "architecture"))
TAKEN = {  # names of targets (train_all), and of folders that lie beside those of the models
    *("all", "data", "hub", "jobs", "logs", "benchmarks", "caches", "tables", "plots"),
}
EXPECTED = {  # our words where pydantic's own speak of Python types
    "model_type": "a section of settings is expected",
    "dict_type": "a section of settings is expected",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
}


@dataclass(frozen=True)
class Layer:
    """Settings from one source: where they are written, and what they say."""

    origin: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """All settings, checked.

    Attributes:
        listed: the models that the ``*_all`` targets and the report cover.
        run: the name of the training run.
        results: the folder that all results go to.
        preflight: whether to refuse jobs that this machine seems too small for, or only to warn.
        datasets: name -> where a problem set comes from.
        models: name -> settings, one for every file in config/models/ and in the user's ``models_folder``.
        faults: name -> the error in a model that is not listed; it is raised only when that model is used.
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
        """The problem sets that listed models are evaluated or validated on: each row of these must be usable."""
        return set().union(*(self.models[name].scored_sets for name in self.listed))

    def reward(self, model: str, dataset: str) -> Reward:
        """What a model's responses to a problem set are graded by: the set's own reward, or else the model's."""
        return self.datasets[dataset].reward or self.models[model].reward

    def rewards(self) -> list[Reward]:
        """Each reward that grades a listed model's responses, once."""
        used = [
            self.reward(name, dataset) for name in self.listed for dataset in sorted(self.models[name].problem_sets)
        ]
        return [reward for number, reward in enumerate(used) if reward not in used[:number]]

    def labels(self, dataset: str) -> Labels:
        """How the labels of a problem set are read while it is fetched: by the least strict reward that grades it."""
        read = {
            self.reward(name, dataset).labels for name, model in self.models.items() if dataset in model.problem_sets
        }
        return next((labels for labels in ("any", "exact", "choice") if labels in read), "math")


def load(
    shared: Path, models_folder: Path, user: Sequence[Layer] | dict[str, Any], local: Path | None = None
) -> Configuration:
    """Read and check everything.

    Args:
        shared: config/config.yaml.
        models_folder: config/models, one file per model.
        user: what the command line gives (`user_layers`), or a mapping that stands for ``--config``.
        local: config/local.yaml, read if it exists.
    """
    kept = [_layer(shared)]
    if local and local.exists():
        kept.append(_layer(local))
    if isinstance(user, dict):
        user = [Layer("--config", user)]
    root = _check(Root, [*kept, *user], kept[0])
    files = _model_files(models_folder, root.models_folder, _origin([*kept, *user], ("models_folder",)))
    for key in [*(("models", name) for name in root.models), *(("per_model", name) for name in root.per_model)]:
        if key[1] not in files:
            raise UserError(
                f"{_origin([*kept, *user], key)}: {key[0]}: unknown model {key[1]!r}{nearest(key[1], files)}"
            )
    models, faults = {}, {}
    for name, (origin, file) in files.items():
        try:
            models[name] = _model(name, Layer(origin, read_yaml(file, origin)), kept, user, root.datasets)
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


def _layer(file: Path) -> Layer:
    return Layer(_name(file), read_yaml(file, _name(file)))


def _model_files(shipped: Path, own: str | None, origin: str) -> dict[str, tuple[str, Path]]:
    """Name -> (the path as the user knows it, the file), of config/models/ and of the user's ``models_folder``."""
    files = {file.stem: (_name(file), file) for file in sorted(shipped.glob("*.yaml"))}
    if own is not None:
        folder = Path(own).expanduser()
        if not folder.is_dir():
            raise UserError(f"{origin}: models_folder: no such folder: {own}")
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


def user_layers(files: Sequence[Path], given: dict[str, Any], folder: Path | None = None) -> list[Layer]:
    """The settings of each ``--configfile``, in order, and then of ``--config``.

    Args:
        files: the files that ``--configfile`` names.
        given: what Snakemake made of ``--config``. It leaves nested values as text; they are read as YAML reads them.
        folder: where the user runs Snakemake: files below it are named by their path from there.
    """

    def typed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: typed(content) for key, content in value.items()}
        if isinstance(value, list):
            return [typed(content) for content in value]
        plain = isinstance(value, str) and _Loader("").resolve(yaml.ScalarNode, value, (True, False))
        return yaml.load(value, _Loader) if value and plain in RETYPED else value

    layers = [
        Layer(str(file.relative_to(folder) if folder and file.is_relative_to(folder) else file), read_yaml(file))
        for file in files
    ]
    content = {key: typed(value) if isinstance(value, dict | list) else value for key, value in given.items()}
    return [*layers, Layer("--config", content)] if content else layers


def read_yaml(path: Path, origin: str | None = None) -> dict[str, Any]:
    """The settings in a YAML file, which errors call ``origin``; a file of nothing but comments has none."""
    origin = origin or str(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{origin}: no such file") from None
    except OSError as error:
        raise UserError(f"{origin}: can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{origin}: a mapping of settings is expected, not {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML silently keeps the last, and takes 10:50 as text.

    YAML 1.1 reads that as sixty times ten and fifty; `rows: 10:50` is a part of a data set.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, re.compile(f"(?!.*:){regex.pattern}", regex.flags) if tag in SEXAGESIMAL else regex)
            for tag, regex in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"a second {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _model(name: str, own: Layer, kept: Sequence[Layer], user: Sequence[Layer], datasets: dict[str, Dataset]) -> Model:
    """The settings of one model.

    Args:
        own: the model's file.
        kept: config.yaml, and local.yaml if there is one.
        user: what the command line gives.
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
        where = _culprit(layers, own, lambda content: layout.fault(Model.model_validate(content)) is not None)
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


def _check(kind: type[BaseModel], layers: Sequence[Layer], own: Layer) -> Any:
    """Merge all layers and validate them as one ``kind``; ``own`` is the layer that only this kind reads."""
    merged = _merged(layers)
    # The shared sections are checked with each model that they are part of.
    if kind is Root:
        merged = {key: value for key, value in merged.items() if key not in SHARED}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = _written(first["loc"], merged) if first["type"] != "missing" else tuple(map(str, first["loc"]))
        known = [*kind.model_fields, *(SHARED if kind is Root else ())] if len(key) == 1 else _keys(kind, key[:-1])
        origin = _home(layers, key, own) if first["type"] == "missing" else _origin(layers, key)
        raise UserError(f"{origin}: {'.'.join(key) or kind.__name__}: {_say(first, key, known)}") from None


def _merged(layers: Iterable[Layer]) -> dict[str, Any]:
    return functools.reduce(merge, (layer.content for layer in layers), {})


def _home(layers: Sequence[Layer], key: tuple[str, ...], own: Layer) -> str:
    """Where a missing key belongs: in config.yaml if it is of a shared section, else with the rest of its section."""
    *section, _ = key
    if key[0] in SHARED and len(section) < 2:
        return layers[0].origin
    began = [layer.origin for layer in layers if section and isinstance(_at(layer.content, section), dict)]
    return [*began, own.origin][0]


def _culprit(layers: Sequence[Layer], own: Layer, is_wrong: Callable[[dict[str, Any]], bool]) -> str | None:
    """The layer that makes settings wrong which were right without it, and if possible its one key that does.

    Settings that contradict each other may all be to blame; the one that was added last is. None if config.yaml and
    the model's file are wrong by themselves, or incomplete.
    """

    def wrong(layers: Iterable[Layer]) -> bool:
        return is_wrong(_merged(layers))

    try:
        taken = [layers[0], own]
        if wrong(taken):
            return None
        for layer in layers:
            if layer in taken:
                continue
            taken = [other for other in layers if other in taken or other is layer]
            if wrong(taken):
                for key in _leaves(layer.content):
                    without = Layer(layer.origin, _without(layer.content, key))
                    if not wrong(without if other is layer else other for other in taken):
                        return f"{layer.origin}: {'.'.join(key)}"
                return layer.origin
    except ValidationError:
        pass
    return None


def _leaves(content: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of all values that are not themselves sections."""
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
    """The key that the user wrote: pydantic's location, without the name of the type that it tried."""
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


def _origin(layers: Sequence[Layer], key: tuple[str, ...]) -> str:
    """The layer that set the value at ``key``, or failing that a section around it."""
    for depth in range(len(key), 0, -1):
        for layer in reversed(layers):
            section = _at(layer.content, key[: depth - 1])
            if isinstance(section, dict) and key[depth - 1] in section:
                return layer.origin
    return layers[0].origin


def _at(content: Any, key: Iterable[str]) -> Any:
    """The value at ``key``, None if there is none."""
    for part in key:
        content = content.get(part) if isinstance(content, dict) else None
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'rollouts'?``: the entry of ``known`` that is closest to ``name``, or all if none is close."""
    known = [*known]
    short = [key for key in known if key.startswith(name) or "".join(word[0] for word in key.split("_")) == name]
    close = short or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _name(path: Path) -> str:
    """A file of the project's as the user knows it: config/config.yaml, config/models/9B.yaml."""
    return path.as_posix()[path.as_posix().rfind("config/") :] if "config/" in path.as_posix() else path.name


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``under`` with the values of ``over``: mappings are merged, everything else is replaced. Neither is changed.

    A source (``source``, or an entry of ``datasets``) has one place, so another place replaces the first, and files are
    named by ``file`` or by ``subset`` and ``split``. A reward is one kind, function or sum likewise.
    """
    result = copy.copy(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            replaced = set()
            for ways in ALTERNATIVES:
                if any(way & value.keys() for way in ways):
                    replaced.update(*(way for way in ways if not way & value.keys()))
            old = {name: content for name, content in old.items() if name not in replaced}
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result
