"""The tables of scores and of paired differences (second minus first), as numbers, in readable form and in words."""

import math
from collections.abc import Callable, Sequence

import pandas as pd

from milepost.configuration.weights import BEST
from milepost.evaluation.estimators import PairedDifference
from milepost.evaluation.selection import selection
from milepost.reporting.results import Pair, Score, Training


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
                "weights": score.weights,
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
    """One row per pair: second minus first, with the 95% t and BCa bootstrap intervals over problems."""
    rows, unknown = [], (math.nan, math.nan)
    for pair in pairs:
        difference = pair.difference
        t_interval, bootstrap = difference.interval or unknown, difference.bootstrap_interval or unknown
        rows.append(
            {
                "first": pair.first.name,
                "second": pair.second.name,
                "dataset": pair.first.dataset,
                "problems": pair.first.facts["problems"],
                "measure": "share correct" if pair.first.is_share else "mean reward",
                "avg@n of first": pair.first.facts["average"],
                "avg@n of second": pair.second.facts["average"],
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
    shown = table[["first", "second", "dataset"]].astype(str)
    is_share = table["measure"] == "share correct"
    for name in ("avg@n of first", "avg@n of second"):
        shown[name] = [*map(amount, table[name], is_share)]
    shown["difference"] = [*map(change, table["difference"], is_share)]
    shown["95% t interval"] = _intervals(table["t low"], table["t high"], is_share, change)
    shown["95% BCa bootstrap"] = _intervals(table["bootstrap low"], table["bootstrap high"], is_share, change)
    shown["p"] = table["p"].map(lambda p: "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}")
    return shown


def sentences(scores: Sequence[Score], pairs: Sequence[Pair], trainings: Sequence[Training]) -> list[str]:
    """All that is to be said of the scores in words."""
    found = [line for pair in pairs for line in (in_words(pair), cut_off_in_words(pair)) if line]
    found += gains_and_losses(pairs)
    for training in trainings:
        name = f"{training.model}/{training.run}@{BEST}"
        scored_on = {score.dataset for score in scores if score.name == name}
        if scored_on and (chosen := selection(training.manifest)):
            said = f"{training.model}/{chosen}"
            if chosen.dataset in scored_on:
                said += " Here it is scored on the very problems that it was chosen by: that score is too high as well."
            found.append(said)
    return found


def in_words(pair: Pair) -> str:
    """The paired difference as a sentence that claims no more than the interval supports."""
    difference, is_share = pair.difference, pair.first.is_share
    first, second = (amount(score.facts["average"], is_share) for score in (pair.first, pair.second))
    gained, unit = change(difference.value, is_share), " points" if is_share else ""
    measure, percent_sign = ("", "%") if is_share else ("the mean reward of ", "")
    if pair.is_of_a_training:
        said = f"{measure}{pair.second.name} went from {first}{percent_sign} to {second}{percent_sign}"
    else:
        said = f"{measure}{pair.second.name} is at {second}{percent_sign}, {pair.first.name} at {first}{percent_sign}"
    said += f": {gained}{unit}"
    text = " ".join([*pair.notes(), f"On {pair.first.dataset}, {said}"])
    if difference.interval is None:
        return f"{text}. Without a spread over problems there is no interval."
    low, high = difference.interval
    bootstrap = difference.bootstrap_interval
    text += f" (95% t interval {span(difference.interval, is_share)}"
    text += f"; BCa bootstrap {span(bootstrap, is_share)})." if bootstrap else ")."
    if low > 0:
        return f"{text} The interval lies above 0: on problems like these, {_verdict(pair, 'helped', 'better')}."
    if high < 0:
        return f"{text} The interval lies below 0: on problems like these, {_verdict(pair, 'hurt', 'worse')}."
    return f"{text} The interval holds 0: these {pair.first.facts['problems']} problems can't tell the two apart."


def cut_off_in_words(pair: Pair) -> str:
    """How much of a difference is answers that are no longer cut off, or newly; empty if it rounds to nothing."""
    if pair.from_cut_off is None or not change(pair.from_cut_off, pair.first.is_share).strip("+−0."):
        return ""
    then, now = (score.facts["truncated_share"] for score in (pair.first, pair.second))
    is_share = pair.first.is_share
    part, whole = (change(value, is_share) for value in (pair.from_cut_off, pair.difference.value))
    unit = " points" if is_share else ""
    cuts = "cuts off as well" if now > then else "no longer cuts off"
    return (
        f"{part}{unit} of these {whole}{unit} are answers that the cap {cuts} ({percent(then)}% were, {percent(now)}%"
        " are), counted problem by problem at what complete answers earn."
    )


def _verdict(pair: Pair, of_training: str, of_weights: str) -> str:
    if pair.is_of_a_training:
        return f"training {of_training}"
    return f"{pair.second.name} is {of_weights} than {pair.first.name}"


def gains_and_losses(pairs: Sequence[Pair]) -> list[str]:
    """A sentence for all pairs of two weights of which the second gained on one problem set and lost on another."""
    found, of_weights = [], {}
    for pair in pairs:
        of_weights.setdefault((pair.first.name, pair.second.name), []).append((pair, pair.difference))
    for (first, second), of_sets in of_weights.items():
        up = [_on_a_set(pair, difference) for pair, difference in of_sets if difference.value > 0]
        down = [_on_a_set(pair, difference) for pair, difference in of_sets if difference.value < 0]
        if up and down:
            found.append(f"Against {first}, {second} gained on {' and '.join(up)}, and lost on {' and '.join(down)}.")
    return found


def _on_a_set(pair: Pair, difference: PairedDifference) -> str:
    is_share = pair.first.is_share
    text = f"{pair.first.dataset} ({change(difference.value, is_share)}{' points' if is_share else ''}"
    if difference.interval is None:
        return f"{text}, without an interval)"
    low, high = difference.interval
    chance = ", which may be chance" if low <= 0 <= high else ""
    return f"{text}, 95% t interval {span(difference.interval, is_share)}{chance})"


def titled(scores: Sequence[Score], pairs: Sequence[Pair]) -> dict[str, pd.DataFrame]:
    """All readable tables by their titles."""
    table = score_table(scores)
    rewards = "" if _all_shares(table) else " or mean reward"
    return {
        f"Scores, percent{rewards}": readable_scores(table),
        f"Differences, second minus first, percentage points{rewards}": readable_differences(difference_table(pairs)),
        "Format, percent of samples": readable_format(table),
    }


def markdown(tables: dict[str, pd.DataFrame], sentences: Sequence[str] = ()) -> str:
    """Titled readable tables as Markdown, and what they say in words."""
    parts = []
    for title, table in tables.items():
        body = table.to_markdown(index=False, disable_numparse=True) if len(table) else "None."
        parts.append(f"## {title}\n\n{body}\n")
    if sentences:
        parts.append("## In words\n\n" + "".join(f"- {sentence}\n" for sentence in sentences))
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
