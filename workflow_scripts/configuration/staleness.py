"""Why a result is stale, in the few words that stand in a job's message: a dry run is read by people."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json

LISTED = 4  # changes; of more the number is told
WIDTH = 32  # characters of a value
NOT_THERE = object()
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def changes(manifest: Path, now: dict[str, Any]) -> str:
    """What differs between the provenance that the result of ``manifest`` was made with and the one of ``now``.

    ``training.rollouts: 60 -> 200, its code``; empty where nothing does, or where there is no result.
    """
    try:
        before = read_json(manifest)["provenance"]
        found = [*_values("", before["config"], now["config"])]
        if before["code"] != now["code"]:
            found.append("its code")
        then, today = before["upstream"], now["upstream"]
        upstream = [name for name in {**then, **today} if then.get(name) != today.get(name)]
    except (UserError, AttributeError, KeyError, TypeError):
        return ""  # nothing is there, or no manifest: whoever reads it says so
    if upstream:
        found.append(f"another result of {_few(upstream, ' and ')}")
    return _few(found, ", ")


def of_training(manifest: Path, now: dict[str, Any], work: Path) -> str:
    """`changes` of a training, and whether it goes on in its work folder or begins anew."""
    changed = changes(manifest, now)
    if done := max((int(found[1]) for path in work.glob("*") if (found := CHECKPOINT.fullmatch(path.name))), default=0):
        enough = done <= now["config"]["training"]["rollouts"]
        goes_on = "the run goes on" if enough else f"the run has {done} rollouts: ask for at least as many"
        return "; ".join(filter(None, [changed, goes_on]))
    return f"{changed}; a new run begins, and the old one stays" if changed else ""


def _values(key: str, before: Any, now: Any) -> Iterator[str]:
    """The settings that differ, by their keys in the configuration."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _values(f"{key}.{name}".lstrip("."), before.get(name, NOT_THERE), now.get(name, NOT_THERE))
    elif before != now:
        yield f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is NOT_THERE else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _few(texts: list[str], separator: str) -> str:
    shown = texts if len(texts) <= LISTED else [*texts[: LISTED - 1], f"{len(texts) - LISTED + 1} more"]
    return separator.join(shown)
