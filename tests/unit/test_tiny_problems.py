"""Generated problem sets: disjoint, correct, and in the format of the real ones."""

import json

import pytest

import make_problems
from milepost.checkpoints.manifest import read_manifest
from milepost.common.errors import UserError
from milepost.configuration.schema import Problems
from milepost.tiny.problems import OPERANDS, all_additions, computed, draw, estimated


def operands(additions) -> set[frozenset[int]]:
    return {frozenset((addition.left, addition.right)) for addition in additions}


def test_no_pair_of_operands_is_in_both_splits_in_any_order():
    train, evaluation = all_additions("train"), all_additions("evaluation")
    assert not operands(train) & operands(evaluation)
    assert len(train) + len(evaluation) == len(OPERANDS) ** 2
    assert len(train) > 2048 and len(evaluation) > 64


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draw_repeats_for_its_seed_and_never_within_itself(seed):
    additions = draw(Problems(split="train", seed=seed, rows=500))
    assert len(set(additions)) == 500 and {addition.split for addition in additions} == {"train"}
    assert additions == draw(Problems(split="train", seed=seed, rows=500))
    assert additions != draw(Problems(split="train", seed=seed + 1, rows=500))


def test_asking_for_more_rows_than_problems_says_how_many_there_are():
    with pytest.raises(UserError, match=f"has {len(all_additions('evaluation'))}: lower rows"):
        draw(Problems(split="evaluation", rows=100_000))


def test_computed_answers_box_the_label_and_estimates_seldom_do():
    train = all_additions("train")
    boxed = {addition: f"\\boxed{{{addition.label}}}" for addition in train}
    assert all(addition.label == str(addition.left + addition.right) for addition in train)
    assert all(computed(addition).endswith(boxed[addition]) for addition in train)
    assert all(estimated(addition).startswith("~") for addition in train)
    assert sum(estimated(addition).endswith(boxed[addition]) for addition in train) < 0.02 * len(train)


def test_the_script_writes_the_rows_under_the_configured_keys(tmp_path, monkeypatch):
    dataset = {"problems": {"split": "evaluation", "rows": 5}, "file": "sums.jsonl", "label_key": "answer"}
    provenance = {"config": {"dataset": dataset, "name": "sums"}, "code": "", "upstream": {}}
    places = ["--name", "sums", "--folder", str(tmp_path / "data"), "--manifest", str(tmp_path / "data/sums.json")]
    (tmp_path / "job.json").write_text(json.dumps(provenance))
    monkeypatch.setattr("sys.argv", ["make_problems.py", "--job", str(tmp_path / "job.json"), *places])
    make_problems.main()

    manifest = read_manifest(tmp_path / "data/sums.json").require(digests=True)
    assert manifest.kind == "download" and manifest.provenance == provenance | {"inputs": {}}
    assert manifest.facts == {"rows": 5}
    rows = [json.loads(line) for line in (manifest.root / "sums.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": [{"role": "user", "content": addition.question}], "answer": addition.label}
        for addition in draw(Problems(split="evaluation", rows=5))
    ]
