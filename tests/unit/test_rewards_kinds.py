"""Answers of many kinds beside a label: what says the same earns the reward, and nothing else does.

Each kind is a way in which a grader that rewrites text goes wrong; labels are spelled as in AIME, DAPO, MATH-500 and
math-verify's documentation.
"""

import pytest

from answered import graded
from milepost.configuration.schema import Reward
from milepost.rewards.grader import Grader


@pytest.fixture(scope="module")
def grader():
    with Grader(Reward(max_seconds=10)) as grader:
        yield grader


def pairs(kinds):
    return [
        pytest.param(answer, label, id=f"{kind}: {answer} | {label}")
        for kind, cases in kinds.items()
        for answer, label in cases
    ]


RIGHT = {
    "leading point": [
        (".5", "1/2"),
        ("0.5", ".5"),
        ("-.5", "-0.5"),
        ("{.25}", "1/4"),
        ("(.5,.25)", "(0.5, 0.25)"),
        ("[.5, 1)", r"[\frac{1}{2}, 1)"),
    ],
    "repeating decimal": [
        ("0.(3)", r"\frac13"),
        (r"0.\overline{3}", "1/3"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        ("0.1(6)", r"\frac{1}{6}"),
        (r"0.\overline{142857}", r"\frac17"),
        (r"0.\bar{3}", r"\frac13"),
        ("0.3\u0305", r"\frac13"),
        ("-1.(3)", r"-\frac43"),
        ("2.(9)", "3"),
    ],
    "scientific notation": [
        ("1.5e3", "1500"),
        ("1.5E-3", "0.0015"),
        (r"1.5\times 10^3", "1500"),
        (r"3.3\cdot10^{1}", "33"),
        ("1.5 × 10³", r"1.5\times10^3"),
    ],
    "mixed number": [
        (r"2\frac12", "2.5"),
        ("2 1/2", r"\frac52"),
        (r"137 \frac{1}{2}", r"\frac{275}{2}"),
        (r"137\tfrac{1}{2}", "137.5"),
        (r"-2\frac{1}{2}", "-2.5"),
        ("2½", "2.5"),
    ],
    "thousands": [
        ("2,048", "2048"),
        ("2{,}048", "2048"),
        (r"2\,048", "2048"),
        (r"2\;048", "2048"),
        ("2~048", "2048"),
        (r"2{\,}048", "2048"),
        (r"2\thinspace048", "2048"),
        ("2 048", "2048"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("11,111,111,100", r"11,\!111,\!111,\!100"),
        (r"\$32,\!348", "32348"),
        ("1,024.50", "1024.5"),
        ("(1{,}024, 5)", "(1024, 5)"),
        ("1,024, 2,048", "1024, 2048"),
    ],
    "other scripts": [
        ("२५", "25"),
        ("٢٥", "25"),
        ("２５", "25"),
        (r"\frac{१}{२}", r"\frac12"),
        ("٣٫٥", "3.5"),
        ("٤٬٢٩٦", "4296"),
        ("√(16)", "4"),
        ("2√3", r"2\sqrt3"),
        ("√2/2", r"\frac{\sqrt{2}}{2}"),
        ("∛8", "2"),
        ("∜16", "2"),
        ("9π", r"9\pi"),
        ("β+α", r"\alpha+\beta"),
        ("x² + 1", "1+x^2"),
        ("[0,∞)", r"[0,\infty)"),
        ("ℝ", r"(-\infty,\infty)"),
        ("ℝ∖{0}", r"\mathbb{R}\setminus\{0\}"),
        ("(−∞,2)∪(3,∞)", r"(-\infty,2)\cup(3,\infty)"),
        ("x ≤ 3", r"x\leq 3"),
        ("𝟑𝟑", "33"),
    ],
    "fraction": [
        (r"\nicefrac{1}{4}", r"\frac14"),
        (r"\sfrac{1}{4}", "0.25"),
        (r"{3 \over 4}", r"\frac{3}{4}"),
        (r"3 \over 4", "3/4"),
        (r"\frac{1}{2}", r"{1\over2}"),
        (r"\frac 12", "0.5"),
        (r"\frac{3}4", "0.75"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\frac{1}{-2}", r"-\frac12"),
        (r"\frac{a}{2}", r"{a \over 2}"),
    ],
    "base": [
        ("4210_{5}", "4210_5"),
        ("4210_5", "4210_{5}"),
        ("4210_{(5)}", "4210_5"),
        ("(4210)_5", "4210_5"),
        (r"4210_\text{5}", "4210_{5}"),
        ("2516_8", "2516_8"),
    ],
    "choice and text": [
        ("C", r"\text{(C)}"),
        ("(C)", r"\text{(C)}"),
        (r"\text{C}", r"\text{(C)}"),
        (r"\textbf{(C)}", "C"),
        (r"\mathrm{(C)}", "C"),
        ("C.", "C"),
        ("Evelyn", r"\text{Evelyn}"),
        (r"\text{evelyn}", r"\text{Evelyn}"),
        (r"\textbf{Yes}", "yes"),
        (r"\text{Saturday}.", "Saturday"),
        ("June 20", r"\text{June 20}"),
    ],
    "money, percent, degrees": [
        ("18.90", r"\$18.90"),
        (r"18.9 \text{ dollars}", r"\$18.90"),
        (r"-\$5", "-5"),
        ("€5", "5"),
        ("10", r"10\%"),
        ("10 percent", r"10\%"),
        ("90", r"90^\circ"),
        ("90°", r"90^{\circ}"),
        (r"90\text{ degrees}", r"90^\circ"),
        (r"33^\circ\mathrm{C}", "33"),
        ("33℃", "33"),
    ],
    "unit": [
        ("12kg", "12"),
        ("33 feet", "33"),
        (r"5 \text{ cm}", r"5\,\text{cm}"),
        ("5", r"5 \text{ inches}"),
        (r"15\text{ cm}^2", r"15 \mbox{ cm}^2"),
        (r"15\text{ square centimeters}", r"15\text{ cm}^2"),
        (r"60\text{ mph}", r"60 \text{ miles per hour}"),
        (r"60\text{ km/h}", "60"),
        (r"9\pi\text{ cm}^2", r"9\pi"),
        (r"x^2\text{ m}", "x^2"),
        (r"33\text{ ordered pairs}", "33"),
        (r"\text{3 hours}", "3"),
        (r"33\text{ m}^3", "33"),
        (r"33\text{ sq. ft.}", "33"),
        ("33平方厘米", "33"),
    ],
    "list": [
        (r"\{1,2\}", "1,2"),
        ("2, 1", r"\{1,2\}"),
        (r"1 \text{ and } 2", "1, 2"),
        ("1 or 2", "2,1"),
        (r"1 \textbf{ and } 2", "1,2"),
        (r"1,2,\text{ and }3", "1,2,3"),
        ("1; 2", "1,2"),
        (r"1 \lor 2", "2, 1"),
        ("1和2", "1,2"),
        ("x=3,x=-1", r"x=-1\text{ or }x=3"),
        ("-1,3", r"x=-1\text{ or }x=3"),
        (r"x = 3 \mathrm{\ or\ } x = -1", "-1, 3"),
        ("x = -1, 3", "-1, 3"),
        ("y=2, x=1", "x=1, y=2"),
        (r"(3,4) \text{ and } (1,2)", "(1,2), (3,4)"),
        (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"x=1\pm\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    ],
    "tuple and interval": [
        (r"\left(2,1\right)", "(2,1)"),
        (r"(3, \frac{π}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        ("(x,y)=(1,2)", "(1,2)"),
        (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
        (r"(0.5, +\infty)", r"(\frac{1}{2},\infty)"),
        (r"x \in [-2,7]", "[-2,7]"),
        ("[-2,7]", r"x \in [-2,7]"),
        (r"-2 \le x \le 7", "[-2,7]"),
        ("[-2,7]", r"-2 \leq x \leq 7"),
        (r"x\ge -2", r"[-2,\infty)"),
        ("3<x", "x>3"),
        ("2x>6", "x>3"),
        ("-2x<-6", "x>3"),
        (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)"),
        (r"x<2,\text{ or }x>3", r"(-\infty,2)\cup(3,\infty)"),
        ("x>3或x<2", r"(-\infty,2)\cup(3,\infty)"),
        (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}\setminus\{0\}"),
        (r"\varnothing", r"\emptyset"),
    ],
    "number, named or repeated": [
        ("x = 33", "33"),
        ("33 = x", "33"),
        (r"x^\circ = 33^\circ", "33"),
        ("m + n = 33", "33"),
        (r"x + \frac{1}{x} = 33", "33"),
        (r"S = \frac{1}{2}ab = 33", "33"),
        ("f(2) = 33", "33"),
        ("f'(2) = 33", "33"),
        (r"\binom{n}{2} = 33", "33"),
        (r"\text{Area} = 33", "33"),
        ("AB = 33", "33"),
        ("|AB| = 33", "33"),
        (r"A_{\triangle ABC} = 33", "33"),
        (r"30 + 3 = \frac{66}{2} = 33", "33"),
        (r"33 \approx 33.0", "33"),
        (r"\text{The answer is } 33", "33"),
        ("The final answer is: 33", "33"),
        (r"\therefore x = 33", "33"),
    ],
    "equation": [
        ("4x-2y+6=0", "y=2x+3"),
        ("y-2x=3", "y=2x+3"),
        ("2x+3", "y = 2x+3"),
        ("y = 2x+3", "2x+3"),
        ("f(x)=2x+3", "2x+3"),
        ("9x^2+4y^2=36", r"\frac{x^2}{4}+\frac{y^2}{9}=1"),
        ("1=x^2+y^2", "x^2+y^2=1"),
        (r"\sqrt{2}x+\sqrt{2}y=2", r"x+y=\sqrt2"),
        (r"y = \sin x", r"2y = 2\sin x"),
    ],
    "matrix": [
        (r"\begin{bmatrix}1&2\\3&4\\\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        (r"\begin{pmatrix} -1/3 \\[1ex] 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
        (r"\frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}x+x\\\sqrt4\end{pmatrix}", r"\begin{pmatrix}2x\\2\end{pmatrix}"),
    ],
    "expression": [
        ("-5i+6", "6-5i"),
        ("-q+p", "p-q"),
        ("ba", "ab"),
        (r"\sin^2 x", r"1-\cos^2 x"),
        (r"\frac{\sin x}{\cos x}", r"\tan x"),
        (r"2\ln 2", r"\ln 4"),
        (r"2\log 2", r"\log 4"),
        ("(e^x)^2", "e^{2x}"),
        ("(x-1)^{-1}", r"\frac{1}{x-1}"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\frac{n(n-1)}{2}", r"\binom{n}{2}"),
        ("a_2+a_{1}", "a_1+a_2"),
        (r"1+\sqrt2", r"\sqrt{3+2\sqrt2}"),
        (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
        (r"\cos 60^\circ", r"\frac12"),
        (r"\frac{\pi}{4}", r"\arctan 1"),
        (r"\lg 1000", "3"),
        (r"\lceil \pi \rceil", "4"),
        (r"\left|-33\right|", "33"),
    ],
    "fonts and braces": [
        (r"\boxed{33}", "33"),
        (r"{\bf 33}", "33"),
        (r"\displaystyle 33", "33"),
        ("$33$", "33"),
        (r"\(33\)", "33"),
        (r"\color{red}33", "33"),
        (r"\textcolor{red}{33}", "33"),
        (r"\underline{33}", "33"),
        (r"\mathbf{x}^{2}", "x^2"),
        (r"33\quad", "33"),
    ],
}

WRONG = {
    "leading point": [
        ("1.5", "15"),
        (r"\left.5", "5"),
        (r"\left.5\right.", "5"),
        ("5.", ".5"),
        (". 5", "5"),
        ("{.}5", "5"),
        (r"\text{.}5", "5"),
        ("0.33", "33"),
    ],
    "glued digits": [
        (r"3\text{ }3", "33"),
        (r"3\mathbf{ }3", "33"),
        (r"3\mathbf{3}", "33"),
        (r"\mathbf{3}3", "33"),
        ("3{}3", "33"),
        ("{3}{3}", "33"),
        (r"3\hspace{1mm}3", "33"),
        (r"3\phantom{0}3", "33"),
        (r"3\,3", "33"),
        (r"3\!3", "33"),
        (r"3\quad340", "3340"),
        (r"3\text{ and }3", "33"),
        ("3 foo 3", "33"),
        (r"3\text{foo}3", "33"),
        (r"3\\3", "33"),
        ("3 & 3", "33"),
        ("3\u200c3", "33"),
        ("3\u20623", "33"),
        ("3\u200b3", "33"),
        ("①3", "13"),
        ("3³", "33"),
        ("3₃", "33"),
        ("3½", "31/2"),
        ("2e3", r"2e\cdot 3"),
        (r"\frac123", r"\frac{1}{23}"),
        (r"\frac\mbox{}{2}{3}", r"\frac23"),
        (r"\sqrt16", "4"),
    ],
    "multiplier as unit": [
        (r"33\text{ lakh}", "33"),
        ("33 crore", "33"),
        ("33k", "33"),
        (r"33\text{ K}", "33"),
        (r"33\text{ M}", "33"),
        ("33 MM", "33"),
        (r"33\text{ bn}", "33"),
        (r"33\text{ dozen}", "33"),
        ("33 score", "33"),
        (r"33\text{ gross}", "33"),
        (r"33\text{ per mille}", "33"),
        (r"33\text{ basis points}", "33"),
        (r"33\text{ hundred}", "33"),
        ("33 thousand", "33"),
        ("33万", "33"),
        ("33‱", "33"),
        ("33% 33%", "33"),
    ],
    "word that changes the value": [
        (r"33\text{ squared}", "33"),
        ("33 cubed", "33"),
        (r"33\text{ root}", "33"),
        (r"33\text{ factorial}", "33"),
        (r"33\text{ base } 7", "33"),
        (r"33\bmod 7", "33"),
        (r"33\text{ or so}", "33"),
        (r"33\text{ or more}", "33"),
        (r"33\text{ minus one}", "33"),
        (r"\text{not } 33", "33"),
        (r"\text{about }33", "33"),
        (r"\text{33 apples and 34 pears}", "33"),
        (r"33\text{ hours }20", "33"),
        ("33 feet 4 inches", "33"),
        (r"\text{thirty-three}", "33"),
    ],
    "unit": [
        (r"5\text{ km}", r"5\text{ cm}"),
        (r"5\text{ cm}", r"5\text{ cm}^2"),
        (r"5 \text{ cents}", r"\$5"),
        (r"33^\circ", r"33\%"),
        ("33m", "33"),
        (r"33\%", "0.33"),
        (r"C\%", "C"),
        (r"4210_5\%", "4210_5"),
        (r"(1,2)\%", "(1,2)"),
    ],
    "relation": [
        (r"\approx 33", "33"),
        (r"\neq 33", "33"),
        ("x > 33", "33"),
        (r"x \ne 33", "33"),
        (r"x \not= 33", "33"),
        (r"34 \not= 33", "33"),
        (r"34 \approx 33", "33"),
        (r"33 \approx 34", "33"),
        ("33 = 34", "33"),
        ("34 = 33", "33"),
        ("x = 34 = 33", "33"),
        (r"34 \to 33", "33"),
        (r"34 \equiv 33", "33"),
        (r"34\text{, no, }x = 33", "33"),
        ("34 so x = 33", "33"),
        ("[3 = 33", "33"),
        ("y = 33", "x = 33"),
    ],
    "equation that is linear in its one unknown": [
        ("2x = 33", "33"),
        ("x + 1 = 33", "33"),
        ("-x=33", "33"),
        ("34 ab = 33", "33"),
        (r"\${2x}^\circ = 33", "33"),
        ("34 cm = 33", "33"),
        (r"\frac{x}{2} = 33", "33"),
    ],
    "several answers": [
        ("33, 34", "33"),
        ("33; 34", "33"),
        (r"33\pm1", "33"),
        (r"\{33,34\}", "33"),
        (r"\{33\}", "33"),
        ("[33]", "33"),
        ("(33, 34)", "33"),
        (r"33 \cup 34", "33"),
        ("33 34", "3334"),
        ("33:34", "33"),
        ("33?34", "33"),
    ],
    "base": [
        ("33_{10}", "33"),
        ("3_3", "33"),
        ("4210_6", "4210_5"),
        ("4210", "4210_5"),
        ("4210_5", "4210"),
    ],
    "list": [
        ("(1,2)", "1,2"),
        ("(1,2)", r"\{1,2\}"),
        (r"\{1,2\}", "(1,2)"),
        ("1", "1,2"),
        ("1,1", "1,2"),
        ("1,2,3", "1,2"),
        (r"-1\text{ and }4", "-1,3"),
        ("2,1", "x=1,y=2"),
        ("x=2,y=1", "x=1,y=2"),
        (r"1 \pm \sqrt{17}", r"1 \pm \sqrt{19}"),
    ],
    "tuple and interval": [
        ("(2,1)", "(1,2)"),
        ("(1,2)", "[1,2]"),
        ("[1,2)", "(1,2]"),
        (r"(0,1)\cup(2,4)", r"(0,1)\cup(2,3)"),
        (r"(0,1)\cap(2,3)", r"(0,1)\cup(2,3)"),
        ("x>3", "x<3"),
        ("x>3", r"x\ge3"),
        ("y>3", "x>3"),
        ("-2x>-6", "x>3"),
        (r"x>1 \text{ or } x<3", r"x>1\text{ and }x<3"),
        ("(1,3)", r"x<1 \text{ or } x>3"),
        (r"\infty", r"-\infty"),
        (r"0\cdot\infty", "0"),
    ],
    "equation": [
        ("r=1", "x^2+y^2=1"),
        ("x^2+y^2=2", "x^2+y^2=1"),
        ("x+y=1", "x^2+y^2=1"),
        ("1", "x^2+y^2=1"),
        ("0=0", "2x-y+2z+7=0"),
        ("x=x", "y=2x+3"),
        ("0", "2x-y+2z+7=0"),
        ("2x-y+2z+7", "2x-y+2z+7=0"),
        ("0(2x-y+2z+7)=0", "2x-y+2z+7=0"),
        ("x(2x-y+2z+7)=0", "2x-y+2z+7=0"),
        ("2x+4", "y=2x+3"),
        (r"y \ne 2x+3", "y=2x+3"),
        ("y > 2x+3", "y=2x+3"),
        ("x+34=x+33", "x+33"),
    ],
    "matrix": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2&3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}33\end{pmatrix}", "33"),
        (r"\begin{pmatrix}3\\3\end{pmatrix}", "33"),
        ("(1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "almost": [
        ("0.3", r"\frac13"),
        ("0.333333333333", r"\frac13"),
        (r"0.33\ldots", "0.33"),
        ("0.33...", "0.33"),
        ("33.00000000001", "33"),
        ("1.4142135623730950488", r"\sqrt2"),
        ("3.14159265358979323846264338327950288419716939937510582097494459", r"\pi"),
    ],
    "thousands": [
        ("3,5", "3.5"),
        ("1.024", "1024"),
        ("1'024", "1024"),
        ("10,00", "1000"),
        ("12,34,567", "1234567"),
        (r"1\,02", "102"),
        (r"1\!024", "1024"),
        ("1, 024", "1024"),
    ],
    "ambiguous": [
        ("1/2x", r"\frac{x}{2}"),
        ("1/2x", r"\frac{1}{2x}"),
        ("√16x", "4x"),
        (r"\sin 30", r"\frac12"),
        (r"\log 100", "2"),
        (r"\ln x", r"\log x"),
        ("x", "|x|"),
        ("33i", "33"),
        ("33e", "33"),
        ("33x", "33"),
        (r"\overline{33}", "33"),
        (r"\cancel{33}34", "34"),
    ],
    "choice and text": [
        ("B", "C"),
        ("c", "C"),
        ("(C)(D)", "C"),
        ("C or D", "C"),
        ("Evelyn or Navin", r"\text{Evelyn}"),
        (r"\text{not Evelyn}", r"\text{Evelyn}"),
        ("act", r"\text{cat}"),
        ("AB", "ab"),
    ],
}


@pytest.mark.parametrize(("answer", "label"), pairs(RIGHT))
def test_the_same_in_another_spelling_is_correct(grader, answer, label):
    [verdict] = graded(grader, [(f"</think>\\boxed{{{answer}}}", label)])
    assert verdict.correct and verdict.reason == "correct"


@pytest.mark.parametrize(("answer", "label"), pairs(WRONG))
def test_anything_else_is_wrong(grader, answer, label):
    [verdict] = graded(grader, [(f"</think>\\boxed{{{answer}}}", label)])
    assert not verdict.correct and verdict.reason in ("wrong", "several_answers")


LABELS = r"""
025
p - q
\frac{14}{3}
9
\text{Evelyn}
42
27
90^\circ
3\sqrt{13}
4
2220
\frac{3}{56}
284
5
\sqrt{51}
6 - 5i
-50
\pi
28
3
6+9i
13535
(6,31,-1)
\left( 3, \frac{\pi}{2} \right)
10
x^3 + 3x - 6
144
78
-2 + 7i
225
52_8
720
7
\text{(C)}
\text{(B)}
(-\infty, 2) \cup (3, \infty)
[-2,7]
(5,\infty)
(3,4]
x \in [-2,8]
\{1\pm\sqrt{5},-2\}
1 \pm \sqrt{19}
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}
\begin{pmatrix} 1/5 & -2/5 \\ -2/5 & 4/5 \end{pmatrix}
2516_8
4210_{5}
\$36
\$18.90
15\%
50 \text{ inches}
15\mbox{ cm}^2
137 \frac{1}{2}
0.0000672
11,\! 111,\! 111,\! 100
-\frac{35}{9}
5r^5
11\sqrt2
y = 2x + 3
2x-y+2z+7=0
x^2+y^2=1
\frac{1}{2},\frac{1}{3}
3, 5, 7
\text{east}
\text{Saturday}
\text{odd}
\cot x
e^{2x}
\frac{x+2}{7}
\log_2 3
\infty
\emptyset
\mathbb{R}
2^{n-1}
n!+n
\tan^2 \theta
\frac{\sqrt{2}}{2}a
a_1+a_2
\sum_{k=1}^{n} k
\int_0^1 f(x)\,dx
x \equiv 3 \pmod{7}
x \ne 2
x>33
1 < x < 2
""".strip().splitlines()


@pytest.mark.parametrize("label", LABELS)
def test_every_label_is_its_own_answer_and_that_of_no_other(grader, label):
    verdicts = graded(grader, [(f"</think>\\boxed{{{answer}}}", label) for answer in LABELS])
    assert [answer for answer, verdict in zip(LABELS, verdicts, strict=True) if verdict.correct] == [label]
