"""A training's runs: which one goes on and which begins, and who has worked on it.

A run's folder is told by what decides its numbers: its settings (`CONTINUES` are those that may change on the way), the
content of its starting weights, its tokenizer and its prompts, and, where ``training.on_code_change`` is ``new``, its
code and the versions of its packages. ``run.json`` in the folder says all of it, with every code that has worked on it.
"""

import re
from pathlib import Path
from typing import Any

from milepost.common.errors import UserError
from milepost.common.files import read_json, write_json
from milepost.configuration import staleness
from milepost.configuration.code import digest

# A longer run, other checkpoints to keep or another look at progress continue the same training. So does less memory:
# whoever lowers it after it ran out wants the rollouts that there are.
CONTINUES = {
    "training": {
        *("rollouts", "save_interval", "keep_checkpoints", "max_bad_steps", "wandb_project"),
        *("max_tokens_per_gpu", "recompute", "log_prob_chunk"),
    },
    "engine": {"mem_fraction_static", "max_running_requests", "cuda_graph_batch_sizes"},
    "reward": {"retries", "processes", "memory_gib", "max_error_share", "correct_from"},
    "validation": None,
    "validation_reward": None,
    "validation_reward_code": None,
}
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
FILE = "run.json"


def find(runs: Path, job: dict[str, Any]) -> Path | None:
    """The folder below ``runs`` that a training of ``job`` goes on in, the furthest of several; None if it begins."""
    same = [folder for folder in runs.glob("*") if _goes_on(folder, job)]
    return max(same, key=lambda folder: (rollouts(folder), folder.stat().st_mtime), default=None)


def open_run(runs: Path, job: dict[str, Any]) -> Path:
    """The folder of a training of ``job``, new or found; this job's code is noted as one that worked on it."""
    found = find(runs, job)
    maker = {name: job[name] for name in ("commit", "code", "versions")}
    if found is None:
        folder = runs / digest([identity(job), maker["code"], maker["versions"]])
        write_json(folder / FILE, {**identity(job), "made_by": [{"from_rollout": 1, **maker}]})
        return folder
    run = read_json(found / FILE)
    if any(run["made_by"][-1][name] != maker[name] for name in maker):
        run["made_by"].append({"from_rollout": rollouts(found) + 1, **maker})
        write_json(found / FILE, run)
    return found


def made_by(folder: Path) -> list[dict[str, Any]]:
    """Who has worked on a run: ``{"from_rollout", "commit", "code", "versions"}`` each, in their order."""
    return read_json(folder / FILE)["made_by"] if (folder / FILE).exists() else []


def identity(job: dict[str, Any]) -> dict[str, Any]:
    """What a run must share with a job to be its: the settings that decide its numbers, and what it began with."""
    return {
        "config": {
            section: {key: value for key, value in content.items() if key not in (CONTINUES.get(section) or ())}
            for section, content in job["config"].items()
            if CONTINUES.get(section, ()) is not None
        },
        "inputs": {name: content for name, content in job["inputs"].items() if name != "validation"},
    }


def rollouts(folder: Path) -> int:
    """How many rollouts the newest checkpoint of a run has."""
    return max((int(found[1]) for path in folder.glob("*") if (found := CHECKPOINT.fullmatch(path.name))), default=0)


def _goes_on(folder: Path, job: dict[str, Any]) -> bool:
    try:
        run = read_json(folder / FILE)
        last = run["made_by"][-1]
        same = {name: run[name] for name in ("config", "inputs")} == identity(job)
        return same and (job["on_code_change"] == "continue" or not staleness.makers(last, job))
    except (UserError, KeyError, TypeError, OSError):
        return False  # no run of this version of the pipeline
