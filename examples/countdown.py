"""R1-Zero in small: a base model, Countdown, and two rewards that a program can check, as in DeepSeek-R1's paper.

    python examples/countdown.py --model Qwen/Qwen2.5-3B --max_steps 300

Make a target from three or four numbers with + - * / and parentheses. Nobody shows the model how: one reward says that
the expression is right (1), the other that the completion thinks first, in a think block (0.1). The problems are made
here, and 128 others are held out.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.rewards import think_format_reward
from lowmem_grpo.tasks.countdown import countdown_reward


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-3B", help="hub id or model folder; a base model")
    parser.add_argument("--dataset", default="countdown", help="with options if you like: countdown?max_numbers=3")
    parser.add_argument("--output_dir", default="countdown-output")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=512)
    parser.add_argument("--num_generations_eval", type=int, default=4, help="completions of each held-out problem")
    given = parser.parse_args(arguments)
    result = train(
        given.model,
        [countdown_reward, think_format_reward],
        given.dataset,
        config=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            prompts_per_step=given.prompts_per_step,
            num_generations=given.num_generations,
            max_completion_length=given.max_completion_length,
            num_generations_eval=given.num_generations_eval,
            eval_steps=50,
            reward_weights=[1.0, 0.1],
            log_completions=True,
        ),
    )
    for line in (result.eval_history[0], result.eval_history[-1]):
        low, high = line["eval_pass@1/ci_low"], line["eval_pass@1/ci_high"]
        print(f"step {line['step']}: solved {line['eval_pass@1']:.3f} (95 % interval {low:.3f} to {high:.3f})")
    print(f"adapter in {result.output_dir}/adapter, the best evaluation's in {result.output_dir}/best")


if __name__ == "__main__":
    main()
