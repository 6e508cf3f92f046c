"""The prompts of a run: validated, shuffled every epoch, and drawn by a cursor that is part of the run state."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from milepost.checkpoints.manifest import Manifest
from milepost.common.errors import UserError
from milepost.common.problems import load_problem_set
from milepost.configuration.schema import Dataset, Sampling
from milepost.rollout.prompts import encode_prompt


@dataclass(frozen=True)
class Prompt:
    """One training problem.

    Attributes:
        line: its line in the file, from 1.
        ids: its chat as token ids.
        label: the answer that earns the reward; None if the reward needs none.
        messages: its chat, for the reward.
        row: its whole row of the data set, for the reward.
    """

    line: int
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
        return f"{self.used} prompts ({self.bad} bad rows and {self.too_long} too long prompts set aside)"


def load_prompts(
    data: Manifest, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, labels: str = "math"
) -> tuple[list[Prompt], Intake]:
    """Read and encode the problems of a data set, their labels as ``labels`` says (`common.labels.READERS`).

    Bad rows and prompts of more than ``sampling.max_prompt_tokens`` tokens are skipped and counted. More bad rows than
    the data set's ``max_bad_share`` allows, another number of rows than its ``rows``, or no usable row is a
    `UserError`.
    """
    file = data.root / data.facts["file"]
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    problems, bad = load_problem_set(file, settings, labels)
    encoded = [
        Prompt(
            line=problem.line,
            ids=encode_prompt(tokenizer, problem.messages, sampling.enable_thinking),
            label=problem.label,
            messages=problem.messages,
            row=problem.row,
        )
        for problem in problems
    ]
    prompts = [prompt for prompt in encoded if len(prompt.ids) <= sampling.max_prompt_tokens]
    if not prompts:
        raise UserError(
            f"{file}: every prompt is longer than sampling.max_prompt_tokens {sampling.max_prompt_tokens}: raise it"
        )
    return prompts, Intake(used=len(prompts), bad=len(bad), too_long=len(encoded) - len(prompts))


class PromptCursor:
    """Draws every prompt once per epoch, in an order that depends on seed and epoch.

    Its state is a few numbers, with which a resumed run continues at the next prompt.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.epoch = self.position = 0
        self._order = self._shuffled()

    def take(self, number: int) -> list[Prompt]:
        """The next ``number`` prompts, across the ends of epochs."""
        taken = []
        for _ in range(number):
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            taken.append(self.prompts[self._order[self.position]])
            self.position += 1
        return taken

    def state(self) -> dict[str, Any]:
        """The cursor's epoch and position, and the number of prompts."""
        return {"epoch": self.epoch, "position": self.position, "prompts": len(self.prompts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned; another number of prompts is a `UserError`."""
        if state["prompts"] != len(self.prompts):
            raise UserError(
                f"the run was begun with {state['prompts']} prompts, the data set now has {len(self.prompts)}:"
                " put the data back, or start a run of another name"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order
