"""Any task of reasoning-gym by name, with its own verifier: `pip install reasoning-gym`.

    python examples/reasoning_gym_task.py --task "chain_sum?max_terms=4" --max_steps 200
    python examples/reasoning_gym_task.py --list

The options after the question mark are those of the task's own configuration, besides size, eval_size and seed. No
reward function is named: the task brings its verifier.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="hub id or model folder")
    parser.add_argument("--task", default="chain_sum", help="a task, with its options")
    parser.add_argument("--list", action="store_true", help="print the names of all tasks")
    parser.add_argument("--output_dir", default="reasoning-gym-output")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_prompt_length", type=int, default=1024)
    parser.add_argument("--max_completion_length", type=int, default=512)
    given = parser.parse_args(arguments)
    if given.list:
        from reasoning_gym.factory import DATASETS

        print("\n".join(sorted(DATASETS)))
        return
    result = train(
        given.model,
        train_dataset=f"reasoning_gym:{given.task}",
        config=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            prompts_per_step=given.prompts_per_step,
            num_generations=given.num_generations,
            max_prompt_length=given.max_prompt_length,
            max_completion_length=given.max_completion_length,
        ),
    )
    before, after = result.eval_history[0], result.eval_history[-1]
    print(f"held-out score {before['eval_reward']:.3f} before, {after['eval_reward']:.3f} after {after['step']} steps")
    print(f"adapter in {result.output_dir}/adapter")


if __name__ == "__main__":
    main()
