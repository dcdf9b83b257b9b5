"""accuracy_reward: is the answer of a completion mathematically equal to the gold one?

final_answer.py finds the answers, math_pool.py compares them; docs/rewards.md draws who calls whom.
"""

from lowmem_grpo.data.gold import gold_column
from lowmem_grpo.data.text import completion_text
from lowmem_grpo.rewards.final_answer import extract_answer, gold_answer, is_spelled_out, marked_answer
from lowmem_grpo.rewards.math_pool import math_equal
from lowmem_grpo.rewards.words import has_words


def accuracy_reward(
    completions: list, solution: list | None = None, answer: list | None = None, log_extra=None, **kwargs
) -> list[float | EOFError | None]:
    r"""1.0 where the completion's answer equals the gold one, 0.0 where not, None where there is no gold answer.

    The answer is the last `\boxed{}` (or boxes that one sentence lists), else the last answer tag, else what follows
    the last `####`. Without any of them it is the last number, or the formula that holds it: `it is $\frac{1}{2}$`;
    where gold is words or an option, what the last `the answer is` says, or all of a completion of one short line.
    Gold comes from the column `solution` or `answer`, whichever is the better of a row (see data/gold.py), and is read
    for the three marks; a gold text without them stands for itself. Numbers are compared exactly, formulas by
    math-verify, in worker processes with a limit of CPU time, past which an answer counts as wrong. Where the worker
    died, and another one too, there is an EOFError in the completion's place.

    A gold answer of words, an option's letter, a number in a base (204_5) or one that begins with zero (0110) is text,
    compared without style and needless spaces, and without case but where it is the meaning (CO, Co). A unit may be
    left out, but is no other one; so much of another one is the same (2h 30m, 150 minutes). Dates, times of day, ratios
    and options have their rules in kinds.py. A gold number in words (forty two) is not compared with digits: None.

    Where the gold answer is a plain number, a marked answer of words and one number is that number (`18 dollars`), and
    a line of `####` without a number, or with words and a number of a later line's, is a heading and no mark.

    Raises:
        ValueError: the dataset has neither column.
    """
    golds_given = gold_column({**kwargs, "solution": solution, "answer": answer})
    if golds_given is None:
        raise ValueError("accuracy_reward needs the gold answers: a dataset column named solution or answer")
    golds = [gold_answer(gold) for gold in golds_given]
    given = [extract_answer(completion_text(c), gold) for c, gold in zip(completions, golds, strict=True)]
    if log_extra is not None:
        log_extra("extracted_answer", given)
    asked = [(gold, own) for gold, own in zip(golds, given, strict=True) if gold and own]
    rewards: dict[tuple, float | EOFError] = {
        pair: verdict if isinstance(verdict, EOFError) else float(verdict)
        for pair, verdict in zip(asked, math_equal(asked), strict=True)
    }
    return [
        rewards.get((gold, own), 0.0) if _can_be_judged(gold, own) else None
        for gold, own in zip(golds, given, strict=True)
    ]


def _can_be_judged(gold: str | None, answer: str | None) -> bool:
    """Tell whether there is a gold answer, and one that can be compared: `forty two` can be with words alone."""
    return bool(gold) and (not is_spelled_out(gold) or (bool(answer) and has_words(answer)))


def reasoning_accuracy_reward(
    completions: list,
    solution: list | None = None,
    answer: list | None = None,
    reasoning_delimiters: list[str] | None = None,
    log_extra=None,
    **kwargs,
) -> list[float | EOFError | None]:
    """accuracy_reward of the text after the reasoning; 0.0 where the reasoning never ends.

    The reasoning ends at the last `</think>`, or at the last of the first of reasoning_delimiters that occurs.
    """
    answers = [_after_reasoning(completion_text(c), reasoning_delimiters or ["</think>"]) for c in completions]
    rewards = accuracy_reward([text or "" for text in answers], solution, answer, log_extra, **kwargs)
    return [0.0 if text is None else reward for text, reward in zip(answers, rewards, strict=True)]


def exact_match_reward(
    completions: list, solution: list | None = None, answer: list | None = None, **kwargs
) -> list[float | None]:
    r"""1.0 where the answer is the gold one, character for character but for white space; None without a gold one.

    The answer is the last `\boxed{}`, else the last answer tag, else what follows the last `####`, else the whole
    completion; gold comes from the column `solution` or `answer` (see gold.py), and is read the same way.

    Raises:
        ValueError: the dataset has neither column.
    """
    golds_given = gold_column({**kwargs, "solution": solution, "answer": answer})
    if golds_given is None:
        raise ValueError("exact_match_reward needs the gold answers: a dataset column named solution or answer")
    rewards: list[float | None] = []
    for gold, completion in zip(map(gold_answer, golds_given), completions, strict=True):
        text = completion_text(completion)
        own = marked_answer(text)
        same = gold is not None and (text if own is None else own).split() == gold.split()
        rewards.append(None if gold is None else float(same))
    return rewards


def _after_reasoning(text: str, delimiters: list[str]) -> str | None:
    found = next((delimiter for delimiter in delimiters if delimiter in text), None)
    return None if found is None else text.rsplit(found, 1)[1]
