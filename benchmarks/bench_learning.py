"""Runs of GRPO on the demo's model and task, ours and TRL's: speed of learning, and a step's cost.

    python -m lowmem_grpo.benchmarks.bench_learning [--seeds 0 1 2] [--steps 60] [--only NAME ...] [--output FILE]

Same 4-bit base, LoRA, prompts a step, group size and hyper-parameters (demo.run.recipe). Each run has a process of its
own, and the implementations take turns; what is measured is in trainers.py. Accuracy is greedy, by `model.generate` for
everyone, on held-out sums, every 5 steps.
"""

import json
import tempfile
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.trainers import IMPLEMENTATIONS, Job, Results, in_turns, train_with
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe

HELD_OUT = 128  # sums of an evaluation
TARGET = 0.9


@torch.no_grad()
def accuracy(tokenizer, model) -> float:
    """Share of right greedy completions; draws no random number."""
    rows = task.rows(task.splits()[1][:HELD_OUT])
    texts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    was_training = model.training
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=32, use_cache=True)
    model.train(was_training)
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = task.answer_reward([[{"content": answer}] for answer in answers], [row["solution"] for row in rows])
    return sum(right) / len(right)


def run_one(name: str, seed: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = replace(recipe(folder, seed), max_steps=steps, save_steps=10**6)
        rewards = [task.answer_reward, task.tag_format_reward]
        evaluate = partial(accuracy, AutoTokenizer.from_pretrained(str(MODEL)))
        return train_with(name, Job(str(MODEL), task.rows(task.splits()[0]), rewards, config, 32, evaluate))


def steps_to(curve: list[list[float]], target: float) -> float | None:
    return next((step for step, value in curve if value >= target), None)


def tables(found: dict[str, Any]) -> str:
    """The document as a table for people: a row an implementation, medians over the seeds that ran."""
    header = [
        "implementation", "accuracy at the end", f"steps to {TARGET:.0%}", f"samples to {TARGET:.0%}",
        "those steps, CPU-s", "step, CPU-ms", "rollout / reference / update, ms", "peak above the model, MiB",
    ]  # fmt: skip
    sampled, rows = recipe("unused", 0), []
    for name, runs in found["results"].items():
        good = [run for run in runs if "failed" not in run]
        if not good:
            rows.append([name, runs[0]["failed"][:40], *[""] * (len(header) - 2)])
            continue
        reached = [steps_to(run["evaluations"], TARGET) for run in good]
        samples = [steps and steps * sampled.prompts_per_step * sampled.num_generations for steps in reached]
        seconds = [steps and steps * run["step_s"] for steps, run in zip(reached, good, strict=True)]
        phases = [median(run["phases_s"][phase] for run in good) for phase in ("rollout", "reference", "update")]
        rows.append(
            [
                name,
                ", ".join(f"{run['evaluations'][-1][1]:.2f}" for run in good),
                _each(reached), _each(samples), _each(seconds, ".1f"),
                f"{1e3 * median(run['step_s'] for run in good):.0f}",
                " / ".join(f"{1e3 * phase:.0f}" for phase in phases),
                f"{median(run['peak_mib'] for run in good):.0f}",
            ]
        )  # fmt: skip
    return measure.markdown_table(header, rows)


def _each(values: list[float | None], form: str = ".0f") -> str:
    return ", ".join("never" if value is None else format(value, form) for value in values)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=measure.positive, default=60)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--one", choices=IMPLEMENTATIONS, help="run this alone, here, and print its result")
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: does everything run?")
    given = parser.parse_args(argv)
    if given.quick:
        given.seeds, given.steps = given.seeds[:1], 2
    if given.one:
        print(json.dumps(run_one(given.one, given.seeds[0], given.steps)))
        return
    work = {"seeds": given.seeds, "steps": given.steps}

    def document(results: Results) -> dict[str, Any]:
        return measure.document("bench_learning", argv, torch.device("cpu"), work=work, results=results)

    turns = [["--seeds", str(seed), "--steps", str(given.steps)] for seed in given.seeds]
    results = in_turns(
        "lowmem_grpo.benchmarks.bench_learning", given.only, turns,
        save=lambda results: measure.save(document(results), given.output),
    )  # fmt: skip
    measure.show(tables(document(results)))


if __name__ == "__main__":
    main()
