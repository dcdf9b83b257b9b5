"""Errors in our words: what a user gave, what is no longer finite, and what foreign code raised, in one sentence."""


def in_a_line(error: BaseException) -> str:
    """What foreign code raised, as a reason within a sentence."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
