"""Draw rollouts on rank 0: take prompts, sample a group of responses to each, grade them.

Responses stay token ids from the engine to the trainer; text is decoded for the reward and never tokenized again.

Usually a rollout begins as many groups as it learns from, and ends with the last of them. Two settings change that:

- ``training.dynamic_sampling`` replaces a group without spread, which teaches nothing, by a new one at once.
- ``sampling.over_sampling`` has more groups under way than a rollout takes, so that it need not wait for its longest
  response. The oldest finished groups are taken; the others go on in the next rollout under its weights. No response is
  ever dropped, however long it takes: that would favour short ones.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.common.interrupts import Interrupted, Interrupts
from milepost.configuration.runs import saved_rollouts
from milepost.grpo.data import Prompt, PromptCursor
from milepost.grpo.groups import Answer, Group, save_groups
from milepost.grpo.samples import Rollout, Sample, to_training
from milepost.grpo.settings import Settings
from milepost.rewards.base import Response
from milepost.rewards.grader import Grader
from milepost.rollout.engine import PAUSE, Completion, Reply, Request, RolloutEngine, SamplingParams, request_seed
from milepost.rollout.prompts import decode


@dataclass
class Sampler:
    """Draws one rollout after the other.

    Attributes:
        graders: by training set.
        waiting: the groups that the last rollout began and did not take, oldest first; part of the run state.
        keep_in: the run's folder, if rollouts are to be saved.
    """

    settings: Settings
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    graders: Mapping[str, Grader]
    cursor: PromptCursor
    interrupts: Interrupts
    waiting: tuple[Group, ...] = ()
    keep_in: Path | None = None

    def draw(self, number: int) -> Rollout | None:
        """Draw rollout ``number``, from 1; None if the process was asked to end in the meantime."""
        began = time.perf_counter()
        draw = Draw(self, number)
        requests = draw.begin()
        progress = tqdm(total=len(requests), desc=f"rollout {number}", unit="sample", leave=False, mininterval=1)

        def on_done(index: int, completion: Completion) -> Reply:
            progress.update()
            return draw.take(index, completion)

        try:
            with progress, self.interrupts.abandonable():
                completions = self.engine.generate(requests, self._params(), on_done) if requests else []
                draw.end(completions)
        except Interrupted:
            return None
        self.waiting = draw.waiting
        if self.keep_in:
            save_groups(saved_rollouts(self.keep_in, number)[-1], draw.taken)
        sampled = time.perf_counter()
        self.engine.sleep()
        slept = time.perf_counter()
        samples = samples_of(draw.taken, version=number - 1)
        return Rollout(
            samples=samples,
            generated=[*samples, *samples_of(draw.replaced, version=number - 1)],
            sequences=to_training(samples, self.settings),
            flow=draw.flow(),
            seconds={"rollout": sampled - began, "sleep_wake": slept - sampled},
        )

    def _params(self) -> SamplingParams:
        sampling = self.settings.sampling
        return SamplingParams(
            max_new_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=self.stop_token_ids,
            with_routing=self.settings.engine.replay_routing,
        )

    def graded(self, groups: Sequence[Group], *, settle: bool) -> list[Group]:
        """Finished groups with their verdicts; with ``settle`` too many failures of a user's function are an error."""
        flat = [(group.prompt, answer) for group in groups for answer in group.answers]
        answers = [
            replace(answer, text=decode(self.tokenizer, answer.completion.token_ids, self.stop_token_ids))
            for _, answer in flat
        ]
        for grader in dict.fromkeys(self.graders.values()):
            its = [place for place, (prompt, _) in enumerate(flat) if self.graders[prompt.dataset] is grader]
            responses = [_response(*flat[place], answers[place].text, grader) for place in its]
            for place, verdict in zip(its, grader.grade(responses), strict=True):
                answers[place] = replace(answers[place], verdict=verdict)
            if settle:
                grader.settle()
        size = self.settings.training.samples_per_prompt
        return [
            replace(group, answers=tuple(answers[start : start + size]))
            for group, start in zip(groups, range(0, len(answers), size), strict=True)
        ]


class Draw:
    """One rollout while it is drawn.

    Attributes:
        taken: the groups to learn from, once it has ended.
        waiting: the groups that go on in the next rollout.
        replaced: the groups that were dropped since they had no spread.
    """

    def __init__(self, sampler: Sampler, number: int) -> None:
        self.sampler, self.number, settings = sampler, number, sampler.settings
        self.training, self.sampling = settings.training, settings.sampling
        self.wanted = self.training.prompts_per_rollout
        self.replaceable = math.floor(self.wanted * (self.training.max_prompts_factor - 1))
        self.begun = 0
        self._groups = dict(enumerate(sampler.waiting))  # by a number that rises with age
        self._asked: list[tuple[int, int]] = []  # of each request the group, and the place in it
        self.taken: list[Group] = []
        self.replaced: list[Group] = []

    def begin(self) -> list[Request]:
        """Top up the groups under way; returns the requests for all unfinished responses, the oldest first."""
        requests = [request for key in self._groups for request in self._requests(key)]
        while len(self._groups) < math.ceil(self.wanted * self.sampling.over_sampling):
            requests += self._new_group()
        return [] if self._is_enough() else requests

    def take(self, index: int, completion: Completion) -> Reply:
        """Add what a request gave to its group, and say how to go on."""
        key, _ = self._asked[index]
        self._continue(index, completion)
        if not self._groups[key].finished:
            return None
        if self.training.dynamic_sampling:
            (group,) = self.sampler.graded([self._groups[key]], settle=False)
            self._groups[key] = group
            if not group.has_spread and len(self.replaced) < self.replaceable:
                self.replaced.append(self._groups.pop(key))
                return self._new_group()
        return PAUSE if self._is_enough() else None

    def end(self, completions: Sequence[Completion]) -> None:
        """Grade what is finished and take the oldest groups; the others wait."""
        for index, completion in enumerate(completions):
            if completion.finish == "paused":
                self._continue(index, completion)
        ungraded = [key for key, group in self._groups.items() if group.finished and not group.graded]
        graded = self.sampler.graded([self._groups[key] for key in ungraded], settle=True)
        self._groups |= zip(ungraded, graded, strict=True)
        finished = [key for key, group in self._groups.items() if group.finished]
        self.taken = [self._groups.pop(key) for key in finished[: self.wanted]]

    @property
    def waiting(self) -> tuple[Group, ...]:
        return tuple(self._groups.values())

    def flow(self) -> dict[str, float]:
        """Metrics of replaced and carried groups, where the settings allow any. The age of a token counts rollouts."""
        metrics: dict[str, float] = {}
        if self.training.dynamic_sampling:
            metrics |= {"replaced_groups": len(self.replaced), "prompts_begun": self.begun}
        if self.sampling.over_sampling > 1:
            answers = [answer for group in self.taken for answer in group.answers]
            ages = [self._mean_age(answer) for answer in answers]
            tokens = [len(answer.versions) for answer in answers]
            metrics |= {
                "carried_groups": len(self._groups),
                "carried_tokens": sum(len(answer.versions) for group in self.waiting for answer in group.answers),
                "token_age_mean": sum(age * count for age, count in zip(ages, tokens, strict=True)) / sum(tokens),
                "token_age_max": max(self.number - 1 - version for answer in answers for version in answer.versions),
            }
            for name, correct in (("right", True), ("wrong", False)):
                its = [age for age, answer in zip(ages, answers, strict=True) if answer.verdict.correct is correct]
                if its:
                    metrics[f"answer_age_{name}"] = sum(its) / len(its)
        return metrics

    def _mean_age(self, answer: Answer) -> float:
        return self.number - 1 - sum(answer.versions) / len(answer.versions)

    def _new_group(self) -> list[Request]:
        """Begin a group with the next prompt; returns its requests."""
        (prompt,) = self.sampler.cursor.take(1)
        # ``begun`` is a place in the rollout, not the prompt's line: a small data set may repeat a prompt in it.
        seeds = [
            request_seed(self.training.seed, self.number, self.begun, sample)
            for sample in range(self.training.samples_per_prompt)
        ]
        key = len(self.sampler.waiting) + self.begun
        self.begun += 1
        self._groups[key] = Group(prompt, self.number, tuple(map(Answer, seeds)))
        return self._requests(key)

    def _requests(self, key: int) -> list[Request]:
        group = self._groups[key]
        places = [place for place, answer in enumerate(group.answers) if not answer.finished]
        self._asked += [(key, place) for place in places]
        return [group.answers[place].request(group.prompt) for place in places]

    def _continue(self, index: int, completion: Completion) -> None:
        key, place = self._asked[index]
        answer = self._groups[key].answers[place].continued(completion, version=self.number - 1)
        self._groups[key] = self._groups[key].with_answer(place, answer)

    def _is_enough(self) -> bool:
        """Whether enough groups are finished, and none is left that would be too old for the next rollout."""
        unfinished = [group for group in self._groups.values() if not group.finished]
        is_late = any(self.number - group.birth >= self.sampling.max_age for group in unfinished)
        return len(self._groups) - len(unfinished) >= self.wanted and not is_late


def samples_of(groups: Sequence[Group], version: int) -> list[Sample]:
    """The graded responses of groups, one after the other, for weights that have trained on ``version`` rollouts."""
    return [
        Sample(group.prompt, answer.completion, answer.text, answer.verdict, [version - v for v in answer.versions])
        for group in groups
        for answer in group.answers
    ]


def _response(prompt: Prompt, answer: Answer, text: str, grader: Grader) -> Response:
    completion = answer.completion
    return Response.of(prompt, text, completion.finish, len(completion.token_ids), grader.settings.think_block)
