r"""The tree of an expression: a tuple of an operation and its operands, ``("add", a, b)``.

It contains only strings, integers and trees, so it can be sent to a worker as JSON. Leaves are ``("number", numerator,
denominator)``, ``("symbol", name)`` and ``("constant", name)``.
"""

from fractions import Fraction

Tree = tuple

SET_OPERATIONS = {"union", "intersection", "difference"}
COLLECTIONS = {"sequence", "set", "matrix", *SET_OPERATIONS}  # not operands of arithmetic, except matrices


def number(value: Fraction | int) -> Tree:
    return ("number", Fraction(value).numerator, Fraction(value).denominator)


def decimal(text: str) -> Tree:
    r"""``12``, ``1.5``, ``1.5e3``, and the repeating ``0.1(6)``, ``0.1\overline{6}``."""
    mantissa, _, exponent = text.lower().partition("e") if "\\" not in text else (text, "", "")
    if exponent:
        return ("multiply", decimal(mantissa), ("power", number(10), number(int(exponent))))
    if "(" not in text and "\\" not in text:
        return number(Fraction(text))
    head, tail = text.split("(" if "(" in text else "\\", 1)
    repeated = "".join(filter(str.isdigit, tail))
    whole, _, fixed = head.partition(".")
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), scale) + Fraction(int(repeated), scale * (10 ** len(repeated) - 1))
    return number(value)


def unknowns(tree: Tree) -> set[str]:
    """The names of its symbols and unknown functions."""
    own = {tree[1]} if tree[0] in ("symbol", "apply") else set()
    return own.union(*(unknowns(operand) for operand in tree[1:] if isinstance(operand, tuple)))
