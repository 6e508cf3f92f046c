"""Prompts in both the training set and a scored set are found, however they are wrapped and spelled."""

import json

import pytest

from milepost.checkpoints.manifest import write_manifest
from milepost.evaluation.overlap import overlap

QUESTIONS = [
    "Every morning Aya goes for a 9-kilometer-long walk. How many minutes does it take her?",
    "Let $ABC$ be a triangle inscribed in circle $\\omega$ with $AB=5$. Find $AP$.",
    "Find the number of triples of nonnegative integers $(a,b,c)$ with $a+b+c=300$.",
    "What is 1 + 1?",
]
TEMPLATE = "Solve the following problem step by step. The last line says Answer: \\boxed{{...}}.\n\n{}\n\nGo on, then."


@pytest.fixture
def data(tmp_path):
    """``data(name, questions, template)`` -> the manifest of a data set."""

    def make(name, questions, template="{}"):
        messages = [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": template.format(text)}]
            for text in questions
        ]
        rows = [json.dumps({"chat": chat, "answer": "1"}) for chat in messages]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        keys = {"folder": "x", "file": f"{name}.jsonl", "prompt_key": "chat", "label_key": "answer"}
        job = {"config": {"dataset": keys}}
        return write_manifest(tmp_path / f"{name}.json", "download", tmp_path, [f"{name}.jsonl"], job, {"rows": 4})

    return make


def test_disjoint_sets_give_no_warning(data):
    assert overlap(data("train", QUESTIONS[:2]), data("test", QUESTIONS[2:])) is None


@pytest.mark.parametrize("trained", ["{}", TEMPLATE], ids=["plain", "wrapped"])
@pytest.mark.parametrize("scored", ["{}", "{}\n\nPut your final answer within \\boxed{{}}."], ids=["plain", "wrapped"])
def test_a_shared_question_is_found_inside_each_set_s_template(data, trained, scored):
    said = overlap(data("train", QUESTIONS[:3], trained), data("test", [QUESTIONS[3], QUESTIONS[1]], scored))
    assert said.startswith("1 of the 2 prompts of test are in the training set train as well (line 2 is line 2): ")


def test_spacing_case_and_compatibility_characters_do_not_matter(data):
    respelled = QUESTIONS[2].upper().replace(" ", "\u00a0\n").replace("300", "\uff13\uff10\uff10")
    assert "line 1 is line 3" in overlap(data("train", QUESTIONS), data("test", [respelled]))


def test_another_number_makes_another_question(data):
    others = [question.replace("9", "8").replace("5", "6").replace("300", "301") for question in QUESTIONS[:3]]
    assert overlap(data("train", QUESTIONS[:3]), data("test", others)) is None


def test_short_questions_are_not_compared_without_their_template(data):
    """Without what all prompts say, "What is 3 + 4?" and "Multiply 3 + 4?" would be the same."""
    sums, products = ["What is 3 + 4?", "What is 5 + 6?"], ["Multiply 3 + 4?", "Multiply 5 + 7?"]
    assert overlap(data("train", sums), data("test", products)) is None


def test_all_are_counted_and_the_first_few_named(data):
    many = [f"What is {n} + {n}?" for n in range(20)]
    said = overlap(data("train", many), data("test", many[5:]))
    assert said.startswith("15 of the 15 prompts of test")
    assert "(line 1 is line 6, line 2 is line 7," in said and ", ...)" in said and "line 6 is" not in said
