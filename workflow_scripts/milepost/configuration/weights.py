"""The names of weights: ``base``, a run's name for its last checkpoint, and ``run@best`` or ``run@000040``."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from milepost.configuration.section import EachOnce

BASE, LAST, BEST = "base", "last", "best"
RUN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
WEIGHTS = rf"{RUN}(?:@(?:{BEST}|\d{{6}}\d*))?"  # Snakemake takes no {{6,}}


def run_of(weights: str) -> str:
    """The run that trained the weights."""
    return weights.partition("@")[0]


def checkpoint_of(weights: str) -> str:
    """The run's checkpoint: ``last``, ``best``, or the number of rollouts, six digits at least."""
    return weights.partition("@")[2] or LAST


def train_manifest(results: Path | str, model: str, run: str) -> Path:
    """The manifest of a finished run."""
    return Path(results, model, "grpo", run, "train.json")


def finished_runs(results: Path | str, model: str) -> list[str]:
    """The runs of a model that have been trained to their end, whatever their settings were."""
    return sorted(path.parent.name for path in train_manifest(results, model, "*").parents[1].glob("*/train.json"))


def _not_base(name: str) -> str:
    if name == BASE:
        raise ValueError(f"{BASE!r} is the name of the starting weights: choose another")
    return name


def _of_a_run(weights: str) -> str:
    if not re.fullmatch(WEIGHTS, weights):
        raise ValueError("give a run, or one of its checkpoints: grpo, grpo@best, grpo@000040")
    return _not_base(weights)


def _of_a_model(weights: str) -> str:
    if not re.fullmatch(rf"{RUN}/{WEIGHTS}", weights) or "/base@" in weights:
        raise ValueError("give model/weights: 9B/base, 9B/grpo, 9B/grpo@best, 9B/grpo@000040")
    return weights


def _two(pair: Any) -> Any:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError("give pairs, of two weights each: [[9B/base, 9B/grpo]]")
    return pair


def _checkpoint(value: Any) -> Any:
    if isinstance(value, int):  # YAML reads 000040 as octal
        raise ValueError("write checkpoint-000040, or quote the number ('000040'): YAML reads it bare as another one")
    name = value.removeprefix("checkpoint-") if isinstance(value, str) else value
    if not isinstance(name, str) or not re.fullmatch(rf"{LAST}|{BEST}|\d{{6,}}", name):
        raise ValueError(f"give {LAST}, {BEST}, or a checkpoint by its folder's name: checkpoint-000040")
    return name


RunName = AfterValidator(_not_base)
RunWeights = Annotated[str, AfterValidator(_of_a_run)]
ModelWeights = Annotated[str, AfterValidator(_of_a_model)]
WeightsPair = Annotated[list[ModelWeights], BeforeValidator(_two), Field(min_length=2, max_length=2), EachOnce]
Checkpoint = Annotated[str, BeforeValidator(_checkpoint)]
