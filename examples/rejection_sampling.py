"""Rejection sampling: `python examples/rejection_sampling.py --model cold/adapter --dataset gsm8k`.

A model answers every prompt several times, the right answers are kept, and its base is trained to imitate them. Called
again after a stop, the sampling goes on where it was; the training of R1 starts anew from the base, not from --model.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import SampleConfig, SelectConfig, SFTConfig, sample, select, sft
from lowmem_grpo.pipeline.sampled import read_sampled
from lowmem_grpo.pipeline.select import as_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="what answers: hub id, model or adapter")
    parser.add_argument("--base", help="what learns from the answers (default: --model)")
    parser.add_argument("--dataset", default="openai/gsm8k", help="hub id, JSONL file or task with gold answers")
    parser.add_argument("--reward_funcs", nargs="+", default=["accuracy_reward"])
    parser.add_argument("--output_dir", default="rejection-sampling-output")
    parser.add_argument("--dataset_take", type=int, help="prompts, of all that there are")
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--max_completion_length", type=int, default=768)
    parser.add_argument("--epochs", type=float, default=2.0)
    given = parser.parse_args(arguments)
    sampled = sample(
        given.model,
        given.dataset,
        given.reward_funcs,
        SampleConfig(
            output=f"{given.output_dir}/sampled.jsonl",
            dataset_take=given.dataset_take,
            num_generations=given.num_generations,
            max_completion_length=given.max_completion_length,
        ),
    )
    # A prompt that is nearly always solved teaches nothing more, and of several right answers two are enough.
    rules = SelectConfig(min_reward=1.0, max_pass_rate=0.9, max_similarity=0.8, per_prompt=2)
    rows, funnel = select(read_sampled(sampled.output), rules)
    print(as_text(funnel))
    result = sft(
        given.base or given.model,
        rows,
        config=SFTConfig(output_dir=f"{given.output_dir}/sft", num_train_epochs=given.epochs, max_length=None),
    )
    print(
        f"{len(rows)} answers of {sampled.num_completions}: loss {result.history[-1]['loss']:.3f}; {result.output_dir}"
    )


if __name__ == "__main__":
    main()
