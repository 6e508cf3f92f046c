"""The optimizer's door: gradients in fp32, summed over the ranks that share weights, clipped, and Adam's step.

The training loop knows `Optimizer` alone. On CPU it is `grpo.cpu_optimizer`'s; on GPUs `grpo.gpu_optimizer`'s, around
Megatron-Core's own gradient buffers and DistributedOptimizer, which insist on CUDA tensors.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from milepost.configuration.schema import Optimizer as Settings


class Optimizer(Protocol):
    """What the training loop asks of an optimizer."""

    def zero_grad(self) -> None:
        """Forget the gradients accumulated so far."""

    def reduce(self) -> None:
        """Sum the accumulated gradients over every rank that holds the same weights; once a step."""

    def step(self, learning_rate: float) -> float:
        """Clip and update; the global gradient norm before clipping. If it is not finite nothing has changed."""

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state by name, everything that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict` of the same model under the same parallel layout."""

    def sleep(self, weights: bool = True) -> None:
        """Give back GPU memory: of gradients, which are lost, of states, and of the model's weights if ``weights``.

        States and weights keep theirs where the optimizer was built to ``stay``. Every rank calls it; it returns when
        all have. What is asleep already stays so. Nothing to do on CPU.
        """

    def wake(self, weights_only: bool = False) -> None:
        """Take the memory again, contents as before; of ``weights_only`` the weights can be read, not trained."""


def build_optimizer(model: nn.Module, settings: Settings, *, stay: bool = False) -> Optimizer:
    """The optimizer for the device that ``model``, its weights loaded, is on.

    ``stay``: there is room for weights and states beside what runs while it sleeps.
    """
    if next(model.parameters()).is_cuda:
        from milepost.grpo.gpu_optimizer import GpuAdam

        return GpuAdam(model, settings, stay)
    from milepost.grpo.cpu_optimizer import CpuAdam

    return CpuAdam(model, settings)


def learning_rate_at(step: int, settings: Settings) -> float:
    """The rate of optimizer step ``step`` (from 1): linear over the warm-up, then constant."""
    if step >= settings.warm_up_steps:
        return settings.learning_rate
    return settings.learning_rate * step / settings.warm_up_steps
