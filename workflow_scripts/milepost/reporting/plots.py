"""The plots, each drawn for light and for dark pages on a transparent background."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from milepost.configuration.schema import Plots
from milepost.reporting.results import Pair, Training

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
VALIDATION = "validation_average"


@dataclass(frozen=True)
class Theme:
    """The colours of a drawing."""

    base: str
    trained: str
    ink: str
    muted: str
    grid: str

    @classmethod
    def light(cls, settings: Plots) -> "Theme":
        return cls(settings.color_base, settings.color_trained, "#1f2328", "#656d76", "#d8dee4")

    @classmethod
    def dark(cls, settings: Plots) -> "Theme":
        """The same hues, lighter, so that they stand out on a dark background."""
        base, trained = _lighter(settings.color_base, 0.2), _lighter(settings.color_trained, 0.4)
        return cls(base, trained, "#e6edf3", "#9198a1", "#30363d")


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
        with mpl.rc_context(_style(theme)):
            return self.draw(theme)

    def _svg(self, figure: Figure) -> bytes:
        with mpl.rc_context({"svg.hashsalt": self.name}):
            return _bytes(figure, format="svg", transparent=True, metadata={"Date": None})


def all_plots(trainings: Sequence[Training], pairs: Sequence[Pair]) -> list[Plot]:
    """All plots for which there is data, in the order of the report."""
    found = []
    if pairs:
        found.append(
            Plot(
                "scores",
                "Base and trained",
                "Mean reward (avg@n; where it is 0 or 1 the share of correct samples), its 95% interval over problems.",
                None,
                lambda theme: _score_bars(pairs, theme),
            )
        )
    for pair in pairs:
        found.append(
            Plot(
                f"problems-{pair.base.model}-{pair.base.dataset}",
                f"{pair.base.model} on {pair.base.dataset}, problem by problem",
                "Each column is a problem, the hardest for the base on the left; the line is what training did.",
                pair.base.model,
                lambda theme, pair=pair: _paired_dots(pair, theme),
            )
        )
    for training in trainings:
        if len(training.column("reward_mean")):
            found += _training_plots(training)
    return found


def _training_plots(training: Training) -> list[Plot]:
    model = training.model
    return [
        Plot(
            f"reward-{model}",
            f"{model}: reward",
            "Mean reward of each rollout (thin), smoothed (thick), and the validation score of those weights (dots).",
            model,
            lambda theme: _reward(training, theme),
        ),
        Plot(
            f"length-{model}",
            f"{model}: response length",
            "Mean tokens of a response, and the share that the cap cut off.",
            model,
            lambda theme: _length(training, theme),
        ),
        Plot(
            f"health-{model}",
            f"{model}: training metrics",
            "What goes wrong shows here first: a growing log-prob difference means that engine and trainer disagree.",
            model,
            lambda theme: _health(training, theme),
        ),
    ]


def smoothed(values: pd.Series) -> pd.Series:
    """A centred moving average over a twentieth of the run; shorter windows at its ends."""
    return values.rolling(max(3, len(values) // 20), center=True, min_periods=1).mean()


def _reward(training: Training, theme: Theme) -> Figure:
    figure, (axes,) = _figure(1, 3.4)
    _curve(axes, training.column("reward_mean"), theme.trained, "reward of a rollout")
    validation = training.column(VALIDATION)
    if len(validation):
        axes.plot(
            validation.index,
            validation,
            "o-",
            color=theme.ink,
            markersize=4.5,
            linewidth=0.8,
            label="validation (avg@n)",
            zorder=4,
        )
    axes.set(xlabel="rollout", ylabel="share correct" if training.is_share else "mean reward")
    if training.is_share:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3)
    return figure


def _length(training: Training, theme: Theme) -> Figure:
    figure, (upper, lower) = _figure(2, 3.8, heights=(2, 1), share=True)
    _curve(upper, training.column("response_length_mean"), theme.trained, "mean tokens")
    upper.set_ylabel("tokens")
    upper.set_ylim(bottom=0)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    truncated = training.column("truncated_share")
    lower.fill_between(truncated.index, truncated, color=theme.base, alpha=0.5, linewidth=0)
    lower.plot(truncated.index, truncated, color=theme.base, linewidth=1)
    lower.set(xlabel="rollout", ylabel="cut off")
    lower.set_ylim(0, max(0.05, 1.15 * truncated.max()) if len(truncated) else 1)
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _health(training: Training, theme: Theme) -> Figure:
    shown = {name: label for name, label in HEALTH.items() if len(training.column(name))}
    with_rows = -(-max(1, len(shown)) // 3)
    figure = Figure(figsize=(WIDTH, 1.75 * with_rows), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(with_rows, 3, squeeze=False).flat, shown.items(), strict=False):
        _curve(axes, training.column(name), theme.trained, label)
        axes.set_title(label, fontsize=8, color=theme.muted, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    return figure


def _score_bars(pairs: Sequence[Pair], theme: Theme) -> Figure:
    figure, (axes,) = _figure(1, 0.9 + 0.72 * len(pairs))
    names = []
    for row, pair in enumerate(pairs):
        for score, offset, color in ((pair.base, -0.19, theme.base), (pair.trained, 0.19, theme.trained)):
            average, (low, high) = score.facts["average"], score.interval
            axes.barh(row + offset, average, height=0.34, color=color, label=None if row else _label(score.is_base))
            reach = [[0 if np.isnan(low) else average - low], [0 if np.isnan(high) else high - average]]
            axes.errorbar(average, row + offset, xerr=reach, color=theme.ink, linewidth=1.1, capsize=2.5)
            right = average if np.isnan(high) else max(high, average)
            axes.annotate(
                f"{100 * average:.1f}%" if score.is_share else f"{average:.3g}",
                (right, row + offset),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        several = len({pair.base.dataset for pair in pairs}) > 1
        names.append(f"{pair.base.model}\n{pair.base.dataset}" if several else pair.base.model)
    axes.set_yticks(range(len(pairs)), names)
    axes.invert_yaxis()
    if all(pair.base.is_share for pair in pairs):
        axes.set_xlim(0, 1.08)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        axes.margins(x=0.12)  # room for the numbers
        axes.set_xlabel("mean reward; 1 is 100%")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _paired_dots(pair: Pair, theme: Theme) -> Figure:
    base, trained = pair.base.problem_means(), pair.trained.problem_means()
    order = np.lexsort((trained, base))
    base, trained, at = base[order], trained[order], np.arange(len(order))
    figure, (axes,) = _figure(1, 3.1)
    size = float(np.clip(900 / len(at), 6, 26))
    colors = np.where(trained >= base, theme.trained, theme.base)
    axes.vlines(at, base, trained, color=colors, linewidth=float(np.clip(90 / len(at), 0.8, 3)), alpha=0.55)
    axes.scatter(at, base, s=1.9 * size, color=theme.base, label=_label(True), zorder=3)  # a ring where both are equal
    axes.scatter(at, trained, s=size, color=theme.trained, label=_label(False), zorder=4)
    axes.set(xlabel=f"{len(at)} problems, sorted", ylabel="share correct" if pair.base.is_share else "mean reward")
    axes.set_xticks([])
    if pair.base.is_share:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _curve(axes: Axes, values: pd.Series, color: str, label: str) -> None:
    """Plot all values as a thin pale line and the trend on top; a short run has no trend."""
    if len(values) < 10:
        axes.plot(values.index, values, "o-", color=color, markersize=3, linewidth=1.4, label=label)
        return
    axes.plot(values.index, values, color=color, linewidth=0.7, alpha=0.35, label=label)
    axes.plot(values.index, smoothed(values), color=color, linewidth=2, label="smoothed")


def _figure(rows: int, height: float, heights: Sequence[float] | None = None, share: bool = False):
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=share, height_ratios=heights)
    for one in axes.flat:
        one.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure, list(axes.flat)


def _style(theme: Theme) -> dict[str, object]:
    return {
        "font.size": 9,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.solid_capstyle": "round",
    }


def _label(is_base: bool) -> str:
    return "base" if is_base else "trained"


def _lighter(color: str, share: float) -> str:
    return to_hex([part + (1 - part) * share for part in to_rgb(color)])


def _bytes(figure: Figure, **options: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()
