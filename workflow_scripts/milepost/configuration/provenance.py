"""Decide whether a result is fresh, from what it depends on, and tell Snakemake.

Snakemake reruns a job when the value of one of its params changes. Each rule has one param for that, `Provenance.key`.
While a result is fresh, the param keeps the value that the result was made with, even if something irrelevant changed.
So the decision is made here, by comparing the result's manifest with what would be made today.

A result is fresh if its settings, its code and the versions of its packages are the same, its inputs have the same
content, and its files are there. Inputs count by content alone: if a download is made again and gives the same files,
everything made from them stays fresh.
"""

import functools
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from milepost.common import versions
from milepost.common.contents import content_of
from milepost.common.errors import UserError
from milepost.common.files import read_json
from milepost.configuration import runs, scoring, staleness
from milepost.configuration.code import code_digest, digest
from milepost.configuration.loading import Configuration
from milepost.configuration.new_keys import with_new_keys
from milepost.configuration.schema import Engine, Evaluation, Section
from milepost.configuration.stages import Stages, engine_file
from milepost.configuration.weights import BEST, checkpoint_of, run_of

DRAWN_AGAIN = "its samples are drawn again"
# Where the manifest of each result lies in the results folder.
MANIFESTS = {
    "dataset": "data/{name}.json",
    "download": "{model}/download.json",
    "convert": "{model}/convert.json",
    "train": "{model}/grpo/{run}/train.json",
    "export": "{model}/hf/{weights}.json",
    "evaluate": "{model}/eval/{dataset}/{weights}.json",
    "plots": "plots.json",
}


class State(NamedTuple):
    """Whether a result exists and is fresh.

    Attributes:
        made: its manifest, or None.
        stale: the reasons to make it again, in words.
        tolerated: changes that are not.
        damage: the reasons in ``stale`` that are missing or damaged files.
    """

    made: dict[str, Any] | None
    stale: tuple[str, ...]
    tolerated: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()

    @property
    def fresh(self) -> bool:
        return self.made is not None and not self.stale


class Provenance:
    """What each result depends on, and whether it is fresh.

    Stages, and what identifies a result of each:
    ``dataset`` (name), ``download``, ``convert`` (model), ``train`` (model, and ``run`` if it is not the
    configuration's), ``export`` (model, weights; by default those that the configuration trains), ``evaluate`` (model,
    dataset, weights), ``tables``, ``comparison``, ``plots``, ``report``, ``progress``, ``check_reward`` (none).
    """

    def __init__(self, configuration: Configuration, scripts: Path):
        self._configuration = configuration
        self._scripts = scripts
        self._stages = Stages(configuration, scripts)

    @functools.cache  # noqa: B019  one instance lives as long as the process
    def of(self, stage: str, **which: str) -> dict[str, Any]:
        """The record of one result, which is plain JSON: ``{"config", "code", "versions", "upstream"}``.

        ``upstream`` holds the paths of its inputs' manifests by name.
        """
        parts = self._stages.parts(stage, **which)
        return {
            "config": {k: v.model_dump(mode="json") if isinstance(v, Section) else v for k, v in parts.config.items()},
            "code": code_digest(self._scripts, *parts.scripts),
            "versions": versions.versions(parts.packages),
            "upstream": {name: str(self._manifest(*source) or "") for name, source in parts.upstream.items()},
        }

    @functools.cache  # noqa: B019
    def state(self, stage: str, **which: str) -> State:
        """Compare a result with what would be made today."""
        path = self._manifest(stage, which)
        made = _read(path) if path else None
        if made is None:
            return State(None, ())
        if stage == "train" and "run" in which:
            return State(made, ())  # made by other settings, which its manifest holds: it is only read
        before, now = made["provenance"], self.of(stage, **which)
        damage = tuple(staleness.missing_files(path, made))
        recorded = with_new_keys(before["config"], now["config"])
        configs = [_deciding(stage, config) for config in (recorded, now["config"])]
        changed = [*staleness.settings(*configs), *self._changed_inputs(before, stage, **which)]
        if stage == "export" and self._has_another_best(made, **which):
            changed.append("another best checkpoint")
        by = tuple(staleness.makers(before, now))
        if stage == "train" and self._on_code_change(**which) == "continue":
            return State(made, (*changed, *damage), by, damage)
        return State(made, (*changed, *damage, *by), damage=damage)

    @functools.cache  # noqa: B019
    def key(self, stage: str, **which: str) -> str:
        """The value of a rule's param; if it changes, Snakemake runs the job again."""
        state = self.state(stage, **which)
        if state.fresh:
            return state.made["provenance"]["key"]
        upstream = {name: self.key(of, **its) for name, (of, its) in self._upstream(stage, **which).items()}
        record = self.of(stage, **which)
        return digest([record | {"config": _deciding(stage, record["config"]), "upstream": upstream}, state.damage])

    def job(self, stage: str, **which: str) -> dict[str, Any]:
        """A job's input: the record, its key, the commit of the code, and what else the stage needs."""
        job = self.of(stage, **which) | {"key": self.key(stage, **which), "commit": _commit(self._scripts)}
        if stage == "train":
            job["on_code_change"] = self._on_code_change(**which)
        elif stage == "dataset":
            job["every_row"] = which["name"] in self._configuration.scored
            job["labels"] = self._configuration.labels(which["name"])
        elif stage == "download":
            job["mtp"] = self._configuration.models[which["model"]].uses_mtp
        elif stage == "evaluate":
            job["sampler"] = self._sampler(which["model"])
        return job

    def why(self, stage: str, **which: str) -> str:
        """What has changed since a result was made, for people; empty if it is fresh or was never made."""
        if (state := self.state(stage, **which)).fresh:
            return ""
        changed = staleness.few(state.stale, ", ")
        if stage == "train":
            return self._why_training(changed, **which)
        if stage == "evaluate" and state.made:
            return f"{changed}; {self._of_samples(state.made['provenance'], **which)}"
        return changed

    def run(self, model: str, on_code_change: str | None = None) -> Path | None:
        """The folder of the run that a training would continue, with its inputs as they are; None if it begins one."""
        states = {name: self.state(of, **its) for name, (of, its) in self._upstream("train", model=model).items()}
        job = self.of("train", model=model) | {
            "inputs": {name: content_of(state.made) for name, state in states.items() if state.made},
            "on_code_change": on_code_change or self._on_code_change(model),
        }
        return runs.find(self._manifest("train", {"model": model}).parent, job)

    def training(self, model: str, run: str) -> State:
        """The state of a run: of the configuration's, or of another one, which is fresh if it is finished."""
        stage, which = self._stages.training(model, run)
        return self.state(stage, **which)

    def _why_training(self, changed: str, model: str) -> str:
        """What has changed, whether the run goes on, and if that depends on the code, how to choose otherwise."""
        if run := self.run(model):
            goes_on = f"the run goes on after {runs.rollouts(run)} rollouts"
            last = runs.made_by(run)[-1]
            if by := staleness.makers(last, self.of("train", model=model)):
                goes_on += f", made by {last['commit'] or last['code']} ({staleness.few(by, ', ')})"
                goes_on += "; training.on_code_change: new would begin another"
            return "; ".join(filter(None, [changed, goes_on]))
        if not changed:
            return ""
        hint = "; training.on_code_change: continue would go on" if self.run(model, "continue") else ""
        return f"{changed}; a new run begins, and the old one stays{hint}"

    def _sampler(self, model: str) -> dict[str, Any]:
        settings = self._configuration.models[model]
        code = code_digest(self._scripts, "milepost/evaluation/sampling.py", engine_file(settings.engine.kind))
        return sampler(settings.evaluation, settings.engine, code, versions.versions(versions.SAMPLING))

    def _of_samples(self, before: dict[str, Any], model: str, **which: str) -> str:
        """Whether an evaluation that is made again keeps its samples."""
        if before.get("sampler") != self._sampler(model):
            return DRAWN_AGAIN
        others, again = self._other_inputs(before, "evaluate", model=model, **which)
        if {*others} - {"dataset"}:
            return DRAWN_AGAIN
        unknown = ["weights"] if {*again} - {"dataset"} else []
        unknown += ["prompts"] if "dataset" in (*others, *again) else []
        kept = "its samples are kept"
        return f"{kept} if the {' and the '.join(unknown)} stay the same" if unknown else kept

    def _on_code_change(self, model: str) -> str:
        return self._configuration.models[model].training.on_code_change

    def _other_inputs(self, before: dict[str, Any], stage: str, **which: str) -> tuple[list[str], list[str]]:
        """The names of the inputs whose content has changed since, and of those that are to be made again."""
        others, again = [], []
        upstream = self._upstream(stage, **which)
        for name, (of, its) in upstream.items():
            state = self.state(of, **its)
            if not state.fresh:
                again.append(name)
            elif content_of(state.made) != before["inputs"].get(name):
                others.append(name)
        return [*others, *(name for name in before["inputs"] if name not in upstream)], again

    def _changed_inputs(self, before: dict[str, Any], stage: str, **which: str) -> list[str]:
        """The inputs that have changed since a result was made, in words."""
        others, again = self._other_inputs(before, stage, **which)
        return [
            *([f"another result of {staleness.few(others, ' and ')}"] if others else []),
            *([f"{staleness.few(again, ' and ')} made again"] if again else []),
        ]

    def _has_another_best(self, made: dict[str, Any], model: str, weights: str | None = None) -> bool:
        """Whether a run's best checkpoint is no longer the one that was exported, as after another validation."""
        weights = weights or self._configuration.trained(model)
        if checkpoint_of(weights) != BEST:
            return False
        train = self.training(model, run_of(weights)).made or {"facts": {}}
        return made["facts"].get("checkpoint") != (train["facts"].get("best") or {}).get("checkpoint")

    def _upstream(self, stage: str, **which: str) -> dict[str, tuple[str, dict[str, str]]]:
        return self._stages.parts(stage, **which).upstream

    def _manifest(self, stage: str, which: dict[str, str]) -> Path | None:
        if stage not in MANIFESTS:
            return None
        names = {"run": self._configuration.run}
        if stage == "export":
            names["weights"] = self._configuration.trained(which["model"])
        return Path(self._configuration.results, MANIFESTS[stage].format(**names | which))


def _deciding(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record that decide whether its result is stale."""
    return scoring.deciding(config) if stage == "evaluate" else config


def sampler(evaluation: Evaluation, engine: Engine, code: str, packages: dict[str, str]) -> dict[str, Any]:
    """What decides an evaluation's samples besides weights and prompts: samples are kept until it changes."""
    return {
        "protocol": evaluation.protocol,
        "engine": engine.model_dump(mode="json", include={"kind", "speculation", "server_arguments"}),
        "code": code,
        "versions": packages,
    }


@functools.cache
def _read(path: Path) -> dict[str, Any] | None:
    """A manifest of this pipeline; None for anything else, which the job that reads it reports."""
    try:
        made = read_json(path)
        return made if {"key", "inputs", "versions"} <= made["provenance"].keys() else None
    except (UserError, AttributeError, KeyError, TypeError, OSError):
        return None


@functools.cache
def _commit(folder: Path) -> str | None:
    """The commit that is checked out, followed by + if files differ from it; None outside of git."""
    try:
        git = ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
