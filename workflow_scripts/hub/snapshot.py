"""A snapshot: the files that are needed, checked against their digests and brought together in one folder."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_path, read_json, sha256_of_all
from hub.client import PICKLES, Listing, RemoteFile, Repository, fetch, matching, resolve, resolve_offline

# Weights as safetensors, and what reads them: never a pickle, never code.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "LICENSE*"]
CONFIG = "config.json"
CHUNK = 8 * 2**20  # bytes read at a time

Inspect = Callable[[Path], None]  # raises where the config.json in a folder is not that of the model that is wanted


@dataclass(frozen=True)
class Snapshot:
    """The files in their place: the folder, name -> ``{"bytes", "sha256"}``, and where they are from."""

    root: Path
    files: dict[str, dict[str, Any]]
    facts: dict[str, str]


def model_from_hub(repo: str, revision: str, hub: Path, inspect: Inspect | None = None) -> Snapshot:
    """Fetch a model's files at ``revision`` and link them below ``hub``; a `UserError` if it has only pickles.

    ``inspect`` is asked once config.json is there, before the weights are fetched.
    """
    return _from_hub(Repository("model", repo), revision, MODEL_FILES, hub, inspect)


def dataset_from_hub(repo: str, revision: str, file: str, hub: Path) -> Snapshot:
    """Fetch the one ``file`` of a dataset at ``revision`` and link it below ``hub``."""
    return _from_hub(Repository("dataset", repo), revision, [file], hub)


def model_from_folder(folder: Path, name: str, hub: Path, inspect: Inspect | None = None) -> Snapshot:
    """Link a model's files in a local ``folder`` below ``hub``, in a folder named ``name`` and after their digests."""
    return _from_folder(folder, MODEL_FILES, name, hub, link, inspect)


def dataset_from_folder(folder: Path, file: str, name: str, hub: Path) -> Snapshot:
    """The same of a dataset's one ``file``, copied: it is small, and who edits it in place must not edit the copy."""
    return _from_folder(folder, [file], name, hub, copy)


def _from_folder(
    folder: Path,
    patterns: list[str],
    name: str,
    hub: Path,
    bring: Callable[[Path, Path, list[str]], None],
    inspect: Inspect | None = None,
) -> Snapshot:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: it is the source's folder in the configuration")
    found = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    visible = [file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts)]
    wanted = _wanted(str(folder), visible, patterns)
    if inspect:
        inspect(folder)
    entries = check(folder, {file: RemoteFile((folder / file).stat().st_size, "") for file in wanted}, str(folder))
    root = hub / f"{name}@{sha256_of_all(entries)[:12]}"
    bring(folder, root, wanted)
    return Snapshot(root, entries, {"folder": str(folder)})


def _from_hub(
    repository: Repository, revision: str, patterns: list[str], hub: Path, inspect: Inspect | None = None
) -> Snapshot:
    if constants.is_offline_mode():
        listing = resolve_offline(repository, revision, patterns)
    else:
        listing = resolve(repository, revision)
    wanted = _wanted(str(repository), list(listing.files), patterns)
    if inspect:
        inspect(_cache(replace(listing, files={CONFIG: listing.files[CONFIG]}), [CONFIG])[0])
    cached, entries = _cache(replace(listing, files={name: listing.files[name] for name in wanted}), patterns)
    root = hub / f"{repository.name.replace('/', '--')}@{listing.commit}"
    link(cached, root, wanted)
    return Snapshot(root, entries, {"repo": repository.name, "revision": revision, "commit": listing.commit})


def _cache(listing: Listing, patterns: list[str]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Have all files of ``listing`` in the user's cache: the folder there, and what `check` says of them."""
    if not constants.is_offline_mode():
        fetch(listing, patterns)
    folder = listing.repository.cache / "snapshots" / listing.commit
    return folder, check(folder, listing.files, str(listing.repository))


def _wanted(source: str, names: list[str], patterns: list[str]) -> list[str]:
    """The names to take, sorted; a source that lacks what a reader needs is a `UserError`."""
    found = matching(names, patterns)
    if patterns is not MODEL_FILES:
        if not found:
            raise UserError(f"{source}: holds no file {patterns[0]}: check the dataset's file in the configuration")
        return found
    if not any(name.endswith(".safetensors") for name in found):
        pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
        if pickles:
            raise UserError(
                f"{source}: its weights are pickles only ({pickles[0]}), which are never loaded:"
                " choose one with .safetensors files"
            )
        raise UserError(f"{source}: holds no .safetensors file: it is not a model's weights")
    if CONFIG not in found:
        raise UserError(f"{source}: holds no {CONFIG}: it is not a model in the Hub's format")
    return found


def check(folder: Path, files: dict[str, RemoteFile], source: str) -> dict[str, dict[str, Any]]:
    """Digest each of ``files`` in ``folder`` and compare with what its source says of it.

    Returns name -> ``{"bytes", "sha256"}``. A file that differs is removed, so that the next run fetches it again,
    and is a `UserError`. Weights that the index names and the folder lacks are one too.
    """
    total = sum(file.bytes for file in files.values())
    with (
        tqdm(desc="checking", total=total, unit="B", unit_scale=True, mininterval=1, delay=2) as progress,
        ThreadPoolExecutor(4) as workers,
    ):
        digests = list(workers.map(lambda name: _digest(folder / name, progress), files))
    damaged = []
    for (name, file), (sha256, git_blob) in zip(files.items(), digests, strict=True):
        if file.digest and file.digest not in (sha256, git_blob):
            damaged.append(f"{name}: digest {sha256 if len(file.digest) == 64 else git_blob}, not {file.digest}")
            _remove(folder / name)
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise UserError(
            f"{source}: {damaged[0]}{more}: removed from the cache, run again; if it stays, the source is damaged"
        )
    for index in (name for name in files if name.endswith(".safetensors.index.json")):
        for shard in sorted(set(read_json(folder / index).get("weight_map", {}).values())):
            if (Path(index).parent / shard).as_posix() not in files:
                raise UserError(f"{source}: {index} names {shard}, which is not there: the source is incomplete")
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
    """Remove a cached file: its name, the blob behind it, and whatever that is a link to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def link(source: Path, root: Path, names: list[str]) -> None:
    """Link ``names`` of ``source`` into ``root``: hard where one disk holds both, symbolic elsewhere."""
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


def copy(source: Path, root: Path, names: list[str]) -> None:
    """Copy ``names`` of ``source`` into ``root``, over what is there: it may be damaged."""
    for name in names:
        with atomic_path(root / name) as partial:
            shutil.copyfile(source / name, partial)
