"""accuracy_reward: is the answer of a completion mathematically equal to the gold one?"""

import re

from lowmem_grpo.rewards.math_pool import as_number, math_equal
from lowmem_grpo.rewards.text import completion_text, tagged_answer
from lowmem_grpo.rewards.words import MOST_CHARACTERS, OTHER_NUMBERS, has_words, other_unit, reading

NUMBER = re.compile(r"(?:(?<![\d.)])[-\u2212])?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
IN_WORDS = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox) *\{([^{}]*)\}")  # of LaTeX, where prose may stand
EMPHASIS = "*_` "  # of Markdown
BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_])[-/](?=[^\W\d_])")  # dollars/day, twenty-one
PUNCTUATION = "\t\n!.,:;?'\"$\u20ac\u00a3%\u00b0~"
# Set apart from the sentence around it; in "$5 or $6" nothing is.
FORMULA = re.compile(r"\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$\$?([^\s$](?:[^$]*[^\s$\\])?)\$\$?", re.DOTALL)


def accuracy_reward(
    completions: list, solution: list | None = None, answer: list | None = None, log_extra=None, **kwargs
) -> list[float | None]:
    r"""1.0 where the completion's answer equals the gold one, 0.0 where not, None where there is no gold answer.

    The answer is the last `\boxed{}`, else the last answer tag, else what follows the last `####`, else the last
    number. Gold comes from the column `solution`, else `answer`, and is read the same way; a gold text with none of
    the four forms stands for itself. Plain numbers are compared exactly; anything else by math-verify, in worker
    processes with a time limit, past which an answer counts as wrong.

    A gold answer of words, an option's letter, a number in a base (204_5) or one that begins with zero (0110) is text,
    compared without case, style and needless spaces. A unit may be left out, but is no other one.

    Where the gold answer is a plain number, a marked answer of words and one number is that number (`18 dollars`), and
    a line of `####` without a number, or with words and a number of a later line's, is a heading and no mark.

    Raises:
        ValueError: the dataset has neither column.
    """
    gold_column = solution if solution is not None else answer
    if gold_column is None:
        raise ValueError("accuracy_reward needs the gold answers: a dataset column named solution or answer")
    golds = [gold_answer(gold) for gold in gold_column]
    given = [extract_answer(completion_text(c), gold) for c, gold in zip(completions, golds, strict=True)]
    if log_extra is not None:
        log_extra("extracted_answer", given)
    asked = [(gold, own) for gold, own in zip(golds, given, strict=True) if gold and own]
    verdicts = dict(zip(asked, math_equal(asked), strict=True))
    return [
        None if not gold else float(bool(own) and verdicts[gold, own]) for gold, own in zip(golds, given, strict=True)
    ]


def reasoning_accuracy_reward(
    completions: list,
    solution: list | None = None,
    answer: list | None = None,
    reasoning_delimiters: list[str] | None = None,
    log_extra=None,
    **kwargs,
) -> list[float | None]:
    """accuracy_reward of the text after the reasoning; 0.0 where the reasoning never ends.

    The reasoning ends at the last `</think>`, or at the last of the first of reasoning_delimiters that occurs.
    """
    answers = [_after_reasoning(completion_text(c), reasoning_delimiters or ["</think>"]) for c in completions]
    rewards = accuracy_reward([text or "" for text in answers], solution, answer, log_extra)
    return [0.0 if text is None else reward for text, reward in zip(answers, rewards, strict=True)]


def exact_match_reward(
    completions: list, solution: list | None = None, answer: list | None = None, **kwargs
) -> list[float | None]:
    r"""1.0 where the answer is the gold one, character for character but for white space; None without a gold one.

    The answer is the last `\boxed{}`, else the last answer tag, else what follows the last `####`, else the whole
    completion; gold comes from the column `solution`, else `answer`, and is read the same way.

    Raises:
        ValueError: the dataset has neither column.
    """
    gold_column = solution if solution is not None else answer
    if gold_column is None:
        raise ValueError("exact_match_reward needs the gold answers: a dataset column named solution or answer")
    rewards: list[float | None] = []
    for gold, completion in zip(map(gold_answer, gold_column), completions, strict=True):
        text = completion_text(completion)
        own = marked_answer(text)
        same = gold is not None and (text if own is None else own).split() == gold.split()
        rewards.append(None if gold is None else float(same))
    return rewards


def _after_reasoning(text: str, delimiters: list[str]) -> str | None:
    found = next((delimiter for delimiter in delimiters if delimiter in text), None)
    return None if found is None else text.rsplit(found, 1)[1]


def extract_answer(text: str, gold: str | None = None) -> str | None:
    r"""The final answer in a completion: `\boxed{}`, an answer tag, `####`, or the last number, in this order.

    See accuracy_reward for what the gold answer changes.
    """
    marked = marked_answer(text)
    wants_number = gold is not None and _is_number(gold)
    if marked is not None and _is_heading(text, marked) and (gold is None or wants_number):
        marked = None
    if marked is None:
        numbers = NUMBER.findall(text)
        return numbers[-1] if numbers else None
    if wants_number and len(marked) <= MOST_CHARACTERS and other_unit(reading(gold).unit, reading(marked).unit):
        return marked  # €5, where gold is $5
    return (only_number(marked) if wants_number else None) or _only_formula(marked, gold) or marked


def _is_number(text: str) -> bool:
    return len(text) <= MOST_CHARACTERS and as_number(text) is not None


def _is_heading(text: str, marked: str) -> bool:
    """Tell whether a mark is a Markdown heading's: it has no number, or words, and a number comes later."""
    if _last_boxed(text) is not None or tagged_answer(text) is not None or _is_number(marked.strip(EMPHASIS)):
        return False
    after = text.rsplit("####", 1)[1].lstrip()[len(marked) :]
    return not NUMBER.search(marked) or NUMBER.search(after) is not None


def only_number(text: str) -> str | None:
    """The number of a text that has no other, and otherwise words and punctuation: `x = 18`, `**18** apples.`"""
    if len(text) > MOST_CHARACTERS:
        return None
    left, equals, right = text.rpartition("=")
    if equals and not NUMBER.search(left):
        text = right
    text = IN_WORDS.sub(r" \1 ", text).replace("\\$", "$").replace("**", " ").replace("__", " ").replace("`", " ")
    found = list(NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if before[-1:].isalpha() or after[:1].isalpha() or after[:1] == "!":  # x18, 18x, 18!
        return None
    rest = BETWEEN_LETTERS.sub(" ", before + " " + after)
    words = rest.translate(dict.fromkeys(map(ord, PUNCTUATION), " ")).lower().split()
    plain = all(word.isalpha() and word not in OTHER_NUMBERS and (len(word) > 1 or word == "a") for word in words)
    return found[0].group() if plain else None


def _only_formula(text: str, gold: str | None) -> str | None:
    r"""The formula of a sentence with one in dollars, \(\) or \[\], where the gold answer is no sentence."""
    formulas = FORMULA.findall(text)
    if gold is None or len(formulas) != 1 or has_words(gold) or not has_words(text):
        return None
    return next(filter(None, formulas[0]))


def gold_answer(gold) -> str | None:
    """The gold answer in a dataset's column, where a text without any mark stands for itself."""
    if gold is None:
        return None
    marked = marked_answer(str(gold))
    return str(gold).strip() if marked is None else marked


def marked_answer(text: str) -> str | None:
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    if "####" in text:
        line = text.rsplit("####", 1)[1].strip()
        return line.splitlines()[0].strip() if line else ""
    return None


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, whose braces may be nested; None without one that closes."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : position].strip()
    return None
