"""Distance of sampling's log-probabilities from a training forward's, by how weights, keys and values are stored.

    python -m lowmem_grpo.benchmarks.sampling_error [--model FOLDER] [--prompts 32] [--num_generations 8]
        [--output FILE]

Nats a token, mean and maximum of |sampling - training| over completions of the demo's problems at temperature 1, on a
CPU. Adapters that are zero, as a new model's are, become random.
"""

from typing import Any

import torch

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt, tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.load import load_policy, load_tokenizer
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.policy import Policy


def difference(policy: Policy, prompts: list[Prompt], num_generations: int, weights, kv) -> torch.Tensor:
    """|sampling - training| of every token, flat."""
    config = GRPOConfig(
        max_completion_length=32, rollout_token_budget=10**9, rollout_weights=weights, rollout_kv=kv, use_cpu=True
    )
    completions = Sampler(policy, config).complete(prompts, num_generations).completions
    asked = [prompt.ids for prompt in prompts for _ in range(num_generations)]
    answers = [completion.ids for completion in completions]
    known = [completion.logprobs for completion in completions if completion.logprobs is not None]
    error = torch.cat(known)
    with policy.inference():
        for batch in pack(asked, answers, token_budget=16384, pad_token_id=policy.pad_token_id, device=policy.device):
            error[batch.token_index] -= policy.logprobs(batch, 1.0)
    return error.abs()


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    rows = [
        [row["dtype"], row["weights"], row["kv"], f"{row['mean']:.1e}", f"{row['max']:.1e}"] for row in found["errors"]
    ]
    return measure.markdown_table(["dtype", "weights", "keys and values", "mean", "max"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--model", default=str(MODEL), help="a model or adapter folder with the demo's tokenizer")
    parser.add_argument("--prompts", type=measure.positive, default=32)
    parser.add_argument("--num_generations", type=measure.positive, default=8)
    arguments = parser.parse_args(argv)
    errors = []
    for bf16 in (False, True):
        config = GRPOConfig(use_cpu=True, bf16=bf16)
        policy = load_policy(arguments.model, load_tokenizer(arguments.model, config), config)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters_of(policy.adapter).values():
                if not parameter.any():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
        rows = load_rows(task.rows(task.splits()[1][: arguments.prompts]), config)
        prompts, _ = tokenize_prompts(rows, policy.tokenizer, config)
        for weights in ("4bit", "dense"):
            for kv in ("full", "int8"):
                torch.manual_seed(0)
                error = difference(policy, prompts, arguments.num_generations, weights, kv)
                sizes = {"mean": error.mean().item(), "max": error.max().item()}
                errors.append({"dtype": config.compute_dtype, "weights": weights, "kv": kv, **sizes})
    found = measure.document("sampling_error", argv, torch.device("cpu"), errors=errors)
    measure.show(tables(found))
    measure.save(found, arguments.output)


if __name__ == "__main__":
    main()
