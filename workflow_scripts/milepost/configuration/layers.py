"""Layers of settings, each from a YAML file or the command line: read them, merge them, and trace a value to its layer.

`loading` says which layers a model has, and in which order.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from milepost.common.errors import UserError
from milepost.configuration.schema import Dataset, ModelSource, Reward

# Giving a key of one group replaces the keys of the others: the places that a source can be in, the ways to name a data
# set's files, and the ways to define a reward.
ALTERNATIVES = (
    tuple({place} for place in {*ModelSource.places, *Dataset.places}),
    ({"file"}, {"subset", "split"}),
    tuple({way} for way in Reward.ways),
)
RETYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float")}


@dataclass(frozen=True)
class Layer:
    """Settings from one source: where they are written, and what they say."""

    origin: str
    content: dict[str, Any]


def read_layer(file: Path) -> Layer:
    """The settings in a file of the project."""
    return Layer(shown_path(file), read_yaml(file, shown_path(file)))


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
        raise UserError(f"{origin}: no such file: correct the path") from None
    except OSError as error:
        raise UserError(f"{origin}: can't be read: {error.strerror}: name a file that you may read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}: correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"{origin}: a mapping of settings is expected, not {type(content).__name__}: write `key: value`"
        )
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a duplicate key, of which YAML silently keeps the last, and reads ``10:50`` as text.

    YAML 1.1 would make it the number 650, in base 60; here it is a slice of a data set.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, re.compile(f"(?!.*:){regex.pattern}", regex.flags) if tag in NUMBERS else regex)
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


def shown_path(path: Path) -> str:
    """A project file's path as errors show it: config/config.yaml, config/models/9B.yaml."""
    return path.as_posix()[path.as_posix().rfind("config/") :] if "config/" in path.as_posix() else path.name


def merge_layers(layers: Iterable[Layer]) -> dict[str, Any]:
    """The settings of all layers; later layers override earlier ones."""
    return functools.reduce(merge, (layer.content for layer in layers), {})


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``under`` overridden by ``over``: mappings are merged, everything else is replaced. Neither argument changes.

    A source (``source``, or an entry of ``datasets``) has exactly one place, so a new place replaces the old one. In
    the same way a reward is either a kind, a function or a sum, and a data set's files are named by ``file`` or by
    ``subset`` and ``split``.
    """
    result = copy.copy(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            replaced = set()
            for groups in ALTERNATIVES:
                if any(group & value.keys() for group in groups):
                    replaced.update(*(group for group in groups if not group & value.keys()))
            old = {name: content for name, content in old.items() if name not in replaced}
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def origin_of(layers: Sequence[Layer], key: tuple[str, ...]) -> str:
    """The origin of the layer that set the value at ``key``, or else of the one that set its innermost section."""
    for depth in range(len(key), 0, -1):
        for layer in reversed(layers):
            section = value_at(layer.content, key[: depth - 1])
            if isinstance(section, dict) and key[depth - 1] in section:
                return layer.origin
    return layers[0].origin


def value_at(content: Any, key: Iterable[str]) -> Any:
    """The value at ``key``, or None if it is not set."""
    for part in key:
        content = content.get(part) if isinstance(content, dict) else None
    return content


def culprit(layers: Sequence[Layer], own: Layer, is_wrong: Callable[[dict[str, Any]], bool]) -> str | None:
    """Where settings that contradict each other become invalid: the first layer that makes them so, and its key.

    Several settings may share the blame; the one that was added last gets it. The key is left out if no single key is
    to blame. None if config.yaml and the model's file (``own``) are already invalid, or incomplete.
    """

    def wrong(layers: Iterable[Layer]) -> bool:
        return is_wrong(merge_layers(layers))

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
    """The path of each value that is not a section."""
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
