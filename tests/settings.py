"""Sections of the shipped configuration, as tests need them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milepost.configuration.layers import Layer, merge, read_yaml
from milepost.configuration.loading import Configuration, load
from milepost.configuration.schema import Algorithm, Model, Root, Section
from milepost.grpo.settings import Settings

CONFIG = Path(__file__).parents[1] / "config"
DRAFTING = read_yaml(CONFIG / "models/35B_A3B.yaml")["engine"]["speculation"]


def configured(user: Sequence[Layer] | dict[str, Any] = ()) -> Configuration:
    """The shipped configuration with what a user gives on the command line (see `loading.load`)."""
    return load(CONFIG / "config.yaml", CONFIG / "models", user)


def section(name: str, **changes: Any) -> Section:
    """The section ``name`` of config.yaml with ``changes``."""
    kind = (Root.model_fields | Model.model_fields)[name].annotation
    return kind.model_validate(merge(read_yaml(CONFIG / "config.yaml").get(name, {}), changes))


def training_settings(**sections: dict[str, Any]) -> Settings:
    """The shared settings of config.yaml, on the CPU in fp32, with ``sections`` laid over them."""
    on_the_cpu = {"hardware": {"gpus": 0}, "engine": {"kind": "cpu"}, "training": {"dtype": "float32"}}
    changes = merge(on_the_cpu, sections)
    of_model = {
        name: section(name, **changes.pop(name, {})) for name in Settings.model_fields if name in Model.model_fields
    }
    return Settings(**of_model, **changes)


def algorithm(**changes: Any) -> Algorithm:
    """The recipes' algorithm with ``changes``."""
    return section("algorithm", **changes)
