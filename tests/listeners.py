"""Observe which sockets the processes of a run listen on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import psutil


class Listeners:
    """Sockets that were seen listening.

    Attributes:
        loopback: "address port: command" of those that only this machine reaches.
        open: the same of all others.
    """

    def __init__(self) -> None:
        self.loopback: set[str] = set()
        self.open: set[str] = set()

    def look(self, root: psutil.Process) -> None:
        """Add the sockets that a process and its children listen on now; UDP counts, since it accepts from anyone."""
        for process in [root, *root.children(recursive=True)]:
            try:
                for socket in process.net_connections("inet"):
                    if socket.status == psutil.CONN_LISTEN or (socket.status == psutil.CONN_NONE and socket.laddr):
                        found = self.loopback if ip_address(socket.laddr.ip).is_loopback else self.open
                        found.add(f"{socket.laddr.ip} {socket.laddr.port}: {' '.join(process.cmdline())[:200]}")
            except psutil.NoSuchProcess:
                pass


@contextmanager
def listeners(pid: int | None = None, interval: float = 0.1) -> Iterator[Listeners]:
    """Watch the child processes of ``pid`` (by default this one) in a thread while the context lasts."""
    seen, over, root = Listeners(), threading.Event(), psutil.Process(pid)

    def watch() -> None:
        while not over.wait(interval):
            try:
                seen.look(root)
            except psutil.NoSuchProcess:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
