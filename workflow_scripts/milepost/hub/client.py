"""Hub requests, through the Hub's own client: retried when transient, otherwise a one-line error."""

import contextlib
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError, OIDCError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import logging
from tqdm import tqdm

from milepost.common.errors import UserError
from milepost.common.files import atomic_write, free_bytes, in_mib
from milepost.hub import environment
from milepost.hub.faults import explain, hub_address, with_retries

WORKERS = 8
SHOWN = 2**20  # bytes from which a download shows a progress bar
STALE = 3600  # seconds without a new byte after which a partial file counts as abandoned

# The client's warnings contain signed addresses; this package reports what matters, without them.
logging.set_verbosity_error()


@dataclass(frozen=True)
class RemoteFile:
    """The Hub's metadata of a file: size in bytes and digest, a sha256 (64 digits) or a git blob id (40 digits)."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.

    Attributes:
        kind: ``model`` or ``dataset``.
        licence: the one that its card names, once it is known.
    """

    kind: str
    name: str
    licence: str | None = None

    @property
    def cache(self) -> Path:
        """Its folder in the user's Hub cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    @property
    def page(self) -> str:
        """The address of its web page."""
        return f"{hub_address()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: Repository
    commit: str
    files: dict[str, RemoteFile]

    def only(self, names: Iterable[str]) -> "Listing":
        """This listing, limited to ``names``."""
        return replace(self, files={name: self.files[name] for name in names})


def resolve(repository: Repository, revision: str) -> Listing:
    """Resolve ``revision`` (branch, tag or commit) to a commit and list its files; when offline, from the cache.

    The cache remembers the commit, so that an offline run resolves the same name to it.
    """
    environment.require_cache(Path(constants.HF_HUB_CACHE))
    if constants.is_offline_mode():
        return _resolve_offline(repository, revision)
    environment.require_usable(constants.ENDPOINT)
    _require_token()
    not_a_hub = (
        f"{hub_address()} does not list commits, sizes and digests as a Hub does: check HF_ENDPOINT and the proxy"
    )
    try:
        info = with_retries(
            lambda: HfApi().repo_info(
                repository.name, repo_type=repository.kind, revision=revision, files_metadata=True, timeout=30
            ),
            repository,
            f"revision {revision}",
        )
    except (AttributeError, LookupError, TypeError):  # JSON of the wrong form
        raise UserError(not_a_hub) from None
    files = {}
    for file in info.siblings or ():
        if file.rfilename.startswith("/") or ".." in file.rfilename.split("/"):
            raise UserError(
                f"{repository}: holds a file named {file.rfilename!r}, not safe to write: use another repository"
            )
        files[file.rfilename] = (
            RemoteFile(file.lfs.size, file.lfs.sha256) if file.lfs else RemoteFile(file.size, file.blob_id)
        )
    if not info.sha or any(file.bytes is None or not file.digest for file in files.values()):
        raise UserError(not_a_hub)
    if revision != info.sha:
        with contextlib.suppress(OSError):  # a cache that is read-only or full may already hold all files
            atomic_write(repository.cache / "refs" / revision, info.sha)
    licence = getattr(info.card_data, "license", None)
    return Listing(replace(repository, licence=str(licence) if licence else None), info.sha, files)


def _require_token() -> None:
    """Raise a `UserError` for a token that can't be read or obtained; having none is fine."""
    try:
        get_token()
    except (OIDCError, httpx.HTTPError) as error:
        raise UserError(f"HF_OIDC_RESOURCE is set but yields no token ({error}): correct it, or unset it") from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(
            f"the token file {constants.HF_TOKEN_PATH} can't be read ({reason}): correct it, or set HF_TOKEN"
        ) from None


def _resolve_offline(repository: Repository, revision: str) -> Listing:
    """`resolve`, from the user's cache only.

    The cache keeps the listing of a commit that was downloaded completely. If there is none, as in a cache of an older
    client, list the files that are there; the cache names a file's blob by the Hub's digest of it.
    """
    query = {"repo_type": repository.kind, "revision": revision}
    try:
        folder = Path(snapshot_download(repository.name, **query, allow_patterns=[], local_files_only=True))
        tree = get_cached_repo_tree(repository.name, **query)
        files = {file.path: RemoteFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in tree}
    except LocalEntryNotFoundError:
        raise _lacking(repository, f"revision {revision}") from None
    except CachedRepoTreeNotFoundError:
        files = {
            file.relative_to(folder).as_posix(): RemoteFile(
                file.stat().st_size, file.readlink().name if file.is_symlink() else ""
            )
            for file in folder.rglob("*")
            if file.is_file()
        }
    except HFValidationError as error:
        explain(error, repository, revision)
    return Listing(repository, folder.name, files)


def _lacking(repository: Repository, what: str) -> UserError:
    return UserError(
        f"{repository}: {what}: {environment.offline_variable()} is set and the cache {constants.HF_HUB_CACHE} does not"
        f" hold all of it: run once without {environment.offline_variable()}, or copy the cache of a machine that did"
    )


def cached(listing: Listing) -> Path:
    """Return the folder in the user's cache with the files of ``listing``; fetch missing files unless offline.

    Checks beforehand that the disk has room for them.
    """
    repository, commit = listing.repository, listing.commit
    folder = repository.cache / "snapshots" / commit
    if constants.is_offline_mode():
        for name in listing.files:
            if not (folder / name).is_file():
                raise _lacking(repository, name)
        return folder
    blobs = repository.cache / "blobs"
    _remove_stale(blobs)
    missing = {name: file for name, file in listing.files.items() if not (blobs / file.digest).exists()}
    needed = sum(file.bytes for file in missing.values())
    _require_space(repository, needed)
    with (
        tqdm(
            desc=repository.name, total=needed, unit="B", unit_scale=True, mininterval=1, disable=needed < SHOWN
        ) as progress,
        ThreadPoolExecutor(WORKERS) as workers,
    ):
        # Files cached under another commit still need a link under this one.
        tasks = [workers.submit(_fetch_file, repository, commit, name, progress) for name in listing.files]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    # This fetches no file; it stores the commit's listing for offline runs.
    with_retries(
        lambda: snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=commit,
            allow_patterns=[],
            tqdm_class=partial(tqdm, disable=True),
        ),
        repository,
        "its listing",
    )
    return folder


def _fetch_file(repository: Repository, commit: str, name: str, progress: tqdm) -> None:
    """Fetch one file into the cache and count its bytes on ``progress``; a retry starts counting again."""

    def attempt() -> None:
        counter = _counter(progress)
        try:
            hf_hub_download(
                repository.name, name, repo_type=repository.kind, revision=commit, tqdm_class=counter, etag_timeout=30
            )
        except BaseException:
            progress.update(-counter.counted)
            raise

    with_retries(attempt, repository, name)


def _counter(progress: tqdm) -> type:
    """Return a class that the client uses as a file's progress bar and that updates the download's single bar.

    The client recognizes by `update_transfer` that one bar, of the bytes that reach the disk, is enough.
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
    """Raise a `UserError` if the cache's disk can't hold the download, before its first byte."""
    cache = Path(constants.HF_HUB_CACHE)
    free = free_bytes(cache)
    if needed > free:
        raise UserError(
            f"{repository}: {in_mib(needed)} to download, but only {in_mib(free)} free in {cache}:"
            f" make room, or set {environment.cache_variable()} to a folder on a larger disk"
        )


def _remove_stale(blobs: Path) -> None:
    """Remove partial files of killed downloads: the client uses a new name every time and never resumes one.

    Ages are measured by the disk's clock, which may be another machine's.
    """
    for file in blobs.glob("*.incomplete"):
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=blobs) as now:
            if Path(now.name).stat().st_mtime - file.stat().st_mtime > STALE:
                file.unlink()
