"""Problem sets are read strictly: unusable rows are never scored or trained on, and the line is named."""

import json

import pytest

from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import UserError
from milepost.configuration.schema import Dataset
from milepost.evaluation.problems import load_problems
from milepost.problems.loading import kinds_of, load_problem_set, read_problems

ASKED = [{"role": "user", "content": "What is 1 + 1?"}]


KNOWN = Dataset(folder="x", file="rows.jsonl")


def row(**changes) -> str:
    return json.dumps({"prompt": ASKED, "label": "2"} | changes)


def read(folder, text):
    (folder / "rows.jsonl").write_text(text)
    return read_problems(folder, ["rows.jsonl"], KNOWN)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "nested too deep"),
        ('{"label": ' + "9" * 5000 + "}", "digits"),
        ('{"label": "2"}', "no 'prompt'"),
        (json.dumps({"prompt": ASKED}), "no 'label'"),
        (row(label=""), "empty"),
        (row(label=[]), "neither"),
        (row(label=["2", "3"]), "several values"),
        (row(label=True), "neither"),
        (row(label=None), "neither"),
        (row(label=float("nan")), "not JSON: NaN"),
        (row(difficulty=float("-inf")), "not JSON: -Infinity"),
        ('{"prompt": [{"role": "user", "content": "?"}], "label": 1e999}', "'label' is not a finite number"),
        (row()[:-1] + ', "label": "3"}', "a key is repeated"),
        (row(prompt=[{"role": "user", "content": "?"}])[:-1] + ', "x": {"a": 1, "a": 1}}', "a key is repeated"),
        (row(label="\ud83d"), "'label' has half of a surrogate pair"),
        (row(prompt=[{"role": "user", "content": "What? \udc00"}]), "'prompt' has half of a surrogate pair"),
        (row(label="We add 1 and 1. So it makes 2."), "'label' is prose"),
        (row(prompt=" "), "without text"),
        (row(prompt=3), "neither text nor a list"),
        (row(prompt=[]), "neither text nor a list"),
        (row(prompt=["What?"]), "role"),
        (row(prompt=[{"role": "tool", "content": "x"}]), "role"),
        (row(prompt=[{"role": "user", "content": " "}]), "without text"),
        (row(prompt=[{"role": "user", "content": [{"text": "x"}]}]), "not text"),
        (row(prompt=[{"role": "user", "content": [{"type": "image", "text": "x"}]}]), "not text, such as an image"),
        (row(prompt=[{"role": "user", "content": []}]), "without text"),
        (row(prompt=[*ASKED, {"role": "assistant", "content": "2"}]), "does not end"),
    ],
)
def test_bad_row_is_counted_with_its_line_and_reason(tmp_path, line, reason):
    found = read(tmp_path, f"{row()}\n\n{line}\n{row(label=3)}")
    assert [(problem.label, problem.line) for problem in found.problems] == [("2", 1), ("3", 4)]
    assert [bad.place for bad in found.bad] == ["line 3"] and reason in found.bad[0].reason


def test_each_kind_of_bad_row_is_counted_and_its_first_line_named(tmp_path):
    found = read(tmp_path, "\n".join([row(), row(label=None), row(label=""), row(), row(label=[]), "{"]))
    neither, *others = kinds_of(found.bad)
    assert neither == "'label' is neither text nor a number (2 rows, the first in line 2)"
    assert [kind[-8:] for kind in others] == ["(line 3)", "(line 6)"]
    with pytest.raises(
        UserError, match=r"4 of 6 rows are unusable: .* 2\); .* \(line 3\); .*, or raise max_bad_share$"
    ):
        load_problem_set(tmp_path, ["rows.jsonl"], KNOWN, max_bad_share=0.5)


@pytest.mark.parametrize(
    ("written", "label"), [("8.0", "8"), ("-0.0", "0"), ("2.50", "2.5"), ("1e-7", "0.0000001"), ("1e3", "1000")]
)
def test_a_label_that_is_a_float_is_read_as_the_number_it_is(tmp_path, written, label):
    for text in (written, f"[{written}]"):
        found = read(tmp_path, row(label=0)[:-2] + f"{text}}}")
        assert [problem.label for problem in found.problems] == [label]


def test_invalid_utf8_makes_only_its_own_row_bad(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(
        b"\xef\xbb\xbf" + row().encode() + b"\n\xff\n" + row(label="\u2028").encode() + b"\n" + row().encode()
    )
    found = read_problems(tmp_path, ["rows.jsonl"], KNOWN)
    assert [problem.line for problem in found.problems] == [1, 4]
    assert (found.bad[0].place, found.bad[0].reason) == ("line 2", "not UTF-8")


@pytest.fixture
def data(tmp_path):
    """A data set's manifest with given lines and settings."""

    def make(lines, **settings):
        (tmp_path / "set.jsonl").write_text("\n".join(lines), encoding="utf-8")
        dataset = {"folder": "x", "file": "set.jsonl", **settings}
        provenance = {"config": {"dataset": dataset}}
        return write_manifest(tmp_path / "set.json", "download", tmp_path, ["set.jsonl"], provenance, {"rows": 1})

    return make


def test_evaluation_refuses_any_bad_row(data):
    with pytest.raises(UserError, match=r"set\.jsonl: 1 of 101 rows are unusable: .* \(line 101\)"):
        load_problems(data([row()] * 100 + ["{"], max_bad_share=0.5))


def test_evaluation_refuses_another_number_of_rows_and_repeated_prompts(data):
    other = row(prompt=[{"role": "user", "content": "What is 2 + 2?"}])
    assert len(load_problems(data([row(), other], rows=2, unique_prompts=True))) == 2
    with pytest.raises(UserError, match="2 usable rows instead of 30"):
        load_problems(data([row(), other], rows=30))
    with pytest.raises(UserError, match="line 3 repeats the prompt of line 1"):
        load_problems(data([row(), other, row()], unique_prompts=True))


def test_an_instruction_is_given_where_a_prompt_asks_for_no_box(data):
    boxed = row(prompt=[{"role": "user", "content": "What is 2 + 2? Answer in \\boxed{}."}])
    asked = load_problems(data([row(), boxed], instruction="Use \\boxed{}."))
    plain = load_problems(data([row(), boxed]))
    assert asked[0].messages[-1]["content"] == plain[0].messages[-1]["content"] + "\n\nUse \\boxed{}."
    assert asked[1] == plain[1]


def test_training_tolerates_some_bad_rows_but_never_an_empty_set(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join([row()] * 99 + ["{"]))
    (tmp_path / "blank.jsonl").write_text("\n")
    assert len(load_problem_set(tmp_path, ["rows.jsonl"], KNOWN, max_bad_share=0.01).problems) == 99
    with pytest.raises(UserError, match="unusable"):
        load_problem_set(tmp_path, ["rows.jsonl"], KNOWN, max_bad_share=0.009)
    with pytest.raises(UserError, match=r"blank\.jsonl: no usable row"):
        load_problem_set(tmp_path, ["blank.jsonl"], KNOWN)
