"""What a dry run says of a stale result: the settings that changed, by name and value."""

import pytest

from common.files import write_json
from configuration import staleness

BEFORE = {
    "config": {"training": {"rollouts": 60, "dtype": "float32"}, "engine": {"speculation": None, "arguments": {}}},
    "code": "aaa",
    "upstream": {"convert": "c1", "dataset": "d1"},
}


def now(**changes):
    return BEFORE | changes


def config(**sections):
    return BEFORE["config"] | sections


@pytest.fixture
def manifest(tmp_path):
    write_json(tmp_path / "train.json", {"kind": "train", "provenance": BEFORE})
    return tmp_path / "train.json"


@pytest.mark.parametrize(
    ("today", "said"),
    [
        (now(), ""),
        (
            now(config=config(training={"rollouts": 200, "dtype": "float32"}), code="bbb"),
            "training.rollouts: 60 -> 200, its code",
        ),
        (
            now(config=config(engine={"speculation": {"steps": 2}, "arguments": {"seed": 1}})),
            'engine.arguments.seed: nothing -> 1, engine.speculation: null -> {"steps": 2}',
        ),
        (now(config=config(engine=None)), 'engine: {"speculation": null, "argume... -> null'),
        (now(upstream={"convert": "c2", "dataset": "d2"}), "another result of convert and dataset"),
        (now(upstream={"convert": "c1"}), "another result of dataset"),
        (
            now(config=config(training={f"key_{number}": number for number in range(5)})),
            'training.dtype: "float32" -> nothing, training.key_0: nothing -> 0, training.key_1: nothing -> 1, 4 more',
        ),
        (
            now(config=config(training={"rollouts": "x" * 99, "dtype": "float32"})),
            f'training.rollouts: 60 -> "{"x" * 28}...',
        ),
    ],
)
def test_what_differs_is_named(manifest, today, said):
    assert staleness.changes(manifest, today) == said


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"provenance": {"config": 1}}', "not JSON"])
def test_without_a_result_there_is_nothing_to_say(tmp_path, content):
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    assert staleness.changes(tmp_path / "train.json", now()) == ""


def test_a_training_says_whether_it_goes_on(manifest, tmp_path):
    changed, work = now(code="bbb"), tmp_path / "work"
    assert staleness.of_training(manifest, changed, work) == "its code; a new run begins, and the old one stays"
    assert staleness.of_training(tmp_path / "none.json", changed, work) == ""
    (work / "checkpoint-000040").mkdir(parents=True)
    assert staleness.of_training(manifest, changed, work) == "its code; the run goes on"
    assert staleness.of_training(tmp_path / "none.json", changed, work) == "the run goes on"
    (work / "checkpoint-000060").mkdir()  # all that are asked for
    assert staleness.of_training(manifest, changed, work) == "its code; the run goes on"
    (work / "checkpoint-000080").mkdir()
    assert "the run has 80 rollouts: ask for at least as many" in staleness.of_training(manifest, changed, work)
