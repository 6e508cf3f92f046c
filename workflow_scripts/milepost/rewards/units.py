"""The words that may follow a number without changing its value; any other word makes it a different answer."""

import re

from milepost.rewards.latex import FUNCTIONS, Token, balanced

# One line for each unit: its name and its other spellings. "-" marks spellings that are units only in text: 5m may be 5
# times m. Short spellings are case-sensitive, since 33 M is 33 million.
MEASURES = """
    degree degrees deg
    percent pct
    dollar dollars USD
    euro euros EUR
    pound-sterling
    yen JPY
    yuan RMB CNY
    rupee rupees INR
    cent cents
    mm millimeter millimeters millimetre millimetres
    cm centimeter centimeters centimetre centimetres
    dm decimeter decimeters
    m- meter meters metre metres
    km kilometer kilometers kilometre kilometres
    inch inches in-
    foot feet ft
    yard yards yd
    mile miles mi
    mg milligram milligrams
    g- gram grams
    kg kilogram kilograms
    ton tons tonne tonnes
    lb lbs pound pounds
    oz ounce ounces
    mL ml milliliter milliliters millilitre millilitres
    L- l- liter liters litre litres
    gallon gallons gal
    quart quarts
    pint pints
    cup cups
    acre acres
    hectare hectares
    ms millisecond milliseconds
    s- sec secs second seconds
    min mins minute minutes
    h- hr hrs hour hours
    day days
    week weeks
    month months
    year years yr yrs
    mile/h mph
    km/h kph kmh
    N- newton newtons
    J- joule joules
    W- watt watts
    V- volt volts
    Hz hertz
    radian radians rad
    unit units
"""
COUNTED = """
    angles apples arrangements balls bananas birds blocks books bottles boxes boys candies cards cars cats cells
    chairs chickens children choices chords circles classes coins colorings combinations cookies coordinates cows
    cubes cuts diagonals different digits distinct divisors dogs edges eggs elements employees faces factors fish
    flowers functions games girls goals guests handshakes hits horses houses integers intersections jumps kids lines
    marbles matches members men moves numbers oranges ordered outcomes pages pairs parts passengers paths pencils
    pens people permutations person persons pieces plants players points polygons polynomials possibilities primes
    problems questions rectangles regions roots rows runs segments sequences sets sheep sides solution solutions
    songs squares steps stickers stones students subsets teams terms tickets tiles times toys trees triangles
    triples trips turns values vertices votes way ways women words
"""
HAN_COUNTED = """
    个 種 种 次 人 名 位 条 條 只 隻 本 页 頁 块 張 张 辆 輛 棵 颗 顆 件 台 间 間 枚 根 对 對 组 組 场
    不同 不同的 的 方法 方案 方式 可能 情况 排法 解 单位 平方单位
"""
HAN = {
    **dict.fromkeys(HAN_COUNTED.split(), ""),
    **{"元": "yuan", "度": "degree", "米": "m", "厘米": "cm", "分米": "dm", "毫米": "mm", "千米": "km", "公里": "km"},
    **{"平方米": "m^2", "平方厘米": "cm^2", "平方千米": "km^2", "平方分米": "dm^2", "平方毫米": "mm^2"},
    **{
        "立方米": "m^3",
        "立方厘米": "cm^3",
        "升": "L",
        "毫升": "mL",
        "克": "g",
        "千克": "kg",
        "公斤": "kg",
        "吨": "ton",
    },
    **{"秒": "s", "分": "min", "分钟": "min", "小时": "h", "时": "h", "天": "day", "日": "day", "周": "week"},
    **{"月": "month", "年": "year", "岁": "year"},
}
SIGNS = {
    "%": "percent",
    r"\degree": "degree",
    r"\$": "dollar",
    "£": "pound-sterling",
    "€": "euro",
    "¥": "yen",
    "₹": "rupee",
}
CURRENCIES = {"dollar", "pound-sterling", "euro", "yen", "rupee"}
TEMPERATURES = {"C": "C", "F": "F", "Celsius": "C", "Fahrenheit": "F"}  # after degrees
POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3", "squared": "2", "cubed": "3"}

UNITS = {
    word.rstrip("-"): line.split()[0].rstrip("-") for line in MEASURES.strip().splitlines() for word in line.split()
} | dict.fromkeys(COUNTED.split(), "")
TEXT_ONLY = {word.rstrip("-") for word in MEASURES.split() if word.endswith("-")}
HAN_UNITS = re.compile("|".join(sorted(HAN, key=len, reverse=True)))


def split_unit(tokens: list[Token]) -> tuple[list[Token], str]:
    """A number's tokens, and its normalized unit, such as ``cm^2``; the unit is empty for counted things or none.

    If anything but a unit follows the number, all tokens are returned.
    """
    tokens, currency = _without_currency(tokens)
    for start in range(1, len(tokens)):
        unit = _unit(tokens[start:])
        if unit is not None and not (unit and currency) and not (unit == "degree" and _has_function(tokens)):
            return tokens[:start], unit or currency
    return tokens, currency


def _without_currency(tokens: list[Token]) -> tuple[list[Token], str]:
    r"""Drop a currency sign before a number or after its minus sign: ``-\$5``."""
    at = 1 if tokens[:1] and tokens[0].text == "-" else 0
    unit = SIGNS.get(tokens[at].text, "") if len(tokens) > at + 1 else ""
    return (tokens[:at] + tokens[at + 1 :], unit) if unit in CURRENCIES else (tokens, "")


def _has_function(tokens: list[Token]) -> bool:
    """Whether degrees may belong to a function's argument: dropping them would turn sin 30° into sin 30 rad."""
    return any(token.text.lstrip("\\") in FUNCTIONS for token in tokens)


def _unit(tokens: list[Token]) -> str | None:
    """The unit that all tokens together spell, or None."""
    if not balanced(tokens):
        return None
    tokens = [token for token in tokens if token.text not in ("{", "}")]
    spelled, position, pending, joined = "", 0, "", True
    while position < len(tokens):
        token = tokens[position]
        name, word = _name(token), token.text.lower()
        if word in POWERS and token.kind == "word":
            if word.endswith("d"):  # squared, after the unit
                if joined:
                    return None
                spelled += f"^{POWERS[word]}"
            else:
                pending, joined = POWERS[word], True
        elif name is not None:
            power, position = _power(tokens, position)
            if (pending and power) or (name and spelled.strip("/") and not spelled.endswith("/")):
                return None
            power = pending or power
            spelled += f"{name}^{power}" if name and power else name
            pending, joined = "", False
        elif token.text in TEMPERATURES and spelled == "degree":
            spelled += TEMPERATURES[token.text]
        elif token.text in ("/", "per") and not joined and not pending:
            spelled, joined = f"{spelled}/", True
        elif not (token.text == "." and position and tokens[position - 1].kind == "word"):  # sq. ft.
            return None
        position += 1
    return None if joined or pending else spelled.strip("/")


def _power(tokens: list[Token], position: int) -> tuple[str, int]:
    """The exponent of the unit at ``position``, and the index after it."""
    if [token.text for token in tokens[position + 1 : position + 2]] == ["^"] and position + 2 < len(tokens):
        exponent = tokens[position + 2].text
        if exponent in ("2", "3"):
            return exponent, position + 2
    return "", position


def _name(token: Token) -> str | None:
    if token.text in SIGNS:
        return SIGNS[token.text]
    if token.kind != "word":
        return None
    word = token.text if len(token.text) < 4 else token.text.lower()
    if word in UNITS and (token.upright or word not in TEXT_ONLY):
        return UNITS[word]
    parts = HAN_UNITS.findall(word)
    return "".join(HAN[part] for part in parts) if parts and "".join(parts) == word else None
