"""One GRPO step, ours, TRL's and Unsloth's: its time by phase, and its memory above the loaded model.

    python -m lowmem_grpo.benchmarks.bench_step [--shape tiny-large-vocabulary] [--prompts 4] [--num_generations 8]
        [--prompt_length 256] [--max_completion_length 64] [--steps 4] [--only NAME ...] [--output FILE]

A 4-bit model with random weights, LoRA of rank 16 on every linear layer, beta 0.04, prompts of exactly --prompt_length
tokens. It hardly ever ends a completion, so that all have the full length: the case in which TRL wastes least. On CUDA
where there is a GPU, and only there with Unsloth. Each implementation has a process of its own; what is measured is in
trainers.py.
"""

import argparse
import json
import string
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from lowmem_grpo.benchmarks import forked, measure, trainers
from lowmem_grpo.benchmarks.random_model import SHAPES, make_random_model
from lowmem_grpo.benchmarks.trainers import UNSLOTH, Job, Results, in_turns, train_with
from lowmem_grpo.config.grpo import GRPOConfig

IMPLEMENTATIONS = (*trainers.IMPLEMENTATIONS, UNSLOTH)
QUICK = dict(shape="tiny", prompts=2, num_generations=2, prompt_length=16, max_completion_length=4, steps=2)


def id_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    """A reward that differs within a group, whatever a random model says."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def run_one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    draw = Random(0)
    rows = [
        {"prompt": "".join(draw.choices(string.ascii_letters, k=given.prompt_length))}
        for _ in range(given.prompts * given.steps)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(given.model or folder + "/model")
        if not model.exists():
            make_random_model(given.shape, None, model)
        cuda = torch.cuda.is_available()
        config = GRPOConfig(
            output_dir=folder + "/out", use_cpu=not cuda, max_steps=given.steps, prompts_per_step=given.prompts,
            num_generations=given.num_generations, max_completion_length=given.max_completion_length,
            max_prompt_length=given.prompt_length, beta=0.04, save_steps=10**6, gradient_checkpointing=cuda,
            model_init_kwargs=None if cuda else {"attn_implementation": "eager"},
        )  # fmt: skip
        return train_with(name, Job(str(model), rows, [id_reward], config, given.prompt_length))


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    rows, work = [], found["work"]
    for name, (result,) in found["results"].items():
        if "failed" in result:
            rows.append([name, result["failed"][:40], "", ""])
            continue
        phases = " / ".join(f"{result['phases_s'][phase]:.2f}" for phase in ("rollout", "reference", "update"))
        rows.append([name, f"{result['step_s']:.2f}", phases, f"{result['peak_mib']:.0f}"])
    clock = "s" if "gpu" in found["machine"] else "CPU s"
    title = (
        f"{work['shape']}: {work['prompts']} prompts of {work['prompt_length']} x {work['num_generations']} of "
        f"{work['max_completion_length']}"
    )
    header = [title, f"step, {clock}", f"rollout / reference / update, {clock}", "peak above the model, MiB"]
    return measure.markdown_table(header, rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-large-vocabulary")
    parser.add_argument("--model", help="folder of the model, made by random_model where it is not there yet")
    parser.add_argument("--prompts", type=measure.positive, default=4)
    parser.add_argument("--num_generations", type=measure.positive, default=8)
    parser.add_argument("--prompt_length", type=measure.positive, default=256)
    parser.add_argument("--max_completion_length", type=measure.positive, default=64)
    parser.add_argument("--steps", type=measure.positive, default=4, help="the first one is not counted")
    # On a GPU everything is as on a GPU; Unsloth runs nowhere else.
    elsewhere = "as on a GPU" if torch.cuda.is_available() else UNSLOTH
    usual = [name for name in IMPLEMENTATIONS if not name.endswith(elsewhere)]
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=usual)
    parser.add_argument("--one", choices=IMPLEMENTATIONS, help="run this alone, here, and print its result")
    parser.add_argument("--limit_s", type=measure.positive, help="seconds after which one of them is given up")
    parser.add_argument("--quick", action="store_true", help="a tiny model and lengths: does everything run?")
    given = parser.parse_args(argv)
    if given.steps < 2:
        parser.error(f"--steps {given.steps} leaves none to count; give at least 2")
    if given.quick:
        vars(given).update(QUICK)
    if given.one:
        print(json.dumps(run_one(given.one, given)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("shape", "prompts", "num_generations", "prompt_length", "max_completion_length", "steps")
    work = {name: getattr(given, name) for name in names}

    def document(results: Results) -> dict[str, Any]:
        return measure.document("bench_step", argv, device, work=work, results=results)

    with tempfile.TemporaryDirectory() as folder:  # one model for all
        model = Path(given.model or folder + "/model")
        if not model.exists():  # in none of the processes that are measured
            forked.aside(make_random_model, given.shape, None, model)
        arguments = [*(f"--{name}={value}" for name, value in work.items()), f"--model={model}"]
        results = in_turns(
            "lowmem_grpo.benchmarks.bench_step", given.only, [arguments],
            save=lambda results: measure.save(document(results), given.output), limit_s=given.limit_s,
        )  # fmt: skip
    measure.show(tables(document(results)))


if __name__ == "__main__":
    main()
