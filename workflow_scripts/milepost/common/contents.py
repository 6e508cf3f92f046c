"""Digests of the parts of a result that later stages read: results with equal digests are interchangeable."""

import hashlib
import json
from typing import Any

WEIGHTS = ".distcp"  # torch_dist's tensors; its other files contain a random number per save
# Where a data set comes from; its content counts instead.
PLACES = ("repo", "revision", "folder", "problems", "file", "subset", "split")


def content_of(manifest: dict[str, Any]) -> str:
    """A digest of the parts of a result that later stages read, given its manifest as JSON.

    For conversions and trainings only the tensors count; for data sets also the settings that turn rows into prompts;
    for evaluations also the scores.
    """
    kind, facts = manifest["kind"], manifest["facts"]
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    more: Any = None
    if kind in ("convert", "train"):
        files = {name.rpartition("/")[2]: sha for name, sha in files.items() if name.endswith(WEIGHTS)}
    elif kind == "evaluate":
        more = facts
    elif "rows" in facts:
        settings = manifest["provenance"]["config"]["dataset"]
        # A setting that is not used (none, false, empty) counts no more than one that an earlier version did not know.
        more = {key: value for key, value in settings.items() if key not in PLACES and value}
    return hashlib.sha256(json.dumps([files, more], sort_keys=True).encode()).hexdigest()[:16]
