"""One rollout: prompts in, graded samples out. Token ids go in and token ids come out; nothing is tokenised again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milepost.grpo.advantages import group_advantages, has_spread
from milepost.grpo.data import Prompt
from milepost.rewards.base import Response, Verdict
from milepost.rewards.grader import Grader
from milepost.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from milepost.rollout.prompts import decode


@dataclass(frozen=True)
class Sample:
    """One response and what it earned."""

    prompt: Prompt
    completion: Completion
    text: str
    verdict: Verdict

    @property
    def reward(self) -> float:
        return float(self.verdict.reward)

    def row(self, rollout: int, prompt_text: str) -> dict[str, Any]:
        """The sample as a line of samples.jsonl."""
        return {
            "rollout": rollout,
            "line": self.prompt.line,
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
    """What training needs of a sample.

    Attributes:
        ids: (P + R,) the tokens that were asked and those that were sampled, prompt first.
        log_probs: (R,) of the response tokens as they were sampled, fp32.
        advantage: of the whole response.
        routing: (P + R, layers x k) experts to visit, layer after layer; None to leave the choice to the router.
    """

    ids: Tensor
    log_probs: Tensor
    advantage: float
    routing: Tensor | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.ids) - len(self.log_probs)

    @property
    def response_length(self) -> int:
        return len(self.log_probs)


def collect(
    engine: RolloutEngine,
    params: SamplingParams,
    requests: Sequence[tuple[Prompt, int]],
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    on_done: Callable[[int, Completion], None] | None = None,
) -> list[Sample]:
    """Sample one response for every (prompt, seed), and grade them all; in the order of the requests."""
    completions = engine.generate([Request(prompt.ids, seed) for prompt, seed in requests], params, on_done)
    texts = [decode(tokenizer, completion.token_ids) for completion in completions]
    verdicts = grader.grade(
        [
            Response.of(prompt, text, completion.finish, len(completion.token_ids), grader.settings.think_block)
            for (prompt, _), completion, text in zip(requests, completions, texts, strict=True)
        ]
    )
    return [
        Sample(prompt, completion, text, verdict)
        for (prompt, _), completion, text, verdict in zip(requests, completions, texts, verdicts, strict=True)
    ]


def to_training(samples: Sequence[Sample], group_size: int, epsilon: float) -> list[TrainingSequence]:
    """Samples with their group's advantages; each ``group_size`` consecutive samples share a prompt."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64).view(-1, group_size)
    advantages = group_advantages(rewards, epsilon).flatten().tolist()
    return [
        TrainingSequence(
            ids=torch.tensor(sample.prompt.ids + sample.completion.token_ids),
            log_probs=torch.tensor(sample.completion.log_probs, dtype=torch.float32),
            advantage=advantage,
            routing=_whole_routing(sample.completion.routing),
        )
        for sample, advantage in zip(samples, advantages, strict=True)
    ]


def _whole_routing(routing: Tensor | None) -> Tensor | None:
    """With a row for the last token, too: nobody reads what it computes, so it may visit the experts before it."""
    return None if routing is None else torch.cat([routing, routing[-1:]])


def statistics(samples: Sequence[Sample], group_size: int) -> dict[str, float]:
    """The metrics of a rollout that need no model.

    ``pass_rate`` is the share of prompts that at least one sample solved, ``groups_without_spread`` the share of
    prompts whose samples all earned the same, which teach nothing; ``reward_<name>`` is the mean of a sum's part, and
    ``grading_failed_share`` the share of samples that could not be graded. Where drafts are made, ``acceptance_length``
    is the tokens that a forward pass of the model gives, ``acceptance_rate`` the share of drafted tokens that are kept.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64).view(-1, group_size)
    solved = torch.tensor([sample.verdict.correct for sample in samples]).view(-1, group_size)
    lengths = [len(sample.completion.token_ids) for sample in samples]
    return {
        "reward_mean": rewards.mean().item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        **{
            f"reward_{name}": sum(sample.verdict.parts[name].reward for sample in samples) / len(samples)
            for name in samples[0].verdict.parts
        },
        "pass_rate": solved.any(dim=1).double().mean().item(),
        "grading_failed_share": sum(sample.verdict.failed for sample in samples) / len(samples),
        "groups_without_spread": 1.0 - has_spread(rewards).double().mean().item(),
        "response_length_mean": sum(lengths) / len(lengths),
        "truncated_share": sum(sample.completion.finish == "length" for sample in samples) / len(samples),
    } | _acceptance([sample.completion for sample in samples])


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
