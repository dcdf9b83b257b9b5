"""A reward for completing in the script of the prompt."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from lowmem_grpo.config.select import is_script
from lowmem_grpo.data.text import completion_text, prompt_text
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.rewards.format import TAGS
from lowmem_grpo.rewards.made import made
from lowmem_grpo.rewards.rows import of_each

LEAST_SHARE = 0.1  # of a prompt's letters: a script with fewer is a quotation


def language_consistency_reward(prompts: list, completions: list, **kwargs) -> list[float | Exception | None]:
    """The share of a completion's letters in a script of its prompt; None for a prompt without letters.

    A script (LATIN, CYRILLIC, CJK, HIRAGANA, ...) is one of the prompt's if a tenth of its letters are in it. A
    completion without letters has 1.0. Think and answer tags are no letters. Languages that share a script are not
    told apart.
    """
    return of_each(_consistency, prompts, completions)


def _consistency(prompt: str | list[dict], completion: str | list[dict]) -> float | None:
    of_prompt = _scripts(prompt_text(prompt))
    wanted = {script for script, count in of_prompt.items() if count >= LEAST_SHARE * of_prompt.total()}
    return _share(completion_text(completion), wanted) if wanted else None


def get_language_consistency_reward(scripts: Sequence[str]) -> Callable:
    """The share of a completion's letters in the given scripts, such as ["CJK"], whatever the prompt's.

    Raises:
        InputError: a script that no letter has.
    """
    wanted = {scripts.upper()} if isinstance(scripts, str) else {script.upper() for script in scripts}
    for script in wanted:
        if not is_script(script):
            raise InputError(f"scripts has {shown(script)}, which no letter's Unicode name begins with; try LATIN")
    return made(script_reward, wanted)


def script_reward(wanted: set[str], /, completions: list, **kwargs) -> list[float]:
    return [_share(completion_text(completion), wanted) for completion in completions]


def _share(text: str, wanted: set[str]) -> float:
    scripts = _scripts(text)
    return sum(scripts[script] for script in wanted) / scripts.total() if scripts else 1.0


def _scripts(text: str) -> Counter:
    """Number of a text's letters by script; a variant of a letter (ℝ, Ａ) counts as that letter, a tag as none."""
    for tag in TAGS:
        text = text.replace(tag, "")
    found = Counter(map(_script, unicodedata.normalize("NFKC", text)))
    del found[None]
    return found


@lru_cache(maxsize=65536)
def _script(character: str) -> str | None:
    if not character.isalpha() or unicodedata.category(character) == "Lm":  # Lm: marks that many scripts use
        return None
    return unicodedata.name(character, "UNKNOWN").split()[0]
