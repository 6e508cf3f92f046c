"""Handle SIGTERM and Ctrl-C: stop at a point from which the run can resume as if nothing had happened."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

ECHO_SECONDS = 3.0


class Interrupted(Exception):
    """Raised within work that may be discarded, when the process is asked to end."""


class Interrupts:
    """A context manager that turns the first signal into a flag, or into `Interrupted` within `abandonable` work.

    A second Ctrl-C more than `ECHO_SECONDS` later ends the process as usual (the first may arrive twice: from the
    terminal and from torchrun). The previous handlers are restored at exit.
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
        """The exit status that shells report for a process killed by this signal."""
        return 128 + (self.signal or 0)

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Mark work whose results may be lost: a signal, even an earlier one, raises `Interrupted` in it at once."""
        self._abandonable = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._abandonable = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Mark a section of abandonable work that must complete: `Interrupted` is delayed to its end."""
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
