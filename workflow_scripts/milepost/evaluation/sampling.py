"""Draw n samples of each problem and save every one, so that a stopped run resumes where it was.

``samples.jsonl`` has one line per sample, appended as each finishes, and nothing else, so that any reader of JSON lines
loads it. Each line names its origin, a digest of weights, protocol and prompts. Samples of another origin are never
mixed with them; they are moved to another file. Once all are graded, each line has its label and grade as well.

Samples are drawn in batches. If a batch is stopped, its finished samples are the short ones. An engine that ignores
seeds would redraw only the long ones, until they are short too; since truncated answers are wrong, the score would
rise. So for such an engine only complete batches count. With seeds, the long ones are redrawn exactly as they were.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import batched
from pathlib import Path
from typing import Any, Literal, Self

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.common.errors import UserError
from milepost.common.files import atomic_write, json_line
from milepost.configuration.schema import Evaluation
from milepost.problems.loading import Problem
from milepost.rollout.engine import Completion, Request, RolloutEngine, SamplingParams, request_seed
from milepost.rollout.prompts import decode, encode_prompt

BATCH = 2048  # samples; a stop loses at most these, but the engine is underused at the end of each batch
TRIES = 3  # of a batch in which an engine worker fails
UNKNOWN = "unknown"  # the origin of a file that holds something else
PENDING = "pending"  # in the lines of a batch that is not complete
# What a line holds of a sample's grade -> where `scores` has it.
GRADE = {"answer": "answers", "correct": "correct", "reward": "rewards", "reason": "reasons"}


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``, without its origin and its grade.

    Attributes:
        problem: index of the problem in its file, from 0.
        sample: index among the problem's samples, from 0.
        seed: the request's seed; see `Request` for which engines use it.
        prompt: the chat, before the template.
        response: the whole sampled text, including the reasoning.
        tokens: number of sampled tokens, including the stop token.
        finish: ``stop``, or ``length`` if it was truncated.
        seconds: wall time since the previous sample finished; they add up to the time of sampling.
    """

    problem: int
    sample: int
    seed: int
    prompt: list[dict[str, str]]
    response: str
    tokens: int
    finish: Literal["stop", "length"]
    seconds: float


def origin_of(sampler: dict[str, Any], problems: Sequence[Problem]) -> str:
    """A digest of everything that determines the samples, except their number.

    Args:
        sampler: plain JSON that identifies the weights and the protocol (`configuration.provenance.sampler`).
        problems: only their prompts count; if labels change, the saved samples are just graded again.
    """
    origin = json.dumps(sampler | {"prompts": prompts_digest(problems)}, sort_keys=True)
    return hashlib.sha256(origin.encode()).hexdigest()[:12]


def prompts_digest(problems: Sequence[Problem]) -> str:
    """The sha256 of the problems' prompts, in order, without their labels."""
    prompts = json.dumps([problem.messages for problem in problems], sort_keys=True)
    return hashlib.sha256(prompts.encode()).hexdigest()


def read_samples(path: Path | str) -> tuple[str | None, list[Sample], int]:
    """Read a file's origin, its valid samples, and how many of them (the first ones) belong to complete batches.

    Everything from the first damaged line on is ignored, since a killed process leaves part of a line. Returns
    ``(None, [], 0)`` if the file has no whole line, and `UNKNOWN` as the origin of lines that are no samples.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # after the last break may be part of a line
    origin, samples, settled = None, [], 0
    for line in lines:
        try:
            row = json.loads(line)
            sample = Sample(**{field.name: row[field.name] for field in fields(Sample)})
            own = row["origin"]
        except (ValueError, TypeError, KeyError):
            break
        if samples and own != origin:
            break
        origin = own
        samples.append(sample)
        settled += not row.get(PENDING, False)
    return (UNKNOWN if lines and not samples else origin), samples, settled


class SampleFile:
    """``samples.jsonl`` with the samples of one origin.

    Attributes:
        samples: the file's samples when it was opened or last settled.
        settled: how many of them (the first ones) belong to complete batches.
    """

    def __init__(self, path: Path, origin: str, samples: list[Sample], settled: int) -> None:
        self.path, self.origin, self.samples, self.settled = path, origin, samples, settled

    @classmethod
    def open(cls, path: Path | str, origin: str) -> Self:
        """Open the file with the samples of ``origin``; samples of another origin are moved to another file."""
        path = Path(path)
        found, samples, settled = read_samples(path)
        if found == origin:
            return cls(path, origin, samples, settled)
        if found is not None:
            print(f"{path}: holds samples of other weights or settings, which are kept next to it", file=sys.stderr)
            path.rename(_beside(path, found))
        if not (own := _beside(path, origin)).exists():
            return cls(path, origin, [], 0)
        own.rename(path)
        _, samples, settled = read_samples(path)
        return cls(path, origin, samples, settled)

    def of(self, wanted: Iterable[tuple[int, int]], *, settled_only: bool = False) -> list[Sample]:
        """The samples of ``wanted`` indices that the file holds, in that order."""
        samples = self.samples[: self.settled] if settled_only else self.samples
        at = {(sample.problem, sample.sample): sample for sample in samples}
        return [at[index] for index in wanted if index in at]

    def append(self, sample: Sample) -> None:
        """Append a sample of the current batch."""
        with self.path.open("ab") as file:
            file.write(json_line(self._row(sample) | {PENDING: True}))

    def settle(self, samples: list[Sample]) -> None:
        """Rewrite the file with exactly these samples, all of complete batches."""
        atomic_write(self.path, b"".join(json_line(self._row(sample)) for sample in samples))
        self.samples, self.settled = samples, len(samples)

    def write_grades(self, per_problem: Sequence[Mapping[str, Any]]) -> None:
        """Rewrite the file with each sample's label and grade in its line; ``per_problem`` is of `scores`.

        Samples beyond those that were graded keep their lines, without a grade.
        """
        rows = []
        for sample in self.samples:
            facts, number = per_problem[sample.problem], sample.sample
            row = self._row(sample) | {"label": facts["label"]}
            if number < len(facts["rewards"]):
                row |= {name: facts[of_all][number] for name, of_all in GRADE.items()}
            rows.append(row)
        atomic_write(self.path, b"".join(map(json_line, rows)))

    def _row(self, sample: Sample) -> dict[str, Any]:
        return asdict(sample) | {"origin": self.origin}


def _beside(path: Path, origin: str) -> Path:
    return path.with_name(f"{path.stem}.{origin}{path.suffix}")


def wanted_samples(problems: Sequence[Problem], settings: Evaluation) -> list[tuple[int, int]]:
    """All ``(problem, sample)`` indices of an evaluation, in the file's order."""
    return [(problem, sample) for problem in range(len(problems)) for sample in range(settings.samples_per_problem)]


def sample_problems(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: tuple[int, ...],
    problems: Sequence[Problem],
    settings: Evaluation,
    file: SampleFile,
) -> list[Sample]:
    """Draw the samples that ``file`` lacks and return all samples by problem; ``file`` then holds exactly these."""
    wanted = wanted_samples(problems, settings)
    samples = file.of(wanted)
    if not engine.is_reproducible and len(samples) < len(wanted):
        settled = file.of(wanted, settled_only=True)
        if dropped := len(samples) - len(settled):
            print(f"{file.path}: the {dropped} samples of a stopped batch are sampled again", file=sys.stderr)
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
    """Draws batches from an engine and writes each finished sample to the file at once."""

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
        """Draw a batch; draw it again if an engine without seeds had to repeat requests of a failed worker."""
        for _ in range(TRIES):
            repeated = self.engine.repeated
            drawn = self._draw_once(batch)
            if self.engine.is_reproducible or self.engine.repeated == repeated:
                return drawn
            print(f"{self.file.path}: an engine worker failed: sampling the batch again", file=sys.stderr)
            self.file.settle(self.file.samples)
            self.progress.update(-len(drawn))
        raise UserError(
            f"{self.file.path}: the engine failed in each of {TRIES} attempts at a batch: look for the cause in the"
            " engine's log, and run again; complete samples are kept"
        )

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
                response=decode(self.tokenizer, completion.token_ids, self.params.stop_token_ids),
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
    """Batches in order of sample number; within a batch sorted by problem, so that samples share their prompt."""
    for batch in batched(sorted(missing, key=lambda index: index[::-1]), BATCH):
        yield sorted(batch)
