"""PPO beside methods without a critic: what each takes in memory and time by phase, and how soon it learns.

    python -m lowmem_grpo.benchmarks.bench_ppo [--seeds 0 1 2] [--steps 60] [--only NAME ...] [--output FILE]
    python -m lowmem_grpo.benchmarks.bench_ppo --shape qwen2.5-1.5b --steps 3 [--completions 64] [--prompt_length 256]

On the demo's model and task every method has the same number of completions a step, the same KL, loss and learning
rate; accuracy is greedy, on held-out sums, every 5 steps. --shape takes a model with random weights, of which only
memory and time mean anything. Each run has a process of its own, and the methods take turns.
"""

import argparse
import json
import string
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from lowmem_grpo.benchmarks import forked, measure
from lowmem_grpo.benchmarks.bench_learning import TARGET, accuracy, steps_to
from lowmem_grpo.benchmarks.bench_step import id_reward
from lowmem_grpo.benchmarks.random_model import SHAPES, make_random_model
from lowmem_grpo.benchmarks.trainers import Job, Results, in_turns, run_ours
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe

GROUP = 8
ALONE = dict(num_generations=1)
PPO = dict(**ALONE, adv_estimator="gae", critic_learning_rate=3e-3)
METHODS: dict[str, dict[str, Any]] = {
    "GRPO, groups of 8": dict(num_generations=GROUP),
    "RLOO, groups of 8": dict(num_generations=GROUP, adv_estimator="rloo"),
    "REINFORCE++, one a prompt": dict(**ALONE, adv_estimator="reinforce_plus_plus"),
    "PPO, one a prompt": PPO,
    "PPO, warm-up of 10 steps": dict(**PPO, critic_warmup=10),
}
DEMO = "demo"
PHASES = ("rollout", "reference", "values", "update", "critic")


def run_one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    method = METHODS[name]
    sizes = dict(prompts_per_step=given.completions // method["num_generations"], max_steps=given.steps)
    if given.steps <= method.get("critic_warmup", 0):
        method = {**method, "critic_warmup": given.steps - 1}
    with tempfile.TemporaryDirectory() as folder:
        if given.shape == DEMO:
            config = replace(recipe(folder, given.seeds[0]), save_steps=10**6, doctor="off", **{**method, **sizes})
            evaluate = partial(accuracy, AutoTokenizer.from_pretrained(str(MODEL)))
            rewards = [task.answer_reward, task.tag_format_reward]
            return run_ours(Job(str(MODEL), task.rows(task.splits()[0]), rewards, config, 32, evaluate))
        model, cuda, draw = Path(given.model), torch.cuda.is_available(), Random(0)
        if not model.exists():
            make_random_model(given.shape, None, model)
        rows = [
            {"prompt": "".join(draw.choices(string.ascii_letters, k=given.prompt_length))}
            for _ in range(given.completions * given.steps)
        ]
        config = GRPOConfig(
            output_dir=folder + "/out", use_cpu=not cuda, max_completion_length=given.max_completion_length,
            max_prompt_length=given.prompt_length, beta=0.02, save_steps=10**6, doctor="off",
            model_init_kwargs=None if cuda else {"attn_implementation": "eager"}, **{**method, **sizes},
        )  # fmt: skip
        return run_ours(Job(str(model), rows, [id_reward], config, given.prompt_length))


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people: a row a method, medians over the seeds that ran."""
    work, clock = found["work"], "ms" if "gpu" in found["machine"] else "CPU-ms"
    learnt, took, peaks = [], [], []
    for name, runs in found["results"].items():
        good = [run for run in runs if "failed" not in run]
        if not good:
            for rows in (learnt, took, peaks):
                rows.append([name, runs[0]["failed"][:40]])
            continue
        if good[0]["evaluations"]:
            reached = [steps_to(run["evaluations"], TARGET) for run in good]
            learnt.append(
                [
                    name, ", ".join(f"{run['evaluations'][-1][1]:.2f}" for run in good), _each(reached),
                    _each([steps and steps * work["completions"] for steps in reached]),
                    _each([steps and steps * run["step_s"] for steps, run in zip(reached, good, strict=True)]),
                ]
            )  # fmt: skip
        took.append([name, f"{1e3 * median(run['step_s'] for run in good):.0f}", *_phases(good, "phases_s", 1e3)])
        peaks.append([name, *_phases(good, "phases_peak_mib", 1.0)])
    headers = [
        ["method", "accuracy at the end", f"steps to {TARGET:.0%}", f"samples to {TARGET:.0%}", "those steps, CPU-s"],
        [f"{clock} of a step", "all", *PHASES],
        ["peak above the model, MiB", *PHASES],
    ]
    parts = zip(headers, (learnt, took, peaks), strict=True)
    return "\n\n".join(
        measure.markdown_table(header, [[*row, *[""] * (len(header) - len(row))] for row in rows])
        for header, rows in parts
        if rows
    )


def _each(values: list[Any]) -> str:
    return ", ".join("never" if value is None else f"{value:.0f}" for value in values)


def _phases(runs: list[dict[str, Any]], what: str, scale: float) -> list[str]:
    """The median over runs of each phase, in words; - where a method has none."""
    return [f"{scale * median(run[what][phase] for run in runs):.0f}" if phase in runs[0][what] else "-"
            for phase in PHASES]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=[DEMO, *SHAPES], default=DEMO)
    parser.add_argument("--model", help="folder of the random model, made where it is not there yet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the demo; others have one run")
    parser.add_argument("--steps", type=measure.positive, default=60)
    parser.add_argument("--completions", type=measure.positive, default=64, help="of a step; a multiple of 8")
    parser.add_argument("--prompt_length", type=measure.positive, default=256, help="tokens, but for the demo's")
    parser.add_argument("--max_completion_length", type=measure.positive, default=128, help="but for the demo's")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--one", choices=METHODS, help="run this alone, here, and print its result")
    parser.add_argument("--limit_s", type=measure.positive, help="seconds after which one of them is given up")
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: does everything run?")
    given = parser.parse_args(argv)
    if given.completions % GROUP:
        parser.error(f"--completions {given.completions} is no multiple of {GROUP}; change it")
    if given.quick:
        given.steps, given.completions = 2, GROUP
        given.prompt_length, given.max_completion_length = 16, 4
    if given.quick or given.shape != DEMO:
        given.seeds = given.seeds[:1]
    if given.steps < 2:
        parser.error(f"--steps {given.steps} leaves none to count; give at least 2")
    if given.one:
        print(json.dumps(run_one(given.one, given)))
        return
    names = ("shape", "steps", "completions", "prompt_length", "max_completion_length")
    work = {name: getattr(given, name) for name in names}
    on_gpu = given.shape != DEMO and torch.cuda.is_available()

    def document(results: Results) -> dict[str, Any]:
        device = torch.device("cuda" if on_gpu else "cpu")
        return measure.document("bench_ppo", argv, device, work={**work, "seeds": given.seeds}, results=results)

    with tempfile.TemporaryDirectory() as folder:  # one model for all
        model = Path(given.model or folder + "/model")
        if given.shape != DEMO and not model.exists():  # in none of the processes that are measured
            forked.aside(make_random_model, given.shape, None, model)
        same = [*(f"--{name}={value}" for name, value in work.items()), f"--model={model}"]
        results = in_turns(
            "lowmem_grpo.benchmarks.bench_ppo", given.only, [[*same, "--seeds", str(seed)] for seed in given.seeds],
            save=lambda results: measure.save(document(results), given.output), limit_s=given.limit_s,
        )  # fmt: skip
    measure.show(tables(document(results)))


if __name__ == "__main__":
    main()
