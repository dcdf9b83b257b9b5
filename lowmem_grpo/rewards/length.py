"""Rewards that look at the length of a completion, or at how often it repeats itself, in tokens."""

import math
from collections.abc import Callable

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards.accuracy import accuracy_reward
from lowmem_grpo.rewards.made import made


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable:
    """0 up to max_completion_len - soft_punish_cache tokens, then falling in a line to -1 at max_completion_len.

    Equation 13 of DAPO (https://arxiv.org/abs/2503.14476).
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise InputError(
            f"soft_punish_cache={soft_punish_cache} must be from 0 to max_completion_len={max_completion_len}"
        )

    return made(soft_overlong_punishment_reward, max_completion_len, soft_punish_cache)


def soft_overlong_punishment_reward(
    max_completion_len: int, soft_punish_cache: int, /, completion_ids: list, **kwargs
) -> list[float]:
    over = [len(ids) - (max_completion_len - soft_punish_cache) for ids in completion_ids]
    return [0.0 if n <= 0 else -1.0 if n > soft_punish_cache else -n / soft_punish_cache for n in over]


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable:
    """accuracy_reward scaled by length: a right answer is worth more the shorter it is, a wrong one less.

    With x = tokens / max_len, at most 1, the reward goes from its value at x = 0 to the one at x = 1 along
    (1 + cos(pi x)) / 2: from max_value_correct to min_value_correct, or from min_value_wrong to max_value_wrong.
    Appendix C.1 of https://arxiv.org/abs/2502.03373. None where there is no gold answer.
    """
    if max_len < 1:
        raise InputError(f"max_len={max_len} must be at least 1 token")
    ends = {0.0: (min_value_wrong, max_value_wrong), 1.0: (max_value_correct, min_value_correct)}
    return made(cosine_scaled_reward, max_len, ends)


def cosine_scaled_reward(
    max_len: int,
    ends: dict[float, tuple[float, float]],  # by accuracy, the rewards of no token and of max_len tokens
    /,
    completions: list,
    solution: list | None = None,
    completion_ids: list | None = None,
    answer: list | None = None,
    **kwargs,
) -> list[float | EOFError | None]:
    """Rewards in TRL's order of arguments."""
    if completion_ids is None:
        raise InputError("cosine_scaled_reward needs completion_ids, whose lengths it scales by")
    scaled: list[float | EOFError | None] = []
    for correct, ids in zip(accuracy_reward(completions, solution, answer, **kwargs), completion_ids, strict=True):
        if correct is None or isinstance(correct, EOFError):
            scaled.append(correct)
            continue
        short, long = ends[correct]
        scaled.append(long + (short - long) * (1 + math.cos(math.pi * min(1.0, len(ids) / max_len))) / 2)
    return scaled


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable:
    """max_penalty times the share of a completion's token n-grams that occurred in it before.

    Appendix C.2 of https://arxiv.org/abs/2502.03373. 0 for a completion of fewer than ngram_size tokens.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise InputError(f"ngram_size={ngram_size} must be at least 1, and max_penalty={max_penalty} at most 0")

    return made(repetition_penalty_reward, ngram_size, max_penalty)


def repetition_penalty_reward(ngram_size: int, max_penalty: float, /, completion_ids: list, **kwargs) -> list[float]:
    return [_repeated_share(ids, ngram_size) * max_penalty or 0.0 for ids in completion_ids]


def _repeated_share(ids: list[int], ngram_size: int) -> float:
    ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
