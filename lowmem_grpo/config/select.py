"""SelectConfig: which sampled completions are kept to train on. Standard library only."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lowmem_grpo.config.fields import option
from lowmem_grpo.config.sections import TITLES, Checked
from lowmem_grpo.errors import InputError, shown

FINISHES = ("eos", "stop", "length")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Checked):
    """Rules of a selection, in the order in which they are applied. A rule that is none keeps everything.

    Raises:
        UnknownNameError: a misspelt field.
        InputError: a value out of its range, or one that contradicts another.
    """

    min_pass_rate: float | None = option(
        None, "least share of a prompt's completions that pass: whose first reward is at least min_reward, or 1",
        common=True, at_least=0, at_most=1,
    )  # fmt: skip
    max_pass_rate: float | None = option(
        None, "largest share of a prompt's completions that pass; 0.9 leaves out prompts that are too easy",
        common=True, at_least=0, at_most=1,
    )  # fmt: skip
    min_reward: float | None = option(None, "least reward of a completion, by the functions of reward_of", common=True)
    reward_of: Literal["first", "all", "sum"] = option(
        "first", "which reward has to reach min_reward: the first function's, every function's, or the weighted sum"
    )
    finish: list[str] | None = option(
        None,
        "how a completion may end, some of eos, stop (a stop string) and length (cut off); by default eos and stop",
    )
    min_tokens: int | None = option(None, "fewest tokens of a completion", above=0)
    max_tokens: int | None = option(None, "most tokens of a completion", common=True, above=0)
    language: list[str] | None = option(
        None, "scripts of a completion's letters, as LATIN or CJK; prompt means those of its prompt", common=True
    )
    min_language_share: float = option(
        0.9, "least share of a completion's letters in the scripts of language", above=0, at_most=1
    )
    max_repetition: float | None = option(
        None, "largest share of a completion's word 3-grams that occurred in it before", common=True, at_least=0,
        at_most=1,
    )  # fmt: skip
    drop_regex: list[str] | None = option(None, "regular expressions; a completion with a match is left out")
    drop_duplicates: bool = option(True, "keep one of a prompt's completions that are the same but for white space")
    max_similarity: float | None = option(
        None, "largest overlap (Jaccard, of word 3-grams) with a completion of the prompt that is kept; 0.8 is usual",
        common=True, at_least=0, at_most=1,
    )  # fmt: skip
    per_prompt: int | None = option(None, "most completions of a prompt", common=True, above=0)
    choice: Literal["best", "random"] = option(
        "best", "which ones: those of the highest reward, of equal ones the shortest, or any", common=True
    )
    max_rows: int | None = option(None, "most completions of all, drawn at random", above=0)
    seed: int = option(42, "seed of what is random", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        unknown = [one for one in self.finish or [] if one not in FINISHES]
        if unknown or self.finish == []:
            what = shown(unknown[0]) if unknown else "nothing"
            raise InputError(f"finish has {what}; give some of {', '.join(FINISHES)}")
        for low, high in (("min_pass_rate", "max_pass_rate"), ("min_tokens", "max_tokens")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise InputError(f"{low}={least} is above {high}={most}, so that nothing would be left")
        for pattern in self.drop_regex or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"drop_regex has {shown(pattern)}, which is no regular expression: {error}") from error
        for script in self.language or []:
            if script != "prompt" and not is_script(script):
                raise InputError(f"language has {shown(script)}, which no letter's Unicode name begins with; try LATIN")
        if self.min_reward is None and self.reward_of != "first":
            raise InputError(f"reward_of={self.reward_of!r} is read only with min_reward; set that, or leave it out")
        if self.language is None and self.min_language_share != 0.9:
            raise InputError("min_language_share is read only with language; set that, or leave it out")


@cache
def is_script(name: str) -> bool:
    """Tell whether there are letters of a script, such as LATIN or cjk. A name of none takes 60 ms."""
    letters = (chr(code) for code in range(0x20000) if chr(code).isalpha())
    return any(unicodedata.name(letter, "").split(" ")[0] == name.upper() for letter in letters)


TITLES[SelectConfig] = "selection"
