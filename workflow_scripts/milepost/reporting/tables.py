"""The tables of scores and of paired differences (trained minus base), as numbers and in readable form."""

import math
from collections.abc import Sequence

import pandas as pd

from milepost.reporting.results import Pair, Score


def score_table(scores: Sequence[Score]) -> pd.DataFrame:
    """One row per score, shares between 0 and 1; pass@k has a column for every k that any score has."""
    ks = sorted({int(k) for score in scores for k in score.facts["pass_at"]})
    return pd.DataFrame(
        [
            {
                "model": score.model,
                "dataset": score.dataset,
                "weights": _weights(score),
                "problems": score.facts["problems"],
                "samples": score.facts["samples_per_problem"],
                "avg@n": score.facts["average"],
                "avg@n low": score.interval[0],
                "avg@n high": score.interval[1],
                **{f"pass@{k}": score.facts["pass_at"].get(str(k), math.nan) for k in ks},
                "maj@n": score.facts["majority"],
                "truncated": score.facts["truncated_share"],
                "no </think>": score.facts["no_think_end_share"],
                "no box": score.facts["no_box_share"],
                "grading errors": score.facts["grading_error_share"],
                "tokens": score.facts["mean_tokens"],
            }
            for score in scores
        ]
    )


def difference_table(pairs: Sequence[Pair]) -> pd.DataFrame:
    """One row per pair: trained minus base, with the 95% t and BCa bootstrap intervals over problems."""
    rows, unknown = [], (math.nan, math.nan)
    for pair in pairs:
        difference = pair.difference()
        t_interval, bootstrap = difference.interval or unknown, difference.bootstrap_interval or unknown
        rows.append(
            {
                "model": pair.base.model,
                "dataset": pair.base.dataset,
                "problems": pair.base.facts["problems"],
                "base": pair.base.facts["average"],
                "trained": pair.trained.facts["average"],
                "difference": difference.value,
                "t low": t_interval[0],
                "t high": t_interval[1],
                "bootstrap low": bootstrap[0],
                "bootstrap high": bootstrap[1],
                "p": math.nan if difference.p_value is None else difference.p_value,
            }
        )
    return pd.DataFrame(rows)


def readable_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The scores of `score_table` in percent, with the interval in one column."""
    shown = table[["model", "dataset", "weights"]].astype(str)
    shown["problems × samples"] = [f"{p} × {n}" for p, n in zip(table["problems"], table["samples"], strict=True)]
    shown["avg@n"] = table["avg@n"].map(percent)
    shown["95% interval"] = _intervals(table["avg@n low"], table["avg@n high"])
    for name in (*(name for name in table if name.startswith("pass@")), "maj@n"):
        shown[name] = table[name].map(percent)
    return shown


def readable_format(table: pd.DataFrame) -> pd.DataFrame:
    """How the responses of `score_table` end, in percent of the samples, and how long they are."""
    shown = table[["model", "dataset", "weights"]].astype(str)
    for name in ("truncated", "no </think>", "no box", "grading errors"):
        shown[name] = table[name].map(percent)
    shown["mean tokens"] = table["tokens"].map("{:,.0f}".format)
    return shown


def readable_differences(table: pd.DataFrame) -> pd.DataFrame:
    """`difference_table` in percentage points."""
    if table.empty:
        return table
    shown = table[["model", "dataset"]].astype(str)
    shown["base"], shown["trained"] = table["base"].map(percent), table["trained"].map(percent)
    shown["difference"] = table["difference"].map(points)
    shown["95% t interval"] = _intervals(table["t low"], table["t high"], points)
    shown["95% BCa bootstrap"] = _intervals(table["bootstrap low"], table["bootstrap high"], points)
    shown["p"] = table["p"].map(lambda p: "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}")
    return shown


def in_words(pair: Pair) -> str:
    """The paired difference as a sentence that claims no more than the interval supports."""
    difference, base, trained = pair.difference(), pair.base.facts["average"], pair.trained.facts["average"]
    text = (
        f"On {pair.base.dataset}, {pair.base.model} went from {percent(base)}% to {percent(trained)}%:"
        f" {points(difference.value)} points"
    )
    if others := pair.made_by_others():
        text = f"The two scores were made with different code or versions ({', '.join(others)}). {text}"
    if difference.interval is None:
        return f"{text}. Without a spread over problems there is no interval."
    low, high = difference.interval
    bootstrap = difference.bootstrap_interval
    text += f" (95% t interval {' to '.join(map(points, difference.interval))}"
    text += f"; BCa bootstrap {' to '.join(map(points, bootstrap))})." if bootstrap else ")."
    if low > 0:
        return f"{text} The interval lies above 0: on problems like these, training helped."
    if high < 0:
        return f"{text} The interval lies below 0: on problems like these, training hurt."
    return f"{text} The interval holds 0: these {pair.base.facts['problems']} problems can't tell the two apart."


def titled(scores: Sequence[Score], pairs: Sequence[Pair]) -> dict[str, pd.DataFrame]:
    """All readable tables by their titles."""
    table = score_table(scores)
    return {
        "Scores, percent": readable_scores(table),
        "Trained minus base, percentage points": readable_differences(difference_table(pairs)),
        "Format, percent of samples": readable_format(table),
    }


def markdown(tables: dict[str, pd.DataFrame]) -> str:
    """Titled readable tables as Markdown."""
    parts = []
    for title, table in tables.items():
        body = table.to_markdown(index=False, disable_numparse=True) if len(table) else "None."
        parts.append(f"## {title}\n\n{body}\n")
    return "\n".join(parts)


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign unless it rounds to 0."""
    if math.isnan(share):
        return "–"
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _intervals(low: pd.Series, high: pd.Series, form=percent) -> list[str]:
    return ["–" if math.isnan(a) else f"{form(a)} to {form(b)}" for a, b in zip(low, high, strict=True)]


def _weights(score: Score) -> str:
    return "base" if score.is_base else "trained"
