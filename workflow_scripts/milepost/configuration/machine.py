"""What a model runs on: the hardware, the rollout engine, and the processes that convert its weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, PositiveInt, field_validator, model_validator

from milepost.configuration.section import NonNegative, Section, Share

GPUS_OF_A_NODE = 8
# Arguments with which SGLang's servers would listen elsewhere, or take other GPUs than the pipeline gives them.
OWN_SERVER_ARGUMENTS = {
    *("model_path", "tp_size", "ep_size", "base_gpu_id", "nnodes", "node_rank"),
    *("host", "port", "api_key", "dist_init_addr", "nccl_port"),
}


def _of_one_node(gpus: int) -> int:
    if gpus > GPUS_OF_A_NODE:
        raise ValueError(f"a training takes the GPUs of one node, {GPUS_OF_A_NODE} at most")
    return gpus


class Hardware(Section):
    """What the jobs of a model need of a machine."""

    gpus: Annotated[int, Field(ge=0), AfterValidator(_of_one_node)] = Field(
        description=f"GPUs of one node that a training or an evaluation takes, at most {GPUS_OF_A_NODE}; 0 for the CPU",
        json_schema_extra={"maximum": GPUS_OF_A_NODE},
    )
    processes: PositiveInt | None = Field(
        None, description="training processes; none stands for one per GPU, or one on the CPU"
    )
    gpu_memory_gib: NonNegative = Field(80.0, description="memory of one GPU, for estimates on a machine without GPUs")
    host_memory_gib: PositiveInt = Field(256, description="host memory that a training takes, checked before it starts")
    cores: PositiveInt = Field(64, description="cores that a training or an evaluation may use")


class Speculation(Section):
    """Speculative decoding: the model checks several drafted tokens at once, which gives the same answers sooner."""

    algorithm: Literal["EAGLE"] = Field(description="SGLang's name for drafts by the model's own MTP layer")
    steps: PositiveInt = Field(description="times that the MTP layer runs for one draft")
    top_k: PositiveInt = Field(description="branches of a draft at each step")
    draft_tokens: PositiveInt = Field(description="tokens that the model checks at once")


class Engine(Section):
    """The rollout engine, which samples all answers."""

    kind: Literal["sglang", "cpu"] = Field(description="SGLang on GPUs, or the small engine for the CPU")
    gpus_per_engine: PositiveInt = Field(description="GPUs that share one engine's weights")
    expert_parallel: PositiveInt = Field(1, description="GPUs of an engine that share the routed experts")
    mem_fraction_static: Share = Field(
        description="share of a GPU's memory for the engine's weights and its KV cache, states and drafts included"
    )
    cuda_graph_batch_sizes: list[PositiveInt] | None = Field(
        None, description="batch sizes to capture CUDA graphs for; none leaves the choice to SGLang"
    )
    max_running_requests: PositiveInt | None = Field(
        None, description="answers that one engine samples at a time, at most; its share of a rollout also bounds them"
    )
    speculation: Speculation | None = Field(None, description="draft tokens with the MTP layer; none does not")
    replay_routing: bool = Field(
        False, description="train a mixture of experts with the experts that the engine chose for each token"
    )
    check_weights: bool = Field(
        False, description="after every sync compare the engine's weights with what was sent; slow, for diagnosis"
    )
    server_arguments: dict[str, JsonValue] = Field({}, description="further arguments for SGLang's servers")

    @field_validator("server_arguments")
    @classmethod
    def _keeps_to_its_place(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OWN_SERVER_ARGUMENTS & set(arguments)):
            raise ValueError(
                f"{', '.join(taken)}: where the servers listen and which GPUs they take is decided by the pipeline;"
                " use gpus_per_engine and expert_parallel"
            )
        if arguments.get("dp_size", 1) != 1 and not arguments.get("enable_dp_attention"):
            raise ValueError("dp_size: there is one engine for every gpus_per_engine GPUs already; lower that instead")
        return arguments


class Conversion(Section):
    """How the starting weights are converted to Megatron's format."""

    launcher: Literal["python", "torchrun"] = Field("python", description="torchrun for several processes")
    processes: PositiveInt = Field(1, description="processes that share the experts, or a dense model's matrices")
    mtp_num_layers: Annotated[int, Field(ge=0, le=1)] = Field(0, description="1 to convert the MTP layer as well")

    @model_validator(mode="after")
    def _launcher_fits(self) -> Self:
        if self.launcher == "python" and self.processes != 1:
            raise ValueError("launcher python runs one process; for more set launcher: torchrun")
        return self
