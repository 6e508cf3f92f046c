"""Spaces, fonts, braces and units make no wrong answer right; spaces and braces make no right answer wrong."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from answered import graded

PIECE = re.compile(r"\\[A-Za-z]+|\\.|[0-9]*\.?[0-9]+|[A-Za-z]+|.", re.DOTALL)
SPACES = [" ", r"\,", r"\;", r"\ ", "~", r"\:"]
NOTHINGS = [
    *SPACES,
    *(r"\!", r"\quad ", "{}", "$", "\n", "\u200b", "\u2062", r"\text{ }", r"\mbox{}", r"\mathbf{}", r"\hspace{1mm}"),
    *(r"\left", r"\displaystyle ", r"\rm ", r"\color{red}", r"\\", r"\(", r"\)"),
]
FONTS = ["{", r"\text{", r"\mathbf{", r"\mathrm{", r"\boxed{", r"\textcolor{red}{", r"\operatorname{"]
UNITS = [r"\text{ cm}", " cm^{2}", r"\%", r"^\circ", r"\text{ ways}", " kg", "个", r"\$", "."]

WRONG = [
    *((".5", "5"), ("3.5", "35"), ("1.(3)", "13"), ("1.(3)", "3"), ("-33", "33"), ("3,5", "35"), ("3, 5", "35")),
    *(("3 3", "33"), ("33 34", "3334"), ("33, 34", "3334"), (r"33\text{ or }34", "33"), ("33=34", "34")),
    *(("3^3", "33"), ("3_3", "33"), ("3/3", "33"), (r"\frac{3}{3}", "33"), ("3+3", "33"), ("3!", "3"), ("34", "33")),
    *(("33 million", "33"), ("33x", "33"), (r"34 \ne x = 33", "33"), (r"\{33\}", "33"), ("2x=33", "33")),
    *(("(2,1)", "(1,2)"), ("(2,1)", "21"), ("[1,2)", "(1,2)"), ("x^2", "x2"), ("x+1", "x"), (r"\sqrt{16}", "16")),
    (r"\begin{pmatrix}3\\3\end{pmatrix}", "33"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}"),
]
RIGHT = [
    *(("33", "33"), ("-33", "-33"), (r"\frac{66}{2}", "33"), ("x=33", "33"), ("m+n=33", "33"), (r"\sqrt{16}", "4")),
    *(("(1,2)", "(1,2)"), ("[0,1)", "[0,1)"), (r"\{1,2\}", r"\{2,1\}"), ("1,2,5", "5,1,2"), ("4210_{5}", "4210_5")),
    *(("x^{2}+1", "1+x^2"), (r"1.5\times10^{3}", "1500"), ("y=2x+3", "2x-y+3=0"), (r"33\mathrm{cm}^2", "33")),
    *((r"1\pm\sqrt{3}", r"1-\sqrt3,1+\sqrt3"), (r"x\in[-2,7]", r"-2\le x\le7"), (r"\$18.90", "18.9")),
    *((r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)"), (r"{1\over4}", "0.25"), (r"90^\circ", "90"), ("|-33|", "33")),
    ("6-5i", "-5i+6"),
]


def pieces(answer):
    return PIECE.findall(answer)


def is_balanced(part):
    depth = 0
    for piece in part:
        depth += (piece in ("{", r"\{", "(", "[")) - (piece in ("}", r"\}", ")", "]"))
        if depth < 0:
            return False
    return depth == 0 and not any(piece in (r"\begin", r"\end") for piece in part)


@st.composite
def rewritten(draw, answers):
    """A pair whose answer has more spaces, fonts, braces and units than before."""
    answer, label = draw(st.sampled_from(answers))
    parts = pieces(answer)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(parts)))
        end = draw(st.integers(start, len(parts)))
        kind = draw(st.sampled_from(["nothing", "font", "unit"]))
        if kind == "nothing":
            parts[start:start] = [draw(st.sampled_from(NOTHINGS))]
        elif kind == "unit":
            parts[start:start] = [draw(st.sampled_from(UNITS))]
        elif is_balanced(parts[start:end]):
            parts[start:end] = [draw(st.sampled_from(FONTS)), *parts[start:end], "}"]
    return "".join(parts), label


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(rewritten(WRONG))
def test_no_rewriting_makes_a_wrong_answer_right(math_grader, pair):
    answer, label = pair
    [verdict] = graded(math_grader, [(f"</think>\\boxed{{{answer}}}", label)])
    assert not verdict.correct


@st.composite
def respaced(draw):
    """A right pair whose answer has spaces between its symbols and braces or fonts around all of it."""
    answer, label = draw(st.sampled_from(RIGHT))
    shown = ""
    for piece in pieces(answer):
        shown += piece
        if not re.fullmatch(r"\\(?:[A-Za-z]+|\$)", piece) and draw(st.booleans()):
            shown += draw(st.sampled_from(SPACES))
    for font in draw(st.lists(st.sampled_from(["{", r"\boxed{", r"\mathbf{", r"\textcolor{red}{", "$"]), max_size=3)):
        shown = f"$ {shown} $" if font == "$" else f"{font}{shown}}}"
    return shown, label


@settings(max_examples=400, deadline=None, derandomize=True)
@given(respaced())
def test_no_spaces_or_braces_make_a_right_answer_wrong(math_grader, pair):
    answer, label = pair
    [verdict] = graded(math_grader, [(f"</think>\\boxed{{{answer}}}", label)])
    assert verdict.correct
