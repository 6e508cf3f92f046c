"""The tables of scores and of paired differences (trained minus base), as numbers and in readable form."""

import math
from collections.abc import Callable, Sequence

import pandas as pd

from milepost.reporting.results import Pair, Score


def score_table(scores: Sequence[Score]) -> pd.DataFrame:
    """One row a score; shares are of 1. pass@k has a column for every k that some score has.

    ``avg@n`` is the mean reward: as ``measure`` says a share of correct samples, or rewards of any size.
    """
    ks = sorted({int(k) for score in scores for k in score.facts["pass_at"]})
    return pd.DataFrame(
        [
            {
                "model": score.model,
                "dataset": score.dataset,
                "weights": _weights(score),
                "problems": score.facts["problems"],
                "samples": score.facts["samples_per_problem"],
                "measure": "share correct" if score.is_share else "mean reward",
                "avg@n": score.facts["average"],
                "avg@n low": score.interval[0],
                "avg@n high": score.interval[1],
                **{f"pass@{k}": score.facts["pass_at"].get(str(k), math.nan) for k in ks},
                "maj@n": _number(score.facts["majority"]),
                "truncated": score.facts["truncated_share"],
                "no </think>": _number(score.facts["no_think_end_share"]),
                "no box": _number(score.facts["no_box_share"]),
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
                "measure": "share correct" if pair.base.is_share else "mean reward",
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
    """The scores of `score_table` in percent, mean rewards as they are, with the interval in one column."""
    shown = table[["model", "dataset", "weights"]].astype(str)
    shown["problems × samples"] = [f"{p} × {n}" for p, n in zip(table["problems"], table["samples"], strict=True)]
    if not _all_shares(table):
        shown["measure"] = table["measure"]
    is_share = table["measure"] == "share correct"
    shown["avg@n"] = [*map(amount, table["avg@n"], is_share)]
    shown["95% interval"] = _intervals(table["avg@n low"], table["avg@n high"], is_share, amount)
    for name in (*(name for name in table if name.startswith("pass@")), "maj@n"):
        shown[name] = table[name].map(percent)
    return shown


def readable_format(table: pd.DataFrame) -> pd.DataFrame:
    """How the responses of `score_table` end, in percent of the samples, and how long they are."""
    shown = table[["model", "dataset", "weights"]].astype(str)
    for name in ("truncated", "no </think>", "no box", "grading errors"):
        if table[name].isna().all():  # no reward here looks for it
            continue
        shown[name] = table[name].map(percent)
    shown["mean tokens"] = table["tokens"].map("{:,.0f}".format)
    return shown


def readable_differences(table: pd.DataFrame) -> pd.DataFrame:
    """`difference_table` in percentage points, mean rewards as they are."""
    if table.empty:
        return table
    shown = table[["model", "dataset"]].astype(str)
    is_share = table["measure"] == "share correct"
    for name in ("base", "trained"):
        shown[name] = [*map(amount, table[name], is_share)]
    shown["difference"] = [*map(change, table["difference"], is_share)]
    shown["95% t interval"] = _intervals(table["t low"], table["t high"], is_share, change)
    shown["95% BCa bootstrap"] = _intervals(table["bootstrap low"], table["bootstrap high"], is_share, change)
    shown["p"] = table["p"].map(lambda p: "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}")
    return shown


def in_words(pair: Pair) -> str:
    """The paired difference as a sentence that claims no more than the interval supports."""
    difference, base, trained = pair.difference(), pair.base.facts["average"], pair.trained.facts["average"]
    is_share, who, gained = pair.base.is_share, pair.base.model, change(difference.value, pair.base.is_share)
    if is_share:
        said = f"{who} went from {percent(base)}% to {percent(trained)}%: {gained} points"
    else:
        said = f"the mean reward of {who} went from {amount(base, False)} to {amount(trained, False)}: {gained}"
    text = f"On {pair.base.dataset}, {said}"
    if others := pair.made_by_others():
        text = f"The two scores were made with different code or versions ({', '.join(others)}). {text}"
    if difference.interval is None:
        return f"{text}. Without a spread over problems there is no interval."
    low, high = difference.interval
    bootstrap = difference.bootstrap_interval
    text += f" (95% t interval {span(difference.interval, is_share)}"
    text += f"; BCa bootstrap {span(bootstrap, is_share)})." if bootstrap else ")."
    if low > 0:
        return f"{text} The interval lies above 0: on problems like these, training helped."
    if high < 0:
        return f"{text} The interval lies below 0: on problems like these, training hurt."
    return f"{text} The interval holds 0: these {pair.base.facts['problems']} problems can't tell the two apart."


def titled(scores: Sequence[Score], pairs: Sequence[Pair]) -> dict[str, pd.DataFrame]:
    """All readable tables by their titles."""
    table = score_table(scores)
    rewards = "" if _all_shares(table) else " or mean reward"
    return {
        f"Scores, percent{rewards}": readable_scores(table),
        f"Trained minus base, percentage points{rewards}": readable_differences(difference_table(pairs)),
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


def amount(value: float, is_share: bool) -> str:
    """A share in percent; a mean reward as it is."""
    return percent(value) if is_share else "–" if math.isnan(value) else f"{value:.3f}".replace("-", "−")


def change(value: float, is_share: bool) -> str:
    """A difference of shares in percentage points, of mean rewards as it is, with its sign."""
    return points(value) if is_share else "–" if math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def span(interval: tuple[float, float], is_share: bool) -> str:
    """An interval of differences."""
    return " to ".join(change(end, is_share) for end in interval)


def _intervals(low: pd.Series, high: pd.Series, is_share: pd.Series, form: Callable[[float, bool], str]) -> list[str]:
    return [
        "–" if math.isnan(a) else f"{form(a, share)} to {form(b, share)}"
        for a, b, share in zip(low, high, is_share, strict=True)
    ]


def _all_shares(table: pd.DataFrame) -> bool:
    return bool((table["measure"] == "share correct").all())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _weights(score: Score) -> str:
    return "base" if score.is_base else "trained"
