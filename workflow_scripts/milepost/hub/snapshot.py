"""Snapshots: select the files that are needed, check them against their digests and link them into one folder."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm

from milepost.checkpoints.headers import INDEX, read_index, weight_files
from milepost.checkpoints.inspection import CONFIG, Inspection, require_files
from milepost.common.errors import UserError, is_disk_full
from milepost.common.files import atomic_path, sha256_of_all
from milepost.configuration.schema import Dataset
from milepost.hub.client import Listing, RemoteFile, Repository, cached, resolve
from milepost.problems.selection import CARD, as_regex, files_in_folder, select_files

# Files to take besides the weights: never a pickle, never code.
SIDE_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "LICENSE*"]
INDICES = ["*.bin.index.json", "*.safetensors.index.json"]  # the model's own index is taken with its weights
CHUNK = 8 * 2**20  # bytes read at a time


@dataclass(frozen=True)
class Snapshot:
    """The folder with the files, name -> ``{"bytes", "sha256"}``, and where they come from."""

    root: Path
    files: dict[str, dict[str, Any]]
    facts: dict[str, str]


@contextmanager
def _files_explained() -> Iterator[None]:
    """Turn a file or folder that can't be read or written into a one-line error."""
    try:
        yield
    except OSError as error:
        if error.filename is None or is_disk_full(error):
            raise
        raise UserError(f"{error.filename}: {error.strerror}: check who may read and write it") from None


@_files_explained()
def model_from_hub(repo: str, revision: str, hub: Path, inspection: Inspection) -> Snapshot:
    """Fetch a model's files at ``revision`` and link them below ``hub``; a `UserError` if they are of no use.

    What config.json and the index tell is known before the weights are fetched.
    """
    listing = resolve(Repository("model", repo), revision)
    source = str(listing.repository)
    require_files(source, listing.files)
    heads = listing.only(name for name in (CONFIG, INDEX) if name in listing.files)
    folder = cached(heads)
    check(folder, heads.files, source)
    inspection.check_description(folder, source)
    snapshot = _from_hub(listing.only(_model_files(source, listing.files, folder)), revision, hub)
    inspection.check_headers(snapshot.root)
    return snapshot


@_files_explained()
def dataset_from_hub(name: str, settings: Dataset, hub: Path) -> Snapshot:
    """Fetch the files of the data set ``name`` at its revision and link them below ``hub``."""
    listing = resolve(Repository("dataset", settings.repo), settings.revision)
    files = select_files(RepositoryFiles(listing), settings, str(listing.repository), name)
    return _from_hub(listing.only(files), settings.revision, hub)


class RepositoryFiles:
    """A repository's files, as `select_files` asks for them."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def matching(self, pattern: str) -> list[str]:
        if pattern in self._listing.files:
            return [pattern]
        return list(filter(as_regex(pattern).fullmatch, self._listing.files))

    def files(self) -> list[str]:
        return list(self._listing.files)

    def card(self) -> str:
        if CARD not in self._listing.files:
            return ""
        return (cached(self._listing.only([CARD])) / CARD).read_text(encoding="utf-8", errors="replace")


def _from_hub(listing: Listing, revision: str, hub: Path) -> Snapshot:
    repository = listing.repository
    folder = cached(listing)
    entries = check(folder, listing.files, str(repository))
    root = hub / f"{repository.name.replace('/', '--')}@{listing.commit}"
    link(folder, root, listing.files)
    return Snapshot(root, entries, {"repo": repository.name, "revision": revision, "commit": listing.commit})


@_files_explained()
def model_from_folder(folder: Path, name: str, hub: Path, inspection: Inspection) -> Snapshot:
    """Link the model files of a local ``folder`` into ``hub/name@digest``."""
    folder = folder.expanduser()
    names = _names(folder)
    inspection.check_folder(folder)
    return _from_folder(folder, _model_files(str(folder), names, folder), name, hub, link)


@_files_explained()
def dataset_from_folder(name: str, settings: Dataset, hub: Path) -> Snapshot:
    """Copy a data set's files into ``hub/name@digest``; copies, so that editing the originals doesn't change them."""
    folder = Path(settings.folder).expanduser()
    return _from_folder(folder, files_in_folder(folder, settings, name), name, hub, copy)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: check the source's folder in the configuration")
    found = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return [file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts)]


def _from_folder(
    folder: Path, names: list[str], name: str, hub: Path, bring: Callable[[Path, Path, Iterable[str]], None]
) -> Snapshot:
    entries = check(folder, {file: RemoteFile((folder / file).stat().st_size, "") for file in names}, str(folder))
    root = hub / f"{name}@{sha256_of_all(entries)[:12]}"
    bring(folder, root, names)
    return Snapshot(root, entries, {"folder": str(folder)})


def _model_files(source: str, names: Collection[str], folder: Path) -> list[str]:
    """The files to take of a model, sorted: its weights (`weight_files`) and the files that describe them.

    Others, such as a training's checkpoints in subfolders, are not taken.
    """
    weights = set(weight_files(names, read_index(folder / INDEX) if INDEX in names else None))
    if missing := sorted(weights - set(names)):
        raise UserError(f"{source}: {INDEX} names {missing[0]}, which is missing: complete the source")
    side_files = {name for name in names if _matches(name, SIDE_FILES) and not _matches(name, INDICES)}
    return sorted(weights | side_files | ({INDEX} & set(names)))


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a pattern matches; as in the Hub's client, ``*`` also matches ``/``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check(folder: Path, files: dict[str, RemoteFile], source: str) -> dict[str, dict[str, Any]]:
    """Compare the digest of each of ``files`` in ``folder`` with its source's; return name -> ``{"bytes", "sha256"}``.

    A file that differs is removed, so that the next run fetches it again, and raises a `UserError`.
    """
    total = sum(file.bytes for file in files.values())
    with (
        tqdm(desc="checking", total=total, unit="B", unit_scale=True, mininterval=1, delay=2) as progress,
        ThreadPoolExecutor(4) as workers,
    ):
        digests = list(workers.map(lambda name: _digest(folder / name, progress), files))
    damaged, advice = [], "removed from the cache: run again; if it happens again, the source is damaged"
    for (name, file), (sha256, git_blob) in zip(files.items(), digests, strict=True):
        if file.digest and file.digest not in (sha256, git_blob):
            damaged.append(f"{name}: digest {sha256 if len(file.digest) == 64 else git_blob}, not {file.digest}")
            try:
                _remove(folder / name)
            except OSError as error:
                advice = f"remove it from the cache ({error.strerror} here), and run again"
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise UserError(f"{source}: {damaged[0]}{more}: {advice}")
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, (sha256, _) in zip(files, digests, strict=True)
    }


def _digest(path: Path, progress: tqdm) -> tuple[str, str]:
    """The sha256 of a file, and its id as a git blob (the sha1 of "blob", its size and its content)."""
    sha256, git_blob = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    is_small = path.stat().st_size < 64 * 2**20  # larger ones are never plain git blobs
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            if is_small:
                git_blob.update(chunk)
            progress.update(len(chunk))
    return sha256.hexdigest(), git_blob.hexdigest()


def _remove(path: Path) -> None:
    """Remove a cached file: the link, the blob it points to, and that blob's target if it is a link too."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def link(source: Path, root: Path, names: Iterable[str]) -> None:
    """Link ``names`` of ``source`` into ``root``: hard links on the same disk, symbolic links otherwise."""
    for name in names:
        content, here = (source / name).resolve(), root / name
        if here.exists() and here.samefile(content):
            continue
        here.parent.mkdir(parents=True, exist_ok=True)
        fresh = here.with_name(f".{here.name}.{os.getpid()}.partial")
        fresh.unlink(missing_ok=True)
        try:
            os.link(content, fresh)
        except OSError:  # another disk, or one without hard links
            fresh.symlink_to(content)
        fresh.replace(here)


def copy(source: Path, root: Path, names: Iterable[str]) -> None:
    """Copy ``names`` of ``source`` into ``root``, replacing existing files, which may be damaged."""
    for name in names:
        with atomic_path(root / name) as partial:
            shutil.copyfile(source / name, partial)
