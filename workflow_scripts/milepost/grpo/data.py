"""The prompts of a run: read strictly, shuffled once an epoch, handed out by a cursor that is part of the run state."""

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
        line: where it stands in the file, from 1.
        ids: its chat as token ids.
        label: the answer that earns the reward; None where the reward needs none.
        messages: its chat, for the reward.
        row: the data set's whole row, for the reward.
    """

    line: int
    ids: list[int]
    label: str | None
    messages: Sequence[Mapping[str, str]] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Intake:
    """How many rows a data set gave, and how many were set aside for what reason."""

    used: int
    bad: int
    too_long: int

    def __str__(self) -> str:
        return f"{self.used} prompts ({self.bad} bad rows and {self.too_long} too long prompts set aside)"


def load_prompts(
    data: Manifest, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, labels: str = "math"
) -> tuple[list[Prompt], Intake]:
    """Read and encode the problems of a data set, their labels as ``labels`` says (`common.labels.READERS`).

    Rows that are no problem and prompts of more than ``sampling.max_prompt_tokens`` tokens are set aside and counted.
    A larger share of bad rows than the data set's ``max_bad_share``, another number of rows than it names, or no usable
    row is a `UserError`.
    """
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    found = load_problem_set(data.root, sorted(data.files), settings, labels)
    encoded = [
        Prompt(
            line=problem.line,
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
            f"{data.path.stem}: every prompt is longer than sampling.max_prompt_tokens"
            f" {sampling.max_prompt_tokens}: raise it"
        )
    return prompts, Intake(used=len(prompts), bad=len(found.bad), too_long=len(encoded) - len(prompts))


class PromptCursor:
    """Hands out every prompt once an epoch, in an order of the epoch's own that the seed decides.

    The state is a few numbers, so that a resumed run goes on with the very next prompt.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.epoch = self.position = 0
        self._order = self._shuffled()

    def take(self, number: int) -> list[Prompt]:
        """The next ``number`` prompts; a new epoch begins wherever one ends."""
        taken = []
        for _ in range(number):
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            taken.append(self.prompts[self._order[self.position]])
            self.position += 1
        return taken

    def state(self) -> dict[str, Any]:
        """Where the cursor stands, and among how many prompts."""
        return {"epoch": self.epoch, "position": self.position, "prompts": len(self.prompts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; other data than it was taken from is a `UserError`."""
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
