"""The rollout engine on GPUs: SGLang servers, each on its own GPUs, that share the requests.

`sglang_dispatch` divides a batch and restarts failed servers, `sglang_weights` sends weights, `sglang_server` runs one
server. This module ties them together: it starts the servers, and tracks which memory and weights they hold.

SGLang draws from one random generator per server, so a request's seed decides its response only under
``server_arguments: {enable_deterministic_inference: true}``, which also makes kernels independent of the batch, and
slower. Otherwise the samples of a prompt are independent, but another run draws different ones.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.common.files import allow_open_files
from milepost.configuration.schema import Engine
from milepost.qwen3_5.architecture import Architecture
from milepost.rollout import sglang_weights
from milepost.rollout.engine import Completion, OnDone, Request, SamplingParams
from milepost.rollout.sglang_dispatch import Dispatch
from milepost.rollout.sglang_model import folder_to_serve
from milepost.rollout.sglang_server import KINDS_OF_MEMORY, Server, ServerDown

UPDATE_SECONDS = 600.0  # for one bucket of weights


def start(folder: Path, settings: Engine, logs: Path, max_requests: int | None = None) -> "SglangEngine":
    """Start all servers at once; `UserError` with the reason if one does not start.

    They use the GPUs of the training processes or, without torch.distributed, all visible GPUs. Each server runs at
    most its share of ``max_requests`` at once: SGLang reserves a linear-attention state for every request that might
    run (150 MB for 27B), and by default would spend half of its memory on them.
    """
    gpus = dist.get_world_size() if dist.is_initialized() else torch.cuda.device_count()
    count = gpus // settings.gpus_per_engine
    if not count:
        raise UserError(
            f"engine.gpus_per_engine: {settings.gpus_per_engine}, but only {gpus} GPUs are visible: lower it"
        )
    if max_requests:
        share = -(-max_requests // count)
        running = min(share, settings.max_running_requests or share)
        settings = settings.model_copy(update={"max_running_requests": running})
    if settings.speculation:
        settings = settings.model_copy(update={"mem_fraction_static": _fraction_without_drafts(folder, settings)})
    served = folder_to_serve(folder, logs)
    engine = SglangEngine(folder, settings, [Server(served, settings, index, logs) for index in range(count)])
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    return engine


def share_weights(folder: Path, settings: Engine, named: Iterable[tuple[str, Tensor]]) -> None:
    """Called by the training processes that do not drive the engine, while the one that does is in `load_weights`."""
    sglang_weights.send(_with_constants(folder, settings, named))


class SglangEngine:
    """`rollout.engine.RolloutEngine` on SGLang servers.

    Attributes:
        repeated: how many requests were sent again because their server failed.
        weights_wanted: called by `generate`, in its thread, when a restarted server needs the current weights; it must
            lead to `load_weights` on all training processes.
    """

    def __init__(self, folder: Path, settings: Engine, servers: list[Server]):
        self.folder, self.settings, self.servers = folder, settings, servers
        self.repeated = 0
        self.weights_wanted: Callable[[], None] | None = None
        self._state: Literal["awake", "weights", "asleep"] = "awake"  # "weights": memory for weights only, no caches
        self._folder_is_current = True  # until weights are loaded
        self._sent = False  # weights were loaded since `wake`
        self._in_need: Server | None = None  # if set, only this server receives weights
        self._unfinished_restarts: set[int] = set()  # see `Dispatch`

    @property
    def is_reproducible(self) -> bool:
        """Whether SGLang does."""
        return bool(self.settings.server_arguments.get("enable_deterministic_inference"))

    def start(self) -> None:
        """Start every server."""
        allow_open_files()  # every running request holds a connection
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(self._start, self.servers))

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `rollout.engine.RolloutEngine.generate`."""
        self._resume_caches()
        dispatch = Dispatch(self.servers, requests, params, self._start, self._unfinished_restarts)
        try:
            return dispatch.run(on_done, self._supply_weights)
        finally:
            self.repeated += dispatch.repeated

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights by Hub name; the other training processes call `share_weights` at the same time.

        A server that fails meanwhile is left for `generate` to restart.
        """
        if self._state == "asleep":
            raise RuntimeError("the engine is asleep: call wake() before load_weights()")
        self._folder_is_current = False
        servers = self._receivers()
        for server in servers:
            server.holds_weights = False

        def readers() -> set[int]:
            return {rank for server in servers if server.alive for rank in self._senders(server)}

        def deliver(handles: list[str]) -> None:
            def update(server: Server) -> None:
                own = [handles[rank] for rank in self._senders(server)]
                body = {"serialized_named_tensors": own, "load_format": "flattened_bucket", "flush_cache": False}
                server.call("/update_weights_from_tensor", body, timeout=UPDATE_SECONDS)

            self._on(servers, update)

        sglang_weights.send(_with_constants(self.folder, self.settings, named), deliver, readers)
        if self._state == "awake":
            self._on(servers, Server.flush)  # a radix cache (server_arguments) holds states of the old weights
        for server in servers:
            server.holds_weights = server.alive
        self._sent = True

    def sleep(self) -> None:
        """Release all GPU memory but the processes' own overhead; weights must be loaded again after `wake`."""
        if self._state == "awake":
            self._on(self.servers, Server.flush)
            self._on(self.servers, lambda server: server.release(*KINDS_OF_MEMORY))
        elif self._state == "weights":
            self._on(self.servers, lambda server: server.release("weights"))
        self._state, self._sent = "asleep", False

    def wake(self) -> None:
        """Allocate memory for the weights; `generate` allocates the caches."""
        if self._state == "asleep":
            self._on(self.servers, lambda server: server.resume("weights"))
            self._state = "weights"

    def check_weights(self, send: Callable[[], None]) -> None:
        """Check that ``send`` sends every weight of the servers.

        The servers copy their weights to host memory, overwrite them at random, receive them again and compare bit for
        bit. A tensor that is not sent, or that differs, raises a RuntimeError that names it.
        """
        servers = self._receivers()
        for action in ("snapshot", "reset_tensors"):
            self._on(servers, lambda server, action=action: server.call("/weights_checker", {"action": action}))
        send()
        self._on(servers, lambda server: server.call("/weights_checker", {"action": "compare"}))

    def close(self) -> None:
        """End all servers."""
        for server in self.servers:
            server.kill()

    def _start(self, server: Server) -> None:
        server.start()
        server.holds_weights = self._folder_is_current

    def _resume_caches(self) -> None:
        if self._state == "asleep":
            raise RuntimeError("the engine is asleep: call wake() first")
        if self._state == "weights":
            if not self._sent:
                raise RuntimeError("the engine has no weights since it slept: call load_weights() first")
            self._on(self.servers, lambda server: server.resume("kv_cache", "cuda_graph"))
            self._state = "awake"

    def _receivers(self) -> list[Server]:
        """The servers that receive weights: only the restarted one while the others are answering."""
        return [self._in_need] if self._in_need else self.servers

    def _senders(self, server: Server) -> list[int]:
        """The ranks of the training processes on a server's GPUs, one per GPU; a single process sends to all GPUs."""
        gpus = self.settings.gpus_per_engine
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [0] * gpus
        return list(range(server.index * gpus, (server.index + 1) * gpus))

    def _supply_weights(self, server: Server) -> None:
        """Send a restarted server the weights that the others have."""
        if server.holds_weights:
            return
        if self.weights_wanted is None:
            raise UserError(f"{server.name} was restarted, but nothing can send it the current weights: run again")
        self._in_need = server
        try:
            self.weights_wanted()
        finally:
            self._in_need = None

    def _on(self, servers: Sequence[Server], action: Callable[[Server], object]) -> None:
        """Run ``action`` on all live servers at once; one that fails is killed, for `generate` to restart."""

        def attempt(server: Server) -> None:
            try:
                action(server)
            except ServerDown as error:
                print(f"warning: {error}", file=sys.stderr)
                server.kill()

        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(attempt, [server for server in servers if server.alive]))


def _fraction_without_drafts(folder: Path, settings: Engine) -> float:
    """``mem_fraction_static`` for SGLang, reduced so that the draft layer's KV cache fits into the configured one.

    SGLang 0.5.16 allocates the MTP layer's KV cache on top of its memory fraction (it counts a draft model's cache only
    if that is a checkpoint of its own). The cache holds as many tokens as the model's and is as large as that of one
    full-attention layer. All memory besides weights counts as KV cache here, linear-attention states included, so the
    result errs on the small side.
    """
    shape = Architecture.from_folder(folder)
    layers = shape.num_layers // shape.full_attention_interval
    memory = torch.cuda.get_device_properties(0).total_memory
    weights = 2 * shape.parameters(mtp_num_layers=1) / settings.gpus_per_engine / memory
    return weights + (settings.mem_fraction_static - weights) * layers / (layers + 1)


def _with_constants(
    folder: Path, settings: Engine, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """``named`` and the weights that training does not change: the vision tower, and an MTP layer that only drafts."""
    constants = ("model.visual.", "mtp.") if settings.speculation else ("model.visual.",)
    return sglang_weights.with_constants(named, HubCheckpoint(folder), constants)
