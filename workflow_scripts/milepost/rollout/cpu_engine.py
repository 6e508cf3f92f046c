"""The rollout engine for CPUs: continuous batching over `rollout.cpu_model`, in this process.

On one machine with one number of threads (``OMP_NUM_THREADS``), the same call returns the same tokens and log-probs,
bit for bit. In a different batch the logits differ by the rounding of matrix products (about 1e-7 relative), which
changes a token only if its draw falls that close to the border between two tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milepost.configuration.schema import Engine
from milepost.rollout.cpu_model import CpuModel, ModelCache
from milepost.rollout.engine import NOT_BEGUN, PAUSE, Completion, Finish, OnDone, Request, SamplingParams
from milepost.rollout.sampling import sample, seed_words, uniforms

_MAX_RUNNING = 256  # default number of running sequences
_PREFILL_TOKENS = 8192  # per prefill, including padding


def start(folder: Path, settings: Engine, logs: Path, max_requests: int | None = None) -> "CpuEngine":
    """Load the checkpoint in ``folder``; `UserError` if it is not a complete Qwen3.5."""
    return CpuEngine(CpuModel(folder), settings.max_running_requests or _MAX_RUNNING)


def share_weights(folder: Path, settings: Engine, named: Iterable[tuple[str, Tensor]]) -> None:
    """Iterate over ``named``, because gathering its tensors is collective; the driving process loads its own copy."""
    for _ in named:
        pass


class CpuEngine:
    """`rollout.engine.RolloutEngine` on the CPU, with up to ``max_running`` sequences at once."""

    is_reproducible = True
    repeated = 0  # it runs in this process

    def __init__(self, model: CpuModel, max_running: int):
        self.model, self.max_running = model, max_running
        self._cache: ModelCache | None = None  # kept between calls, so that its pages stay allocated
        self._asleep = False
        self.weights_wanted: Callable[[], None] | None = None  # never called: no workers that could fail

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `rollout.engine.RolloutEngine.generate`."""
        if self._asleep:
            raise RuntimeError("the engine is asleep: call wake() first")
        completions: dict[int, Completion] = {}
        waiting = _WaitingPrompts(self.model)
        waiting.add(requests)
        rows = min(self.max_running, len(requests))
        if self._cache is None or len(self._cache.lengths) < rows:
            self._cache = ModelCache(rows, self.model.architecture)
        batch = _Batch(self.model, self._cache, rows, params)
        while waiting or batch.count:
            # Wait until an eighth of the rows is free: prefilling several prompts at once is faster.
            if batch.count == 0 or rows - batch.count >= min(waiting.samples, max(1, rows // 8)):
                while waiting and batch.count < rows:
                    batch.admit(*waiting.take(rows - batch.count))
            replies = []
            for index, completion in batch.step():
                completions[index] = completion
                replies.append(on_done(index, completion) if on_done else None)
            if PAUSE in replies:
                completions |= batch.paused()
                break
            waiting.add([request for reply in replies for request in reply or ()])
        return [completions.get(i, NOT_BEGUN) for i in range(len(waiting.requests))]

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights by Hub name; those of the vision tower and the MTP layer are ignored."""
        self.model.load(named)

    def check_weights(self, send: Callable[[], None]) -> None:
        """Only call ``send``: tensors are copied within this process, so nothing can differ."""
        send()

    def sleep(self) -> None:
        """Free the caches; the weights stay."""
        self._asleep, self._cache = True, None

    def wake(self) -> None:
        """Allow `generate` again; it allocates new caches."""
        self._asleep = False

    def close(self) -> None:
        """Free the caches and the weights."""
        self.sleep()
        self.model = None


@dataclass
class _ReadPrompt:
    """A prefilled prompt: its row in the prefill's cache, the next token's logits, and the requests waiting for it.

    A response that is continued is part of its prompt here; ``produced`` counts its tokens.
    """

    cache: ModelCache
    row: int
    logits: Tensor  # (V,)
    produced: int
    wanted: deque[tuple[int, Request]]


class _WaitingPrompts:
    """The waiting requests, grouped by prompt: equal prompts are prefilled once, a few prompts ahead of need.

    Attributes:
        requests: all that were added, in order; a request's index is its place here.
        samples: how many are waiting.
    """

    def __init__(self, model: CpuModel):
        self._model = model
        self._unread: deque[tuple[tuple[int, ...], int, deque[tuple[int, Request]]]] = deque()
        self._read: deque[_ReadPrompt] = deque()
        self.requests: list[Request] = []
        self.samples = 0

    def add(self, requests: Sequence[Request]) -> None:
        """Put requests at the end of the line."""
        by_prompt: dict[tuple[tuple[int, ...], int], deque[tuple[int, Request]]] = {}
        for request in requests:
            if not request.prompt_ids:
                raise ValueError(f"request {len(self.requests)} has an empty prompt")
            prompt = (*request.prompt_ids, *request.prefix_ids)
            by_prompt.setdefault((prompt, len(request.prefix_ids)), deque()).append((len(self.requests), request))
            self.requests.append(request)
        self._unread.extend((prompt, produced, wanted) for (prompt, produced), wanted in by_prompt.items())
        self.samples += len(requests)

    def __bool__(self) -> bool:
        return self.samples > 0

    def take(self, limit: int) -> tuple[_ReadPrompt, list[tuple[int, Request]]]:
        """The next prompt and up to ``limit`` of its requests; there must be one waiting."""
        if not self._read:
            self._prefill(limit)
        prompt = self._read[0]
        taken = [prompt.wanted.popleft() for _ in range(min(limit, len(prompt.wanted)))]
        if not prompt.wanted:
            self._read.popleft()
        self.samples -= len(taken)
        return prompt, taken

    def _prefill(self, samples: int) -> None:
        """Prefill the next prompts: enough for ``samples`` requests, within `_PREFILL_TOKENS`, but at least one."""
        chosen, longest = [], 0
        while self._unread and sum(len(wanted) for *_, wanted in chosen) < samples:
            longest = max(longest, len(self._unread[0][0]))
            if chosen and (len(chosen) + 1) * longest > _PREFILL_TOKENS:
                break
            chosen.append(self._unread.popleft())
        logits, cache = self._model.prefill([list(prompt) for prompt, *_ in chosen])
        self._read.extend(
            _ReadPrompt(cache, row, logits[row], produced, wanted) for row, (_, produced, wanted) in enumerate(chosen)
        )


class _Batch:
    """The running sequences: rows 0 ... count - 1 of the cache and of every array here."""

    def __init__(self, model: CpuModel, cache: ModelCache, rows: int, params: SamplingParams):
        self.count = 0
        self._model, self._cache, self._params = model, cache, params
        self._stop_ids = np.array(params.stop_token_ids, dtype=np.int64)
        self._indices = np.zeros(rows, dtype=np.int64)  # index of each row's request
        self._seeds = np.zeros(rows, dtype=np.uint64)
        self._earlier = np.zeros(rows, dtype=np.int64)  # tokens of the response that were sampled before
        self._produced = np.zeros(rows, dtype=np.int64)  # tokens since
        self._tokens = np.zeros((rows, params.max_new_tokens), dtype=np.int64)
        self._log_probs = np.zeros((rows, params.max_new_tokens), dtype=np.float32)
        vocabulary = model.architecture.vocab_size if params.presence_penalty else 0
        self._present = torch.zeros(rows, vocabulary, dtype=torch.bool)
        self._logits = torch.empty(0, model.architecture.vocab_size)  # (count, V) of the next tokens

    def admit(self, prompt: _ReadPrompt, requests: list[tuple[int, Request]]) -> None:
        """Start one sequence for each of ``requests``, with their indices, which share a prompt."""
        rows = slice(self.count, self.count + len(requests))
        self._cache.insert(rows, prompt.cache, prompt.row)
        self._indices[rows] = [index for index, _ in requests]
        self._seeds[rows] = seed_words([request.seed for _, request in requests])
        self._earlier[rows] = prompt.produced
        self._produced[rows] = 0
        self._present[rows] = False
        if self._params.presence_penalty and prompt.produced:
            self._present[rows, requests[0][1].prefix_ids] = True
        self._logits = torch.cat([self._logits, prompt.logits.expand(len(requests), -1)])
        self.count += len(requests)

    def step(self) -> list[tuple[int, Completion]]:
        """Sample one token per sequence, return the finished ones, and compute the next logits of the others."""
        n = self.count
        indices, produced, earlier = self._indices[:n], self._produced[:n], self._earlier[:n]
        draws = torch.from_numpy(uniforms(self._seeds[:n], earlier + produced))
        tokens, log_probs = sample(self._logits, draws, self._params, self._present[:n])
        if self._params.presence_penalty:
            self._present[torch.arange(n), tokens] = True
        tokens = tokens.numpy()
        self._tokens[np.arange(n), produced] = tokens
        self._log_probs[np.arange(n), produced] = log_probs.numpy()
        produced += 1
        stopped = np.isin(tokens, self._stop_ids)
        finished = stopped | (earlier + produced == self._params.max_new_tokens)
        done = [
            (int(indices[row]), self._completion(row, "stop" if stopped[row] else "length"))
            for row in np.flatnonzero(finished)
        ]
        self._remove(finished)
        last = self._tokens[np.arange(self.count), self._produced[: self.count] - 1]
        self._logits = self._model.decode(torch.from_numpy(last), self._cache) if self.count else self._logits[:0]
        return done

    def paused(self) -> dict[int, Completion]:
        """The running sequences as they are, by their requests' indices."""
        return {int(self._indices[row]): self._completion(row, "paused") for row in range(self.count)}

    def _completion(self, row: int, finish: Finish) -> Completion:
        length = self._produced[row]
        return Completion(
            token_ids=self._tokens[row, :length].tolist(),
            log_probs=self._log_probs[row, :length].tolist(),
            finish=finish,
        )

    def _remove(self, finished: np.ndarray) -> None:
        """Fill the gaps left by finished rows with the last running rows."""
        self.count -= int(finished.sum())
        holes = np.flatnonzero(finished[: self.count])
        movers = self.count + np.flatnonzero(~finished[self.count :])
        if len(holes):
            self._cache.move(movers, holes)
            for array in (
                *(self._indices, self._seeds, self._earlier, self._produced),
                *(self._tokens, self._log_probs, self._present.numpy()),
            ):
                array[holes] = array[movers]
