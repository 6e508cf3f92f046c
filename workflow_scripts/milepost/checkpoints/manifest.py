"""Manifests: one small JSON file, written last, that vouches for a folder of large ones.

A rule's declared output is a manifest; the folder that it names hangs off it. Consumers check sizes before they
read (`require`), and digests where a flipped bit would hurt (``digests=True``).
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
    """What a manifest file says.

    Attributes:
        path: the manifest itself.
        kind: the stage that made it: ``download``, ``convert``, ``train`` ...
        root: the folder that ``files`` are relative to.
        files: relative name -> ``{"bytes": int, "sha256": str}``.
        facts: what else the stage wants to hand on (plain JSON).
        provenance: the rule's provenance param: config slice, code, upstream.
        versions: of the packages that made it (`versions`).
    """

    path: Path
    kind: str
    root: Path
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def require(self, digests: bool = False) -> "Manifest":
        """Check that every file is there with its size (and its sha256); the first that is not is a `UserError`."""
        for name, entry in self.files.items():
            file = self.root / name
            if not file.is_file():
                raise UserError(
                    f"{file}: missing, though {self.path} vouches for it: delete that manifest and run again"
                )
            if file.stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes, {self.path} says {entry['bytes']}: delete both and run again"
                )
        if digests:
            files = [self.root / name for name in self.files]
            for file, entry, digest in zip(files, self.files.values(), side_by_side(sha256_of, files), strict=True):
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
    """Write the manifest of ``files`` below ``root``; names without an entry are measured and digested here."""
    path, root = Path(path), Path(root)
    entries = files
    if not isinstance(files, dict):
        names = sorted(files)
        entries = dict(zip(names, side_by_side(describe, [root / name for name in names]), strict=True))
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
    """Read a manifest; a file that is not one is a `UserError`."""
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


def side_by_side(measure: Callable[[Path], Any], files: list[Path]) -> list[Any]:
    """``measure`` of each file, several at a time: a digest is bound by one core."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(measure, files))


def same_result(
    folder: Path, job: dict[str, Any], parts: tuple[str, ...] = ("config", "code", "versions", "inputs")
) -> Manifest | None:
    """The manifest of what lies in ``folder``, if it was made of the same: the same ``parts`` of the job's record.

    Snakemake deletes a rule's output before its job runs; `keep_manifest` leaves a copy beside the folder.
    """
    try:
        kept = read_manifest(_kept(folder)).require()
    except UserError:
        return None
    same = all(part in job and kept.provenance.get(part) == job[part] for part in parts)
    return kept if same else None


def vouch_again(kept: Manifest, path: Path | str, job: dict[str, Any]) -> None:
    """Write the manifest of a `same_result` for the job that would have made it again."""
    write_manifest(path, kept.kind, kept.root, kept.files, job, kept.facts)


def keep_manifest(manifest: Manifest) -> None:
    """Copy a manifest to where `same_result` finds it."""
    write_json(_kept(manifest.root), read_json(manifest.path))


def _kept(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.json")
