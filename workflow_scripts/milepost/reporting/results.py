"""Read scores and trainings from their manifests; a manifest's path says which model and weights it is about."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from milepost.checkpoints.manifest import Manifest, read_manifest
from milepost.common.errors import UserError
from milepost.configuration import staleness
from milepost.configuration.rewards import Reward
from milepost.evaluation.estimators import PairedDifference, paired_difference

BASE = "base"


@dataclass(frozen=True)
class Score:
    """One evaluation: ``results/{model}/eval/{dataset}/{weights}.json``, with ``weights`` the base or a run's name."""

    model: str
    dataset: str
    weights: str
    manifest: Manifest

    @property
    def is_base(self) -> bool:
        return self.weights == BASE

    @property
    def facts(self) -> dict[str, Any]:
        """The evaluation's results; see `evaluation.scores.scores` for the keys."""
        return self.manifest.facts

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings of the evaluation."""
        return self.manifest.provenance["config"]["evaluation"]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the average; NaN for a single problem."""
        return tuple(self.facts["interval"] or (np.nan, np.nan))

    def problem_means(self) -> np.ndarray:
        """The mean reward of each problem's samples, (P,)."""
        return np.array([problem["rewards"] for problem in self.facts["per_problem"]], dtype=float).mean(axis=1)

    @property
    def is_share(self) -> bool:
        """Whether its rewards are 0 or 1, so that their mean is a share."""
        return _reward(self.manifest).is_share

    def read_samples(self, wanted: set[tuple[int, int]]) -> list[dict[str, Any]]:
        """The samples of the given ``(problem, sample)`` indices, with the grader's verdicts."""
        file = self.manifest.require(digests=True).root / next(iter(self.manifest.files))
        found = []
        for row in _json_lines(file):
            problem, sample = row.get("problem"), row.get("sample")
            if (problem, sample) in wanted:
                facts = self.facts["per_problem"][problem]
                found.append(
                    row
                    | {"label": facts["label"], "correct": facts["correct"][sample]}
                    | {"reward": facts["rewards"][sample]}
                    | {"answer": facts["answers"][sample], "reason": facts["reasons"][sample]}
                )
        return found


@dataclass(frozen=True)
class Pair:
    """The base and the trained weights of one model on one problem set."""

    base: Score
    trained: Score

    def difference(self) -> PairedDifference:
        """Trained minus base over the same problems, bootstrapped with the evaluation's seed."""
        protocol = self.trained.protocol
        means = self.base.problem_means(), self.trained.problem_means()
        bounds = (-1.0, 1.0) if self.trained.is_share else (-np.inf, np.inf)
        return paired_difference(*means, protocol["bootstrap_samples"], protocol["seed"], bounds=bounds)

    def made_by_others(self) -> list[str]:
        """How the code or package versions of the two scores differ, in words."""
        base, trained = self.base.manifest.provenance, self.trained.manifest.provenance
        return staleness.makers(base, trained)


@dataclass(frozen=True)
class Training:
    """One training: ``results/{model}/grpo/{run}/train.json``.

    ``metrics`` has one row per rollout (its index); row 0 is the validation of the starting weights.
    """

    model: str
    run: str
    manifest: Manifest
    metrics: pd.DataFrame

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the training, by section."""
        return self.manifest.provenance["config"]

    @property
    def is_share(self) -> bool:
        """Whether its rewards are 0 or 1, so that their mean is a share."""
        return _reward(self.manifest).is_share

    @property
    def correct_from(self) -> float:
        """The reward from which a sample is correct."""
        return _reward(self.manifest).correct_from

    def column(self, name: str) -> pd.Series:
        """One metric of the rollouts that have it; empty if none has."""
        return self.metrics[name].dropna() if name in self.metrics else pd.Series(dtype=float)

    def read_samples(self, last: int) -> list[dict[str, Any]]:
        """The saved samples of the ``last`` rollouts."""
        rows: list[dict[str, Any]] = []  # never all at once: a run of days has gigabytes
        for row in _json_lines(self.manifest.root / self.manifest.facts["samples"]):
            if rows and row["rollout"] != rows[-1]["rollout"]:
                rows = [kept for kept in rows if kept["rollout"] > row["rollout"] - last]
            rows.append(row)
        return rows


def read_scores(paths: Iterable[Path]) -> list[Score]:
    """Read evaluations, in the given order."""
    return [
        Score(path.parts[-4], path.parts[-2], path.stem, _read(path, "evaluate")) for path in map(Path.absolute, paths)
    ]


def read_trainings(paths: Iterable[Path]) -> list[Training]:
    """Read trainings with their metrics."""
    trainings = []
    for path in map(Path.absolute, paths):
        manifest = _read(path, "train")
        rows = pd.DataFrame(_json_lines(manifest.root / manifest.facts["metrics"]))
        # A rollout and the validation after it are two log lines but one row here; of two validations the last counts.
        metrics = rows.groupby("rollout").last() if len(rows) else rows
        trainings.append(Training(path.parts[-4], path.parts[-2], manifest, metrics))
    return trainings


def pairs(scores: Iterable[Score]) -> list[Pair]:
    """Pair every trained score with the base's of the same model and problem set, if there is one.

    Scores that were not measured in the same way can't be compared: a `UserError` says what differs.
    """
    scores = list(scores)
    bases = {(score.model, score.dataset): score for score in scores if score.is_base}
    found = [
        Pair(bases[score.model, score.dataset], score)
        for score in scores
        if not score.is_base and (score.model, score.dataset) in bases
    ]
    for pair in found:
        base, trained = _measured_by(pair.base), _measured_by(pair.trained)
        if differing := [name for name in base if base[name] != trained[name]]:
            raise UserError(
                f"{pair.trained.manifest.path}: made with another {' and '.join(differing)} than"
                f" {pair.base.manifest.path}: delete both and run again"
            )
    return found


def _measured_by(score: Score) -> dict[str, Any]:
    """What must be equal in two comparable scores: protocol, engine, grader and problems."""
    config = score.manifest.provenance["config"]
    return {
        **{f"{section} section": config.get(section) for section in ("evaluation", "engine", "reward")},
        "reward function": config.get("reward_code"),
        "set of prompts": score.facts.get("prompts"),
        "set of labels": [problem["label"] for problem in score.facts["per_problem"]],
    }


def _reward(manifest: Manifest) -> Reward:
    """What a result's responses were graded by."""
    return Reward.model_validate(manifest.provenance["config"].get("reward") or {})


def _read(path: Path, kind: str) -> Manifest:
    manifest = read_manifest(path)
    if manifest.kind != kind:
        raise UserError(f"{path}: a manifest of kind {manifest.kind!r}, not {kind!r}: delete it and run again")
    return manifest


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON-lines file, up to a line that a killed process left incomplete."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    return
    except FileNotFoundError:
        raise UserError(f"{path}: missing: run the step that writes it again") from None
