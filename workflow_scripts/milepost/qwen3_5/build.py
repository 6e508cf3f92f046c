"""Set up the process groups (`initialize`, once per process) and build the model (`build_model`)."""

import itertools
import logging
import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from milepost.common import loopback
from milepost.common.errors import UserError
from milepost.configuration.schema import Experts, Parallel, Recompute
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.model import Qwen3_5
from milepost.qwen3_5.specs import decoder_spec, mtp_spec

# The first step may compile kernels on some ranks while others wait in a collective.
_TIMEOUT = timedelta(minutes=60)
# Where nothing is trained, as in a conversion, every dispatcher does.
UNTRAINED = Experts(dispatcher="flex", deepep=False, aux_loss_coefficient=0.0)
_groups = itertools.count()


def initialize(parallel: Parallel | None = None, seed: int = 1234) -> torch.device:
    """Initialize torch.distributed and Megatron-Core's model-parallel groups; return this process's device.

    Processes are those of `launch.torchrun`, or this one alone. The backend is NCCL with one GPU per process, or gloo
    without GPUs.
    """
    parallel = parallel or Parallel()
    if parallel.tensor > 1 and parallel.sequence:
        # A single hardware queue starts kernels in launch order. Otherwise the matrix product that should overlap with
        # a collective may occupy the whole GPU first, and the collective runs after it, alone.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _choose_device()
    if not dist.is_initialized():
        os.environ |= loopback.INTERFACE
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, world = loopback.rendezvous(next(_groups))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    world, needed = dist.get_world_size(), parallel.tensor * parallel.pipeline * parallel.context
    routed = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world % needed or world % routed:
        raise UserError(
            f"parallel: tensor x pipeline x context = {needed} and expert x expert_tensor x pipeline = {routed}"
            f" must both divide the {world} processes: change the layout or the number of processes"
        )
    if device.type == "cpu":
        from milepost.qwen3_5 import cpu_shim

        cpu_shim.install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=int(_TIMEOUT.total_seconds() // 60),
    )
    torch.manual_seed(seed)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def finalize() -> None:
    """Destroy the process groups, so that `initialize` can create new ones or the process can end."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_model(
    architecture: Architecture,
    parallel: Parallel | None = None,
    *,
    dtype: torch.dtype | None = None,
    recompute: Recompute = "none",
    mtp_num_layers: int = 0,
    experts: Experts | None = None,
    materialize: bool = True,
) -> Qwen3_5:
    """Build this rank's part of the model with uninitialized weights, to be loaded from a checkpoint.

    Args:
        parallel: the layout given to `initialize`.
        dtype: of parameters and activations; by default bfloat16 on GPU and float32 on CPU. ``A_log`` is always fp32.
        recompute: ``full`` keeps only a layer's input and recomputes the rest in the backward pass; ``selective``
            recomputes only the MLP or the experts.
        mtp_num_layers: 1 to build the MTP layer (on the last pipeline stage).
        experts: token dispatcher and auxiliary loss of a mixture of experts.
        materialize: False builds parameters without storage (on the meta device), for names, shapes and shards.
    """
    parallel, experts = parallel or Parallel(), experts or UNTRAINED
    if mtp_num_layers > architecture.mtp_num_layers:
        raise UserError(
            f"mtp_num_layers {mtp_num_layers}: the checkpoint has {architecture.mtp_num_layers} MTP layers: ask for no"
            " more"
        )
    on_cpu = not torch.cuda.is_available()
    dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    config = transformer_config(
        architecture, parallel, dtype=dtype, recompute=recompute, mtp_num_layers=mtp_num_layers, experts=experts
    )
    config.use_cpu_initialization = on_cpu or not materialize
    stage = get_num_layers_to_build(config)
    offset = get_transformer_layer_offset(config)
    dispatcher = "deepep" if experts.deepep else experts.dispatcher
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # GPTModel "is deprecated"
    with nullcontext() if materialize else _without_storage():
        model = Qwen3_5(
            config,
            decoder_spec(architecture, range(offset, offset + stage), dispatcher),
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            rotary_percent=architecture.rotary_percent,
            rotary_base=architecture.rotary_base,
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            mtp_block_spec=mtp_spec(architecture, dispatcher) if mtp_num_layers else None,
        )
    if materialize and not on_cpu:
        model.to(
            torch.cuda.current_device()
        )  # Megatron-Core creates the router and the shared expert's gate on the CPU
    return model


def transformer_config(
    architecture: Architecture,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    recompute: Recompute,
    mtp_num_layers: int,
    experts: Experts,
) -> TransformerConfig:
    """Megatron-Core's configuration of this architecture in this layout."""
    moe = architecture.is_moe
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.expert_ffn_hidden_size if moe else architecture.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=True,
        attention_output_gate=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # i.e. the one in the layer specs; Transformer Engine itself is not used
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=architecture.full_attention_interval,
        linear_conv_kernel_dim=architecture.linear_conv_kernel_dim,
        linear_key_head_dim=architecture.linear_key_head_dim,
        linear_value_head_dim=architecture.linear_value_head_dim,
        linear_num_key_heads=architecture.linear_num_key_heads,
        linear_num_value_heads=architecture.linear_num_value_heads,
        mtp_num_layers=mtp_num_layers or None,
        **(_moe_config(architecture, experts) if moe else {}),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        variable_seq_lengths=True,
        # `experts.MoELayer` replaces this one if another is configured.
        moe_token_dispatcher_type="flex" if experts.deepep else "alltoall",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        init_model_with_meta_device=True,  # don't sync the embedding's copies on two stages: both are loaded
        **_recompute_config(recompute, moe),
    )


def _moe_config(architecture: Architecture, experts: Experts) -> dict:
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": architecture.shared_expert_ffn_hidden_size,
        "moe_shared_expert_gate": True,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if experts.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": experts.aux_loss_coefficient,
    }


def _recompute_config(recompute: Recompute, moe: bool) -> dict:
    return {
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe" if moe else "mlp"]},
        "none": {},
    }[recompute]


def _choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def _without_storage() -> AbstractContextManager[None]:
    """Make Megatron-Core allocate on the meta device what it allocates on "the current device"."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device
