"""Every key of config/, with its type, its bounds and its meaning.

This is the one definition. The loader validates against it, the JSON schemas for editors and the tables of keys in
config/README.md are written from it, and entry scripts read the sections that they are given as these types.

Other modules import every section from here:

    section.py      the base class of sections, and types of values
    rewards.py      what a response earns
    sources.py      where models and problem sets come from
    training.py     layout, algorithm, optimizer, rollouts, sampling, validation
    machine.py      hardware, engine, conversion
    evaluation.py   scores, plots
    weights.py      the names of weights: runs, checkpoints
"""

import os
from math import gcd
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from milepost.configuration.evaluation import Evaluation, Export, Plots
from milepost.configuration.machine import OWN_SERVER_ARGUMENTS, Conversion, Engine, Hardware, Speculation
from milepost.configuration.rewards import Reward
from milepost.configuration.section import NAME, EachOnce, Name, Section
from milepost.configuration.sources import Architecture, Dataset, ModelSource, Problems, Source, TinyModel, WarmUp
from milepost.configuration.training import (
    Advantage,
    Aggregation,
    Algorithm,
    Correction,
    Experts,
    KlType,
    Mtp,
    Optimizer,
    Overlong,
    Parallel,
    PolicyLoss,
    Recompute,
    Sampling,
    Training,
    Validation,
)
from milepost.configuration.weights import RunName, RunWeights, WeightsPair

__all__ = [
    "NAME", "OWN_SERVER_ARGUMENTS", "Advantage", "Aggregation", "Algorithm", "Architecture", "Conversion", "Correction",
    "Dataset", "Engine", "Evaluation", "Experts", "Export", "Hardware", "KlType", "Model", "ModelSource", "Mtp",
    "Optimizer", "Overlong", "Parallel", "Plots", "PolicyLoss", "Problems", "Recompute", "Reward", "Root", "Sampling",
    "Section", "Source", "Speculation", "TinyModel", "Training", "Validation", "WarmUp",
]  # fmt: skip


class Model(Section):
    """All settings of one model; each rule is given the sections that it reads."""

    source: ModelSource = Field(description="where the starting weights come from")
    architecture: Architecture | None = Field(None, description="the shape that the starting weights must have")
    hardware: Hardware = Field(description="what the model's jobs take of a machine")
    conversion: Conversion = Field(Conversion(), description="how the starting weights are converted")
    parallel: Parallel = Field(Parallel(), description="how the model is laid out over GPUs")
    algorithm: Algorithm = Field(description="advantages and losses")
    optimizer: Optimizer = Field(description="Adam and its learning rate")
    training: Training = Field(description="data, batches and length of the training")
    validation: Validation = Field(description="the evaluation during training")
    mtp: Mtp = Field(description="training of the MTP layer")
    sampling: Sampling = Field(description="how a rollout samples answers")
    engine: Engine = Field(description="the rollout engine")
    experts: Experts = Field(description="how a mixture of experts is trained")
    reward: Reward = Field(Reward(), description="how answers are graded")
    evaluation: Evaluation = Field(description="the final scores")
    export: Export = Field(Export(), description="which of the run's weights are exported and scored")

    @property
    def evaluation_gpus(self) -> int:
        """The GPUs of an evaluation, which need not be a training's."""
        return self.evaluation.gpus or self.hardware.gpus

    @property
    def evaluation_engine(self) -> Engine:
        """The engine as an evaluation lays it out over `evaluation_gpus`."""
        engine, evaluation = self.engine, self.evaluation
        if engine.kind == "cpu":
            return engine
        shared = evaluation.gpus_per_engine or gcd(engine.gpus_per_engine, self.evaluation_gpus)
        layout = {"gpus_per_engine": shared, "expert_parallel": gcd(engine.expert_parallel, shared)}
        return engine.model_copy(update=layout | {"mem_fraction_static": evaluation.mem_fraction_static})

    @property
    def uses_mtp(self) -> bool:
        """Whether the MTP layer is converted, trained or drafts, so that the starting weights must have one."""
        return bool(self.conversion.mtp_num_layers or self.mtp.train or self.engine.speculation)

    @property
    def scored_sets(self) -> set[str]:
        """The problem sets that it is evaluated on, and validated on if there is a validation."""
        return {*self.evaluation.datasets, *([self.validation.dataset] if self.validation.interval else [])}

    @property
    def problem_sets(self) -> set[str]:
        """The problem sets that it is trained, validated and evaluated on."""
        return {*self.training.datasets, *self.scored_sets}


def _without_braces(folder: str) -> str:
    if {"{", "}"} & set(folder):
        raise ValueError("braces mean something else to Snakemake: choose another folder")
    return os.path.expanduser(folder)


class Root(Section):
    """The keys of config.yaml outside the sections that all models share."""

    models: Annotated[list[Name], EachOnce] = Field(
        min_length=1, description="the models that download_all ... eval_all and the report cover"
    )
    run: Annotated[Name, RunName] = Field(
        description="name of the training run; another name keeps the old run's results"
    )
    runs: Annotated[list[RunWeights], EachOnce] = Field(
        [],
        description="finished runs that tables, plots and report show beside `run`, by name or with a checkpoint"
        " (first@best): of every listed model that has them",
    )
    compare: list[WeightsPair] = Field(
        [],
        description="further pairs of weights to compare, second minus first: [[9B/first, 9B/grpo], [mine/base,"
        " 9B/base]]",
    )
    results: Annotated[str, AfterValidator(_without_braces)] = Field(
        description="the folder that all results go to; relative to where Snakemake runs"
    )
    models_folder: str | None = Field(
        None, description="a folder of your own whose *.yaml are further models; relative to where Snakemake runs"
    )
    answers: str | None = Field(None, description="a file of answers, JSON lines, that check_reward grades")
    preflight: Literal["refuse", "warn"] = Field(
        "refuse", description="refuse jobs that this machine seems too small for, or only warn"
    )
    datasets: dict[Name, Dataset] = Field(description="the problem sets, by the names that other sections use")
    plots: Plots = Field(description="how plots look, and the colours of the report")
    per_model: dict[str, dict[str, Any]] = Field(
        {}, description="settings of one model, which override all that is shared: {9B: {training: {...}}}"
    )
