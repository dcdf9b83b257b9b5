"""A model learns when to use a tool, on a CPU: `OMP_NUM_THREADS=1 python examples/calculator.py`.

SmolLM2-135M-Instruct (0.27 GB, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) cannot multiply numbers of
three digits, nor has it seen a tool. Some examples first show it both: how a tool is called, and that one may answer at
once. Then GRPO, whose only reward is that the answer is right, lets it find out which of the two is worth it.
"""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import get_json_schema

from lowmem_grpo import GRPOConfig, SFTConfig, sft, train
from lowmem_grpo.demo.run import text_curve

# The model's own turns, with tools, calls and results in them.
TEMPLATE = """\
{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the one
        b: the other
    """
    return a * b


def pairs(count: int) -> list[tuple[int, int]]:
    """Draw pairs of numbers of three digits, no pair twice."""
    return [(100 + number // 900, 100 + number % 900) for number in random.Random(0).sample(range(900 * 900), count)]


def question(a: int, b: int) -> list[dict]:
    return [{"role": "user", "content": f"{a} * {b} ="}]


def by_tool(a: int, b: int) -> list[dict]:
    """A conversation in which the tool answers."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}
    return [
        *question(a, b),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def at_once(a: int, b: int) -> list[dict]:
    """A conversation without the tool."""
    return [*question(a, b), {"role": "assistant", "content": str(a * b)}]


def right_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1.0 where the last thing that is said is the right number and nothing else."""
    return [float(talk[-1]["content"].strip() == right) for talk, right in zip(completions, solution, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or model folder")
    parser.add_argument("--output_dir", default="calculator-output")
    parser.add_argument("--num_examples", type=int, default=96, help="conversations to begin with; in a third a call")
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=96)
    parser.add_argument("--held_out", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.chat_template = TEMPLATE
    of_both: dict[str, Any] = dict(
        use_cpu=True, seed=given.seed, gradient_checkpointing=False, lr_scheduler_type="constant"
    )  # fmt: skip
    every = pairs(given.num_examples + 1000 + given.held_out)
    examples = [
        {"messages": (at_once if place % 3 else by_tool)(*pair), "tools": [get_json_schema(multiply)]}
        for place, pair in enumerate(every[: given.num_examples])
    ]
    rows = [{"prompt": question(*pair), "solution": str(pair[0] * pair[1])} for pair in every[given.num_examples :]]
    unseen, seen = rows[: given.held_out], rows[given.held_out :]
    started = time.process_time()
    config = SFTConfig(
        output_dir=f"{given.output_dir}/examples", assistant_only_loss=True, examples_per_step=16, num_train_epochs=4,
        learning_rate=1e-3, **of_both,
    )  # fmt: skip
    sft(given.model, examples, config=config, tokenizer=tokenizer)

    config = GRPOConfig(
        output_dir=f"{given.output_dir}/grpo", max_steps=given.max_steps, prompts_per_step=8, num_generations=8,
        max_completion_length=given.max_completion_length, max_prompt_length=None, learning_rate=2e-4,
        log_completions=True, **of_both,
    )  # fmt: skip
    result = train(
        f"{given.output_dir}/examples/adapter", right_reward, seen, unseen, config, tokenizer=tokenizer, tools=multiply
    )
    print("\nShare of right answers in each step, and calls of the tool for each answer")
    for name in ("reward", "tools/call_frequency"):
        print(text_curve([line[name] for line in result.history], top=1.0))
    for line in (result.eval_history[0], result.eval_history[-1]):
        low, high = line["eval_pass@1/ci_low"], line["eval_pass@1/ci_high"]
        shown = f"{line['eval_pass@1']:.2f} (95 % interval {low:.2f} to {high:.2f})"
        calls = line["eval_tools/call_frequency"]
        print(f"step {line['step']}: right of {given.held_out} held-out products {shown}, calls for each {calls:.2f}")
    print(f"{time.process_time() - started:.0f} CPU-seconds; adapter in {Path(result.output_dir) / 'adapter'}")


if __name__ == "__main__":
    main()
