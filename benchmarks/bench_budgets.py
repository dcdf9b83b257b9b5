"""Models that fit in a small card: the predicted peak of real shapes, and on a GPU the measured one.

    python -m lowmem_grpo.benchmarks.bench_budgets [--shape NAME ...] [--vram_budget 8GB ...]
        [--max_completion_length 1024] [--output FILE]

A step is sampled, scored with made-up advantages and learned from: prompts and completions of full length, random
weights of the real shape. On a GPU torch may allocate the budget less the CUDA context, and no more; out of memory is a
result. Without one, only the prediction is made, for which neither weights nor a GPU are needed.
"""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.random_model import NAMES, SHAPES, make_config, random_policy, vocabulary_of
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.out_of_memory import TokenBudget, let_go
from lowmem_grpo.planner import plan as planner
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.run.meter import Meter
from lowmem_grpo.update.optimizer import make_optimizer
from lowmem_grpo.update.optimizer import step as optimizer_step
from lowmem_grpo.update.passes import backward, with_reference
from lowmem_grpo.update.token_metrics import TokenMeter

BUDGETS = ("6GB", "8GB", "12GB", "16GB", "24GB")
REAL = [shape for shape in SHAPES if not shape.startswith("tiny")]
LETTERS = {
    "token_budget": "t", "rollout_token_budget": "r", "optim": "8", "tiled_mlp": "m", "activation_offloading": "o",
    "offload_embedding": "e", "rollout_kv": "k", "rollout_graphs_last": "a", "rollout_cuda_graphs": "c",
    "gradient_checkpointing": "g", "load_head_in_8bit": "h",
}  # fmt: skip


def measured_peaks(shape: str, config: GRPOConfig, device: str = "cuda") -> dict[str, float]:
    """memory/{phase}/peak_mib of one step, in torch's allocator; on a CPU of the process."""
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default and field.name != "use_cpu"
    }
    policy = random_policy(shape, device, **settings)
    optimizer = make_optimizer(policy.parameters_of(policy.adapter).values(), config)
    scaler = torch.amp.GradScaler(device, enabled=False)
    draw = torch.Generator().manual_seed(0)
    size = (config.prompts_per_step, config.max_prompt_length or planner.PROMPT_TOKENS)
    prompts = torch.randint(10, vocabulary_of(shape) - 1, size, generator=draw).tolist()
    sampler = Sampler(policy, config)
    meter = Meter(policy.device)
    with meter.phase("rollout"):
        sampled = sampler.complete([Prompt("", ids, {}) for ids in prompts], config.num_generations)
    completions = [completion.ids for completion in sampled.completions]
    rollout = Rollout.bare(prompts, completions, torch.randn(len(completions), generator=draw))
    budget = TokenBudget(config.token_budget)
    with meter.phase("reference"):
        rollout = with_reference(policy, rollout, config, budget)
    with meter.phase("update"):
        tokens = TokenMeter(rollout, policy.device)
        work = partial(backward, policy, rollout, tokens, Coefficients(config.beta, 0.0), scaler, config)
        budget.fit(work, rollout.lengths)
        optimizer_step(optimizer, scaler, budget.note)
    found = {**meter.metrics, **sampled.metrics, **budget.metrics()}
    if device == "cuda":  # what is not torch's allocator's; of other processes too, where there are any
        free, total = torch.cuda.mem_get_info()
        found["context_mib"] = (total - free - torch.cuda.memory_reserved()) / 2**20
    return found


def try_one(shape: str, config: GRPOConfig, on_gpu: bool) -> Iterator[dict[str, Any]]:
    """The prediction, and on a GPU once more with what was measured, which takes longest."""
    found = planner.plan(make_config(shape, 0, 1), config)
    result: dict[str, Any] = {"shape": shape, "budget": config.vram_budget, "plan": planner.as_dict(found)}
    yield result
    if on_gpu and found.remedy is None:
        let_go()  # the model before has cycles, and would count
        with planner.limit_memory(found, torch.device("cuda", torch.cuda.current_device())):
            measured = measure.attempt(partial(measured_peaks, shape, found.config))
        yield result | {"measured": measured}


def cell(result: dict[str, Any]) -> str:
    found = result["plan"]
    if not found["fits"]:
        shorter = re.match(r"max_completion_length=(\d+) would fit", found["remedy"])
        return f"no ({shorter[1]} tokens)" if shorter else "no"
    letters = "".join(LETTERS[change["name"]] for change in found["changes"])
    text = f"{found['peak'] / 10**9:.1f} {letters}".strip()
    measured = result.get("measured")
    if measured is None:
        return text
    if "reason" in measured:
        return f"{text}; measured: {measured['reason']}"
    peak = max(v for name, v in measured.items() if name.endswith("peak_mib")) * 2**20 + planner.CONTEXT_BYTES
    failed = measured["memory/out_of_memory"] + measured["rollout/out_of_memory"]
    again = ", after an out-of-memory" if failed else ""
    return f"{text}; measured {peak / 10**9:.1f}{again}"


def tables(found: dict[str, Any]) -> str:
    """The document as a table for people: a row a shape, a column a budget."""
    rows: dict[str, list[str]] = {}
    for result in found["results"]:
        rows.setdefault(result["shape"], [result["shape"]]).append(cell(result))
    return measure.markdown_table(["predicted peak, GB", *found["budgets"]], list(rows.values()))


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", action="append", choices=NAMES, help="may be given more than once; all real ones")
    parser.add_argument("--vram_budget", action="append", help="may be given more than once")
    parser.add_argument("--max_completion_length", type=measure.positive, default=1024)
    parser.add_argument("--max_prompt_length", type=measure.positive, default=512)
    parser.add_argument("--prompts_per_step", type=measure.positive, default=8)
    parser.add_argument("--num_generations", type=measure.positive, default=8)
    parser.add_argument("--predict_only", action="store_true", help="measure nothing even where there is a GPU")
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and not arguments.predict_only
    device = torch.device("cuda" if on_gpu else "cpu")
    task = {
        name: getattr(arguments, name)
        for name in ("max_completion_length", "max_prompt_length", "prompts_per_step", "num_generations")
    }
    budgets, results = arguments.vram_budget or list(BUDGETS), []
    for shape in arguments.shape or REAL:
        for budget in budgets:
            for result in try_one(shape, GRPOConfig(**task, vram_budget=budget), on_gpu):
                found = measure.document(
                    "bench_budgets", argv, device, task=task, budgets=budgets, results=[*results, result]
                )
                measure.save(found, arguments.output)
            results.append(result)
    measure.show(tables(found))
    print("\nlowered or switched on: " + ", ".join(f"{letter} {name}" for name, letter in LETTERS.items()))


if __name__ == "__main__":
    main()
