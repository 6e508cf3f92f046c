"""The runs of a training: find the one to continue or begin a new one, and record which code made which rollouts.

A run is identified by what decides its numbers: its settings (except `CONTINUES`, which may change on the way), the
content of its starting weights, tokenizer and prompts, and, with ``training.on_code_change: new``, its code and the
versions of its packages. ``run.json`` in the run's folder holds all of that.
"""

import re
from pathlib import Path
from typing import Any

from milepost.common.errors import UserError
from milepost.common.files import read_json, write_json
from milepost.configuration import staleness
from milepost.configuration.code import digest
from milepost.configuration.new_keys import with_new_keys
from milepost.configuration.weights import BEST, LAST

# A change of these settings continues a run: its length, checkpoints, validation, logs, and what only saves memory.
# After an out-of-memory error nobody wants to lose the rollouts so far.
CONTINUES = {
    "training": {
        *("rollouts", "save_interval", "keep_checkpoints", "max_bad_steps", "wandb_project", "save_rollouts"),
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
ROLLOUTS = "rollouts"  # in a run's folder, those that it saved


def find(runs: Path, job: dict[str, Any]) -> Path | None:
    """The folder below ``runs`` of the run that ``job`` continues, the longest of several; None if it begins one."""
    same = [folder for folder in runs.glob("*") if _goes_on(folder, job)]
    return max(same, key=lambda folder: (rollouts(folder), folder.stat().st_mtime), default=None)


def open_run(runs: Path, job: dict[str, Any]) -> Path:
    """The folder of the run that ``job`` continues or begins. Records this job's code in its ``run.json``."""
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


def saved_rollouts(folder: Path, count: int) -> list[Path]:
    """The files of the first ``count`` rollouts that a run may have saved."""
    return [folder / ROLLOUTS / f"{number:06d}.safetensors" for number in range(1, count + 1)]


def made_by(folder: Path) -> list[dict[str, Any]]:
    """Which code made which rollouts of a run, in order: ``{"from_rollout", "commit", "code", "versions"}`` each."""
    return read_json(folder / FILE)["made_by"] if (folder / FILE).exists() else []


def identity(job: dict[str, Any]) -> dict[str, Any]:
    """What a run and a job must have in common for the job to continue it: settings that decide numbers, and inputs."""
    return {
        "config": {
            section: _deciding(section, content)
            for section, content in job["config"].items()
            if CONTINUES.get(section, ()) is not None
        },
        "inputs": {name: content for name, content in job["inputs"].items() if name != "validation"},
    }


def _deciding(section: str, content: Any) -> Any:
    """The settings of a section that decide numbers; all of what is no section, such as a digest."""
    if section == "reward_of":
        return {dataset: _deciding("reward", reward) for dataset, reward in content.items()}
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if key not in CONTINUES.get(section, ())}


def rollouts(folder: Path) -> int:
    """The number of rollouts in the newest checkpoint of a run."""
    return max((int(found[1]) for path in folder.glob("*") if (found := CHECKPOINT.fullmatch(path.name))), default=0)


def checkpoint_name(run: Path, facts: dict[str, Any], checkpoint: str) -> str:
    """The folder of a finished run's checkpoint.

    Args:
        run: the run's folder.
        facts: of the training's manifest.
        checkpoint: ``last``, ``best`` or the number of rollouts (`weights.checkpoint_of`).
    """
    if checkpoint == LAST:
        return facts["weights"].partition("/")[0]
    best = (facts.get("best") or {}).get("checkpoint")
    if checkpoint == BEST and best is None:
        raise UserError(f"{run}: has no best checkpoint, since none was validated: export the last")
    name = best if checkpoint == BEST else f"checkpoint-{checkpoint}"
    if not (run / name / "manifest.json").is_file():
        kept = sorted(path.name for path in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name))
        raise UserError(
            f"{run}: has no {name}, only {', '.join(kept)}: name one of these;"
            " a training with a higher training.keep_checkpoints keeps more"
        )
    return name


def require_same_start(manifest: Path, provenance: dict[str, Any], download: str | None) -> None:
    """Refuse (`UserError`) weights of a ``manifest`` that was made from another download than the one of this digest.

    The tokenizer and the vision tower of an export are the download's.
    """
    then = provenance.get("inputs", {}).get("download")
    if then and download and then != download:
        raise UserError(
            f"{manifest}: made from other starting weights than the model's source has now: set the source back to"
            " those, or train again"
        )


def _goes_on(folder: Path, job: dict[str, Any]) -> bool:
    try:
        run = read_json(folder / FILE)
        last, wanted = run["made_by"][-1], identity(job)
        same = run["inputs"] == wanted["inputs"] and with_new_keys(run["config"], wanted["config"]) == wanted["config"]
        return same and (job["on_code_change"] == "continue" or not staleness.makers(last, job))
    except (UserError, KeyError, TypeError, OSError):
        return False  # not a run, or one of another version of the pipeline
