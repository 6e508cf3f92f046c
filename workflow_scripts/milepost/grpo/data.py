"""The prompts of a run: validated, shuffled every epoch set by set, and mixed if there are several sets.

The cursor's position is part of the run state (`PromptCursor.state`), so a resumed run continues at the next prompt.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from milepost.checkpoints.manifest import Manifest
from milepost.common.errors import UserError
from milepost.configuration.schema import Dataset, Sampling
from milepost.problems.loading import load_problem_set
from milepost.rollout.prompts import encode_prompt


@dataclass(frozen=True)
class Prompt:
    """One training problem.

    Attributes:
        dataset: the name of its set.
        place: where its row stands, in words: ``line 3``, or ``b.jsonl, line 3`` in a set of several files.
        ids: its chat as token ids.
        label: the answer that earns the reward; None if the reward needs none.
        messages: its chat, for the reward.
        row: its whole row of the data set, for the reward.
    """

    dataset: str
    place: str
    ids: list[int]
    label: str | None
    messages: Sequence[Mapping[str, str]] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Intake:
    """How many rows of a data set are used, and how many are skipped and why."""

    used: int
    bad: int
    too_long: int

    def __str__(self) -> str:
        return f"{self.used} prompts ({self.bad} bad rows and {self.too_long} too long prompts skipped)"


def load_prompts(
    name: str, data: Manifest, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, labels: str = "math"
) -> tuple[list[Prompt], Intake]:
    """Read and encode the problems of the data set ``name``, their labels as ``labels`` says (`common.labels.READERS`).

    Bad rows and prompts of more than ``sampling.max_prompt_tokens`` tokens are skipped and counted. More bad rows than
    the data set's ``max_bad_share`` allows, another number of rows than its ``rows``, or no usable row is a
    `UserError`.
    """
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    found = load_problem_set(data.root, sorted(data.files), settings, labels)
    encoded = [
        Prompt(
            dataset=name,
            place=problem.place,
            ids=encode_prompt(tokenizer, problem.messages, sampling.enable_thinking),
            label=problem.label,
            messages=problem.messages,
            row=problem.row,
        )
        for problem in found.problems
    ]
    prompts = [prompt for prompt in encoded if len(prompt.ids) <= sampling.max_prompt_tokens]
    if not prompts:
        raise UserError(
            f"{name}: every prompt is longer than sampling.max_prompt_tokens {sampling.max_prompt_tokens}: raise it"
        )
    return prompts, Intake(used=len(prompts), bad=len(found.bad), too_long=len(encoded) - len(prompts))


class PromptSet:
    """The prompts of one data set: each is drawn once per epoch, in an order that depends on seed and epoch."""

    def __init__(self, prompts: list[Prompt], seed: str) -> None:
        self.prompts, self.seed = prompts, seed
        self.go_to(epoch=0, position=0)

    @property
    def taken(self) -> int:
        """The number of prompts drawn so far, over all epochs."""
        return self.epoch * len(self.prompts) + self.position

    def take(self) -> Prompt:
        """The next prompt; after the last one a new epoch begins."""
        if self.position == len(self.prompts):
            self.go_to(self.epoch + 1, position=0)
        self.position += 1
        return self.prompts[self._order[self.position - 1]]

    def go_to(self, epoch: int, position: int) -> None:
        """Continue after ``position`` prompts of an epoch."""
        self.epoch, self.position = epoch, position
        self._order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{epoch}").shuffle(self._order)


class PromptCursor:
    """Draws the prompts of one set, or of several sets in fixed shares.

    The next prompt comes from the set that is furthest behind its share, so every rollout matches the shares as closely
    as whole prompts can. The order depends only on the seed.
    """

    def __init__(self, sets: Mapping[str, list[Prompt]], seed: int, weights: Sequence[float] | None = None) -> None:
        """``weights`` are relative, one per set; None weights the sets by their numbers of prompts."""
        weights = weights or [len(prompts) for prompts in sets.values()]
        self._shares = {name: weight / sum(weights) for name, weight in zip(sets, weights, strict=True)}
        # Sets of equal size must not be shuffled in the same way.
        seeds = [f"{seed}/{place}" if place else str(seed) for place in range(len(sets))]
        self._sets = {name: PromptSet(sets[name], own) for name, own in zip(sets, seeds, strict=True)}

    def take(self, number: int) -> list[Prompt]:
        """The next ``number`` prompts."""
        return [self._next_set().take() for _ in range(number)]

    def state(self) -> dict[str, dict[str, int]]:
        """For each set its epoch, its position within that epoch, and its number of prompts."""
        return {
            name: {"epoch": one.epoch, "position": one.position, "prompts": len(one.prompts)}
            for name, one in self._sets.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Continue from what `state` returned; another number of prompts is a `UserError`."""
        for name, one in self._sets.items():
            before = state[name]["prompts"]
            if before != len(one.prompts):
                raise UserError(
                    f"the run was begun with {before} prompts of {name}, the data set now has {len(one.prompts)}: put"
                    " the data back, or start a run of another name"
                )
            one.go_to(state[name]["epoch"], state[name]["position"])

    def _next_set(self) -> PromptSet:
        after = 1 + sum(one.taken for one in self._sets.values())
        behind = {name: self._shares[name] * after - one.taken for name, one in self._sets.items()}
        return self._sets[max(behind, key=behind.__getitem__)]
