"""What the results took: wall time and GPU-hours by job, from the times that rules/job.sh keeps of all attempts."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from milepost.common.durations import duration
from milepost.configuration.weights import BASE
from milepost.reporting.results import Score, Training

COLUMNS = ("job", "last began", "host", "attempts", "wall time", "GPUs", "GPU-hours")


def costs(scores: Sequence[Score], trainings: Sequence[Training]) -> list[dict[str, str]]:
    """A row for each job whose times are kept, with the sum of its attempts, and one for all of them."""
    rows, seconds, gpu_hours = [], 0.0, 0.0
    for job, gpus, file in _jobs(scores, trainings):
        if not file.is_file():
            continue
        attempts = pd.read_csv(file, sep="\t")
        if attempts.empty:
            continue
        took = float(attempts["total_seconds"].iloc[-1])
        seconds, gpu_hours = seconds + took, gpu_hours + gpus * took / 3600
        rows.append(
            {
                "job": job,
                "last began": str(attempts["began"].iloc[-1])[:16].replace("T", " "),
                "host": ", ".join(dict.fromkeys(map(str, attempts["host"]))),
                "attempts": f"{len(attempts):,}",
                "wall time": duration(took),
                "GPUs": str(gpus),
                "GPU-hours": hours(gpus * took / 3600),
            }
        )
    if len(rows) > 1:
        empty = dict.fromkeys(COLUMNS, "")
        rows.append(empty | {"job": "all", "wall time": duration(seconds), "GPU-hours": hours(gpu_hours)})
    return rows


def hours(value: float) -> str:
    """GPU-hours with two significant digits, above 100 without a fraction."""
    return "0" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _jobs(scores: Sequence[Score], trainings: Sequence[Training]) -> Iterable[tuple[str, int, Path]]:
    """(name, GPUs, file of its times) of the jobs behind these results, in the order of the pipeline."""
    logs = {
        **{score.model: score.manifest.path.absolute().parents[3] / "logs" for score in scores},
        **{training.model: training.manifest.path.absolute().parents[3] / "logs" for training in trainings},
    }
    for model, folder in logs.items():
        jobs = dict.fromkeys(["download", "convert"], 0)
        jobs |= {f"train-{t.run}": gpus(t.settings) for t in trainings if t.model == model}
        own = [score for score in scores if score.model == model]
        jobs |= {f"export-{score.weights}": 0 for score in own if score.weights != BASE}
        jobs |= {f"evaluate-{s.dataset}-{s.weights}": gpus(s.manifest.provenance["config"]) for s in own}
        for job, count in jobs.items():
            yield f"{model}/{job}", count, folder / model / f"{job}.attempts.tsv"


def gpus(config: dict) -> int:
    """The GPUs of a job by its settings; older records have none."""
    return config.get("hardware", {}).get("gpus", 0)
