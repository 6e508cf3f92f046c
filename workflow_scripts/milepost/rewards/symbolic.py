"""Equality of expressions with sympy. Only the worker runs this, since sympy's time and memory are unbounded."""

from collections.abc import Callable
from fractions import Fraction

import sympy
from sympy import Basic, Expr, Matrix

from milepost.rewards.trees import SET_OPERATIONS, Tree

PROBES = [Fraction(7, 5), Fraction(-13, 11), Fraction(17, 7), Fraction(23, 29), Fraction(-31, 37), Fraction(41, 13)]
DIGITS = 50
TINY = sympy.Float(10) ** -40

CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infinity": sympy.oo}
SETS = {
    r"\mathbb Q": sympy.Rationals,
    r"\mathbb Z": sympy.Integers,
    r"\mathbb N": sympy.Naturals,
    r"\mathbb C": sympy.Complexes,
}
UNNAMED_BASE = sympy.Symbol("base", positive=True)  # of \log: 10 for some, e for others


def equal(label: Tree, answer: Tree) -> bool:
    """Whether two trees of the same structure are equal for all real values of their unknowns."""
    if label[0] == "relation":
        return _same_relation(label, answer)
    if {label[0], answer[0]} & SET_OPERATIONS:
        return _same_set(_set(label), _set(answer))
    one, other = _build(label), _build(answer)
    if isinstance(one, Matrix) or isinstance(other, Matrix):
        if not (isinstance(one, Matrix) and isinstance(other, Matrix)) or one.shape != other.shape:
            return False
        return all(_is_zero(a - b) for a, b in zip(one, other, strict=True))
    return one == other or _is_zero(one - other)


def _is_zero(difference: Expr) -> bool:
    """Whether an expression is zero: numerically to 40 digits at every probe, and provably."""
    if difference.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan):
        return False
    return _vanishes(difference) and (sympy.simplify(difference) == 0 or difference.equals(0) is True)


def _vanishes(difference: Expr) -> bool:
    symbols = _symbols(difference)
    for start in range(len(PROBES) if symbols else 1):
        values = {symbol: _rational(PROBES[(start + place) % len(PROBES)]) for place, symbol in enumerate(symbols)}
        value = difference.subs(values).evalf(DIGITS)
        if value.is_finite and value.is_number and not abs(value) < TINY:
            return False
    return True


def _same_relation(label: Tree, answer: Tree) -> bool:
    """Whether one equation is a nonzero multiple of the other, or one inequality a positive multiple of the other."""
    signs, other_signs = label[1].split(), answer[1].split()
    if len(signs) != len(other_signs):
        return False
    if len(signs) > 1:
        return signs == other_signs and all(equal(one, other) for one, other in zip(label[2:], answer[2:], strict=True))
    one, other = (_build(tree[2]) - _build(tree[3]) for tree in (label, answer))
    if signs != other_signs:
        if {signs[0], other_signs[0]} not in ({"<", ">"}, {r"\leq", r"\geq"}):
            return False
        other = -other
    if signs[0] not in ("=", "<", ">", r"\leq", r"\geq", r"\neq") or _vanishes(one) or _vanishes(other):
        return False
    probe = {symbol: _rational(PROBES[place % len(PROBES)]) for place, symbol in enumerate(_symbols(one, other))}
    if one.subs(probe).equals(0):
        return False
    ratio = sympy.radsimp(other.subs(probe) / one.subs(probe))
    return _is_zero(other - ratio * one) and (signs[0] in ("=", r"\neq") or ratio.is_positive is True)


def _symbols(*expressions: Expr) -> list[sympy.Symbol]:
    return sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)


def _same_set(one: sympy.Set, other: sympy.Set) -> bool:
    return one == other or sympy.SymmetricDifference(one, other).is_empty is True


def _set(tree: Tree) -> sympy.Set:
    operation, *operands = tree
    if operation == "sequence" and len(operands) == 4:
        low, high = _build(operands[2]), _build(operands[3])
        return sympy.Interval(low, high, operands[0] == "(", operands[1] == ")")
    if operation == "set":
        return sympy.FiniteSet(*map(_build, operands))
    if operation == "constant":
        return SETS[operands[0]]
    combine = {"union": sympy.Union, "intersection": sympy.Intersection, "difference": sympy.Complement}[operation]
    first, *others = map(_set, operands)
    return combine(first, sympy.Union(*others)) if operation == "difference" else combine(first, *others)


def _build(tree: Tree) -> Basic | Matrix:
    """The sympy object of a tree; KeyError if it is not an expression."""
    operation, *operands = tree
    if operation == "number":
        return sympy.Rational(*operands)
    if operation == "symbol":
        return sympy.Symbol(operands[0], real=True)
    if operation == "constant":
        return CONSTANTS[operands[0]]
    if operation == "matrix":
        return Matrix([[_build(cell) for cell in row[1:]] for row in operands])
    if operation == "apply":
        return sympy.Function(operands[0])(*map(_build, operands[1:]))
    if operation == "call":
        return _call(operands[0], *map(_build, operands[1:]))
    return OPERATIONS[operation](*map(_build, operands))


def _call(name: str, value: Expr, base: Expr | None = None) -> Expr:
    if name == "log":
        return sympy.log(value) / sympy.log(UNNAMED_BASE if base is None else base)
    return FUNCTIONS[name](value)


def _product(*factors: Basic | Matrix) -> Basic | Matrix:
    """The product in the written order, which matters for matrices."""
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _sum(*terms: Basic | Matrix) -> Basic | Matrix:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _root(value: Expr, index: Expr) -> Expr:
    """The real root if there is one: the third root of -8 is -2."""
    if value.is_negative and index.is_odd:
        return -sympy.root(-value, index)
    return sympy.root(value, index)


def _rational(value: Fraction) -> Expr:
    return sympy.Rational(value.numerator, value.denominator)


FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    **{
        name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")
    },
    **{"ln": sympy.log, "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan},
    **{"arccot": sympy.acot, "arcsec": sympy.asec, "arccsc": sympy.acsc},
}
OPERATIONS: dict[str, Callable] = {
    "add": _sum,
    "multiply": _product,
    "negate": lambda value: -value,
    "invert": lambda value: 1 / value,
    "power": lambda base, exponent: base**exponent,
    "root": _root,
    "factorial": sympy.factorial,
    "binomial": sympy.binomial,
    "absolute": sympy.Abs,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "degrees": lambda value: value * sympy.pi / 180,
}
