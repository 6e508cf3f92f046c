"""Advantages by name: how much better a response is than others, above all than those to the same prompt.

A new one is a function ``(rewards, lengths, algorithm) -> (G, n)`` here, with its name in `ADVANTAGES` and in
`configuration.training.Advantage`. Each takes

    rewards: (G, n) one row a prompt, one column a sample, in float64; n of at least 2.
    lengths: (G, n) response tokens.
    algorithm: ``std_epsilon`` is added to every standard deviation, which is unbiased.

Where rewards say nothing about answers, because all that are compared are equal, advantages are exactly zero, whatever
rounding does to their mean.
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

    A group whose rewards are all equal teaches, too: it is compared with the other groups.
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
    """Which groups of ``rewards`` (G, n) hold at least two different rewards: booleans (G,)."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def _whitened(values: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """Shift and scale (G, n) values to mean 0 and standard deviation 1, each counted once for every token."""
    if values.max() == values.min():
        return values.new_zeros(values.shape)
    tokens = lengths.sum()
    centred = values - (values * lengths).sum() / tokens
    std = ((centred.square() * lengths).sum() / (tokens - 1)).sqrt()
    return centred / (std + algorithm.std_epsilon)
