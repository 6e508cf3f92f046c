"""Compare an answer with the label: lists, names, units and structure; the caller provides equality of expressions.

The grader runs this code with exact arithmetic for equality, the worker with sympy.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from milepost.rewards.polynomials import NotPolynomial, difference, is_plain, normal_form, ratio
from milepost.rewards.trees import SET_OPERATIONS, Tree, unknowns

Equal = Callable[[Tree, Tree], bool]

ORDERED = {"sequence", "matrix", "row"}
NUMBER_SETS = {rf"\mathbb {letter}" for letter in "NZQC"}
INFINITE = {("constant", "infinity"), ("negate", ("constant", "infinity"))}
POSITIVE_MULTIPLES = {"<", ">", r"\leq", r"\geq"}


class Undecided(Exception):
    """Exact arithmetic can't decide whether two expressions are equal."""


class Item(NamedTuple):
    """One member of an answer.

    Attributes:
        text: normalized by `latex.spelled`, with its unit.
        name: the left side of an equals sign, as in ``x = 33``, or empty.
        unit: normalized, such as ``cm^2``, or empty.
        tree: its value: a number, an expression, an interval ...; None if it can't be parsed.
        relation: the whole equation or inequality, if it is one; else None.
    """

    text: str
    name: str = ""
    unit: str = ""
    tree: Tree | None = None
    relation: Tree | None = None


class Statement(NamedTuple):
    """An answer or a label: its members, and the separators between them (``,``, ``and``, ``or``), sorted."""

    items: tuple[Item, ...]
    between: tuple[str, ...] = ()


def same_statement(label: Statement, answer: Statement, equal: Equal) -> bool:
    """Whether both have the same members, in any order; a set counts as the list of its elements."""
    if (len(label.items) == 1) != (len(answer.items) == 1):
        label, answer = _as_list(label), _as_list(answer)
    if len(label.items) != len(answer.items):
        return False
    if len(label.items) > 1 and label.between != answer.between and any(map(_is_inequality, label.items)):
        return False  # x > 1 and x < 3 is not x > 1 or x < 3
    must_name = len({item.name for item in label.items}) > 1  # x = 1, y = 2
    return _same_in_any_order(label.items, answer.items, lambda a, b: _same_item(a, b, must_name, equal))


def same(label: Tree, answer: Tree, equal: Equal) -> bool:
    """Whether two trees have the same structure, with equal expressions in the same places."""
    kinds = {label[0], answer[0]}
    if kinds & SET_OPERATIONS:
        return all(_is_set(tree) for tree in (label, answer)) and equal(label, answer)
    if kinds == {"set"}:
        return _same_in_any_order(label[1:], answer[1:], lambda a, b: same(a, b, equal))
    if len(kinds) == 1 and label[0] in ORDERED:
        brackets = 3 if label[0] == "sequence" else 1
        parts = list(zip(label[brackets:], answer[brackets:], strict=False))
        return (
            label[:brackets] == answer[:brackets]
            and len(label) == len(answer)
            and all(same(one, other, equal) for one, other in parts)
        )
    if kinds & {"sequence", "set", "based"} and label != answer:
        return False
    return equal(label, answer)


def exactly(label: Tree, answer: Tree) -> bool:
    """Equality as far as it can be decided without sympy; otherwise raises `Undecided`."""
    if label == answer:
        return True
    if label in INFINITE or answer in INFINITE:
        return False
    try:
        agree = _polynomials_agree(label, answer)
    except NotPolynomial:
        agree = None
    if agree is None and unknowns(label) == unknowns(answer):
        raise Undecided
    return agree is True  # different unknowns (or none) make different expressions


def _polynomials_agree(label: Tree, answer: Tree) -> bool | None:
    """Whether two expressions have equal normal forms, or two relations proportional ones; None if unproven."""
    if label[0] == answer[0] == "relation":
        if label[1] != answer[1] or label[1] not in POSITIVE_MULTIPLES | {"="}:
            return None
        forms = difference(*label[2:]), difference(*answer[2:])
        multiple = ratio(*forms)
        agree = multiple is not None and (multiple > 0 or label[1] == "=")
    else:
        forms = normal_form(label), normal_form(answer)
        agree = forms[0] == forms[1]
    return agree if agree or all(map(is_plain, forms)) else None


def _same_item(label: Item, answer: Item, must_name: bool, equal: Equal) -> bool:
    if label.text == answer.text:
        return True
    if label.tree is None and _is_words(label.text):
        return label.text.casefold() == answer.text.casefold()
    if label.tree is not None and answer.tree is not None:
        named_alike = label.name == answer.name or not (must_name or (label.name and answer.name))
        if named_alike:
            return (not (label.unit and answer.unit) or label.unit == answer.unit) and same(
                label.tree, answer.tree, equal
            )
    return label.relation is not None and answer.relation is not None and equal(label.relation, answer.relation)


def _same_in_any_order(label: Sequence, answer: Sequence, alike: Callable) -> bool:
    """Whether the members pair up. Greedy matching suffices, since equality is transitive."""
    left = list(answer)
    for one in label:
        partner = next((place for place, other in enumerate(left) if alike(one, other)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


def _as_list(statement: Statement) -> Statement:
    [item, *more] = statement.items
    if more or item.tree is None or item.tree[0] != "set" or len(item.tree) < 3:
        return statement
    return Statement(tuple(Item(f"{place}th of {item.text}", tree=tree) for place, tree in enumerate(item.tree[1:])))


def _is_set(tree: Tree) -> bool:
    interval = tree[0] == "sequence" and len(tree) == 5
    return interval or tree[0] in SET_OPERATIONS | {"set"} or (tree[0] == "constant" and tree[1] in NUMBER_SETS)


def _is_inequality(item: Item) -> bool:
    return item.relation is not None and "=" not in item.relation[1].split()


def _is_words(text: str) -> bool:
    return text.replace(" ", "").isalpha() and len(text) > 1
