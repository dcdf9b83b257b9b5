"""Words beside a number that make another one of it: 5 below zero, 18 thousand, 5 years ago, a loss of 5."""

import re

OTHER_NUMBERS = {
    "minus", "negative", "opposite", "inverse", "reciprocal", "plus", "times", "fold", "than", "least", "most",
    "minimum", "maximum", "below", "beneath", "under", "above", "over", "beyond", "between", "until", "ago", "short",
    "shy", "debt", "bc", "bce", "or", "if", "not", "no", "never", "cannot", "except", "wrong", "false", "incorrect",
    "impossible", "error", "exception", "undefined", "nan", "failed", "failure", "invalid", "warning", "unknown",
    "traceback", "timeout", "crash", "half", "halves", "third", "thirds", "quarter", "quarters", "fourths", "fifths",
    "sixths", "sevenths", "eighths", "ninths", "tenths", "hundredths", "thousandths", "millionths", "billionths",
    "double", "twice", "triple", "thrice", "quadruple", "dozen", "dozens", "doz", "zero", "two", "three", "four",
    "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "hundred", "hundreds", "thousand", "thousands",
    "k", "million", "millions", "mn", "bn", "billion", "billions", "tn", "trillion", "trillions", "quadrillion",
    "quintillion", "sextillion", "lakh", "lakhs", "lac", "crore", "crores", "myriad", "tens", "grand", "ppm", "ppb",
    "bps", "permille", "promille", "mille", "root", "sqrt", "pi", "squared", "cubed", "factorial", "power", "log", "ln",
    "exp", "sin", "cos", "tan", "cot", "csc", "max", "lim", "gcd", "lcm", "det", "mod", "modulo", "base", "divided",
    "multiplied", "infinity", "less", "fewer", "deficit", "myriads", "elevenths", "twelfths", "sixteenths",
    "twentieths", "gazillion", "octillion", "nonillion", "decillion",
    # Of other languages: so many thousands, millions and dozens, and more or less than.
    "mil", "mio", "mrd", "millón", "millon", "millones", "milliard", "milliards", "milhão", "milhões", "milione",
    "milioni", "miliardi", "millionen", "milliarde", "milliarden", "tausend", "tysiąc", "tysiące", "tysięcy",
    "milion", "miliony", "milionów", "milyon", "milyar", "duizend", "miljoen", "miljard", "tusen", "miljon",
    "miljoner", "juta", "ribu", "miliar", "triệu", "nghìn", "ngàn", "tỷ", "тысяча", "тысячи", "тысяч", "тыс",
    "миллион", "миллиона", "миллионов", "млн", "млрд", "миллиард", "миллиарда", "миллиардов", "тисяч", "мільйонів",
    "ألف", "آلاف", "مليون", "ملايين", "مليار", "हज़ार", "हजार", "लाख", "करोड़", "दर्जन", "พัน", "หมื่น", "แสน",
    "ล้าน", "docena", "docenas", "douzaine", "douzaines", "dutzend", "dozzine", "dúzias", "дюжин", "дюжины", "menos",
    "weniger", "mehr", "más", "mais", "moins", "meno", "più", "минус", "меньше", "больше", "более", "менее", "oder",
    "ou", "или", "nicht", "pas", "не",
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
MAGNITUDES = "百千万亿萬億백천만억"  # at the beginning of what stands behind a number: 18万元
# In what stands behind a number, of scripts that put no spaces between words: or more, or less, not.
COMPARED = re.compile("以上|以下|以内|以外|未満|未满|超|以前|以后|以後|이상|이하|미만|초과|少|減|减|分の|분의")
# What a phrase goes on with that is no unit: 2 or 3, 5 if x > 0.
NO_NOUN = {
    "and", "or", "if", "is", "are", "for", "where", "when", "base", "percent", "percentage", "pct", "e", "i", "d",
}  # fmt: skip
