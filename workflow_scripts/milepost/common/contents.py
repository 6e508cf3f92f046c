"""What of a result later stages read: two results of the same content serve them alike."""

import hashlib
import json
from typing import Any

WEIGHTS = ".distcp"  # torch_dist's tensors; the files beside them hold a random number of each save
PLACES = ("repo", "revision", "folder", "problems")  # where a data set is from says nothing of what it holds


def content_of(manifest: dict[str, Any]) -> str:
    """A digest of what later stages read of a result, given its manifest as JSON.

    A conversion's or a training's is of its tensors alone, a data set's is also of how prompts are made of its rows, an
    evaluation's also of its scores.
    """
    kind, facts = manifest["kind"], manifest["facts"]
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    more: Any = None
    if kind in ("convert", "train"):
        files = {name.rpartition("/")[2]: sha for name, sha in files.items() if name.endswith(WEIGHTS)}
    elif kind == "evaluate":
        more = facts
    elif "prompt_key" in facts:
        settings = manifest["provenance"]["config"]["dataset"]
        more = {key: value for key, value in settings.items() if key not in PLACES}
    return hashlib.sha256(json.dumps([files, more], sort_keys=True).encode()).hexdigest()[:16]
