"""GSM8K with a model that can think, Qwen3-1.7B or Qwen3.5-2B, on a card of 8 GB.

    python examples/gsm8k_qwen3.py --vram_budget 8GB
    python examples/gsm8k_qwen3.py --vram_budget 12GB --model Qwen/Qwen3.5-2B
    python examples/gsm8k_qwen3.py --vram_budget 8GB --thinking     # longer completions, so slower steps

The chat templates of both have a switch. Without --thinking it is off: the model answers at once, with its steps in the
answer, as a short run on a small card wants it. With it the thoughts stand in a think block, and what they earn is
measured by what comes after it.

Neither has been run on a GPU with these settings. The peaks are predicted, for prompts of up to 512 tokens: Qwen3-1.7B
6.5 GB with --vram_budget 8GB, 10.0 with 12GB (with --thinking too); Qwen3.5-2B 6.1 and 10.3. Tiny random models of both
types have run through this file on a CPU. `lowmem-grpo plan --model Qwen/Qwen3-1.7B --vram_budget 8GB` predicts
without weights or a GPU.
"""

import argparse
from collections.abc import Sequence

from lowmem_grpo import GRPOConfig, train

COMPLETION_LENGTHS = {False: 1024, True: 3072}  # by whether it thinks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B", help="hub id or model folder; its template has a switch")
    parser.add_argument("--dataset", default="gsm8k", help="or gsm8k?file=rows.jsonl, with question and answer")
    parser.add_argument("--thinking", action="store_true", help="have it think first")
    parser.add_argument("--vram_budget", default=None, help="of a GPU: settings are lowered to what fits in it")
    parser.add_argument("--output_dir", default="gsm8k-qwen3-output")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=None, help="1024, or 3072 with --thinking")
    given = parser.parse_args(arguments)
    result = train(
        given.model,
        train_dataset=given.dataset,
        config=GRPOConfig(
            output_dir=given.output_dir,
            chat_template_kwargs={"enable_thinking": given.thinking},
            vram_budget=given.vram_budget,
            max_steps=given.max_steps,
            prompts_per_step=given.prompts_per_step,
            num_generations=given.num_generations,
            max_prompt_length=512,
            max_completion_length=given.max_completion_length or COMPLETION_LENGTHS[given.thinking],
            mask_truncated_completions=given.thinking,  # else a long thought that is cut off counts as a wrong one
            log_completions=True,
            resume_from_checkpoint="auto",
        ),
    )
    before, after = result.eval_history[0], result.eval_history[-1]
    print(f"held out: right {before['eval_pass@1']:.3f} before, {after['eval_pass@1']:.3f} after {after['step']} steps")
    print(f"adapter in {result.output_dir}/adapter")


if __name__ == "__main__":
    main()
