"""The optimizer's interface: fp32 gradients, summed over the ranks that share weights, clipping, and Adam's step.

The training loop uses `Optimizer` only. `grpo.cpu_optimizer` implements it on the CPU; `grpo.gpu_optimizer` on GPUs,
with Megatron-Core's gradient buffers and DistributedOptimizer, which require CUDA tensors.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from milepost.configuration.schema import Optimizer as Settings


class Optimizer(Protocol):
    """The optimizer as the training loop sees it."""

    def zero_grad(self) -> None:
        """Set the accumulated gradients to zero."""

    def reduce(self) -> None:
        """Sum the accumulated gradients over all ranks that hold the same weights; called once per step."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, and return the global gradient norm before clipping; if that is not finite, change nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state by name: everything that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned for the same model and parallel layout."""

    def sleep(self, weights: bool = True) -> None:
        """Free the GPU memory of the gradients (they are lost), the states, and if ``weights`` the model's weights.

        States and weights stay if the optimizer was built with ``stay``. Every rank calls this, and it returns when all
        have done so. May be called again while asleep. Does nothing on the CPU.
        """

    def wake(self, weights_only: bool = False) -> None:
        """Undo `sleep`; with ``weights_only`` the weights can be read, but not trained."""


def build_optimizer(model: nn.Module, settings: Settings, *, stay: bool = False) -> Optimizer:
    """The optimizer for the device of ``model``, whose weights are loaded.

    ``stay`` keeps weights and states on the GPU while the optimizer sleeps; the rollout engine must fit beside them.
    """
    if next(model.parameters()).is_cuda:
        from milepost.grpo.gpu_optimizer import GpuAdam

        return GpuAdam(model, settings, stay)
    from milepost.grpo.cpu_optimizer import CpuAdam

    return CpuAdam(model, settings)


def learning_rate_at(step: int, settings: Settings) -> float:
    """The learning rate of optimizer step ``step``, counted from 1: linear warm-up, then constant."""
    if step >= settings.warm_up_steps:
        return settings.learning_rate
    return settings.learning_rate * step / settings.warm_up_steps
