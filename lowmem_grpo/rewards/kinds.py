"""Answers with an equality of their own: dates, times of day, ratios, options, and letters whose case counts."""

import re
from fractions import Fraction

from lowmem_grpo.rewards.number import exact

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
DAY, YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{4})"
WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,? )?"
DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})([-/])(?P<month>\d\d)\2(?P<day>\d\d)",
        r"(?P<day>1[3-9]|2\d|3[01])/(?P<month>0?[1-9]|1[0-2])/(?P<year>\d{4})",
        r"(?P<month>0?[1-9]|1[0-2])/(?P<day>1[3-9]|2\d|3[01])/(?P<year>\d{4})",
        rf"{WEEKDAY}{MONTH} {DAY}(?:,? {YEAR})?",
        rf"{WEEKDAY}(?:the )?{DAY}(?: of)? {MONTH}(?:,? {YEAR})?",
    )
]
TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?(?: o'?clock)?(?: ?([ap])\.? ?m\b\.?)?", re.IGNORECASE)
TIMES_IN_WORDS = {"noon": "12 pm", "12 noon": "12 pm", "midday": "12 pm", "midnight": "12 am", "12 midnight": "12 am"}
CLOCK = re.compile(r"\d{1,2}:\d\d")
TERM = r"(?:0|[1-9]\d*)(?:\.\d+)?"  # of a ratio; in 10:03 the zero says that it is a time
RATIO = re.compile(rf"{TERM}(?:(?: ?: ?| to |-to-){TERM})+")
BETWEEN_TERMS = re.compile(r" ?: ?| to |-to-")
OPTION = re.compile(r"\(?([A-Z])[).:]{0,2}")
OPTION_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)[.:]?|([A-Z])(?:[).:]| -(?= [A-Za-z]{2}))) ?((?:(?![A-Z][).:] )[^=])+)")
BETWEEN_OPTIONS = re.compile(r" ?[,;&/] ?(?:and )?| and | |(?<=\))(?=\()")
ELEMENTS = [
    "H", "He", "Li", "Be", "B", "C", "N", "O", "F", "Ne", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ar", "K", "Ca",
    "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br", "Kr", "Rb", "Sr", "Y",
    "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe", "Cs", "Ba", "La", "Ce",
    "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu", "Hf", "Ta", "W", "Re", "Os", "Ir",
    "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm",
    "Bk", "Cf", "Es", "Fm", "Md", "No", "Lr", "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc",
    "Lv", "Ts", "Og",
]  # fmt: skip
MOLECULE = re.compile(rf"(?:(?:{'|'.join(sorted(ELEMENTS, key=len, reverse=True))}|[()\[\]])(?:_?\{{?\d+\}}?)?)+")
GENOTYPE = re.compile(r"(?:([A-Za-z])(?i:\1))+")  # Aa, AaBb


def same_of_a_kind(gold: str, answer: str) -> bool | None:
    """Tell whether two answers of one of these kinds are equal; None where they are not both of one."""
    for same in (_same_date, _same_time, _same_ratio, _same_options, _same_molecule):
        verdict = same(gold, answer)
        if verdict is not None:
            return verdict
    return None


def case_counts(gold: str, answer: str) -> bool:
    """Tell whether texts differ by the case of their letters, as CO and Co do, but not No and NO."""
    letters, others = (re.sub(r"[^\w]|_", "", side) for side in (gold, answer))
    if letters == others or letters.lower() in ("no", "in", "he", "as", "at", "be", "i"):
        return False
    if any(kind.fullmatch(gold) and kind.fullmatch(answer) for kind in (MOLECULE, GENOTYPE)):
        return True
    return any(
        MOLECULE.fullmatch(side) and not side.isupper() and not other.islower()
        for side, other in ((gold, answer), (answer, gold))
    )


def _same_molecule(gold: str, answer: str) -> bool | None:
    """Compare two formulas of chemistry, of which one may have no subscripts: H2O and H_2O."""
    if not all(re.search(r"[a-zA-Z)]_?\{?\d", side) and MOLECULE.fullmatch(side) for side in (gold, answer)):
        return None
    return len({re.sub(r"[_{}]|\^(?=[-+])", "", side) for side in (gold, answer)}) == 1


def _same_date(gold: str, answer: str) -> bool | None:
    """Compare two dates, without the year where gold has none; 3/4/2021 may be of March or April, and is none."""
    own, given = _as_date(gold), _as_date(answer)
    if own is None or given is None:
        return None
    return own[1:] == given[1:] and own[0] in (None, given[0])


def _as_date(text: str) -> tuple[int | None, int, int] | None:
    """Year, month and day."""
    found = next(filter(None, (pattern.fullmatch(text) for pattern in DATES)), None)
    if not found:
        return None
    month = found["month"].lower()
    number = int(month) if month.isdigit() else MONTHS.index(month[:3]) + 1
    return (int(found["year"]) if found["year"] else None), number, int(found["day"])


def _same_time(gold: str, answer: str) -> bool | None:
    """Compare two times of day of which one at least says am or pm; 7:00 may be 7 pm, and 19:00 is."""
    own, given = _as_time(gold), _as_time(answer)
    if own is None or given is None or not re.search("[a-z]", gold + answer, re.IGNORECASE):
        return None
    seconds, others = own[0] % 43200, given[0] % 43200
    halves = {own[1], given[1]} - {None}
    return seconds == others and len(halves) < 2


def _as_time(text: str) -> tuple[int, str | None] | None:
    """Seconds since midnight or noon, and whether it is am or pm, where that is said."""
    found = TIME.fullmatch(TIMES_IN_WORDS.get(text.lower(), text))
    if not found or not (found[2] or found[4] or "clock" in text.lower()):
        return None
    hour, minute, second = (int(part or 0) for part in found.groups()[:3])
    half = (found[4] or "").lower() or None
    if hour > 24 or minute > 59 or second > 59 or (half and not 1 <= hour <= 12):
        return None
    if half is None and (hour > 12 or text.startswith("0")):
        half = "p" if 12 <= hour < 24 else "a"
    return (hour % 12) * 3600 + minute * 60 + second, half


def _same_ratio(gold: str, answer: str) -> bool | None:
    """Compare two ratios, or one with a fraction; 5:1 is not 5. 12:30 and 2:05 are times."""
    if CLOCK.fullmatch(gold) and CLOCK.fullmatch(answer):
        return None
    if not (RATIO.fullmatch(gold) or RATIO.fullmatch(answer)):
        return None
    own, given = _as_ratio(gold), _as_ratio(answer)
    if own and given:
        return own == given
    return None if exact(gold) is None and exact(answer) is None else False


def _as_ratio(text: str) -> tuple[Fraction, ...] | None:
    """The terms of a ratio, in parts of its first one that is not zero."""
    if RATIO.fullmatch(text):
        terms = [Fraction(term) for term in BETWEEN_TERMS.split(text)]
    else:
        number = exact(text)
        if number is None or not ("/" in text or "frac" in text) or number.value <= 0:
            return None
        terms = list(number.value.as_integer_ratio())
    first = next(filter(None, terms), None)
    return None if first is None else tuple(Fraction(term) / first for term in terms)


def _same_options(gold: str, answer: str) -> bool | None:
    """Compare options: B and B. Paris; A, C and C and A. All of three or more may be a ranking, whose order counts."""
    own, given = _as_options(gold), _as_options(answer)
    if own is None or given is None:
        return None
    (letters, own_text, is_run), (others, text, other_is_run) = own, given
    if is_run and other_is_run:
        return None
    if own_text and text:
        return letters == others and own_text.casefold() == text.casefold()
    in_order = len(letters) > 2 and sorted(letters) == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)])
    return letters == others if in_order or is_run or other_is_run else sorted(letters) == sorted(others)


def _as_options(text: str) -> tuple[list[str], str, bool] | None:
    """Letters of options, the text of a single one, and whether the letters stand in a run: AC."""
    if re.fullmatch(r"[A-H]{2,}", text):
        return (list(text), "", True) if len(set(text)) == len(text) else None
    options = [OPTION.fullmatch(part) for part in BETWEEN_OPTIONS.split(re.sub("^[Bb]oth ", "", text))]
    letters = [option[1] for option in options if option]
    if len(letters) == len(options):
        return (letters, "", False) if len(set(letters)) == len(letters) else None
    found = OPTION_WITH_TEXT.fullmatch(text)
    return ([found[1] or found[2]], found[3], False) if found else None
