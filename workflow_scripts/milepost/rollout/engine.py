"""The rollout engine: what samples answers, however and wherever it does so.

Each kind of engine lives in a module of its own, ``rollout/{kind}_engine.py``, whose ``start`` returns a running
`RolloutEngine`. Nothing else knows the kinds, so a change of one engine touches no run that uses another.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
        presence_penalty: taken off the logit of each token that the response already holds (the prompt does not count).
        stop_token_ids: a response ends with the first of these that is sampled.
        with_routing: say which experts every token visited; for an engine with ``replay_routing``.
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
    """One response to sample. Weights, prompt, seed and `SamplingParams` decide it, not what else is asked for.

    SGLang keeps this promise, and heeds the seed, only under ``enable_deterministic_inference``.
    """

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Drafting:
    """How a response came about where a smaller model drafts (speculative decoding).

    Attributes:
        passes: forward passes of the model itself; one gives a token of its own and keeps the drafts that fit.
        drafted, accepted: tokens that were drafted, and of them those that were kept.
    """

    passes: int
    drafted: int
    accepted: int


@dataclass
class Completion:
    """One sampled response.

    Attributes:
        token_ids: the sampled tokens; the stop token included when one was sampled.
        log_probs: natural log-probability of each, after temperature (1 where it is 0) and presence penalty, before
            top-p and top-k.
        finish: ``stop`` when a stop token was sampled, ``length`` when ``max_new_tokens`` ran out.
        drafting: None where nothing drafts.
        routing: (P + R - 1, layers x k) the experts that each token but the last visited, layer after layer; None
            unless it was asked for.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish: Literal["stop", "length"]
    drafting: Drafting | None = None
    routing: Tensor | None = None


class RolloutEngine(Protocol):
    """A model that is ready to answer.

    Attributes:
        is_reproducible: whether a `Request` decides its response, so that it can be asked for again.
        repeated: how many requests were asked for again, since the part of it that was answering them failed.
        weights_wanted: set by whoever sends weights. `generate` calls it, in its own thread, when a part of the engine
            was started anew and needs the weights that the rest has; it must lead to `load_weights`.
    """

    is_reproducible: bool
    repeated: int
    weights_wanted: Callable[[], None] | None

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample one response a request, in the requests' order.

        ``on_done(index, completion)`` is called as each is finished, in the order of finishing.
        """

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights by their Hub names; each replaces the whole tensor of that name.

        Where several processes train, the others call `share_weights` with the same tensors at the same time.
        """

    def check_weights(self, send: Callable[[], None]) -> None:
        """Make sure that the engine holds what ``send`` sends, all of it and nothing else; RuntimeError if not."""

    def sleep(self) -> None:
        """Give memory back while others work; nothing is generated until `wake`."""

    def wake(self) -> None:
        """Take the memory again. An engine may need all weights anew (`load_weights`) before it generates."""

    def close(self) -> None:
        """End the engine and whatever it started."""


def request_seed(*key: int) -> int:
    """The seed of a request, 31 bits that depend on all of ``key`` and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def start_engine(
    folder: Path | str, settings: Engine, logs: Path | str, max_requests: int | None = None
) -> RolloutEngine:
    """Start the engine of kind ``settings.kind`` with the checkpoint in ``folder`` (in the Hub's format).

    Args:
        logs: a folder for the words of processes that the engine starts; it is made if there are any.
        max_requests: what one `RolloutEngine.generate` will bring at most, if that is known. An engine that sets memory
            aside for each request has more for their tokens then.
    """
    return _module(settings).start(Path(folder), settings, Path(logs), max_requests)


def share_weights(folder: Path | str, settings: Engine, named: Iterable[tuple[str, Tensor]]) -> None:
    """The part in `RolloutEngine.load_weights` of the training processes that do not drive the engine."""
    _module(settings).share_weights(Path(folder), settings, named)


def _module(settings: Engine) -> ModuleType:
    return importlib.import_module(f"milepost.rollout.{settings.kind}_engine")
