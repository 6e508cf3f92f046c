"""Advantages by name: how much better a response is than others, in most cases than those to the same prompt.

To add one, write a function ``(rewards, lengths, algorithm) -> (G, n)`` here and add its name to `ADVANTAGES` and to
`configuration.training.Advantage`. Its arguments are

    rewards: (G, n) one row per prompt, one column per sample, in float64; n is at least 2.
    lengths: (G, n) response tokens.
    algorithm: ``std_epsilon`` is added to every standard deviation; those are unbiased.

If all rewards that are compared are equal, their advantages are exactly 0, even if their mean is rounded.
"""

from collections.abc import Callable

from torch import Tensor

from milepost.configuration.schema import Algorithm


def grpo(rewards: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """``(r - mean) / (std + epsilon)`` in a group (GRPO, Shao et al. 2024, arXiv 2402.03300, section 4.1.2)."""
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    advantages = (rewards - mean) / (std + algorithm.std_epsilon)
    return advantages.masked_fill(~has_spread(rewards)[:, None], 0.0)


def dr_grpo(rewards: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """``r - mean`` in a group, without a scale of its own (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred.masked_fill(~has_spread(rewards)[:, None], 0.0)


def rloo(rewards: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """``r`` minus the mean of the group's others (RLOO, Ahmadian et al. 2024, arXiv 2402.14740)."""
    n = rewards.shape[1]
    return dr_grpo(rewards, lengths, algorithm) * (n / (n - 1))


def reinforce_plus_plus(rewards: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """``r``, whitened over all tokens of the rollout (REINFORCE++, Hu et al. 2025, arXiv 2501.03262).

    A group of equal rewards has a gradient, too: it is compared with the other groups.
    """
    return _whitened(rewards, lengths, algorithm)


def reinforce_plus_plus_baseline(rewards: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """``r - mean`` in a group, whitened over all tokens of the rollout (the baseline variant of arXiv 2501.03262)."""
    return _whitened(dr_grpo(rewards, lengths, algorithm), lengths, algorithm)


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Algorithm], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}


def has_spread(rewards: Tensor) -> Tensor:
    """Whether each group of ``rewards`` (G, n) has at least two different rewards: booleans (G,)."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def _whitened(values: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """Shift and scale values (G, n) to mean 0 and standard deviation 1 over tokens."""
    if values.max() == values.min():
        return values.new_zeros(values.shape)
    tokens = lengths.sum()
    centred = values - (values * lengths).sum() / tokens
    std = ((centred.square() * lengths).sum() / (tokens - 1)).sqrt()
    return centred / (std + algorithm.std_epsilon)
