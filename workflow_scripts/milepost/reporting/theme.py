"""The colours and the style of the plots, for light and for dark pages."""

from dataclasses import dataclass

from matplotlib.colors import to_hex, to_rgb

from milepost.configuration.schema import Plots

OTHER_RUNS = ("#b35900", "#7048a8", "#2b8a3e", "#c2255c")


@dataclass(frozen=True)
class Theme:
    """The colours of a drawing; ``others`` are of further runs."""

    base: str
    trained: str
    others: tuple[str, ...]
    ink: str
    muted: str
    grid: str

    @classmethod
    def light(cls, settings: Plots) -> "Theme":
        return cls(settings.color_base, settings.color_trained, OTHER_RUNS, "#1f2328", "#656d76", "#d8dee4")

    @classmethod
    def dark(cls, settings: Plots) -> "Theme":
        """The same hues, lighter, so that they stand out on a dark background."""
        base, trained = _lighter(settings.color_base, 0.2), _lighter(settings.color_trained, 0.4)
        others = tuple(_lighter(color, 0.4) for color in OTHER_RUNS)
        return cls(base, trained, others, "#e6edf3", "#9198a1", "#30363d")

    def run(self, number: int) -> str:
        """The colour of a run, or of one of its checkpoints, by its place among all that are drawn."""
        return self.trained if number == 0 else self.others[(number - 1) % len(self.others)]

    def style(self) -> dict[str, object]:
        """Matplotlib's settings."""
        return {
            "font.size": 9,
            "text.color": self.ink,
            "axes.labelcolor": self.muted,
            "axes.edgecolor": self.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "xtick.color": self.grid,
            "ytick.color": self.grid,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.solid_capstyle": "round",
        }


def _lighter(color: str, share: float) -> str:
    return to_hex([part + (1 - part) * share for part in to_rgb(color)])
