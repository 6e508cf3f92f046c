"""Snapshots: select the files that are needed, check them against their digests and link them into one folder."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm

from milepost.common.errors import UserError, is_disk_full
from milepost.common.files import atomic_path, read_json, sha256_of_all
from milepost.hub.client import Listing, RemoteFile, Repository, cached, resolve

# Files to take besides the weights: never a pickle, never code.
SIDE_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "LICENSE*"]
PICKLES = [f"*.{ending}" for ending in ("bin", "pt", "pth", "pkl", "pickle", "ckpt")]
INDICES = ["*.bin.index.json", "*.safetensors.index.json"]  # the model's own index is taken with its weights
WEIGHTS = ".safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CHUNK = 8 * 2**20  # bytes read at a time

Inspect = Callable[[Path], None]  # raises if the folder's config.json is not the expected model's


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
def model_from_hub(repo: str, revision: str, hub: Path, inspect: Inspect | None = None) -> Snapshot:
    """Fetch a model's files at ``revision`` and link them below ``hub``; a `UserError` if it has only pickles.

    ``inspect`` is called with the folder of config.json before the weights are fetched.
    """
    listing = resolve(Repository("model", repo), revision)
    source = str(listing.repository)
    _require_model(source, listing.files)
    heads = listing.only(name for name in (CONFIG, INDEX) if name in listing.files)
    folder = cached(heads)
    check(folder, heads.files, source)
    if inspect:
        inspect(folder)
    return _from_hub(listing.only(_model_files(source, listing.files, folder)), revision, hub)


@_files_explained()
def dataset_from_hub(repo: str, revision: str, file: str, hub: Path) -> Snapshot:
    """Fetch the one ``file`` of a dataset at ``revision`` and link it below ``hub``."""
    listing = resolve(Repository("dataset", repo), revision)
    _require_file(str(listing.repository), listing.files, file)
    return _from_hub(listing.only([file]), revision, hub)


def _from_hub(listing: Listing, revision: str, hub: Path) -> Snapshot:
    repository = listing.repository
    folder = cached(listing)
    entries = check(folder, listing.files, str(repository))
    root = hub / f"{repository.name.replace('/', '--')}@{listing.commit}"
    link(folder, root, listing.files)
    return Snapshot(root, entries, {"repo": repository.name, "revision": revision, "commit": listing.commit})


@_files_explained()
def model_from_folder(folder: Path, name: str, hub: Path, inspect: Inspect | None = None) -> Snapshot:
    """Link the model files of a local ``folder`` into ``hub/name@digest``."""
    folder = folder.expanduser()
    names = _names(folder)
    _require_model(str(folder), names)
    if inspect:
        inspect(folder)
    return _from_folder(folder, _model_files(str(folder), names, folder), name, hub, link)


@_files_explained()
def dataset_from_folder(folder: Path, file: str, name: str, hub: Path) -> Snapshot:
    """Copy a dataset's ``file`` into ``hub/name@digest``; a copy, so that editing the original doesn't change it."""
    folder = folder.expanduser()
    _require_file(str(folder), _names(folder), file)
    return _from_folder(folder, [file], name, hub, copy)


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


def _require_file(source: str, names: Iterable[str], file: str) -> None:
    if file not in names:
        raise UserError(f"{source}: holds no file {file}: check the dataset's file in the configuration")


def _require_model(source: str, names: Iterable[str]) -> None:
    """Refuse (`UserError`) a source without a config.json, or without weights as safetensors."""
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if not any("/" not in name for name in weights):
        pickles = sorted(name for name in names if _matches(name, PICKLES))
        if weights:
            raise UserError(
                f"{source}: holds {WEIGHTS} files only in subfolders ({min(weights)}): the weights belong next to"
                f" {CONFIG}; name a source that is that subfolder"
            )
        if pickles:
            raise UserError(
                f"{source}: its weights are pickles only ({pickles[0]}), which are never loaded:"
                f" choose one with {WEIGHTS} files"
            )
        raise UserError(f"{source}: holds no {WEIGHTS} file: name a source with a model's weights")
    if CONFIG not in names:
        raise UserError(f"{source}: holds no {CONFIG}: name a source with a model in the Hub's format")


def _model_files(source: str, names: Iterable[str], folder: Path) -> list[str]:
    """The files to take of a model, sorted: its weights and the files that describe them.

    The weights are those that the index (in ``folder``) names or, without an index, those in the top folder. Others,
    such as a training's checkpoints in subfolders, are not taken.
    """
    if INDEX in names:
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{source}: {INDEX} holds no weight_map: the source is damaged; repair or replace it")
        weights = {INDEX, *map(str, weight_map.values())}
        if missing := sorted(weights - set(names)):
            raise UserError(f"{source}: {INDEX} names {missing[0]}, which is missing: complete the source")
    else:
        weights = {name for name in names if name.endswith(WEIGHTS) and "/" not in name}
    side_files = {name for name in names if _matches(name, SIDE_FILES) and not _matches(name, INDICES)}
    return sorted(weights | side_files)


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
