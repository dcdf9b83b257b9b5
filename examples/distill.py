"""On-policy distillation: `python examples/distill.py --model SMALL --teacher LARGE --dataset prompts.jsonl`.

Without arguments it runs on a CPU, with the package's own model: reinforcement learning makes a teacher of it, and a
student that begins anew learns the same from that adapter, worn on the one base, in a few steps.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="student: hub id, model folder or adapter folder")
    parser.add_argument("--teacher", help="larger model of the same vocabulary, or adapter of the same base")
    parser.add_argument("--dataset", help="hub id or JSONL file with prompts")
    parser.add_argument("--output_dir", default="distill-output")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--max_completion_length", type=int, default=768)
    given = parser.parse_args(arguments)
    needed = (given.model, given.teacher, given.dataset)
    if needed == (None, None, None):
        return demo(given.output_dir)
    if None in needed:
        parser.error("give --model, --teacher and --dataset, or none of them for the package's own model")
    config = GRPOConfig(
        output_dir=given.output_dir,
        teacher=given.teacher,
        max_steps=given.max_steps,
        max_completion_length=given.max_completion_length,
        learning_rate=1e-4,
    )
    result = train(given.model, [], given.dataset, config=config)
    first, last = (line["teacher_kl"] for line in (result.history[0], result.history[-1]))
    print(f"teacher_kl {first:.3f} -> {last:.3f}; {result.output_dir}")


def demo(output_dir: str, rl_steps: int = 60, steps: int = 15) -> None:
    """A teacher by reinforcement learning on the embedded model, and a student of it."""
    seen, unseen = (task.rows(problems) for problems in task.splits())
    rewards = [task.answer_reward, task.tag_format_reward]
    settings = vars(recipe(f"{output_dir}/teacher", seed=0))
    taught = train(str(MODEL), rewards, seen, unseen, GRPOConfig(**{**settings, "max_steps": rl_steps}))
    settings |= {
        "output_dir": f"{output_dir}/student", "seed": 1, "max_steps": steps, "beta": 0.0, "loss_type": "dapo",
        "teacher": f"{taught.output_dir}/adapter", "reward_weights": [0.0, 0.0],  # measured alone
    }  # fmt: skip
    result = train(str(MODEL), rewards, seen, unseen, GRPOConfig(**settings))
    for who, run, count in (("teacher, by rewards", taught, rl_steps), ("student, by the teacher", result, steps)):
        before, after = (run.eval_history[i]["eval_rewards/answer_reward/mean"] for i in (0, -1))
        print(f"{who}: {before:.3f} -> {after:.3f} of held-out sums in {count} steps")


if __name__ == "__main__":
    main()
