"""How a model is trained: its layout over GPUs, the optimizer, rollouts and batches, sampling, and validation."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from milepost.configuration.section import Name, Names, NonNegative, Positive, Section, Share, TopK

Decay = Annotated[float, Field(ge=0, lt=1)]
Recompute = Literal["full", "selective", "none"]
# The names of the functions in grpo/advantages.py, losses.py, aggregations.py and corrections.py.
Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
PolicyLoss = Literal["ppo", "gspo", "cispo"]
KlType = Literal["low_var_kl"]
Aggregation = Literal["mean_of_response_means", "token_mean", "constant_length"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class Parallel(Section):
    """How one model is laid out over the training's GPUs, or over its processes on a CPU."""

    tensor: PositiveInt = Field(1, description="processes that share each matrix")
    pipeline: PositiveInt = Field(1, description="stages that the layers are split into; training takes 1")
    context: PositiveInt = Field(1, description="processes that share each sequence")
    expert: PositiveInt = Field(1, description="processes that share the routed experts")
    expert_tensor: PositiveInt = Field(1, description="processes that share each expert's matrices")
    sequence: bool = Field(True, description="shard activations between tensor-parallel regions; no effect at tensor 1")


class Overlong(Section):
    """What training makes of answers that come near the cap of tokens, or are cut off there. Scores never change."""

    mode: Literal["none", "penalty", "filter"] = Field(
        "none",
        description="penalty: lower the rewards of answers in the buffer before the cap; filter: leave cut-off answers"
        " out of the loss",
    )
    buffer: PositiveInt | None = Field(
        None, description="tokens before the cap over which the penalty grows from 0 to its full size"
    )
    penalty: Positive = Field(1.0, description="what an answer at the cap loses of its reward")

    @model_validator(mode="after")
    def _has_a_buffer(self) -> Self:
        if self.mode == "penalty" and self.buffer is None:
            raise ValueError("mode: penalty needs a buffer, the tokens before the cap over which it grows")
        if self.mode != "penalty" and self.buffer is not None:
            raise ValueError(f"buffer is for mode: penalty, and mode is {self.mode}")
        return self


class Algorithm(Section):
    """Advantages and losses: GRPO as the recipes run it. docs/algorithms.md explains all keys."""

    advantage: Advantage = Field(description="how rewards become advantages; a function in grpo/advantages.py")
    loss: PolicyLoss = Field(description="the policy loss; a function in grpo/losses.py")
    std_epsilon: NonNegative = Field(description="added to the standard deviation of a group's rewards")
    clip: NonNegative = Field(description="the ratio is clipped below at 1 - clip")
    clip_high: NonNegative = Field(description="the ratio is clipped above at 1 + clip_high")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="with a negative advantage, the ratio counts up to this (3.0 in the paper); none: unbounded"
    )
    use_kl_loss: bool = Field(description="add the KL divergence from the starting weights to the loss")
    kl_coefficient: NonNegative = Field(description="weight of the KL loss")
    kl_type: KlType = Field(description="estimator of the KL divergence; a function in grpo/losses.py")
    entropy_coefficient: float = Field(description="weight of the entropy, which is subtracted from the loss")
    loss_aggregation: Aggregation = Field(description="how tokens are averaged; a function in grpo/aggregations.py")
    constant_length: PositiveInt | None = Field(
        None, description="tokens that constant_length divides by; none: sampling.max_response_tokens"
    )
    old_log_probs: Literal["auto", "trainer", "engine"] = Field(
        "auto",
        description="what the ratio is taken against: log-probs that the trainer computes before its first step, or"
        " those that the engine sampled with; auto: the engine's if sampling.over_sampling is above 1",
    )
    correction: Correction = Field(
        "none", description="importance weights between engine and trainer; a function in grpo/corrections.py"
    )
    correction_bounds: tuple[NonNegative, Positive] | None = Field(
        None, description="least and largest importance weight; none: 0 and 2 to truncate, 0.5 and 5 to mask"
    )
    overlong: Overlong = Field(Overlong(), description="answers near or at the cap of tokens")
    reference_forward: bool = Field(description="compute the KL metric even if its coefficient is 0")
    old_log_prob_forward: bool = Field(description="recompute old log-probs even with one step per rollout")
    entropy_metric: bool = Field(description="compute the entropy even if its coefficient is 0")

    @property
    def correction_range(self) -> tuple[float, float]:
        """The least and the largest importance weight."""
        return self.correction_bounds or ((0.5, 5.0) if self.correction.endswith("mask") else (0.0, 2.0))

    @field_validator("correction_bounds")
    @classmethod
    def _least_first(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError("the least weight has to be below the largest")
        return bounds


class Experts(Section):
    """How a mixture of experts is trained."""

    dispatcher: Literal["allgather", "alltoall", "flex"] = Field(
        description="Megatron-Core's token dispatcher: how tokens reach experts on other GPUs"
    )
    deepep: bool = Field(description="let the flex dispatcher use DeepEP, a package that you install yourself")
    aux_loss_coefficient: NonNegative = Field(description="weight of the loss that balances the experts' load")


class Mtp(Section):
    """Training of the MTP layer, which predicts the token after the next one and drafts for the engine."""

    train: bool = Field(description="train the MTP layer; it never changes the gradients of the other layers")
    loss_scale: NonNegative = Field(description="weight of the MTP loss")


class Optimizer(Section):
    """Adam and its learning rate."""

    learning_rate: NonNegative = Field(description="learning rate after warm-up")
    warm_up_steps: Annotated[int, Field(ge=0)] = Field(
        description="steps over which the learning rate rises linearly from 0; it is constant afterwards"
    )
    weight_decay: NonNegative = Field(description="decoupled weight decay, as in AdamW")
    betas: tuple[Decay, Decay] = Field(description="decay rates of the first and the second moment")
    epsilon: NonNegative = Field(1e-8, description="added to the root of the second moment")
    clip_gradient_norm: NonNegative = Field(
        description="scale the gradients down to this norm if it is larger; 0 never does"
    )
    cpu_offload: bool = Field(
        description="keep Adam's states in host memory and take its steps on the CPU, with copies overlapped"
    )


class Training(Section):
    """The data, the batches and the length of a training, and the memory that it takes."""

    dataset: Names = Field(description="the problem set to train on, a name under `datasets`, or a list of several")
    weights: list[Positive] | None = Field(
        None,
        description="share of the prompts that each of several sets gives, relative to the others; none: as many as its"
        " rows",
    )
    prompts_per_rollout: PositiveInt = Field(description="prompts that each rollout samples answers to")
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(description="answers to each prompt: one group")
    dynamic_sampling: bool = Field(
        False, description="replace groups whose answers all earn the same, which teach nothing, by new ones"
    )
    max_prompts_factor: Annotated[float, Field(ge=1)] = Field(
        3.0,
        description="dynamic_sampling: replace at most this factor - 1 times prompts_per_rollout groups in a rollout;"
        " then it learns from what there is",
    )
    global_batch: PositiveInt = Field(
        description="answers per optimizer step; as many as a rollout has makes one step per rollout"
    )
    rollouts: PositiveInt = Field(description="rollouts in the whole training; more continue a finished run")
    seed: int = Field(description="seed of the order of prompts and of sampling")
    max_tokens_per_gpu: PositiveInt = Field(
        description="tokens of a pack for each GPU that shares it (tensor x context parallel)"
    )
    log_prob_chunk: PositiveInt = Field(description="tokens whose logits are in memory at one time")
    recompute: Literal["auto", Recompute] = Field(
        description="activations to compute again in the backward pass; auto: the fewest that fit the GPU's memory",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        description="type of weights and activations; the optimizer keeps float32 copies"
    )
    save_interval: PositiveInt = Field(description="rollouts between checkpoints")
    keep_checkpoints: PositiveInt = Field(description="keep the last N checkpoints and the best one")
    max_bad_steps: PositiveInt = Field(
        description="end the run after N steps in a row skipped for a NaN or infinite loss or gradient"
    )
    mode: Literal["full", "rollout_only", "train_only"] = Field(
        "full",
        description="rollout_only: save rollouts and leave the weights as they are; train_only: train on the rollouts"
        " of `replay`, without an engine",
    )
    save_rollouts: bool = Field(
        False,
        description="keep every rollout whole in the run's folder, to train on it again; rollout_only always does",
    )
    replay: str | None = Field(
        None, description="train_only: the folder of a run that saved its rollouts; relative to where Snakemake runs"
    )
    wandb_project: str | None = Field(None, description="also log to this Weights & Biases project")
    on_code_change: Literal["new", "continue"] = Field(
        "new",
        description="if the training's code or a package's version changed: begin a new run beside the old one (new),"
        " or go on with an unfinished run and keep a finished one (continue)",
    )

    @property
    def datasets(self) -> list[str]:
        """The names of all sets to train on."""
        return [self.dataset] if isinstance(self.dataset, str) else self.dataset

    @field_validator("weights")
    @classmethod
    def _one_for_each_set(cls, weights: list[float] | None, given: ValidationInfo) -> list[float] | None:
        names = given.data.get("dataset")  # missing if it is wrong itself
        sets = len(names) if isinstance(names, list) else 1
        if weights and names and len(weights) != sets:
            raise ValueError(f"has to have one number for each set that dataset names, which are {sets}")
        return weights

    @model_validator(mode="after")
    def _replays_something(self) -> Self:
        if (self.mode == "train_only") != (self.replay is not None):
            raise ValueError("mode: train_only and replay belong together: give both, or neither")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        samples = self.prompts_per_rollout * self.samples_per_prompt
        if samples % self.global_batch:
            raise ValueError(
                f"global_batch {self.global_batch} does not divide prompts_per_rollout {self.prompts_per_rollout}"
                f" x samples_per_prompt {self.samples_per_prompt} = {samples}"
            )
        return self


class Sampling(Section):
    """How a rollout samples answers."""

    over_sampling: Annotated[float, Field(ge=1)] = Field(
        1.0,
        description="groups under way over those that a rollout takes; unfinished answers go on in the next rollout, so"
        " that none waits for the longest",
    )
    max_age: PositiveInt = Field(
        2, description="over_sampling: rollouts after its own in which a group may be learned from; one waits for it"
    )

    max_response_tokens: PositiveInt = Field(description="tokens after which an answer is cut off")
    max_prompt_tokens: PositiveInt = Field(description="longer prompts are left out of the training")
    temperature: NonNegative = Field(description="sampling temperature")
    top_p: Share = Field(description="sample from the most probable tokens that together have this probability")
    top_k: TopK = Field(description="sample from the k most probable tokens; -1 for all")
    enable_thinking: bool = Field(description="passed to the chat template: begin answers with a think block")


class Validation(Section):
    """The evaluation during training, before the first rollout and every ``interval`` rollouts. It is only a metric.

    It is separate from `Evaluation`, so that another protocol for the final scores never makes a training stale.
    """

    interval: Annotated[int, Field(ge=0)] = Field(description="rollouts between validations; 0 for none")
    dataset: Name = Field(description="the problem set to validate on, a name under `datasets`")
    samples_per_problem: PositiveInt = Field(description="answers to each problem")
    max_response_tokens: PositiveInt = Field(description="tokens after which an answer is cut off")
    temperature: NonNegative = Field(description="sampling temperature; 0 takes the most probable token")
    top_p: Share = Field(description="sample from the most probable tokens that together have this probability")
