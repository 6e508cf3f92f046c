r"""Extract and parse the answer of a response: the content of the last complete ``\boxed{}`` after the reasoning."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from milepost.rewards.arithmetic import NoValue, fold
from milepost.rewards.base import NO_THINK_END, Response
from milepost.rewards.comparison import Item, Statement
from milepost.rewards.expressions import APPLIED, GREEK, read_expression
from milepost.rewards.latex import FUNCTIONS, Token, balanced, closing, spelled, tokenize, unwrapped
from milepost.rewards.lists import Unreadable, split_list
from milepost.rewards.trees import COLLECTIONS, Tree, unknowns
from milepost.rewards.units import split_unit

INK = re.compile(r"\S")
BOX_OR_BRACE = re.compile(r"\\++(boxed\s*+\{|[{}]?)|[{}]")

STOPS = {".", ",", ";", ":", r"\\"}
LEAD_IN = {"the", "my", "final", "answer", "is", "so", "thus", "hence", "therefore"}
RELATIONS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\equiv", r"\sim", r"\cong", r"\in", r"\notin"}
INEQUALITIES = {"<": ("<", False), r"\leq": ("<", True), ">": (">", False), r"\geq": (">", True)}
INFINITY = ("constant", "infinity")
WITHOUT_UNIT = COLLECTIONS | {"symbol", "based"}  # the letter of a choice, a tuple, a number with its base
NAMING = {
    r"\angle",
    r"\triangle",
    r"\overline",
    r"\vec",
    r"\sum",
    r"\prod",
    r"\int",
    r"\lim",
    r"\gcd",
    r"\max",
    r"\min",
}
QUANTITIES = """
    area volume perimeter circumference length width height distance radius diameter sum total product difference
    number value probability cost price time speed rate ratio average mean median mode of the is
"""


@dataclass(frozen=True)
class Answer:
    """One parsed answer or label."""

    statement: Statement

    @property
    def parts(self) -> int:
        r"""The number of answers in it: more than 1 for "33 or 34", "33, 34", ``\pm 33``."""
        return len(self.statement.items)

    @property
    def value(self) -> Fraction | None:
        """Its exact value if it is a single rational number, else None."""
        return _value(self.statement.items[0]) if self.parts == 1 else None

    @property
    def key(self) -> str:
        """A text that is the same for equal numbers in any notation; majority votes count it."""
        values = [(item, _value(item)) for item in self.statement.items]
        return ", ".join(item.text if value is None else str(value) for item, value in values)


def extract(response: Response) -> tuple[str | None, str | None]:
    r"""The content of the last complete ``\boxed{}`` after the reasoning, or the reason why there is none.

    Returns:
        ``(content, None)`` or ``(None, reason)``. The reason is ``no_think_end`` (the reasoning never ended, or did not
        begin although a think block is required) or ``no_box`` (no complete box with content follows it).
    """
    if not response.is_answered:
        return None, NO_THINK_END
    content = last_box(response.answer)
    return (None, "no_box") if content is None else (content, None)


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` to close, ignoring empty and unclosed ones; a single pass."""
    stack: list[int | None] = []  # for each open brace: where its content starts if it is a box's
    last = None
    for match in BOX_OR_BRACE.finditer(text):
        found = match[0]
        backslashes = len(found) - len(found.lstrip("\\"))
        if match[1] and match[1].startswith("boxed"):
            stack.append(match.end())
        elif found[-1] not in "{}" or backslashes % 2:  # \{ and \} are literal
            continue
        elif found[-1] == "{":
            stack.append(None)
        elif stack and (start := stack.pop()) is not None and INK.search(text, start, match.start()):
            last = (start, match.start())  # an empty box does not replace an earlier answer
    return text[slice(*last)] if last else None


def read_answer(raw: str, *, is_label: bool = False) -> Answer:
    """Parse an answer.

    A label with more than a symbol before its equals sign is an equation (``x^2 + y^2 = 1``). In an answer, the left
    side may also name the quantity (``m + n = 33`` answers 33).

    Raises:
        rewards.latex.OutOfBounds: it is too long or nested too deeply.
    """
    tokens = _trimmed(tokenize(raw))
    try:
        members, between = split_list(tokens)
    except Unreadable:
        members, between = [tokens], set()
    items = tuple(_read_item(_trimmed(member), is_label) for member in members)
    if between == {"or"} and all(_is_ray(item) and item.name == items[0].name for item in items):
        union = ("union", *(item.tree for item in items))  # x < 1 or x > 3
        return Answer(Statement((Item(spelled(tokens), items[0].name, tree=union),)))
    return Answer(Statement(items, tuple(sorted(between))))


def _is_ray(item: Item) -> bool:
    return item.relation is not None and item.tree is not None and item.tree[0] == "sequence"


def _value(item: Item) -> Fraction | None:
    return Fraction(*item.tree[1:]) if item.tree and item.tree[0] == "number" else None


def _trimmed(tokens: list[Token]) -> list[Token]:
    """Strip full stops, introductory words, braces around the whole, and the brackets of a choice, ``(A)``."""
    while True:
        shorter = unwrapped(tokens)
        while shorter and shorter[-1].text in STOPS and [token.text for token in shorter[-2:]] != [".", "."]:
            shorter = shorter[:-1]  # but 0.333... goes on
        shorter = shorter[_lead_in(shorter) :]
        if len(shorter) == 3 and shorter[0].text == "(" and shorter[2].text == ")" and shorter[1].kind == "word":
            shorter = shorter[1:2]
        if len(shorter) == len(tokens):
            return tokens
        tokens = shorter


def _lead_in(tokens: list[Token]) -> int:
    """The number of introductory tokens: ``The final answer is:``, ``=``."""
    words = 0
    while words < len(tokens) and tokens[words].text.lower() in LEAD_IN:
        words += 1
    if not any(token.text.lower() == "answer" for token in tokens[:words]):
        words = 0
    while words < len(tokens) and tokens[words].text in ((":", "=") if words else ("=", r"\therefore")):
        words += 1
    return words if words < len(tokens) else 0


def _read_item(tokens: list[Token], is_label: bool) -> Item:
    text = spelled(tokens)
    sides, relations = _sides(tokens)
    bare, units = zip(*map(split_unit, sides), strict=True)
    trees, unit = [_tree(side) for side in bare], units[-1]
    if bare[-1] != sides[-1] and trees[-1] and trees[-1][0] in WITHOUT_UNIT:
        trees[-1] = None
    if not relations:
        return Item(text, unit=unit, tree=trees[0])
    relation = ("relation", " ".join(relations), *trees) if None not in trees else None
    name, tree = _stated(bare, trees, relations, is_label)
    return Item(text, name, unit, tree, relation)


def _tree(tokens: list[Token]) -> Tree | None:
    """The expression with arithmetic evaluated; None if it can't be parsed, or divides by zero."""
    try:
        return fold(read_expression(tokens))
    except (Unreadable, NoValue):
        return None


def _sides(tokens: list[Token]) -> tuple[list[list[Token]], list[str]]:
    """The tokens split at the relations outside brackets, and those relations."""
    sides, relations, start, position = [], [], 0, 0
    while position < len(tokens):
        if tokens[position].text in ("{", "(", "[", r"\{"):
            position = closing(tokens, position) or position
        elif tokens[position].text in RELATIONS:
            sides.append(tokens[start:position])
            relations.append(tokens[position].text)
            start = position + 1
        position += 1
    return [*sides, tokens[start:]], relations


def _stated(
    sides: Sequence[list[Token]], trees: list[Tree | None], relations: list[str], is_label: bool
) -> tuple[str, Tree | None]:
    """The value that a chain of relations gives to something, and the name of that; no tree if it gives none."""
    kinds = set(relations)
    *lefts, last = trees
    if kinds == {r"\in"} and len(lefts) == 1 and _is_symbol(lefts[0]) and last and last[0] in COLLECTIONS:
        return spelled(sides[0]), last
    if kinds <= set(INEQUALITIES):
        return _interval(trees, relations)
    if kinds <= {"=", r"\approx"} and last and last[0] == "number" and all(left == last for left in lefts):
        return "", last
    if kinds != {"="} or last is None:
        return "", None
    if len(sides) == 2 and _is_symbol(last) and lefts[0] and not unknowns(lefts[0]):
        return spelled(sides[1]), lefts[0]  # 33 = x
    name = ""
    for side, left in zip(sides, lefts, strict=False):
        if left == last:
            continue
        further = bool(name) and left is not None and unknowns(left)  # S = \frac{1}{2}ab = 33
        names = not is_label and not unknowns(last) and (further or _is_name(side, left))
        if not (_is_symbol(left) or names):
            return "", None
        name = name or spelled(side)
    return name, last


def _is_symbol(tree: Tree | None) -> bool:
    """A letter, a function of letters, or a tuple of letters."""
    if tree is None:
        return False
    return tree[0] == "symbol" or (tree[0] in ("apply", "sequence") and all(map(_is_symbol, _operands(tree))))


def _operands(tree: Tree) -> list[Tree]:
    return [operand for operand in tree[1:] if isinstance(operand, tuple)]


def _is_name(tokens: list[Token], tree: Tree | None) -> bool:
    r"""Whether an answer's left-hand side names the quantity: ``m + n``, ``\angle ABC``, ``P(X = 3)``, ``[ABC]``.

    ``2x`` and ``x + 1`` do not, since an equation that is linear in a single unknown determines that unknown. Nor does
    a multiple such as ``33 ab``.
    """
    if tree is not None:
        names = unknowns(tree)
        multiple = tree[0] in ("negate", "degrees") or (
            tree[0] == "multiply" and any(factor[0] == "number" for factor in tree[1:])
        )
        return not multiple and bool(names) and (len(names) > 1 or tree[0] == "apply" or _degree(tree) > 1)
    if not tokens or tokens[0].kind == "number" or not balanced(tokens):
        return False
    words = [token for token in tokens if token.kind == "word" and (token.upright or not _is_letters(token))]
    if any(word.text.lower() not in FUNCTIONS.union(QUANTITIES.split()) for word in words):
        return False
    applied = tokens[0].kind == "word" and len(tokens) > 1 and tokens[1].text in ("(", "'")
    named = applied or bool(words) or tokens[0].text == "[" or any(token.text in NAMING for token in tokens)
    return named and all(_may_name(token) for token in tokens)


def _is_letters(token: Token) -> bool:
    return token.text.isascii() and (len(token.text) == 1 or token.text.isupper() or token.text in APPLIED)


def _may_name(token: Token) -> bool:
    if token.kind == "command":
        known = NAMING | GREEK | {r"\frac", r"\sqrt", r"\binom", r"\pi", r"\infty", r"\to", r"\cup", r"\cap", r"\in"}
        return token.text in known | RELATIONS or token.text[1:] in FUNCTIONS
    return token.kind in ("word", "number") or token.text in {*"+-*/^_=<>()[]{}|',!", r"\{", r"\}"}


def _degree(tree: Tree) -> int:
    """The degree of a polynomial in its unknowns; 2 for everything that is not linear."""
    operation, *operands = tree
    if operation in ("symbol", "apply"):
        return 1
    degrees = [_degree(operand) for operand in operands if isinstance(operand, tuple)] or [0]
    if operation == "multiply":
        return sum(degrees)
    return max(degrees) if operation in ("add", "negate") else 2 * max(degrees)


def _interval(trees: list[Tree | None], relations: list[str]) -> tuple[str, Tree | None]:
    r"""``-2 \le x < 7`` as ``[-2, 7)`` and ``x > 3`` as ``(3, \infty)``; no tree for other inequalities."""
    symbols = [place for place, tree in enumerate(trees) if tree and tree[0] == "symbol"]
    if None in trees or len(symbols) != 1 or len(trees) > 3 or (len(trees) == 3 and symbols != [1]):
        return "", None
    [place] = symbols
    low, high = (("negate", INFINITY), False), (INFINITY, False)
    for side, relation in enumerate(relations):
        direction, closed = INEQUALITIES[relation]
        bound = trees[side + (side >= place)]
        if unknowns(bound):
            return "", None
        if (direction == "<") == (side >= place):
            high = (bound, closed)
        else:
            low = (bound, closed)
    if len({INEQUALITIES[relation][0] for relation in relations}) > 1:
        return "", None
    return trees[place][1], ("sequence", "[" if low[1] else "(", "]" if high[1] else ")", low[0], high[0])
