"""The interface of rollout engines.

Each kind of engine is a module ``rollout/{kind}_engine.py`` whose ``start`` returns a running `RolloutEngine`. No other
code depends on a kind, so a change of one engine leaves runs with another untouched.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from torch import Tensor

from milepost.configuration.schema import Engine


@dataclass(frozen=True)
class SamplingParams:
    """How every request of one `RolloutEngine.generate` call is sampled.

    Attributes:
        max_new_tokens: tokens after which a response is cut off.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_p: keep the most likely tokens until their probabilities sum to this; 1 keeps all.
        top_k: keep this many of the most likely tokens; -1 keeps all.
        presence_penalty: subtracted from the logit of each token already in the response (the prompt does not count).
        stop_token_ids: a response ends with the first of these.
        with_routing: also return the experts that every token visited; for engines with ``replay_routing``.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    presence_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    with_routing: bool = False


@dataclass(frozen=True)
class Request:
    """One response to sample. It depends on weights, prompt, seed and `SamplingParams`, not on other requests.

    SGLang guarantees this, and uses the seed, only under ``enable_deterministic_inference``.

    Attributes:
        prefix_ids: the response's first tokens, sampled earlier; it is continued after them. They count towards
            ``max_new_tokens``, and a seed's draws go on where they ended.
    """

    prompt_ids: list[int]
    seed: int
    prefix_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Drafting:
    """Statistics of speculative decoding for one response.

    Attributes:
        passes: forward passes of the model; each accepts fitting drafts and adds one token of its own.
        drafted, accepted: the number of drafted tokens, and of those accepted.
    """

    passes: int
    drafted: int
    accepted: int

    def __add__(self, more: "Drafting") -> "Drafting":
        return Drafting(self.passes + more.passes, self.drafted + more.drafted, self.accepted + more.accepted)


Finish = Literal["stop", "length", "paused"]


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: the sampled tokens after the request's prefix, including the stop token if there is one.
        log_probs: natural log-probability of each, after temperature (1 if it is 0) and presence penalty, before
            top-p and top-k.
        finish: ``stop`` if a stop token was sampled, ``length`` if ``max_new_tokens`` was reached, ``paused`` if the
            response is unfinished, perhaps not begun.
        drafting: None without speculative decoding.
        routing: (P + R - 1, layers x k), the experts that each token but the last visited, layer by layer, for P prompt
            and R response tokens; None unless ``with_routing``.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish: Finish
    drafting: Drafting | None = None
    routing: Tensor | None = None


NOT_BEGUN = Completion([], [], "paused")

PAUSE = "pause"
# What `on_done` may answer: to go on, further requests to sample in the same call, or to pause all that is unfinished.
Reply = Sequence[Request] | Literal["pause"] | None
OnDone = Callable[[int, Completion], Reply]


class RolloutEngine(Protocol):
    """A model that is ready to sample.

    Attributes:
        is_reproducible: whether a repeated `Request` gives the same response.
        repeated: how many requests were sent again because the worker that was answering them failed.
        weights_wanted: set by the code that sends weights. `generate` calls it, in its own thread, when a restarted
            worker needs the current weights; it must lead to `load_weights`.
    """

    is_reproducible: bool
    repeated: int
    weights_wanted: Callable[[], None] | None

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """Sample one response per request, in the requests' order.

        ``on_done(index, completion)`` is called once for each one that finishes. It may return further requests, which
        get the next indices, or `PAUSE`: then the others end as they are, with ``finish`` ``paused``.
        """

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights by Hub name; each replaces the whole tensor of that name.

        With several training processes, the others call `share_weights` with the same tensors at the same time.
        """

    def check_weights(self, send: Callable[[], None]) -> None:
        """Check that ``send`` delivers every weight of the engine correctly; RuntimeError if not."""

    def sleep(self) -> None:
        """Release memory for other work; `generate` must not be called until `wake`."""

    def wake(self) -> None:
        """Allocate the memory again. An engine may need all weights again (`load_weights`) before it generates."""

    def close(self) -> None:
        """Stop the engine and every process it started."""


def request_seed(*key: int) -> int:
    """The seed of a request: 31 bits derived from ``key``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def start_engine(
    folder: Path | str, settings: Engine, logs: Path | str, max_requests: int | None = None
) -> RolloutEngine:
    """Start the engine of kind ``settings.kind`` with the checkpoint in ``folder`` (in the Hub's format).

    Args:
        logs: a folder for the output of processes that the engine starts; created if there are any.
        max_requests: the most requests that one `RolloutEngine.generate` will get, if known. An engine that reserves
            memory per request then has more left for their tokens.
    """
    return _module(settings).start(Path(folder), settings, Path(logs), max_requests)


def share_weights(folder: Path | str, settings: Engine, named: Iterable[tuple[str, Tensor]]) -> None:
    """Called by the training processes that do not drive the engine, while the one that does is in `load_weights`."""
    _module(settings).share_weights(Path(folder), settings, named)


def _module(settings: Engine) -> ModuleType:
    return importlib.import_module(f"milepost.rollout.{settings.kind}_engine")
