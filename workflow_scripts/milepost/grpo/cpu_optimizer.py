"""The optimizer on the CPU: fp32 gradients in one buffer, all-reduced, and torch's fused Adam."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from milepost.configuration.schema import Optimizer as Settings
from milepost.grpo.partial_gradients import sum_partial_gradients
from milepost.qwen3_5.experts import is_expert


class CpuAdam:
    """AdamW on fp32 master weights; `grpo.optimizer.Optimizer` documents the methods.

    An fp32 weight is its own master. Gradients are summed, never averaged, since the loss is already normalized over
    the whole step.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        of_kind = {
            expert: {name: p for name, p in self.parameters.items() if is_expert(p) == expert}
            for expert in (False, True)
        }
        self.buffers = {expert: _buffer(parameters) for expert, parameters in of_kind.items()}
        self.gradients = _views(of_kind[False], self.buffers[False]) | _views(of_kind[True], self.buffers[True])
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(_accumulate_into(self.gradients[name]))
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.masters[name] for name in names], "weight_decay": decay}
                for names, decay in self._decay_groups()
                if names
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )

    def _decay_groups(self) -> list[tuple[list[str], float]]:
        """Megatron's rule: no weight decay for biases and one-dimensional weights."""
        exempt = [name for name, p in self.parameters.items() if p.dim() == 1 or name.endswith(".bias")]
        decayed = [name for name in self.parameters if name not in set(exempt)]
        return [(decayed, self.settings.weight_decay), (exempt, 0.0)]

    def zero_grad(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()

    def reduce(self) -> None:
        sum_partial_gradients(self.parameters, self.gradients)
        data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for of_experts, group in ((False, data_parallel), (True, parallel_state.get_expert_data_parallel_group())):
            if group.size() > 1 and self.buffers[of_experts].numel():
                dist.all_reduce(self.buffers[of_experts], group=group)

    def step(self, learning_rate: float) -> float:
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            return norm
        limit = self.settings.clip_gradient_norm
        if limit and norm > limit:
            for buffer in self.buffers.values():
                buffer.mul_(limit / (norm + 1e-6))
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        for name, master in self.masters.items():
            master.grad = self.gradients[name]
        self.adam.step()
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.data.copy_(self.masters[name])
        return norm

    def _gradient_norm(self) -> float:
        """The 2-norm over all weights of the model; a weight that several ranks hold counts once."""
        squares = {of_experts: torch.zeros((), dtype=torch.float64) for of_experts in (False, True)}
        for name, parameter in self.parameters.items():
            if _counts_here(parameter):
                squares[is_expert(parameter)] += self.gradients[name].norm(dtype=torch.float64) ** 2
        dist.all_reduce(squares[False], group=parallel_state.get_model_parallel_group())
        dist.all_reduce(squares[True], group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        return math.sqrt(squares[False] + squares[True])

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for name, master in self.masters.items():
            for key, value in self.adam.state[master].items():  # step, exp_avg, exp_avg_sq; none before the first step
                state[f"{key}.{name}"] = value
            if self.parameters[name].dtype != torch.float32:
                state[f"master.{name}"] = master.data
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            if f"master.{name}" in state:
                master.data.copy_(state[f"master.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in state]
            self.adam.state[master] = {key: state[f"{key}.{name}"].clone() for key in keys}

    def sleep(self, weights: bool = True) -> None:
        pass

    def wake(self, weights_only: bool = False) -> None:
        pass


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The fp32 weight that Adam updates; shares the memory of an fp32 ``parameter``."""
    return nn.Parameter(parameter.detach().float())


def _buffer(parameters: dict[str, nn.Parameter]) -> Tensor:
    return torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float32)


def _views(parameters: dict[str, nn.Parameter], buffer: Tensor) -> dict[str, Tensor]:
    parts = buffer.split([p.numel() for p in parameters.values()]) if parameters else []
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def _accumulate_into(gradient: Tensor):
    def hook(parameter: Tensor) -> None:
        gradient.add_(parameter.grad)
        parameter.grad = None

    return hook


def _counts_here(parameter: nn.Parameter) -> bool:
    """Whether this rank's copy counts in the norm: every shard does, and the first of several replicas."""
    if getattr(parameter, "tensor_model_parallel", False):
        return True
    rank = (
        parallel_state.get_expert_tensor_parallel_rank()
        if is_expert(parameter)
        else parallel_state.get_tensor_model_parallel_rank()
    )
    return rank == 0
