"""One run of GRPO on the demo's model and task, ours and TRL's: how fast each learns, and what a step costs.

    python -m lowmem_grpo.benchmarks.bench_learning [--seeds 0 1 2] [--steps 60] [--only NAME ...] [--output FILE]
        [--picture FILE.svg]

Same 4-bit base, LoRA, prompts a step, group size and hyper-parameters (demo.run.recipe). Each run has a process of its
own, and the implementations take turns. Time is CPU time of all threads without the evaluations; memory is the peak of
the resident set above the loaded model. Accuracy is greedy, by `model.generate` for everyone, on held-out sums, every 5
steps. bitsandbytes' in-place repacking of weights on AVX512-BF16 CPUs, which spoils training after a rollout, is off
for everyone.
"""

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe
from lowmem_grpo.meter import peak_bytes, reset_peak
from lowmem_grpo.policy import load_policy, load_tokenizer

EVERY = 5  # steps between two evaluations
HELD_OUT = 128  # sums of an evaluation
TARGET = 0.9
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "lowmem_grpo": {},
    "TRL": dict(gradient_checkpointing=True),
    "TRL, no checkpointing": dict(gradient_checkpointing=False),
    "TRL, no checkpointing, eager attention": dict(gradient_checkpointing=False, attn_implementation="eager"),
}


class Watch:
    """CPU time of the run alone, its phases, and the accuracies on the way."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.accuracy: list[tuple[int, float]] = []
        self.step_s: list[float] = []
        self.phases: dict[str, float] = defaultdict(float)
        self.since = time.process_time()

    def step(self, step: int, model) -> None:
        self.step_s.append(time.process_time() - self.since)
        if step % EVERY == 0:
            self.evaluate(step, model)
        self.since = time.process_time()

    def evaluate(self, step: int, model) -> None:
        self.accuracy.append((step, accuracy(model, self.tokenizer)))

    @contextlib.contextmanager
    def phase(self, name: str):
        before = time.process_time()
        yield
        self.phases[name] += time.process_time() - before

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return run


@torch.no_grad()
def accuracy(model, tokenizer) -> float:
    """Share of right greedy answers; draws no random number."""
    rows = task.rows(task.splits()[1][:HELD_OUT])
    texts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    was_training, checkpointing = model.training, getattr(model, "is_gradient_checkpointing", False)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=32, use_cache=True)
    model.train(was_training)
    assert getattr(model, "is_gradient_checkpointing", False) == checkpointing
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = task.answer_reward([[{"content": answer}] for answer in answers], [row["solution"] for row in rows])
    return sum(right) / len(right)


def run_ours(seed: int, steps: int, folder: str) -> dict[str, Any]:
    module = importlib.import_module("lowmem_grpo.train")
    importlib.import_module("lowmem_grpo.meter").time = SimpleNamespace(perf_counter=time.process_time)
    config = replace(recipe(folder, seed), max_steps=steps, save_steps=10**6)
    watch = Watch(load_tokenizer(str(MODEL), config))
    start = {}

    def after_step(step, metrics, policy):
        watch.step(step, policy.base)
        start.setdefault("rewards", []).append(metrics["rewards/answer_reward/mean"])
        for phase in ("rollout", "reference", "update"):
            watch.phases[phase] += metrics[f"time/{phase}_s"]
        start["peak"] = max(start.get("peak", 0), *(v for k, v in metrics.items() if k.endswith("/peak_mib")))

    def loaded(*args, **kwargs):
        policy = load_policy(*args, **kwargs)
        watch.evaluate(0, policy.base)
        reset_peak(policy.device)
        start["bytes"] = peak_bytes(policy.device)
        watch.since = time.process_time()
        return policy

    module.load_policy = loaded  # what train() calls, so that its memory is known
    rewards = [task.answer_reward, task.tag_format_reward]
    module.train(str(MODEL), rewards, task.rows(task.splits()[0]), config=config, callbacks=after_step)
    growth = start["peak"] * 2**20 - start["bytes"]
    return _result(watch, start["rewards"], growth)


def run_trl(seed: int, steps: int, folder: str, gradient_checkpointing: bool, attn_implementation: str = "sdpa"):
    import bitsandbytes
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ours = recipe(folder, seed)
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    args = GRPOConfig(
        output_dir=folder, seed=seed, use_cpu=True, bf16=True, max_steps=steps, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=gradient_checkpointing,
        per_device_train_batch_size=ours.prompts_per_step * ours.num_generations, gradient_accumulation_steps=1,
        num_generations=ours.num_generations, max_completion_length=ours.max_completion_length,
        temperature=ours.temperature, learning_rate=ours.learning_rate, lr_scheduler_type=ours.lr_scheduler_type,
        beta=ours.beta, epsilon=ours.epsilon, loss_type=ours.loss_type, scale_rewards=ours.scale_rewards,
        reward_weights=ours.reward_weights, max_grad_norm=ours.max_grad_norm, weight_decay=ours.weight_decay,
    )  # fmt: skip
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        str(MODEL), quantization_config=quantization, dtype=torch.bfloat16, attn_implementation=attn_implementation,
        device_map="cpu",
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    adapter = LoraConfig(
        r=ours.lora_r, lora_alpha=ours.lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    watch = Watch(tokenizer)

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            watch.step(state.global_step, model)

    trainer = GRPOTrainer(
        model=model, reward_funcs=[task.answer_reward, task.tag_format_reward], args=args,
        train_dataset=Dataset.from_list(task.rows(task.splits()[0])), processing_class=tokenizer, peft_config=adapter,
        callbacks=[Watching()],
    )  # fmt: skip
    trainer._generate = watch.timed("rollout", trainer._generate)
    trainer._generate_and_score_completions = watch.timed("scored", trainer._generate_and_score_completions)
    trainer.training_step = watch.timed("training", trainer.training_step)
    watch.evaluate(0, trainer.model)
    device = torch.device("cpu")
    reset_peak(device)
    loaded = peak_bytes(device)
    watch.since = time.process_time()
    trainer.train()
    growth = peak_bytes(device) - loaded
    scored, training = watch.phases.pop("scored"), watch.phases.pop("training")
    watch.phases |= {"reference": scored - watch.phases["rollout"], "update": training - scored}
    key = "rewards/answer_reward/mean"
    return _result(watch, [line[key] for line in trainer.state.log_history if key in line], growth)


def _result(watch: Watch, rewards: list[float], growth: int) -> dict[str, Any]:
    ordered = sorted(watch.step_s)
    return {
        "accuracy": watch.accuracy,
        "rewards": rewards,
        "step_s": ordered[len(ordered) // 2],
        "phases_s": {name: total / len(watch.step_s) for name, total in watch.phases.items()},
        "peak_mib": growth / 2**20,
    }


def run_one(name: str, seed: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if name == "lowmem_grpo":
            return run_ours(seed, steps, folder)
        return run_trl(seed, steps, folder, **IMPLEMENTATIONS[name])


def in_a_process(name: str, seed: int, steps: int) -> dict[str, Any]:
    """run_one in a fresh interpreter, whose last line is the result."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--steps", str(steps)]
    done = subprocess.run([*command, "--one", name, "--seeds", str(seed)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def steps_to(curve: list[list[float]], target: float) -> float | None:
    return next((step for step, value in curve if value >= target), None)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row an implementation: medians over the seeds that ran."""
    rows = []
    for name, runs in results.items():
        good = [run for run in runs if "failed" not in run]
        if not good:
            rows.append([name, runs[0]["failed"][:40], *[""] * 6])
            continue

        def median(values):
            return sorted(values)[len(values) // 2]

        reached = [steps_to(run["accuracy"], TARGET) for run in good]
        phases = [
            1e3 * median([run["phases_s"][phase] for run in good]) for phase in ("rollout", "reference", "update")
        ]
        rows.append(
            [
                name,
                ", ".join(f"{run['accuracy'][-1][1]:.2f}" for run in good),
                ", ".join("never" if steps is None else f"{steps:.0f}" for steps in reached),
                f"{1e3 * median([run['step_s'] for run in good]):.0f}",
                " / ".join(f"{phase:.0f}" for phase in phases),
                f"{median([run['peak_mib'] for run in good]):.0f}",
            ]
        )  # fmt: skip
    header = [
        "implementation", "accuracy at the end", f"steps to {TARGET:.0%}", "step, CPU-ms",
        "rollout / reference / update, ms", "peak above the model, MiB",
    ]  # fmt: skip
    return measure.markdown_table(header, [row[: len(header)] for row in rows])


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Both curves, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for place, (name, runs) in enumerate(results.items()):
        for index, run in enumerate(run for run in runs if "failed" not in run):
            label = name if index == 0 else None
            axes.plot(*zip(*run["accuracy"], strict=True), color=f"C{place}", alpha=0.7, label=label)
    axes.set(xlabel="step", ylabel="greedy accuracy, held out", ylim=(0, 1.02), title="The demo's task, three seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--one", choices=IMPLEMENTATIONS, help="run this alone, here, and print its result")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="SVG file to draw")
    given = parser.parse_args(argv)
    if given.one:
        print(json.dumps(run_one(given.one, given.seeds[0], given.steps)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    for turn, seed in enumerate(given.seeds):
        first = turn % len(given.only)
        for name in given.only[first:] + given.only[:first]:
            results[name].append(in_a_process(name, seed, given.steps))
            print(f"seed {seed}, {name}: done", file=sys.stderr)
    print(table(results))
    if given.picture:
        draw(results, given.picture)
    if given.output:
        packages = ("torch", "transformers", "bitsandbytes", "peft", "trl")
        found = measure.provenance(torch.device("cpu"), *packages)
        command = f"python -m lowmem_grpo.benchmarks.bench_learning --steps {given.steps}"
        text = json.dumps({**found, "command": command, "seeds": given.seeds, "results": results}, indent=1)
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
