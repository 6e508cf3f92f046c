"""Manifests: a small JSON file, written last, that lists a folder's files with their sizes and digests.

A manifest is a rule's declared output; the folder that it describes is not. Consumers check sizes before they read
(`require`), and digests where a flipped bit would hurt (``digests=True``).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.common.errors import UserError
from milepost.common.files import read_json, sha256_of, write_json
from milepost.common.versions import versions


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest file.

    Attributes:
        path: the manifest itself.
        kind: the stage that wrote it: ``download``, ``convert``, ``train`` ...
        root: the folder that ``files`` are relative to.
        files: relative name -> ``{"bytes": int, "sha256": str}``.
        facts: further information for later stages (plain JSON).
        provenance: the job's settings, code and inputs (`common.jobs.read_job`).
        versions: of the installed packages (`common.versions`).
    """

    path: Path
    kind: str
    root: Path
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def require(self, digests: bool = False) -> "Manifest":
        """Raise a `UserError` unless every file exists with its size (and, with ``digests``, its sha256)."""
        for name, entry in self.files.items():
            file = self.root / name
            if not file.is_file():
                raise UserError(f"{file}: missing, though {self.path} lists it: delete that manifest and run again")
            if file.stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes, {self.path} says {entry['bytes']}: delete both and run again"
                )
        if digests:
            files = [self.root / name for name in self.files]
            for file, entry, digest in zip(files, self.files.values(), in_threads(sha256_of, files), strict=True):
                if digest != entry["sha256"]:
                    raise UserError(
                        f"{file}: its sha256 is not the one in {self.path}: it is damaged; delete both and run again"
                    )
        return self


def write_manifest(
    path: Path | str,
    kind: str,
    root: Path | str,
    files: list[str] | dict[str, dict[str, Any]],
    provenance: dict[str, Any],
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Write the manifest of ``files`` below ``root``; if these are only names, compute their sizes and digests."""
    path, root = Path(path), Path(root)
    entries = files
    if not isinstance(files, dict):
        names = sorted(files)
        entries = dict(zip(names, in_threads(describe, [root / name for name in names]), strict=True))
    write_json(
        path,
        {
            "kind": kind,
            "root": os.path.relpath(root, path.parent),
            "files": entries,
            "facts": facts or {},
            "versions": versions(),
            "provenance": provenance,
        },
    )
    return read_manifest(path)


def read_manifest(path: Path | str) -> Manifest:
    """Read a manifest; any other file is a `UserError`."""
    path, content = Path(path), read_json(path)
    try:
        return Manifest(
            path=path,
            kind=content["kind"],
            root=path.parent / content["root"],
            files=content["files"],
            facts=content["facts"],
            provenance=content["provenance"],
            versions=content["versions"],
        )
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a manifest: delete it and run again") from None


def describe(file: Path) -> dict[str, Any]:
    """A file's entry in a manifest: its size in bytes and its sha256."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def in_threads(measure: Callable[[Path], Any], files: list[Path]) -> list[Any]:
    """Call ``measure`` on each file, in threads: one digest keeps only one core busy."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(measure, files))


def same_result(
    folder: Path, job: dict[str, Any], parts: tuple[str, ...] = ("config", "code", "versions", "inputs")
) -> Manifest | None:
    """The kept manifest of ``folder`` if its files are intact and its job had the same ``parts``; else None.

    Snakemake deletes a rule's output before its job runs, so `keep_manifest` leaves a copy next to the folder.
    """
    try:
        kept = read_manifest(_kept(folder)).require()
    except UserError:
        return None
    same = all(part in job and kept.provenance.get(part) == job[part] for part in parts)
    return kept if same else None


def rewrite_manifest(kept: Manifest, path: Path | str, job: dict[str, Any]) -> None:
    """Write the manifest of a `same_result` again, as the output of ``job``."""
    write_manifest(path, kept.kind, kept.root, kept.files, job, kept.facts)


def keep_manifest(manifest: Manifest) -> None:
    """Copy a manifest to where `same_result` finds it."""
    write_json(_kept(manifest.root), read_json(manifest.path))


def _kept(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.json")
