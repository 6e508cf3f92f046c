"""A row becomes a problem as the data set's settings say: where its prompt and label are, and which rows count."""

import json

import pytest

from milepost.common.errors import UserError
from milepost.configuration.schema import Dataset
from milepost.problems.loading import load_problem_set

CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture
def load(tmp_path):
    """``load(content, **settings)`` -> the problem set of the rows, each of which must be usable."""

    def call(content, labels="math", **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        known = Dataset(folder="x", file="rows.jsonl", **{"max_bad_share": 0.0} | settings)
        return load_problem_set(tmp_path, ["rows.jsonl"], known, labels)

    return call


@pytest.mark.parametrize(
    "prompt",
    [
        CHAT,
        "What is 1 + 1?",
        [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?", "image": None}],
        [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}], "name": None}],
    ],
    ids=["chat", "text", "parts", "chat of parts"],
)
def test_a_prompt_is_a_chat_or_text_or_parts_of_text(load, prompt):
    [problem] = load([{"prompt": prompt, "label": 2}]).problems
    assert problem.messages == CHAT


@pytest.mark.parametrize(
    ("prompt_key", "label_key", "row"),
    [
        ("extra.question", "reward.ground_truth", {"extra": {"question": "?"}, "reward": {"ground_truth": 3}}),
        ("turns.0.content", "answers.1", {"turns": [{"content": "?"}], "answers": ["no", "3"]}),
        ("a.b", "c.d.e", {"a.b": "?", "a": {"b": "not this"}, "c": {"d.e": "3", "d": {"e": "not this"}}}),
    ],
)  # fmt: skip
def test_keys_step_into_a_row_and_a_key_that_is_there_as_written_comes_first(load, prompt_key, label_key, row):
    [problem] = load([row], prompt_key=prompt_key, label_key=label_key).problems
    assert (problem.messages[0]["content"], problem.label) == ("?", "3")
    assert problem.row == row


@pytest.mark.parametrize("key", ["prompt.1.content", "prompt.content", "promp", "prompt.0.content.x"])
def test_a_key_that_leads_nowhere_is_named_beside_those_that_are_there(load, key):
    with pytest.raises(
        UserError, match=rf"1 of 1 rows are unusable: no '{key}' \(line 1\): the rows have prompt, label"
    ):
        load([{"prompt": CHAT, "label": 2}], prompt_key=key)


def test_a_system_message_is_set_where_a_chat_has_none(load):
    own = [{"role": "system", "content": "Be loud."}, *CHAT]
    problems = load([{"prompt": CHAT, "label": 2}, {"prompt": own, "label": 2}], system="Be brief.").problems
    assert problems[0].messages == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert problems[1].messages == own


@pytest.mark.parametrize(
    ("value", "label"), [("so 3 * 4 = <<12>>12\n#### 12", "12"), ("#### 1\n#### 2 ", "2"), (["It is 3. #### 3"], "3")]
)
def test_a_label_follows_the_last_mark(load, value, label):
    rows = [{"prompt": "?", "label": value}]
    assert load(rows, "exact", label_after="####").problems[0].label == label
    with pytest.raises(UserError, match="'label' has no '####'"):
        load([{"prompt": "?", "label": "12"}], "exact", label_after="####")


CHOICES = {"right": "right", "wrong": ["wrong 1", "others"]}


def question(number):
    wrong = {"wrong 1": f"{number + 1}", "others": [f"{number + 2}", number + 3]}
    return {"prompt": f"What is {number}? ", "right": f" {number}\n", **wrong}


def test_choices_are_lettered_in_an_order_of_each_question_s_own(load):
    problems = load([question(number) for number in range(40)], "choice", choices=CHOICES).problems
    for number, problem in enumerate(problems):
        asked, *lines = problem.messages[-1]["content"].split("\n")
        assert asked == f"What is {number}?" and lines[0] == ""
        letters = dict(line.split(") ") for line in lines[1:])
        assert list(letters) == ["A", "B", "C", "D"]
        assert sorted(letters.values(), key=int) == [str(number + more) for more in range(4)]
        assert letters[problem.label] == str(number)
    assert {problem.label for problem in problems} == {"A", "B", "C", "D"}
    fewer = load([question(number) for number in range(5, 12)], "choice", choices=CHOICES).problems
    assert [one.messages for one in fewer] == [one.messages for one in problems[5:12]]
    others = load([question(number) for number in range(40)], "choice", choices=CHOICES | {"seed": 1}).problems
    assert [one.label for one in others] != [one.label for one in problems]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"right": "8"}, "'right' is also among the wrong choices"),
        ({"others": []}, "'others' is neither text nor a number"),
        ({"others": [str(n) for n in range(20, 50)]}, "has 32 choices"),
        ({"right": ["1", "2"]}, "'right' has several right choices"),
    ],
)
def test_choices_that_leave_the_right_letter_open_are_refused(load, changes, reason):
    with pytest.raises(UserError, match=reason):
        load([question(7) | changes], "choice", choices=CHOICES)


SOLVED = [
    {"prompt": f"{source} {level}?", "label": level, "level": spelled, "meta": {"source": source}}
    for source in ("aime", "amc")
    for level, spelled in ((3, 3), (4, "4"), (5, 5.0), (6, None))
]


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ({"level": [4, 5]}, ["aime 4?", "aime 5?", "amc 4?", "amc 5?"]),
        ({"level": 3, "meta.source": "amc"}, ["amc 3?"]),
        ({"meta.source": ["aime", "amc"], "level": "4"}, ["aime 4?", "amc 4?"]),
    ],
)
def test_a_filter_keeps_rows_with_one_of_the_values_at_every_key(load, wanted, kept):
    found = load(SOLVED, filter=wanted)
    assert [problem.messages[0]["content"] for problem in found.problems] == kept
    assert found.read == len(SOLVED)
    assert [SOLVED[problem.line - 1] for problem in found.problems] == [problem.row for problem in found.problems]


def test_true_is_not_one(load):
    rows = [{"prompt": str(n), "label": n, "solved": value} for n, value in enumerate([True, 1, "true", False, "1"])]
    assert [p.line for p in load(rows, filter={"solved": True}).problems] == [1, 3]
    assert [p.line for p in load(rows, filter={"solved": 1}).problems] == [2, 5]


def test_a_filter_that_no_row_passes_is_answered_by_what_the_rows_have(load):
    with pytest.raises(
        UserError, match=r'none of 8 rows passes `filter`: they have level: "4", 3, 5\.0, null: correct'
    ):
        load(SOLVED, filter={"level": 7})
    with pytest.raises(UserError, match="no row has the filter's 'levl': they have prompt, label, level, meta"):
        load(SOLVED, filter={"levl": 7})


@pytest.mark.parametrize(
    ("rows", "kept"), [("1:3", [2, 3]), (":2", [1, 2]), ("6:", [7, 8]), ("7:8", [8]), (8, range(1, 9))]
)
def test_a_part_is_counted_from_0_without_its_end(load, rows, kept):
    assert [problem.line for problem in load(SOLVED, rows=rows).problems] == [*kept]


def test_parts_and_counts_are_of_the_rows_that_pass_the_filter(load):
    wanted = {"meta.source": "amc"}
    assert [problem.label for problem in load(SOLVED, filter=wanted, rows="1:3").problems] == ["4", "5"]
    assert len(load(SOLVED, filter=wanted, rows=4).problems) == 4
    with pytest.raises(UserError, match="4 usable rows instead of 8"):
        load(SOLVED, filter=wanted, rows=8)
    with pytest.raises(UserError, match="only 3 rows that pass the filter are in rows 1:9: correct `rows`"):
        load(SOLVED, filter=wanted, rows="1:9")


def test_the_first_rows_of_a_set_are_refused_only_for_what_no_further_row_mends(tmp_path):
    lines = [json.dumps({"prompt": f"{n}?", "label": n}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    known = Dataset(folder="x", file="rows.jsonl", max_bad_share=0.1)

    def first(number, share=None, **changes):
        changed = known.model_copy(update=changes)
        return load_problem_set(tmp_path, ["rows.jsonl"], changed, max_bad_share=share, at_most=number)

    assert [len(first(n, rows=20).problems) for n in (1, 2, 20, 21)] == [1, 1, 19, 20]
    assert first(3, rows="10:12").problems == first(3, filter={"label": 7}).problems == []
    with pytest.raises(UserError, match="1 of 2 rows are unusable"):
        first(2, share=0.0)
    with pytest.raises(UserError, match="20 usable rows instead of 30"):
        first(21, rows=30)
    with pytest.raises(UserError, match="3 of 3 rows are unusable"):
        first(3, prompt_key="chat")


def test_several_files_are_one_set_and_errors_name_the_file(tmp_path):
    names = ["a.jsonl", "b.csv"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1?", "label": "1"}) + "\n")
    (tmp_path / "b.csv").write_text('prompt,label\n2?,2\n"3\n?",3\n1?,1\n,4\n')
    known = Dataset(folder="x", file=names, max_bad_share=0.5)
    problems = load_problem_set(tmp_path, names, known.model_copy(update={"rows": "0:4"})).problems
    assert [(p.place, p.line, p.label) for p in problems] == [
        *(("a.jsonl, line 1", 1, "1"), ("b.csv, line 2", 2, "2"), ("b.csv, line 3", 3, "3"), ("b.csv, line 5", 5, "1")),
    ]
    with pytest.raises(UserError, match=r"1 of 5 rows .* 'prompt' has a message without text \(b\.csv, line 6\)"):
        load_problem_set(tmp_path, names, known, max_bad_share=0.0)
    with pytest.raises(UserError, match=r"b\.csv, line 5 repeats the prompt of a\.jsonl, line 1: remove one of them"):
        load_problem_set(tmp_path, names, known.model_copy(update={"unique_prompts": True}))
