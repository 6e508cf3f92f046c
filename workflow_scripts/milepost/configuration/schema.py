"""Every key of config/, with its type, its bounds and its meaning.

This is the one definition: the loader validates against it, the JSON schemas for editors are written from it, rules
slice it, and entry scripts are handed the slices back as these types.
"""

import os
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    PositiveInt,
    field_validator,
    model_validator,
)

from milepost.configuration.rewards import Reward
from milepost.configuration.section import NonNegative, Section, Share

Decay = Annotated[float, Field(ge=0, lt=1)]


def _not_none_at_all(top_k: int) -> int:
    if top_k == 0:
        raise ValueError("0 leaves no token to choose: -1 leaves all")
    return top_k


TopK = Annotated[int, Field(ge=-1), AfterValidator(_not_none_at_all)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME)]


def _each_once(values: list) -> list:
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise ValueError(f"{', '.join(map(str, twice))}: given twice")
    return values


EachOnce = AfterValidator(_each_once)


def _is_color(value: str) -> str:
    if not re.fullmatch("#[0-9A-Fa-f]{6}", value):
        from matplotlib.colors import is_color_like  # takes a while to import

        if not is_color_like(value):
            raise ValueError("no colour: give one like '#0b7285' or 'teal' (matplotlib's names)")
    return value


Color = Annotated[str, AfterValidator(_is_color)]


class Problems(Section):
    """A problem set that is made here: sums of two numbers, train and evaluation disjoint whatever their seeds."""

    split: Literal["train", "evaluation"]
    seed: int = 0
    rows: PositiveInt = 2048


class Source(Section):
    """Where files come from: a Hub repository at a revision, a local folder, or this pipeline itself."""

    repo: str | None = Field(None, description="repository on the Hub, e.g. Qwen/Qwen3.5-9B")
    revision: str = Field("main", description="branch, tag or commit; resolved once to a commit and recorded")
    folder: str | None = Field(None, description="a local folder with the same files, instead of the Hub")

    places: ClassVar[tuple[str, ...]] = ("repo", "folder")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [name for name in self.places if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.places)}; given: {', '.join(given) or 'none'}")
        return self


class WarmUp(Section):
    """The supervised start of a tiny model: it can add, but often estimates."""

    steps: Annotated[int, Field(ge=0)] = Field(320, description="0 leaves the random weights as they are")
    batch_size: PositiveInt = 16
    learning_rate: NonNegative = 1.0e-3
    computed_share: Share = Field(
        0.5, description="share of the last examples that work the sum out, and so the accuracy to begin with"
    )


class TinyModel(Section):
    """A small Qwen3.5 of the true architecture, made here."""

    kind: Literal["dense", "moe"]
    seed: int = 0
    layers: Annotated[int, Field(gt=0, multiple_of=4)] = Field(4, description="every fourth is of gated attention")
    hidden: Annotated[int, Field(gt=0, multiple_of=64)] = 128
    head_dim: Annotated[int, Field(gt=0, multiple_of=16)] = Field(32, description="of attention and linear attention")
    warm_up: WarmUp = WarmUp()


class ModelSource(Source):
    """Where a model's starting weights come from."""

    places = ("repo", "folder", "tiny")
    tiny: TinyModel | None = Field(None, description="make a tiny model instead of downloading one")

    @property
    def script(self) -> str:
        """The entry script that brings it here."""
        return "make_tiny" if self.tiny else "download"


class Dataset(Source):
    """Where a problem set comes from, and how its rows read."""

    places = ("repo", "folder", "problems")
    problems: Problems | None = Field(None, description="make a problem set instead of downloading one")
    file: str = Field(description="the JSON-lines file within the source")
    prompt_key: str = Field("prompt", description="a row's chat, a list of messages that ends with the user's")
    label_key: str = Field("label", description="a row's answer, text or a number; a reward of your own may need none")
    instruction: str | None = Field(
        None,
        description="ends every prompt; where the reward reads boxes, those alone that do not ask for a \\boxed answer"
        " themselves",
    )
    reward: Reward | None = Field(None, description="of this set's responses, in place of the model's")
    rows: PositiveInt | None = Field(None, description="exact number of rows expected; None accepts any")
    unique_prompts: bool = Field(False, description="refuse the file if a prompt repeats")
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="of bad rows: a training set with more is refused, with fewer they are set aside and told"
    )

    @property
    def script(self) -> str:
        """The entry script that brings it here."""
        return "make_problems" if self.problems else "download"


class Architecture(Section):
    """The shape a checkpoint must have; the numbers that build a model come from its own config.json."""

    layers: PositiveInt
    hidden: PositiveInt
    ffn: PositiveInt = Field(description="dense: the MLP's width; mixture of experts: one expert's")
    attention_heads: PositiveInt
    key_value_groups: PositiveInt
    head_dim: PositiveInt
    linear_key_heads: PositiveInt
    linear_value_heads: PositiveInt
    linear_head_dim: PositiveInt
    tied_embeddings: bool
    vocabulary: PositiveInt = 248320
    experts: PositiveInt | None = None
    experts_per_token: Annotated[int, Field(ge=2)] | None = None
    shared_expert_ffn: PositiveInt | None = None

    @model_validator(mode="after")
    def _experts_are_whole(self) -> Self:
        of_experts = (self.experts, self.experts_per_token, self.shared_expert_ffn)
        if None in of_experts and of_experts != (None, None, None):
            raise ValueError("experts, experts_per_token and shared_expert_ffn belong together: give all or none")
        return self


class Conversion(Section):
    launcher: Literal["python", "torchrun"] = Field("python", description="torchrun where it takes several processes")
    processes: PositiveInt = Field(1, description="they share the experts, or a dense model's matrices")
    mtp_num_layers: Annotated[int, Field(ge=0, le=1)] = 0

    @model_validator(mode="after")
    def _launcher_fits(self) -> Self:
        if self.launcher == "python" and self.processes != 1:
            raise ValueError("launcher python runs one process; for more set launcher: torchrun")
        return self


class Parallel(Section):
    """How one model is laid out over the training GPUs (processes on CPU)."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1
    sequence: bool = Field(True, description="shard activations between tensor-parallel regions; no effect at tensor 1")


# The names of the functions in grpo/advantages.py, losses.py and aggregations.py.
Advantage = Literal["grpo"]
PolicyLoss = Literal["ppo"]
KlType = Literal["low_var_kl"]
Aggregation = Literal["mean_of_response_means", "token_mean"]


class Algorithm(Section):
    """GRPO as the recipes run it."""

    advantage: Advantage = "grpo"
    loss: PolicyLoss = "ppo"
    std_epsilon: NonNegative = 1e-6
    clip: NonNegative = 0.2
    clip_high: NonNegative = 0.28
    use_kl_loss: bool = True
    kl_coefficient: NonNegative = 0.0
    kl_type: KlType = "low_var_kl"
    entropy_coefficient: float = 0.0
    loss_aggregation: Aggregation = "mean_of_response_means"
    reference_forward: bool = Field(False, description="compute the KL metric even where its coefficient is 0")
    old_log_prob_forward: bool = Field(False, description="recompute old log-probs even with one step a rollout")
    entropy_metric: bool = Field(False, description="compute the entropy even where its coefficient is 0")


class Optimizer(Section):
    name: Literal["adam"] = "adam"
    learning_rate: NonNegative = 1e-6
    warm_up_steps: Annotated[int, Field(ge=0)] = Field(0, description="linear from 0; constant afterwards")
    weight_decay: NonNegative = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    epsilon: NonNegative = 1e-8
    clip_gradient_norm: NonNegative = 1.0
    cpu_offload: bool = Field(
        False, description="Adam's states and step on the CPU, copies overlapped, precision-aware"
    )


Recompute = Literal["full", "selective", "none"]


class Training(Section):
    dataset: Name
    prompts_per_rollout: PositiveInt = 32
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    global_batch: PositiveInt = 256
    rollouts: PositiveInt = 3000
    seed: int = 1234
    max_tokens_per_gpu: PositiveInt = Field(
        9216, description="tokens of a pack for each GPU that shares it (tensor x context parallel)"
    )
    log_prob_chunk: PositiveInt = Field(1024, description="tokens whose logits exist at one time")
    recompute: Literal["auto", Recompute] = Field(
        "auto", description="activations that the backward pass makes again; auto: the fewest that fit the GPU's memory"
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    save_interval: PositiveInt = 20
    keep_checkpoints: PositiveInt = Field(2, description="the last N stay, and the best besides")
    max_bad_steps: PositiveInt = Field(
        5, description="steps in a row, skipped for a NaN or infinite loss or gradient, that end a run"
    )
    wandb_project: str | None = Field(None, description="also log to this Weights & Biases project")
    on_code_change: Literal["new", "continue"] = Field(
        "new",
        description="when the training's code or a package's version has changed: begin a new run beside the old one,"
        " or go on with the one that there is and keep a finished one",
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        samples = self.prompts_per_rollout * self.samples_per_prompt
        if samples % self.global_batch:
            raise ValueError(
                f"global_batch {self.global_batch} does not divide prompts_per_rollout {self.prompts_per_rollout}"
                f" x samples_per_prompt {self.samples_per_prompt} = {samples}"
            )
        return self


class Validation(Section):
    """The evaluation during training, before the first rollout and every ``interval`` rollouts; a metric, no more.

    It is apart from `Evaluation`, so that another protocol for the final scores never makes a training stale.
    """

    interval: Annotated[int, Field(ge=0)] = Field(20, description="rollouts between evaluations; 0 for none at all")
    dataset: Name = "aime-2024"
    samples_per_problem: PositiveInt = 16
    max_response_tokens: PositiveInt = 16384
    temperature: NonNegative = 1.0
    top_p: Share = 1.0


class Mtp(Section):
    train: bool = False
    loss_scale: NonNegative = 0.2


class Sampling(Section):
    """How a rollout samples."""

    max_response_tokens: PositiveInt = 8192
    max_prompt_tokens: PositiveInt = 2048
    temperature: NonNegative = 1.0
    top_p: Share = 1.0
    top_k: TopK = Field(-1, description="-1 for all")
    enable_thinking: bool = Field(True, description="passed to the chat template")


class Speculation(Section):
    algorithm: Literal["EAGLE"] = "EAGLE"
    steps: PositiveInt = 2
    top_k: PositiveInt = 1
    draft_tokens: PositiveInt = 3


# SGLang's arguments by which its servers would listen elsewhere or take other GPUs than the pipeline counts on.
OWN_SERVER_ARGUMENTS = {
    *("model_path", "tp_size", "ep_size", "base_gpu_id", "nnodes", "node_rank"),
    *("host", "port", "api_key", "dist_init_addr", "nccl_port"),
}


class Engine(Section):
    """The rollout engine."""

    kind: Literal["sglang", "cpu"] = "sglang"
    gpus_per_engine: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    mem_fraction_static: Share = Field(
        0.7, description="of a GPU's memory: for the weights and for what requests and their drafts remember"
    )
    cuda_graph_batch_sizes: list[PositiveInt] | None = None
    max_running_requests: PositiveInt | None = Field(
        None, description="of one engine; at most its share of a rollout or validation runs at once in any case"
    )
    speculation: Speculation | None = None
    replay_routing: bool = Field(
        False, description="a mixture of experts trains with the experts that the engine chose for each token"
    )
    check_weights: bool = Field(
        False, description="after every sync make sure that the engine holds exactly what was sent; slow, for diagnosis"
    )
    server_arguments: dict[str, JsonValue] = Field({}, description="further SGLang server arguments, passed through")

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


class Experts(Section):
    dispatcher: Literal["allgather", "alltoall", "flex"] = "flex"
    deepep: bool = False
    aux_loss_coefficient: NonNegative = 0.0


class Evaluation(Section):
    """AIME-2024 or any problem set of the same schema."""

    datasets: Annotated[list[Name], EachOnce] = Field(["aime-2024"], min_length=1)
    samples_per_problem: PositiveInt = 16
    max_response_tokens: PositiveInt = 16384
    temperature: NonNegative = 1.0
    top_p: Share = 1.0
    top_k: TopK = -1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    enable_thinking: bool = True
    seed: int = Field(
        42,
        description="of the samples and the bootstrap; SGLang's samples heed it only under engine: {server_arguments:"
        " {enable_deterministic_inference: true}}",
    )
    pass_at: Annotated[list[PositiveInt], EachOnce] = Field([1, 4, 16], min_length=1)
    mem_fraction_static: Share = Field(
        0.85, description="in place of the engine's own: no training shares the GPUs here, so more answers run at once"
    )
    bootstrap_samples: PositiveInt = 10000

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.pass_at) > self.samples_per_problem:
            raise ValueError(f"pass_at {max(self.pass_at)} needs at least as many samples_per_problem")
        return self

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that decide what is answered; the others: of what, how often, how it counts, in what memory."""
        others = {"datasets", "samples_per_problem", "pass_at", "bootstrap_samples", "mem_fraction_static"}
        return self.model_dump(mode="json", exclude=others)


GPUS_OF_A_NODE = 8


def _of_one_node(gpus: int) -> int:
    if gpus > GPUS_OF_A_NODE:
        raise ValueError(f"a training takes the GPUs of one node, {GPUS_OF_A_NODE} at most")
    return gpus


class Hardware(Section):
    gpus: Annotated[int, Field(ge=0), AfterValidator(_of_one_node)] = Field(
        8,
        description=f"GPUs of the one node that training takes, at most {GPUS_OF_A_NODE}; 0 is the CPU",
        json_schema_extra={"maximum": GPUS_OF_A_NODE},
    )
    processes: PositiveInt | None = Field(None, description="training processes; None is one a GPU, or one on CPU")
    gpu_memory_gib: NonNegative = Field(80.0, description="memory of one GPU, for the preflight estimate")
    host_memory_gib: PositiveInt = Field(256, description="host memory that training takes, checked before it starts")
    cores: PositiveInt = Field(64, description="cores that a training or an evaluation may use")


class Plots(Section):
    color_base: Color = "#8a8f98"
    color_trained: Color = "#0b7285"
    dpi: PositiveInt = 150


class Model(Section):
    """Everything that one model's stages read; each rule is handed its slice."""

    source: ModelSource
    architecture: Architecture | None = None
    hardware: Hardware = Hardware()
    conversion: Conversion = Conversion()
    parallel: Parallel = Parallel()
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizer = Optimizer()
    training: Training
    validation: Validation = Validation()
    mtp: Mtp = Mtp()
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    experts: Experts = Experts()
    reward: Reward = Reward()
    evaluation: Evaluation = Evaluation()


def _not_base(name: str) -> str:
    if name == "base":
        raise ValueError("'base' is the name of the starting weights: choose another")
    return name


def _without_braces(folder: str) -> str:
    if {"{", "}"} & set(folder):
        raise ValueError("braces mean something else to Snakemake: choose another folder")
    return os.path.expanduser(folder)


class Root(Section):
    """config/config.yaml beside the sections of `Model` that all models share."""

    models: Annotated[list[Name], EachOnce] = Field(
        min_length=1, description="the models that download_all ... eval_all and the report cover"
    )
    run: Annotated[Name, AfterValidator(_not_base)] = Field(
        "grpo",
        description="name of the training run, no number; another name keeps the old one's results",
    )
    results: Annotated[str, AfterValidator(_without_braces)] = Field(
        "results", description="the folder of everything that is made"
    )
    answers: str | None = Field(None, description="a file of answers, JSON lines, that check_reward grades")
    preflight: Literal["refuse", "warn"] = Field(
        "refuse",
        description="whether a run that this machine seems too small for is refused, or only warned of",
    )
    datasets: dict[Name, Dataset]
    plots: Plots = Plots()
    per_model: dict[str, dict[str, Any]] = Field({}, description="settings of one model, laid over everything else")
