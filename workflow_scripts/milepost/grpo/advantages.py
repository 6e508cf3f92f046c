"""Group-relative advantages: what a response earned beyond the other answers to the same prompt."""

from torch import Tensor


def group_advantages(rewards: Tensor, epsilon: float) -> Tensor:
    """Advantages of GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 4), ``(r - mean) / (std + epsilon)`` within a group.

    Args:
        rewards: (G, n) one row a prompt, one column a sample; n of at least 2.
        epsilon: added to the unbiased standard deviation.

    Returns:
        (G, n); a group whose rewards are all the same says nothing about its answers and gets exact zeros, whatever
        rounding does to its mean.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)  # unbiased
    advantages = (rewards - mean) / (std + epsilon)
    return advantages.masked_fill(~has_spread(rewards)[:, None], 0.0)


def has_spread(rewards: Tensor) -> Tensor:
    """Which groups of ``rewards`` (G, n) hold at least two different rewards: booleans (G,)."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)
