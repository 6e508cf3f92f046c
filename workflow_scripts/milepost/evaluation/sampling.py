"""n samples of each problem, every one kept: a run that was stopped goes on where it was.

``samples.jsonl`` starts with a line that says where its samples come from (weights, protocol, prompts); samples of
another origin are never mixed with them, but wait in a file beside it. One line a sample follows, appended as each is
finished.

Samples are drawn in batches. Those that a stopped batch has finished are the short ones, and an engine that heeds no
seeds would draw the long ones again, until they are short, too: a cut-off answer is a wrong one, so the score would
rise. Of such an engine only whole batches count. With seeds the long ones come back as they would have been.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Literal, Self

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.common.errors import UserError
from milepost.common.files import atomic_write, json_line
from milepost.common.problems import Problem
from milepost.configuration.schema import Evaluation
from milepost.rollout.engine import Completion, Request, RolloutEngine, SamplingParams, request_seed
from milepost.rollout.prompts import decode, encode_prompt

BATCH = 2048  # samples at most: what a stop can cost; the end of each leaves the engine with less and less to do
TRIES = 3  # of a batch in which a part of the engine fails


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``.

    Attributes:
        problem: index of the problem in its file, from 0.
        sample: index among the problem's samples, from 0.
        seed: what it was asked for with; see `Request` for the engines that heed it.
        prompt: the chat, before the template.
        response: all that was sampled, the reasoning too.
        tokens: sampled tokens, the stop token included.
        finish: ``stop``, or ``length`` where the cap cut it off.
        seconds: wall time since the sample that was finished before it; their sum is the time that sampling took.
    """

    problem: int
    sample: int
    seed: int
    prompt: list[dict[str, str]]
    response: str
    tokens: int
    finish: Literal["stop", "length"]
    seconds: float


def origin_of(sampler: dict[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    """Everything that decides the samples but how many there are.

    Args:
        sampler: plain JSON that identifies the weights and how they answer (`configuration.provenance.sampler`).
        problems: of which the prompts count. Labels do not: when they change, the saved samples are graded again.
    """
    return json.loads(json.dumps(sampler | {"prompts": prompts_digest(problems)}))  # as a file gives it back


def prompts_digest(problems: Sequence[Problem]) -> str:
    """The sha256 that identifies what the problems ask, in their order, whatever their labels are."""
    prompts = json.dumps([problem.messages for problem in problems], sort_keys=True)
    return hashlib.sha256(prompts.encode()).hexdigest()


def read_samples(path: Path | str) -> tuple[dict[str, Any] | None, list[Sample], int]:
    """A file's origin, its samples as far as it is whole, and how many of them are of whole batches: the first ones.

    Whatever follows the first damaged line is dropped: a killed process leaves part of a line. ``(None, [], 0)`` where
    there is no such file.
    """
    path = Path(path)
    if not path.exists():
        return None, [], 0
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line break there is nothing, or part of a line
    try:
        head = json.loads(lines[0])
        origin, settled = head["origin"], head["settled"]
    except (IndexError, ValueError, KeyError, TypeError):
        return None, [], 0
    samples = []
    for line in lines[1:]:
        try:
            samples.append(Sample(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return origin, samples, settled


class SampleFile:
    """``samples.jsonl`` with the samples of one origin.

    Attributes:
        samples: what it held when it was opened, or last settled.
        settled: how many of them, the first ones, are of whole batches.
    """

    def __init__(self, path: Path, origin: dict[str, Any], samples: list[Sample], settled: int) -> None:
        self.path, self.origin, self.samples, self.settled = path, origin, samples, settled

    @classmethod
    def open(cls, path: Path | str, origin: dict[str, Any]) -> Self:
        """Find the samples of ``origin``, if there are any; those of another one move to a file beside it."""
        path = Path(path)
        found, samples, settled = read_samples(path)
        if found == origin:
            return cls(path, origin, samples, settled)
        if found is not None:
            print(f"{path}: its samples are of other weights or settings, and are kept beside it", file=sys.stderr)
            path.rename(_beside(path, found))
        if not (own := _beside(path, origin)).exists():
            return cls(path, origin, [], 0)
        own.rename(path)
        _, samples, settled = read_samples(path)
        return cls(path, origin, samples, settled)

    def of(self, wanted: Iterable[tuple[int, int]], *, settled_only: bool = False) -> list[Sample]:
        """Those of the wanted ``(problem, sample)`` that it holds, in that order."""
        samples = self.samples[: self.settled] if settled_only else self.samples
        at = {(sample.problem, sample.sample): sample for sample in samples}
        return [at[index] for index in wanted if index in at]

    def append(self, sample: Sample) -> None:
        """Write a sample of a batch that is under way."""
        with self.path.open("ab") as file:
            file.write(json_line(asdict(sample)))

    def settle(self, samples: list[Sample]) -> None:
        """Let it hold just these, all of them of whole batches."""
        head = {"origin": self.origin, "settled": len(samples)}
        atomic_write(self.path, b"".join([json_line(head), *(json_line(asdict(sample)) for sample in samples)]))
        self.samples, self.settled = samples, len(samples)


def _beside(path: Path, origin: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    return path.with_name(f"{path.stem}.{digest}{path.suffix}")


def wanted_samples(problems: Sequence[Problem], settings: Evaluation) -> list[tuple[int, int]]:
    """All ``(problem, sample)`` of an evaluation, in the file's order."""
    return [(problem, sample) for problem in range(len(problems)) for sample in range(settings.samples_per_problem)]


def sample_problems(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: tuple[int, ...],
    problems: Sequence[Problem],
    settings: Evaluation,
    file: SampleFile,
) -> list[Sample]:
    """Sample what ``file`` does not hold yet, and return all samples by problem; it holds just these then."""
    wanted = wanted_samples(problems, settings)
    samples = file.of(wanted)
    if not engine.is_reproducible and len(samples) < len(wanted):
        settled = file.of(wanted, settled_only=True)
        if dropped := len(samples) - len(settled):
            print(
                f"{file.path}: {dropped} samples of a stopped batch are sampled again with the others", file=sys.stderr
            )
        samples = settled
    file.settle(samples)
    done = {(sample.problem, sample.sample) for sample in samples}
    with tqdm(total=len(wanted), initial=len(done), desc="samples", unit="sample", mininterval=1) as progress:
        sampler = _Sampler(engine, tokenizer, stop_token_ids, problems, settings, file, progress)
        for batch in _batches([index for index in wanted if index not in done]):
            drawn = [*file.samples, *sampler.draw(batch)]
            file.settle(sorted(drawn, key=lambda sample: (sample.problem, sample.sample)))
    return file.samples


class _Sampler:
    """Draws batches from an engine, each finished sample into the file at once."""

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: tuple[int, ...],
        problems: Sequence[Problem],
        settings: Evaluation,
        file: SampleFile,
        progress: tqdm,
    ) -> None:
        self.engine, self.tokenizer, self.problems, self.seed = engine, tokenizer, problems, settings.seed
        self.file, self.progress = file, progress
        self.prompts = [encode_prompt(tokenizer, problem.messages, settings.enable_thinking) for problem in problems]
        self.params = SamplingParams(
            max_new_tokens=settings.max_response_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            presence_penalty=settings.presence_penalty,
            stop_token_ids=stop_token_ids,
        )

    def draw(self, batch: list[tuple[int, int]]) -> list[Sample]:
        """A batch in which no part of an engine failed that would sample anew what that part was answering."""
        for _ in range(TRIES):
            repeated = self.engine.repeated
            drawn = self._draw_once(batch)
            if self.engine.is_reproducible or self.engine.repeated == repeated:
                return drawn
            print(f"{self.file.path}: a part of the engine failed: sampling the batch again", file=sys.stderr)
            self.file.settle(self.file.samples)
            self.progress.update(-len(drawn))
        raise UserError(f"{self.file.path}: the engine failed in each of {TRIES} tries of a batch: see its log")

    def _draw_once(self, batch: list[tuple[int, int]]) -> list[Sample]:
        requests = [Request(self.prompts[index[0]], request_seed(self.seed, *index)) for index in batch]
        drawn, last = [], time.perf_counter()

        def keep(position: int, completion: Completion) -> None:
            nonlocal last
            now = time.perf_counter()
            problem, number = batch[position]
            sample = Sample(
                problem=problem,
                sample=number,
                seed=requests[position].seed,
                prompt=self.problems[problem].messages,
                response=decode(self.tokenizer, completion.token_ids),
                tokens=len(completion.token_ids),
                finish=completion.finish,
                seconds=round(now - last, 6),
            )
            last = now
            self.file.append(sample)
            drawn.append(sample)
            self.progress.update()

        self.engine.generate(requests, self.params, keep)
        return drawn


def _batches(missing: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """All problems' first samples before their last ones; within a batch by problem, whose prompt is shared."""
    for batch in batched(sorted(missing, key=lambda index: index[::-1]), BATCH):
        yield sorted(batch)
