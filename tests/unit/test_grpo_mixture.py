"""Training on several problem sets: shares, order, each set's own reward, and what a restart may not change."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grpo_run
from milepost.common.errors import UserError
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance
from milepost.grpo.data import Prompt, PromptCursor
from stages import unmeasured

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def cursor(sizes, weights=None, seed=7):
    sets = {f"set-{place}": [Prompt(f"set-{place}", line, [line], "") for line in range(size)]
            for place, size in enumerate(sizes)}  # fmt: skip
    return PromptCursor(sets, seed, weights)


def names(prompts):
    return [(prompt.dataset, prompt.place) for prompt in prompts]


@given(SIZES, st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5), st.data())
def test_no_prompt_is_skipped_or_repeated_by_a_restart(sizes, takes, restart, data):
    weights = data.draw(st.none() | st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    straight, resumed = cursor(sizes, weights), cursor(sizes, weights)
    expected = names(prompt for take in takes for prompt in straight.take(take))
    found = []
    for index, take in enumerate(takes):
        if index == restart:
            state = json.loads(json.dumps(resumed.state()))
            resumed = cursor(sizes, weights)
            resumed.restore(state)
        found += names(resumed.take(take))
    assert found == expected


@given(SIZES, st.integers(1, 3))
def test_without_weights_every_prompt_comes_once_an_epoch_of_all(sizes, epochs):
    found = Counter(names(cursor(sizes).take(epochs * sum(sizes))))
    assert set(found.values()) == {epochs} and len(found) == sum(sizes)


@given(st.floats(0.01, 0.99), st.integers(1, 200))
def test_two_sets_keep_their_shares_to_within_a_prompt(share, number):
    found = Counter(prompt.dataset for prompt in cursor([5, 9], [share, 1 - share]).take(number))
    assert abs(found["set-0"] - share * number) <= 1 + 1e-9


def test_sets_of_equal_size_are_shuffled_differently():
    mixed = cursor([50, 50]).take(100)
    first, second = ([p.place for p in mixed if p.dataset == name] for name in ("set-0", "set-1"))
    assert sorted(first) == sorted(second) and first != second


def test_other_data_than_a_run_was_begun_with_is_refused_by_the_name_of_its_set():
    with pytest.raises(UserError, match="begun with 5 prompts of set-1, the data set now has 6"):
        cursor([3, 6]).restore(cursor([3, 5]).state())


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ("{dataset: [aime-2024, aime-2042]}", "training.dataset: unknown dataset 'aime-2042'"),
        ("{dataset: [aime-2024, aime-2024]}", "training.dataset: aime-2024: given twice"),
        ("{dataset: []}", "training.dataset: "),
        ("{dataset: [aime-2024, sums-train], weights: [1]}", "training.weights: .* one number for each set .* are 2"),
        ("{dataset: [aime-2024, sums-train], weights: [1, 0]}", "training.weights.1: .* greater than 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_one_line(root, tmp_path, training, said):
    local = tmp_path / "config/local.yaml"
    local.parent.mkdir()
    local.write_text(f"training: {training}\n")
    with pytest.raises(UserError, match=f"^config/local.yaml: .*{said}") as refused:
        load(root / "config/config.yaml", root / "config/models", {"models": ["9B"]}, local)
    assert "\n" not in str(refused.value)


def test_the_record_of_a_training_names_each_set_and_the_rewards_that_differ(root):
    def record(dataset, **reward):
        user = {
            "training": {"dataset": dataset},
            "datasets": {"sums-train": {"reward": {"kind": "exact"}}, "sums-evaluation": {"reward": reward or None}},
        }
        configuration = load(root / "config/config.yaml", root / "config/models", user)
        return Provenance(configuration, root / "workflow_scripts").of("train", model="9B")

    several = record(["dapo-math-17k", "sums-train", "sums-evaluation"])
    assert several["config"]["reward"]["kind"] == "math"
    assert {name: reward["kind"] for name, reward in several["config"]["reward_of"].items()} == {"sums-train": "exact"}
    assert {name for name in several["upstream"] if name.startswith("dataset")} == {
        "dataset dapo-math-17k", "dataset sums-train", "dataset sums-evaluation",
    }  # fmt: skip
    alone = record("sums-train")["config"]
    assert "reward_of" not in alone and alone["reward"]["kind"] == "exact"
    alike = record(["dapo-math-17k", "sums-evaluation"], kind="math")
    assert "reward_of" not in alike["config"]


def test_sets_with_different_rewards_train_together_and_go_on_exactly(tmp_path):
    folder = grpo_run.prepare(tmp_path)
    grpo_run.convert_model(folder)

    def train(work, rollouts):
        grpo_run.run(
            grpo_run.arguments(
                folder,
                folder / work,
                data=["train", "evaluation"],
                training={"dataset": ["sums", "words"], "weights": [2, 1], "rollouts": rollouts, "save_interval": 1},
                validation={"interval": 0},
                reward_of={"words": {"kind": "exact"}},
            )
        )
        return [json.loads(line) for line in (folder / work / "samples.jsonl").read_text().splitlines()]

    straight = train("straight", 3)
    train("stopped", 1)
    assert train("stopped", 3) == straight
    assert unmeasured(folder / "stopped/metrics.jsonl") == unmeasured(folder / "straight/metrics.jsonl")
    assert {(sample["dataset"], sample["reason"]) for sample in straight} == {("sums", "math"), ("words", "exact")}
    for metrics in map(json.loads, (folder / "straight/metrics.jsonl").read_text().splitlines()):
        assert (metrics["prompts/sums"], metrics["prompts/words"]) == (2, 1)
        shares = 2 * metrics["reward_mean/sums"] + metrics["reward_mean/words"]
        assert metrics["reward_mean"] == pytest.approx(shares / 3)
