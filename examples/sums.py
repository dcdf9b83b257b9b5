"""A real model learns arithmetic on a CPU: `OMP_NUM_THREADS=1 python examples/sums.py`, about four minutes of one core.

SmolLM2-135M-Instruct (0.27 GB, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) reads three worked sums and
completes a fourth, of two numbers of two digits. 2,000 sums to train on, and 200 others are held out. The form of an
answer is in the worked sums, and the only reward is that the answer is right.
"""

import argparse
import random
import time
from collections.abc import Sequence
from itertools import product

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.demo.run import text_curve

WORKED = "23 + 45 = 68\n71 + 19 = 90\n36 + 58 = 94\n"


def rows(count: int, held_out: int) -> tuple[list[dict], list[dict]]:
    """Make the sums to train on, and the held-out ones, of which the former have none."""
    pairs = list(product(range(10, 100), repeat=2))
    random.Random(0).shuffle(pairs)
    made = [{"prompt": f"{WORKED}{a} + {b} =", "solution": str(a + b)} for a, b in pairs[: count + held_out]]
    return made[:count], made[count:]


def sum_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """1.0 where the completion is the right number and nothing else."""
    return [float(text.strip() == right) for text, right in zip(completions, solution, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or model folder")
    parser.add_argument("--output_dir", default="sums-output")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    seen, unseen = rows(2000, given.held_out)
    config = GRPOConfig(
        output_dir=given.output_dir,
        seed=given.seed,
        use_cpu=True,
        max_steps=given.max_steps,
        prompts_per_step=given.prompts_per_step,
        num_generations=given.num_generations,
        max_completion_length=given.max_completion_length,
        stop_strings=["\n"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        log_completions=True,
    )
    started = time.process_time()
    result = train(given.model, sum_reward, seen, unseen, config)
    cpu_s = time.process_time() - started
    peak_mib = max(value for line in result.history for name, value in line.items() if name.endswith("/peak_mib"))
    print("\nMean reward of each step: the share of right answers, sampled")
    print(text_curve([line["reward"] for line in result.history], top=1.0))
    for line in (result.eval_history[0], result.eval_history[-1]):
        low, high = line["eval_pass@1/ci_low"], line["eval_pass@1/ci_high"]
        shown = f"{line['eval_pass@1']:.3f} (95 % interval {low:.3f} to {high:.3f})"
        print(f"step {line['step']}: right of {given.held_out} held-out sums {shown}")
    print(f"{cpu_s:.0f} CPU-seconds, peak resident memory {peak_mib:.0f} MiB; adapter in {result.output_dir}/adapter")


if __name__ == "__main__":
    main()
