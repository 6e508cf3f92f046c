"""Answers written as arithmetic get their exact value, and no expression can exceed the bounds."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.rewards import arithmetic
from milepost.rewards.arithmetic import MAX_BITS, NotArithmetic, NoValue
from milepost.rewards.expressions import read_expression
from milepost.rewards.latex import OutOfBounds, tokenize
from milepost.rewards.lists import Unreadable


def evaluate(text):
    return arithmetic.evaluate(read_expression(tokenize(text)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("033", 33),
        ("-0", 0),
        ("--33", 33),
        ("1,234,567", 1234567),
        ("1 024", 1024),
        ("33.0", 33),
        (".5", Fraction(1, 2)),
        ("33.00000005", Fraction(3300000005, 10**8)),
        ("3^3+6", 33),
        ("66/2", 33),
        ("2 + 3 * 4 - 6 / 2", 11),
        ("-3^2", -9),
        ("2^3^2", 512),
        ("2^{-1}", Fraction(1, 2)),
        ("3(11)", 33),
        (r"\frac{66}{2}", 33),
        (r"\frac12", Fraction(1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"2\frac{3}{2}", 3),
        (r"2 \cdot 3 \times 4 \div 8", 3),
        ("5!", 120),
        (r"\binom{5}{2}", 10),
        (r"\binom{2}{5}", 0),
        (r"3\sqrt{121}", 33),
        (r"\sqrt{\frac{1}{4}}", Fraction(1, 2)),
        ("(-1)^{10^{100}}", 1),
        ("0^{10^{10}}", 0),
    ],
)
def test_value_is_exact(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "33 34",
        "1,02",
        "1,024,",
        "0,123",
        "(1,024)",
        "3_3",
        "33x",
        "x",
        "33=33",
        "5!!",
        "4^{1/2}",
        r"\sqrt{2}",
        "3{3}",
        "(33",
        "33)",
        r"\frac{1}",
        r"\pm 33",
        "(" * 900 + "33" + ")" * 900,
        "33 or 34",
    ],
)
def test_other_expressions_are_not_taken_for_numbers(text):
    with pytest.raises((NotArithmetic, Unreadable, OutOfBounds)):
        evaluate(text)


@pytest.mark.parametrize(
    "text",
    [
        "1/0",
        r"\frac{1}{0}",
        "0^{-1}",
        "10^{10^{10}}",
        "9**9**9**9",
        "9^9^9^9",
        "99999!",
        r"\binom{99999}{5}",
        f"2^{MAX_BITS}",
    ],
)
def test_unbounded_values_are_refused_before_they_are_computed(text):
    with pytest.raises(NoValue):
        evaluate(text)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: "({}{}{})".format(*parts)),
        inner.map("(-{})".format),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(expressions)
def test_integer_arithmetic_equals_python_s(text):
    assert evaluate(text) == eval(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("0123456789+-*/^(){}!., \\fracsqtbinom"), max_size=60))
def test_no_text_raises_anything_else_or_leaves_the_bounds(text):
    try:
        value = evaluate(text)
    except (NotArithmetic, NoValue, Unreadable, OutOfBounds):
        return
    assert max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
