"""Choose the files of a problem set, in a local folder and in a Hub repository alike.

``file`` names them. ``subset`` and ``split`` are looked up in README.md: in most data sets on the Hub its front matter
lists the files of each subset and split. Otherwise the files are found by the usual layouts.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import yaml

from milepost.common.errors import UserError, few
from milepost.problems.file_kinds import suffix_of

CARD = "README.md"
# Where the files of a split may lie; the first pattern that matches counts. {subset} is empty or a folder.
LAYOUTS = (
    "{subset}{split}.*",
    "{subset}{split}-*",
    "{subset}{split}_*",
    "{subset}{split}/*",
    "{subset}data/{split}.*",
    "{subset}data/{split}-*",
    "{subset}data/{split}_*",
    "{subset}data/{split}/*",
    "data/{subset}{split}.*",
    "data/{subset}{split}-*",
    "data/{subset}{split}/*",
)

Subsets = dict[str, dict[str, list[str]]]  # subset -> split -> patterns of files


class FileSettings(Protocol):
    """A problem set's settings that name its files (`configuration.schema.Dataset`)."""

    file: str | list[str] | None
    subset: str | None
    split: str | None


class Place(Protocol):
    """A folder or a repository."""

    def matching(self, pattern: str) -> Iterable[str]:
        """The files that a name or a pattern with ``*``, ``?``, ``[...]`` or ``**`` stands for."""

    def files(self) -> Iterable[str]:
        """Files that an error can name."""

    def card(self) -> str:
        """The text of README.md; empty without one."""


class LocalFolder:
    """The files below a local folder, without hidden ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def matching(self, pattern: str) -> Iterator[str]:
        if _escapes(pattern):
            return
        if (self._folder / pattern).is_file():
            yield pattern
            return
        fits = as_regex(pattern).fullmatch
        for file in self._folder.glob("**/*" if "**" in pattern else pattern):
            name = file.relative_to(self._folder).as_posix()
            if fits(name) and file.is_file() and not any(part.startswith(".") for part in name.split("/")):
                yield name

    def files(self) -> Iterator[str]:
        for pattern in ("*", "*/*"):
            yield from self.matching(pattern)

    def card(self) -> str:
        file = self._folder / CARD
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def files_in_folder(folder: Path, settings: FileSettings, name: str) -> list[str]:
    """`select_files` of a local folder, which has to exist."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: correct datasets.{name}.folder")
    return select_files(LocalFolder(folder), settings, str(folder), name)


def select_files(place: Place, settings: FileSettings, source: str, name: str) -> list[str]:
    """The names of the files that hold a problem set, sorted.

    Args:
        source: the place as errors call it.
        name: the data set's name in the configuration.

    Raises:
        UserError: nothing fits, or what is named leaves open which files are meant; the error lists what there is.
    """
    if settings.file is not None:
        patterns = [settings.file] if isinstance(settings.file, str) else settings.file
        found = {pattern: list(place.matching(pattern)) for pattern in patterns}
        for pattern, files in found.items():
            if not files:
                raise UserError(f"{source}: holds no file {pattern}{_others(place)}: correct datasets.{name}.file")
        return sorted({file for files in found.values() for file in files})
    subsets, default = _read_card(place.card())
    if subsets:
        return _files_in_card(place, subsets, settings.subset or default, settings.split, source, name)
    return _files_by_layout(place, settings, source, name)


def _files_in_card(
    place: Place, subsets: Subsets, subset: str | None, split: str | None, source: str, name: str
) -> list[str]:
    """The files that README.md lists for a subset and a split."""
    splits = subsets.get(subset or "", {})
    split = split or next((one for one in splits if len(splits) == 1), None)
    if split not in splits:
        if not splits:
            wanted = f"no subset {subset}" if subset else "several subsets"
        else:
            wanted = f"no split {split}" if split else "several splits"
        known = [f"subset {one} with {', '.join(its)}" for one, its in subsets.items()]
        raise UserError(f"{source}: {wanted}: {CARD} lists {few(known, '; ')}: set subset and split of datasets.{name}")
    files = sorted({file for pattern in splits[split] for file in place.matching(pattern) if suffix_of(file)})
    if not files:
        raise UserError(
            f"{source}: {CARD} lists {', '.join(splits[split])} for the split {split}, and no file fits"
            f"{_others(place)}: name the file with datasets.{name}.file"
        )
    return files


def _files_by_layout(place: Place, settings: FileSettings, source: str, name: str) -> list[str]:
    """The files of a subset and a split in one of the usual layouts; without either, the only data file."""
    subset = f"{settings.subset}/" if settings.subset else ""
    if settings.split:
        patterns = [layout.format(subset=subset, split=settings.split) for layout in LAYOUTS]
        wanted = f" of the split {settings.split}" + (f" and the subset {settings.subset}" if subset else "")
    else:
        patterns = [f"{subset}*", *([f"{settings.subset}.*"] if subset else ["data/*"])]
        wanted = f" of the subset {settings.subset}" if subset else ""
    for pattern in patterns:
        files = sorted(file for file in place.matching(pattern) if suffix_of(file))
        if len({suffix_of(file) for file in files}) > 1 or (len(files) > 1 and not settings.split):
            raise UserError(f"{source}: {few(files)} all fit: name what to read with datasets.{name}.file")
        if files:
            return files
    raise UserError(
        f"{source}: no data file{wanted}{_others(place)}: correct datasets.{name}, or name the file with `file`"
    )


def _read_card(card: str) -> tuple[Subsets, str | None]:
    """The subsets that the front matter of a README.md lists, and the default one; empty if it lists none."""
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        metadata = None
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    subsets: Subsets = {}
    marked = None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict) and (splits := _splits(config)):
            subset = str(config.get("config_name"))
            subsets[subset] = splits
            marked = subset if config.get("default") else marked
    if marked is None:
        marked = next((one for one in subsets if one == "default" or len(subsets) == 1), None)
    return subsets, marked


def _splits(config: dict[str, Any]) -> dict[str, list[str]]:
    """Split -> patterns of files, of one entry of ``configs``; files without a split belong to train."""
    listed, folder = config.get("data_files"), config.get("data_dir")
    splits: dict[str, list[str]] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        if isinstance(entry, str):
            entry = {"split": "train", "path": entry}
        if isinstance(entry, dict) and "path" in entry:
            paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
            patterns = [f"{folder}/{path}" if folder else str(path) for path in paths]
            splits.setdefault(str(entry.get("split", "train")), []).extend(patterns)
    return splits


def as_regex(pattern: str) -> re.Pattern:
    """Compile a glob pattern of file names: ``*`` and ``?`` match within a folder, ``**`` across folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(part) or (part.replace("[!", "[^", 1) if place % 2 else re.escape(part))
            for place, part in enumerate(parts)
        )
    )


def _escapes(pattern: str) -> bool:
    """Whether a pattern is empty or points outside of the folder."""
    return not pattern or pattern.startswith("/") or ".." in pattern.split("/")


def _others(place: Place) -> str:
    """The data files that do exist, as the end of an error."""
    files = sorted(file for file in place.files() if suffix_of(file))
    return f"; there: {few(files)}" if files else "; there is no data file"
