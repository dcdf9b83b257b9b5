"""A cold start, and reinforcement after it: `python examples/cold_start.py --cold cold.jsonl --dataset gsm8k.jsonl`.

cold.jsonl has worked examples, rows such as

    {"prompt": [{"role": "user", "content": "1+1="}],
     "completion": [{"role": "assistant", "content": "<think>one and one</think> \\\\boxed{2}"}]}

The adapter that imitates them is what GRPO goes on with, and what its KL holds it near.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, SFTConfig, sft, train
from lowmem_grpo.rewards import accuracy_reward, think_format_reward


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B", help="hub id or model folder")
    parser.add_argument("--cold", required=True, help="hub id or JSONL file of worked examples")
    parser.add_argument("--dataset", default="openai/gsm8k", help="hub id or JSONL file with gold answers")
    parser.add_argument("--output_dir", default="cold-start-output")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--max_steps", type=int, default=250)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--max_completion_length", type=int, default=768)
    given = parser.parse_args(arguments)
    cold = sft(
        given.model,
        given.cold,
        config=SFTConfig(
            output_dir=f"{given.output_dir}/cold", num_train_epochs=given.epochs, max_length=given.max_length
        ),
    )
    result = train(
        f"{cold.output_dir}/adapter",
        [accuracy_reward, think_format_reward],
        given.dataset,
        config=GRPOConfig(
            output_dir=f"{given.output_dir}/rl",
            max_steps=given.max_steps,
            max_completion_length=given.max_completion_length,
            reward_weights=[1.0, 0.2],
            beta=0.001,
            reference="initial",
        ),
    )
    print(f"loss {cold.history[-1]['loss']:.3f}, then reward {result.history[-1]['reward']:.3f}; {result.output_dir}")


if __name__ == "__main__":
    main()
