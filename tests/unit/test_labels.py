r"""Labels with one answer are read, those that no answer could match are refused, and the grader agrees."""

import pytest

from answered import graded
from milepost.common.labels import MAX_CHARACTERS, read_label
from milepost.configuration.schema import Reward
from milepost.rewards.grader import Grader

# Labels of GSM8K, MATH, DAPO, AIME and OlympiadBench, in their spellings.
ANSWERS = [
    *(
        "4",
        "033",
        "-7",
        "1,000",
        "0.5",
        "5000",
        r"\frac{3}{4}",
        r"3\sqrt{2}",
        r"\frac{\sqrt{3}}{2}",
        r"2^{10}",
        "50\\%",
    ),
    *(r"\frac{\pi}{6}", r"x^2 + 2x + 1", "y=2x+3", "a=5, b=2", "1,3,5", "(2, 3)", r"\left( 3, \frac{\pi}{2} \right)"),
    *(r"(-\infty, 2) \cup (3, \infty)", r"x \in [-2,7]", r"\{1,2\}", r"1 \pm \sqrt{19}", r"\$32,\!348", r"90^\circ"),
    *(
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}",
        r"6\text{ students}",
    ),
    *(r"\text{Evelyn}", r"\text{(C)}", "(C)", "C", "Evelyn", "even", "no solution", "all real numbers except 3"),
    *("x is odd", r"\text{June 20}", r"10\text{:}59\text{ a.m.}", "WE", r"8\text{ and }-2", "五"),
]


def test_an_answer_is_read_unchanged_and_is_right_when_boxed():
    assert [read_label(answer) for answer in ANSWERS] == ANSWERS
    with Grader(Reward()) as grader:
        verdicts = graded(grader, [(f"</think>\\boxed{{{answer}}}", answer) for answer in ANSWERS])
    assert [answer for answer, verdict in zip(ANSWERS, verdicts, strict=True) if not verdict.correct] == []


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("#### 4", "4"),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 in all.\n#### 72", "72"),
        ("That makes $1,200. #### 1,200 ", "1,200"),
        ("We have $x = 2$, so the answer is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{4}", "4"),
        ("\\boxed {x \\in \\{1, 2\\}}", "x \\in \\{1, 2\\}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("First \\boxed{4}, and again \\boxed{ 4 }.", "4"),
        ("Hence \\boxed{4}.\n#### 4", "4"),
        ("So it is\n#### \\boxed{4}", "4"),
        ("\\boxed{\\text{a set } \\{1\\}}", "\\text{a set } \\{1\\}"),
        ("over-escaped \\\\boxed{4}", "4"),
        ("a }, and then \\boxed{4}", "4"),
        ("nothing \\boxed{} at first, then \\boxed{4}", "4"),
    ],
)
def test_the_one_answer_of_a_solution_is_its_label(label, answer):
    assert read_label(label) == answer


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("#### 4 or\n#### 5", "several answers"),
        ("\\boxed{4} or \\boxed{5}", "several answers"),
        ("\\boxed{5}\n#### 4", "several answers"),
        ("#### 4\nAnd more.", "several lines"),
        ("####", "without an answer"),
        ("It is \\boxed{}", "without an answer"),
        ("It is \\boxed 2", "without an answer"),
        ("It is \\boxed{4", "without an answer"),
        ("\\frac{1}{2", "braces"),
        ("a}{b", "braces"),
        ("4\\", "braces"),
        ("The answer is 4.", "prose"),
        ("It is $4$.", "prose"),
        ("First we add. Then we halve.", "prose"),
        ("She sold 48 clips in April and half as many in May", "prose"),
        ("x = 4 because both sides vanish", "prose"),
        ("答案是4", "prose"),
        ("2x = 8\nx = 4", "several lines"),
        ("9" * (MAX_CHARACTERS + 1), "longer"),
        (10**MAX_CHARACTERS, "longer"),
        (" \n", "empty"),
        (float("inf"), "finite"),
        (True, "neither"),
        ({"answer": 4}, "neither"),
    ],
)
def test_a_label_without_one_answer_is_refused_with_the_reason(label, reason):
    with pytest.raises(ValueError, match=reason):
        read_label(label)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["\\boxed{", "\\boxed{}", "{", "#### ", "}", "\\"])
def test_a_hostile_label_takes_no_longer_than_its_length(text):
    with pytest.raises(ValueError, match="answer"):
        read_label(text * 100_000)


def test_labels_refused_for_length_or_braces_match_no_boxed_answer():
    with Grader(Reward()) as grader:
        labels = ["9" * (MAX_CHARACTERS + 1), "\\frac{1}{2", "4\\"]
        assert not any(v.correct for v in graded(grader, [(f"</think>\\boxed{{{label}}}", label) for label in labels]))
