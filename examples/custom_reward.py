"""A reward of your own: a function from completions, and the columns of your rows, to numbers.

    python examples/custom_reward.py --model Qwen/Qwen2.5-0.5B-Instruct --max_steps 100

The model names fruits that begin with a letter. One reward reads a column of the data set; the other looks at the
completion alone, does not apply to empty ones (None), and logs a metric and a column beside its rewards.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train

ROWS = [
    {"prompt": [{"role": "user", "content": f"Name a fruit that begins with {letter}."}], "letter": letter}
    for letter in "ABCFGKLMOPQRSTW"
]


def first_letter_reward(completions: list, letter: list[str], **kwargs) -> list[float]:
    """1.0 where the last word of the completion begins with the letter of its row."""
    words = [completion[0]["content"].split()[-1:] for completion in completions]
    return [float(bool(word) and word[0].upper().startswith(own)) for word, own in zip(words, letter, strict=True)]


def brevity_reward(completions: list, log_metric, log_extra, **kwargs) -> list[float | None]:
    """1.0 for one word, less for every further one, None for a completion without any."""
    counts = [len(completion[0]["content"].split()) for completion in completions]
    log_metric("words", sum(counts) / len(counts))
    log_extra("words", counts)
    return [1 / count if count else None for count in counts]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="hub id or model folder")
    parser.add_argument("--output_dir", default="custom-reward-output")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--prompts_per_step", type=int, default=4)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=32)
    given = parser.parse_args(arguments)
    result = train(
        given.model,
        [first_letter_reward, brevity_reward],
        ROWS,
        config=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            prompts_per_step=given.prompts_per_step,
            num_generations=given.num_generations,
            max_completion_length=given.max_completion_length,
            reward_weights=[1.0, 0.3],
            log_completions=True,
        ),
    )
    last = result.history[-1]
    print(
        f"reward {last['reward']:.3f}, {last['words']:.1f} words a completion; adapter in {result.output_dir}/adapter"
    )


if __name__ == "__main__":
    main()
