"""The math reward is right on known cases, strict on hedges, and bounded in time and memory for any answer."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answered import graded
from milepost.configuration.schema import Reward
from milepost.rewards.base import Verdict
from milepost.rewards.grader import Grader

DATA = Path(__file__).parents[1] / "data"
CASES = [
    case
    for file in ("grader_cases.json", "grader_cases_2.json")
    for case in json.loads((DATA / file).read_text(encoding="utf-8"))["cases"]
]


@pytest.fixture(scope="module")
def grader():
    with Grader(Reward(max_seconds=5)) as grader:
        verdict(grader, r"\log_{2} 8", "3")  # starts a worker
        yield grader


def verdict(grader, answer, label) -> Verdict:
    return graded(grader, [(f"reasoning</think>\\boxed{{{answer}}}", label)])[0]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_known_case_gets_its_verdict_in_its_time(grader, case):
    start = time.monotonic()
    [judged] = graded(grader, [(case["output"], case["label"])])
    assert judged.correct == bool(case["expected"])
    assert time.monotonic() - start < case["max_seconds"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("3^3+6", "33"),
        ("66/2", "33"),
        ("x = 33", 33),
        (r"33\text{ times}", "33"),
        ("33平方千米", "33"),
        (r"33\,\mathrm{cm^2}", "33"),
        (r"33\text{ \%}", "33"),
        (r"\text{Answer: }33", "33"),
        ("= 33,", "33"),
        ("073", 73),
        (r"\sqrt{1090-1}", "33"),
        (r"\log_{2} 8", "3"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"2^{0.5}", r"\sqrt2"),
        ("3π", r"3\pi"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\{2,1\}", r"\{1,2\}"),
        ("2, 1", "1, 2"),
        (r"[0,\frac{2}{2})", "[0,1)"),
        (r"\pm 2", "±2"),
        (r"\text{even}", "Even"),
        ("x^2 + y^2 = 1", "x^2+y^2=1"),
        (r"10\,000\pi", r"10000\pi"),
        (r"33\text{ 种}", "33"),
        ("33元", "33"),
        (r"{\rm 33}", "33"),
        (r"\text{Final Answer: }33", "33"),
        (r"\(33\)", "33"),
        (r"\$33.00", "33"),
    ],
)
def test_the_label_in_another_notation_is_correct(grader, answer, label):
    assert verdict(grader, answer, label).correct


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (r"33\text{ or }34", "33"),
        ("33 times three", "33"),
        ("33千", "33"),
        ("33, 34", "33"),
        (r"\pm 33", "33"),
        (r"x \in \{33, 34\}", "33"),
        (r"\{33\}", "33"),
        ("33.00000005", "33"),
        (r"33 + \sqrt[3]{10^{-30}}", "33"),
        ("1.41421356", r"\sqrt{2}"),
        ("3_3", "33"),
        ("3_3", "3"),
        ("3³", "33"),
        ("3 3", "33"),
        (r"3\quad 3", "33"),
        ("3$3", "33"),
        (r"3\%3", "33"),
        (r"\sin 30", r"\sin 30^\circ"),
        ("33 34", "3334"),
        ("x = 3 3", "33"),
        (r"33\text{ millions}", "33"),
        ("33万", "33"),
        ("33或34", "33"),
        ("33x", "33"),
        ("33 = 34", "34"),
        ("1", "x^2+y^2=1"),
        ("x + y = 1", "x^2+y^2=1"),
        ("1, 3", "1, 2"),
        ("2", r"\pm 2"),
        ("b", "B"),
    ],
)
def test_what_only_looks_like_the_label_is_wrong(grader, answer, label):
    assert not verdict(grader, answer, label).correct


def test_reasons_name_what_was_wrong(grader):
    responses = [r"</think>\boxed{33}", r"</think>\boxed{34}", r"</think>\boxed{33, 34}", r"\boxed{33}", "</think>33"]
    beyond = ["9" * 5000, "{" * 50 + "33" + "}" * 50, "(" * 50 + "33" + ")" * 50, "\\sqrt" * 50 + "4", "x" + "^2" * 50]
    verdicts = graded(grader, [(text, "33") for text in responses + [f"</think>\\boxed{{{each}}}" for each in beyond]])
    assert [verdict.reason for verdict in verdicts] == (
        ["correct", "wrong", "several_answers", "no_think_end", "no_box", "too_long", *["too_deep"] * 4]
    )
    assert [verdict.answer for verdict in verdicts] == ["33", "34", "33, 34", *[None] * 7]


def test_without_a_think_block_only_optional_grades():
    for mode, correct in (("required", False), ("optional", True)):
        with Grader(Reward(think_block=mode)) as grader:
            assert graded(grader, [(r"So \boxed{33}.", "33")])[0].correct is correct


def test_slow_comparison_is_stopped_and_the_next_ones_go_on():
    with Grader(Reward(max_seconds=1)) as grader:
        slow = ["e^{e^{e^{e^e}}}", r"\sqrt{2}^{10^{1000}}"]
        labels = ["33", "\\pi"]
        verdicts = graded(grader, [(f"</think>\\boxed{{{a}}}", label) for a, label in zip(slow, labels, strict=True)])
        assert [verdict.reason for verdict in verdicts] == ["grading_timeout"] * 2
        assert graded(grader, [(r"</think>\boxed{\log_{2} 8}", "3")])[0].reason in ("correct", "grading_timeout")


HOSTILE = {
    "braces": "{" * 10**6,
    "nested boxes": r"\boxed{" * 10**5,
    "tower": "10^{10^{10}}",
    "python tower": "9**9**9**9",
    "a million digits": "9" * 10**6,
    "thousand digits": "1" + "0" * 999,
    "factorial": "10^{999}!",
    "binomial": r"\binom{9999999}{4444444}",
    "division by zero": "1/0",
    "surrogates": "\ud800\udfff",
    "control": "\x00",
    "nothing": "",
    "space": " ",
    "backslash": "\\",
    "commands": r"\frac" * 50,
    "parentheses": "(" * 250,
    "roots": r"\sqrt{" * 40 + "2" + "}" * 40,
    "powers": "x" + "^2" * 140,
    "unfolding": "\ufdfa" * 900,
    "code": "__import__('os').system('true')",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("label", ["33", "x+1"])
def test_hostile_answers_are_graded_wrong(grader, answer, label):
    assert not verdict(grader, answer, label).correct


@pytest.mark.parametrize("label", ["", "9" * 5000, 10**5000, "{", "\ud800", r"\frac{1}{0}", "x^"], ids=range(7))
def test_a_strange_label_makes_a_wrong_answer_not_a_crash(grader, label):
    assert not verdict(grader, "33", label).correct


LATEX = [
    "{",
    "}",
    "\\boxed{",
    "\\frac",
    "\\sqrt",
    "</think>",
    "<think>",
    "33",
    "3",
    "x",
    "^",
    "_",
    ",",
    "=",
    "!",
    "(",
    ")",
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=100), st.lists(st.sampled_from(LATEX), max_size=30).map("".join)), st.booleans())
def test_no_response_raises(grader, response, boxed):
    graded(grader, [(f"</think>\\boxed{{{response}}}" if boxed else response, "33")])


def test_integers_start_no_process_and_workers_end_with_the_grader():
    with Grader(Reward()) as grader:
        verdict(grader, "33", "34")
        workers = grader.parts[0][1].workers.workers
        assert all(worker.process is None for worker in workers)
        assert verdict(grader, r"\log_{2} 8", "3").correct
        process = next(worker.process for worker in workers if worker.process)
    assert process.returncode is not None


def test_every_aime_label_is_its_own_correct_answer(grader):
    rows = [json.loads(line) for line in (DATA / "aime-2024.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30
    verdicts = graded(grader, [(f"</think>\\boxed{{{int(row['label'])}}}", row["label"]) for row in rows])
    assert all(verdict.correct for verdict in verdicts)
