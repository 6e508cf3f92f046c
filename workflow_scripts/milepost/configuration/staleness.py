"""Say in a few words what has changed since a result was made: jobs' messages show it, also in dry runs."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LISTED = 4  # changes at most; of the others only the number
WIDTH = 32  # characters of a value
MISSING, WRONG_SIZE = " is missing", " has another size"
NOT_THERE = object()


def settings(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The settings that differ, by their keys in the configuration: ``training.rollouts: 60 -> 200``."""
    return _values("", before, now)


def makers(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in the code and in the versions of packages that a result was made with."""
    found = ["its code"] if before.get("code") != now.get("code") else []
    then, today = before.get("versions", {}), now.get("versions", {})
    for name in sorted({*then, *today}):
        if then.get(name) != today.get(name):
            found.append(f"{name} {then.get(name, 'not installed')} -> {today.get(name, 'not installed')}")
    return found


def missing_files(path: Path, made: dict[str, Any]) -> list[str]:
    """The first file of a manifest that is missing or has another size, and how many more there are; or nothing."""
    root = path.parent / made["root"]
    wrong = [name for name, entry in made["files"].items() if _size(root / name) != entry["bytes"]]
    if not wrong:
        return []
    if not root.exists():
        return [f"{root}{MISSING}"]
    first = root / wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"{first}{more}{MISSING if _size(first) is None else WRONG_SIZE}"]


def few(texts: Iterable[str], separator: str) -> str:
    """The first few texts, and the number of the others."""
    texts = list(texts)
    shown = texts if len(texts) <= LISTED else [*texts[: LISTED - 1], f"{len(texts) - LISTED + 1} more"]
    return separator.join(shown)


def _values(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _values(f"{key}.{name}".lstrip("."), before.get(name, NOT_THERE), now.get(name, NOT_THERE))
    elif before != now:
        yield f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is NOT_THERE else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
