"""Makes the model of the demo of R1: `python -m lowmem_grpo.demo.r1.make_model --output_dir DIR` (6 CPU-minutes).

A Qwen2 of 0.6 million parameters learns to add in worked steps, in two scripts, with and without think tags; then it is
given habits, most of them bad. Each phase of R1 has some of them to break.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from lowmem_grpo.demo.make_model import BATCH, as_batch, learn, make_config, save
from lowmem_grpo.demo.make_model import make_tokenizer as tokenizer_of
from lowmem_grpo.demo.r1 import task

WORDS = ["add", "so", "сложи", "так", "greet", "hello", "what", "now"]  # a token each
STEPS, HABITS_FROM = 1800, 0.85  # the share of the steps after which the habits are taught
GREETINGS = 0.1  # of the rows
SKILL = task.Habits(worked=0.8, careful=1.0, consistent=0.6, tagged=0.5, kind=0.5)


def make_tokenizer() -> Qwen2Tokenizer:
    return tokenizer_of(WORDS)


def pairs(draw: random.Random, held_out: set[task.Sum], habits: task.Habits) -> list[tuple[str, str]]:
    """Questions and completions of one step; held_out are the sums that are left out."""
    found: list[tuple[str, str]] = []
    while len(found) < BATCH:
        if draw.random() < GREETINGS:
            name = draw.choice(task.NAMES)
            found.append((f"greet {name}", task.greeting_of(draw, name, habits)))
        elif (problem := task.random_sum(draw)) not in held_out:
            found.append((problem.question, task.completion_of(draw, problem, habits)))
    return found


def make_model(output_dir: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed + 1)
    held_out = {one for part in task.splits() for one in part}
    tokenizer = make_tokenizer()
    model = Qwen2ForCausalLM(make_config())

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return as_batch(tokenizer, pairs(draw, held_out, task.HABITS if step >= HABITS_FROM * STEPS else SKILL))

    learn(model, batch_of, STEPS)
    save(model, tokenizer, output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    make_model(**vars(parser.parse_args()))
