"""A step of decoding: replayed as a CUDA graph, or asked for by Python, and on a GPU its kernels.

    python -m lowmem_grpo.benchmarks.bench_decode [--shape tiny] [--prompts 8] [--num_generations 8]
        [--prompt_length 256] [--longest 256] [--only NAME ...] [--profile] [--output FILE]

All completions have the full length. A rollout of --longest tokens less one of half of them, with the same random
numbers, is steps alone: prefill and whatever a rollout begins with cancel. What a first rollout takes more than a later
one is what lasts from then on. The model is random, in 4-bit, with LoRA adapters.
"""

import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.bench_rollout import Work, make_policy
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.benchmarks.random_model import NAMES
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.policy import Policy

EAGER = "ours, without CUDA graphs"
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    EAGER: {"rollout_cuda_graphs": False},
    "ours, int8 keys and values": {"rollout_kv": "int8"},
    "ours, dense weights": {"rollout_weights": "dense"},
}
EAGER_LONGEST = 32  # a step without a graph took 75 ms of Python for 28 layers
NEVER = 10**9  # mean length of a completion, at which one id in the vocabulary ends it
KERNELS = 16  # of the most time


def bench(name: str, policy: Policy, work: Work, repetitions: int, profile: bool) -> dict[str, Any]:
    """Measures one implementation: step_s, tokens_per_s, first_s, later_s, metrics, said, and with profile kernels."""
    device, rows = torch.device(work.device), work.prompts * work.num_generations
    settings = {"rollout_weights": "4bit", **IMPLEMENTATIONS[name]}
    prompts = [Prompt("", ids, {}) for ids in work.texts()]
    longest = min(work.max_completion_length, EAGER_LONGEST) if name == EAGER else work.max_completion_length
    half = longest // 2
    metrics: dict[str, float] = {}

    def run(sampler: Sampler) -> float:
        def sample(turn: int) -> None:
            torch.manual_seed(0)
            metrics.update(sampler.complete(prompts, work.num_generations).metrics)

        return measure.seconds_of(sample, 0, device)

    firsts, laters = {}, {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for length in (longest, half):
            sampler = Sampler(policy, GRPOConfig(max_completion_length=length, **settings))
            firsts[length] = run(sampler)
            laters[length] = statistics.median(run(sampler) for _ in range(repetitions))
    step = (laters[longest] - laters[half]) / (longest - half)
    found: dict[str, Any] = {
        "longest": longest, "step_s": step, "tokens_per_s": rows / step, "first_s": firsts[longest],
        "later_s": laters[longest], "rollout_tokens_per_s": rows * longest / laters[longest],
        "metrics": {key: value for key, value in metrics.items() if math.isfinite(value)},
        "said": sorted({str(one.message) for one in warned if one.category is UserWarning}),
    }  # fmt: skip
    if profile and device.type == "cuda":
        found["kernels"] = kernels(lambda: run(sampler))
    return found


def kernels(run: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernels that took the most time of a call: name, count and ms."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        run()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"name": event.key[:80], "count": event.count, "ms": event.self_device_time_total / 1e3}
        for event in events[:KERNELS]
    ]


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    work = Work(**found["work"])
    clock = "s" if work.device == "cuda" else "CPU s"
    rows = []
    for name, result in found["results"].items():
        if "failed" in result:
            rows.append([name, result["failed"], *[""] * 6])
            continue
        rows.append(
            [
                name, f"{result['longest']}", f"{1e3 * result['step_s']:.2f}", f"{result['tokens_per_s']:.0f}",
                f"{result['rollout_tokens_per_s']:.0f}", f"{result['first_s']:.2f}", f"{result['later_s']:.2f}",
                f"{result['metrics'].get('rollout/replayed_share', 0.0):.0%}",
            ]
        )  # fmt: skip
    header = [
        f"{work.shape}: {work.prompts} prompts of {work.prompt_length} x {work.num_generations}", "new tokens",
        f"a step, {clock.replace('s', 'ms')}", f"tokens per {clock} in steps", f"tokens per {clock} in all",
        f"first rollout, {clock}", f"a later one, {clock}", "of it replayed",
    ]  # fmt: skip
    shown = [measure.markdown_table(header, rows)]
    shown += [f"{name}: {text}" for name, result in found["results"].items() for text in result.get("said", [])]
    for name, result in found["results"].items():
        if "kernels" in result:
            body = [[kernel["name"], f"{kernel['count']}", f"{kernel['ms']:.2f}"] for kernel in result["kernels"]]
            shown.append(
                measure.markdown_table(
                    [f"kernels of {name}, {result['longest'] // 2} new tokens", "launches", "ms"], body
                )
            )
    return "\n\n".join(shown)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=NAMES, default="tiny")
    parser.add_argument("--prompts", type=measure.positive, default=8)
    parser.add_argument("--num_generations", type=measure.positive, default=8)
    parser.add_argument("--prompt_length", type=measure.positive, default=256)
    parser.add_argument("--longest", type=measure.positive, default=256, help="tokens of a completion, 2 at least")
    parser.add_argument("--only", action="append", choices=IMPLEMENTATIONS, help="may be given more than once")
    parser.add_argument("--repetitions", type=measure.positive, default=2)
    parser.add_argument("--profile", action="store_true", help="on a GPU also by kernel, of the first implementation")
    parser.add_argument("--quick", action="store_true", help="tiny lengths: does everything run?")
    measure.add_device(parser)
    given = parser.parse_args(argv)
    if given.longest < 2:
        parser.error(f"--longest {given.longest} has no half; give at least 2")
    if given.quick:
        given.prompt_length, given.longest, given.repetitions = 8, 8, 1
    work = Work(
        given.shape, given.prompts, given.num_generations, given.prompt_length, given.longest, NEVER, given.device
    )
    device, policy = torch.device(given.device), make_policy(work)
    names = given.only or [name for name in IMPLEMENTATIONS if given.device == "cuda" or name != EAGER]
    results: dict[str, Any] = {}
    for name in names:
        one = measure.attempt(
            lambda name=name: bench(name, policy, work, given.repetitions, given.profile and not results)
        )
        results[name] = {"failed": one.reason} if isinstance(one, Failed) else one
        found = measure.document("bench_decode", argv, device, work=work._asdict(), results=results)
        measure.save(found, given.output)
    measure.show(tables(found))


if __name__ == "__main__":
    main()
