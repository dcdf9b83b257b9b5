r"""Units of numbers by one name each: `cm^2` and `square centimeters` are `centimeter2`, `$` and `USD` are `dollar`."""

import re

# A unit's other names; the plural is known without them.
UNITS = {
    "cm": "centimeter", "mm": "millimeter", "m": "meter", "metre": "meter", "km": "kilometer", "mg": "milligram",
    "g": "gram", "kg": "kilogram", "ml": "milliliter", "l": "liter", "litre": "liter", "ft": "foot", "feet": "foot",
    "in": "inch", "inches": "inch", "yd": "yard", "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "mph": "mph",
    "kph": "kph", "am": "am", "pm": "pm", "kw": "kw", "hz": "hz", "kwh": "kwh", "pt": "point", "pts": "point",
    "deg": "degree", "n": "newton", "j": "joule", "kmh": "kph",
}  # fmt: skip
MONEY_NAMES = {
    "$": "dollar", "us$": "dollar", "usd": "dollar", "textdollar": "dollar", "€": "euro", "eur": "euro", "euro": "euro",
    "texteuro": "euro", "£": "pound", "gbp": "pound", "pounds": "pound", "textsterling": "pound", "¥": "yen",
    "jpy": "yen", "yen": "yen", "円": "yen", "₹": "rupee", "inr": "rupee", "rs": "rupee", "₩": "won", "krw": "won",
    "원": "won", "元": "yuan", "cny": "yuan", "rmb": "yuan", "₽": "ruble", "rub": "ruble", "руб": "ruble",
    "kr": "krone",
}  # fmt: skip
# Each differs from every other one, however they are combined.
KNOWN_UNITS = {*UNITS.values(), "day", "week", "month", "year", "cent", "degreec", "degreef"} - {"newton", "joule"}
KNOWN_UNITS |= set(MONEY_NAMES.values())
CURRENCIES = set(MONEY_NAMES.values()) - {"pound"}  # which is a weight, too
# What is counted, in words that say nothing of what it is: no other unit than any.
COUNTS = {
    "unit", "way", "arrangement", "possibilitie", "combination", "permutation", "solution", "piece", "item", "thing",
    "people", "person", "total", "number", "integer", "value",
}  # fmt: skip
COMPOUND = {"mph": {"mile": 1, "hour": -1}, "kph": {"kilometer": 1, "hour": -1}}
RAISED = {"squared": 2, "cubed": 3}
# Words that make another number of the one beside them: 5 below zero, 18 thousand, 5 years ago, 5 at most.
OTHER_NUMBERS = {
    "minus", "negative", "opposite", "inverse", "reciprocal", "plus", "times", "fold", "than", "least", "most",
    "minimum", "maximum", "below", "beneath", "under", "above", "over", "beyond", "between", "until", "ago", "short",
    "shy", "debt", "bc", "bce", "or", "if", "not", "no", "never", "cannot", "except", "wrong", "false", "incorrect",
    "impossible", "half", "halves", "third", "thirds", "quarter", "quarters", "fourths", "fifths", "sixths",
    "eighths", "tenths", "hundredths", "double", "twice", "triple", "thrice", "dozen", "dozens", "zero", "two",
    "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "hundred", "hundreds",
    "thousand", "thousands", "k", "million", "millions", "bn", "billion", "billions", "trillion", "lakh", "crore",
    "root", "sqrt", "pi", "squared", "cubed", "factorial", "power", "log", "ln", "exp", "sin", "cos", "tan", "cot",
    "less", "fewer", "deficit", "tens", "grand", "ppm", "lakhs", "crores",
    "csc", "max", "lim", "gcd", "lcm", "det", "mod", "modulo", "base", "divided", "multiplied", "infinity",
}  # fmt: skip
MAGNITUDES = "百千万亿萬億백천만억"  # at the beginning of what stands behind a number: 18万元
# What a phrase goes on with that is no unit: 2 or 3, 5 if x > 0.
NO_NOUN = {
    "and", "or", "if", "is", "are", "for", "where", "when", "base", "percent", "percentage", "pct", "e", "i", "d",
}  # fmt: skip
CURRENCY = (
    r"(?:US|[A-Z]{1,2})?\\?\$|[¢£¤¥֏؋৳฿៛\u20a0-\u20cf﷼]|\\(?:pounds|euro|yen|text(?:euro|sterling|dollar))(?![a-z])"
)
CODES = (
    "USD|EUR|GBP|JPY|CNY|RMB|INR|KRW|CHF|CAD|AUD|NZD|SEK|NOK|DKK|PLN|CZK|HUF|BRL|MXN|ZAR|TRY|RUB|NGN|VND|THB|PHP|IDR|"
    "MYR|SGD|HKD|TWD|ILS|AED|EGP|PKR|BDT"
)
PART = re.compile(rf"{CURRENCY}|[^\W\d_]+|/|-?\d")


def unit_name(text: str, power: str = "") -> str:
    """The names of a unit with their exponents, in one order: `hour-1 mile` of mph and of miles per hour."""
    exponents: dict[str, int] = {}
    sign, following, last = 1, 1, ""
    for part in PART.findall(text + power):
        name = part.lower().replace("\\", "")
        if name in ("/", "per"):
            sign = -1
        elif name in ("square", "sq", "cubic", "cu"):
            following = 2 if name.startswith("sq") else 3
        elif last and (name in RAISED or re.fullmatch(r"-?\d", name)):
            exponents[last] *= RAISED.get(name) or int(name)
        else:
            names = {**UNITS, **MONEY_NAMES}
            name = names.get(name) or names.get(name.removesuffix("s")) or _singular(name)
            for last, exponent in COMPOUND.get(name, {name: 1}).items():
                exponents[last] = exponents.get(last, 0) + sign * following * exponent
            following = 1
    return " ".join(name + (str(count) if count != 1 else "") for name, count in sorted(exponents.items()))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def is_unit(words: list[str]) -> bool:
    r"""Tell whether words behind a value may be its unit: `5 units squared`, but not `2 \text{ or}`, `18 thousand`."""
    first = words[0]
    if first in NO_NOUN or first in OTHER_NUMBERS or first[0] in MAGNITUDES:
        return False
    return OTHER_NUMBERS.isdisjoint(set(words) - {"squared", "cubed"})


def known(unit: str) -> bool:
    """Tell whether a unit is made of known ones, such as those of length and of money."""
    return _names(unit) <= KNOWN_UNITS


def other_unit(unit: str, other: str) -> bool:
    """Tell whether two units differ: cm and km, apples and pears; but not balls and red balls."""
    if "degree" in (unit, other) and unit.startswith("degree") and other.startswith("degree"):
        return False
    if not CURRENCIES.isdisjoint(set(unit.split()) & set(other.split())):  # dollars, and dollars per day
        return False
    if sorted(unit) == sorted(other):  # dogs and gods
        return unit != other
    names, others = _names(unit), _names(other)
    if names and others and names | others <= KNOWN_UNITS:
        return unit != other  # cm is not cm^2
    return bool(names and others) and names.isdisjoint(others) and COUNTS.isdisjoint(names | others)


def _names(unit: str) -> set[str]:
    """The names in a unit, without their exponents."""
    return {re.sub(r"-?\d$", "", name) for name in unit.split()}
