"""The answer of a response is extracted, and normalized without changing its meaning."""

from fractions import Fraction

import pytest

from answered import response
from milepost.rewards.answers import extract, last_box, read_answer
from milepost.rewards.latex import OutOfBounds


@pytest.mark.parametrize(
    ("text", "mode", "found"),
    [
        (r"a</think>\boxed{33}", "required", (r"33", None)),
        (r"<think>a</think>\boxed{1}</think>\boxed{2}", "required", ("2", None)),
        (r"\boxed{33}", "required", (None, "no_think_end")),
        (r"\boxed{33}", "optional", ("33", None)),
        (r"<think>\boxed{33}", "optional", (None, "no_think_end")),
        (r"<think>a</think>b<think>\boxed{33}", "required", (None, "no_think_end")),
        (r"<think>\boxed{33}</think>33", "required", (None, "no_box")),
        (r"</think>\boxed{}", "required", (None, "no_box")),
        ("a</think>\\boxed{33}\n</think>", "required", ("33", None)),
        (r"<think>\boxed{1}</think>\boxed{33}</think></think>", "required", ("33", None)),
        (r"a</think>\boxed{1}<think>b</think>\boxed{33}", "required", ("33", None)),
        (r"a</think>\boxed{33}<think>\boxed{1}</think>", "required", ("33", None)),
        (r"a</think>\boxed{3</think>3}", "required", ("3\n3", None)),
        (r"\boxed{1}</think>\boxed{33}", "optional", ("33", None)),
        (r"</think>\boxed{33} is now in \boxed{ }", "required", ("33", None)),
        ("", "required", (None, "no_think_end")),
        ("", "optional", (None, "no_box")),
    ],
)
def test_only_the_text_behind_the_reasoning_counts(text, mode, found):
    assert extract(response(text, think_block=mode)) == found


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{12}, no, \boxed{33}", "33"),
        (r"\boxed{12} and \boxed{33", "12"),
        (r"\boxed{33", None),
        (r"\boxed {33}", "33"),
        (r"\boxed33", None),
        (r"\\boxed{33}", "33"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}", None),
        (r"\boxed{ \left\{ 1 }", r" \left\{ 1 "),
        (r"} \boxed{33} {", "33"),
        (r"\boxed{34 \boxed{33}", "33"),
        (r"\boxed{\boxed{33}}", r"\boxed{33}"),
    ],
)
def test_last_complete_box_wins(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10**6 + r"\boxed{33}",
        r"\boxed{" * 10**5 + "33" + "}" * 10**5,
        "\\" * 10**6,
        (r"\boxed" + " " * 1000) * 1000,
        r"\boxed{33}" * 10**5,
        "}" * 10**6,
    ],
    ids=["braces", "nested boxes", "backslashes", "spaces", "boxes", "closing braces"],
)
def test_a_million_characters_are_read_in_one_pass(text):
    last_box(text)  # quadratic time would run into the suite's time limit


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (r"33\,\text{square units}", 33),
        (r"33\text{ cm}^2", 33),
        ("33 cm^2", 33),
        (r"33^{\circ}\text{C}", 33),
        (r"33^\circ", 33),
        ("33º", 33),
        (r"33\%", 33),
        (r"\$1{,}024", 1024),
        (r"1\,024", 1024),
        ("1\u2009024", 1024),
        ("\u221233", -33),
        ("３３", 33),
        ("3³", 27),
        ("3½", Fraction(7, 2)),
        ("\u200b33.", 33),
        (r"\(\mathbf{33}\)", 33),
        (r"\left(33\right)", 33),
        (r"\\dfrac{66}{2}", 33),
        (r"33\text{ cm squared}", 33),
        (r"33\text{ seconds}", 33),
        (r"33\text{ 种}", 33),
        (r"33\text{种不同的方法}", 33),
        ("33个", 33),
        ("33 个。", 33),
        ("33元/人", 33),
        (r"33 \text{ 平方厘米}", 33),
        ("33厘米^2", 33),
        ("33。", 33),
        (r"\dbinom{11}{2}", 55),
        (r"\tbinom{11}{2}", 55),
        (r"m + n = 33", 33),
        (r"30 + 3 = 33", 33),
        (r"\angle ABC = 33^\circ", 33),
        ("[ABCD] = 33", 33),
        ("P(X=3) = 33", 33),
        (r"\sum_{n=1}^{3} n = 33", 33),
        (r"\lfloor 33.5 \rfloor = 33", 33),
    ],
)
def test_notation_does_not_change_the_value(raw, value):
    assert read_answer(raw).value == value


@pytest.mark.parametrize(
    "raw",
    [
        r"33\text{ or }34",
        "33 or 34",
        "33, 34",
        "33; 34",
        r"\pm 33",
        "±33",
        r"34 \lor 33",
        r"33 \text{ or thirty-four}",
        "1, 024",
    ],
)
def test_a_hedge_states_several_answers_and_has_no_value(raw):
    answer = read_answer(raw)
    assert answer.parts == 2 and answer.value is None


@pytest.mark.parametrize(
    "raw",
    [
        "33 = 34",
        "x = 34 = 33",
        "34. So x = 33",
        "33 34",
        "3_3",
        "33_{10}",
        "33 x",
        r"33 \text{ million}",
        r"33\text{ millions}",
        r"33\text{ dozens}",
        r"33\text{ halves}",
        r"33\text{ sixths}",
        r"33\text{ hundredths}",
        "33 twentieths",
        r"33\text{ squared}",
        "33 cubed.",
        "33 factorial",
        r"33\mathrm{i}",
        r"33\text{ pi}",
        r"33 \text{ to thirty-four}",
        *("33万", "33亿", "33千", "33百", "33十", "33万个", "33半", "33分之一", "33加一"),
        *("33平方", "33的立方", "33次方", "33阶乘", "33或三十四", "33和三十四", "33与三十四"),
        r"33\text{ 万}",
        r"33\text{ 个或三十四个}",
        r"33\text{ 个} 或三十四",
        "33个。或三十四",
        "33或34",
        "33个34",
        r"33 \text{ hours } 20",
        "34 maybe x = 33",
        r"x \in \{33, 34\}",
        "33 (mod 5)",
        r"33 \pmod{5}",
        r"\{33\}",
        "[33]",
    ],
)
def test_more_than_a_number_has_no_value(raw):
    assert read_answer(raw).value is None


def test_a_label_that_is_an_equation_is_not_its_right_hand_side():
    assert read_answer("x^2 + y^2 = 1", is_label=True).value is None
    assert read_answer("x_1 = 33", is_label=True).value == 33


@pytest.mark.parametrize("raw", ["1" * 1001, "\ufdfa" * 999])
def test_overlong_answers_are_refused_also_where_normalising_makes_them_so(raw):
    with pytest.raises(OutOfBounds, match="too_long"):
        read_answer(raw)


def test_equal_numbers_vote_for_the_same_answer():
    assert {read_answer(raw).key for raw in ("33", "033", "33.0", r"\frac{66}{2}", "x = 33", r"33\%")} == {"33"}
