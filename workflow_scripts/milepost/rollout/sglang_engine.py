"""The rollout engine that runs on GPUs: SGLang servers, each on its share of them, that divide the requests.

Seeds: SGLang draws from one generator a server, so a request's seed decides its answer only under
``server_arguments: {enable_deterministic_inference: true}``, which also makes kernels independent of the batch, and
slower. Otherwise two samples of a prompt are independent, and another run gives others.

A server that ends or hangs is started anew while the others go on, and what it was answering is asked for again.
Weights that came through `load_weights` are asked for by calling ``weights_wanted``.
"""

import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
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
from milepost.rollout.engine import Completion, Request, SamplingParams
from milepost.rollout.sglang_server import KINDS_OF_MEMORY, Server, ServerDown

# Seconds that a scheduler may be silent before its server counts as hung. It is while it compiles a kernel, which takes
# up to 240 s; for its first answers it compiles one after the other.
PATIENCE = 600.0
FIRST_PATIENCE = 1800.0
CHECK_INTERVAL = 15.0  # seconds between two looks at each server while it answers
MAX_RESTARTS = 3  # of one server within one call
UPDATE_SECONDS = 600.0  # for one bucket of weights
ABORT_SECONDS = 30.0  # for a server to let go of what it is answering


def start(folder: Path, settings: Engine, logs: Path, max_requests: int | None = None) -> "SglangEngine":
    """Start the servers, all at once; `UserError` with the reason if one does not start.

    They take the GPUs of the training's processes, or without such all that are visible. No server runs more requests
    than its share of ``max_requests``: SGLang sets a state of linear attention aside for each that might run, 150 MB
    for 27B, and left to itself would spend half of its memory on them.
    """
    gpus = dist.get_world_size() if dist.is_initialized() else torch.cuda.device_count()
    count = gpus // settings.gpus_per_engine
    if not count:
        raise UserError(f"engine.gpus_per_engine: {settings.gpus_per_engine}, but only {gpus} GPUs are here: lower it")
    if max_requests:
        share = -(-max_requests // count)
        running = min(share, settings.max_running_requests or share)
        settings = settings.model_copy(update={"max_running_requests": running})
    if settings.speculation:
        settings = settings.model_copy(update={"mem_fraction_static": _without_drafts(folder, settings)})
    engine = SglangEngine(folder, settings, [Server(folder, settings, index, logs) for index in range(count)])
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    return engine


def share_weights(folder: Path, settings: Engine, named: Iterable[tuple[str, Tensor]]) -> None:
    """The part of `SglangEngine.load_weights` of every training process but the one that drives the engine."""
    sglang_weights.send(_whole(folder, settings, named))


class SglangEngine:
    """`rollout.engine.RolloutEngine` over SGLang servers.

    Attributes:
        repeated: how many requests were asked for again, since their server failed.
        weights_wanted: called by `generate`, in its thread, when servers that were started anew need the weights that
            the others have; it must lead to `load_weights` on all training processes.
    """

    def __init__(self, folder: Path, settings: Engine, servers: list[Server]):
        self.folder, self.settings, self.servers = folder, settings, servers
        self.repeated = 0
        self.weights_wanted: Callable[[], None] | None = None
        self._state: Literal["awake", "weights", "asleep"] = "awake"  # "weights": their memory is there, caches are not
        self._folder_is_current = True  # until weights were loaded
        self._sent = False  # since `wake`
        self._in_need: Server | None = None  # the only one to be sent weights
        self._cut_short: set[int] = set()  # servers whose restart took longer than all answers of a `generate`

    @property
    def is_reproducible(self) -> bool:
        """Whether SGLang does."""
        return bool(self.settings.server_arguments.get("enable_deterministic_inference"))

    def start(self) -> None:
        """Start every server."""
        allow_open_files()  # each request under way is a connection
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(self._start, self.servers))

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """See `rollout.engine.RolloutEngine.generate`."""
        self._awaken()
        completions: list[Completion | None] = [None] * len(requests)
        left = len(requests)
        with _Answering(self, requests, params) as answering:
            # Such a restart is waited for the next time, or a server might never come back.
            while left or self._cut_short & answering.restarting:
                event = answering.events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, _Down):
                    answering.restart(event)
                elif isinstance(event, _Up):
                    self._supply(event.server)
                    self._cut_short.discard(event.server.index)
                    answering.employ(event.server)
                else:
                    index, completions[index] = event
                    left -= 1
                    if on_done is not None:
                        on_done(*event)
        return completions

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights by their Hub names; the other training processes call `share_weights` at the same time.

        A server that fails while taking them is left for `generate` to restart.
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

        sglang_weights.send(_whole(self.folder, self.settings, named), deliver, readers)
        if self._state == "awake":
            self._on(servers, Server.flush)  # a user's radix cache holds what the old weights made of prompts
        for server in servers:
            server.holds_weights = server.alive
        self._sent = True

    def sleep(self) -> None:
        """Give all GPU memory back but the processes' own; weights must be loaded anew after `wake`."""
        if self._state == "awake":
            self._on(self.servers, Server.flush)
            self._on(self.servers, lambda server: server.release(*KINDS_OF_MEMORY))
        elif self._state == "weights":
            self._on(self.servers, lambda server: server.release("weights"))
        self._state, self._sent = "asleep", False

    def wake(self) -> None:
        """Take the memory of the weights again; that of the caches follows when answers are asked for."""
        if self._state == "asleep":
            self._on(self.servers, lambda server: server.resume("weights"))
            self._state = "weights"

    def check_weights(self, send: Callable[[], None]) -> None:
        """Make sure that the servers hold what ``send`` sends, all of it and nothing else.

        Their weights are kept aside in host memory, overwritten at random, sent again and compared bit for bit: a
        tensor that is not sent, or that arrives differently twice, is a RuntimeError that names it.
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

    def _awaken(self) -> None:
        if self._state == "asleep":
            raise RuntimeError("the engine is asleep: call wake() first")
        if self._state == "weights":
            if not self._sent:
                raise RuntimeError("the engine has slept and knows no weights: call load_weights() first")
            self._on(self.servers, lambda server: server.resume("kv_cache", "cuda_graph"))
            self._state = "awake"

    def _receivers(self) -> list[Server]:
        """Who gets the weights that are sent: while others answer, only the server that was started anew."""
        return [self._in_need] if self._in_need else self.servers

    def _senders(self, server: Server) -> list[int]:
        """The training processes on a server's GPUs, one a GPU; one that trains alone sends to all."""
        gpus = self.settings.gpus_per_engine
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [0] * gpus
        return list(range(server.index * gpus, (server.index + 1) * gpus))

    def _supply(self, server: Server) -> None:
        """Give a server that was started anew the weights that the others have."""
        if server.holds_weights:
            return
        if self.weights_wanted is None:
            raise UserError(f"{server.name} was restarted, and nobody is there to send it the current weights")
        self._in_need = server
        try:
            self.weights_wanted()
        finally:
            self._in_need = None

    def _on(self, servers: Sequence[Server], action: Callable[[Server], object]) -> None:
        """Do ``action`` on the servers that are alive, at once; one that fails is ended, for `generate` to restart."""

        def attempt(server: Server) -> None:
            try:
                action(server)
            except ServerDown as error:
                _warn(str(error))
                server.kill()

        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(attempt, [server for server in servers if server.alive]))


@dataclass(frozen=True)
class _Down:
    """A server failed, in the process of its ``starts``-th start."""

    server: Server
    starts: int
    why: str


@dataclass(frozen=True)
class _Up:
    """A server that failed answers again."""

    server: Server


class _Answering:
    """The threads of one `SglangEngine.generate`, one a request under way, and what they have to tell (``events``).

    Every server begins with a run of requests of its own, and takes from the others' when that is done.
    """

    def __init__(self, engine: SglangEngine, requests: Sequence[Request], params: SamplingParams):
        self.engine, self.requests, self.params = engine, requests, params
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        count, total = len(engine.servers), len(requests)
        bounds = [total * number // count for number in range(count + 1)]
        self._shares = [deque(range(first, last)) for first, last in pairwise(bounds)]
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._workers: list[threading.Thread] = []
        self._busy = [0] * count
        self._restarts = [0] * count
        self.restarting: set[int] = set()

    def __enter__(self) -> "_Answering":
        for server in self.engine.servers:
            if server.alive:
                self.employ(server, len(self._shares[server.index]))
            else:
                self.restart(_Down(server, server.starts, f"{server.name}: not running"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        with self._lock:
            for share in self._shares:
                share.clear()
        for server in self.engine.servers:
            if server.index in self.restarting:
                server.kill()  # memory is soon needed for other things
                self.engine._cut_short.add(server.index)
            elif kind is not None and self._busy[server.index]:
                with contextlib.suppress(ServerDown):
                    server.abort(ABORT_SECONDS)
        if kind is not None:
            deadline = time.monotonic() + ABORT_SECONDS
            for worker in self._workers:
                worker.join(max(0.0, deadline - time.monotonic()))
            for server in self.engine.servers:
                if self._busy[server.index]:
                    server.kill()  # it hangs, and so would whoever waits for its answers
        for worker in self._workers:
            worker.join()

    def employ(self, server: Server, limit: int | None = None) -> None:
        """Let ``server`` answer as many requests as it can, or up to ``limit``; a few wait in it for their turn."""
        self.restarting.discard(server.index)
        try:
            capacity = server.capacity(timeout=_patience(server))
        except ServerDown as error:
            self.events.put(_Down(server, server.starts, str(error)))
            return
        with self._lock:
            waiting = sum(len(share) for share in self._shares) if limit is None else limit
            count = min(waiting, capacity + capacity // 8 + 1 - self._busy[server.index])
            self._busy[server.index] += max(count, 0)
        for _ in range(count):
            self._workers.append(self._run(self._answer, server, server.starts))
        self._run(self._watch, server, server.starts)

    def restart(self, down: _Down) -> None:
        """Start a failed server anew, in a thread, and let the others take what it leaves."""
        server = down.server
        if server.index in self.restarting or server.starts != down.starts:
            return  # old news
        server.kill()
        self._restarts[server.index] += 1
        if self._restarts[server.index] > MAX_RESTARTS:
            raise UserError(
                f"{server.name} failed again after {MAX_RESTARTS} restarts: {down.why}; its log: {server.log}"
            )
        _warn(f"{down.why}: starting it anew")
        self.restarting.add(server.index)
        self._workers.append(self._run(self._restart, server))
        for other in self.engine.servers:
            if other.alive and other.index not in self.restarting:
                self.employ(other)

    def _run(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self.events.put(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def _answer(self, server: Server, starts: int) -> None:
        try:
            while (index := self._take(server)) is not None:
                try:
                    completion = server.answer(self.requests[index], self.params)
                except ServerDown as error:
                    self._give_back(server, index)
                    self.events.put(_Down(server, starts, str(error)))
                    return
                if completion is None:
                    if self._over.is_set():
                        return
                    raise RuntimeError(f"{server.name} gave up request {index}; its log is {server.log}")
                self.events.put((index, completion))
        finally:
            with self._lock:
                self._busy[server.index] -= 1

    def _take(self, server: Server) -> int | None:
        with self._lock:
            own = self._shares[server.index]
            if own:
                return own.popleft()
            longest = max(self._shares, key=len)
            return longest.pop() if longest else None

    def _give_back(self, server: Server, index: int) -> None:
        with self._lock:
            if not self._over.is_set():
                self._shares[server.index].appendleft(index)
                self.engine.repeated += 1

    def _watch(self, server: Server, starts: int) -> None:
        """Report a server whose scheduler hangs, though its process lives."""
        while not self._over.wait(CHECK_INTERVAL) and server.starts == starts and server.alive:
            try:
                server.state(timeout=_patience(server))
            except ServerDown as error:
                self.events.put(_Down(server, starts, str(error)))
                return

    def _restart(self, server: Server) -> None:
        try:
            self.engine._start(server)
        except UserError as error:
            self.restarting.discard(server.index)
            self.events.put(_Down(server, server.starts, str(error)))
        else:
            self.events.put(_Up(server))


def _patience(server: Server) -> float:
    return PATIENCE if server.has_answered else FIRST_PATIENCE


def _without_drafts(folder: Path, settings: Engine) -> float:
    """``mem_fraction_static`` as SGLang means it: without the drafts' keys and values.

    Those come on top, for as many tokens as the model's own (in 0.5.16; its sum asks for a draft checkpoint's path,
    which an MTP layer has not), and are as large as those of one of its full attention layers. All that is not weights
    is taken for keys and values here, linear attention's states, too: rather a little less than too much.
    """
    shape = Architecture.from_folder(folder)
    layers = shape.num_layers // shape.full_attention_interval
    memory = torch.cuda.get_device_properties(0).total_memory
    weights = 2 * shape.parameters(mtp_num_layers=1) / settings.gpus_per_engine / memory
    return weights + (settings.mem_fraction_static - weights) * layers / (layers + 1)


def _whole(folder: Path, settings: Engine, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All that a server needs after it has slept: the vision tower too, and a draft model that does not train."""
    constants = ("model.visual.", "mtp.") if settings.speculation else ("model.visual.",)
    return sglang_weights.with_constants(named, HubCheckpoint(folder), constants)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
