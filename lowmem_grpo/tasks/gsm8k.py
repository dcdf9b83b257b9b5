"""GSM8K: grade-school word problems (https://arxiv.org/abs/2110.14168), with answers in one of three styles."""

import json
import zlib

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards.accuracy import accuracy_reward
from lowmem_grpo.tasks.task import Task

STYLES = {
    "boxed": "Think step by step, and put the final answer, a number, in \\boxed{}.",
    "tags": "Think step by step, and put the final answer, a number, between <answer> and </answer>.",
    "hash": "Think step by step, and write the final answer, a number, on a last line that begins with ####.",
}
ON_HUB = "openai/gsm8k"


def gsm8k_task(*, style: str = "boxed", file: str | None = None, hold_out: bool = True) -> Task:
    """The hub's openai/gsm8k, or a file with its columns; accuracy_reward reads every style, whatever is asked.

    The hub's test split is held out, or of a file an eighth, whatever the order of its rows. A run with another
    eval_dataset trains on all of the file.

    Raises:
        InputError: a style that is none of boxed, tags and hash, or a file that cannot be read.
    """
    if not isinstance(style, str) or style not in STYLES:
        raise InputError(f"style={style!r} is not one of {', '.join(STYLES)}")
    if not isinstance(hold_out, bool):
        raise InputError(f"hold_out={hold_out!r} must be true or false")
    if file is None:
        return Task(ON_HUB, accuracy_reward, eval_rows=ON_HUB if hold_out else None, system_prompt=STYLES[style])
    if not isinstance(file, str):
        raise InputError(f"file={file!r} is not the name of a file")
    whole = Task(file, accuracy_reward, system_prompt=STYLES[style])
    if not hold_out:
        return whole
    from lowmem_grpo.data.rows import load_rows  # which takes a second to import

    rows = load_rows(file, GRPOConfig())
    places: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(rows["prompt"]):
        places[is_held_out(prompt)].append(index)
    if not all(places):  # of a few rows
        return whole
    train_rows, eval_rows = map(rows.select, places)
    return Task(train_rows, accuracy_reward, eval_rows=eval_rows, system_prompt=STYLES[style], whole=file)


def is_held_out(prompt: str | list[dict]) -> bool:
    """Tell whether a prompt is in the eighth of all that is held out, in whatever file it stands."""
    return zlib.crc32(json.dumps(prompt).encode()) % 8 == 0
