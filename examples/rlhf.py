"""RLHF on one base: `python examples/rlhf.py --pairs pairs.jsonl --prompts prompts.jsonl`.

pairs.jsonl has a better and a worse answer to a prompt, rows such as

    {"prompt": [{"role": "user", "content": "Hi!"}],
     "chosen": [{"role": "assistant", "content": "Hello, how are you?"}],
     "rejected": [{"role": "assistant", "content": "What?"}]}

A reward adapter learns to tell them apart; then GRPO raises its score, worn on the policy's own base. A KL holds the
policy near its start, since it would find out how to fool the score.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, RewardConfig, train, train_reward_model
from lowmem_grpo.rewards import get_adapter_reward


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="hub id or model folder")
    parser.add_argument("--pairs", required=True, help="hub id or JSONL file with chosen and rejected")
    parser.add_argument("--prompts", required=True, help="hub id or JSONL file with prompts")
    parser.add_argument("--output_dir", default="rlhf-output")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_completion_length", type=int, default=512)
    given = parser.parse_args(arguments)
    judge = train_reward_model(
        given.model,
        given.pairs,
        config=RewardConfig(
            output_dir=f"{given.output_dir}/rm", max_length=given.max_length, center_rewards_coefficient=0.01
        ),
    )
    reward = get_adapter_reward(
        f"{judge.output_dir}/adapter", normalize=True, reward_range=[-10, 10], missing_eos_penalty=1.0
    )
    del judge  # which has a base of its own in memory
    result = train(
        given.model,
        reward,
        given.prompts,
        config=GRPOConfig(
            output_dir=f"{given.output_dir}/rl",
            max_steps=given.max_steps,
            max_completion_length=given.max_completion_length,
            beta=0.02,
        ),
    )
    last = result.history[-1]
    print(f"reward {last['reward']:.3f}, KL {last['kl']:.3f}; the adapter is in {result.output_dir}/adapter")


if __name__ == "__main__":
    main()
