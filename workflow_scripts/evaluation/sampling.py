"""n samples of each problem, every one kept: a run that was stopped goes on where it was.

``samples.jsonl`` starts with a line that says where its samples come from (weights, protocol, prompts); samples of
another origin are never mixed with them, but wait in a file beside it. One line a sample follows, appended as each is
finished.

Samples are drawn in sittings. Those that a stopped sitting has finished are the short ones, and an engine that heeds no
seeds would draw the long ones again, until they are short, too: a cut-off answer is a wrong one, so the score would
rise. Of such an engine only whole sittings count. With seeds the long ones come back as they would have been.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.files import atomic_write
from common.problems import Problem
from configuration.schema import Evaluation
from rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from rollout.prompts import decode, encode_prompt

SITTING = 2048  # samples at most: what a stop can cost; the end of each leaves the engine with less and less to do
TRIES = 3  # of a sitting in which a part of the engine fails


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


def origin_of(model: Any, problems: Sequence[Problem], settings: Evaluation) -> dict[str, Any]:
    """Everything that decides the samples but how many there are: ``model`` is plain JSON that identifies the weights.

    Labels, reward and estimators are not part of it: when they change, the saved samples are graded again. Nor is the
    memory that the engine takes: whoever lowers it after it ran out keeps the samples that there are.
    """
    prompts = json.dumps([problem.messages for problem in problems], sort_keys=True)
    without_effect = {"datasets", "samples_per_problem", "pass_at", "bootstrap_samples", "mem_fraction_static"}
    origin = {
        "model": model,
        "protocol": settings.model_dump(mode="json", exclude=without_effect),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
    }
    return json.loads(json.dumps(origin))  # as a file gives it back


def sample_seed(seed: int, problem: int, sample: int) -> int:
    """The seed of one sample, 31 bits: the same for every model, whatever else is sampled."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:4], "big") >> 1


def read_samples(path: Path | str) -> tuple[dict[str, Any] | None, list[Sample], int]:
    """A file's origin, its samples as far as it is whole, and how many of them are of whole sittings: the first ones.

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


def saved_samples(
    path: Path | str, origin: dict[str, Any], wanted: Iterable[tuple[int, int]], *, settled_only: bool = False
) -> list[Sample]:
    """Those of the wanted ``(problem, sample)`` that ``path`` holds, in that order; none if their origin is another."""
    found, samples, settled = read_samples(path)
    if found != origin:
        return []
    at = {(sample.problem, sample.sample): sample for sample in (samples[:settled] if settled_only else samples)}
    return [at[index] for index in wanted if index in at]


def find_origin(path: Path | str, origin: dict[str, Any]) -> None:
    """Let ``path`` hold samples of ``origin``, if there are any; those of another one move to a file beside it."""
    path = Path(path)
    found, *_ = read_samples(path)
    if found not in (None, origin):
        print(f"{path}: its samples are of other weights or settings, and are kept beside it", file=sys.stderr)
        path.rename(_beside(path, found))
    if found != origin and _beside(path, origin).exists():
        _beside(path, origin).rename(path)


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
    path: Path | str,
    origin: dict[str, Any],
) -> list[Sample]:
    """Sample what ``path`` does not hold yet, and return all samples by problem; the file then holds just these."""
    path, wanted = Path(path), wanted_samples(problems, settings)
    find_origin(path, origin)
    samples = saved_samples(path, origin, wanted)
    if not engine.heeds_seeds and len(samples) < len(wanted):
        settled = saved_samples(path, origin, wanted, settled_only=True)
        if dropped := len(samples) - len(settled):
            print(f"{path}: {dropped} samples of a stopped sitting are drawn anew with the others", file=sys.stderr)
        samples = settled
    _rewrite(path, origin, samples)
    done = {(sample.problem, sample.sample) for sample in samples}
    prompts = [encode_prompt(tokenizer, problem.messages, settings.enable_thinking) for problem in problems]
    params = SamplingParams(
        max_new_tokens=settings.max_response_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        presence_penalty=settings.presence_penalty,
        stop_token_ids=stop_token_ids,
    )

    def sit(sitting: list[tuple[int, int]]) -> list[Sample]:
        requests = [Request(prompts[index[0]], sample_seed(settings.seed, *index)) for index in sitting]
        drawn, last = [], time.perf_counter()

        def keep(position: int, completion: Completion) -> None:
            nonlocal last
            now = time.perf_counter()
            problem, number = sitting[position]
            sample = Sample(
                problem=problem,
                sample=number,
                seed=requests[position].seed,
                prompt=problems[problem].messages,
                response=decode(tokenizer, completion.token_ids),
                tokens=len(completion.token_ids),
                finish=completion.finish,
                seconds=round(now - last, 6),
            )
            last = now
            file.write(_line(asdict(sample)))
            file.flush()
            drawn.append(sample)
            progress.update()

        with path.open("ab") as file:
            engine.generate(requests, params, keep)
        return drawn

    with tqdm(total=len(wanted), initial=len(done), desc="samples", unit="sample", mininterval=1) as progress:
        for sitting in _sittings([index for index in wanted if index not in done]):
            for _ in range(TRIES):
                repeated = engine.repeated
                drawn = sit(sitting)
                if engine.heeds_seeds or engine.repeated == repeated:
                    break
                print(f"{path}: a part of the engine failed: the sitting is drawn anew", file=sys.stderr)
                _rewrite(path, origin, samples)
                progress.update(-len(drawn))
            else:
                raise UserError(f"{path}: the engine failed in each of {TRIES} sittings; the log has the reason")
            samples = sorted([*samples, *drawn], key=lambda sample: (sample.problem, sample.sample))
            _rewrite(path, origin, samples)
    return samples


def _sittings(missing: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """All problems' first samples before their last ones; within a sitting by problem, whose prompt is shared."""
    for sitting in batched(sorted(missing, key=lambda index: index[::-1]), SITTING):
        yield sorted(sitting)


def _rewrite(path: Path, origin: dict[str, Any], samples: list[Sample]) -> None:
    """The file with these samples, all of them settled."""
    head = {"origin": origin, "settled": len(samples)}
    atomic_write(path, b"".join([_line(head), *(_line(asdict(sample)) for sample in samples)]))


def _line(value: dict[str, Any]) -> bytes:
    """One line of JSON, readable; a lone surrogate, which UTF-8 cannot hold, as JSON's escape of it."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
