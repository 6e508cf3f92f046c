"""Exact rational arithmetic, with bounds on time and memory that hold for any answer."""

import math
from fractions import Fraction

from milepost.rewards.trees import Tree, number

MAX_BITS = 4096  # of a numerator or denominator, at every step: about 1,200 digits


class NotArithmetic(ValueError):
    """The expression is not arithmetic on rational numbers with a rational result."""


class NoValue(ValueError):
    """The expression is arithmetic, but divides by zero or exceeds the bounds."""


def evaluate(tree: Tree) -> Fraction:
    """The exact value of sums, products, powers, factorials, binomials, perfect roots, |x|, floors and ceilings.

    Raises:
        NotArithmetic: it is anything else.
        NoValue: it divides by zero, or a number in it exceeds ``MAX_BITS``.
    """
    folded = fold(tree)
    if folded[0] != "number":
        raise NotArithmetic(folded[0])
    return Fraction(*folded[1:])


def fold(tree: Tree) -> Tree:
    """Replace every part of the tree that is rational arithmetic by its value; `NoValue` if one has none."""
    operation, *operands = tree
    operands = [fold(operand) if isinstance(operand, tuple) else operand for operand in operands]
    if operation in OPERATIONS and all(operand[0] == "number" for operand in operands):
        try:
            return number(_bounded(OPERATIONS[operation](*(Fraction(*operand[1:]) for operand in operands))))
        except NotArithmetic:
            pass
    elif operation == "number":
        _bounded(Fraction(*operands))
    return (operation, *operands)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NoValue(f"a number of more than {MAX_BITS} bits")
    return value


def _sum(*terms: Fraction) -> Fraction:
    total = Fraction(0)
    for term in terms:
        total = _bounded(total + term)
    return total


def _product(*factors: Fraction) -> Fraction:
    product = Fraction(1)
    for factor in factors:
        product = _bounded(product * factor)
    return product


def _inverse(value: Fraction) -> Fraction:
    if not value:
        raise NoValue("division by zero")
    return 1 / value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise NotArithmetic("a root")
    if not base and exponent < 0:
        raise NoValue("division by zero")
    if abs(base) != 1 and base:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * (bits - 1) > MAX_BITS:  # before it is computed: 9^9^9^9 has 10^(10^8) digits
            raise NoValue(f"a number of more than {MAX_BITS} bits")
    elif base:
        exponent %= 2
    return base ** int(exponent) if base or exponent < 1 else Fraction(0)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise NotArithmetic("a factorial of something else than 0, 1, 2 ...")
    if value > MAX_BITS:
        raise NoValue(f"a number of more than {MAX_BITS} bits")
    return Fraction(math.factorial(int(value)))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0 or bottom < 0:
        raise NotArithmetic("a binomial coefficient of something else than 0, 1, 2 ...")
    if top > MAX_BITS:
        raise NoValue(f"a number of more than {MAX_BITS} bits")
    return Fraction(math.comb(int(top), int(min(bottom, top + 1))))


def _root(value: Fraction, index: Fraction) -> Fraction:
    """The real root if it is rational, else `NotArithmetic`."""
    if index.denominator != 1 or not 2 <= index <= MAX_BITS or (value < 0 and index % 2 == 0):
        raise NotArithmetic("a root that is not rational")
    degree, sign = int(index), -1 if value < 0 else 1
    root = Fraction(_integer_root(abs(value.numerator), degree), _integer_root(value.denominator, degree))
    if root**degree != abs(value):
        raise NotArithmetic("a root that is not rational")
    return sign * root


def _integer_root(value: int, degree: int) -> int:
    """The integer part of the root, by bisection."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


OPERATIONS = {
    "add": _sum,
    "multiply": _product,
    "negate": lambda value: -value,
    "invert": _inverse,
    "power": _power,
    "root": _root,
    "factorial": _factorial,
    "binomial": _binomial,
    "absolute": abs,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceiling": lambda value: Fraction(math.ceil(value)),
}
