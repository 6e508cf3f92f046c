"""Any two scores of the same problems are compared, and several runs of a model stand side by side."""

from html.parser import HTMLParser

import pytest
from matplotlib.colors import to_hex

from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import UserError
from milepost.evaluation.selection import Selection, expected_maximum, selection
from milepost.reporting.plots import Theme, all_plots
from milepost.reporting.report import report_page
from milepost.reporting.results import Pair, pairs, read_scores
from milepost.reporting.tables import difference_table, gains_and_losses, in_words, score_table, sentences
from recorded import BASE, PROTOCOL, TRAINED, rewards, score, training
from settings import section

WORSE = [[False, False], [False, False], [False, False], [True, False]]  # of 12.5%
THEME = Theme.light(section("plots"))


def test_the_second_of_two_runs_is_compared_with_the_first(tmp_path):
    """By hand: from 75 to 25% with 50 points in every problem, and in the other order."""
    paths = [score(tmp_path, weights, correct) for weights, correct in (("a", TRAINED), ("b", BASE))]
    scores = read_scores(paths)
    assert pairs(scores) == []  # without a base
    for first, second, difference in (("a", "b", -0.5), ("b", "a", 0.5)):
        (pair,) = pairs(scores, [[["9B", first], ["9B", second]]])
        row = difference_table([pair]).iloc[0]
        assert (row["first"], row["second"], row["difference"]) == (f"9B/{first}", f"9B/{second}", difference)
        assert not pair.is_of_a_training
    assert in_words(pair).startswith("On aime, 9B/a is at 75.0%, 9B/b at 25.0%: +50.0 points")


def test_the_words_of_a_comparison_say_which_is_better(tmp_path):
    paths = [score(tmp_path, "a", TRAINED), score(tmp_path, "b", WORSE)]
    for first, second, word in (("a", "b", "worse"), ("b", "a", "better")):
        (pair,) = pairs(read_scores(paths), [[["9B", first], ["9B", second]]])
        assert in_words(pair).endswith(f"on problems like these, 9B/{second} is {word} than 9B/{first}.")


def test_two_models_are_compared_on_the_problem_sets_that_both_have(tmp_path):
    paths = [
        score(tmp_path, "base", BASE),
        score(tmp_path, "base", TRAINED, model="mine"),
        score(tmp_path, "base", BASE, dataset="math"),
    ]
    compare = [[["9B", "base"], ["mine", "base"]]]
    (pair,) = pairs(read_scores(paths), compare)
    assert (pair.first.name, pair.second.name, pair.first.dataset) == ("9B/base", "mine/base", "aime")
    other = score(tmp_path, "base", TRAINED, model="mine", facts={"prompts": "revised"})
    with pytest.raises(UserError, match=r"mine/.*base.json: can't be compared with .*9B/.*base.json: other prompts: "):
        pairs(read_scores([paths[0], other]), compare)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"engine": {"kind": "cpu", "gpus_per_engine": 4}}, "engine.gpus_per_engine: nothing -> 4"),
        ({"engine": {"kind": "sglang"}}, 'engine.kind: "cpu" -> "sglang"'),
        ({"engine": {"kind": "cpu", "server_arguments": {"dtype": "half"}}}, "engine.server_arguments: nothing -> {"),
        ({"evaluation": PROTOCOL | {"seed": 9}}, "evaluation.seed: 1 -> 9"),
        ({"evaluation": PROTOCOL | {"bootstrap_samples": 600, "gpus": 1}}, None),
        ({"engine": {"kind": "cpu", "max_running_requests": 9}, "hardware": {"gpus": 1}}, None),
    ],
)
def test_what_changes_no_sample_s_distribution_is_noted_at_most(tmp_path, config, note):
    (pair,) = pairs(read_scores([score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED, config)]))
    (said,) = [f"They were sampled with different settings ({note}"] if note else [""]
    assert in_words(pair).startswith(said or "On aime, ")


def test_scores_of_an_earlier_version_are_compared_though_keys_have_come_since(tmp_path):
    """A key at its default changes no score; at another value it does, whichever of the two has it."""
    known = {key: value for key, value in PROTOCOL.items() if key != "presence_penalty"}
    old = score(tmp_path, "base", BASE, {"evaluation": known})

    def obstacles(**came_since):
        new = score(tmp_path, "grpo", TRAINED, {"evaluation": known | came_since})
        first, second = read_scores([old, new])
        return Pair(first, second).obstacles(), Pair(second, first).obstacles()

    assert obstacles(presence_penalty=0.0) == ([], [])
    other = "evaluation.presence_penalty:"
    assert obstacles(presence_penalty=1.5) == ([f"{other} nothing -> 1.5"], [f"{other} 1.5 -> nothing"])


def test_every_run_has_a_row_of_its_own_by_its_name(tmp_path):
    names = ("base", "grpo", "other@best")
    scores = read_scores([score(tmp_path, name, BASE) for name in names])
    assert tuple(score_table(scores)["weights"]) == names
    table = difference_table(pairs(scores))
    assert list(zip(table["first"], table["second"], strict=True)) == [
        ("9B/base", "9B/grpo"),
        ("9B/base", "9B/other@best"),
    ]


def test_a_gain_on_one_set_and_a_loss_on_another_is_told_in_one_line(tmp_path):
    """From 25% to 75 in every problem, and from 75% by 50, 50, 50 and 100 points less: 62.5 -+ 3.182 x 12.5."""
    paths = [
        *(score(tmp_path, weights, correct) for weights, correct in (("base", BASE), ("grpo", TRAINED))),
        *(score(tmp_path, name, rows, dataset="math") for name, rows in (("base", TRAINED), ("grpo", WORSE))),
    ]
    scores = read_scores(paths)
    (line,) = gains_and_losses(pairs(scores))
    assert line == (
        "Against 9B/base, 9B/grpo gained on aime (+50.0 points, without an interval), and lost on math (−62.5 points,"
        " 95% t interval −100.0 to −22.7)."
    )
    assert line in sentences(scores, pairs(scores), [])
    assert gains_and_losses(pairs(scores[:2])) == []
    unsure = [[True, True], [True, True], [True, True], [False, False]]  # from 75% by 0, 50, 50 and -100
    score(tmp_path, "grpo", unsure, dataset="math")
    changed = read_scores(paths)
    assert gains_and_losses(pairs(changed)) == []  # equal on average is no loss
    score(tmp_path, "grpo", [[False, False], [True, True], [True, True], [False, False]], dataset="math")
    (line,) = gains_and_losses(pairs(read_scores(paths)))
    assert "and lost on math (−25.0 points" in line and line.endswith("which may be chance).")


# ---- several runs in one plot and page -----------------------------------------------------------------------------


def drawn(trainings, scores, name):
    (plot,) = [plot for plot in all_plots(trainings, scores, pairs(scores)) if plot.name == name]
    return plot.draw(THEME)


def test_the_bars_of_a_model_s_runs_stand_together(tmp_path):
    found = [score(tmp_path, name, rows) for name, rows in (("base", BASE), ("grpo", TRAINED), ("other", WORSE))]
    found.append(score(tmp_path, "base", TRAINED, model="mine"))
    (axes,) = drawn([], read_scores(found), "scores").axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75, 0.125, 0.75]
    colors = [THEME.base, THEME.trained, THEME.others[0], THEME.base]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == colors
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "grpo", "other"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["9B", "mine"]
    (of_9b, of_mine), heights = axes.get_yticks(), [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert of_9b == pytest.approx(heights[1]) and of_mine == pytest.approx(heights[3])
    assert heights[3] - heights[2] > heights[2] - heights[1]


def test_the_curves_of_a_model_s_runs_share_their_axes(tmp_path):
    runs = [
        training(tmp_path, [*rewards(0.1, 0.2), {"rollout": 2, "validation_average": 0.4}], run="grpo"),
        training(tmp_path, rewards(*[0.5] * 12), run="other"),
    ]
    (axes,) = drawn(runs, [], "reward-9B").axes
    labelled = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert {name: line.get_ydata().tolist() for name, line in labelled.items()} == {
        "grpo": [0.1, 0.2],
        "grpo: validation": [0.4],
        "other": pytest.approx([0.5] * 12),
    }
    assert [line.get_color() for line in labelled.values()] == [THEME.trained, THEME.trained, THEME.others[0]]


class Text(HTMLParser):
    """A page's text."""

    def __init__(self, page):
        super().__init__()
        self.parts = []
        self.feed(page)

    def handle_data(self, data):
        self.parts.append(data)


def test_the_page_names_every_run_and_its_settings(tmp_path):
    scores = read_scores([score(tmp_path, name, BASE) for name in ("base", "grpo", "other")])
    runs = [
        training(tmp_path, rewards(0.1), run=name, config={"optimizer": {"learning_rate": rate}})
        for name, rate in (("grpo", 0.25), ("other", 0.5))
    ]
    plots = write_manifest(tmp_path / "plots.json", "plots", tmp_path, [], {}, {"plots": []})
    compared = pairs(scores, [[["9B", "grpo"], ["9B", "other"]]])
    text = "\n".join(Text(report_page(scores, compared, runs, plots, [], section("plots"))).parts)
    for expected in ("Run grpo", "Run other", "9B/other against 9B/grpo on aime", "grpo weights on aime, samples"):
        assert expected in text
    assert text.index("9B/grpo\n") < text.index("learning_rate: 0.25") < text.index("learning_rate: 0.5")


# ---- the best checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, 0.0), (2, 0.5641895835), (3, 0.8462843753), (5, 1.1629644736), (10, 1.5387527308), (100, 2.50759)],
)
def test_the_expected_maximum_is_that_of_normal_order_statistics(count, expected):
    """Harter 1961, Biometrika 48, table 1; for two it is 1 / sqrt(pi), for three 3 / (2 sqrt(pi))."""
    assert expected_maximum(count) == pytest.approx(expected, abs=5e-6)


CHOICE = Selection("grpo", "checkpoint-000020", 0.5, 3, 0.05, "aime", is_share=True)


def test_the_best_of_several_validations_is_said_to_be_too_high():
    """By 0.846 x 5 points, which 18 times as many problems divide by 4.24: below one point."""
    assert str(CHOICE) == (
        "grpo@best is checkpoint-000020, 50.0% on aime, the best of 3 validations. The best of several noisy scores is"
        " too high: if all 3 checkpoints were equally good, it would exceed their true score by up to 4.2 points (its"
        " standard error is 5.0 points). Four times as many problems would halve that, 18 times as many would bring it"
        " to 1 point. A score on other problems does not have this bias."
    )


def lines(*scores, error=0.05):
    """A log with these validation scores after 0, 1, 2 ... rollouts."""
    validated = [
        {"rollout": n, "validation_average": value, **({"validation_standard_error": error} if error else {})}
        for n, value in enumerate(scores)
    ]
    return [line for n, row in enumerate(validated) for line in ({"rollout": n, "reward_mean": 0.5}, row)]


@pytest.mark.parametrize(
    ("log", "validations", "said"),
    [
        (lines(0.9, 0.1, 0.5, 0.2), 3, "by up to 4.2 points"),  # the start has no checkpoint to choose
        (lines(0.9, 0.5), 1, "the only checkpoint that was validated."),
        (lines(0.0, 0.1, 0.5, error=None), 2, "by how much can't be told"),
    ],
)
def test_how_a_best_checkpoint_was_chosen_is_read_from_its_run(tmp_path, log, validations, said):
    at = next(row["rollout"] for row in log if row.get("validation_average") == 0.5)
    best = {"checkpoint": f"checkpoint-{at:06d}", "score": 0.5}
    found = training(tmp_path, log, best=best, config={"validation": {"dataset": "aime"}})
    chosen = selection(found.manifest)
    assert chosen.validations == validations and said in str(chosen)
    scores = read_scores([score(tmp_path, name, BASE) for name in ("base", "grpo")])
    assert not any("@best" in text for text in sentences(scores, [], [found]))
    scores = read_scores([score(tmp_path, name, BASE) for name in ("base", "grpo@best")])
    same_problems = " Here it is scored on the very problems that it was chosen by: that score is too high as well."
    assert sentences(scores, [], [found]) == [f"9B/{chosen}{same_problems}"]
    scores = read_scores([score(tmp_path, "grpo@best", BASE, dataset="math")])
    assert sentences(scores, [], [found]) == [f"9B/{chosen}"]


def test_a_run_without_validations_has_no_best(tmp_path):
    assert selection(training(tmp_path, rewards(0.5)).manifest) is None


def test_rewards_of_other_sizes_are_not_called_points():
    text = str(Selection("grpo", "checkpoint-000020", 2.5, 3, 0.5, "mine", is_share=False))
    assert "2.5 on mine" in text and "by up to 0.423 (its standard error is 0.5)" in text
    assert " points" not in text and "would halve that. " in text
