r"""From a response's text to the one answer that it gives: the last complete ``\boxed{}`` behind the reasoning."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rewards.arithmetic import NotArithmetic, NoValue, evaluate

MAX_CHARACTERS = 1000  # of an answer: longer ones are wrong

INK = re.compile(r"\S")
BOX_OR_BRACE = re.compile(r"\\++(boxed\s*+\{|[{}]?)|[{}]")
DEGREE_SIGNS = str.maketrans("º˚", "°°")  # NFKC would make letters and accents of them
CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‐‒–—―", "-"),
        **dict.fromkeys("×⋅·∙•✕✖∗", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        "π": "\\pi ",
        "∞": "\\infty ",
        "±": "\\pm ",
        "∓": "\\mp ",
    }
)
SUPERSCRIPTS = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")  # NFKC would make 3³ into 33
SUBSCRIPTS = re.compile("[₀-₉]+")
VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")  # NFKC would make 3½ into 31/2

FONT = r"(?:text|math)(?:rm|bf|it|sf|tt|normal|up)?|mbox|bm|boldsymbol|operatorname|boxed|fbox"
FONT_COMMAND = re.compile(rf"\\(?:{FONT})\s*(?=\{{)")
EMPTY_FONT = re.compile(rf"\\(?:{FONT})\s*\{{\s*\}}")
LEAD_IN = re.compile(r"^\s*(?:\{\s*(?:final )?answer\s*:\s*\}|(?:final )?answer\s*:|=)", re.IGNORECASE)
SPACE_COMMAND = re.compile(r"\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace)(?![a-zA-Z])|~|\s+")
REMOVED = re.compile(r"\\!|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|rm|bf|it)(?![a-zA-Z])")
MARK = re.compile(r"\\[$%()\[\]]|[$%£€¥]")  # a space is left of it: 3$3 is two numbers, not 33
ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
DEGREES = re.compile(r"(?:\^\s*(?:\\circ|°|\{\s*(?:\\circ|°)\s*\})|\\degree(?![a-zA-Z])|°)\s*[CF]?\s*$")

HAN = "一-鿿"
WORDS = rf"[A-Za-z{HAN} .'/-]*"
POWER = r"\^\s*(?:[23]|\{\s*[23]\s*\})"
TEXT_UNIT = re.compile(
    rf"(?:(?<=[0-9}})!.°])|(?<=\\circ))\s*\\(?:text|mathrm|textrm|mbox|textit|textbf)\s*\{{\s*([A-Za-z{HAN}]{WORDS})(?:{POWER}\s*)?\}}"
)
PLAIN_UNIT = re.compile(
    rf"(?<=[0-9}})!.])\s+((?:[A-Za-z]{{3}}|cm|mm|km|kg|ft|mi|lb|oz|hr|sq)(?![A-Za-z]*[0-9(]){WORDS})"
)
HAN_UNIT = re.compile(rf"(?<=[0-9}})!])\s*([{HAN}][{HAN} /]*)")
POWER_OF_UNIT = re.compile(rf"\s*{POWER}")
NOT_UNITS = """
    or and not nor either neither but else otherwise if when for than least most about approximately around between to
    through over under maybe possibly perhaps base plus minus mod modulo e i pi half halve quarter hundred
    thousand million billion trillion dozen first third fifth eighth ninth twelfth twentieth thirtieth fortieth fiftieth
    sixtieth seventieth eightieth ninetieth one two three four five six seven eight nine ten eleven twelve thirteen
    fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""  # with their plurals and, as in sixths, ordinals; a second is a unit
MORE_THAN_A_UNIT = re.compile(
    rf"^(?:squared|cubed|factorial)|(?<![a-z])(?:{'|'.join(NOT_UNITS.split())})(?:th)?s?(?![a-z])"
    "|[或和与與及至到以之半打十百万萬亿億兆]|千(?![米克瓦卡])|^[零一二两三四五六七八九加减乘除]|[平立次]方$|阶乘$"
)
STOPS = " .。,;:"
SEPARATOR = re.compile(r";|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\\(?:lor|land|vee|wedge|pm|mp|cup|cap)(?![a-zA-Z])")
GROUPED_DIGITS = re.compile(r"(?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
BRACKET = re.compile(r"[{}()\[\]]")
BRACKET_OR_COMMA = re.compile(r"[{}()\[\],]")
SIGN = r"(?:[A-Za-z0-9 _^{}()\[\]+\-*/\\|'=]|(?<=[0-9])\.(?=[0-9]))"
EXPRESSION = re.compile(rf"(?!.*[0-9] +[A-Za-z]{{2}}){SIGN}*[A-Za-z]{SIGN}*")
SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_[A-Za-z0-9]|_\{[A-Za-z0-9]+\})?")


@dataclass(frozen=True)
class Answer:
    """One answer or label, normalised.

    Attributes:
        text: its LaTeX without fonts, units and spacing commands.
        right: what follows ``x =`` or another name for the number asked for; else all of the text.
        value: the exact value of ``right`` where that is arithmetic, else None.
        undefined: ``right`` is arithmetic, but divides by zero or leaves all bounds: equal to nothing.
        parts: how many answers it states: 1, or more for "33 or 34", "33, 34", "\\pm 33".
    """

    text: str
    right: str
    value: Fraction | None
    undefined: bool
    parts: int

    @property
    def key(self) -> str:
        """The same for equal numbers, however written: what a majority vote counts."""
        return self.text if self.value is None else str(self.value)


def extract(response: str, think_block: Literal["required", "optional"]) -> tuple[str | None, str | None]:
    r"""The content of the last complete ``\boxed{}`` behind the reasoning, and else the reason why there is none.

    Returns:
        ``(content, None)`` or ``(None, reason)``, reason being ``no_think_end`` (the reasoning never ended, or, with
        ``think_block="required"``, was never there) or ``no_box`` (no complete box behind it, or but empty ones).
    """
    _, end, tail = response.rpartition("</think>")
    if "<think>" in tail or (not end and think_block == "required"):
        return None, "no_think_end"
    content = last_box(tail)
    return (None, "no_box") if content is None else (content, None)


def last_box(text: str) -> str | None:
    r"""The content of the ``\boxed{...}`` that closes last, in one pass; empty ones and open ones are none."""
    stack: list[int | None] = []  # of open braces: where the content starts if it is a box's
    last = None
    for match in BOX_OR_BRACE.finditer(text):
        found = match[0]
        backslashes = len(found) - len(found.lstrip("\\"))
        if match[1] and match[1].startswith("boxed"):
            stack.append(match.end())
        elif found[-1] not in "{}" or backslashes % 2:  # \{ and \} are printed, they do not group
            continue
        elif found[-1] == "{":
            stack.append(None)
        elif stack and (start := stack.pop()) is not None and INK.search(text, start, match.start()):
            last = (start, match.start())  # an empty box takes nothing back
    return text[slice(*last)] if last else None


def read_answer(raw: str, name: re.Pattern = EXPRESSION) -> Answer | None:
    """Normalise an answer; None where it is longer than ``MAX_CHARACTERS``.

    ``name`` says what may stand before an equals sign that is not itself a number: `EXPRESSION` for answers (``m + n =
    33`` answers 33), `SYMBOL` for labels (``x = 33`` asks for 33, but ``x^2 + y^2 = 1`` for an equation).
    """
    if len(raw) > MAX_CHARACTERS:
        return None
    text = normalise(raw)
    if len(text) > MAX_CHARACTERS:  # compatibility characters may unfold to many
        return None
    parts = _parts(text)
    right, value, undefined = text, None, False
    if parts == 1:
        right = _right_hand_side(text, name)
        try:
            value = evaluate(right)
        except NoValue:
            undefined = True
        except NotArithmetic:
            pass
    return Answer(text, right, value, undefined, parts)


def normalise(text: str) -> str:
    """One spelling for what prints the same: NFKC, signs, spaces, fonts, degrees, percent, currency, units."""
    text = SUPERSCRIPTS.sub(lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = SUBSCRIPTS.sub(lambda match: "_{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = VULGAR_FRACTION.sub(_latex_fraction, text).translate(DEGREE_SIGNS)
    text = unicodedata.normalize("NFKC", text).translate(CHARACTERS)
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    if "\\begin" not in text:  # a doubled backslash before a command is one too many, except between a matrix's rows
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = MARK.sub(" ", REMOVED.sub("", text)).replace("{,}", ",")
    text = re.sub(r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1", text)
    text = _trimmed(EMPTY_FONT.sub("", SPACE_COMMAND.sub(" ", text)))
    text = _trimmed(LEAD_IN.sub("", FONT_COMMAND.sub("", text)))
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def same_text(answer: str, label: str) -> bool:
    """Whether two normalised texts differ in nothing but spaces, and the case of a word."""
    answer, label = answer.replace(" ", ""), label.replace(" ", "")
    if label.isalpha() and len(label) > 1:
        answer, label = answer.casefold(), label.casefold()
    return bool(label) and answer == label


def balanced(text: str) -> bool:
    """Whether every bracket closes; of whatever kind, because half-open intervals mix them."""
    depth = 0
    for match in BRACKET.finditer(text):
        depth += 1 if match[0] in "([{" else -1
        if depth < 0:
            return False
    return depth == 0


def _latex_fraction(match: re.Match) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _trimmed(text: str) -> str:
    """Without degrees, units, full stops and braces around all of it, in whatever order they come."""
    while (shorter := _unwrapped(_without_unit(_without_degrees(text)).strip(STOPS))) != text:
        text = shorter
    return re.sub(" +", " ", text)


def _unwrapped(text: str) -> str:
    """Without the one pair of braces that holds all of it, if there is such a pair."""
    if not (text.startswith("{") and text.endswith("}")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth and position < len(text) - 1:
            return text
    return text[1:-1]


def _without_degrees(text: str) -> str:
    """Drop the degrees of an angle; those in a sine say that it is not one of radians."""
    return text if ANGLE_FUNCTION.search(text) else DEGREES.sub("", text)


def _without_unit(text: str) -> str:
    """Drop the unit behind a number; words that say more than a unit stay, and with them the answer is wrong."""
    for pattern in (TEXT_UNIT, PLAIN_UNIT, HAN_UNIT):
        for match in pattern.finditer(text):
            power = POWER_OF_UNIT.match(text, match.end())
            ends = not text[power.end() if power else match.end() :].strip(STOPS)
            if ends and not MORE_THAN_A_UNIT.search(match[1].strip(STOPS).lower()):
                return text[: match.start()]
    return text


def _parts(text: str) -> int:
    """How many answers a text states: one more than the separators outside of its brackets."""
    separators, depth = len(SEPARATOR.findall(text)), 0
    for match in BRACKET_OR_COMMA.finditer(GROUPED_DIGITS.sub("0", text)):
        if match[0] == ",":
            separators += depth <= 0
        else:
            depth += 1 if match[0] in "([{" else -1
    return 1 + separators


def _right_hand_side(text: str, name: re.Pattern) -> str:
    """What an equation says that its left hand is; all of the text where that is no name, nor the same number."""
    *lefts, last = _sides(text)
    for left in lefts:
        try:
            if evaluate(left) == evaluate(last):
                continue
            return text
        except NoValue:
            return text
        except NotArithmetic:
            if not name.fullmatch(left.strip()):
                return text
    return last.strip()


def _sides(text: str) -> list[str]:
    """The text split at the equals signs outside of its brackets."""
    sides, start, depth = [], 0, 0
    for match in re.finditer(r"[{}()\[\]]|(?<![<>!\\:])=", text):
        if match[0] != "=":
            depth += 1 if match[0] in "([{" else -1
        elif depth <= 0:
            sides.append(text[start : match.start()])
            start = match.end()
    return [*sides, text[start:]]
