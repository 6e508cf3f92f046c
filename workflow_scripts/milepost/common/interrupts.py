"""SIGTERM and Ctrl-C: end at a place from which the run goes on as if nothing had happened."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

ECHO_SECONDS = 3.0


class Interrupted(Exception):
    """Raised out of work that can be thrown away, because the process was asked to end."""


class Interrupts:
    """Turns the first request to end into a flag, or into `Interrupted` within `abandonable` work.

    A later second Ctrl-C ends the process as usual (the first may come twice: from the terminal and from torchrun). A
    context manager; the old handlers return with its end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._abandonable = False

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """What a shell gives for a process that a signal ended."""
        return 128 + (self.signal or 0)

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Mark work whose results may be lost: a request, also an earlier one, raises `Interrupted` in it at once."""
        self._abandonable = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._abandonable = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Mark a part of abandonable work that must not be left in its middle: `Interrupted` waits for its end."""
        abandonable, self._abandonable = self._abandonable, False
        try:
            yield
        finally:
            self._abandonable = abandonable
        if abandonable and self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and time.monotonic() - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.signal, self._since = number, time.monotonic()
        if self._abandonable:
            raise Interrupted
