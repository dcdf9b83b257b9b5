"""GSM8K with an instruct model: `python examples/gsm8k.py`, or with any model folder and a local JSONL file.

    python examples/gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset train.jsonl --max_steps 100

The rows have `question` and `answer`, whose last line is `#### 72`. Two rewards: the answer is right (1), and the
completion thinks first, in a think block (0.2).
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.rewards import accuracy_reward, think_format_reward

SYSTEM_PROMPT = (
    "Think about the problem inside <think> and </think> first. Then give the final answer, a number, in \\boxed{}."
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="hub id or model folder")
    parser.add_argument("--dataset", default="openai/gsm8k", help="hub id or JSONL file")
    parser.add_argument("--eval_dataset", default=None, help="hub id or JSONL file")
    parser.add_argument("--output_dir", default="gsm8k-output")
    parser.add_argument("--max_steps", type=int, default=250)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=768)
    given = parser.parse_args(arguments)
    result = train(
        given.model,
        [accuracy_reward, think_format_reward],
        given.dataset,
        given.eval_dataset,
        config=GRPOConfig(
            output_dir=given.output_dir,
            system_prompt=SYSTEM_PROMPT,
            max_steps=given.max_steps,
            prompts_per_step=given.prompts_per_step,
            num_generations=given.num_generations,
            max_completion_length=given.max_completion_length,
            reward_weights=[1.0, 0.2],
            log_completions=True,
        ),
    )
    print(f"adapter in {result.output_dir}/adapter, reward of the last step {result.history[-1]['reward']:.3f}")


if __name__ == "__main__":
    main()
