"""The progress page: how trainings go that still run, from what their logs hold now."""

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from milepost.common.durations import duration
from milepost.configuration.schema import Plots
from milepost.grpo.pace import Pace
from milepost.reporting.plots import VALIDATION, VALIDATION_ERROR, all_plots
from milepost.reporting.report import colors, embedded, encodable, templates, training_facts, training_samples
from milepost.reporting.results import METRICS, Training
from milepost.reporting.tables import amount

QUIET = 5  # usual steps, or two validations, without a new line in the log: a training may have stopped
PATIENCE = 120.0  # seconds that are never suspicious


def progress_page(trainings: Sequence[Training], not_begun: Sequence[str], settings: Plots) -> str:
    """The page as HTML; ``not_begun`` names trainings (``9B/grpo``) without any rollouts yet."""
    models = list(dict.fromkeys(training.model for training in trainings))
    plots = all_plots(trainings, [], [])
    page = templates.get_template("progress.html").render(
        colors=colors(settings),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        not_begun=not_begun,
        trainings=[_shown(training) for training in trainings],
        models=models,
        plots=[
            {"title": plot.title, "caption": plot.caption, "model": plot.model} | embedded(plot.drawings(settings))
            for plot in plots
        ],
        samples={
            f"{training.model}/{training.run}": training_samples(training)
            for training in trainings
            if training.rollouts
        },
    )
    return encodable(page)


def _shown(training: Training) -> dict[str, Any]:
    """A training's state, facts and validation scores."""
    done = training.rollouts
    total = done if training.is_finished else training.settings["training"]["rollouts"]
    return {
        "name": f"{training.model}/{training.run}",
        "model": training.model,
        "done": done,
        "total": total,
        "percent": round(100 * done / max(total, 1), 1),
        "state": state(training, time.time()),
        "facts": training_facts(training),
        "validations": _validations(training),
        "samples": training_samples(training),
    }


def state(training: Training, now: float) -> str:
    """In words: finished, or what is left and when the last rollout was done."""
    if training.is_finished:
        return "finished"
    settings, done = training.settings, training.rollouts
    pace = Pace(
        settings["training"]["rollouts"], settings["validation"]["interval"], settings["training"]["save_interval"]
    )
    for rollout, row in training.metrics.iterrows():
        pace.add({"rollout": rollout} | row.dropna().to_dict())
    ago = now - (training.manifest.root / METRICS).stat().st_mtime
    left, last = pace.seconds_left(), f"the last line was logged {duration(ago)} ago"
    if left is None:
        return f"{done} rollouts so far; {last}"
    step = float(training.column("seconds_step").tail(QUIET).median())
    others = [2 * training.column(f"seconds_{name}").tail(QUIET).max() for name in ("validation", "save")]
    if ago > max(PATIENCE, QUIET * step, *(seconds for seconds in others if seconds > 0)):
        return f"{last}, and a step takes {duration(step)}: it has stopped, or waits; {duration(left)} would be left"
    ends = datetime.fromtimestamp(now + left).astimezone().strftime("%Y-%m-%d %H:%M")
    return f"about {duration(left)} left, until {ends}; {last}"


def _validations(training: Training) -> list[dict[str, str]]:
    """The validation scores so far, the newest first."""
    scores, errors = training.column(VALIDATION), training.column(VALIDATION_ERROR)
    percent = "%" if training.is_share else ""
    return [
        {
            "rollout": f"{rollout:,}",
            "score": f"{amount(score, training.is_share)}{percent}",
            "standard error": amount(errors.get(rollout, float("nan")), training.is_share),
        }
        for rollout, score in scores.iloc[::-1].items()
    ]
