"""The plots, each drawn for light and for dark pages on a transparent background."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from milepost.configuration.schema import Plots
from milepost.reporting.results import Pair, Score, Training
from milepost.reporting.theme import Theme

WIDTH = 7.2  # inches
HEALTH = {
    "kl": "KL to the reference",
    "clip_fraction": "share of clipped tokens",
    "grad_norm": "gradient norm",
    "loss": "loss",
    "log_prob_diff": "|log-prob trainer − engine|",
    "mtp_loss": "loss of the MTP layer",
    "acceptance_length": "tokens a forward pass (drafting)",
    "expert_load_max": "busiest expert, in even shares",
    "routing_agreement": "agreement on experts",
    "tokens_per_second": "tokens per second",
}
VALIDATION, VALIDATION_ERROR = "validation_average", "validation_standard_error"
PHASES = ("rollout", "train", "sync", "sleep_wake", "validation", "save")
LAST_STEPS = 20  # of the rollouts whose phases are drawn
BAR, BETWEEN = 0.38, 0.24  # from bar to bar, and more from one model or problem set to the next


@dataclass(frozen=True)
class Plot:
    """A plot: its file's stem, title, caption, model (or all), and the function that draws it."""

    name: str
    title: str
    caption: str
    model: str | None
    draw: Callable[[Theme], Figure]

    def drawings(self, settings: Plots) -> dict[str, bytes]:
        """``png``: on white, for papers and slides; ``light`` and ``dark``: SVG for pages, transparent.

        The same data give the same bytes.
        """
        light, dark = self._drawn(Theme.light(settings)), self._drawn(Theme.dark(settings))
        return {
            "png": _bytes(light, format="png", dpi=settings.dpi, facecolor="white"),
            "light": self._svg(light),
            "dark": self._svg(dark),
        }

    def _drawn(self, theme: Theme) -> Figure:
        with mpl.rc_context(theme.style()):
            return self.draw(theme)

    def _svg(self, figure: Figure) -> bytes:
        with mpl.rc_context({"svg.hashsalt": self.name}):
            return _bytes(figure, format="svg", transparent=True, metadata={"Date": None})


def all_plots(trainings: Sequence[Training], scores: Sequence[Score], pairs: Sequence[Pair]) -> list[Plot]:
    """All plots for which there is data, in the order of the report."""
    names = [score.weights for score in scores if not score.is_base] + [training.run for training in trainings]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    found = []
    if scores:
        found.append(
            Plot(
                "scores",
                "Scores",
                "Mean reward (avg@n; where it is 0 or 1 the share of correct samples), its 95% interval over problems.",
                None,
                lambda theme: _score_bars(scores, numbers, theme),
            )
        )
    for pair in pairs:
        first, second = pair.first, pair.second
        of_training = pair.is_of_a_training
        compared = second.name if of_training else f"{second.name} against {first.name}"
        of = f"{second.model}-{second.weights}" if of_training else f"{compared.replace('/', '-').replace(' ', '-')}"
        found.append(
            Plot(
                f"problems-{of}-{first.dataset}",
                f"{compared} on {first.dataset}, problem by problem",
                f"Each column is a problem, the hardest for {'the base' if of_training else first.name} on the left;"
                f" the line is {'what training did' if of_training else 'the difference'}.",
                second.model if first.model == second.model else None,
                lambda theme, pair=pair: _paired_dots(pair, numbers, theme),
            )
        )
    for model in dict.fromkeys(training.model for training in trainings):
        own = [training for training in trainings if training.model == model and len(training.column("reward_mean"))]
        found += _training_plots(model, own, numbers) if own else []
    return found


def _training_plots(model: str, runs: Sequence[Training], numbers: dict[str, int]) -> list[Plot]:
    """The plots of a model's runs, which share their axes."""
    dull = [label for name, label in HEALTH.items() if _measured(runs, name) and _is_dull(runs, name)]
    plots = [
        Plot(
            f"reward-{model}",
            f"{model}: reward",
            "Mean reward of each rollout (thin), smoothed (thick), and the validation score of those weights (dots; the"
            " bars are a standard error over problems).",
            model,
            lambda theme: _reward(runs, numbers, theme),
        ),
        Plot(
            f"length-{model}",
            f"{model}: response length",
            "Mean tokens of a response, and the share that the cap cut off.",
            model,
            lambda theme: _length(runs, numbers, theme),
        ),
        Plot(
            f"health-{model}",
            f"{model}: training metrics",
            "What goes wrong shows here first: a growing log-prob difference means that engine and trainer disagree."
            + (f" Constant or within 1e-6 of 0, and left out: {', '.join(dull)}." if dull else ""),
            model,
            lambda theme: _health(runs, numbers, theme),
        ),
        Plot(
            f"phases-{model}",
            f"{model}: where the time goes",
            f"Mean seconds of a step over the last {LAST_STEPS} rollouts, by phase; validations and checkpoints are"
            " spread over the rollouts between two of them.",
            model,
            lambda theme: _phases(runs, theme),
        ),
    ]
    return plots if any(map(phase_seconds, runs)) else plots[:-1]


def smoothed(values: pd.Series) -> pd.Series:
    """A centred moving average over a twentieth of the run; shorter windows at its ends."""
    return values.rolling(max(3, len(values) // 20), center=True, min_periods=1).mean()


def _reward(runs: Sequence[Training], numbers: dict[str, int], theme: Theme) -> Figure:
    figure, (axes,) = _figure(1, 3.4)
    several = len(runs) > 1
    for training in runs:
        color = theme.run(numbers[training.run])
        _curve(axes, training.column("reward_mean"), color, training.run if several else "reward of a rollout", several)
        validation = training.column(VALIDATION)
        if len(validation):
            own = color if several else theme.ink
            label = f"{training.run}: validation" if several else "validation (avg@n)"
            axes.plot(
                validation.index, validation, "o-", color=own, markersize=4.5, linewidth=0.8, label=label, zorder=4
            )
            errors = training.column(VALIDATION_ERROR).reindex(validation.index)  # NaN draws no bar
            axes.errorbar(validation.index, validation, errors, fmt="none", ecolor=own, elinewidth=1, capsize=2)
    is_share = all(training.is_share for training in runs)
    axes.set(xlabel="rollout", ylabel="share correct" if is_share else "mean reward")
    if is_share:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_above(axes, columns=4 if several else 3)
    return figure


def _length(runs: Sequence[Training], numbers: dict[str, int], theme: Theme) -> Figure:
    figure, (upper, lower) = _figure(2, 3.8, heights=(2, 1), share=True)
    several, highest = len(runs) > 1, 0.0
    for training in runs:
        color = theme.run(numbers[training.run])
        label = training.run if several else "mean tokens"
        _curve(upper, training.column("response_length_mean"), color, label, several)
        truncated, color = training.column("truncated_share"), color if several else theme.base
        if not several:
            lower.fill_between(truncated.index, truncated, color=color, alpha=0.5, linewidth=0)
        lower.plot(truncated.index, truncated, color=color, linewidth=1)
        highest = max(highest, truncated.max() if len(truncated) else 0.0)
    upper.set_ylabel("tokens")
    upper.set_ylim(bottom=0)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    lower.set(xlabel="rollout", ylabel="cut off")
    lower.set_ylim(0, max(0.05, 1.15 * highest))
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if several:
        _legend_above(upper)
    return figure


def _health(runs: Sequence[Training], numbers: dict[str, int], theme: Theme) -> Figure:
    shown = {k: label for k, label in HEALTH.items() if _measured(runs, k) and not _is_dull(runs, k)}
    with_rows, several = -(-max(1, len(shown)) // 3), len(runs) > 1
    figure = Figure(figsize=(WIDTH, 1.75 * with_rows + 0.3 * several), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(with_rows, 3, squeeze=False).flat, shown.items(), strict=False):
        for training in runs:
            _curve(axes, training.column(name), theme.run(numbers[training.run]), training.run, several)
        axes.set_title(label, fontsize=8, color=theme.muted, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    if several:
        colors = {training.run: theme.run(numbers[training.run]) for training in runs}
        lines = [Line2D([], [], color=color, linewidth=2, label=run) for run, color in colors.items()]
        figure.legend(handles=lines, loc="outside upper left", ncols=4)
    return figure


def _measured(runs: Sequence[Training], name: str) -> bool:
    return any(len(training.column(name)) for training in runs)


def _is_dull(runs: Sequence[Training], name: str) -> bool:
    """Whether a curve would show nothing: it is flat, or its values are rounding errors."""
    values = pd.concat([training.column(name) for training in runs])
    return len(values) > 1 and bool(values.min() == values.max() or values.abs().max() < 1e-6)


def phase_seconds(training: Training) -> dict[str, float]:
    """Mean seconds of a step by phase, over the last rollouts; what happens every few rollouts has its share."""
    every = {
        "validation": training.settings.get("validation", {}).get("interval"),
        "save": training.settings.get("training", {}).get("save_interval"),
    }
    found = {name: training.column(f"seconds_{name}").tail(LAST_STEPS).mean() for name in PHASES}
    return {
        name: seconds / (every.get(name) or 1) for name, seconds in found.items() if seconds > 0
    }  # NaN: was not measured


def _phases(runs: Sequence[Training], theme: Theme) -> Figure:
    figure, (axes,) = _figure(1, 0.9 + 0.42 * len(runs))
    colors = dict(zip(PHASES, (theme.trained, *theme.others, theme.muted), strict=True))
    labelled = set()
    for at, training in enumerate(runs):
        start = 0.0
        for phase, seconds in phase_seconds(training).items():
            label = None if phase in labelled else phase.replace("_", " and ")
            axes.barh(at, seconds, left=start, height=0.55, color=colors[phase], label=label)
            labelled.add(phase)
            start += seconds
    axes.set_yticks(range(len(runs)), [training.run for training in runs])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlabel("seconds")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    _legend_above(axes, columns=len(PHASES))
    return figure


def _score_bars(scores: Sequence[Score], numbers: dict[str, int], theme: Theme) -> Figure:
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.model, score.dataset), []).append(score)
    figure, (axes,) = _figure(1, 0.9 + 0.72 * (BAR * len(scores) + BETWEEN * len(groups)))
    several = len({dataset for _, dataset in groups}) > 1
    at, ticks, labelled = 0.0, {}, set()
    for (model, dataset), group in groups.items():
        ticks[at + BAR * (len(group) - 1) / 2] = f"{model}\n{dataset}" if several else model
        for score in group:
            average, (low, high) = score.facts["average"], score.interval
            color = theme.base if score.is_base else theme.run(numbers[score.weights])
            label = None if score.weights in labelled else score.weights
            axes.barh(at, average, height=0.34, color=color, label=label)
            labelled.add(score.weights)
            reach = [[0 if np.isnan(low) else average - low], [0 if np.isnan(high) else high - average]]
            axes.errorbar(average, at, xerr=reach, color=theme.ink, linewidth=1.1, capsize=2.5)
            axes.annotate(
                f"{100 * average:.1f}%" if score.is_share else f"{average:.3g}",
                (average if np.isnan(high) else max(high, average), at),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
            at += BAR
        at += BETWEEN
    axes.set_yticks([*ticks], [*ticks.values()])
    axes.invert_yaxis()
    if all(score.is_share for score in scores):
        axes.set_xlim(0, 1.08)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        axes.margins(x=0.12)  # room for the numbers
        axes.set_xlabel("mean reward; 1 is 100%")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def _paired_dots(pair: Pair, numbers: dict[str, int], theme: Theme) -> Figure:
    first, second = pair.first.problem_means(), pair.second.problem_means()
    order = np.lexsort((second, first))
    first, second, at = first[order], second[order], np.arange(len(order))
    figure, (axes,) = _figure(1, 3.1)
    size = float(np.clip(900 / len(at), 6, 26))
    from_color = theme.base if pair.first.is_base else theme.run(numbers[pair.first.weights])
    to_color = theme.trained if pair.second.is_base else theme.run(numbers[pair.second.weights])
    if to_color == from_color:  # runs of one name, of two models
        from_color = theme.base
    names = [score.weights if pair.is_of_a_training else score.name for score in (pair.first, pair.second)]
    colors = np.where(second >= first, to_color, from_color)
    axes.vlines(at, first, second, color=colors, linewidth=float(np.clip(90 / len(at), 0.8, 3)), alpha=0.55)
    axes.scatter(at, first, s=1.9 * size, color=from_color, label=names[0], zorder=3)  # a ring where both are equal
    axes.scatter(at, second, s=size, color=to_color, label=names[1], zorder=4)
    axes.set(xlabel=f"{len(at)} problems, sorted", ylabel="share correct" if pair.first.is_share else "mean reward")
    axes.set_xticks([])
    if pair.first.is_share:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _legend_above(axes: Axes, columns: int = 4) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)


def _curve(axes: Axes, values: pd.Series, color: str, label: str, several: bool = False) -> None:
    """Plot all values as a thin pale line and the trend on top; a short run has no trend.

    Where several runs share the axes, the trend has the label.
    """
    if len(values) < 10:
        axes.plot(values.index, values, "o-", color=color, markersize=3, linewidth=1.4, label=label)
        return
    axes.plot(values.index, values, color=color, linewidth=0.7, alpha=0.35, label=None if several else label)
    axes.plot(values.index, smoothed(values), color=color, linewidth=2, label=label if several else "smoothed")


def _figure(rows: int, height: float, heights: Sequence[float] | None = None, share: bool = False):
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=share, height_ratios=heights)
    for one in axes.flat:
        one.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure, list(axes.flat)


def _bytes(figure: Figure, **options: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()
