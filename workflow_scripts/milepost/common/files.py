"""Atomic file writes, digests and locks: a file is either complete or absent."""

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from milepost.common.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success, sync it and rename it to ``path``.

    On an exception the temporary file is removed and ``path`` stays unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path | str, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or invalid one is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: make or download it again, or correct the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): make or download it again") from None


def allow_open_files(count: int = 65536) -> None:
    """Raise this process's limit of open files and connections to ``count`` or its maximum; shells often set 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, as fsync does for a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(value: Any) -> bytes:
    """One line of readable JSON; lone surrogates, which UTF-8 can't encode, are escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def require_room(folder: Path | str, needed: int) -> None:
    """Raise a `UserError` if there is no room for ``needed`` bytes below ``folder``."""
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{Path(folder).absolute()}: needs {in_mib(needed)}, only {in_mib(free)} are free: make room and run again"
        )


def free_bytes(folder: Path | str) -> int:
    """Free space on the disk of ``folder``, which need not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if os.path.exists(place))).free


def in_mib(number: int) -> str:
    """A number of bytes in readable form."""
    return f"{number / 2**20:,.1f} MiB"


def sha256_of(path: Path | str) -> str:
    """The hexadecimal sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The hexadecimal sha256 of a set of files' names and contents: name -> ``{"sha256", ...}``."""
    lines = "".join(f"{entry['sha256']} {name}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


@contextlib.contextmanager
def hold(result: Path | str) -> Iterator[None]:
    """Hold an exclusive lock on ``result``, a file or a folder; if another process has it, name that and wait.

    The kernel releases the lock when the process ends, so a killed process never leaves it behind.
    """
    result = Path(result)
    result.parent.mkdir(parents=True, exist_ok=True)
    with result.with_name(f".{result.name}.lock").open("a+") as lock:
        if holder := try_lock(lock):
            print(f"{result}: {holder} is working on it: waiting for it to finish", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
            _sign(lock)
        yield


def try_lock(lock: IO[str]) -> str:
    """Lock and sign a file opened with "a+" until it is closed; return who holds it already, or "" on success."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return lock.read().strip() or "another process"
    _sign(lock)
    return ""


def _sign(lock: IO[str]) -> None:
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
