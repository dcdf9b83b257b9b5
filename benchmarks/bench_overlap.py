"""Sampling with steps whose kernels overlap, and without: is it faster, and the same to the last bit?

    python -m lowmem_grpo.benchmarks.bench_overlap [--shape tiny] [--longest 256] [--turns 3] [--choose] [--output FILE]

Each turn draws the same completions without, with, and once more without; a token's log-probability hangs on all of
its logits. 64, 8 and 1 of the full length: a step is a rollout less one of half the length. And 64 uneven ones, which
one token in 100 of the vocabulary ends. --choose keeps for this card whether kernels overlap from now on: where nothing
differed and steps were 2 % faster in the geometric mean. The model is random, in 4-bit, with LoRA adapters.
"""

import json
import math
import os
import statistics
from functools import cache, partial
from typing import Any

import torch

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.bench_decode import NEVER
from lowmem_grpo.benchmarks.bench_rollout import Work, make_policy
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.benchmarks.random_model import NAMES
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.kernels import overlap
from lowmem_grpo.model.policy import Policy

KINDS = WITHOUT, WITH, _ = "without", "with", "without, again"
ROWS = (64, 8, 1)
UNEVEN = "64, uneven"
GAIN = 1.02


@cache  # what a first rollout learns and captures serves the later ones
def sampler_of(policy: Policy, length: int, on: bool) -> Sampler:
    sampler = Sampler(policy, GRPOConfig(max_completion_length=length, rollout_weights="4bit"))
    sampler.captures.overlap = on
    return sampler


def rollouts(policy: Policy, work: Work, turns: int) -> dict[str, Any]:
    """Median seconds of a rollout by kind, steps replayed with overlap, and in how many rollouts a number differed."""
    prompts, on = [Prompt("", ids, {}) for ids in work.texts()], overlap.can_overlap(torch.device(work.device))
    samplers = {kind: sampler_of(policy, work.max_completion_length, on and kind == WITH) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    drawn: dict[str, list[Completion]] = {}
    replayed, differing, farthest = 0, dict.fromkeys(KINDS[1:], 0), dict.fromkeys(KINDS[1:], 0.0)

    def draw(kind: str, turn: int) -> None:
        torch.manual_seed(turn)
        drawn[kind] = samplers[kind].complete(prompts, work.num_generations).completions

    for turn in range(turns + 1):  # the first one captures
        for kind in KINDS:
            seconds[kind].append(measure.seconds_of(partial(draw, kind), turn, torch.device(work.device)))
            if kind == WITH:
                replayed += samplers[WITH].captures.counts.replayed
        for kind in KINDS[1:]:
            distance = max(map(difference, drawn[kind], drawn[WITHOUT]))
            differing[kind] += distance > 0
            farthest[kind] = max(farthest[kind], distance)
    return {
        "rollout_s": {kind: statistics.median(values[1:]) for kind, values in seconds.items()},
        "rollouts": turns + 1, "replayed": replayed, "differing": differing, "farthest": farthest,
        "overlapped": samplers[WITH].captures.overlap,
    }  # fmt: skip


def difference(one: Completion, other: Completion) -> float:
    """The largest difference of two completions' log-probabilities, or 1000 where a token differs."""
    assert one.logprobs is not None and other.logprobs is not None, "the engine knows them"
    return (one.logprobs - other.logprobs).abs().max().item() if one.ids == other.ids else 1000.0


def steps(policy: Policy, work: Work, turns: int) -> dict[str, Any]:
    """Results of rollouts(), those of half the length as `half`, and seconds of a step by kind as `steps`."""
    whole, length = rollouts(policy, work, turns), work.max_completion_length
    half = rollouts(policy, work._replace(max_completion_length=length // 2), turns)
    per_token = length - length // 2
    step_s = {kind: (took - half["rollout_s"][kind]) / per_token for kind, took in whole["rollout_s"].items()}
    return {**whole, "half": half, "steps": step_s}


def is_faster(results: dict[str, dict[str, Any]]) -> bool:
    """Tell whether kernels overlapped, changed nothing, and made steps faster by GAIN."""
    runs = [run for result in results.values() for run in (result, result.get("half", result))]
    if not all(run.get("overlapped") and run["replayed"] and not run["differing"][WITH] for run in runs):
        return False
    steps_s = [result["steps"] for result in results.values() if "steps" in result]
    return math.prod(step[WITHOUT] / step[WITH] for step in steps_s) >= GAIN ** len(steps_s)


def keep(card: str, chosen: bool) -> None:
    """Write what was chosen to where sampling looks for it, beside what other cards have."""
    path = overlap.table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({**overlap.measured(), card: chosen}, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def tables(found: dict[str, Any]) -> str:
    """The document as a table for people."""
    body = []
    for name, result in found["results"].items():
        if "failed" in result:
            body.append([name, result["failed"], *[""] * 5])
            continue
        runs = [result, result["half"]] if "half" in result else [result]
        count, replayed = (sum(run[key] for run in runs) for key in ("rollouts", "replayed"))
        for kind, took in result["rollout_s"].items():
            step = f"{1e3 * result['steps'][kind]:.3f}" if "steps" in result else ""
            differing, farthest = "", ""
            if kind != WITHOUT:
                differing = f"{sum(run['differing'][kind] for run in runs)} of {count}"
                farthest = f"{max(run['farthest'][kind] for run in runs):.1g}"
            given_up = kind == WITH and not all(run["overlapped"] for run in runs)
            label = kind + (", not done" if given_up else "")
            counted = f"{replayed}" if kind == WITH else ""
            body.append([name, label, step, f"{took:.3f}", differing, farthest, counted])
    clock = "" if found["work"]["device"] == "cuda" else "CPU "
    header = [
        f"{found['work']['shape']}, completions", "overlap", f"a step, {clock}ms", f"a rollout, {clock}s",
        "rollouts that differ", "by, at most", "steps replayed",
    ]  # fmt: skip
    return measure.markdown_table(header, body)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=NAMES, default="tiny")
    parser.add_argument("--prompt_length", type=measure.positive, default=256)
    parser.add_argument("--longest", type=measure.positive, default=256, help="tokens of a completion, 2 at least")
    parser.add_argument("--turns", type=measure.positive, default=3, help="rollouts of a kind, after a first one")
    parser.add_argument("--choose", action="store_true", help="keep for this card whether kernels overlap from now on")
    parser.add_argument("--quick", action="store_true", help="tiny lengths: does everything run?")
    measure.add_device(parser)
    given = parser.parse_args(argv)
    if given.longest < 2:
        parser.error(f"--longest {given.longest} has no half; give at least 2")
    if given.quick:
        given.prompt_length, given.longest, given.turns = 8, 4, 1
    device = torch.device(given.device)
    work = Work(given.shape, 8, 8, given.prompt_length, given.longest, NEVER, given.device)
    even, uneven = (make_policy(one) for one in (work, work._replace(mean_length=100)))
    runs = {UNEVEN: partial(rollouts, uneven, work, given.turns)}
    for rows in ROWS:
        of_rows = work._replace(prompts=max(1, rows // 8), num_generations=min(8, rows))
        runs[f"{rows}"] = partial(steps, even, of_rows, given.turns)
    results: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        one = measure.attempt(run)
        results[name] = {"failed": one.reason} if isinstance(one, Failed) else one
        chosen = is_faster(results) if len(results) == len(runs) else None
        found = measure.document("bench_overlap", argv, device, work=work._asdict(), results=results, chosen=chosen)
        measure.save(found, given.output)
    measure.show(tables(found))
    if given.choose:
        keep(torch.cuda.get_device_name(device) if given.device == "cuda" else "cpu", bool(chosen))


if __name__ == "__main__":
    main()
