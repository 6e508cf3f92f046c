"""The report: one self-contained HTML page with numbers, plots, samples, settings and sources, without scripts."""

import base64
import math
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from milepost.checkpoints.manifest import Manifest
from milepost.common.durations import duration
from milepost.configuration.schema import Plots
from milepost.reporting.costs import COLUMNS, costs, gpus, hours
from milepost.reporting.results import Pair, Score, Training
from milepost.reporting.tables import amount, change, sentences, span, titled
from milepost.reporting.theme import Theme

EACH = 3  # correct samples, and as many incorrect ones, per group
LAST_ROLLOUTS = 5  # rollouts whose samples are shown
FIRST_ROLLOUTS = 3  # rollouts whose rewards are reported if all are equal
HEAD, TAIL = 12_000, 4_000  # characters shown of a long response
TEXT_COLUMNS = ("dataset", "weights", "second")
CHAT_MARKS = re.compile(r"<\|im_start\|>(system|user|assistant)?|<\|im_end\|>|</?think>")

templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # model output is untrusted
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report_page(
    scores: Sequence[Score],
    pairs: Sequence[Pair],
    trainings: Sequence[Training],
    plots: Manifest,
    sources: Sequence[Manifest],
    settings: Plots,
    overlaps: Sequence[str] = (),
) -> str:
    """The report as one HTML page.

    ``plots`` is the manifest that make_plots.py wrote; ``sources`` are manifests to name the origins from; ``overlaps``
    say which prompts were trained on and scored.
    """
    names = list(dict.fromkeys([*(score.model for score in scores), *(training.model for training in trainings)]))
    rows = {source.path.stem: source.facts["rows"] for source in sources if "rows" in source.facts}
    models = [_model(name, scores, trainings, rows) for name in names]

    def drawings(plot: dict[str, Any]) -> dict[str, bytes]:
        return {theme: (plots.root / plot[theme]).read_bytes() for theme in ("light", "dark")}

    results = [score.manifest for score in scores] + [training.manifest for training in trainings]
    page = templates.get_template("report.html").render(
        colors=colors(settings),
        models=models,
        protocol=_protocol(scores),
        gains=[_gain(pair) for pair in pairs],
        tables={title: _table(table) for title, table in titled(scores, pairs).items()},
        sentences=sentences(scores, pairs, trainings),
        overlaps=overlaps,
        plots=[plot | embedded(drawings(plot)) for plot in plots.facts["plots"]],
        versions=_versions(results),
        costs=costs(scores, trainings),
        cost_columns=COLUMNS,
        sets=[_data_set(source) for source in sources if "rows" in source.facts],
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        commits=", ".join(dict.fromkeys(_makers(result) for result in results)),
        machines=list(dict.fromkeys(made.facts["machine"] for made in results if "machine" in made.facts)),
        origins=[_origin(manifest) for manifest in [*sources, *results]],
    )
    return encodable(page)


def encodable(page: str) -> str:
    """The page with question marks for the lone surrogates that a model may write, which UTF-8 can't encode."""
    return page.encode("utf-8", "replace").decode("utf-8")


def _model(name: str, scores: Sequence[Score], trainings: Sequence[Training], rows: dict[str, int]) -> dict[str, Any]:
    """The page's section on one model; ``rows`` of each problem set."""
    own = [score for score in scores if score.model == name]
    trained = [training for training in trainings if training.model == name]
    groups = [
        {
            "title": f"{'Base' if score.is_base else score.weights} weights on {score.dataset}, samples",
            "rows": evaluation_samples(score),
        }
        for score in own
    ]
    groups += [
        {"title": f"Samples of the last rollouts of {training.run}", "rows": training_samples(training)}
        for training in trained
        if "samples" in training.manifest.facts
    ]
    return {
        "name": name,
        "trainings": [{"run": training.run, "facts": training_facts(training, rows)} for training in trained],
        "samples": [group for group in groups if group["rows"]],
        "settings": [
            {"name": f"{name}/{training.run}" if training else name, "yaml": _settings(own, training)}
            for training in trained or [None]
        ],
    }


def _settings(scores: Sequence[Score], training: Training | None) -> str:
    """A model's settings as YAML; those of its training take precedence, since its engine settings are complete."""
    settings: dict[str, Any] = {}
    for result in [*scores, *([training] if training else [])]:
        settings |= result.manifest.provenance["config"]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def evaluation_samples(score: Score) -> list[dict[str, Any]]:
    """A few correct and incorrect samples of an evaluation, spread evenly over its problems."""
    correct = [problem["correct"] for problem in score.facts["per_problem"]]
    chosen: set[tuple[int, int]] = set()
    for wanted in (True, False):
        chosen.update(
            _spread([(p, s) for p, row in enumerate(correct) for s, is_right in enumerate(row) if is_right == wanted])
        )
    rows = [
        _sample(row, row["prompt"][-1]["content"], f"problem {row['problem'] + 1}, sample {row['sample'] + 1}")
        for row in score.read_samples(chosen)
    ]
    return sorted(rows, key=lambda row: not row["correct"])


def training_samples(training: Training) -> list[dict[str, Any]]:
    """A few right and wrong samples of the last rollouts."""
    rows = [row | {"correct": row["reward"] >= training.correct_from} for row in training.read_samples(LAST_ROLLOUTS)]

    def source(row: dict[str, Any]) -> str:
        """Runs of an earlier version recorded no place."""
        return ", ".join([f"rollout {row['rollout']}", *(row[key] for key in ("dataset", "place") if key in row)])

    return [
        _sample(row, row["prompt"], source(row))
        for wanted in (True, False)
        for row in _spread([row for row in rows if row["correct"] == wanted])
    ]


def _sample(row: dict[str, Any], prompt: str, source: str) -> dict[str, Any]:
    question = " ".join(CHAT_MARKS.sub(" ", prompt).split())
    return {
        "correct": row["correct"],
        "reward": f"{row['reward']:.4g}",
        "question": question if len(question) < 200 else f"{question[:199]}…",
        "source": source,
        "prompt": shortened(prompt),
        "response": shortened(row["response"]),
        **{key: row[key] for key in ("answer", "label", "reason", "finish")},
        "tokens": f"{row['tokens']:,}",
    }


def _spread[Item](items: list[Item]) -> list[Item]:
    """`EACH` of ``items``, evenly spaced."""
    count = min(EACH, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def shortened(text: str) -> str:
    """The text, or only its beginning and end if it is long."""
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]}\n\n[… {left_out:,} characters left out …]\n\n{text[-TAIL:]}"


def training_facts(training: Training, set_rows: dict[str, int] | None = None) -> list[tuple[str, str]]:
    """A training in a few lines, without metrics that were not logged; ``set_rows``: rows of the problem sets."""
    facts, reward = training.manifest.facts, training.column("reward_mean")
    is_share = training.is_share
    unit = "%" if is_share else ""
    few = max(1, len(reward) // 20)
    rows = {"rollouts": f"{training.rollouts:,}"} | _asked(training, set_rows or {})
    if len(reward):
        rows["reward, first and last twentieth"] = (
            f"{amount(reward.iloc[:few].mean(), is_share)}{unit} → {amount(reward.iloc[-few:].mean(), is_share)}{unit}"
        )
        first = reward.iloc[:FIRST_ROLLOUTS]
        lowest, highest = (training.column(f"reward_{name}").iloc[:FIRST_ROLLOUTS] for name in ("min", "max"))
        if len({*lowest, *highest}) == 1:
            rows[f"rewards of the first {len(first)} rollouts"] = f"all {first.iloc[0]:g}, which teaches nothing"
    if len(touched := training.column("overlong_share")):
        penalty = training.column("reward_mean_with_penalty")
        parts = {"as graded": reward, "with the penalty": penalty}
        parts["of all others"] = training.column("reward_mean_without_overlong")
        means = ", ".join(
            f"{amount(part.iloc[-few:].mean(), is_share)}{unit} {name}" for name, part in parts.items() if len(part)
        )
        treated = "a penalty" if len(penalty) else "no part in the loss"
        rows["overlong answers, last twentieth"] = (
            f"{amount(touched.iloc[-few:].mean(), True)}% have {treated}; mean reward {means}"
        )
    if len(step := training.column("seconds_step")):
        parts = {name: training.column(f"seconds_{name}") for name in ("rollout", "train", "sync", "sleep_wake")}
        split = ", ".join(f"{name.replace('_', ' and ')} {duration(s.median())}" for name, s in parts.items() if len(s))
        rows["a step, median"] = f"{duration(step.median())}{f' ({split})' if split else ''}"
    if len(speed := training.column("tokens_per_second")):
        rows["tokens per second, median"] = f"{speed.median():,.0f}"
    if len(gap := training.column("log_prob_diff")):
        rows["|log-prob trainer − engine|, largest"] = f"{gap.max():.2g}"
    rows["checkpoint"] = facts["checkpoint"]
    if best := facts.get("best"):
        rows["best by validation"] = f"{best['checkpoint']} ({amount(best['score'], is_share)}{unit})"
    return list(rows.items())


def _asked(training: Training, set_rows: dict[str, int]) -> dict[str, str]:
    """What a training was asked to do: data, batch and learning rate."""
    asked, optimizer = training.settings.get("training", {}), training.settings.get("optimizer", {})
    rows = {}
    if asked.get("dataset"):
        known = {name: set_rows.get(name) for name in training.datasets}
        rows["training sets"] = ", ".join(f"{name} ({n:,} rows)" if n else name for name, n in known.items())
        drawn = training.rollouts * asked.get("prompts_per_rollout", 0)
        if drawn and all(known.values()):
            rows["epochs"] = f"{drawn / sum(known.values()):.2g} ({drawn:,} prompts)"
    if {"prompts_per_rollout", "samples_per_prompt", "global_batch"} <= asked.keys():
        prompts, samples = asked["prompts_per_rollout"], asked["samples_per_prompt"]
        rows["batch"] = (
            f"{prompts} prompts × {samples} samples a rollout, {asked['global_batch']} responses an optimizer step"
        )
    if "learning_rate" in optimizer:
        rows["learning rate"] = f"{optimizer['learning_rate']:g}"
    spent = sum(training.column(f"seconds_{name}").sum() for name in ("step", "validation", "save"))
    if spent:
        used = gpus(training.settings)
        rows["time in steps, validations and checkpoints"] = duration(spent) + (
            f", {hours(used * spent / 3600)} GPU-hours" if used else ""
        )
    return rows


def _gain(pair: Pair) -> dict[str, Any]:
    """A tile with the difference and a bar for each of the two scores, the shorter on top of the longer."""
    difference, first, second = pair.difference, pair.first.facts["average"], pair.second.facts["average"]
    is_share = pair.first.is_share
    whole = 1.0 if is_share else max(first, second, 1e-9)  # of the longest bar
    (shorter, shorter_color), (longer, longer_color) = sorted([(first, "--base"), (second, "--accent")])
    return {
        "of": pair.second.name if pair.is_of_a_training else f"{pair.second.name} against {pair.first.name}",
        "dataset": pair.first.dataset,
        "points": change(difference.value, is_share),
        "unit": "points" if is_share else "reward",
        "percent": "%" if is_share else "",
        "first": amount(first, is_share),
        "second": amount(second, is_share),
        "interval": difference.interval and span(difference.interval, is_share),
        "shorter": round(100 * max(shorter, 0.0) / whole, 1),
        "shorter_color": shorter_color,
        "longer": round(100 * max(longer, 0.0) / whole, 1),
        "longer_color": longer_color,
    }


def _protocol(scores: Sequence[Score]) -> str:
    """The evaluations' protocols in words, each only once."""
    sentences = []
    for score in scores:
        used, facts = score.protocol, score.facts
        sampled = [f"temperature {used['temperature']:g}", f"top-p {used['top_p']:g}"]
        if used["top_k"] != -1:
            sampled.append(f"top-k {used['top_k']}")
        if used["presence_penalty"]:
            sampled.append(f"presence penalty {used['presence_penalty']:g}")
        if not used["enable_thinking"]:
            sampled.append("without thinking")
        sentence = (
            f"{score.dataset}: {facts['problems']} problems, {facts['samples_per_problem']} samples each,"
            f" {', '.join(sampled)}, up to {used['max_response_tokens']:,} tokens."
        )
        if sentence not in sentences:
            sentences.append(sentence)
    return " ".join(sentences)


def embedded(drawings: dict[str, bytes]) -> dict[str, str]:
    """The drawings of a plot for light and dark pages, as data URIs."""
    return {
        theme: f"data:image/svg+xml;base64,{base64.b64encode(drawings[theme]).decode()}" for theme in ("light", "dark")
    }


def _versions(manifests: Iterable[Manifest]) -> str:
    """The versions of the packages that made the results; several if the results differ."""
    found: dict[str, set[str]] = {}
    for manifest in manifests:
        for package, version in manifest.versions.items():
            found.setdefault(package, set()).add(version)
    return "; ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in sorted(found.items()))


def _origin(manifest: Manifest) -> dict[str, str]:
    """A line of the sources: what a manifest describes and where that comes from."""
    facts = manifest.facts
    if facts.get("repo"):
        source = f"{facts['repo']} at {facts['commit']}"
    else:
        source = facts.get("folder") or facts.get("checkpoint") or "made here"
    size = sum(entry["bytes"] for entry in manifest.files.values())
    unit = min(int(math.log(max(size, 1), 1024)), 4)
    return {
        "result": "/".join(manifest.path.parts[-4 if manifest.kind in ("evaluate", "train") else -2 :]),
        "stage": manifest.kind,
        "from": source,
        "files": str(len(manifest.files)),
        "size": f"{size / 1024**unit:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}",
        "code": _makers(manifest),
    }


def _data_set(manifest: Manifest) -> dict[str, str]:
    """A line on a problem set: where it comes from, and how rows become prompts."""
    facts, settings = manifest.facts, manifest.provenance.get("config", {}).get("dataset", {})
    if facts.get("repo"):
        source = f"{facts['repo']} at {facts['commit']}"
    else:
        source = settings.get("folder") or ("made here" if settings.get("problems") else "–")
    definition = {key: settings.get(key) for key in ("file", "prompt_key", "label_key", "instruction")}
    return {
        "set": manifest.path.stem,
        "rows": f"{facts['rows']:,}",
        "from": source,
        "settings": "; ".join(f"{key}: {value}" for key, value in definition.items() if value is not None),
    }


def _makers(manifest: Manifest) -> str:
    """The commits that made a result, in order for a training; code digests outside git."""
    makers = manifest.facts.get("made_by") or [manifest.provenance]
    return ", ".join(dict.fromkeys(maker.get("commit") or maker.get("code") or "–" for maker in makers))


def _table(table: pd.DataFrame) -> dict[str, Any]:
    """A readable table in the form that the templates expect."""
    columns = list(table.columns)
    return {
        "columns": columns,
        "rows": table.to_dict("records"),
        "text": [column for column in columns if column in TEXT_COLUMNS],
    }


def colors(settings: Plots) -> dict[str, str]:
    light, dark = Theme.light(settings), Theme.dark(settings)
    return {"base": light.base, "trained": light.trained, "base_dark": dark.base, "trained_dark": dark.trained}
