"""What is asked of the Hub, through its own client: tried again where that helps, explained in one line where not."""

import contextlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import NoReturn

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects, logging
from tqdm import tqdm

from common.errors import UserError, is_disk_full
from common.files import atomic_write, free_bytes, in_mib

WAITS = (1, 2, 4, 8, 16, 30)  # seconds before each further try
LONGEST_WAIT = 600  # seconds; a server that asks for more is given up
WORKERS = 8
PICKLES = [
    f"*.{ending}{index}" for ending in ("bin", "pt", "pth", "pkl", "pickle", "ckpt") for index in ("", ".index.json")
]
STALE = 3600  # seconds since the last byte after which a partial file has no writer any more
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)

# The client warns with addresses, some of them signed; what matters is said here, without them.
logging.set_verbosity_error()


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file: its size in bytes and its digest, a sha256 (64 digits) or a git blob id (40)."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub; ``kind`` is ``model`` or ``dataset``."""

    kind: str
    name: str

    @property
    def cache(self) -> Path:
        """Its folder in the user's Hub cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: Repository
    commit: str
    files: dict[str, RemoteFile]


def resolve(repository: Repository, revision: str) -> Listing:
    """Resolve ``revision`` (branch, tag or commit) to a commit, and list what it holds.

    The commit is remembered in the cache, so that an offline run resolves the same name to it.
    """
    info = persistently(
        lambda: HfApi().repo_info(
            repository.name, repo_type=repository.kind, revision=revision, files_metadata=True, timeout=30
        ),
        repository,
        f"revision {revision}",
    )
    if revision != info.sha:
        atomic_write(repository.cache / "refs" / revision, info.sha)
    files = {}
    for file in info.siblings:
        if file.rfilename.startswith("/") or ".." in file.rfilename.split("/"):
            raise UserError(f"{repository}: holds a file named {file.rfilename!r}: not a name to write to")
        files[file.rfilename] = (
            RemoteFile(file.lfs.size, file.lfs.sha256) if file.lfs else RemoteFile(file.size, file.blob_id)
        )
    return Listing(repository, info.sha, files)


def resolve_offline(repository: Repository, revision: str, patterns: list[str]) -> Listing:
    """The same from the user's cache alone, of the files that match ``patterns``.

    The cache names a blob by the digest that the Hub gave for it, so even offline the content can be checked.
    """
    try:
        folder = Path(
            snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=PICKLES,
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repository} at {revision}: HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} does not hold"
            " all of it: run once without HF_HUB_OFFLINE, or bring the cache of a machine that did"
        ) from None
    except HFValidationError as error:
        _explain(error, repository, revision)
    files = {}
    for file in folder.rglob("*"):
        if file.is_file():
            digest = file.readlink().name if file.is_symlink() else ""
            files[file.relative_to(folder).as_posix()] = RemoteFile(file.stat().st_size, digest)
    return Listing(repository, folder.name, files)


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """The ``names`` that match a pattern and are no pickle, as the Hub's client matches (a star crosses folders)."""
    return sorted(filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=PICKLES))


def fetch(listing: Listing, patterns: list[str]) -> None:
    """Bring the files of ``listing`` into the user's cache, after checking that the disk has room for them."""
    repository, commit = listing.repository, listing.commit
    blobs = repository.cache / "blobs"
    _remove_stale(blobs)
    missing = {name: file for name, file in listing.files.items() if not (blobs / file.digest).exists()}
    needed = sum(file.bytes for file in missing.values())
    _require_space(repository, needed)
    with (
        tqdm(
            desc=repository.name, total=needed, unit="B", unit_scale=True, mininterval=1, disable=not needed
        ) as progress,
        ThreadPoolExecutor(WORKERS) as workers,
    ):
        # Files that are cached under another commit still need their name under this one.
        tasks = [workers.submit(_fetch_file, repository, commit, name, progress) for name in listing.files]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    # Nothing is left to fetch: this keeps the commit's listing, by which an offline run knows that nothing is missing.
    persistently(
        lambda: snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=commit,
            allow_patterns=patterns,
            ignore_patterns=PICKLES,
            tqdm_class=partial(tqdm, disable=True),
        ),
        repository,
        "its listing",
    )


def _fetch_file(repository: Repository, commit: str, name: str, progress: tqdm) -> None:
    """Fetch one file into the cache, counting its bytes on ``progress``; each try counts afresh."""

    def attempt() -> None:
        counter = _counter(progress)
        try:
            hf_hub_download(
                repository.name, name, repo_type=repository.kind, revision=commit, tqdm_class=counter, etag_timeout=30
            )
        except BaseException:
            progress.update(-counter.counted)
            raise

    persistently(attempt, repository, name)


def _counter(progress: tqdm) -> type:
    """A class that the client takes for a file's progress bar, and that feeds the one bar of the download.

    It has `update_transfer` because that tells the client that one bar is enough: the bytes that reach the disk.
    """

    class Counter:
        counted = 0

        def __init__(self, **settings) -> None:
            pass

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *exception) -> None:
            pass

        def update(self, count: int) -> None:
            Counter.counted += count
            progress.update(count)

        def update_transfer(self, count: int) -> None:
            pass

        def set_postfix_str(self, text: str, refresh: bool = True) -> None:
            pass

        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
            pass

        def close(self) -> None:
            pass

    return Counter


def _require_space(repository: Repository, needed: int) -> None:
    """Refuse a download that the cache's disk cannot hold, before its first byte."""
    cache = Path(constants.HF_HUB_CACHE)
    free = free_bytes(cache)
    if needed > free:
        raise UserError(
            f"{repository}: {in_mib(needed)} to download and {in_mib(free)} free in {cache}:"
            " make room, or set HF_HOME to a folder on a larger disk"
        )


def _remove_stale(blobs: Path) -> None:
    """Remove the partial files of killed downloads: the client names them anew each time and never returns to one."""
    for file in blobs.glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > STALE:
                file.unlink()


def persistently[Result](call: Callable[[], Result], repository: Repository, what: str) -> Result:
    """Call until it succeeds, waiting longer each time (or as long as the server asks); then give up in one line."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
            fault = _origin(error)
            asked = _asked_wait(fault)
            if wait is None or asked > LONGEST_WAIT or not _is_transient(fault):
                _explain(fault, repository, what)
            wait = max(wait, asked)
            tqdm.write(f"{repository}: {what}: {_brief(fault)}: again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _origin(error: Exception) -> Exception:
    """The fault behind the client's "not in the cache either"."""
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer that was refused; None where there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _asked_wait(error: Exception) -> int:
    """The seconds that the server asked to wait for, or 0."""
    asked = error.response.headers.get("Retry-After", "") if _status(error) else ""
    return int(asked) if asked.isdigit() else 0


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: the connection or the server failed, not the request."""
    if _status(error):
        return _status(error) in TRANSIENT_STATUSES
    if isinstance(error, httpx.TransportError):
        return not isinstance(error, httpx.ProxyError | httpx.UnsupportedProtocol | httpx.LocalProtocolError)
    if isinstance(error, OfflineModeIsEnabled) or is_disk_full(error):
        return False
    # The rest are the client's own: a file of the wrong length, or the Xet service's connection.
    return isinstance(error, ConnectionError | TimeoutError | RuntimeError) or "Consistency check" in str(error)


def _brief(error: Exception) -> str:
    """An error in a few words, without addresses."""
    if _status(error):
        return f"the Hub answers {_status(error)}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _explain(error: Exception, repository: Repository, what: str) -> NoReturn:
    """Raise the `UserError` for a fault that no further try will mend; one of this program is raised as it is."""
    page = f"{constants.ENDPOINT}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
    cache = constants.HF_HUB_CACHE
    status = _status(error)
    if isinstance(error, GatedRepoError) or status == 403:
        message = (
            f"{repository}: access is gated: accept its licence at {page} with your account, and set HF_TOKEN"
            " to a token of that account"
        )
    elif isinstance(error, RevisionNotFoundError):
        message = f"{repository}: {what} is not a branch, tag or commit there: see {page}/tree/main"
    elif isinstance(error, RemoteEntryNotFoundError):
        message = f"{repository}: {what} is not there at this commit: see {page}/tree/main"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        message = (
            f"{repository}: no such repository at {constants.ENDPOINT}: check its name;"
            " if it is private, set HF_TOKEN to a token that may read it"
        )
    elif status == 401:
        message = f"{repository}: the Hub refuses the token: check HF_TOKEN, or unset it for a public repository"
    elif isinstance(error, HFValidationError):
        message = f"{repository}: not the name of a repository: it reads owner/name"
    elif isinstance(error, httpx.LocalProtocolError | UnicodeError):  # its text may hold the token
        message = "HF_TOKEN holds a character that no token has: set it again, or unset it for a public repository"
    elif isinstance(error, FileMetadataError | JSONDecodeError | httpx.UnsupportedProtocol):
        message = f"{constants.ENDPOINT} does not answer as a Hub does: check HF_ENDPOINT and the proxy"
    elif is_disk_full(error):
        message = f"{repository}: {what}: no space left in {cache}: make room and run again, or set HF_HOME elsewhere"
    elif status == 429 or (status and status >= 500):
        message = f"{repository}: {what}: {_brief(error)} again and again: run again later; whole files are kept"
    elif _is_transient(error) or isinstance(error, httpx.ProxyError):
        message = (
            f"{repository}: {what}: no answer from {constants.ENDPOINT} ({_brief(error)}): check the network and run"
            " again (whole files are kept), or set HF_HUB_OFFLINE=1 to use what the cache holds"
        )
    elif isinstance(error, PermissionError) and error.filename:
        message = f"{error.filename}: not writable: set HF_HOME to a folder that is"
    elif status:
        message = f"{repository}: {what}: {_brief(error)}: see {page}"
    else:
        raise error
    raise UserError(message) from None
