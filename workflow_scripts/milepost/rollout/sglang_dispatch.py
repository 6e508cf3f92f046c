"""Divide one batch of requests among SGLang servers, and restart servers that fail while the others go on.

Every server starts with its own share of the requests and, when that is done, takes from the longest share left.
Requests that are added later go to the shortest share. A server whose process ends, or whose scheduler hangs, is
restarted; its unanswered requests go back to its share, where the other servers find them. Threads report through one
queue of events, which `Dispatch.run` reads in the caller's thread.
"""

import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from milepost.common.errors import UserError
from milepost.rollout.engine import NOT_BEGUN, PAUSE, Completion, OnDone, Request, SamplingParams
from milepost.rollout.sglang_server import Server, ServerDown

# Seconds without an answer from the scheduler after which a server counts as hung. The scheduler is silent while it
# compiles a kernel, which takes up to 240 s; before its first response it compiles several in a row.
PATIENCE = 600.0
FIRST_PATIENCE = 1800.0
CHECK_INTERVAL = 15.0  # seconds between two checks of a server that is answering
MAX_RESTARTS = 3  # per server and batch
ABORT_SECONDS = 30.0  # for a server to abort its running requests


@dataclass(frozen=True)
class _Down:
    """A server failed in the process of its ``starts``-th start."""

    server: Server
    starts: int
    why: str


@dataclass(frozen=True)
class _Up:
    """A restarted server answers again."""

    server: Server


_Event = _Down | _Up | BaseException | tuple[int, Completion]


class Dispatch:
    """One batch of requests on its way through the servers.

    Args:
        servers: the engine's servers; those that are not running are restarted.
        start: starts a server; `UserError` if that fails.
        unfinished_restarts: indices of the servers whose restart the previous batch did not wait for; updated here.

    Attributes:
        repeated: how many requests were sent again because their server failed.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        requests: Sequence[Request],
        params: SamplingParams,
        start: Callable[[Server], None],
        unfinished_restarts: set[int],
    ):
        self.servers, self.requests, self.params = servers, list(requests), params
        self.repeated = 0
        self._start, self._unfinished_restarts = start, unfinished_restarts
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        count, total = len(servers), len(requests)
        bounds = [total * number // count for number in range(count + 1)]
        self._shares = [deque(range(first, last)) for first, last in pairwise(bounds)]
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._paused = threading.Event()  # requests end as they are
        self._workers: list[threading.Thread] = []
        self._busy = [0] * count
        self._capacity = [0] * count
        self._restarts = [0] * count
        self._restarting: set[int] = set()

    def run(self, on_done: OnDone | None, supply_weights: Callable[[Server], None]) -> list[Completion]:
        """Return the completions in the order of the requests.

        Args:
            on_done: as in `rollout.engine.RolloutEngine.generate`.
            supply_weights: called with a restarted server before it answers again.

        Raises:
            UserError: a server failed again after `MAX_RESTARTS` restarts.
        """
        completions: dict[int, Completion] = {}
        with self._threads():
            # Also wait for a restart that the previous batch cut short, or a slow server might never come back.
            while len(completions) < len(self.requests) or self._unfinished_restarts & self._restarting:
                event = self._events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, _Down):
                    self._begin_restart(event)
                elif isinstance(event, _Up):
                    supply_weights(event.server)
                    self._unfinished_restarts.discard(event.server.index)
                    self._employ(event.server)
                else:
                    index, completions[index] = event
                    if on_done is None or completions[index].finish == "paused":
                        continue
                    reply = on_done(*event)
                    if reply == PAUSE:
                        self._pause()
                    elif reply and not self._paused.is_set():
                        self._add(reply)
        return [completions[index] for index in range(len(self.requests))]

    @contextlib.contextmanager
    def _threads(self):
        """Start the threads that answer; at the end, abort and kill what still runs and join them."""
        failed = True
        try:
            for server in self.servers:
                if server.alive:
                    self._employ(server, len(self._shares[server.index]))
                else:
                    self._begin_restart(_Down(server, server.starts, f"{server.name}: not running"))
            yield
            failed = False
        finally:
            self._end(failed)

    def _end(self, failed: bool) -> None:
        self._over.set()
        with self._lock:
            for share in self._shares:
                share.clear()
        for server in self.servers:
            if server.index in self._restarting:
                server.kill()  # its memory may soon be needed for training
                self._unfinished_restarts.add(server.index)
            elif failed:
                self._workers.append(self._thread(self._abort, server))
        for worker in self._workers:
            worker.join()

    def _employ(self, server: Server, limit: int | None = None) -> None:
        """Give ``server`` as many requests as it can run at once (at most ``limit``), and a few to queue."""
        self._restarting.discard(server.index)
        try:
            capacity = server.capacity(timeout=_patience(server))
        except ServerDown as error:
            self._events.put(_Down(server, server.starts, str(error)))
            return
        self._capacity[server.index] = capacity + capacity // 8 + 1
        self._hire(server, limit)
        self._thread(self._watch, server, server.starts)

    def _hire(self, server: Server, limit: int | None = None) -> None:
        """Start as many threads for a server as it has room for, and requests wait (at most ``limit``)."""
        with self._lock:
            waiting = sum(len(share) for share in self._shares) if limit is None else limit
            count = max(0, min(waiting, self._capacity[server.index] - self._busy[server.index]))
            self._busy[server.index] += count
        for _ in range(count):
            self._workers.append(self._thread(self._answer, server, server.starts))

    def _add(self, requests: Sequence[Request]) -> None:
        """Add requests to the batch."""
        with self._lock:
            for request in requests:
                min(self._shares, key=len).append(len(self.requests))
                self.requests.append(request)
        for server in self.servers:
            if server.alive and server.index not in self._restarting:
                self._hire(server)

    def _pause(self) -> None:
        """End every unfinished request as it is."""
        with self._lock:
            self._paused.set()
            unsent = [index for share in self._shares for index in share]
            for share in self._shares:
                share.clear()
        for index in unsent:
            self._events.put((index, NOT_BEGUN))
        self._workers += [self._thread(self._abort, server) for server in self.servers]

    def _abort(self, server: Server) -> None:
        """Abort what a server is answering, until nothing is left: a request may just be on its way to it.

        A server that does not obey is killed; what it was answering ends as if it had not begun.
        """
        deadline = time.monotonic() + ABORT_SECONDS
        while self._busy[server.index]:
            try:
                server.abort(ABORT_SECONDS)
            except ServerDown:
                server.kill()
            if time.monotonic() > deadline:
                server.kill()
            time.sleep(0.1)

    def _begin_restart(self, down: _Down) -> None:
        """Restart a failed server in a thread, and let the others take the requests it leaves."""
        server = down.server
        if server.index in self._restarting or server.starts != down.starts:
            return  # about an earlier process
        server.kill()
        self._restarts[server.index] += 1
        if self._restarts[server.index] > MAX_RESTARTS:
            raise UserError(
                f"{server.name} failed again after {MAX_RESTARTS} restarts: {down.why}: look for the cause in its log"
                f" {server.log}, and run again"
            )
        print(f"warning: {down.why}: restarting it", file=sys.stderr)
        self._restarting.add(server.index)
        self._workers.append(self._thread(self._restart, server))
        for other in self.servers:
            if other.alive and other.index not in self._restarting:
                self._employ(other)

    def _thread(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self._events.put(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def _answer(self, server: Server, starts: int) -> None:
        """Send requests to ``server``, one after the other, until none is left or it fails."""
        try:
            while (index := self._take(server)) is not None:
                try:
                    completion = server.answer(self.requests[index], self.params)
                except ServerDown as error:
                    self._give_back(server, index)
                    self._events.put(_Down(server, starts, str(error)))
                    return
                if completion.finish == "paused" and not self._paused.is_set():
                    if self._over.is_set():
                        return
                    raise RuntimeError(f"{server.name} aborted request {index}; its log is {server.log}")
                self._events.put((index, completion))
        finally:
            with self._lock:
                self._busy[server.index] -= 1

    def _take(self, server: Server) -> int | None:
        """The next request for ``server``, from its own share or from the end of the longest."""
        with self._lock:
            own = self._shares[server.index]
            if own:
                return own.popleft()
            longest = max(self._shares, key=len)
            return longest.pop() if longest else None

    def _give_back(self, server: Server, index: int) -> None:
        with self._lock:
            if self._paused.is_set():
                self._events.put((index, NOT_BEGUN))
            elif not self._over.is_set():
                self._shares[server.index].appendleft(index)
                self.repeated += 1

    def _watch(self, server: Server, starts: int) -> None:
        """Report a server whose process lives but whose scheduler hangs."""
        while not self._over.wait(CHECK_INTERVAL) and server.starts == starts and server.alive:
            try:
                server.state(timeout=_patience(server))
            except ServerDown as error:
                self._events.put(_Down(server, starts, str(error)))
                return

    def _restart(self, server: Server) -> None:
        try:
            self._start(server)
        except UserError as error:
            self._restarting.discard(server.index)
            self._events.put(_Down(server, server.starts, str(error)))
        else:
            self._events.put(_Up(server))


def _patience(server: Server) -> float:
    return PATIENCE if server.has_answered else FIRST_PATIENCE
