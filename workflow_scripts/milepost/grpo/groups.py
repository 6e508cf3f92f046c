"""Groups of responses on their way: what a rollout leaves unfinished, or finished beyond need, waits for the next one.

Groups never change: a rollout works with new ones, so that one which is interrupted leaves everything as it was. They
are part of the run state (`save_groups`), with each token's log-prob and the number of the weights that sampled it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from milepost.common.errors import UserError
from milepost.grpo.data import Prompt
from milepost.rewards.base import Verdict
from milepost.rollout.engine import NOT_BEGUN, Completion, Drafting, Request


@dataclass(frozen=True)
class Answer:
    """One response, or the beginning of one.

    Attributes:
        seed: of its draws.
        completion: all of its tokens so far; ``paused`` while it is unfinished.
        versions: for each token the number of rollouts that the weights had learned from which sampled it.
        text: of all tokens, and ``verdict``: once it is graded.
    """

    seed: int
    completion: Completion = NOT_BEGUN
    versions: tuple[int, ...] = ()
    text: str | None = None
    verdict: Verdict | None = None

    @property
    def finished(self) -> bool:
        return self.completion.finish != "paused"

    def request(self, prompt: Prompt) -> Request:
        """What to ask the engine for."""
        return Request(prompt.ids, self.seed, self.completion.token_ids)

    def continued(self, more: Completion, version: int) -> "Answer":
        """The answer with further tokens, sampled by the weights ``version``."""
        before = self.completion
        both = before.drafting and more.drafting and before.drafting + more.drafting
        completion = Completion(
            token_ids=before.token_ids + more.token_ids,
            log_probs=before.log_probs + more.log_probs,
            finish=more.finish,
            drafting=both or more.drafting or before.drafting,
            routing=more.routing,  # of the whole sequence: the engine read the prefix again
        )
        return replace(self, completion=completion, versions=self.versions + (version,) * len(more.token_ids))


@dataclass(frozen=True)
class Group:
    """The responses to one prompt.

    Attributes:
        birth: the number of the rollout that began it, from 1.
    """

    prompt: Prompt
    birth: int
    answers: tuple[Answer, ...]

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    @property
    def graded(self) -> bool:
        return all(answer.verdict for answer in self.answers)

    @property
    def has_spread(self) -> bool:
        """Whether its rewards differ, so that it teaches something."""
        return len({answer.verdict.reward for answer in self.answers}) > 1

    def with_answer(self, place: int, answer: Answer) -> "Group":
        """The group with another answer at ``place``."""
        return replace(self, answers=(*self.answers[:place], answer, *self.answers[place + 1 :]))


def save_groups(file: Path, groups: Sequence[Group]) -> None:
    """Write groups as tensors of all tokens, one after the other, and a description of who owns how many."""
    answers = [answer for group in groups for answer in group.answers]
    tensors = {
        "tokens": _flat((answer.completion.token_ids for answer in answers), torch.int32),
        "log_probs": _flat((answer.completion.log_probs for answer in answers), torch.float32),
        "versions": _flat((answer.versions for answer in answers), torch.int32),
    }
    save_file(tensors, file, {"groups": json.dumps([_described(group) for group in groups])})


def read_groups(file: Path, prompts: Mapping[str, Sequence[Prompt]]) -> tuple[Group, ...]:
    """Read what `save_groups` wrote; `UserError` if one of the prompts is no longer there.

    Args:
        prompts: those of each training set, by its name.
    """
    found = {(prompt.dataset, prompt.place): prompt for its in prompts.values() for prompt in its}
    with safe_open(file, framework="pt") as stored:
        described = json.loads(stored.metadata()["groups"])
        columns = [iter(stored.get_tensor(name).tolist()) for name in ("tokens", "log_probs", "versions")]
    groups = []
    for group in described:
        dataset, place = group["dataset"], group["place"]
        if (dataset, place) not in found:
            raise UserError(
                f"the run holds answers to {place} of {dataset}, which is no usable prompt any more: put the data"
                " back, or start a run of another name"
            )
        answers = tuple(_answer(answer, columns) for answer in group["answers"])
        groups.append(Group(found[dataset, place], group["birth"], answers))
    return tuple(groups)


def _flat(rows: Iterator[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def _described(group: Group) -> dict[str, Any]:
    answers = [
        {
            "seed": answer.seed,
            "tokens": len(answer.completion.token_ids),
            "finish": answer.completion.finish,
            "drafting": answer.completion.drafting and asdict(answer.completion.drafting),
            "text": answer.text,
            "verdict": answer.verdict and asdict(answer.verdict),
        }
        for answer in group.answers
    ]
    return {"dataset": group.prompt.dataset, "place": group.prompt.place, "birth": group.birth, "answers": answers}


def _answer(described: dict[str, Any], columns: Sequence[Iterator[float]]) -> Answer:
    tokens, log_probs, versions = ([next(column) for _ in range(described["tokens"])] for column in columns)
    drafting = described["drafting"] and Drafting(**described["drafting"])
    completion = Completion(tokens, log_probs, described["finish"], drafting)
    verdict = described["verdict"] and _verdict(described["verdict"])
    return Answer(described["seed"], completion, tuple(versions), described["text"], verdict)


def _verdict(described: dict[str, Any]) -> Verdict:
    parts = {name: _verdict(part) for name, part in described["parts"].items()}
    return Verdict(**(described | {"parts": parts}))
