"""extract_answer() and gold_answer(): which part of a text is its final answer."""

import math
import re

from lowmem_grpo.data.text import tagged_answer
from lowmem_grpo.rewards.compare import compare
from lowmem_grpo.rewards.notation import ROUGHLY_EQUAL
from lowmem_grpo.rewards.number import MOST_CHARACTERS, as_number, is_number
from lowmem_grpo.rewards.number_words import COMPARED, MAGNITUDE, OTHER_BEHIND, OTHER_NUMBERS, PLACES
from lowmem_grpo.rewards.units import CURRENCY, NATIONAL, conversion, is_known, unit_name
from lowmem_grpo.rewards.words import ANSWER_IS, has_words, reading

# 1,234.5 or 1 234.5, 12,34,567, 2,74, 3 1/2, 1.5e3 and -.5; not the 2 of AZYUK2A or of x_2, and not the - of 3-4.
NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?<![A-Za-z0-9]_)(?:(?<![0-9.)])[-\u2212])?\$?"
    r"(?:\d+ \d+(?=/\d)|\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)"
    r"|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)|\d+,\d\d(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+(?!\w))?(?:/\d+)?"
    r"|-?(?<![\w.])\.\d+"
)
IN_WORDS = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox) *\{([^{}]*)\}")  # of LaTeX, where prose may stand
EMPHASIS = "*_` "  # of Markdown
# What a number may be the value of: x, x_1, f(3), AB, \\theta, or words; not xy, -x, |x|, 2x and \\sqrt{x}.
NAME = re.compile(
    r"(?:(?:[^\W\d_]{2,}[,.:]?\s+)*(?:[^\W\d_\u00b2\u00b3]+|\\(?:alpha|beta|gamma|delta|theta|phi|lambda|mu|pi|sigma|omega))"
    r"(?:_(?:\w|\{\w+\}))?(?:\([^()]*\))?)?"
)
PRODUCT = re.compile(r"(?<![^\W_])(?![a-z]*[aeiou])[a-z]{2,3}\Z")  # xy
BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_])[-/](?=[^\W\d_])")  # dollars/day, twenty-one
PUNCTUATION = str.maketrans(dict.fromkeys("\t\n!.,:;?'\"$\u20ac\u00a3%\u00b0~", " "))
# Between these and a number nothing makes another one of it: the answer is exactly 18; but less than 18, double 18.
SAYS = {
    "is", "are", "was", "were", "be", "equals", "equal", "gives", "get", "gets", "got", "has", "have", "had", "needs",
    "cost", "costs", "pays", "earns", "earned", "makes", "made", "answer", "result", "value", "number", "total", "so",
    "thus", "therefore", "hence", "then",
}  # fmt: skip
FILLERS = {"a", "the", "exactly", "only", "just", "about", "approximately", "roughly", "around", "total"}

# Set apart from the sentence around it, on one line but for \[\] and $$; with the percent sign behind it. In \(\) and
# \[\] is no other opening, so that those which nothing closes are passed by in linear time.
FORMULA = re.compile(
    r"(?:(?<!\\)\$\$(?P<display>.+?)(?<!\\)\$\$"
    r"|(?<!\\)\\\[(?P<bracketed>(?:(?!(?<!\\)\\\[).)+?)(?<!\\)\\\]"
    r"|(?<!\\)\\\((?P<inline>(?:(?!(?<!\\)\\\()[^\n])+?)(?<!\\)\\\)|(?<![\\\d])\$(?P<dollars>(?:\\.|[^$\\\n])+)\$(?!\d))"
    r"(?P<percent> *\\?%| *(?:percent|pct)\b)?",
    re.DOTALL,
)
OPENS_A_FORMULA = re.compile(r"(?<!\\)\\[(\[]|\$ *\n\s*\Z")
PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
AND = re.compile(r"\s*(?:,|;|,?\s*(?:and|or)\b)\s*")
# \boxed{1} papers and \boxed{2} bins: what may stand between two boxes of one answer.
BETWEEN_BOXES = re.compile(
    r"(?:[^\s.]+ ){0,4}(?:and|or)(?: (?!so$|then$|thus$|hence$)[^\W\d]+(?:_\d)?)?(?: =)?|,? *(?:[a-zA-Z](?:_\d)? =)?"
)
BOX, BRACE = r"\boxed{", re.compile(r"[{}]")
SPACING = re.compile(r"\\text\w* *\{|\\q?quad(?![a-z])|\\[()\[\],;: ]|[${}&;\s]+")
FINAL_ANSWER = "inal answer is"
FINALLY = re.compile(rf"{FINAL_ANSWER}:?\s*\"?")
# The answer is (B). **Answer:** yes. So I choose B. Option B is correct. 答案是B。
SAID = re.compile(
    r"(?:\b(?:answers?|options?|choices?|solutions?|I (?:choose|pick|select|go with))\b[*_]*"
    r"(?:(?: is| are| must be| should be|:)(?!\w)|(?= \(?(?-i:[A-Z])\b))"
    r"|\b(?:antwort|lösung)(?: ist|:)|\b(?:réponse|respuesta|risposta|resposta)(?: es?t?| è| é| ?:)(?!\w)"
    r"|答案(?:是|为|：|:))"
    r"[*_:： ]*",
    re.IGNORECASE,
)
ENDS_A_SAYING = re.compile(
    r"(?<!\b[A-Z])[.!](?:\s|$)|[;。\n]|,? (?:because|since|as|so|which|but|not)\b|,? (?:is|are) (?:correct|right)\b"
    r"|(?:(?<=^[Yy]es)|(?<=^[Nn]o)), (?:it|they|s?he|we|you|I|this|that|there)\b| \((?![A-Z]\))"
)
BEGINS_A_SAYING = re.compile(r"^(?:(?:so|thus|therefore|hence),? )?(?:it(?: is|['\u2019]s) )?", re.IGNORECASE)
IN_FULL = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty",
    "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million", "billion",
}  # fmt: skip
# Beside the last number of a sentence, what makes it another one: less than 5, half of 5; 5 below zero.
CHANGED_BEFORE = re.compile(
    r"(?:\b(?:than|least|most|minus|negative|not(?: be| equal to)?|\w+n't(?: be)?|cannot be|never|except|under|below"
    r"|above|double|twice|triple|half|all but|up to|log|ln|between \S+ and"
    r"|m[aá]i?s (?:de|que|do que)|menos (?:de|que)|(?:plus|moins) de|als|больше|меньше|более|менее|не|nicht"
    r"|(?:half|double|square|cube|root|factorial|multiple|inverse|opposite|negative) of(?: the)?)\s+"
    r"|\d,? (?:or|to|through) |(?:不是|超过|超過|至少|至多|[大小多少]于|不到|不足) ?)\Z",
    re.IGNORECASE,
)
CHANGED_BEHIND = re.compile(
    r"\s*(?:squared|cubed|factorial|(?:[^\W\d]+ )?below zero|or (?:more|less)|at (?:most|least)"
    r"|and (?:a|one) (?:half|third|quarter))\b|(?:st|nd|rd|th)\b",
    re.IGNORECASE,
)
MAGNIFIED = re.compile(rf" ?(?=[^\W\d_]){MAGNITUDE}", re.IGNORECASE)
SIGN_APART = re.compile(r"(?:\b(?:is|equals|to)|[=:]) *[-\u2212\u2013] *\Z| \u2013\Z")  # of a number: x = - 18, is –18
MONEY_BEFORE = re.compile(rf"(?:{CURRENCY}) ?\Z")
UNIT = re.compile(
    r" ?((?:(?:square|cubic|sq\.?|cu\.?) )?[^\W\d_\u00b2\u00b3]+|\u00b0[CF]?|\u00a2)"
    r"(?:/[^\W\d_]+)?(?:\^\d|[\u00b2\u00b3])?(?!\w)"
)
OF_A_UNIT = re.compile(r"\d ([^\W\d_]+(?:/[^\W\d_]+)?)\^\Z")  # an exponent: 5 cm^2
EXPONENTS = str.maketrans("²³", "23")
NO_UNITS = {"in", "us", "am", "at", "as"}  # in a sentence
LONGEST_FORMULA = 200  # characters without a delimiter
NEAR = 40  # characters before a number in which a word or sign may change it
PERCENT = re.compile(r" *\\?%| *(?:percent|pct)\b")
TAG, SUM = re.compile(r"</?\w+>"), re.compile(r"<<[^<>]*>>")  # of HTML, and GSM8K's: $<<9*2=18>>18
# The formula without any delimiter that a number belongs to: 2\sqrt{3}, x > 5, 1.5 x 10^3, 3½.
BARE = re.compile(r"(?:\S+ (?:[-+*/=<>≤≥≠x×÷·]|[!<>]=|\\[a-zA-Z]+) )*(?:\d+ (?=\\[dt]?frac))?\S+$")
SIGN_OF_A_FORMULA = re.compile(r"\\(?![$%])|[\^{}<>≤≥≠√∛∜¼-¾⅐-⅞]|\d[⁰¹²³⁴-⁹⁺⁻]|!=|\.\d*\(\d")

# A number that these touch is a part: 5 / 6, 2x + 3, 2**10, 3:45, 2024-01-05; 25π, 5x, 12_8.
PART_BEFORE = re.compile(
    r"(?:[\d)]|(?<![^\W\d_])[a-z])(?: ?[/÷×+] ?| \* |:|\*\*?)\Z|\d-\d{1,2}-\Z|\d,\Z|\d(?: ?[-–−] ?|\.)\Z"
    r"|[-\u2212a-z]\(\Z"
)
PART_BEHIND = re.compile(r"[πθ]|[ixyz](?![^\W\d_])|_\d| ?÷ ?\d| ?pi\b| ?[<>≤≥≠]=? ?\w")
HALF_OF_A_DAY = re.compile(r" ?[ap]\.?m\b", re.IGNORECASE)  # 7:30 AM
POINT_BEFORE, POINT_BEHIND = re.compile(r"[(\[](?:[^\s,()\[\]]*\d[^\s,()\[\]]*, *)+\Z"), re.compile(r" *[)\]]")


def extract_answer(text: str, gold: str | None = None) -> str | None:
    r"""The final answer in a completion: `\boxed{}`, an answer tag, `####`, or the last number, in this order.

    Where gold is no number, what the last `the answer is` says counts before the last number: B of `Answer: (B)`.
    See accuracy_reward for what the gold answer changes.
    """
    marked = marked_answer(text)
    wants_number = gold is not None and is_number(gold)
    if marked is not None and _is_heading(text, marked) and (gold is None or wants_number):
        marked = None
    if marked is None:
        marked = _unmarked_answer(text, gold) if wants_number or gold is None else _words_or_formula(text, gold)
        if marked is None or gold is None or is_number(marked):
            return marked
    if wants_number and is_number(marked):
        return marked
    is_short = len(marked) <= MOST_CHARACTERS
    if wants_number and is_short and _has_another_unit(marked, str(gold)):
        return marked
    return (only_number(marked) if wants_number else None) or (gold and _only_formula(marked, gold)) or marked


def _has_another_unit(answer: str, gold: str) -> bool:
    """Tell whether an answer is of another unit than dollars or percent, which a gold number may be of: €5, 50 cm."""
    if "%" in gold:
        return bool(reading(answer).unit) and not PERCENT.search(answer)
    return "$" in gold and conversion("dollar", reading(answer).unit) != 1


def gold_answer(gold) -> str | None:
    """The gold answer in a dataset's column, where a text without any mark stands for itself."""
    if gold is None or (isinstance(gold, float) and math.isnan(gold)):
        return None
    if isinstance(gold, float):
        return f"{gold:.15g}"  # as many digits as it is sure to have: 0.3 for 0.1 + 0.2
    marked = marked_answer(str(gold))
    return str(gold).strip() if marked is None else marked


def is_spelled_out(gold: str) -> bool:
    """Tell whether a gold answer is a number in words, such as `forty two`."""
    words = re.findall(r"\w+", ANSWER_IS.sub("", gold).lower())
    return not IN_FULL.isdisjoint(words) and IN_FULL.issuperset(set(words) - {"a", "and", "minus", "negative", "point"})


def marked_answer(text: str) -> str | None:
    """The content of the last boxes, else of the last answer tag, else behind the last `####`; None without any.

    A later sentence that says what the final answer is counts before the boxes.
    """
    boxed, end = _boxed(text)
    said = FINALLY.match(text, text.rfind(FINAL_ANSWER, end)) if FINAL_ANSWER in text else None
    groups = _formula_groups(text, said.end()) if said else []
    if said and groups and groups[0][0].start() == said.end():
        return _joined(groups[0])
    if boxed is not None:
        return boxed
    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    if "####" in text:
        line = text.rsplit("####", 1)[1].strip()
        return line.splitlines()[0].strip() if line else ""
    return None


def only_number(text: str) -> str | None:
    """The number of a text that has no other, and otherwise words and punctuation: `x = 18`, `**18** apples.`"""
    if len(text) > MOST_CHARACTERS or ROUGHLY_EQUAL.search(text):
        return None
    text = IN_WORDS.sub(r" \1 ", text).replace("\\$", "$").replace("**", " ").replace("__", " ").replace("`", " ")
    sign = max(text.rfind("="), text.rfind(": "))
    named = text[: max(sign, 0)]
    is_name = all(map(_is_name, named.split("="))) if text[sign : sign + 1] == "=" else not NUMBER.search(named)
    words = set(re.findall(r"[^\W\d_]+", named.lower()))
    if is_name and OTHER_NUMBERS.isdisjoint(words) and not (words and words <= PLACES):
        text = text[sign + 1 :]  # the value of a name: Price: 18
    found = list(NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if (
        before[-1:].isalpha() or before.endswith(("!", "..")) or after[:1].isalpha() or after.startswith(("!", ".."))
    ):  # x18, 18x, 18!
        return None
    before, after = (_plain_words(part) for part in (before, after))
    if before is None or after is None or (before and before[-1] not in SAYS) or not OTHER_BEHIND.isdisjoint(after):
        return None
    return found[0].group() + "%" * bool(PERCENT.match(text, found[0].end()))


def _is_name(text: str) -> bool:
    """Tell whether the left side of an equation is one name, or words: not of -x = 3, nor of x >= 3."""
    text = BETWEEN_LETTERS.sub(" ", text.replace("$", " ")).strip()
    return NAME.fullmatch(text) is not None and PRODUCT.search(text) is None


def _plain_words(text: str) -> list[str] | None:
    """The words beside a number, without fillers at their end; None where they make another number of it."""
    words = BETWEEN_LETTERS.sub(" ", text).replace("left over", "left").translate(PUNCTUATION).lower().split()
    if any(map(COMPARED.search, words)):
        return None
    if not all(word.isalpha() and word not in OTHER_NUMBERS and (len(word) > 1 or word == "a") for word in words):
        return None
    while words and words[-1] in FILLERS:
        words.pop()
    return words


def _is_heading(text: str, marked: str) -> bool:
    """Tell whether a mark is a Markdown heading's: it has no number, or words, and a number comes later."""
    if _boxed(text)[0] is not None or tagged_answer(text) is not None or is_number(marked.strip(EMPHASIS)):
        return False
    after = text.rsplit("####", 1)[-1].lstrip()[len(marked) :]
    return not NUMBER.search(marked) or NUMBER.search(after) is not None


def _only_formula(text: str, gold: str) -> str | None:
    r"""The formula of a sentence with one in dollars, \(\) or \[\], where the gold answer is no sentence."""
    groups = _formula_groups(text, 0)
    return None if len(groups) != 1 or has_words(gold) or not has_words(text) else _joined(groups[0])


def _unmarked_answer(text: str, gold: str | None) -> str | None:
    r"""The last formula, where it holds the last number: 1/2 of `it is $\frac{1}{2}$`; else the last number.

    Where gold is no number, a formula behind the last number counts, too, and the number keeps its unit. In a formula
    that does not end, as where a completion was cut off, nothing is an answer.
    """
    if BOX in text and _boxed(text)[0] is None:
        return None  # cut off in its box
    wants_number = gold is None or is_number(gold)
    text = SUM.sub("", TAG.sub(" ", text))
    groups, numbers = _formula_groups(text, 0), list(NUMBER.finditer(text))
    formulas = groups[-1] if groups else []
    formulas_end = formulas[-1].end() if formulas else 0
    if not numbers:
        return _joined(formulas) if formulas else None
    last = numbers[-1]
    near = max(last.start() - NEAR, 0)
    of_unit = OF_A_UNIT.search(text, near, last.start()) if text[last.start() - 1 : last.start()] == "^" else None
    if of_unit and len(numbers) > 1 and is_known(unit_name(of_unit[1])):
        last = numbers[-2]
    if formulas and last.end() <= formulas_end and (last.start() >= formulas[0].start() or not wants_number):
        return _joined(formulas)
    earliest = max(last.start() - LONGEST_FORMULA, 0)
    if OPENS_A_FORMULA.search(text, max(formulas_end, earliest), last.start()):
        return None
    line = text[max(text.rfind("\n", 0, last.start()) + 1, earliest) : last.end()]
    rest = text[last.end() : last.end() + LONGEST_FORMULA]
    found = BARE.search(line + (rest.split(maxsplit=1)[0] if rest[:1].strip() else ""))
    bare = found[0].strip("*\"'`.,;:!?") if found else ""
    point, behind = POINT_BEFORE.search(text, earliest, last.start()), POINT_BEHIND.match(text, last.end())
    if point and behind:
        return text[point.start() : behind.end()]
    part_behind = PART_BEHIND.match(text, last.end())
    if part_behind and bare.endswith(last[0]):
        bare += part_behind[0]
    is_part = PART_BEFORE.search(text, near, last.start()) or part_behind
    half = HALF_OF_A_DAY.match(text, last.end()) if ":" in bare else None
    if half and bare.endswith(last[0]):
        return bare + half[0]
    if (is_part or SIGN_OF_A_FORMULA.search(bare)) and bare.count("{") == bare.count("}"):
        return bare
    if last[0].lstrip("$")[:1].isdigit() and SIGN_APART.search(text, near, last.start()):
        return "-" + last[0]
    before, after = CHANGED_BEFORE.search(text, near, last.start()), CHANGED_BEHIND.match(text, last.end())
    if before or after:
        return text[before.start() if before else last.start() : after.end() if after else last.end()]
    if PERCENT.match(text, last.end()):
        return last[0] + "%"
    magnitude = MAGNIFIED.match(text, last.end())
    if magnitude and gold is not None and as_number(gold) != as_number(last[0]):  # GSM8K asks for millions
        return last[0] + magnitude[0]
    asks_for_unit = gold is not None and (not wants_number or "%" in gold or "$" in gold)
    money = MONEY_BEFORE.search(text, near, last.start()) if asks_for_unit else None
    if money:
        return money[0] + last[0]
    national = NATIONAL.match(text, last.end() + 1) if asks_for_unit else None
    if national:
        return f"{last[0]} {national[0]}"
    unit = UNIT.match(text, last.end()) if asks_for_unit else None
    known = unit and unit[1] not in NO_UNITS and is_known(unit_name(unit[0].translate(EXPONENTS)))
    return last[0] + (unit[0] if unit and known else "")


def _words_or_formula(text: str, gold: str) -> str | None:
    """The words of the last `the answer is`, where gold is words or none are said; else the last formula or number."""
    said, last = _said_answer(text), _unmarked_answer(text, gold)
    if not said or BOX in text or len(gold) > MOST_CHARACTERS or is_spelled_out(gold):
        return last
    if SAID.search(text) is None and compare(gold, text.strip()) is True:
        return text.strip()  # May 5, 2020, of which the last number is the year
    if reading(gold).value is None:
        return said if last is None or SAID.search(text) else last
    return said if (last is None or last in said) and not has_words(said) else last


def _said_answer(text: str) -> str:
    """The words behind the last `the answer is`, or all of a text of one short line."""
    marks = list(SAID.finditer(text))
    if not marks and (len(text) > LONGEST_FORMULA or "\n" in text.strip()):
        return ""
    said = text[marks[-1].end() :].lstrip()[:LONGEST_FORMULA] if marks else BEGINS_A_SAYING.sub("", text.strip())
    end = ENDS_A_SAYING.search(said, 1) if said else None
    return said[: end.start() if end else None].strip(EMPHASIS)


def _formula_groups(text: str, start: int) -> list[list[re.Match]]:
    """Formulas in a text from a position on, in groups of those that only `and`, `or` or a comma separates."""
    groups: list[list[re.Match]] = []
    while formula := FORMULA.search(text, start):
        if _is_prose(formula["dollars"] or ""):
            start = formula.start() + 1
            continue
        if groups and AND.fullmatch(text, groups[-1][-1].end(), formula.start()):
            groups[-1].append(formula)
        else:
            groups.append([formula])
        start = formula.end()
    return groups


def _is_prose(between_dollars: str) -> bool:
    """Tell whether two dollar signs are two sums of money: `$5 and $6`, and no formula: `$12 $ and $13 $`."""
    return between_dollars[-1:].isspace() and PROSE.search(between_dollars) is not None


def _joined(formulas: list[re.Match]) -> str:
    texts = []
    for found in formulas:
        formula = next(filter(None, found.group("display", "bracketed", "inline", "dollars"))).strip()
        texts.append(formula + r"\%" * bool(found["percent"]))
    return ", ".join(texts)


def _boxed(text: str) -> tuple[str | None, int]:
    r"""The last `\boxed{...}` and where it ends; several that one sentence lists, as a list. None without any."""
    if BOX not in text:
        return None, 0
    closing, open_braces = {}, []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            closing[open_braces.pop()] = brace.start()
    boxes = [
        (text[box.end() : closing[box.end() - 1]].strip(), box.start(), closing[box.end() - 1] + 1)
        for box in re.finditer(re.escape(BOX), text)
        if box.end() - 1 in closing
    ]
    if not boxes:
        return None, 0
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[2] : listed[0][1]]
        words = " ".join(SPACING.sub(" ", between).split())
        if box[2] > listed[0][1] or ("\n" in between and not words) or not BETWEEN_BOXES.fullmatch(words):
            break
        listed.insert(0, box)
    return ", ".join(dict.fromkeys(box[0] for box in listed)), boxes[-1][2]
