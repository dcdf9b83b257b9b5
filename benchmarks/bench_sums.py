"""A real pretrained model learns sums of two-digit numbers: ours and TRL's GRPOTrainer, beside each other.

    python -m lowmem_grpo.benchmarks.bench_sums --model FOLDER [--seeds 0 1 2] [--steps 40] [--only NAME ...]
        [--output FILE]

FOLDER holds a small base or chat model, SmolLM2-135M for one. A prompt is three worked sums and a fourth that is left
open; a completion ends at its line's end, since for everyone every token with a line break ends it. 2,000 sums to train
on, and 200 others on which each evaluation is greedy, by `model.generate` for everyone. "rewards shuffled" hands the
rewards of a step around among its completions: nothing is to be learned from them. Each run has a process of its own.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.trainers import OURS, TRL_VARIANTS, Job, Results, in_turns, train_with
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.evaluation.statistics import confidence_interval

SHUFFLED = f"{OURS}, rewards shuffled"
NAMES = (OURS, SHUFFLED, *TRL_VARIANTS)
WORKED = "23 + 45 = 68\n71 + 19 = 90\n36 + 58 = 94\n"
HELD_OUT = 200


def rows() -> tuple[list[dict], list[dict]]:
    """The sums to train on and those held out, which share none."""
    pairs = list(product(range(10, 100), repeat=2))
    random.Random(0).shuffle(pairs)
    made = [{"prompt": f"{WORKED}{a} + {b} =", "solution": str(a + b)} for a, b in pairs[: 2000 + HELD_OUT]]
    return made[:2000], made[2000:]


def sum_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """1 where the first line is the solution."""
    answers = [text.strip().partition("\n")[0].strip() for text in completions]
    return [float(answer == right) for answer, right in zip(answers, solution, strict=True)]


def shuffled_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    rewards = sum_reward(completions, solution)
    random.Random("".join(completions)).shuffle(rewards)
    return rewards


@torch.no_grad()
def evaluate(tokenizer: Any, held_out: list[dict], model: Any) -> float:
    """Share of right greedy completions; draws no random number."""
    was_training, right = model.training, []
    model.eval()
    for first in range(0, len(held_out), 50):
        part = held_out[first : first + 50]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            out = model.generate(**inputs, do_sample=False, max_new_tokens=8, use_cache=True)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum_reward(texts, [row["solution"] for row in part])
    model.train(was_training)
    return sum(right) / len(right)


def with_line_ends(model: Path, folder: Path) -> Path:
    """The model's folder, in which every token with a line break ends a completion."""
    shutil.copytree(model, folder, copy_function=lambda source, target: Path(target).symlink_to(Path(source).resolve()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text())
    generation.unlink()
    breaks = [index for index in range(len(tokenizer)) if "\n" in tokenizer.decode([index])]
    settings["eos_token_id"] = sorted({tokenizer.eos_token_id, *breaks})
    generation.write_text(json.dumps(settings))
    return folder


def run_one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    train, held_out = rows()
    with tempfile.TemporaryDirectory() as folder:
        model = with_line_ends(Path(given.model), Path(folder, "model"))
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = GRPOConfig(
            output_dir=f"{folder}/out", seed=given.seeds[0], use_cpu=not torch.cuda.is_available(),
            max_steps=given.steps, max_completion_length=8, learning_rate=1e-4, lr_scheduler_type="constant",
            save_steps=10**6, gradient_checkpointing=False,
        )  # fmt: skip
        job = Job(
            str(model), train, [shuffled_reward if name == SHUFFLED else sum_reward], config,
            max(len(tokenizer(row["prompt"]).input_ids) for row in train),
            partial(evaluate, tokenizer, held_out), given.every,
        )  # fmt: skip
        return train_with(OURS if name == SHUFFLED else name, job)


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people: a row a run."""
    clock = "s" if "gpu" in found["machine"] else "CPU s"
    steps = found["work"]["steps"]
    shown = [step for step in range(0, steps + 1) if step % found["work"]["every"] == 0]
    header = [
        f"{found['work']['model']}, right of {HELD_OUT} held-out sums, by step", "seed", *map(str, shown),
        f"step, {clock}", "peak above the model, MiB", "sampling difference at the end, mean",
    ]  # fmt: skip
    table = []
    for name, runs in found["results"].items():
        for seed, run in zip(found["work"]["seeds"], runs, strict=False):
            if "failed" in run:
                table.append([name, str(seed), run["failed"][:40], *[""] * (len(header) - 3)])
                continue
            curve = dict(map(tuple, run["evaluations"]))
            cells = [_with_interval(curve[step]) if step in curve else "" for step in shown]
            known = [value for value in run["sampling_differences"] if value is not None]
            table.append(
                [
                    name, str(seed), *cells, f"{run['step_s']:.2f}", f"{run['peak_mib']:.0f}",
                    f"{median(known[-5:]):.4f}" if known else "",
                ]
            )  # fmt: skip
    return measure.markdown_table(header, table)


def _with_interval(share: float) -> str:
    right = round(share * HELD_OUT)
    low, high = confidence_interval([1.0] * right + [0.0] * (HELD_OUT - right))
    return f"{share:.3f} ({low:.2f} to {high:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder of a real model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=measure.positive, default=40)
    parser.add_argument("--every", type=measure.positive, default=20, help="steps from evaluation to evaluation")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[OURS, SHUFFLED, "TRL, no checkpointing"])
    parser.add_argument("--one", choices=NAMES, help="run this alone, here, and print its result")
    given = parser.parse_args(argv)
    if not (Path(given.model) / "config.json").is_file():
        parser.error(f"--model {given.model} is no model folder")
    if given.one:
        print(json.dumps(run_one(given.one, given)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = {"model": Path(given.model).resolve().name, **{n: getattr(given, n) for n in ("seeds", "steps", "every")}}
    shown = [word.replace(given.model, work["model"]) for word in (sys.argv[1:] if argv is None else argv)]

    def document(results: Results) -> dict[str, Any]:
        return measure.document("bench_sums", shown, device, work=work, results=results)

    turns = [
        [f"--model={given.model}", f"--seeds={seed}", f"--steps={given.steps}", f"--every={given.every}"]
        for seed in given.seeds
    ]
    results = in_turns(
        "lowmem_grpo.benchmarks.bench_sums", given.only, turns,
        save=lambda results: measure.save(document(results), given.output),
    )  # fmt: skip
    measure.show(tables(document(results)))


if __name__ == "__main__":
    main()
