"""Estimate the memory and disk that a recipe takes, from its model's shape, before anything is downloaded."""

from dataclasses import dataclass
from math import ceil
from typing import Protocol

from milepost.configuration import schema
from milepost.configuration.layout import gpus, processes
from milepost.configuration.schema import Recompute
from milepost.configuration.shape import architecture_of
from milepost.qwen3_5.architecture import Architecture

GIB = 2**30
CONTEXT_GIB = 1.5  # CUDA context, NCCL's buffers and kernels of one process
SYNC_GIB = 5.0  # a weight sync: two buckets, and one layer's tensors while they are gathered and merged
ENGINE_OVERHEAD_GIB = 20.0  # an engine beyond its static memory: CUDA graphs and context, activations, workspaces
PROCESS_GIB = 3.0  # host memory of one process of a conversion or export, without weights; measured: 1.1 to 2.6
ENGINE_HOST_GIB = 16.0  # host memory of SGLang's processes for each GPU, without weights: ample, not measured
FREE_SHARE = 0.2  # of a GPU to leave free: the engine keeps CUDA graphs, and tuning in the first step took 10 GiB


class Settings(Protocol):
    """The sections of the configuration that memory depends on."""

    hardware: schema.Hardware
    training: schema.Training
    parallel: schema.Parallel
    optimizer: schema.Optimizer
    mtp: schema.Mtp
    sampling: schema.Sampling
    engine: schema.Engine


@dataclass(frozen=True)
class GpuMemory:
    """Estimated peak memory of one rank in GiB, by purpose: while it trains, and while the engine generates.

    Attributes:
        recompute: what the backward pass recomputes: as configured, or with ``auto`` the least that fits.
        engine: the engine's static memory: its weights, KV cache and states.
        engine_weights: the share of the weights in that, in bf16 and with the MTP layer if it drafts.
    """

    recompute: Recompute
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    engine: float
    engine_weights: float

    @property
    def training(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + CONTEXT_GIB

    @property
    def rollout(self) -> float:
        """The peak: one of the engine's servers was restarted and receives the weights while the others generate."""
        return self.engine + self.weights + SYNC_GIB + CONTEXT_GIB

    @property
    def persistent(self) -> float:
        """What the next training step needs again: weights and optimizer states."""
        return self.weights + self.optimizer

    def fits_beside_engine(self, gpu_memory_gib: float) -> bool:
        """Whether `persistent` can stay on the GPU while the engine generates, instead of moving to host memory."""
        return self.engine + CONTEXT_GIB + ENGINE_OVERHEAD_GIB + self.persistent < gpu_memory_gib


def estimate(shape: Architecture, settings: Settings, gpu_memory_gib: float) -> GpuMemory:
    """Estimate the memory of the fullest rank.

    Per parameter held: 2 bytes of bf16 weights, 4 of fp32 gradients, 12 of fp32 master weights and Adam moments, the
    last sharded over the data-parallel copies, or not on the GPU at all with ``cpu_offload``.
    """
    asked, room = settings.training.recompute, (1 - FREE_SHARE) * gpu_memory_gib
    ways = ("none", "selective", "full") if asked == "auto" else (asked,)
    estimates = [_estimate(shape, settings, way, gpu_memory_gib) for way in ways]
    return next((memory for memory in estimates if memory.training < room), estimates[-1])


def _estimate(shape: Architecture, settings: Settings, recompute: Recompute, gpu_memory_gib: float) -> GpuMemory:
    parallel, training = settings.parallel, settings.training
    world, mtp = processes(settings.hardware), int(settings.mtp.train)
    routed = shape.parameters(mtp) - _without_experts(shape, mtp)
    dense_here = (shape.parameters(mtp) - routed) / (parallel.tensor * parallel.pipeline)
    routed_here = routed / (parallel.expert * parallel.expert_tensor * parallel.pipeline)
    dense_copies = world // (parallel.tensor * parallel.pipeline)
    routed_copies = world // (parallel.expert * parallel.expert_tensor * parallel.pipeline)
    states = 0 if settings.optimizer.cpu_offload else 12 * (dense_here / dense_copies + routed_here / routed_copies)
    width = 2 if training.dtype == "bfloat16" else 4
    # This rank's tokens of the fullest pack. A sequence that is longer than a pack gets one of its own.
    longest = settings.sampling.max_prompt_tokens + settings.sampling.max_response_tokens
    tokens = max(training.max_tokens_per_gpu * parallel.tensor, longest / parallel.context)
    return GpuMemory(
        recompute=recompute,
        weights=width * (dense_here + routed_here) / GIB,
        gradients=4 * (dense_here + routed_here) / GIB,
        optimizer=states / GIB,
        activations=tokens * width * _activations_per_token(shape, parallel, recompute) / GIB,
        # logits of one chunk, their softmax and their gradient, in fp32
        logits=3 * 4 * training.log_prob_chunk * shape.vocab_size / parallel.tensor / GIB,
        engine=settings.engine.mem_fraction_static * gpu_memory_gib,
        engine_weights=engine_weights_gib(shape, settings.engine),
    )


def engine_weights_gib(shape: Architecture, engine: schema.Engine) -> float:
    """An engine's bf16 weights on each of its GPUs in GiB, with the MTP layer if it drafts."""
    drafts = int(engine.speculation is not None)
    return 2 * shape.parameters(drafts) / engine.gpus_per_engine / GIB


def _without_experts(shape: Architecture, mtp: int) -> int:
    """Parameters outside the routed experts."""
    if not shape.is_moe:
        return shape.parameters(mtp)
    one_expert = 3 * shape.hidden_size * shape.expert_ffn_hidden_size
    return shape.parameters(mtp) - (shape.num_layers + mtp) * shape.num_experts * one_expert


def _activations_per_token(shape: Architecture, parallel: schema.Parallel, recompute: Recompute) -> float:
    """Values kept per token for the backward pass: what recomputation leaves of each layer, and one whole layer."""
    hidden = 4 * shape.hidden_size / (parallel.tensor if parallel.sequence else 1)  # two residuals, two norms
    key = shape.linear_num_key_heads * shape.linear_key_head_dim
    value = shape.linear_num_value_heads * shape.linear_value_head_dim
    # Projections, the convolution's output and its three parts, the delta rule's output before and after the gate.
    linear = (2 * key + 2 * value + 2 * (2 * key + value) + 2 * value) / parallel.tensor
    query = shape.num_attention_heads * shape.head_dim
    group = shape.num_query_groups * shape.head_dim
    # Projections with the gate, rotated queries and keys, the output before and after the gate.
    full = (2 * query + 2 * group + query + group + 2 * query) / parallel.tensor
    if shape.is_moe:
        ffn = shape.experts_per_token * shape.expert_ffn_hidden_size + shape.shared_expert_ffn_hidden_size
        copies = shape.experts_per_token * shape.hidden_size  # every expert keeps a copy of the token
        mlp, passing = 3 * ffn + copies, copies  # and gives one back
    else:
        mlp, passing = 3 * shape.ffn_hidden_size / parallel.tensor, 0
    average = ((shape.full_attention_interval - 1) * linear + full) / shape.full_attention_interval
    kept = {"full": hidden / 4, "selective": hidden + average, "none": hidden + average + mlp}
    layers = shape.num_layers / parallel.pipeline
    # Not sharded by tensor parallelism: a projection's gathered input, the final hidden states and their gradient.
    whole = 3 * shape.hidden_size if parallel.tensor > 1 else 0
    return layers * kept[recompute] + hidden + max(linear, full) + mlp + passing + whole


def rescaled_engine(engine: schema.Engine, taken_gib: float, gpu_memory_gib: float) -> schema.Engine:
    """Rescale mem_fraction_static when ``taken_gib`` is already in use: SGLang takes its share of what is free."""
    fraction = engine.mem_fraction_static * gpu_memory_gib / (gpu_memory_gib - taken_gib)
    return engine.model_copy(update={"mem_fraction_static": fraction})


def host_gib(model: schema.Model, stage: str) -> float:
    """Host memory of one stage in GiB.

    The processes of a conversion or an export hold the bf16 weights once in all. So does an evaluation on GPUs while it
    loads them; on a CPU it computes with fp32 weights.
    """
    if stage == "train":
        return model.hardware.host_memory_gib
    architecture = architecture_of(model)
    parameters = architecture.parameters(mtp_num_layers=1) if architecture else 0
    if stage == "evaluate":
        count = gpus(model, stage)
        estimated = ENGINE_HOST_GIB * count + 2 * parameters / GIB if count else PROCESS_GIB + 4 * parameters / GIB
        return model.evaluation.host_memory_gib or min(estimated, model.hardware.host_memory_gib)
    if stage not in ("convert", "export") or not parameters:
        return 0.0
    count = model.conversion.processes if stage == "convert" else 1
    return 2 * parameters / GIB + PROCESS_GIB * count


def asked_gib(model: schema.Model, stage: str) -> int:
    """The host memory in GiB that a stage's job asks of Snakemake or Slurm, which may end a job that takes more."""
    return ceil(host_gib(model, stage)) if stage == "evaluate" else model.hardware.host_memory_gib


def disk_gib(model: schema.Model, stage: str) -> float:
    """Disk space of one stage's results in GiB: bf16 weights, and for training checkpoints with fp32 Adam states.

    A download lies in the Hub's cache; a local folder is only linked to.
    """
    if stage == "download" and not model.source.repo:
        return 0.0
    if (architecture := architecture_of(model)) is None:
        return 0.0
    parameters = architecture.parameters(mtp_num_layers=1)
    kept = model.training.keep_checkpoints + 2  # the best one, and the one being written
    checkpoints = min(kept, -(-model.training.rollouts // model.training.save_interval))
    width = {"download": 2, "convert": 2, "train": 14 * checkpoints, "export": 2}
    return width.get(stage, 0) * parameters / GIB
