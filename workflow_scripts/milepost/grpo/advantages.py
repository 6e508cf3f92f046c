"""Advantages by name: how much better a response is than the others to the same prompt.

A new one is a function ``(rewards (G, n), settings) -> (G, n)`` here, with its name in `ADVANTAGES` and in
`configuration.training.Advantage`.
"""

from collections.abc import Callable

from torch import Tensor

from milepost.configuration.schema import Algorithm


def grpo(rewards: Tensor, algorithm: Algorithm) -> Tensor:
    """Advantages of GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 4): ``(r - mean) / (std + epsilon)`` in a group.

    Args:
        rewards: (G, n) one row a prompt, one column a sample; n of at least 2.
        algorithm: ``std_epsilon`` is added to the unbiased standard deviation.

    Returns:
        (G, n); exact zeros for a group whose rewards are all equal, which says nothing about its answers, whatever
        rounding does to its mean.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)  # unbiased
    advantages = (rewards - mean) / (std + algorithm.std_epsilon)
    return advantages.masked_fill(~has_spread(rewards)[:, None], 0.0)


ADVANTAGES: dict[str, Callable[[Tensor, Algorithm], Tensor]] = {"grpo": grpo}


def has_spread(rewards: Tensor) -> Tensor:
    """Which groups of ``rewards`` (G, n) hold at least two different rewards: booleans (G,)."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)
