"""How the base and the trained weights are scored, and how plots look."""

from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from milepost.configuration.machine import GPUS_OF_A_NODE
from milepost.configuration.section import Color, EachOnce, Name, NonNegative, Section, Share, TopK
from milepost.configuration.weights import LAST, Checkpoint

RESOURCES = ("gpus", "gpus_per_engine", "mem_fraction_static", "host_memory_gib")  # what it runs on


class Evaluation(Section):
    """The final scores of the base and the trained weights, on AIME-2024 or any other problem set."""

    datasets: Annotated[list[Name], EachOnce] = Field(
        min_length=1, description="the problem sets to score on, names under `datasets`"
    )
    samples_per_problem: PositiveInt = Field(description="answers to each problem")
    max_response_tokens: PositiveInt = Field(description="tokens after which an answer is cut off")
    temperature: NonNegative = Field(description="sampling temperature; 0 takes the most probable token")
    top_p: Share = Field(description="sample from the most probable tokens that together have this probability")
    top_k: TopK = Field(description="sample from the k most probable tokens; -1 for all")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0, description="subtracted from the logits of tokens that the answer holds already"
    )
    enable_thinking: bool = Field(description="passed to the chat template: begin answers with a think block")
    seed: int = Field(
        description="seed of sampling and of the bootstrap; SGLang ignores it when sampling unless engine:"
        " {server_arguments: {enable_deterministic_inference: true}}",
    )
    pass_at: Annotated[list[PositiveInt], EachOnce] = Field(
        min_length=1, description="the k of each pass@k, at most samples_per_problem"
    )
    gpus: Annotated[int, Field(gt=0, le=GPUS_OF_A_NODE)] | None = Field(
        None, description="GPUs of one node that an evaluation takes; none stands for hardware.gpus"
    )
    gpus_per_engine: PositiveInt | None = Field(
        None,
        description="GPUs that share one engine's weights in an evaluation; none takes the engine's, or as many of"
        " those as evaluation.gpus allows",
    )
    mem_fraction_static: Share = Field(
        description="takes the place of the engine's, since no training shares the GPUs during an evaluation"
    )
    host_memory_gib: PositiveInt | None = Field(
        None, description="host memory that an evaluation takes; none estimates it, up to hardware.host_memory_gib"
    )
    bootstrap_samples: PositiveInt = Field(10000, description="resamples for the bootstrap interval")

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.pass_at) > self.samples_per_problem:
            raise ValueError(f"pass_at {max(self.pass_at)} needs at least as many samples_per_problem")
        return self

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that decide how answers are sampled; not how many, how they are scored, or on what resources."""
        others = {"datasets", "samples_per_problem", "pass_at", "bootstrap_samples", *RESOURCES}
        return self.model_dump(mode="json", exclude=others)


class Export(Section):
    """Which weights of a run are exported and scored. Those of each checkpoint have a name and results of their own."""

    checkpoint: Checkpoint = Field(
        LAST,
        description="last, best (by validation; its score flatters it), or a checkpoint that the run has kept:"
        " checkpoint-000040",
    )


class Plots(Section):
    """How plots look, and the colours of the report."""

    color_base: Color = Field(description="colour of the base weights: #rrggbb, or a name of matplotlib's")
    color_trained: Color = Field(description="colour of the trained weights")
    dpi: PositiveInt = Field(description="dots per inch of the PNG files")
