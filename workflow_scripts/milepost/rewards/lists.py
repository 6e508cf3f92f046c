"""Split a list, a tuple or a set into its members and separators."""

from dataclasses import replace

from milepost.rewards.latex import CLOSING, OPENING, Token

PLUS_MINUS = {r"\pm": ("+", "-"), r"\mp": ("-", "+")}
SEPARATORS = {
    **dict.fromkeys((",", ";"), ","),
    **dict.fromkeys(("and", r"\and", "和", "与", "與", "及"), "and"),
    **dict.fromkeys(("or", r"\or", "或"), "or"),
}


class Unreadable(ValueError):
    """The grader can't parse the tokens."""


def split_list(tokens: list[Token]) -> tuple[list[list[Token]], set[str]]:
    r"""The members of a list, split outside brackets, and the separators between them (``,``, ``and`` or ``or``).

    ``a \pm b`` is two members. Several such signs in one member could mean two or four and are `Unreadable`.
    """
    members, between, start, depth = [], set(), 0, 0
    for position, token in enumerate(tokens):
        depth += _depth_change(token)
        separator = SEPARATORS.get(token.text.lower())
        if depth <= 0 and separator:
            if position > start or not members or separator == ",":  # otherwise it follows a comma: 1, 2, and 3
                members.append(tokens[start:position])
            between.add(separator)
            start = position + 1
    members.append(tokens[start:])
    return [each for member in members for each in _both_signs(member)], between - {","} or between


def _depth_change(token: Token) -> int:
    opens = token.text in OPENING or token.text.startswith(r"\begin ")
    return opens - (token.text in CLOSING or token.text.startswith(r"\end "))


def _both_signs(member: list[Token]) -> list[list[Token]]:
    """The member with plus and with minus in place of its ``\\pm``; a set within it is split on its own."""
    places, depth = [], 0
    for position, token in enumerate(member):
        depth += (token.text == r"\{") - (token.text == r"\}")
        if token.text in PLUS_MINUS and not depth:
            places.append(position)
    if not places:
        return [member]
    if len(places) > 1:
        raise Unreadable("several signs of plus or minus")
    sign = member[places[0]]
    return [
        [*member[: places[0]], replace(sign, kind="sign", text=text), *member[places[0] + 1 :]]
        for text in PLUS_MINUS[sign.text]
    ]
