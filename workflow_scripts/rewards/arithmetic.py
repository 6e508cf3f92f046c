"""Exact arithmetic on the numbers that answers are written as, within bounds that no answer can push."""

import math
import re
from fractions import Fraction

MAX_BITS = 4096  # of a numerator or denominator, at every step: about 1,200 digits
MAX_DEPTH = 40  # of brackets, exponents and arguments within one another

NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
GROUPED_NUMBER = re.compile(r"[1-9][0-9]{0,2}(?:([, ])[0-9]{3})(?:\1[0-9]{3})*(?![0-9]|[, ][0-9])(?:\.[0-9]+)?")
OPERATOR = re.compile(r"\*\*|[-+*/^]|\\(?:cdot|times|div|ast)(?![a-zA-Z])")
FUNCTION = re.compile(r"\\(frac|sqrt|binom)(?![a-zA-Z])")
OPERATOR_NAMES = {"**": "^", "\\cdot": "*", "\\times": "*", "\\ast": "*", "\\div": "/"}


class NotArithmetic(ValueError):
    """The text is something other than integers and decimals under + - * / ^ ! and their LaTeX forms."""


class NoValue(ValueError):
    """The text is arithmetic, but divides by zero or leaves the bounds."""


def evaluate(text: str) -> Fraction:
    r"""The exact value of an arithmetic expression.

    Takes integers (leading zeros, groups of three split by commas or spaces), decimals, ``+ - * / ^ **``, ``\cdot``,
    ``\times``, ``\div``, brackets, ``\frac``, ``\binom``, ``\sqrt`` of perfect squares, factorials, and a mixed
    number such as ``2\frac{1}{2}``. Two numbers side by side are not one.

    Raises:
        NotArithmetic: it is no such expression.
        NoValue: it is one, but has no value within ``MAX_BITS``.
    """
    return _Reader(text).whole()


class _Reader:
    """Recursive descent over one text; every method leaves ``position`` behind what it has read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.parentheses = 0  # a comma within parentheses separates, it never groups digits

    def whole(self) -> Fraction:
        value = self.sum()
        if self.peek():
            raise NotArithmetic(self.text)
        return value

    def peek(self) -> str:
        """The next character that is not a space, or an empty string at the end."""
        while self.position < len(self.text) and self.text[self.position] == " ":
            self.position += 1
        return self.text[self.position : self.position + 1]

    def operator(self, wanted: str) -> str | None:
        """Take the next operator if it is one of ``wanted``."""
        self.peek()
        match = OPERATOR.match(self.text, self.position)
        name = match and OPERATOR_NAMES.get(match[0], match[0])
        if not name or name not in wanted:
            return None
        self.position = match.end()
        return name

    def sum(self) -> Fraction:
        value = self.product()
        while name := self.operator("+-"):
            term = self.product()
            value = _bounded(value + term if name == "+" else value - term)
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            if name := self.operator("*/"):
                factor = self.signed()
                if name == "/" and not factor:
                    raise NoValue("division by zero")
                value = _bounded(value * factor if name == "*" else value / factor)
            elif self.peek() == "(" or FUNCTION.match(self.text, self.position):
                value = _bounded(value * self.power())  # a product without a sign: 3(11), 3\sqrt{121}
            else:
                return value

    def signed(self) -> Fraction:
        sign = 1
        while name := self.operator("+-"):
            sign = -sign if name == "-" else sign
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.postfix()
        if not self.operator("^"):
            return base
        self.deeper()
        exponent = self.signed()
        self.depth -= 1
        return _power(base, exponent)

    def postfix(self) -> Fraction:
        value = self.atom()
        if self.peek() == "!":
            self.position += 1
            if self.peek() == "!":
                raise NotArithmetic("a double factorial")
            value = _factorial(value)
        return value

    def atom(self) -> Fraction:
        character = self.peek()
        if character and character in "({":
            return self.bracketed()
        if match := FUNCTION.match(self.text, self.position):
            self.position = match.end()
            return self.function(match[1])
        value = self.number()
        if value.denominator == 1 and self.peek() == "\\" and (match := FUNCTION.match(self.text, self.position)):
            return self.mixed(value, match)
        return value

    def bracketed(self) -> Fraction:
        opening = self.text[self.position]
        self.position += 1
        self.deeper()
        self.parentheses += opening == "("
        value = self.sum()
        self.parentheses -= opening == "("
        self.depth -= 1
        if self.peek() != {"(": ")", "{": "}"}[opening]:
            raise NotArithmetic("a bracket that does not close")
        self.position += 1
        return value

    def number(self) -> Fraction:
        match = None if self.parentheses else GROUPED_NUMBER.match(self.text, self.position)
        match = match or NUMBER.match(self.text, self.position)
        if not match:
            raise NotArithmetic(self.text)
        self.position = match.end()
        return _bounded(Fraction(match[0].replace(",", "").replace(" ", "")))

    def mixed(self, whole: Fraction, match: re.Match) -> Fraction:
        """A whole number before a fraction of plain integers is a mixed number; before anything else, a factor."""
        start = self.position
        if match[1] == "frac":
            self.position = match.end()
            numerator, denominator = self.argument(), self.argument()
            if self.peek() != "^" and 0 < numerator < denominator and numerator.denominator == 1:
                return _bounded(whole + numerator / denominator)
        self.position = start
        return whole

    def function(self, name: str) -> Fraction:
        if name == "sqrt":
            return _square_root(self.argument())
        first, second = self.argument(), self.argument()
        if name == "binom":
            return _binomial(first, second)
        if not second:
            raise NoValue("division by zero")
        return _bounded(first / second)

    def argument(self) -> Fraction:
        """A braced group, or one digit as in ``\\frac12``."""
        character = self.peek()
        if character == "{":
            return self.bracketed()
        if not character or character not in "0123456789":
            raise NotArithmetic(self.text)
        self.position += 1
        return Fraction(int(character))

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotArithmetic("brackets too deep")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NoValue(f"a number of more than {MAX_BITS} bits")
    return value


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
    return _bounded(base ** int(exponent) if base or exponent < 1 else Fraction(0))


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise NotArithmetic("a factorial of something else than 0, 1, 2 ...")
    if value > MAX_BITS:
        raise NoValue(f"a number of more than {MAX_BITS} bits")
    return _bounded(Fraction(math.factorial(int(value))))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0 or bottom < 0:
        raise NotArithmetic("a binomial coefficient of something else than 0, 1, 2 ...")
    if top > MAX_BITS:
        raise NoValue(f"a number of more than {MAX_BITS} bits")
    return _bounded(Fraction(math.comb(int(top), int(min(bottom, top + 1)))))


def _square_root(value: Fraction) -> Fraction:
    if value < 0:
        raise NotArithmetic("a root of a negative number")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise NotArithmetic("a root that is not rational")
    return root
