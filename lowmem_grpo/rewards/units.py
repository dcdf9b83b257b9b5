r"""Units by one name each, and how many of one make another: `cm^2` is `centimeter2`, `$` and `USD` are `dollar`.

The case of a symbol is its meaning: mPa is a millipascal, and MPa a megapascal.
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from lowmem_grpo.rewards.number_words import COMPARED, NO_NOUN, OTHER_BEHIND, SPACELESS

# Units that are so many of others; of a noun that is neither here nor in BASES only the name is known.
DEFINITIONS = {
    "liter": "1/1000 meter3", "foot": "12 inch", "inch": "254/10000 meter", "yard": "3 foot", "mile": "1760 yard",
    "acre": "4840 yard2", "hectare": "10000 meter2", "gallon": "231 inch3", "quart": "1/4 gallon", "pint": "1/2 quart",
    "cup": "1/2 pint", "tablespoon": "1/16 cup", "teaspoon": "1/3 tablespoon", "minute": "60 second",
    "hour": "60 minute", "day": "24 hour", "week": "7 day", "year": "12 month", "decade": "10 year",
    "century": "100 year", "poundmass": "45359237/100000 gram", "ounce": "1/16 poundmass", "tonne": "1000000 gram",
    "newton": "1 kilogram meter second-2", "joule": "1 newton meter", "watt": "1 joule second-1",
    "pascal": "1 newton meter-2", "bar": "100000 pascal", "atmosphere": "101325 pascal", "hertz": "1 second-1",
    "becquerel": "1 second-1", "coulomb": "1 ampere second", "volt": "1 joule coulomb-1", "ohm": "1 volt ampere-1",
    "farad": "1 coulomb volt-1", "siemens": "1 ampere volt-1", "weber": "1 volt second", "tesla": "1 weber meter-2",
    "henry": "1 weber ampere-1", "watthour": "1 watt hour", "calorie": "4184/1000 joule", "molar": "1 mole liter-1",
    "mph": "1 mile hour-1", "kph": "1 kilometer hour-1", "bps": "1 bit second-1", "byte": "8 bit",
    "byterate": "8 bps", "dollarcent": "1/100 dollar", "eurocent": "1/100 euro", "pence": "1/100 sterling",
    "cc": "1 centimeter3", "mpg": "1 mile gallon-1", "newtonmeter": "1 newton meter",
}  # fmt: skip
BASES = {
    "meter", "gram", "second", "month", "ampere", "kelvin", "mole", "candela", "lumen", "lux", "bit", "degree",
    "degreec", "degreef", "radian", "electronvolt", "decibel", "gray", "sievert", "point", "am", "pm",
}  # fmt: skip
PREFIXES = {
    "p": "pico", "n": "nano", "u": "micro", "\N{MICRO SIGN}": "micro", "\N{GREEK SMALL LETTER MU}": "micro",
    "m": "milli", "c": "centi", "d": "deci", "h": "hecto", "k": "kilo", "M": "mega", "G": "giga", "T": "tera",
    "P": "peta",
}  # fmt: skip
TEN_TO = {
    "pico": -12, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "hecto": 2, "kilo": 3, "mega": 6,
    "giga": 9, "tera": 12, "peta": 15,
}  # fmt: skip
WITH_PREFIXES = {
    "m": "meter", "g": "gram", "s": "second", "L": "liter", "l": "liter", "A": "ampere", "K": "kelvin", "mol": "mole",
    "Pa": "pascal", "W": "watt", "V": "volt", "Hz": "hertz", "J": "joule", "N": "newton", "F": "farad", "H": "henry",
    "C": "coulomb", "T": "tesla", "S": "siemens", "\N{GREEK CAPITAL LETTER OMEGA}": "ohm", "eV": "electronvolt",
    "cal": "calorie", "B": "byte", "b": "bit", "bps": "bps", "Bps": "byterate", "Wh": "watthour", "Wb": "weber",
    "Bq": "becquerel", "Gy": "gray", "Sv": "sievert", "bar": "bar",
}  # fmt: skip
SYMBOLS = {a + b: PREFIXES[a] + name for a, (b, name) in product(PREFIXES, WITH_PREFIXES.items())}
# C and F are ambiguous, and so are "pound" and "degree": see AMBIGUOUS.
SYMBOLS |= WITH_PREFIXES | {
    "KB": "kilobyte", "dB": "decibel", "cd": "candela", "lm": "lumen", "lx": "lux", "atm": "atmosphere",
    "ha": "hectare", "M": "molar", "mM": "millimolar", "uM": "micromolar", "nM": "nanomolar", "pM": "picomolar",
    "pm": "pm", "C": "C", "F": "F", "cc": "cc", "Nm": "newtonmeter",
}  # fmt: skip
BY_LETTERS: dict[str, list[str]] = {}  # symbols without regard to case
for _symbol in SYMBOLS:
    BY_LETTERS.setdefault(_symbol.casefold(), []).append(_symbol)
# Other names of units, in any case; a plural is known by its singular.
WORDS = {
    "\N{CENT SIGN}": "cent", "amp": "ampere", "in": "inch", "ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile",
    "lb": "poundmass", "oz": "ounce", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "pt": "point",
    "deg": "degree", "kmh": "kph", "gal": "gallon", "qt": "quart", "tbsp": "tablespoon", "tsp": "teaspoon",
    "rad": "radian", "kilo": "kilogram", "mpg": "mpg", "centigrade": "degreec", "celsius": "degreec",
    "fahrenheit": "degreef",
    "quid": "sterling", "am": "am", "pm": "pm", "hertz": "hertz", "siemens": "siemens", "lux": "lux", "mph": "mph",
    "kph": "kph", "children": "child", "men": "man", "women": "woman",
    # Of German, French and Spanish; of Chinese, Japanese and Korean.
    "stunde": "hour", "stunden": "hour", "minuten": "minute", "sekunde": "second", "sekunden": "second", "tag": "day",
    "tage": "day", "woche": "week", "wochen": "week", "monat": "month", "monate": "month", "jahr": "year",
    "jahre": "year", "grad": "degree", "heure": "hour", "seconde": "second", "jour": "day", "semaine": "week",
    "hora": "hour", "minuto": "minute", "segundo": "second", "metro": "meter", "kilómetro": "kilometer",
    "centímetro": "centimeter", "litro": "liter", "gramo": "gram", "kilogramo": "kilogram",
    "米": "meter", "厘米": "centimeter", "毫米": "millimeter", "公里": "kilometer", "克": "gram", "公斤": "kilogram",
    "吨": "tonne", "升": "liter", "毫升": "milliliter", "秒": "second", "分钟": "minute", "小时": "hour",
    "个小时": "hour", "天": "day", "年": "year", "平方米": "meter2", "平方厘米": "centimeter2", "立方米": "meter3",
    "立方厘米": "centimeter3", "時間": "hour", "分間": "minute", "시간": "hour", "미터": "meter",
}  # fmt: skip
PHRASES = {
    re.compile(phrase, re.IGNORECASE): name
    for phrase, name in {
        r"\\pounds|\bpounds? sterling\b": "quid", r"\bmetric tons?\b": "tonne",
        r"\bdegrees? (?:c|celsius|centigrade)\b": "celsius", r"\bdegrees? (?:f|fahrenheit)\b": "fahrenheit",
        r"\bfluid ounces?\b|\bfl\.? oz\b": "fluidounce",
        r"\blight[- ]years?\b": "lightyear", r"\bnautical miles?\b": "nauticalmile",
        r"\btroy (?:ounces?|oz)\b": "troyounce", r"\b(?:man|person)[- ]hours?\b": "personhour",
    }.items()
}  # fmt: skip
AMBIGUOUS = {
    "pound": ("poundmass", "sterling"), "cent": ("dollarcent", "eurocent"), "penny": ("pence", "dollarcent"),
    "yuanyen": ("yuan", "yen"), "peso": ("peso", "mxn"), "C": ("coulomb", "degreec"), "F": ("farad", "degreef"),
    "degree": ("degree", "degreec", "degreef"),
}  # fmt: skip
MONEY_NAMES = {
    "$": "dollar", "us$": "dollar", "usd": "dollar", "textdollar": "dollar", "€": "euro", "eur": "euro", "euro": "euro",
    "texteuro": "euro", "£": "sterling", "gbp": "sterling", "textsterling": "sterling", "¥": "yuanyen",
    "jpy": "yen", "yen": "yen", "円": "yen", "₹": "rupee", "inr": "rupee", "rs": "rupee", "₩": "won", "krw": "won",
    "원": "won", "元": "yuan", "cny": "yuan", "rmb": "yuan", "₽": "ruble", "rub": "ruble", "руб": "ruble",
    "kr": "krone", "buck": "dollar", "块": "yuan", "美元": "dollar", "欧元": "euro", "chf": "chf", "brl": "brl",
    "r$": "brl",
    "cad": "cad", "c$": "cad", "ca$": "cad", "aud": "aud", "a$": "aud", "au$": "aud", "nzd": "nzd", "nz$": "nzd",
    "hkd": "hkd", "hk$": "hkd", "sgd": "sgd", "s$": "sgd", "twd": "twd", "nt$": "twd", "mxn": "mxn", "mx$": "mxn",
    "peso": "peso",
}  # fmt: skip
# Of one name in several countries: 5 Canadian dollars, Mexican pesos, Swiss francs.
NATIONAL = re.compile(
    r"\b(US|Hong Kong|New Zealand|New Taiwan|Swiss|\w+(?:an|ish|ese)) (dollar|peso|franc|pound|rupee|dinar|crown|real)"
    r"s?\b",
    re.IGNORECASE,
)
CODES_OF_NATIONS = {
    "usdollar": "usd", "americandollar": "usd", "canadiandollar": "cad", "australiandollar": "aud",
    "newzealanddollar": "nzd", "hongkongdollar": "hkd", "singaporeandollar": "sgd", "newtaiwandollar": "twd",
    "swissfranc": "chf", "mexicanpeso": "mxn", "indianrupee": "inr", "brazilianreal": "brl", "britishpound": "gbp",
}  # fmt: skip
CURRENCIES = set(MONEY_NAMES.values())
# What is counted, in words that say nothing of what it is: no other unit than any, or any noun.
NO_UNIT = {"unit", "total", "number", "integer", "value"}
COUNTS = NO_UNIT | {
    "way", "arrangement", "possibility", "combination", "permutation", "solution", "piece", "item", "thing", "people",
    "person",
}  # fmt: skip
FILLERS = {"of", "the", "a", "an", "in", "remaining", "each", "every", "all"}
RAISED = {"squared": 2, "cubed": 3}
CURRENCY = (
    r"(?:US|[A-Z]{1,2})?\\?\$|[¢£¤¥֏؋৳฿៛\u20a0-\u20cf﷼]|\\(?:pounds|euro|yen|text(?:euro|sterling|dollar))(?![a-z])"
)
CODES = (
    "USD|EUR|GBP|JPY|CNY|RMB|INR|KRW|CHF|CAD|AUD|NZD|SEK|NOK|DKK|PLN|CZK|HUF|BRL|MXN|ZAR|TRY|RUB|NGN|VND|THB|PHP|IDR|"
    "MYR|SGD|HKD|TWD|ILS|AED|EGP|PKR|BDT"
)
PART = re.compile(rf"{CURRENCY}|[^\W\d_]+|/|-?\d")


def unit_name(text: str, power: str = "") -> str:
    """The names of a unit with their exponents, in one order: `hour-1 mile` of miles per hour."""
    exponents: Counter[str] = Counter()
    sign, following, last, is_content = 1, 1, "", False
    for phrase, name in PHRASES.items():
        text = phrase.sub(name, text)
    text = NATIONAL.sub(_national, text)
    for part in PART.findall(text + power):
        word = part.lower()
        if word in ("/", "per"):
            sign, is_content = -1, False
        elif word in ("square", "sq", "cubic", "cu"):
            following = 2 if word.startswith("sq") else 3
        elif last and (word in RAISED or re.fullmatch(r"-?\d", word)):
            exponents[last] *= RAISED.get(word) or int(word)
        elif word == "of" and last:  # 3 boxes of books are boxes
            is_content = True
        elif not is_content and not (word in FILLERS and last):
            last = _name(part)
            exponents[last] += sign * following
            following = 1
    return " ".join(name + (str(count) if count != 1 else "") for name, count in sorted(exponents.items()))


def _national(found: re.Match) -> str:
    """The name of a country's own money: cad of Canadian dollars, jamaicandollar of Jamaican ones."""
    name = f"{found[1]}{found[2]}".replace(" ", "").lower()
    return CODES_OF_NATIONS.get(name, name)


@lru_cache(maxsize=4096)
def _name(part: str) -> str:
    """The one name of a symbol, a currency or a noun: `kg` and `Kg` are kilogram."""
    if part in SYMBOLS:
        return SYMBOLS[part]
    word = part.lower().replace("\\", "").replace("è", "e")
    for name in (word, _singular(word)):
        if name in WORDS or name in MONEY_NAMES:
            return WORDS.get(name) or MONEY_NAMES[name]
    return _in_another_case(part) or re.sub("(met|lit)re$", r"\1er", _singular(word))


def _in_another_case(part: str) -> str | None:
    """The only unit whose symbol has these letters after this prefix, or whatever their case is: Mhz, KWH."""
    alike = BY_LETTERS.get(part.casefold(), []) if len(part) > 1 else []
    for symbols in ([symbol for symbol in alike if symbol[0] == part[0]], alike):
        names = {SYMBOLS[symbol] for symbol in symbols}
        if len(names) == 1:
            return names.pop()
    return None


def _singular(word: str) -> str:
    """A noun without the s of its plural: boxes, cities and cookies are box, city and, like cookie itself, cooky."""
    if len(word) > 2 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-2] if re.search("(?:x|ch|sh|ss)es$", word) else word[:-1]
    return word[:-2] + "y" if word.endswith("ie") else word


def is_symbol(run: str) -> bool:
    """Tell whether letters are the symbol of a unit or of money."""
    known = run in SYMBOLS or run.lower().removesuffix("s") in WORDS or _name(run) in CURRENCIES
    return known or (not run.islower() and _in_another_case(run) is not None)


def is_unit(words: list[str]) -> bool:
    r"""Tell whether words behind a value may be its unit: `5 units squared`, but not `2 \text{ or}`, `18 thousand`."""
    words = [word if word in SYMBOLS else word.lower() for word in words]
    if words[0] in NO_NOUN or words[0] in RAISED or words[0].startswith(SPACELESS) or any(map(COMPARED.search, words)):
        return False
    return OTHER_BEHIND.isdisjoint(set(words) - set(RAISED))


def is_known(unit: str) -> bool:
    """Tell whether a unit is made of known ones, such as those of length and of money."""
    return _measure(unit) is not None


def conversion(unit: str, other: str) -> Fraction | None:
    """How many of another unit one is: 1000 of m and km; 1 where either is left out; None where they differ.

    Apples are no pears, and no kilograms; but they are red apples, and a dollar is a dollar per day.
    """
    if not unit or not other or unit == other:
        return Fraction(1)
    for meaning, other_meaning in product(_meanings(unit), _meanings(other)):
        measure, other_measure = _measure(meaning), _measure(other_meaning)
        if measure and other_measure and measure.dimensions == other_measure.dimensions:
            return measure.amount / other_measure.amount
    names, others = _names(unit), _names(other)
    both_known = is_known(unit) and is_known(other) and CURRENCIES.isdisjoint(names & others)  # $5 is $5 per day
    counts = NO_UNIT if is_known(unit) or is_known(other) else COUNTS
    parts, other_parts = set(unit.split()), set(other.split())
    is_part = parts <= other_parts or other_parts <= parts
    alike = (is_part and not both_known) or not counts.isdisjoint(_above_the_line(unit) | _above_the_line(other))
    return Fraction(1) if alike else None


class Measure(NamedTuple):
    amount: Fraction
    dimensions: dict[str, int]


@lru_cache(maxsize=4096)
def _measure(unit: str) -> Measure | None:
    """A unit in those of BASES and currencies: an inch is 0.0254 meters; None where it has another noun in it."""
    amount, dimensions = Fraction(1), Counter()
    for part in unit.split():
        name, exponent = _without_exponent(part)
        if name in BASES or name in CURRENCIES:
            dimensions[name] += exponent
            continue
        if name in AMBIGUOUS:
            name = AMBIGUOUS[name][0]
        if name in DEFINITIONS:
            count, _, definition = DEFINITIONS[name].partition(" ")
        else:
            prefix = next((prefix for prefix in TEN_TO if name.startswith(prefix)), None)
            if prefix is None or name.removeprefix(prefix) not in {*WITH_PREFIXES.values(), "molar"}:
                return None
            count, definition = Fraction(10) ** TEN_TO[prefix], name.removeprefix(prefix)
        measure = _measure(definition)
        assert measure is not None
        amount *= (Fraction(count) * measure.amount) ** exponent
        for base, count in measure.dimensions.items():
            dimensions[base] += count * exponent
    return Measure(amount, {name: count for name, count in dimensions.items() if count})


def _meanings(unit: str) -> list[str]:
    """A unit with each meaning of its ambiguous names: 5 pounds weigh, or are money."""
    choices = [
        [meaning + part.removeprefix(name) for meaning in AMBIGUOUS.get(name, (name,))]
        for part in unit.split()
        for name in [_without_exponent(part)[0]]
    ]
    return [" ".join(chosen) for chosen in product(*choices)]


def _names(unit: str) -> set[str]:
    """The names in a unit, without their exponents."""
    return {_without_exponent(part)[0] for part in unit.split()}


def _above_the_line(unit: str) -> set[str]:
    """The names in a unit that are not `per` anything."""
    return {name for name, exponent in map(_without_exponent, unit.split()) if exponent > 0}


def _without_exponent(part: str) -> tuple[str, int]:
    name = part.rstrip("-0123456789")
    return name, int(part[len(name) :] or 1)
