"""Each of many labels equals itself and none of the others.

Labels are spelled as in AIME, DAPO, MATH-500 and math-verify's documentation.
"""

import pytest

from answered import graded

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
def test_each_label_answers_itself_and_no_other(math_grader, label):
    verdicts = graded(math_grader, [(f"</think>\\boxed{{{answer}}}", label) for answer in LABELS])
    assert [answer for answer, verdict in zip(LABELS, verdicts, strict=True) if verdict.correct] == [label]
