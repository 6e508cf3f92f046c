"""Polynomials in normal form, which decide most comparisons of expressions quickly and without sympy.

Roots, functions and constants count as separate unknowns. So equal normal forms prove that two expressions are equal;
different ones prove that they differ only if all unknowns are plain symbols (`is_plain`).
"""

from fractions import Fraction

from milepost.rewards.arithmetic import MAX_BITS
from milepost.rewards.trees import COLLECTIONS, Tree

MAX_TERMS = 200
MAX_PRODUCTS = 2000  # products of terms in one multiplication
MAX_EXPONENT = 20

NO_SCALARS = COLLECTIONS | {"based", "relation"}

Monomial = tuple[tuple[Tree, int], ...]  # unknowns with their exponents, sorted
Polynomial = dict[Monomial, Fraction]


class NotPolynomial(ValueError):
    """The tree is not a scalar expression, or its normal form is too large."""


def normal_form(tree: Tree) -> Polynomial:
    """The nonzero coefficients by monomial."""
    operation, *operands = tree
    if operation == "number":
        return _clean({(): Fraction(*operands)})
    if operation in NO_SCALARS or tree == ("constant", "infinity"):
        raise NotPolynomial(operation)
    if operation == "negate":
        return {monomial: -value for monomial, value in normal_form(operands[0]).items()}
    if operation == "add":
        return _sum([normal_form(operand) for operand in operands])
    if operation == "multiply":
        return _product([normal_form(operand) for operand in operands])
    if operation == "power" and operands[1][0] == "number" and operands[1][2] == 1:
        exponent = operands[1][1]
        if 0 < exponent <= MAX_EXPONENT:
            return _product([normal_form(operands[0])] * exponent)
    return {((tree, 1),): Fraction(1)}


def difference(one: Tree, other: Tree) -> Polynomial:
    """The normal form of one minus the other."""
    return _sum([normal_form(one), {monomial: -value for monomial, value in normal_form(other).items()}])


def ratio(one: Polynomial, other: Polynomial) -> Fraction | None:
    """The nonzero number that multiplied by ``other`` gives ``one``; None if there is none."""
    if not one or one.keys() != other.keys():
        return None
    ratios = {value / other[monomial] for monomial, value in one.items()}
    return ratios.pop() if len(ratios) == 1 else None


def is_plain(polynomial: Polynomial) -> bool:
    return all(unknown[0] == "symbol" for monomial in polynomial for unknown, _ in monomial)


def _sum(polynomials: list[Polynomial]) -> Polynomial:
    total: Polynomial = {}
    for polynomial in polynomials:
        for monomial, value in polynomial.items():
            total[monomial] = total.get(monomial, Fraction(0)) + value
    return _clean(total)


def _product(polynomials: list[Polynomial]) -> Polynomial:
    product: Polynomial = {(): Fraction(1)}
    for polynomial in polynomials:
        if len(product) * len(polynomial) > MAX_PRODUCTS:
            raise NotPolynomial("too many terms")
        terms: Polynomial = {}
        for one, value in product.items():
            for other, factor in polynomial.items():
                monomial = _joined(one, other)
                terms[monomial] = terms.get(monomial, Fraction(0)) + value * factor
        product = _clean(terms)
    return product


def _joined(one: Monomial, other: Monomial) -> Monomial:
    exponents = dict(one)
    for unknown, exponent in other:
        exponents[unknown] = exponents.get(unknown, 0) + exponent
    return tuple(sorted(exponents.items(), key=repr))


def _clean(polynomial: Polynomial) -> Polynomial:
    """Drop terms with coefficient 0."""
    if len(polynomial) > MAX_TERMS:
        raise NotPolynomial("too many terms")
    for value in polynomial.values():
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise NotPolynomial("too large a coefficient")
    return {monomial: value for monomial, value in polynomial.items() if value}
