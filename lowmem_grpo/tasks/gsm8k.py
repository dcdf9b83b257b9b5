"""GSM8K: grade-school word problems (https://arxiv.org/abs/2110.14168), with answers in one of three styles."""

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards.accuracy import accuracy_reward
from lowmem_grpo.tasks.task import Task

STYLES = {
    "boxed": "Think step by step, and put the final answer, a number, in \\boxed{}.",
    "tags": "Think step by step, and put the final answer, a number, between <answer> and </answer>.",
    "hash": "Think step by step, and write the final answer, a number, on a last line that begins with ####.",
}


def gsm8k_task(*, style: str = "boxed", file: str | None = None) -> Task:
    """The hub's openai/gsm8k, or a JSONL file with its columns; accuracy_reward reads every style, whatever is asked.

    Raises:
        InputError: a style that is none of boxed, tags and hash.
    """
    if style not in STYLES:
        raise InputError(f"style={style!r} is not one of {', '.join(STYLES)}")
    return Task("openai/gsm8k" if file is None else file, accuracy_reward, system_prompt=STYLES[style])
