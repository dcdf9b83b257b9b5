"""Words beside a number that make another one of it: 5 below zero, 18 thousand, 5 years ago, a loss of 5."""

import re
import unicodedata
from math import prod

# Words that multiply the number before them: 5 million, 18万, 2 dozen. A billion is short, a Billion of German is none.
MAGNITUDES = {
    name: size
    for size, names in {
        12: "dozen dozens doz docena docenas douzaine douzaines dutzend dozzine dúzias дюжин дюжины दर्जन",
        10**2: "hundred hundreds 百 백",
        10**3: "thousand thousands mil mille tausend duizend tusen tysiąc tysiące tysięcy ribu nghìn ngàn тысяча "
        "тысячи тысяч тыс тисяч ألف آلاف हज़ार हजार พัน 千 천",
        10**4: "หมื่น 万 萬 만",
        10**5: "lakh lakhs lac लाख แสน",
        10**6: "million millions mn mio millón millon millones milhão milhões milione milioni millionen milion miliony "
        "milionów milyon miljoen miljon miljoner juta triệu миллион миллиона миллионов млн мільйонів مليون ملايين ล้าน",
        10**7: "crore crores करोड़",
        10**8: "亿 億 억",
        10**9: "billion billions bn mrd milliard milliards miliardi milliarde milliarden milyar miljard miliar tỷ млрд "
        "миллиард миллиарда миллиардов مليار",
        10**12: "trillion trillions tn billionen",
    }.items()
    for name in unicodedata.normalize("NFC", names).split()
}
SPACELESS = tuple(name for name in MAGNITUDES if name[0] >= "\u0e00")  # of Thai and East Asia: 18万元
WITH_SPACES = "|".join(sorted(set(MAGNITUDES) - set(SPACELESS), key=len, reverse=True))
# 5million, but 3mn is a product.
MAGNITUDE = rf"(?:(?:{'|'.join(SPACELESS)})+|(?:(?<!\d)|(?=\w{{4}}))(?:{WITH_SPACES})(?![^\W\d_]))"


def magnitude(names: str) -> int:
    """The size of a word such as million, or of several that stand in a row: 10^6 for 百万."""
    names = names.lower()
    return MAGNITUDES.get(names) or prod(MAGNITUDES[name] for name in re.findall("|".join(SPACELESS), names))


OTHER_NUMBERS = {
    *MAGNITUDES,
    "minus", "negative", "opposite", "inverse", "reciprocal", "plus", "times", "fold", "than", "least", "most",
    "minimum", "maximum", "below", "beneath", "under", "above", "over", "beyond", "between", "until", "ago", "short",
    "shy", "debt", "bc", "bce", "or", "if", "not", "no", "never", "cannot", "except", "wrong", "false", "incorrect",
    "impossible", "error", "exception", "undefined", "nan", "failed", "failure", "invalid", "warning", "unknown",
    "traceback", "timeout", "crash", "half", "halves", "third", "thirds", "quarter", "quarters", "fourths", "fifths",
    "sixths", "sevenths", "eighths", "ninths", "tenths", "hundredths", "thousandths", "millionths", "billionths",
    "double", "twice", "triple", "thrice", "quadruple", "zero", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "eleven", "twelve", "k", "quadrillion", "quintillion", "sextillion", "myriad", "tens",
    "grand", "ppm", "ppb", "bps", "permille", "promille", "root", "sqrt", "pi", "squared", "cubed", "factorial",
    "power", "log", "ln", "exp", "sin", "cos", "tan", "cot", "csc", "max", "lim", "gcd", "lcm", "det", "mod", "modulo",
    "base", "divided", "multiplied", "infinity", "less", "fewer", "deficit", "myriads", "elevenths", "twelfths",
    "sixteenths", "twentieths", "gazillion", "octillion", "nonillion", "decillion",
    # Of other languages: more or less than, or, not.
    "menos", "weniger", "mehr", "más", "mais", "moins", "meno", "più", "минус", "меньше", "больше", "более", "менее",
    "oder", "ou", "или", "nicht", "pas", "не",
}  # fmt: skip
# The same behind a number alone: 5 score is 100, and "the score is 5" is 5. A fall is negative, a rise is not.
OTHER_BEHIND = OTHER_NUMBERS | {
    "score", "scores", "pair", "pairs", "couple", "couples", "gross", "trio", "trios", "brace", "quartet", "quartets",
    "fortnight", "basis", "loss", "losses", "lower", "down", "decrease", "decreased", "decline", "declined", "drop",
    "dropped", "reduction", "reduced", "fall", "fell", "smaller", "shorter", "cheaper", "slower", "worse", "behind",
    "before", "earlier", "early", "prior", "previous", "owed", "overdrawn", "downward", "downwards", "st", "nd", "rd",
    "th",
}  # fmt: skip
# Names of which a number is no value but a place: Step: 3.
PLACES = {
    "step", "part", "case", "question", "problem", "exercise", "task", "page", "chapter", "section", "line", "figure",
    "table", "equation", "theorem", "lemma", "example", "note", "hint", "attempt", "version", "exit", "code", "status",
    "row", "column", "index", "id", "port", "seed", "option", "choice", "item",
}  # fmt: skip
# In what stands behind a number, of scripts that put no spaces between words: or more, or less, not.
COMPARED = re.compile("以上|以下|以内|以外|未満|未满|超|以前|以后|以後|이상|이하|미만|초과|少|減|减|分の|분의")
# What a phrase goes on with that is no unit: 2 or 3, 5 if x > 0.
NO_NOUN = {
    "and", "or", "if", "is", "are", "for", "where", "when", "base", "percent", "percentage", "pct", "e", "i", "d",
}  # fmt: skip
