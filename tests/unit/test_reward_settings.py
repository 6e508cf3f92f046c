"""A reward's settings: which fit together, which replace others, and which results depend on a user's code."""

import pytest

import train
from milepost.common.errors import UserError
from milepost.configuration import code, runs
from milepost.configuration.code import user_code_digest
from milepost.configuration.layers import Layer, user_layers
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance
from milepost.configuration.schema import Reward

SCORE = {"model": "9B", "dataset": "aime-2024", "weights": "base"}


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("{kind: exact, function: f.py:g}", "give exactly one of kind, function, sum; given: kind, function"),
        ("{kind: maths}", "Input should be 'math', 'choice' or 'exact', not 'maths'"),
        ("{function: g}", "a file and a function in it are expected, such as my_rewards.py:my_function, not 'g'"),
        ("{kind: math, trim: false}", "trim is for kind: exact alone: remove it here"),
        ("{kind: math, retries: 2}", "retries is for a function alone: remove it here"),
        ("{kind: exact, batch: true}", "batch is for a function alone: remove it here"),
        ("{sum: [{kind: math}, {kind: math}]}", "the name 'math' is taken"),
        ("{sum: [{function: f.py:mean}]}", "the name 'mean' is taken"),
        ("{sum: [{kind: math, max_seconds: 3}]}", "unknown key"),
        ("{sum: []}", "at least 1"),
        ("{sum: [{kind: math}], on_error: 1.0}", "on_error is for a function alone: remove it here"),
    ],
)
def test_a_reward_whose_settings_make_no_sense_together_is_refused_in_one_line(root, tmp_path, reward, told):
    file = tmp_path / "mine.yaml"
    file.write_text(f"reward: {reward}\n")
    with pytest.raises(UserError) as error:
        load(root / "config/config.yaml", root / "config/models", user_layers([file], {}))
    assert str(error.value).startswith(f"{file}: reward") and told in str(error.value)


def test_naming_another_reward_replaces_the_first_and_keeps_what_they_share(root):
    layers = [
        Layer("a", {"reward": {"kind": "choice", "max_seconds": 7}}),
        Layer("b", {"reward": {"function": "f.py:g"}}),
    ]
    reward = load(root / "config/config.yaml", root / "config/models", layers).models["9B"].reward
    assert (reward.kind, str(reward.functions[0]), reward.max_seconds) == (None, "f.py:g", 7)


def test_a_data_sets_own_reward_takes_the_place_of_the_models(root):
    found = load(
        root / "config/config.yaml",
        root / "config/models",
        {"datasets": {"aime-2024": {"reward": {"kind": "exact"}}}, "reward": {"kind": "choice"}},
    )
    assert found.reward("9B", "aime-2024").kind == "exact" and found.reward("9B", "dapo-math-17k").kind == "choice"
    assert found.labels("aime-2024") == "exact" and found.labels("dapo-math-17k") == "choice"


def test_each_result_records_the_reward_of_its_own_set_and_a_functions_code(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(sample): return 1\n")
    given = {"datasets": {"aime-2024": {"reward": {"function": "mine.py:f"}}}}
    provenance = Provenance(load(root / "config/config.yaml", root / "config/models", given), root / "workflow_scripts")
    training, score = provenance.of("train", model="9B"), provenance.of("evaluate", **SCORE)
    assert training["config"]["reward"]["kind"] == "math" and "reward_code" not in training["config"]
    assert training["config"]["validation_reward"]["function"] == score["config"]["reward"]["function"] == "mine.py:f"
    assert training["config"]["validation_reward_code"] == score["config"]["reward_code"]
    assert "reward" not in provenance.of("dataset", name="aime-2024")["config"]["dataset"]
    assert provenance.job("dataset", name="aime-2024")["labels"] == "any"
    assert provenance.job("dataset", name="dapo-math-17k")["labels"] == "math"
    train.Settings.model_validate(training["config"])


@pytest.mark.parametrize(
    ("key", "value", "continues"),
    [
        ("correct_from", 0.5, True),
        ("processes", 9, True),
        ("max_error_share", 0.5, True),
        ("on_error", -1.0, False),
        ("function", "mine.py:g", False),
        ("max_seconds", 9.0, False),
    ],
)
def test_what_decides_a_reward_begins_another_run(key, value, continues):
    reward = Reward(function="mine.py:f")
    one, other = (
        runs.identity({"config": {"reward": settings.model_dump(mode="json")}, "inputs": {}})
        for settings in (reward, reward.model_copy(update={key: value}))
    )
    assert (one == other) == continues


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("    return TEXT", "    # why\n    return  (TEXT)", True),
        ('"""Says."""', '"""Says otherwise."""', True),
        ("'a judge'", "'a strict judge'", False),
        ("Is it good", "Is it bad", False),
        ("def f", "def g", False),
        ("def f", "def f(:", False),
    ],
)
def test_a_users_file_counts_by_what_it_does_texts_included(tmp_path, old, new, same):
    file, helper = tmp_path / "mine.py", tmp_path / "lib" / "helper.py"
    helper.parent.mkdir()
    helper.write_text("TEXT = 'a judge'\ndef ask(judge): judge.say('Is it good?')\n")
    file.write_text('import json\nfrom lib.helper import TEXT\ndef f(sample):\n    """Says."""\n    return TEXT\n')
    before = user_code_digest(file)
    for cached in (user_code_digest, code._read):
        cached.cache_clear()
    for each in (file, helper):
        each.write_text(each.read_text().replace(old, new))
    assert (user_code_digest(file) == before) == same
