"""A reward's settings: what fits together, what takes whose place, and which results its own code belongs to."""

import pytest

from milepost.common.errors import UserError
from milepost.configuration.loading import Layer, load, user_layers


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
