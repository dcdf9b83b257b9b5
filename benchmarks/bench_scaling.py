"""Time and memory of one update's gradient against completion length, group size and vocabulary: ours and the peers'.

    python -m lowmem_grpo.benchmarks.bench_scaling [--shape NAME] [--sweep NAME ...] [--only NAME ...] [--output FILE]

One prompt, its group of completions in one micro-batch, a 4-bit model with random weights, LoRA of rank 16 on every
linear layer, activation checkpointing, no KL: every implementation learns from the same tokens. TRL's is GRPOTrainer's
own loss at its defaults; on a CPU it scores the prompts' positions too, and "as on a GPU" not. Liger's is its fused
linear GRPO loss, and full logits are what a plain loop does; both on the model that TRL prepares. Peak memory is above
the loaded model. Each size is one call, after a small one: the fitted slopes, and not single times, are the result. A
size that is out of memory ends its row.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.measure import Failed, Once
from lowmem_grpo.benchmarks.random_model import SHAPES, make_random_model
from lowmem_grpo.benchmarks.trainers import Job, prompts_unscored, trl_trainer
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.passes import backward
from lowmem_grpo.update.token_metrics import TokenMeter

Parameters = dict[str, nn.Parameter]  # those that learn, with their gradients


class Work(NamedTuple):
    """One group to learn from."""

    prompt_length: int
    max_completion_length: int
    num_generations: int
    vocabulary: int


# What is varied, its sizes, and the rest of the work.
SWEEPS = {
    "max_completion_length": ((256, 512, 1024, 2048, 4096, 8192, 16384), Work(256, 0, 2, 151936)),
    "num_generations": ((2, 4, 8, 16, 32), Work(256, 128, 0, 151936)),
    "vocabulary": ((32768, 65536, 131072, 262144), Work(256, 512, 4, 0)),
}
SMALL = {"max_completion_length": 8, "num_generations": 2, "prompt_length": 8}
QUICK = {
    "max_completion_length": ((8, 64), Work(16, 0, 2, 4096)),
    "num_generations": ((2, 4), Work(16, 8, 0, 4096)),
    "vocabulary": ((1024, 4096), Work(16, 8, 2, 0)),
}


def ids(work: Work) -> tuple[Tensor, Tensor]:
    """Prompt (1, P) and completions (G, T)."""
    draw = torch.Generator().manual_seed(0)
    shapes = (1, work.prompt_length), (work.num_generations, work.max_completion_length)
    prompt, completions = (torch.randint(300, work.vocabulary, shape, generator=draw) for shape in shapes)
    return prompt, completions


def advantages(work: Work) -> Tensor:
    return torch.randn(work.num_generations, generator=torch.Generator().manual_seed(1))


def settings(device: str) -> GRPOConfig:
    """Settings of a loss, for any work: lengths and the size of a group do not matter to it."""
    return GRPOConfig(use_cpu=device == "cpu", prompts_per_step=1, num_generations=2, token_budget=10**9)


@cache
def our_policy(folder: str, device: str) -> Policy:
    return load_policy(folder, AutoTokenizer.from_pretrained(folder), settings(device))


@cache
def their_trainer(folder: str, device: str) -> Any:
    """TRL's trainer with its model."""
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    trainer = trl_trainer(Job(folder, [{"prompt": "a"}] * 4, rewards, settings(device), 1), True, "sdpa")
    # Trainer.train() would switch it on.
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def ours(folder: str, device: str, work: Work) -> Parameters:
    policy, (prompt, completions) = our_policy(folder, device), ids(work)
    rollout = Rollout.bare(prompt.tolist(), completions.tolist(), advantages(work))
    scaler, tokens = torch.amp.GradScaler(device, enabled=False), TokenMeter(rollout, policy.device)
    config = settings(device)
    backward(policy, rollout, tokens, Coefficients(0.0, 0.0), scaler, config, config.token_budget)
    return policy.parameters_of(policy.adapter)


def trl(folder: str, device: str, work: Work) -> Parameters:
    trainer = their_trainer(folder, device)
    prompt, completions = (x.to(device) for x in ids(work))
    prompts = prompt.expand(work.num_generations, -1)
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": completions,
        "completion_mask": torch.ones_like(completions), "advantages": advantages(work).to(device),
        "old_per_token_logps": None, "num_items_in_batch": torch.tensor(completions.numel(), device=device),
    }  # fmt: skip
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    trainer.accelerator.backward(loss)
    return adapters(trainer)


def trl_as_on_a_gpu(folder: str, device: str, work: Work) -> Parameters:
    with prompts_unscored():
        return trl(folder, device, work)


def liger(folder: str, device: str, work: Work) -> Parameters:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=device == "cuda")

    def loss(hidden: Tensor, head: Tensor, completions: Tensor, weights: Tensor) -> Tensor:
        return fused(hidden, head, completions, torch.ones_like(completions), weights)[0]

    return plain_loop(folder, device, work, loss)


def full_logits(folder: str, device: str, work: Work) -> Parameters:
    def loss(hidden: Tensor, head: Tensor, completions: Tensor, weights: Tensor) -> Tensor:
        logprobs = (hidden @ head.t()).float().log_softmax(-1).gather(-1, completions[..., None])[..., 0]
        ratio = (logprobs - logprobs.detach()).exp()
        return -torch.min(ratio * weights[:, None], ratio.clamp(0.8, 1.2) * weights[:, None]).mean()

    return plain_loop(folder, device, work, loss)


def plain_loop(folder: str, device: str, work: Work, loss: Callable[..., Tensor]) -> Parameters:
    """A loss of hidden states (G, T, D), the head (V, D), completions (G, T) and advantages (G,)."""
    trainer = their_trainer(folder, device)
    prompt, completions = (x.to(device) for x in ids(work))
    rows = torch.cat([prompt.expand(work.num_generations, -1), completions], 1)
    causal = trainer.model.get_base_model()
    with trainer.accelerator.autocast():
        hidden = causal.model(input_ids=rows, use_cache=False).last_hidden_state[:, work.prompt_length - 1 : -1]
        loss(hidden, causal.lm_head.weight, completions, advantages(work).to(device)).backward()
    return adapters(trainer)


def adapters(trainer: Any) -> Parameters:
    return {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


OURS, AS_ON_A_GPU = "lowmem_grpo", "TRL, as on a GPU"
IMPLEMENTATIONS: dict[str, Callable[[str, str, Work], Parameters]] = {
    OURS: ours, "TRL": trl, AS_ON_A_GPU: trl_as_on_a_gpu, "Liger": liger, "full logits": full_logits,
}  # fmt: skip
NEEDS = {OURS: [], "Liger": ["trl", "liger_kernel"]}  # else TRL, whose model the others train


def build(name: str, folder: str, device: str, work: Work, small: bool) -> measure.Run:
    """Make inputs and the call for measure.once(), on a CPU in a process of its own."""

    def run() -> None:
        for parameter in IMPLEMENTATIONS[name](folder, device, work._replace(**SMALL) if small else work).values():
            parameter.grad = None

    return run


def measure_row(
    name: str, works: Sequence[Work], folder: Callable[[int], str], device: torch.device, limit_bytes: int | None
) -> list[Once | Failed]:
    """One implementation at rising sizes; after one that is out of memory the next are not tried."""
    found: list[Once | Failed] = []
    lacking = [package for package in NEEDS.get(name, ["trl"]) if measure.missing(package)]
    for work in works:
        if lacking:
            found.append(Failed(f"not installed: {', '.join(lacking)}"))
        elif found and isinstance(found[-1], Failed):
            found.append(Failed(f"not tried: {found[-1].reason.removeprefix('not tried: ')}"))
        else:
            given = partial(build, name, folder(work.vocabulary), device.type, work)
            found.append(measure.once(given, device, limit_bytes))
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of the least-squares fit value ~ size^p; NaN for less than two points."""
    return _slope([math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values])


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    if len(xs) < 2:
        return math.nan
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people: memory and time of each sweep, with the fitted slopes."""
    clock = "s" if "gpu" in found["machine"] else "CPU s"
    return "\n\n".join(
        table
        for sweep in found["sweeps"]
        for table in (
            _table(sweep, "peak_bytes", 2**20, "peak MiB", ".0f"), _table(sweep, "seconds", 1, clock, ".3g")
        )
    )  # fmt: skip


def _table(sweep: dict[str, Any], key: str, unit: float, title: str, form: str) -> str:
    sizes, rows = sweep["sizes"], []
    step = 1 if sizes[-1] < 1000 else 1000
    for name, results in sweep["results"].items():
        good = [(size, one[key] / unit) for size, one in zip(sizes, results, strict=True) if key in one]
        cells = [one.get("reason") or format(one[key] / unit, form) for one in results]
        xs, ys = [x for x, _ in good], [y for _, y in good]
        rows.append([name, *cells, f"{exponent(xs, ys):.2f}", f"{step * _slope(xs, ys):.3g}"])
    head = [f"{title} by {sweep['varied']}", *map(str, sizes), "exponent", f"per {step:,} more"]
    return measure.markdown_table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-large-vocabulary")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--longest", type=measure.positive, default=16384, help="no completion is longer")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, help="(default: all that differ here)")
    parser.add_argument("--memory_limit", type=float, help="GB that one call may take on a CPU; 60 %% of what is free")
    parser.add_argument("--quick", action="store_true", help="a tiny model and sizes: does everything run?")
    measure.add_device(parser)
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    if given.longest < SWEEPS["max_completion_length"][0][0]:
        parser.error(f"--longest {given.longest} is below the shortest, {SWEEPS['max_completion_length'][0][0]}")
    names = given.only or [name for name in IMPLEMENTATIONS if name != AS_ON_A_GPU or given.device == "cpu"]
    shape, all_sweeps = ("tiny", QUICK) if given.quick else (given.shape, SWEEPS)
    limit = None
    if given.device == "cpu":
        limit = int(given.memory_limit * 10**9 if given.memory_limit else 0.6 * psutil.virtual_memory().available)
        # By its name: as a program, __name__ is another.
        measure.preload("lowmem_grpo.benchmarks.bench_scaling", "trl", "bitsandbytes", "liger_kernel.chunked_loss")
    sweeps = []
    with tempfile.TemporaryDirectory() as root:

        @cache
        def folder(vocabulary: int) -> str:
            path = Path(root, str(vocabulary))
            make_random_model(shape, None, path, vocabulary)
            return str(path)

        for varied in given.sweep:
            sizes, rest = all_sweeps[varied]
            sizes = [size for size in sizes if varied != "max_completion_length" or size <= given.longest]
            works, results = [rest._replace(**{varied: size}) for size in sizes], {}
            sweeps.append({"varied": varied, "sizes": sizes, "work": measure.plain(rest), "results": results})
            for name in names:
                results[name] = measure.plain(measure_row(name, works, folder, device, limit))
                found = measure.document("bench_scaling", argv, device, shape=shape, limit_bytes=limit, sweeps=sweeps)
                measure.save(found, given.output)
            measure.show(tables({**found, "sweeps": sweeps[-1:]}))


if __name__ == "__main__":
    main()
