"""Read scores and trainings from their manifests; a manifest's path says which model and weights it is about."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from milepost.checkpoints.manifest import Manifest, read_manifest
from milepost.common.errors import UserError
from milepost.common.jobs import read_job
from milepost.configuration import runs, scoring, staleness
from milepost.configuration.new_keys import with_new_keys
from milepost.configuration.rewards import Reward
from milepost.configuration.weights import BASE
from milepost.evaluation.estimators import PairedDifference, paired_difference

BLOCK = 2**20  # bytes read at once from the end of a log
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Score:
    """One evaluation: ``results/{model}/eval/{dataset}/{weights}.json``, with ``weights`` the base or a run's name."""

    model: str
    dataset: str
    weights: str
    manifest: Manifest

    @property
    def name(self) -> str:
        """The scored weights: ``9B/base``, ``9B/grpo``."""
        return f"{self.model}/{self.weights}"

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
        return [row for row in _json_lines(file) if (row["problem"], row["sample"]) in wanted]


@dataclass(frozen=True)
class Pair:
    """Two scores on the same problems, above all of a model's base and trained weights."""

    first: Score
    second: Score

    @property
    def is_of_a_training(self) -> bool:
        """Whether the difference is what a training did."""
        return self.first.model == self.second.model and self.first.is_base

    @functools.cached_property  # its bootstrap takes a while
    def difference(self) -> PairedDifference:
        """Second minus first over the same problems, bootstrapped with the second evaluation's seed."""
        protocol = self.second.protocol
        means = self.first.problem_means(), self.second.problem_means()
        bounds = (-1.0, 1.0) if self.second.is_share else (-np.inf, np.inf)
        return paired_difference(*means, protocol["bootstrap_samples"], protocol["seed"], bounds=bounds)

    @functools.cached_property
    def from_cut_off(self) -> float | None:
        """How much of the difference is answers that are no longer (or newly) cut off, in units of the reward.

        Kitagawa's decomposition, problem by problem: the change of the share of complete answers, times how much more
        they earn than those cut off, as a mean of first and second. None if no share changed or none was recorded.
        """
        parts = [_complete(score) for score in (self.first, self.second)]
        if None in parts or (parts[0][0] == parts[1][0]).all():
            return None
        (share_1, whole_1, cut_1), (share_2, whole_2, cut_2) = parts
        whole_1, whole_2 = _filled(whole_1, whole_2), _filled(whole_2, whole_1)
        cut_1, cut_2 = _filled(cut_1, cut_2), _filled(cut_2, cut_1)
        return float(((share_2 - share_1) * ((whole_1 - cut_1) + (whole_2 - cut_2)) / 2).mean())

    def obstacles(self) -> list[str]:
        """Why the two can't be compared, in words: another protocol, reward, or other problems."""
        first, second = (score.manifest for score in (self.first, self.second))
        asked = [
            {
                "prompts": made.facts.get("prompts"),
                "labels": [problem["label"] for problem in made.facts["per_problem"]],
            }
            for made in (first, second)
        ]
        return [
            *staleness.settings(*self._settings(scoring.shared)),
            *(f"other {name}" for name in asked[0] if asked[0][name] != asked[1][name]),
        ]

    def notes(self) -> list[str]:
        """What else differs between the two, in sentences: code and versions, and how the engine was set."""
        first, second = (score.manifest.provenance for score in (self.first, self.second))
        settings = [*staleness.settings(*self._settings(scoring.noted))]
        made_by = staleness.makers(first, second)
        return [
            *([f"The two were scored with different code or versions ({', '.join(made_by)})."] if made_by else []),
            *([f"They were sampled with different settings ({', '.join(settings)})."] if settings else []),
        ]

    def _settings(self, part: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
        """A part of both records, neither of which lacks keys that the other's version of the pipeline added."""
        first, second = (part(score.manifest.provenance["config"]) for score in (self.first, self.second))
        return [with_new_keys(first, second), with_new_keys(second, first)]


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
        """The settings of the training, by section: as recorded, perhaps by an older version of the pipeline."""
        return self.manifest.provenance["config"]

    @property
    def is_finished(self) -> bool:
        """Whether it has a manifest of its weights; `read_unfinished` makes one without files."""
        return bool(self.manifest.files)

    @property
    def rollouts(self) -> int:
        """The number of rollouts that are done."""
        return int(self.metrics.index.max()) if len(self.metrics) else 0

    @property
    def datasets(self) -> list[str]:
        """The names of the problem sets that it was trained on."""
        names = self.settings["training"]["dataset"]
        return [names] if isinstance(names, str) else names

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
        rows: list[dict[str, Any]] = []
        for row in _newest_first(self.manifest.root / self.manifest.facts["samples"]):
            if rows and row["rollout"] <= rows[0]["rollout"] - last:
                break
            rows.append(row)
        return rows[::-1]


def read_scores(paths: Iterable[Path]) -> list[Score]:
    """Read evaluations, in the given order."""
    return [
        Score(path.parts[-4], path.parts[-2], path.stem, _read(path, "evaluate")) for path in map(Path.absolute, paths)
    ]


def read_trainings(paths: Iterable[Path]) -> list[Training]:
    """Read finished trainings with their metrics."""
    return [_training(_read(path, "train")) for path in map(Path.absolute, paths)]


def read_unfinished(path: Path, job: Path) -> Training | None:
    """Read a training that is not finished: what its logs hold now, without waiting for any lock.

    Args:
        path: where its manifest will lie.
        job: its job's settings, by which its folder is found.

    Returns:
        None if it has not begun.
    """
    path = path.absolute()
    try:
        settings = read_job(job)
    except UserError:  # it is not started yet, or its inputs are being made
        return None
    work = runs.find(path.parent, settings)
    if work is None or not (work / METRICS).is_file():
        return None
    saved = runs.rollouts(work)
    facts = {"metrics": METRICS, "samples": SAMPLES, "checkpoint": f"checkpoint-{saved:06d}" if saved else "none yet"}
    return _training(Manifest(path, "train", work, files={}, facts=facts, provenance=settings))


def _training(manifest: Manifest) -> Training:
    rows = pd.DataFrame(_json_lines(manifest.root / manifest.facts["metrics"]))
    # A rollout and the validation after it are two log lines but one row here; of two validations the last counts.
    metrics = rows.groupby("rollout").last() if len(rows) else rows
    return Training(manifest.path.parts[-4], manifest.path.parts[-2], manifest, metrics)


def pairs(scores: Iterable[Score], compare: Iterable[Sequence[Sequence[str]]] = ()) -> list[Pair]:
    """Pair every trained score with the base's of the same model and problem set, then those that ``compare`` names.

    Scores that can't be compared are a `UserError` that says what differs.

    Args:
        compare: pairs of (model, weights), first and second.
    """
    scores = list(scores)
    datasets = list(dict.fromkeys(score.dataset for score in scores))
    at = {(score.model, score.weights, score.dataset): score for score in scores}
    wanted = [
        *(((score.model, BASE, score.dataset), (score.model, score.weights, score.dataset)) for score in scores),
        *(((*first, name), (*second, name)) for first, second in compare for name in datasets),
    ]
    found = [
        Pair(at[first], at[second])
        for first, second in dict.fromkeys(wanted)
        if first != second and {first, second} <= at.keys()
    ]
    for pair in found:
        if obstacles := pair.obstacles():
            raise UserError(
                f"{pair.second.manifest.path}: can't be compared with {pair.first.manifest.path}:"
                f" {staleness.few(obstacles, '; ')}: evaluate both again with the same settings"
            )
    return found


def _complete(score: Score) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """By problem, the share of answers that are complete, their mean reward, and that of the others; (P,) each."""
    problems = score.facts["per_problem"]
    if not all("finish" in problem for problem in problems):
        return None
    shares, whole, cut = [], [], []
    for problem in problems:
        rewards, is_complete = np.array(problem["rewards"], float), np.array(problem["finish"]) == "stop"
        shares.append(is_complete.mean())
        for means, chosen in ((whole, rewards[is_complete]), (cut, rewards[~is_complete])):
            means.append(chosen.mean() if len(chosen) else np.nan)
    return np.array(shares), np.array(whole), np.array(cut)


def _filled(means: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Means over no answers (NaN) replaced by the other weights', or by 0."""
    return np.nan_to_num(np.where(np.isnan(means), others, means))


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


def _newest_first(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file from its end, read block by block: that of a run of days has gigabytes."""
    if not path.is_file():
        raise UserError(f"{path}: missing: run the step that writes it again")
    with path.open("rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at:
            end, at = at, max(0, at - BLOCK)
            file.seek(at)
            rest, *lines = (file.read(end - at) + rest).split(b"\n")
            for line in reversed(lines if at else [rest, *lines]):
                with contextlib.suppress(ValueError):  # the last line may be incomplete
                    yield json.loads(line.decode(errors="surrogateescape"))
