"""A reward model as the reward, held near the base by a KL, and a penalty for completions that run on.

    python examples/reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct \\
        --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --dataset prompts.jsonl

Any sequence-classification model with one label will do, by hub id or folder. It stays in memory beside the policy, and
no plan of the run counts it. A reward model can be fooled, and a policy finds out how: beta is what keeps it honest.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.rewards import get_soft_overlong_punishment

QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "How do I keep basil alive on a windowsill?",
    "Suggest a polite way to decline an invitation.",
    "What should I check before I buy a used bicycle?",
    "Write two sentences about the sea in winter.",
    "Why does bread rise?",
    "How can I remember people's names?",
    "What is a good first program to write?",
)
ROWS = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="hub id or model folder")
    parser.add_argument("--reward_model", default="Skywork/Skywork-Reward-V2-Qwen3-0.6B", help="likewise")
    parser.add_argument("--dataset", default=None, help="hub id or file with a column `prompt`; some questions if not")
    parser.add_argument("--output_dir", default="reward-model-output")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--prompts_per_step", type=int, default=4)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=256)
    given = parser.parse_args(arguments)
    length = given.max_completion_length
    result = train(
        given.model,
        [given.reward_model, get_soft_overlong_punishment(length, length // 4)],
        given.dataset or ROWS,
        config=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            prompts_per_step=given.prompts_per_step,
            num_generations=given.num_generations,
            max_completion_length=length,
            multi_objective_aggregation="normalize_then_sum",  # scores and penalties are of different sizes
            beta=0.04,
            log_completions=True,
        ),
    )
    last = result.history[-1]
    print(f"reward {last['reward']:.3f}, kl {last['kl']:.4f}; adapter in {result.output_dir}/adapter")


if __name__ == "__main__":
    main()
