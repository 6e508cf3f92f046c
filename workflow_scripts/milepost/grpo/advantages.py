"""Advantages by name: how much better a response is than the others to the same prompt.

To add one, write a function ``(rewards (G, n), settings) -> (G, n)`` here and add its name to `ADVANTAGES` and to
`configuration.training.Advantage`.
"""

from collections.abc import Callable

from torch import Tensor

from milepost.configuration.schema import Algorithm


def grpo(rewards: Tensor, algorithm: Algorithm) -> Tensor:
    """Advantages of GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 4): ``(r - mean) / (std + epsilon)`` in a group.

    Args:
        rewards: (G, n) one row per prompt, one column per sample; n is at least 2.
        algorithm: ``std_epsilon`` is added to the unbiased standard deviation.

    Returns:
        (G, n); exactly 0 in a group of equal rewards, even if their mean is rounded.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)  # unbiased
    advantages = (rewards - mean) / (std + algorithm.std_epsilon)
    return advantages.masked_fill(~has_spread(rewards)[:, None], 0.0)


ADVANTAGES: dict[str, Callable[[Tensor, Algorithm], Tensor]] = {"grpo": grpo}


def has_spread(rewards: Tensor) -> Tensor:
    """Whether each group of ``rewards`` (G, n) has at least two different rewards: booleans (G,)."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)
