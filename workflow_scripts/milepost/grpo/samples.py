"""A rollout's graded samples, the advantages that training takes from them, and their metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from milepost.grpo import overlong
from milepost.grpo.advantages import ADVANTAGES, has_spread
from milepost.grpo.data import Prompt
from milepost.grpo.settings import Settings
from milepost.rewards.base import Verdict
from milepost.rollout.engine import Completion


@dataclass(frozen=True)
class Sample:
    """One response and its reward.

    Attributes:
        ages: for each token, how many rollouts older the weights are that sampled it than those that train on it.
    """

    prompt: Prompt
    completion: Completion
    text: str
    verdict: Verdict
    ages: Sequence[int] = ()

    @property
    def reward(self) -> float:
        return float(self.verdict.reward)

    def row(self, rollout: int, prompt_text: str) -> dict[str, Any]:
        """The sample as a line of samples.jsonl."""
        return {
            "rollout": rollout,
            "dataset": self.prompt.dataset,
            "place": self.prompt.place,
            "prompt": prompt_text,
            "response": self.text,
            "label": self.prompt.label,
            "answer": self.verdict.answer,
            "reward": self.reward,
            "reason": self.verdict.reason,
            **({"parts": self.verdict.parts_as_json()} if self.verdict.parts else {}),
            "tokens": len(self.completion.token_ids),
            "finish": self.completion.finish,
        }


@dataclass(frozen=True)
class TrainingSequence:
    """The part of a sample that training needs.

    Attributes:
        ids: (P + R,) the prompt's tokens and then the response's.
        log_probs: (R,) of the response tokens in the engine that sampled them, fp32.
        advantage: of the whole response.
        routing: (P + R, layers x k) experts to visit, layer by layer; None if the routers choose.
        fresh: (R,) whether the weights that are trained sampled the token; None if all tokens are fresh.
        is_filtered: whether the response is left out of the loss.
    """

    ids: Tensor
    log_probs: Tensor
    advantage: float
    routing: Tensor | None = None
    fresh: Tensor | None = None
    is_filtered: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.ids) - len(self.log_probs)

    @property
    def response_length(self) -> int:
        return len(self.log_probs)


@dataclass(frozen=True)
class Rollout:
    """Responses to train on.

    Attributes:
        samples: group by group; a group shares a prompt.
        generated: ``samples``, and those of replaced groups. The metrics are of both, or they would be of groups with
            spread alone.
        sequences: ``samples`` for training, in the same order.
        flow: metrics of groups that were replaced or carried over.
        seconds: duration of each phase.
    """

    samples: list[Sample]
    generated: list[Sample]
    sequences: list[TrainingSequence]
    flow: dict[str, float]
    seconds: dict[str, float]

    @property
    def tokens(self) -> int:
        """The number of tokens in all prompts and responses."""
        return sum(len(sequence.ids) for sequence in self.sequences)


def to_training(samples: Sequence[Sample], settings: Settings) -> list[TrainingSequence]:
    """Training sequences with advantages; every ``samples_per_prompt`` consecutive samples form a group."""
    rewards = _rewards(samples, settings.training.samples_per_prompt)
    lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples]).view_as(rewards)
    rewards += overlong.penalties(lengths, settings)
    advantages = ADVANTAGES[settings.algorithm.advantage](rewards, lengths, settings.algorithm)
    return [
        TrainingSequence(
            ids=torch.tensor(sample.prompt.ids + sample.completion.token_ids),
            log_probs=torch.tensor(sample.completion.log_probs, dtype=torch.float32),
            advantage=advantage,
            routing=_whole_routing(sample.completion.routing),
            fresh=torch.tensor(sample.ages) == 0 if settings.may_be_stale else None,
            is_filtered=overlong.is_filtered(sample.completion, settings),
        )
        for sample, advantage in zip(samples, advantages.flatten().tolist(), strict=True)
    ]


def _rewards(samples: Sequence[Sample], group_size: int) -> Tensor:
    """The rewards as (G, n): one row per prompt, one column per sample."""
    return torch.tensor([sample.reward for sample in samples], dtype=torch.float64).view(-1, group_size)


def _whole_routing(routing: Tensor | None) -> Tensor | None:
    """Add a row for the last token, whose output is unused, so it may visit the same experts as the one before it."""
    return None if routing is None else torch.cat([routing, routing[-1:]])


def statistics(samples: Sequence[Sample], group_size: int) -> dict[str, float]:
    """The metrics of a rollout that need no forward pass.

    ``pass_rate`` is the share of prompts with at least one correct sample, ``groups_without_spread`` the share of
    prompts whose samples all have the same reward and so no gradient, ``reward_<part>`` the mean of one part of a sum,
    and ``grading_failed_share`` the share of samples whose grading failed. With speculative decoding
    ``acceptance_length`` is the number of tokens per forward pass of the model, and ``acceptance_rate`` the share of
    drafted tokens that are accepted. With several training sets ``<metric>/<set>`` is the metric of one set, and
    ``prompts/<set>`` the number of its prompts.
    """
    sets = {
        name: [s for s in samples if s.prompt.dataset == name] for name in sorted({s.prompt.dataset for s in samples})
    }
    found = _statistics(samples, group_size) | _acceptance([sample.completion for sample in samples])
    if len(sets) > 1:
        for name, its in sets.items():
            found[f"prompts/{name}"] = len(its) // group_size
            found |= {f"{metric}/{name}": value for metric, value in _statistics(its, group_size).items()}
    return found


def _statistics(samples: Sequence[Sample], group_size: int) -> dict[str, float]:
    rewards = _rewards(samples, group_size)
    solved = torch.tensor([sample.verdict.correct for sample in samples]).view(-1, group_size)
    lengths = [len(sample.completion.token_ids) for sample in samples]
    parts: dict[str, list[float]] = {}
    for sample in samples:
        for name, part in sample.verdict.parts.items():
            parts.setdefault(name, []).append(part.reward)
    return {
        "reward_mean": rewards.mean().item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        **{f"reward_{name}": sum(values) / len(values) for name, values in parts.items()},
        "pass_rate": solved.any(dim=1).double().mean().item(),
        "grading_failed_share": sum(sample.verdict.failed for sample in samples) / len(samples),
        "groups_without_spread": 1.0 - has_spread(rewards).double().mean().item(),
        "response_length_mean": sum(lengths) / len(lengths),
        "truncated_share": sum(sample.completion.finish == "length" for sample in samples) / len(samples),
    }


def _acceptance(completions: Sequence[Completion]) -> dict[str, float]:
    drafted = [completion for completion in completions if completion.drafting]
    if not drafted:
        return {}
    tokens = sum(len(completion.token_ids) for completion in drafted)
    return {
        "acceptance_length": tokens / sum(completion.drafting.passes for completion in drafted),
        "acceptance_rate": sum(completion.drafting.accepted for completion in drafted)
        / sum(completion.drafting.drafted for completion in drafted),
    }
