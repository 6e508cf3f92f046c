r"""Tokenize an answer: what prints the same becomes the same tokens, and what prints apart is never joined.

Characters of other scripts become LaTeX; fonts, sizes and the heights of delimiters are dropped; aliases (``\dfrac``,
``\le``) become one command. Every token records the gap before it, so that ``1\,024`` can be one number while
``3\quad 3``, ``3\mbox{ }3`` and ``3$3`` remain two.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Literal

MAX_CHARACTERS = 1000  # of an answer
MAX_DEPTH = 40  # of nested brackets


class OutOfBounds(ValueError):
    """The answer is too long or nested too deeply to parse; ``reason`` says which, for the verdict."""

    def __init__(self, reason: Literal["too_long", "too_deep"]) -> None:
        super().__init__(reason)
        self.reason = reason


class Gap(IntEnum):
    """The gap between two tokens; the greatest of several counts."""

    NONE = 0
    SPACE = 1  # may group digits: 1\,024
    TIGHT = 2  # \!: the comma before it groups digits: 32,\! 349
    APART = 3  # separates digits: a quad, a new line, a change of font, a dollar sign


@dataclass(frozen=True, slots=True)
class Token:
    """``kind`` is ``number``, ``word``, ``command`` or ``sign``; ``upright`` marks text, as opposed to mathematics."""

    kind: str
    text: str
    gap: Gap = Gap.NONE
    upright: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and self.text == other.text  # gap and font do not count

    def __hash__(self) -> int:
        return hash(self.text)


CHARACTERS = {
    **dict.fromkeys("−‐‒–—―", "-"),
    **dict.fromkeys("×⋅·∙•✕✖∗", "*"),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("°º˚", r"\degree "),
    **dict.fromkeys("。．", "."),
    **dict.fromkeys("、،", ","),
    **{"√": r"\surd ", "∛": r"\surd[3] ", "∜": r"\surd[4] ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∈": r"\in ", "∅": r"\emptyset ", "∠": r"\angle "},
    **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv "},
    **{"ℝ": r"\mathbb{R}", "ℚ": r"\mathbb{Q}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}"},
    **{"∧": r"\land ", "∨": r"\lor ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "},
    **{"℃": r"\degree\text{C}", "℉": r"\degree\text{F}", "…": r"\ldots "},
    **{"٫": ".", "٬": "{,}", "٪": "%", "؛": ";"},
}
SUPERSCRIPTS = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")
SUBSCRIPTS = re.compile("[₀-₉]+")
VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
OVERLINED = re.compile(r"((?:[0-9]\u0305)+)")

ALIASES = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("le", "leqslant"), "leq"),
    **dict.fromkeys(("ge", "geqslant"), "geq"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("land", "wedge"), "and"),
    **dict.fromkeys(("lor", "vee"), "or"),
    **dict.fromkeys(("dots", "cdots", "dotsc"), "ldots"),
    **{"div": "/", "ne": "neq", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]"},
    **{"varnothing": "emptyset", "infin": "infty", "varphi": "phi", "varepsilon": "epsilon"},
}
ESCAPED = {"%": "%", "{": r"\{", "}": r"\}", "|": r"\|", "$": r"\$", "#": "#", "_": r"\_", "&": r"\&"}
ASCII_RELATIONS = {"<=": r"\leq", ">=": r"\geq", "!=": r"\neq", "**": "^", ":=": "="}
FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan asin acos atan sinh cosh tanh ln log lg exp"
FUNCTIONS = set(FUNCTION_NAMES.split())
SPACES = {*",;:> ", "thinspace", "enspace", "medspace", "thickspace"}
DROPPED = re.compile(r"left|right|middle|[bB]igg?[lrm]?|(?:display|text|script)style|limits|nolimits")
APART = re.compile(r"q?quad|newline|[()\[\]]|rm|bf|it|sf|tt")
UPRIGHT_FONT = re.compile(r"text(?:rm|bf|it|sf|tt|normal|up)?|mathrm|mathsf|mathtt|operatorname\*?|[mh]box|emph")
FONT = re.compile(rf"{UPRIGHT_FONT.pattern}|math(?:bf|it|normal)|bm|boldsymbol|boxed|fbox|underline|textcolor")

NUMBER = (
    r"(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:\([0-9]+\)|\\(?:overline|bar)\s*(?:\{\s*[0-9]+\s*\}|[0-9]))"  # 0.1(6)
    r"|[0-9]*\.[0-9]+[eE][-+]?[0-9]+(?![0-9A-Za-z])|[0-9]+[eE][0-9]+(?![0-9A-Za-z])"  # 2e-3 is 2e - 3
    r"|[0-9]*\.[0-9]+|[0-9]+"
)
TOKEN = re.compile(
    rf"""(?P<number>{NUMBER})
    |(?P<space>[^\S\n]+|~|\{{\s*(?:\\[,;: ]|~)\s*\}})
    |(?P<apart>\n|\u200b|\$|\\hspace\*?\s*\{{[^{{}}]*\}}|\\color\s*\{{[^{{}}]*\}})
    |(?P<tight>\\!|\\negthinspace(?![A-Za-z]))
    |(?P<comma>\{{,\}})
    |(?P<row>\\\\(?:\s*\[\s*-?[0-9.]+\s*(?:mm|cm|pt|em|ex|in)\s*\])?)
    |\\(?P<edge>begin|end)\s*\{{(?P<environment>[A-Za-z]+\*?)\}}(?:(?<=array\}})\s*\{{[lcr|\s]*\}})?
    |\\mathbb\s*\{{?\s*(?P<set>[A-Z])\s*\}}?
    |\\(?P<command>textcolor(?=\s*\{{[^{{}}]*\}})|[A-Za-z]+\*?)
    |\\(?P<escaped>.)
    |(?P<word>[A-Za-z]+|[一-鿿]+|[^\W\d_]+)
    |(?P<ascii><=|>=|!=|\*\*|:=)
    |(?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)
HYPHENATED = re.compile(r"(?:-[A-Za-z]{2,})+")
ARGUMENT = re.compile(r"\s*\{")
COLOUR = re.compile(r"\s*\{[^{}]*\}\s*\{")
OPENING, CLOSING = ("{", "(", "[", r"\{"), ("}", ")", "]", r"\}")


def tokenize(text: str) -> list[Token]:
    """The tokens of an answer.

    Raises:
        OutOfBounds: it is longer than ``MAX_CHARACTERS``, or nested deeper than ``MAX_DEPTH``.
    """
    if len(text) > MAX_CHARACTERS:
        raise OutOfBounds("too_long")
    source = _as_latex(text)
    if len(source) > 4 * MAX_CHARACTERS:  # one compatibility character may become many
        raise OutOfBounds("too_long")
    return _grouped_digits(_Lexer(source).tokens)


def spelled(tokens: list[Token]) -> str:
    """The normalized text of tokens, with spaces where words or numbers would run together."""
    shown = ""
    for token in tokens:
        glued = (
            shown[-1:].isalnum() and token.text[:1].isalnum() and not (shown[-1:].isdigit() and token.kind == "word")
        )
        spaced = token.upright and token.kind == "word" and shown[-1:] not in ("", " ", *OPENING)
        shown += (" " if glued or spaced else "") + token.text
        shown += " " if token.text == "," else ""
    return shown.strip()


def unwrapped(tokens: list[Token]) -> list[Token]:
    """Strip braces around the whole."""
    while len(tokens) > 1 and tokens[0].text == "{" and closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def closing(tokens: list[Token], start: int) -> int | None:
    """The index at which the bracket at ``start`` closes; kinds may differ, as in half-open intervals."""
    depth = 0
    for position in range(start, len(tokens)):
        depth += (tokens[position].text in OPENING) - (tokens[position].text in CLOSING)
        if not depth:
            return position
    return None


def balanced(tokens: list[Token]) -> bool:
    """Whether every bracket is closed, and none closes before it opens."""
    depth = 0
    for token in tokens:
        depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth < 0:
            return False
    return depth == 0


def _as_latex(text: str) -> str:
    """Convert characters of other scripts to LaTeX, except those that Unicode normalization would make digits."""
    text = SUPERSCRIPTS.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = SUBSCRIPTS.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = VULGAR_FRACTION.sub(_latex_fraction, text)
    text = OVERLINED.sub(lambda match: rf"\overline{{{match[0].replace(chr(0x305), '')}}}", text)
    text = "".join(character if character.isascii() else _latex_character(character) for character in text)
    if r"\begin" not in text:  # a doubled backslash before a command is an escaping error, except in a matrix
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    return text


@lru_cache(maxsize=4096)
def _latex_character(character: str) -> str:
    if character in CHARACTERS:
        return CHARACTERS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    if category == "Cf":
        return "\u200b"
    name = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(character, ""))
    if name:
        return rf"\{name[2].lower() if name[1] == 'SMALL' else name[2].capitalize()} "
    folded = unicodedata.normalize("NFKC", character)
    if re.search("[0-9]", folded):  # ① must not join other digits
        return character
    return folded if folded.isascii() else "".join(CHARACTERS.get(each, each) for each in folded)


def _latex_fraction(match: re.Match) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


class _Lexer:
    """One pass over the source. ``groups`` holds each open brace's start and, if it set a font, the font around it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tokens: list[Token] = []
        self.gap = Gap.NONE
        self.upright = False
        self.groups: list[tuple[int, bool | None]] = []
        self.depth = 0
        position = 0
        while position < len(source):
            match = TOKEN.match(source, position)
            position = match.end() + self.read(match)

    def read(self, match: re.Match) -> int:
        """Add one match, and return how many of the characters after it belong to it."""
        kind, found = match.lastgroup, match[match.lastgroup]
        if kind == "command":
            return self.command(found, match.end())
        if kind in ("space", "apart", "tight"):
            self.space(Gap[kind.upper()])
        elif kind == "escaped":
            self.escaped(found)
        elif kind == "environment":
            self.add("command", rf"\{match['edge']} {found}")
        elif kind == "word":
            rest = HYPHENATED.match(self.source, match.end()) if self.upright else None
            self.add("word", found + (rest[0] if rest else ""))
            return len(rest[0]) if rest else 0
        elif kind == "number":
            self.add(kind, found)
        elif kind == "row":
            self.add("sign", r"\\")
        elif kind == "set":
            self.add("command", rf"\mathbb {found}")
        elif kind in ("comma", "ascii"):
            self.add("sign", ASCII_RELATIONS.get(found, ","))
            self.gap = Gap.TIGHT if kind == "comma" else self.gap
        else:
            self.sign(found)
        return 0

    def add(self, kind: str, text: str) -> None:
        self.tokens.append(Token(kind, text, self.gap, self.upright))
        self.gap = Gap.NONE
        if text in (r"\circ", r"\degree"):
            self.degree()

    def space(self, gap: Gap) -> None:
        self.gap = max(self.gap, gap)

    def command(self, name: str, end: int) -> int:
        opens = (COLOUR if name == "textcolor" else ARGUMENT).match(self.source, end)
        if FONT.fullmatch(name) and opens:
            self.deeper()
            self.space(Gap.APART)
            self.groups.append((len(self.tokens), self.upright))
            self.upright = self.upright or UPRIGHT_FONT.fullmatch(name) is not None
            return opens.end() - end
        if name in SPACES:
            self.space(Gap.SPACE)
        elif APART.fullmatch(name):
            self.space(Gap.APART)
        elif not DROPPED.fullmatch(name):
            name = ALIASES.get(name, name)
            if name.isalpha():
                self.add("command", f"\\{name}")
            else:
                self.sign(name)
        return 0

    def escaped(self, character: str) -> None:
        if character in SPACES or character.isspace():
            self.space(Gap.SPACE)
        elif APART.fullmatch(character):
            self.space(Gap.APART)
        else:
            self.sign(ESCAPED.get(character, f"\\{character}"))

    def sign(self, text: str) -> None:
        if text == "}" and self.groups:
            return self.close()
        if text in OPENING:
            self.deeper()
        elif text in CLOSING:
            self.depth -= 1
        if text == "{":
            self.groups.append((len(self.tokens), None))
        return self.add("sign", text)

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise OutOfBounds("too_deep")

    def close(self) -> None:
        """End a group. Braces of a font stay if it holds more than words, so that they still group their content."""
        self.depth -= 1
        start, upright = self.groups.pop()
        inner = self.tokens[start:]
        if upright is None:
            single = len(inner) == 2 and start and self.tokens[start - 1].text in ("^", "_")
            if single:  # x^{2} is x^2
                self.tokens[start:] = [replace(inner[1], gap=inner[0].gap)]
                self.degree()
            else:
                self.add("sign", "}")
        else:
            self.upright = upright
            if len(inner) > 1 and any(token.kind != "word" and token.text not in ".,;:" for token in inner):
                self.tokens.insert(start, Token("sign", "{", inner[0].gap))
                self.add("sign", "}")
            self.gap = Gap.APART

    def degree(self) -> None:
        r"""Make ``^\circ`` a single token, with or without braces."""
        if [token.text for token in self.tokens[-2:]] in (["^", r"\circ"], ["^", r"\degree"]):
            self.tokens[-2:] = [Token("command", r"\degree", self.tokens[-2].gap)]


def _grouped_digits(tokens: list[Token]) -> list[Token]:
    r"""Join digits in groups of three to one number: ``1,024``, ``1\,024``, ``32,\! 349``.

    Inside brackets a plain comma separates, as in ``(1,024)``, but a space or ``{,}`` still groups.
    """
    grouped: list[Token] = []
    position = depth = 0
    while position < len(tokens):
        token = tokens[position]
        depth += (token.text in OPENING[1:]) - (token.text in CLOSING[1:])
        size, number = _group_at(tokens, position, depth > 0)
        grouped.append(replace(token, text=number) if size else token)
        position += size or 1
    return grouped


def _group_at(tokens: list[Token], start: int, bracketed: bool) -> tuple[int, str]:
    """The number of tokens from ``start`` that form one grouped number, and its digits; 0 if there is none."""
    if not re.fullmatch("[1-9][0-9]{0,2}", tokens[start].text) or _follows_number(tokens, start):
        return 0, ""
    for separators in (1, 0):  # a comma, or nothing but a space
        digits, position = tokens[start].text, start + 1
        while position + separators < len(tokens) and "." not in digits:
            comma, group = tokens[position], tokens[position + separators]
            if separators and not (comma.text == "," and comma.gap in (Gap.NONE, Gap.TIGHT)):
                break
            if (
                group.gap not in ((Gap.TIGHT,) if bracketed else (Gap.NONE, Gap.TIGHT))
                if separators
                else (group.gap is not Gap.SPACE)
            ):
                break
            if not re.fullmatch(r"[0-9]{3}(?:\.[0-9]+)?", group.text):
                break
            digits, position = digits + group.text, position + separators + 1
        if position > start + 1 and not _continues(tokens, position):
            return position - start, digits
    return 0, ""


def _follows_number(tokens: list[Token], start: int) -> bool:
    before = tokens[start - 1] if start else None
    if before is None:
        return False
    glued_comma = before.text == "," and tokens[start].gap in (Gap.NONE, Gap.TIGHT) and start > 1
    return before.kind == "number" or (glued_comma and tokens[start - 2].kind == "number")


def _continues(tokens: list[Token], position: int) -> bool:
    """Whether more digits follow, so that the tokens so far are not a complete grouped number."""
    if position >= len(tokens):
        return False
    comma = tokens[position].text == "," and tokens[position + 1 : position + 2]
    following = tokens[position + 1] if comma else tokens[position]
    return following.kind == "number" and (not comma or following.gap is not Gap.SPACE)
