r"""Parse tokens to the tree of an expression.

Tokens that can't be parsed completely are `Unreadable`: no part of an answer is ever ignored.
"""

from collections.abc import Callable
from dataclasses import replace

from milepost.rewards.latex import FUNCTIONS, MAX_DEPTH, Gap, OutOfBounds, Token, closing
from milepost.rewards.lists import Unreadable, split_list
from milepost.rewards.trees import COLLECTIONS, Tree, decimal, number
from milepost.rewards.units import UNITS

CONSTANTS = {r"\pi": "pi", r"\infty": "infinity", "pi": "pi", "e": "e", "i": "i"}
GREEK_LETTERS = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega
"""
GREEK = {rf"\{name}" for lower in GREEK_LETTERS.split() for name in (lower, lower.capitalize())} | {r"\Pi", r"\ell"}
ANGLE_FUNCTIONS = {f"\\{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
APPLIED = {"f", "g", "h", "F", "G", "P", "E"}  # letters that are functions if a bracket follows
SHORT_WORDS = "an as at be by do go he if in is it me my no of on or so to up us we and any are but for not odd the yes"
ENGLISH = set(SHORT_WORDS.split())  # not products of their letters
WHOLE_LINE = {r"\mathbb R": ("sequence", "(", ")", ("negate", ("constant", "infinity")), ("constant", "infinity"))}
FENCES = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceiling")}
OPERANDS = {r"\frac", r"\sqrt", r"\binom", r"\surd", *FENCES}
MATRICES = {f"\\begin {name}": f"\\end {name}" for name in ("pmatrix", "bmatrix", "matrix", "smallmatrix", "array")}
SET_OPERATIONS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "difference"}


def read_expression(tokens: list[Token]) -> Tree:
    """The tree of all tokens.

    Raises:
        Unreadable: they are not an expression.
        OutOfBounds: they are nested too deeply.
    """
    return _Reader(tokens).whole()


class _Reader:
    """A recursive descent parser of one token list; every method advances ``position`` past what it parsed."""

    def __init__(self, tokens: list[Token], depth: int = 0) -> None:
        self.tokens = [letter for token in tokens for letter in _letters(token)]
        self.position = 0
        self.depth = depth
        self.bars = 0  # the number of open |...|

    def whole(self) -> Tree:
        tree = self.level()
        if self.position < len(self.tokens):
            raise Unreadable(self.peek())
        return tree

    def peek(self, ahead: int = 0) -> str:
        position = self.position + ahead
        return self.tokens[position].text if position < len(self.tokens) else ""

    def token(self) -> Token | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self, *wanted: str) -> str:
        """Consume the next token if it is one of ``wanted``; return its text, or an empty string."""
        if found := self.peek() if self.peek() in wanted else "":
            self.position += 1
        return found

    def expect(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Unreadable(f"{self.peek()} instead of {wanted}")

    def nested(self, read: Callable[[], Tree]) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise OutOfBounds("too_deep")
        tree = read()
        self.depth -= 1
        return tree

    def level(self) -> Tree:
        r"""The content of a group or a whole answer: sets, or ``a \over b``."""
        tree = self.joined()
        if infix := self.take(r"\over", r"\choose"):
            return (_quotient if infix == r"\over" else _binomial)(tree, self.joined())
        return tree

    def joined(self) -> Tree:
        trees, operation = [self.sum()], None
        while sign := self.take(*SET_OPERATIONS):
            if SET_OPERATIONS[sign] != (operation or SET_OPERATIONS[sign]):
                raise Unreadable("several operations on sets")
            operation = SET_OPERATIONS[sign]
            other = self.sum()
            trees.append(("set", other) if sign == r"\setminus" and other[0] not in COLLECTIONS else other)
        if operation and {tree[0] for tree in trees} - (COLLECTIONS | {"constant"}):
            raise Unreadable("operations on what are no sets")
        return (operation, *trees) if operation else trees[0]

    def sum(self) -> Tree:
        terms = [self.product()]
        while sign := self.take("+", "-"):
            term = self.product()
            terms.append(term if sign == "+" else ("negate", _scalar(term)))
        return _flat("add", terms)

    def product(self) -> Tree:
        factor, ambiguous = self.signed()
        factors = [factor]
        while True:
            if sign := self.take("*", "/"):
                factor, ambiguous = self.signed()
                ambiguous = ambiguous or sign == "/"
                factors.append(factor if sign == "*" else ("invert", _scalar(factor)))
            elif self.begins_factor():
                if ambiguous:  # 1/2x, √2x
                    raise Unreadable("where does the divisor or the root end?")
                factor, ambiguous = self.power()
                factors.append(factor)
            else:
                return _flat("multiply", factors)

    def begins_factor(self) -> bool:
        """Whether a product continues without a sign. Two adjacent numbers are no product, with or without braces."""
        ahead = 0
        while self.peek(ahead) == "{":
            ahead += 1
        text = self.peek(ahead)
        if not text or self.tokens[self.position + ahead].kind == "number":
            return False
        if text == "|":
            return not self.bars
        return text == "(" or self.tokens[self.position + ahead].kind == "word" or self.is_operand(text)

    def is_operand(self, text: str) -> bool:
        return text in OPERANDS or text in GREEK or text in CONSTANTS or text in MATRICES or text[1:] in FUNCTIONS

    def signed(self) -> tuple[Tree, bool]:
        minus = False
        while sign := self.take("+", "-"):
            minus ^= sign == "-"
        tree, ambiguous = self.power()
        return (("negate", _scalar(tree)) if minus else tree), ambiguous

    def power(self) -> tuple[Tree, bool]:
        """A factor with its exponent, and whether it is a root without brackets."""
        bare_root = self.peek() == r"\surd" and self.peek(1) not in ("(", "{", "[")
        tree = self.postfix()
        if self.take("^"):
            tree = ("power", _scalar(tree), self.nested(self.exponent))
        return tree, bare_root

    def exponent(self) -> Tree:
        self.must_touch()
        if self.peek() in ("+", "-", "(") or self.token().kind == "number":
            return _scalar(self.signed()[0])
        return _scalar(self.argument())

    def postfix(self) -> Tree:
        tree = self.atom()
        if self.take("!"):
            if self.peek() == "!":
                raise Unreadable("a double factorial")
            tree = ("factorial", _scalar(tree))
        if self.take(r"\degree"):
            tree = ("degrees", _scalar(tree))
        return tree

    def atom(self) -> Tree:
        token = self.token()
        if token is None:
            raise Unreadable("nothing where an operand belongs")
        if token.kind == "number":
            return self.number()
        if token.text in ("(", "["):
            return self.nested(self.bracketed)
        if token.text == r"\{":
            return self.nested(self.set)
        if token.text == "{":
            return self.nested(self.group)
        if token.text == "|" and not self.bars:
            return self.nested(self.absolute)
        self.position += 1
        if token.text in FENCES:
            return self.nested(lambda: self.fenced(*FENCES[token.text]))
        if token.text in MATRICES:
            return self.nested(lambda: self.matrix(MATRICES[token.text]))
        if token.text.lstrip("\\") in FUNCTIONS:
            return self.nested(lambda: self.function(token.text.lstrip("\\")))
        if token.text in (r"\frac", r"\binom"):
            build = _quotient if token.text == r"\frac" else _binomial
            return self.nested(lambda: build(self.argument(), self.argument()))
        if token.text in (r"\sqrt", r"\surd", "sqrt"):
            return self.nested(lambda: self.root(token.text))
        if token.text in WHOLE_LINE:
            return WHOLE_LINE[token.text]
        return self.named(token)

    def named(self, token: Token) -> Tree:
        """A letter, a constant or an empty set."""
        if token.text in CONSTANTS and self.peek() != "_":
            return ("constant", CONSTANTS[token.text])
        if token.text.startswith(r"\mathbb ") or token.text == r"\emptyset":
            return ("constant", token.text) if token.text != r"\emptyset" else ("set",)
        if token.text not in GREEK and not (token.kind == "word" and len(token.text) == 1 and token.text.isascii()):
            raise Unreadable(token.text)
        name = token.text + (self.subscript() if self.take("_") else "")
        if name in APPLIED and self.peek() == "(":
            argument = self.nested(self.bracketed)
            return ("apply", name, *(argument[3:] if argument[0] == "sequence" else (argument,)))
        return ("symbol", name)

    def subscript(self) -> str:
        start = self.position
        if self.peek() == "{":
            end = closing(self.tokens, start)
            if end is None:
                raise Unreadable("a brace that does not close")
            self.position = end + 1
        elif self.token() and self.token().kind in ("number", "word"):
            self.position += 1
        else:
            raise Unreadable("no subscript")
        return "_" + "".join(token.text for token in self.tokens[start : self.position] if token.text not in "{}")

    def number(self) -> Tree:
        text = self.token().text
        self.position += 1
        if self.take("_"):
            return self.based(text)
        value = decimal(text)
        return self.mixed(value) if value[0] == "number" and text.isdigit() else value

    def mixed(self, whole: Tree) -> Tree:
        r"""A whole number before a proper fraction of plain integers is a mixed number: ``2\frac{1}{2}``, ``2 1/2``."""
        before = self.position, list(self.tokens)
        if self.take(r"\frac"):
            top, bottom = self.argument(), self.argument()
        elif self.token() and self.token().gap is Gap.SPACE and self.peek().isdigit() and self.peek(1) == "/":
            self.position += 3
            top, bottom = (decimal(self.peek(ahead)) if self.peek(ahead).isdigit() else whole for ahead in (-3, -1))
        else:
            return whole
        proper = top[0] == bottom[0] == "number" and top[2] == bottom[2] == 1 and 0 < top[1] < bottom[1]
        if proper and self.peek() not in ("^", "!", "/"):
            return ("add", whole, _quotient(top, bottom))
        self.position, self.tokens = before
        return whole

    def argument(self) -> Tree:
        r"""A braced group; or one digit, letter or constant, as in ``\frac12``."""
        self.must_touch()
        token = self.token()
        if token.text == "{":
            return self.nested(self.group)
        if token.kind == "number" and token.text.isdigit():
            if len(token.text) == 1:
                self.position += 1
            else:
                self.tokens[self.position] = replace(token, text=token.text[1:], gap=Gap.NONE)
            return number(int(token.text[0]))
        if token.kind == "word" or token.text in OPERANDS or token.text in CONSTANTS or token.text in GREEK:
            return self.nested(self.atom)
        raise Unreadable(token.text)

    def must_touch(self) -> None:
        """An argument must directly follow its command, since a dropped token between them could be the argument."""
        if self.token() is None or self.token().gap > Gap.SPACE:
            raise Unreadable("no argument")

    def group(self) -> Tree:
        self.expect("{")
        bars, self.bars = self.bars, 0
        tree = self.level()
        self.bars = bars
        self.expect("}")
        return tree

    def absolute(self) -> Tree:
        self.expect("|")
        self.bars += 1
        tree = _scalar(self.sum())
        self.expect("|")
        self.bars -= 1
        return ("absolute", tree)

    def fenced(self, end: str, name: str) -> Tree:
        tree = _scalar(self.sum())
        self.expect(end)
        return (name, tree)

    def bracketed(self) -> Tree:
        """Brackets around a single expression group it; around several they make a tuple or an interval."""
        inner, opening, end = self.inside(")", "]")
        members, _ = split_list(inner)
        trees = [_Reader(member, self.depth).whole() for member in members]
        if len(trees) == 1 and (opening + end == "()" or (opening + end == "[]" and trees[0][0] == "matrix")):
            number_alone = len(inner) == 1 and inner[0].kind == "number"
            return self.based(inner[0].text) if number_alone and self.take("_") else trees[0]
        if opening + end not in ("()", "[]") and len(trees) != 2:
            raise Unreadable("brackets of two kinds")
        return ("sequence", opening, end, *trees)

    def based(self, digits: str) -> Tree:
        """A number with its base, ``4210_5``, which equals only the same digits to the same base."""
        return ("based", digits.lstrip("0") or "0", self.subscript().replace("(", "").replace(")", ""))

    def set(self) -> Tree:
        inner, _, _ = self.inside(r"\}")
        return ("set", *(_Reader(member, self.depth).whole() for member in split_list(inner)[0] if inner))

    def inside(self, *ends: str) -> tuple[list[Token], str, str]:
        """The tokens inside the bracket that opens here, and the opening and the closing bracket."""
        start, end = self.position, closing(self.tokens, self.position)
        if end is None or self.tokens[end].text not in ends:
            raise Unreadable("a bracket that does not close")
        self.position = end + 1
        return self.tokens[start + 1 : end], self.tokens[start].text, self.tokens[end].text

    def matrix(self, end: str) -> Tree:
        """Rows of equal length; each cell is an expression."""
        rows: list[list[Tree]] = [[]]
        while not self.take(end):
            rows[-1].append(_scalar(self.sum()))
            if self.take(r"\\"):
                rows.append([])
            elif not self.take("&") and self.peek() != end:
                raise Unreadable("a matrix without its end")
            elif self.peek() == end and self.peek(-1) == "&":
                raise Unreadable("an empty cell")
        rows = rows if rows[-1] else rows[:-1]  # a final \\ starts no row
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
            raise Unreadable("rows of different length")
        return ("matrix", *(("row", *row) for row in rows))

    def root(self, name: str) -> Tree:
        index = number(2)
        if name != "sqrt" and self.peek() == "[":
            inner, _, _ = self.inside("]")
            index = _Reader(inner, self.depth).whole()
        if name == r"\surd" or self.peek() == "(":
            tree = self.atom()
        elif name == "sqrt" and self.peek() != "{":
            raise Unreadable("sqrt of nothing")
        else:
            tree = self.argument()
        return ("root", _scalar(tree), _scalar(index))

    def function(self, name: str) -> Tree:
        r"""``\sin x``, ``\sin^2 x``, ``\log_2 8``; without brackets the argument is the product that follows."""
        base = number(10) if name == "lg" else None
        if self.take("_"):
            if name != "log":
                raise Unreadable(f"{name} with a base")
            base = self.number() if self.token() and self.token().kind == "number" else self.argument()
        exponent = self.exponent() if self.take("^") else None
        if exponent == ("negate", number(1)):
            if f"\\{name}" not in ANGLE_FUNCTIONS:
                raise Unreadable("an inverse")
            name, exponent = f"arc{name}", None
        if self.peek() in ("(", "{"):
            argument = self.nested(self.bracketed if self.peek() == "(" else self.group)
        else:
            argument = self.factors()
        name = {"lg": "log", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(name, name)
        tree = ("call", name, _scalar(argument), *([base] if base else []))
        return ("power", tree, exponent) if exponent else tree

    def factors(self) -> Tree:
        """The argument of a function without brackets: a product of numbers, letters and fractions only."""
        factors = [self.power()[0]]
        while self.begins_factor() and self.peek() not in ("(", "|") and self.peek().lstrip("\\") not in FUNCTIONS:
            factors.append(self.power()[0])
        return _flat("multiply", factors)


def _letters(token: Token) -> list[Token]:
    """The product of a word's letters, unless the word is a function, a constant, English or a unit."""
    text = token.text
    if token.kind != "word" or len(text) == 1 or text in FUNCTIONS or text in CONSTANTS or text == "sqrt":
        return [token]
    is_product = (
        text.isascii()
        and not token.upright
        and (len(text) < 4 or text.isupper())
        and text.lower() not in ENGLISH
        and text not in UNITS
    )
    if not is_product:
        raise Unreadable(text)
    return [replace(token, text=letter, gap=token.gap if not at else Gap.NONE) for at, letter in enumerate(text)]


def _flat(operation: str, operands: list[Tree]) -> Tree:
    """One node for a whole sum or product, so that a long one does not nest deeply."""
    return (operation, *map(_scalar, operands)) if len(operands) > 1 else operands[0]


def _quotient(top: Tree, bottom: Tree) -> Tree:
    return ("multiply", _scalar(top), ("invert", _scalar(bottom)))


def _binomial(top: Tree, bottom: Tree) -> Tree:
    return ("binomial", _scalar(top), _scalar(bottom))


def _scalar(tree: Tree) -> Tree:
    """Refuse a tuple or a set as an operand of arithmetic; a matrix is allowed."""
    if tree[0] in COLLECTIONS - {"matrix"} or tree[0] == "based":
        raise Unreadable(f"arithmetic on a {tree[0]}")
    return tree
