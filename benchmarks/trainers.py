"""One training run each of lowmem_grpo, TRL and Unsloth, on the same model, data and hyper-parameters, watched.

bitsandbytes' in-place repacking of weights on AVX512-BF16 CPUs, which spoils training after a rollout, is off for both.
Times are CPU time of all threads, on CUDA the clock after it has finished. Memory is the peak of the steps above the
loaded model; the trial of a longest micro-batch, by which ours begins on CUDA, is not counted. Rewards are in ours'
rollout and in TRL's reference; the optimizer's step is in ours' update, and of TRL's in the whole step alone. Unsloth,
which needs CUDA, is TRL's trainer as Unsloth patches it, without vLLM.
"""

import contextlib
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from lowmem_grpo.benchmarks import forked, measure
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.run.meter import peak_bytes, reset_peak

# What TRL is run with; ours has one way.
TRL_VARIANTS: dict[str, dict[str, Any]] = {
    "TRL": dict(gradient_checkpointing=True),
    "TRL, no checkpointing": dict(gradient_checkpointing=False),
    "TRL, no checkpointing, eager attention": dict(gradient_checkpointing=False, attn_implementation="eager"),
    "TRL, no checkpointing, as on a GPU": dict(gradient_checkpointing=False, as_on_a_gpu=True),
}
OURS, UNSLOTH = "lowmem_grpo", "Unsloth"
IMPLEMENTATIONS = (OURS, *TRL_VARIANTS)
NEEDS = {**dict.fromkeys(TRL_VARIANTS, "trl"), UNSLOTH: "unsloth"}  # the module that has to be installed
# Unsloth patches torch, transformers, peft and TRL, and has to be imported before them.
AFTER_UNSLOTH = "import unsloth, runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


@dataclass(frozen=True)
class Job:
    """The training that both do."""

    model: str  # folder
    data: list[dict]
    rewards: list[Callable]
    config: GRPOConfig
    prompt_length: int  # tokens of the longest prompt
    evaluate: Callable[[Any], float] | None = None  # of the model that generates, every `every` steps
    every: int = 5

    @property
    def rows(self) -> int:
        """Completions of a micro-batch of TRL's: as many as keep to the token_budget that ours keeps to."""
        config = self.config
        completions = config.prompts_per_step * config.num_generations
        fitting = config.token_budget // (self.prompt_length + config.max_completion_length)
        return max(n for n in range(1, completions + 1) if completions % n == 0 and n <= max(1, fitting))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.config.use_cpu else "cuda")


class Watch:
    """Seconds of each step without the evaluations, of its phases, and what the evaluations said."""

    def __init__(self, job: Job):
        self.job = job
        self.evaluations: list[tuple[int, float]] = []
        self.step_s: list[float] = []
        self.phases: dict[str, list[float]] = defaultdict(list)
        self.phase_peaks: dict[str, float] = {}  # MiB with the model, of ours
        self.rewards: list[float] = []
        self.sampling_differences: list[float | None] = []  # mean of a step, of ours; None where nothing was compared
        self.loaded_bytes, self.peak = 0, 0

    def now(self) -> float:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def start(self, model: Any) -> None:
        """The model is loaded, and the first step is about to begin."""
        self.evaluate(0, model)
        measure.give_back_free_memory()
        reset_peak(self.job.device)
        self.loaded_bytes = (
            torch.cuda.memory_allocated() if self.job.device.type == "cuda" else peak_bytes(self.job.device)
        )
        self.since = self.now()

    def step(self, step: int, model: Any) -> None:
        self.step_s.append(self.now() - self.since)
        self.peak = max(self.peak, peak_bytes(self.job.device))
        if step % self.job.every == 0:
            self.evaluate(step, model)
        reset_peak(self.job.device)
        self.since = self.now()

    def evaluate(self, step: int, model: Any) -> None:
        if self.job.evaluate:
            self.evaluations.append((step, self.job.evaluate(model)))

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            before = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases[name].append(self.now() - before)

        return run

    def result(self, peak: int) -> dict[str, Any]:
        """Medians over the steps but the first, which prepares what stays; peak is without that of evaluations."""

        def median(values: list[float]) -> float:
            return statistics.median(values[1:] or values)

        return {
            "evaluations": self.evaluations, "rewards": self.rewards,
            "sampling_differences": self.sampling_differences, "step_s": median(self.step_s),
            "phases_s": {name: median(values) for name, values in self.phases.items()},
            "peak_mib": (peak - self.loaded_bytes) / 2**20,
            "phases_peak_mib": {name: most - self.loaded_bytes / 2**20 for name, most in self.phase_peaks.items()},
        }  # fmt: skip


def train_with(name: str, job: Job) -> dict[str, Any]:
    if name == OURS:
        return run_ours(job)
    return run_trl(job, by_unsloth=True) if name == UNSLOTH else run_trl(job, **TRL_VARIANTS[name])


def run_ours(job: Job) -> dict[str, Any]:
    watch, peaks = Watch(job), []
    meter: Any = importlib.import_module("lowmem_grpo.run.meter")
    meter.time = SimpleNamespace(perf_counter=watch.now)
    first = f"rewards/{job.rewards[0].__name__}/mean"

    def loaded(*args, **kwargs):
        policy = load_policy(*args, **kwargs)
        watch.start(policy.base)
        return policy

    def after_step(step, metrics, policy):
        watch.step(step, policy.base)
        watch.rewards.append(metrics[first])
        difference = metrics.get("sampling/sampling_logp_difference/mean", math.nan)
        watch.sampling_differences.append(difference if math.isfinite(difference) else None)
        now = {key.split("/")[1]: value for key, value in metrics.items() if key.endswith("/peak_mib")}
        for phase, value in now.items():
            watch.phases[phase].append(metrics[f"time/{phase}_s"])
            watch.phase_peaks[phase] = max(value, watch.phase_peaks.get(phase, 0.0))
        peaks.append(max(now.values()))

    # What train() calls, in this process, which has no other use: time and memory are the run's from here on.
    inputs: Any = importlib.import_module("lowmem_grpo.inputs.training")
    inputs.load_policy = loaded
    train(job.model, job.rewards, job.data, config=job.config, callbacks=after_step)
    return watch.result(int(max(peaks) * 2**20))


def run_trl(
    job: Job,
    gradient_checkpointing: bool = True,
    attn_implementation: str = "sdpa",
    as_on_a_gpu: bool = False,
    by_unsloth: bool = False,
) -> dict[str, Any]:
    """One run of TRL's GRPOTrainer, or of what Unsloth makes of it, watched.

    as_on_a_gpu takes two things away that TRL does on a CPU alone: it scores the prompts' positions too, and `generate`
    gives the head a strided slice, for which a CPU copies the whole head once a row.
    """
    from transformers import TrainerCallback

    watch = Watch(job)

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            watch.step(state.global_step, model)

    if by_unsloth:
        trainer = unsloth_trainer(job, Watching())
    else:
        trainer = trl_trainer(job, gradient_checkpointing, attn_implementation, Watching())
    if as_on_a_gpu:
        trainer.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    trainer._generate = watch.timed("rollout", trainer._generate)
    trainer._generate_and_score_completions = watch.timed("scored", trainer._generate_and_score_completions)
    trainer.training_step = watch.timed("training", trainer.training_step)
    watch.start(trainer.model)
    with prompts_unscored() if as_on_a_gpu else contextlib.nullcontext():
        trainer.train()
    scored, training = watch.phases.pop("scored"), watch.phases.pop("training")
    watch.phases["reference"] = [a - b for a, b in zip(scored, watch.phases["rollout"], strict=True)]
    parts = len(training) // len(scored)  # micro-batches of a step
    training = [sum(training[start : start + parts]) for start in range(0, len(training), parts)]
    watch.phases["update"] = [a - b for a, b in zip(training, scored, strict=True)]
    first = f"rewards/{job.rewards[0].__name__}/mean"
    watch.rewards = [line[first] for line in trainer.state.log_history if first in line]
    return watch.result(watch.peak)


@contextlib.contextmanager
def prompts_unscored() -> Iterator[None]:
    """Keep TRL from scoring the prompts' positions, as on a GPU; without Triton it would score them."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    before = utils._use_triton  # which positions are scored, and no more
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def trl_trainer(job: Job, gradient_checkpointing: bool, attn_implementation: str, *callbacks: Any) -> Any:
    """TRL's GRPOTrainer for the same job: NF4 with double quantization, LoRA on every linear layer."""
    from bitsandbytes.nn.modules import Linear4bit
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    ours = job.config
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        job.model, quantization_config=quantization, dtype=torch.bfloat16, attn_implementation=attn_implementation,
        device_map=str(job.device),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    adapter = LoraConfig(
        r=ours.lora_r, lora_alpha=ours.lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return GRPOTrainer(
        model=model, reward_funcs=[*job.rewards], args=_trl_config(GRPOConfig, job, gradient_checkpointing),
        train_dataset=Dataset.from_list(job.data), processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter, callbacks=list(callbacks),
    )  # fmt: skip


def unsloth_trainer(job: Job, *callbacks: Any) -> Any:
    """Unsloth's GRPOTrainer for the same job, without vLLM, by https://docs.unsloth.ai; it was not run here yet."""
    from datasets import Dataset
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]: for CUDA alone

    trl: Any = importlib.import_module("trl")  # whose trainer and configuration Unsloth has replaced by its own
    ours = job.config
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=job.prompt_length + ours.max_completion_length, load_in_4bit=True,
        fast_inference=False, max_lora_rank=ours.lora_r, dtype=torch.bfloat16,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=ours.lora_r, lora_alpha=ours.lora_alpha, lora_dropout=0.0, use_gradient_checkpointing="unsloth",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        random_state=ours.seed,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model, reward_funcs=[*job.rewards], args=_trl_config(trl.GRPOConfig, job, gradient_checkpointing=True),
        train_dataset=Dataset.from_list(job.data), processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip


def _trl_config(kind: Any, job: Job, gradient_checkpointing: bool) -> Any:
    ours = job.config
    return kind(
        output_dir=ours.output_dir, seed=ours.seed, use_cpu=ours.use_cpu, bf16=True, max_steps=ours.max_steps,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=gradient_checkpointing,
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=ours.prompts_per_step * ours.num_generations // job.rows,
        num_generations=ours.num_generations, max_completion_length=ours.max_completion_length,
        temperature=ours.temperature, learning_rate=ours.learning_rate, lr_scheduler_type=ours.lr_scheduler_type,
        beta=ours.beta, epsilon=ours.epsilon, loss_type=ours.loss_type, scale_rewards=ours.scale_rewards,
        reward_weights=ours.reward_weights, max_grad_norm=ours.max_grad_norm, weight_decay=ours.weight_decay,
    )  # fmt: skip


Results = dict[str, list[dict[str, Any]]]  # of each implementation that has any, a run a turn


def in_turns(
    module: str,
    names: list[str],
    turns: list[list[str]],
    save: Callable[[Results], None],
    limit_s: float | None = None,
) -> Results:
    """Each implementation's results, one a turn, each by `python -m module --one NAME ...` in a process of its own.

    The order rotates from turn to turn. What there is goes to save() after each. limit_s is of one process.
    """
    results: Results = {}
    for turn, arguments in enumerate(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in NEEDS and measure.missing(NEEDS[name]):
                found = {"failed": measure.NOT_INSTALLED}
            else:
                begun = ["-c", AFTER_UNSLOTH] if name == UNSLOTH else ["-m"]
                found = _in_a_process([sys.executable, *begun, module, "--one", name, *arguments], limit_s)
            results.setdefault(name, []).append(found)
            save(results)
            print(f"turn {turn}, {name}: done", file=sys.stderr)
    return results


def _in_a_process(command: list[str], limit_s: float | None = None) -> dict[str, Any]:
    """The last line of a program's output, as JSON, or the last line of its error."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = forked.start(command, files=(output, errors))
        try:
            status = forked.wait(process, limit_s)
        finally:
            process.kill()
            process.join()
        for file in (output, errors):
            file.seek(0)
        said, wrong = output.read(), errors.read()
    if status is None:
        return {"failed": f"{measure.NOT_DONE} {limit_s or 0:.0f} s"}
    if status:
        print(wrong[-2000:], file=sys.stderr)
        if status < 0:
            return {"failed": measure.ended_by(status, "bad_alloc" in wrong)}
        last = (wrong.strip().splitlines() or ["no message"])[-1]
        memory = "can't allocate memory" in last or "out of memory" in last
        return {"failed": measure.OUT_OF_MEMORY if memory else last}
    return json.loads(said.splitlines()[-1])
