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
from milepost.rollout.engine import Completion, Request, SamplingParams
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
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """See `rollout.engine.RolloutEngine.generate`."""
        if self._asleep:
            raise RuntimeError("the engine is asleep: call wake() first")
        completions: list[Completion | None] = [None] * len(requests)
        waiting = _WaitingPrompts(self.model, requests)
        rows = min(self.max_running, len(requests))
        if self._cache is None or len(self._cache.lengths) < rows:
            self._cache = ModelCache(rows, self.model.architecture)
        batch = _Batch(self.model, self._cache, rows, requests, params)
        while waiting or batch.count:
            # Wait until an eighth of the rows is free: prefilling several prompts at once is faster.
            if batch.count == 0 or rows - batch.count >= min(waiting.samples, max(1, rows // 8)):
                while waiting and batch.count < rows:
                    batch.admit(*waiting.take(rows - batch.count))
            for index, completion in batch.step():
                completions[index] = completion
                if on_done is not None:
                    on_done(index, completion)
        return completions

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
    """A prefilled prompt: its row in the prefill's cache, the next token's logits, and the requests waiting for it."""

    cache: ModelCache
    row: int
    logits: Tensor  # (V,)
    wanted: deque[int]


class _WaitingPrompts:
    """The waiting requests, grouped by prompt: equal prompts are prefilled once, a few prompts ahead of need."""

    def __init__(self, model: CpuModel, requests: Sequence[Request]):
        self._model = model
        by_prompt: dict[tuple[int, ...], deque[int]] = {}
        for index, request in enumerate(requests):
            if not request.prompt_ids:
                raise ValueError(f"request {index} has an empty prompt")
            by_prompt.setdefault(tuple(request.prompt_ids), deque()).append(index)
        self._unread = deque(by_prompt.items())
        self._read: deque[_ReadPrompt] = deque()
        self.samples = len(requests)

    def __bool__(self) -> bool:
        return self.samples > 0

    def take(self, limit: int) -> tuple[_ReadPrompt, list[int]]:
        """The next prompt and up to ``limit`` of its requests; there must be one waiting."""
        if not self._read:
            self._prefill(limit)
        prompt = self._read[0]
        indices = [prompt.wanted.popleft() for _ in range(min(limit, len(prompt.wanted)))]
        if not prompt.wanted:
            self._read.popleft()
        self.samples -= len(indices)
        return prompt, indices

    def _prefill(self, samples: int) -> None:
        """Prefill the next prompts: enough for ``samples`` requests, within `_PREFILL_TOKENS`, but at least one."""
        chosen, longest = [], 0
        while self._unread and sum(len(wanted) for _, wanted in chosen) < samples:
            longest = max(longest, len(self._unread[0][0]))
            if chosen and (len(chosen) + 1) * longest > _PREFILL_TOKENS:
                break
            chosen.append(self._unread.popleft())
        logits, cache = self._model.prefill([list(prompt) for prompt, _ in chosen])
        self._read.extend(_ReadPrompt(cache, row, logits[row], wanted) for row, (_, wanted) in enumerate(chosen))


class _Batch:
    """The running sequences: rows 0 ... count - 1 of the cache and of every array here."""

    def __init__(
        self, model: CpuModel, cache: ModelCache, rows: int, requests: Sequence[Request], params: SamplingParams
    ):
        self.count = 0
        self._model, self._cache, self._params = model, cache, params
        self._all_seeds = seed_words([request.seed for request in requests])
        self._stop_ids = np.array(params.stop_token_ids, dtype=np.int64)
        self._indices = np.zeros(rows, dtype=np.int64)  # index of each row's request
        self._produced = np.zeros(rows, dtype=np.int64)  # tokens so far
        self._tokens = np.zeros((rows, params.max_new_tokens), dtype=np.int64)
        self._log_probs = np.zeros((rows, params.max_new_tokens), dtype=np.float32)
        vocabulary = model.architecture.vocab_size if params.presence_penalty else 0
        self._present = torch.zeros(rows, vocabulary, dtype=torch.bool)
        self._logits = torch.empty(0, model.architecture.vocab_size)  # (count, V) of the next tokens

    def admit(self, prompt: _ReadPrompt, indices: list[int]) -> None:
        """Start one sequence for each of the requests ``indices``, which share a prompt."""
        rows = slice(self.count, self.count + len(indices))
        self._cache.insert(rows, prompt.cache, prompt.row)
        self._indices[rows] = indices
        self._produced[rows] = 0
        self._present[rows] = False
        self._logits = torch.cat([self._logits, prompt.logits.expand(len(indices), -1)])
        self.count += len(indices)

    def step(self) -> list[tuple[int, Completion]]:
        """Sample one token per sequence, return the finished ones, and compute the next logits of the others."""
        n = self.count
        indices, produced = self._indices[:n], self._produced[:n]
        draws = torch.from_numpy(uniforms(self._all_seeds[indices], produced))
        tokens, log_probs = sample(self._logits, draws, self._params, self._present[:n])
        if self._params.presence_penalty:
            self._present[torch.arange(n), tokens] = True
        tokens = tokens.numpy()
        self._tokens[np.arange(n), produced] = tokens
        self._log_probs[np.arange(n), produced] = log_probs.numpy()
        produced += 1
        stopped = np.isin(tokens, self._stop_ids)
        finished = stopped | (produced == self._params.max_new_tokens)
        done = [(int(indices[row]), self._completion(row, bool(stopped[row]))) for row in np.flatnonzero(finished)]
        self._remove(finished)
        last = self._tokens[np.arange(self.count), self._produced[: self.count] - 1]
        self._logits = self._model.decode(torch.from_numpy(last), self._cache) if self.count else self._logits[:0]
        return done

    def _completion(self, row: int, stopped: bool) -> Completion:
        length = self._produced[row]
        return Completion(
            token_ids=self._tokens[row, :length].tolist(),
            log_probs=self._log_probs[row, :length].tolist(),
            finish="stop" if stopped else "length",
        )

    def _remove(self, finished: np.ndarray) -> None:
        """Fill the gaps left by finished rows with the last running rows."""
        self.count -= int(finished.sum())
        holes = np.flatnonzero(finished[: self.count])
        movers = self.count + np.flatnonzero(~finished[self.count :])
        if len(holes):
            self._cache.move(movers, holes)
            for array in (self._indices, self._produced, self._tokens, self._log_probs, self._present.numpy()):
                array[holes] = array[movers]
