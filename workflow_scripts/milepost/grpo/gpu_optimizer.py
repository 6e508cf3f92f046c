"""The optimizer on GPUs: Megatron-Core's DistributedDataParallel and DistributedOptimizer.

Gradients are accumulated and reduce-scattered in fp32; master weights and Adam's moments are sharded over the
data-parallel ranks. With ``cpu_offload`` both are on the CPU, where Adam runs while copies go both ways
(`grpo.offloaded_adam`). The DistributedOptimizer's precision-aware mode then passes on the fp32 gradients of bf16
weights unchanged, and keeps no master weights on the GPU. Moments are fp32: narrower ones need Transformer Engine.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from milepost.configuration.schema import Optimizer as Settings
from milepost.grpo.offloaded_adam import OffloadedAdam
from milepost.grpo.parked_memory import ParkedMemory
from milepost.grpo.partial_gradients import sum_partial_gradients
from milepost.qwen3_5.model import Qwen3_5

STATE = ("step", "exp_avg", "exp_avg_sq")


class GpuAdam:
    """AdamW on sharded states; `grpo.optimizer.Optimizer` documents the methods.

    The weights of ``model`` become views of one buffer per dtype.
    """

    def __init__(self, model: Qwen3_5, settings: Settings, stay: bool) -> None:
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
        self.settings, self.stay = settings, stay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        config = copy.copy(model.config)
        config.calculate_per_token_loss = True  # sum gradients, never average: the loss is already normalized
        layout = DistributedOptimizer.compute_full_param_layout(
            list(self.parameters.values()),
            None,
            parallel_state.get_data_parallel_group(with_context_parallel=True).size(),
            reduction,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_group().size(),
        )
        self.buffered = DistributedDataParallel(config, reduction, model, full_param_layout=layout)
        with torch.no_grad():  # makes its shards of fp32 weights plain views
            self.optimizer = get_megatron_optimizer(
                _config(settings, model.config.params_dtype), [self.buffered], use_gloo_process_groups=False
            )
        if settings.cpu_offload:
            for part in self.optimizer.chained_optimizers:
                part.optimizer = OffloadedAdam(part.optimizer.param_groups, settings)
        else:
            for (
                group
            ) in self.optimizer.param_groups:  # foreach, torch's default, needs temporaries of the weights' size
                group["fused"], group["foreach"] = True, False
        self._memory = ParkedMemory()
        torch.cuda.empty_cache()  # free the weights' previous memory

    def zero_grad(self) -> None:
        self.buffered.zero_grad_buffer()

    def reduce(self) -> None:
        sum_partial_gradients(self.parameters, {name: p.main_grad for name, p in self.parameters.items()})
        self.buffered.finish_grad_sync()

    def step(self, learning_rate: float) -> float:
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm
        limit = self.settings.clip_gradient_norm
        if limit and norm > limit:
            self.buffered.scale_gradients(limit / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate, self.settings.weight_decay * group["wd_mult"]
        if self.stay and not any(master in states for _, master, states in self._slots()):
            # The first step allocates the moments; inside cached blocks they would keep whole blocks from being freed.
            torch.cuda.empty_cache()
        self.optimizer.step_with_ready_grads()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self._memory.on_host(tensor) for name, tensor in self._state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for key, master, states in self._slots():
            master.data.copy_(state[f"master.{key}"])
            states[master] = {
                name: state[f"{name}.{key}"].to(master.device, copy=True) for name in STATE if f"{name}.{key}" in state
            }

    def sleep(self, weights: bool = True) -> None:
        self.buffered.offload_grad_buffers(empty_cache=False)
        if not self.stay:
            self._memory.park(self._movable_state())
            if weights:  # with cpu_offload the host has them already, in fp32
                self._memory.park(self._weight_buffers(), keep=not self.settings.cpu_offload)
        torch.cuda.empty_cache()
        dist.barrier()

    def wake(self, weights_only: bool = False) -> None:
        if self._memory.unpark(self._weight_buffers()) and self.settings.cpu_offload:
            for part in self.optimizer.chained_optimizers:
                part.optimizer.write_weights()
            self.buffered.start_param_sync(force_sync=True)
        if not weights_only:
            self._memory.unpark(self._movable_state())
            self.buffered.restore_grad_buffers()

    def _weight_buffers(self) -> list[Tensor]:
        return [buffer.param_data for buffer in self.buffered.buffers + self.buffered.expert_parallel_buffers]

    def _movable_state(self) -> list[Tensor]:
        """The states on the GPU that do not share the weights' memory, as the master of an fp32 weight does."""
        weights = {buffer.untyped_storage()._cdata for buffer in self._weight_buffers()}
        return [t for _, t in self._state() if t.is_cuda and t.dim() and t.untyped_storage()._cdata not in weights]

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's state by name."""
        for key, master, states in self._slots():
            yield f"master.{key}", master
            for name in STATE:
                if name in states.get(master, {}):
                    yield f"{name}.{key}", states[master][name]

    def _slots(self) -> Iterator[tuple[str, Tensor, dict]]:
        """(key, master weight, the torch optimizer's states by master weight), always in the same order."""
        for number, part in enumerate(self.optimizer.chained_optimizers):
            slots = part.optimizer.slots() if self.settings.cpu_offload else _slots_of(part.optimizer)
            for key, master, states in slots:
                yield f"{number}.{key}", master, states


def _slots_of(adam: torch.optim.AdamW) -> Iterator[tuple[str, Tensor, dict]]:
    for number, group in enumerate(adam.param_groups):
        for index, master in enumerate(group["params"]):
            yield f"{number}.{index}", master, adam.state


def _config(settings: Settings, dtype: torch.dtype) -> OptimizerConfig:
    """The settings for Megatron-Core. `GpuAdam.step` clips, and sets learning rate and weight decay, by itself."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.epsilon,
        clip_grad=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    # The constructor allows this only with Transformer Engine's Adam or its own offloading. It makes the
    # DistributedOptimizer create no master weights, and leave gradients in ``decoupled_grad``.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = settings.cpu_offload
    return config
