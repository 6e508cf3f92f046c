"""Overlong answers: a penalty on the training reward, or no part in the loss (DAPO, arXiv 2503.14476, section 3.4).

A cut-off answer is graded as wrong, however right it might have become. The penalty lowers the reward gradually before
the cap; the filter leaves cut-off answers out of the loss, but keeps their rewards in the baseline of their group.
Rewards are logged as graded.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from milepost.grpo.settings import Settings
from milepost.rollout.engine import Completion


def penalties(lengths: Tensor, settings: Settings) -> Tensor:
    """What the penalty adds to the rewards of responses of these lengths, in tokens; never above 0.

    It falls linearly from 0 to ``-penalty`` over the last ``buffer`` tokens before the cap.
    """
    overlong, cap = settings.algorithm.overlong, settings.sampling.max_response_tokens
    if overlong.mode != "penalty":
        return torch.zeros(lengths.shape, dtype=torch.float64)
    beyond = (lengths.double() - (cap - overlong.buffer)).clamp(min=0)
    return -overlong.penalty * beyond / overlong.buffer


def is_filtered(completion: Completion, settings: Settings) -> bool:
    """Whether a response is left out of the loss."""
    return settings.algorithm.overlong.mode == "filter" and completion.finish == "length"


def statistics(completions: Sequence[Completion], rewards: Sequence[float], settings: Settings) -> dict[str, float]:
    """Metrics of a rollout's overlong answers; empty in mode none.

    ``overlong_share`` is the share of answers that have a penalty or are filtered, ``reward_mean_without_overlong`` the
    mean reward of the others, and ``reward_mean_with_penalty`` the mean that training sees.
    """
    if settings.algorithm.overlong.mode == "none":
        return {}
    of_length = penalties(torch.tensor([len(completion.token_ids) for completion in completions]), settings).tolist()
    found = [
        is_filtered(completion, settings) or penalty < 0
        for completion, penalty in zip(completions, of_length, strict=True)
    ]
    others = [reward for reward, is_overlong in zip(rewards, found, strict=True) if not is_overlong]
    report = {
        "overlong_share": sum(found) / len(found),
        "reward_mean_without_overlong": sum(others) / len(others) if others else math.nan,
    }
    if settings.algorithm.overlong.mode == "penalty":
        report["reward_mean_with_penalty"] = (sum(rewards) + sum(of_length)) / len(rewards)
    return report
