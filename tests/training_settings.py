"""The settings of a training as tests need them."""

from pathlib import Path
from typing import Any

from milepost.configuration.loading import merge, read_yaml
from milepost.configuration.schema import Algorithm
from milepost.grpo.settings import Settings

CONFIG = Path(__file__).parents[1] / "config/config.yaml"


def training_settings(**sections: dict[str, Any]) -> Settings:
    """The shared settings of config.yaml, on the CPU in fp32, with ``sections`` laid over them."""
    shared = read_yaml(CONFIG)
    settings = {name: shared.get(name, {}) for name in Settings.model_fields}
    on_the_cpu = {"hardware": {"gpus": 0}, "engine": {"kind": "cpu"}, "training": {"dtype": "float32"}}
    return Settings.model_validate(merge(merge(settings, on_the_cpu), sections))


def algorithm(**changes: Any) -> Algorithm:
    """The recipes' algorithm with ``changes``."""
    return training_settings(algorithm=changes).algorithm
