"""PPO beside GRPO on one prompt set: `python examples/ppo_vs_grpo.py --model Qwen/Qwen2.5-1.5B --dataset gsm8k`.

Both see as many completions a step. GRPO compares each with the others of its prompt; PPO samples one a prompt, and a
critic, which is one more adapter on the same 4-bit base, says what was to be expected at each of its tokens. So PPO
meets more prompts, and its warm-up is of the same number of steps: compare them on what the task holds out.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.rewards import accuracy_reward


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B", help="hub id or model folder")
    parser.add_argument("--dataset", default="gsm8k", help="task, hub id or JSONL file with gold answers")
    parser.add_argument("--eval_dataset", help="likewise, held out; by default what the task holds out")
    parser.add_argument("--output_dir", default="ppo-vs-grpo-output")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--prompts_per_step", type=int, default=8, help="of GRPO")
    parser.add_argument("--num_generations", type=int, default=8, help="of GRPO; PPO has one of so many more prompts")
    parser.add_argument("--max_completion_length", type=int, default=512)
    parser.add_argument("--critic_warmup", type=int, default=10)
    given = parser.parse_args(arguments)
    methods: dict[str, dict[str, Any]] = {
        "grpo": dict(prompts_per_step=given.prompts_per_step, num_generations=given.num_generations),
        "ppo": dict(
            prompts_per_step=given.prompts_per_step * given.num_generations, num_generations=1, adv_estimator="gae",
            critic_warmup=given.critic_warmup,
        ),
    }  # fmt: skip
    for name, method in methods.items():
        config = GRPOConfig(
            output_dir=f"{given.output_dir}/{name}", max_steps=given.max_steps, beta=0.001,
            max_completion_length=given.max_completion_length, **method,
        )  # fmt: skip
        result = train(given.model, [accuracy_reward], given.dataset, given.eval_dataset, config)
        history = result.history
        rewards = [line["reward"] for line in history[-10:]]
        most = {key.split("/")[1]: max(line[key] for line in history) for key in history[-1] if "/peak_mib" in key}
        for line in result.eval_history:
            low, high = line["eval_pass@1/ci_low"], line["eval_pass@1/ci_high"]
            print(f"{name}: held out, at step {line['step']}: {line['eval_pass@1']:.3f} ({low:.3f} to {high:.3f})")
        print(f"{name}: reward of the last steps {sum(rewards) / len(rewards):.3f}; peak in MiB by phase "
              + ", ".join(f"{phase} {value:.0f}" for phase, value in most.items()))  # fmt: skip


if __name__ == "__main__":
    main()
