"""What tables and report say of a training and of a pair of scores is what a reader works out by hand."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from matplotlib.colors import to_hex

from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import UserError
from milepost.evaluation.estimators import bootstrap_interval, paired_difference
from milepost.reporting.plots import all_plots
from milepost.reporting.report import report_page
from milepost.reporting.results import pairs, read_scores
from milepost.reporting.tables import (
    cut_off_in_words,
    difference_table,
    in_words,
    readable_differences,
    readable_format,
    readable_scores,
    score_table,
)
from milepost.reporting.theme import Theme
from recorded import BASE, PROTOCOL, TRAINED, rewards, score, training
from settings import section


class Page(HTMLParser):
    """A page's texts, and its terms with what they say."""

    def __init__(self, text):
        super().__init__()
        self.texts = []
        self.feed(text)
        self.terms = dict(zip(self.texts, self.texts[1:], strict=False))

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data)


@pytest.fixture
def page(tmp_path):
    """The report over scores and trainings."""
    plots = write_manifest(tmp_path / "plots.json", "plots", tmp_path, [], {}, {"plots": []})

    def make(paths, *trainings):
        scores = read_scores(paths)
        return report_page(scores, pairs(scores), trainings, plots, [], section("plots"))

    return make


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1, 0.3, *[0.5] * 36, 0.6, 0.8], "20.0% → 70.0%"),  # two of forty
        ([0.1, *[0.5] * 37, 0.8], "10.0% → 80.0%"),  # one of thirty-nine
        ([0.125, 0.5, 0.75], "12.5% → 75.0%"),
        ([0.125], "12.5% → 12.5%"),
    ],
)
def test_the_reward_is_reported_for_the_first_and_the_last_twentieth_of_the_rollouts(tmp_path, page, values, said):
    base = score(tmp_path, "base", BASE)
    found = Page(page([base], training(tmp_path, rewards(*values)))).terms
    assert found["reward, first and last twentieth"] == said
    assert found["rollouts"] == str(len(values))


def test_a_training_s_facts_are_medians_and_the_largest_gap(tmp_path, page):
    lines = [
        {"rollout": n, "reward_mean": 0.5, "log_prob_diff": gap, "tokens_per_second": speed}
        | {"seconds_step": step, "seconds_rollout": step / 2, "seconds_train": step / 4}
        | {"seconds_sync": step / 8, "seconds_sleep_wake": step / 16}
        for n, (step, speed, gap) in enumerate([(16, 1000, 0.01), (32, 2000, 0.07), (800, 9000, 0.02)], start=1)
    ]
    best = {"checkpoint": "checkpoint-000020", "score": 0.654}
    found = Page(page([score(tmp_path, "base", BASE)], training(tmp_path, lines, best=best))).terms
    assert found["a step, median"] == "32 s (rollout 16 s, train 8 s, sync 4 s, sleep and wake 2 s)"
    assert found["tokens per second, median"] == "2,000"
    assert found["|log-prob trainer − engine|, largest"] == "0.07"
    assert found["best by validation"] == "checkpoint-000020 (65.4%)"
    assert found["checkpoint"] == "checkpoint-last"


def test_a_training_that_was_never_validated_has_no_best(tmp_path, page):
    assert "best by validation" not in page([score(tmp_path, "base", BASE)], training(tmp_path, rewards(0.5)))


def test_validations_are_plotted_at_their_rollouts_and_the_last_of_two_counts(tmp_path):
    validations = [(0, 0.1), (2, 0.2), (4, 0.3), (4, 0.4)]  # the last weights again, by another protocol
    lines = [{"rollout": rollout, "validation_average": average} for rollout, average in validations]
    found = training(tmp_path, sorted([*rewards(0.5, 0.6, 0.7, 0.8), *lines], key=lambda line: line["rollout"]))
    assert found.column("validation_average").to_dict() == {0: 0.1, 2: 0.2, 4: 0.4}
    assert found.column("reward_mean").to_dict() == {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.8}


def test_the_samples_to_read_are_of_the_last_rollouts(tmp_path):
    samples = [{"rollout": rollout, "sample": sample} for rollout in range(1, 13) for sample in range(2)]
    found = training(tmp_path, rewards(0.5), samples).read_samples(5)
    assert [(row["rollout"], row["sample"]) for row in found] == [(r, s) for r in range(8, 13) for s in range(2)]


def test_samples_of_an_evaluation_come_with_what_the_grader_said_of_them(tmp_path, page):
    path = score(tmp_path, "trained", TRAINED)
    (found,) = read_scores([path])
    keys = ("response", "label", "answer", "reason", "correct")
    assert [tuple(row[key] for key in keys) for row in found.read_samples({(1, 0), (3, 1)})] == [
        ("Response 1.0.", "4", "a1.0", "r1.0", False),
        ("Response 3.1.", "8", "a3.1", "r3.1", True),
    ]
    texts = Page(page([path])).texts
    assert [text for text in texts if text.startswith("problem ")][-2:] == [
        "problem 2, sample 1",
        "problem 3, sample 1",
    ]
    text = "".join(texts)
    assert "Answer a1.0; label 4; reward 0 (r1.0); 7 tokens, ended by itself." in text
    assert text.count("reward 0 (") == 2 and text.count("reward 1 (") == 3  # at most three of each kind


def test_samples_of_a_training_are_of_its_last_five_rollouts_and_right_where_they_earned_a_reward(tmp_path, page):
    samples = [
        {"rollout": rollout, "prompt": "Question?", "response": f"Rollout {rollout}.", "label": "4", "answer": "5"}
        | {"reward": reward, "reason": f"earned {reward}", "tokens": 5, "finish": "length"}
        for rollout in range(1, 13)
        for reward in (0.0, 1.0)
    ]
    texts = Page(page([score(tmp_path, "base", BASE)], training(tmp_path, rewards(0.5), samples))).texts
    shown = texts[texts.index("Samples of the last rollouts of grpo") :]
    assert {text for text in shown if text.startswith("rollout ")} == {"rollout 8", "rollout 10", "rollout 12"}
    assert [text for text in shown if text in ("right", "wrong")] == ["right"] * 3 + ["wrong"] * 3
    told = [text for text in shown if text.startswith("Answer 5")]
    assert told[0] == "Answer 5; label 4; reward 1 (earned 1.0); 5 tokens, cut off by the cap."
    assert told[-1] == "Answer 5; label 4; reward 0 (earned 0.0); 5 tokens, cut off by the cap."


def test_a_pair_s_difference_is_of_the_trained_weights_over_the_base(tmp_path, page):
    paths = [score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED)]
    (pair,) = pairs(read_scores(reversed(paths)))
    row = difference_table([pair]).iloc[0]
    assert (row["first"], row["second"], row["dataset"], row["problems"]) == ("9B/base", "9B/grpo", "aime", 4)
    assert (row["avg@n of first"], row["avg@n of second"], row["difference"]) == (0.25, 0.75, 0.5)
    assert all(math.isnan(row[name]) for name in ("t low", "t high", "bootstrap low", "bootstrap high", "p"))
    text = page(paths)
    assert "+50.0" in text and "25.0% → 75.0%" in text
    assert (
        '<i style="width: 75.0%; background: var(--accent)"></i><i style="width: 25.0%; background: var(--base)' in text
    )


def test_a_loss_is_said_to_be_one(tmp_path, page):
    worse = [[False, False], [False, False], [False, False], [True, False]]
    paths = [score(tmp_path, "base", TRAINED), score(tmp_path, "grpo", worse)]
    (pair,) = pairs(read_scores(paths))
    assert "from 75.0% to 12.5%: −62.5 points" in in_words(pair)
    assert in_words(pair).endswith("The interval lies below 0: on problems like these, training hurt.")
    shown = readable_differences(difference_table([pair])).iloc[0]
    assert shown["difference"] == "−62.5" and shown["95% t interval"].endswith(" to −22.7")  # 62.5 - 3.182 x 12.5
    assert '<i style="width: 75.0%; background: var(--base)"></i><i style="width: 12.5%; background: var(--acc' in page(
        paths
    )


def test_the_bootstrap_has_the_protocol_s_resamples_and_seed(tmp_path):
    changed = [[True, True], [False, False], [False, True], [False, False]]  # by 0.5, 0, 0.5 and -0.5
    paths = [score(tmp_path, "base", BASE), score(tmp_path, "grpo", changed)]
    row = difference_table(pairs(read_scores(paths))).iloc[0]
    expected = bootstrap_interval([0.5, 0.0, 0.5, -0.5], samples=500, seed=1)
    assert (row["bootstrap low"], row["bootstrap high"]) == expected
    assert row["p"] == pytest.approx(paired_difference([0.5, 0, 0, 0.5], [1, 0, 0.5, 0], 10, 0).p_value)


def test_readable_tables_are_in_percent(tmp_path):
    table = score_table(read_scores([score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED)]))
    shown, ends = readable_scores(table).iloc[1], readable_format(table).iloc[0]
    columns = ("weights", "problems × samples", "avg@n", "95% interval", "pass@1", "pass@2", "maj@n")
    assert [shown[name] for name in columns] == ["grpo", "4 × 2", "75.0", "65.0 to 85.0", "75.0", "100.0", "37.5"]
    columns = ("weights", "truncated", "no </think>", "no box", "grading errors", "mean tokens")
    assert [ends[name] for name in columns] == ["base", "12.5", "25.0", "50.0", "6.2", "1,234"]


def test_the_protocol_is_said_with_all_that_was_set(tmp_path, page):
    plain = "aime: 4 problems, 2 samples each, temperature 0.6, top-p 0.95, up to 4,096 tokens."
    assert plain in page([score(tmp_path, "base", BASE)])
    used = PROTOCOL | {"top_k": 20, "presence_penalty": 1.5, "enable_thinking": False}
    text = page([score(tmp_path, "base", BASE, {"evaluation": used})])
    assert "temperature 0.6, top-p 0.95, top-k 20, presence penalty 1.5, without thinking, up to 4,096 tokens." in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": {"evaluation": PROTOCOL | {"temperature": 1.0}}}, "evaluation.temperature: 0.6 -> 1.0"),
        (
            {"config": {"evaluation": PROTOCOL | {"max_response_tokens": 9}}},
            "evaluation.max_response_tokens: 4096 -> 9",
        ),
        ({"config": {"reward": {"think_block": "optional"}}}, 'reward.think_block: "required" -> "optional"'),
        ({"config": {"reward_code": {"mine.py": "digest"}}}, 'reward_code.mine.py: nothing -> "digest"'),
        ({"facts": {"prompts": "another"}}, "other prompts"),
        ({"labels": ("2", "4", "6", "9")}, "other labels"),
        ({"labels": ("4", "2", "6", "8")}, "other labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_are_paired_only_if_they_were_measured_alike(tmp_path, changes, named):
    base = score(tmp_path, "base", BASE)
    assert len(pairs(read_scores([base, score(tmp_path, "grpo", TRAINED)]))) == 1
    said = rf"grpo\.json: can't be compared with .*base\.json: {re.escape(named)}: evaluate both again"
    with pytest.raises(UserError, match=said):
        pairs(read_scores([base, score(tmp_path, "grpo", TRAINED, **changes)]))


def test_a_model_is_compared_with_its_own_base_on_the_same_problem_set(tmp_path):
    files = []
    for model, dataset in (("4B", "aime"), ("9B", "aime"), ("9B", "math")):
        for weights in ("base", "grpo"):
            path = tmp_path / model / "eval" / dataset / f"{weights}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(score(tmp_path / "made", weights, BASE).read_text())
            files.append(path)
    found = pairs(read_scores(files))
    assert [(pair.first.model, pair.first.dataset, pair.first.weights) for pair in found] == [
        ("4B", "aime", "base"),
        ("9B", "aime", "base"),
        ("9B", "math", "base"),
    ]
    assert all((p.first.model, p.first.dataset) == (p.second.model, p.second.dataset) for p in found)


@pytest.mark.parametrize(("p", "shown"), [(0.0004, "< 0.001"), (0.0012, "0.001"), (0.0096, "0.010"), (0.5, "0.500")])
def test_p_values_are_said_to_three_places(tmp_path, p, shown):
    paths = [score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED)]
    table = difference_table(pairs(read_scores(paths))).assign(p=p)
    assert readable_differences(table).iloc[0]["p"] == shown


def test_a_pass_at_k_that_was_not_estimated_is_left_blank(tmp_path):
    paths = [score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED, facts={"pass_at": {"1": 0.75}})]
    table = score_table(read_scores(paths))
    assert table["pass@2"].iloc[0] == 0.5 and math.isnan(table["pass@2"].iloc[1])
    assert list(readable_scores(table)["pass@2"]) == ["50.0", "–"]


THEME = Theme.light(section("plots", color_base="#aa1122", color_trained="#11aa22"))


def drawn(trainings, scores, name):
    """The axes of the plot whose name begins with ``name``."""
    (plot,) = [plot for plot in all_plots(trainings, scores, pairs(scores)) if plot.name.startswith(name)]
    return plot.draw(THEME).axes


def test_bars_are_as_long_as_the_scores_with_their_intervals(tmp_path):
    found = read_scores([score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED)])
    (axes,) = drawn([], found, "scores")
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [THEME.base, THEME.trained]
    spans = [line.get_segments()[0][:, 0] for line in axes.collections]
    assert [tuple(span) for span in spans] == [pytest.approx((0.15, 0.35)), pytest.approx((0.65, 0.85))]
    assert [text.get_text() for text in axes.texts] == ["25.0%", "75.0%"]


def test_problems_are_sorted_by_the_base_and_drawn_in_its_colour(tmp_path):
    base = [[True, True], [False, False], [True, False], [False, False]]
    trained = [[False, True], [True, True], [True, True], [False, False]]
    found = read_scores([score(tmp_path, "base", base), score(tmp_path, "grpo", trained)])
    (axes,) = drawn([], found, "problems-9B-grpo-aime")
    _, before, after = axes.collections
    assert before.get_offsets()[:, 1].tolist() == [0.0, 0.0, 0.5, 1.0]
    assert after.get_offsets()[:, 1].tolist() == [0.0, 1.0, 1.0, 0.5]
    assert [to_hex(dots.get_facecolor()[0]) for dots in (before, after)] == [THEME.base, THEME.trained]


def test_the_reward_plot_shows_raw_and_smoothed_values_and_validations(tmp_path):
    values = [0.0, 0.3, 0.6, *[0.5] * 8, 0.2]
    validations = [{"rollout": 0, "validation_average": 0.1}, {"rollout": 12, "validation_average": 0.9}]
    validations[1]["validation_standard_error"] = 0.05
    (axes,) = drawn([training(tmp_path, [*rewards(*values), *validations])], [], "reward")
    raw, smooth, validated, *_ = axes.lines
    (bars,) = axes.collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments() if len(segment)][-1] == pytest.approx(
        [0.85, 0.95]
    )
    assert raw.get_ydata().tolist() == values and raw.get_xdata().tolist() == list(range(1, 13))
    assert smooth.get_ydata()[[0, 1, 2, -1]] == pytest.approx([0.15, 0.3, 1.4 / 3, 0.35])  # means of three
    assert validated.get_xdata().tolist() == [0, 12] and validated.get_ydata().tolist() == [0.1, 0.9]


def test_phases_of_a_step_follow_each_other_and_flat_curves_are_named_instead_of_drawn(tmp_path):
    phases = {"seconds_step": 10.0, "seconds_rollout": 6.0, "seconds_train": 3.0, "seconds_sync": 1.0}
    rows = [row | phases | {"loss": 1e-8 * row["rollout"], "clip_fraction": 0.0} for row in rewards(0.1, 0.2, 0.3)]
    rows = [row | {"grad_norm": row["rollout"] / 2} for row in rows]
    trained = training(tmp_path, rows)
    (axes,) = drawn([trained], [], "phases")
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 6), (6, 3), (9, 1)]
    assert [axes.get_title(loc="left") for axes in drawn([trained], [], "health")] == ["gradient norm"]
    (health,) = [plot for plot in all_plots([trained], [], []) if plot.name.startswith("health")]
    assert health.caption.endswith("Constant or within 1e-6 of 0, and left out: share of clipped tokens, loss.")


def with_finish(path, finish):
    """Record how the samples of a score's problems ended: s for by themselves, l for cut off."""
    made = json.loads(path.read_text())
    for problem, ends in zip(made["facts"]["per_problem"], finish, strict=True):
        problem["finish"] = [{"s": "stop", "l": "length"}[end] for end in ends]
    made["facts"]["truncated_share"] = "".join(finish).count("l") / 8
    path.write_text(json.dumps(made))
    return path


def test_what_answers_that_are_no_longer_cut_off_are_worth_is_told(tmp_path):
    """Two problems whose second answer was cut off are now complete and half right; the others change otherwise."""
    first = [[True, False], [False, False], [True, False], [True, True]]
    second = [[True, False], [True, False], [True, True], [True, True]]
    base = with_finish(score(tmp_path, "base", first), ["sl", "sl", "ss", "ss"])
    grpo = with_finish(score(tmp_path, "grpo", second), ["ss", "ss", "ss", "ss"])
    (pair,) = pairs(read_scores([base, grpo]))
    # Problem 1: half of its answers, times 1 before and 0.5 now; problem 2: half, times 0 before and 0.5 now.
    assert pair.from_cut_off == pytest.approx((0.5 * 0.75 + 0.5 * 0.25) / 4)
    assert pair.difference.value == pytest.approx(0.25)
    assert cut_off_in_words(pair) == (
        "+12.5 points of these +25.0 points are answers that the cap no longer cuts off (25.0% were, 0.0% are), counted"
        " problem by problem at what complete answers earn."
    )
    # All answers to problem 4 are cut off now, but right: complete ones would earn what they did before.
    back = pairs(read_scores([with_finish(base, ["ss"] * 4), with_finish(grpo, ["ss", "ss", "ss", "ll"])]))[0]
    assert back.from_cut_off == 0
    assert cut_off_in_words(back) == ""
    # Problem 1's second answer is cut off now: half of its answers, times 0.5 before and 1 now.
    back = pairs(read_scores([with_finish(base, ["ss"] * 4), with_finish(grpo, ["sl", "ss", "ss", "ss"])]))[0]
    assert back.from_cut_off == pytest.approx(-0.5 * (0.5 + 1) / 2 / 4)
    assert "−9.4 points of these +25.0 points are answers that the cap cuts off as well" in cut_off_in_words(back)


def test_nothing_is_told_where_no_share_of_cut_off_answers_changed_or_none_was_recorded(tmp_path):
    files = [score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED)]
    assert cut_off_in_words(pairs(read_scores(files))[0]) == ""
    for file in files:
        with_finish(file, ["sl", "ss", "ss", "ss"])
    assert cut_off_in_words(pairs(read_scores(files))[0]) == ""
