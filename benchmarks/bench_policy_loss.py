"""The policy loss, its gradient and its metrics from (N,) log-probabilities: ours beside TRL's and Liger's.

    python -m lowmem_grpo.benchmarks.bench_policy_loss [--quick] [--output FILE.json]

Time is a forward and a backward, wall clock, launches included; memory is the peak above the inputs, of which the
gradient, 4 N bytes, is a part in all of them. TRL's is GRPOTrainer._compute_loss as it stands, whose metrics wait for
the device. Liger's is the loss that its fused linear GRPO compiles and runs; its Triton kernel starts from full logits,
(N, vocabulary), and so has no place here. The gradient's error is the largest, against fp64, over its largest entry.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from lowmem_grpo.kernels.policy_loss import policy_loss

SIZES = (1024, 16384, 131072)
COMPLETION = 512  # tokens of each completion; none is padded, so that everyone does the same work
SETTINGS = dict(epsilon_low=0.2, epsilon_high=0.28, delta=None, beta=0.04, use_bias_correction_kl=False)
WARM_UPS, REPEATS = 3, 10
MIB = 2**20

# A pass from (logprobs with a gradient, old, ref, advantages), the first three (B, T) and the last (B,), to the loss.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(backend: str) -> Loss:
    def run(logprobs, old, ref, advantages):
        weight = torch.full((), 1 / logprobs.numel(), device=logprobs.device)
        return policy_loss(
            logprobs.view(-1), old.view(-1), ref.view(-1), advantages[:, None].expand_as(logprobs).reshape(-1),
            weight.expand(logprobs.numel()), **SETTINGS, backend=backend,
        )[0]  # fmt: skip

    return run


def trl() -> Loss:
    """The bound method of a trainer that has only what the method reads."""
    from trl import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    for name, value in {
        "_get_per_token_logps_and_entropies": lambda logprobs, *args, **kwargs: (logprobs, logprobs.detach(), None),
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(
            delta=SETTINGS["delta"], use_bias_correction_kl=SETTINGS["use_bias_correction_kl"], steps_per_generation=1
        ),
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": "token", "use_vllm": False, "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1, "loss_type": "dapo", "beta": SETTINGS["beta"],
        "epsilon_low": SETTINGS["epsilon_low"], "epsilon_high": SETTINGS["epsilon_high"],
    }.items():  # fmt: skip
        setattr(trainer, name, value)

    def run(logprobs, old, ref, advantages):
        trainer._metrics = {"train": defaultdict(list)}
        ids = torch.ones(1, 1, dtype=torch.int8, device=logprobs.device).expand(logprobs.shape)
        inputs = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": ids,
            "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
            "num_items_in_batch": torch.full((), logprobs.numel(), device=logprobs.device),
        }  # fmt: skip
        return trainer._compute_loss(logprobs, inputs)

    return run


def liger(compiled: bool) -> Loss:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    loss = LigerFusedLinearGRPOFunction.ppo_loss_fn
    loss = torch.compile(loss, dynamic=False) if compiled else loss

    def run(logprobs, old, ref, advantages):
        mask = torch.ones(1, 1, device=logprobs.device).expand(logprobs.shape)
        return loss(logprobs, mask, advantages, mask, ref, old, loss_type="dapo", **SETTINGS)[0]

    return run


def implementations(device: str) -> dict[str, Loss]:
    """Those that this machine has; a line for each that it has not."""
    makers = {"lowmem_grpo, PyTorch twin": lambda: ours("torch"), "TRL": trl, "Liger": lambda: liger(False)}
    if device == "cuda":
        makers = {"lowmem_grpo, Triton": lambda: ours("triton"), **makers, "Liger, compiled": lambda: liger(True)}
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return found


def make_inputs(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = (tokens // COMPLETION, COMPLETION)
    logprobs = -4 * torch.rand(shape, generator=draw)
    old, ref = (logprobs + 0.2 * torch.randn(shape, generator=draw) for _ in range(2))
    inputs = logprobs, old, ref, torch.randn(shape[0], generator=draw)
    return tuple(x.to(device) for x in inputs)


def one_pass(loss: Loss, inputs: tuple[Tensor, ...]) -> Tensor:
    """The gradient (B, T)."""
    logprobs = inputs[0].detach().requires_grad_()
    loss(logprobs, *inputs[1:]).backward()
    return logprobs.grad


def seconds(loss: Loss, inputs: tuple[Tensor, ...]) -> float:
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    one_pass(loss, inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(loss: Loss, inputs: tuple[Tensor, ...]) -> int:
    """Most bytes that one pass holds above what was there before, by the allocator's own record."""
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one_pass(loss, inputs)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(tokens: int, device: str) -> list[dict]:
    inputs = make_inputs(tokens, device)
    losses = implementations(device)
    exact = one_pass(ours("torch"), tuple(x.double() for x in inputs))
    times = {name: [] for name in losses}
    for turn in range(WARM_UPS + REPEATS):
        names = list(losses)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = seconds(losses[name], inputs)
            if turn >= WARM_UPS:
                times[name].append(taken)
    return [
        {
            "implementation": name,
            "tokens": tokens,
            "median_s": statistics.median(times[name]),
            "min_s": min(times[name]),
            "max_s": max(times[name]),
            "peak_bytes_above_inputs": peak_bytes(loss, inputs),
            "gradient_error": float((one_pass(loss, inputs).double() - exact).abs().max() / exact.abs().max()),
        }
        for name, loss in losses.items()
    ]


def table(results: list[dict]) -> str:
    lines = [
        "| N | implementation | ms, median (min to max) | peak MiB above inputs | bytes a token | gradient error |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        median, low, high = (1e3 * row[key] for key in ("median_s", "min_s", "max_s"))
        peak = row["peak_bytes_above_inputs"]
        lines.append(
            f"| {row['tokens']} | {row['implementation']} | {median:.3f} ({low:.3f} to {high:.3f}) | "
            f"{peak / MIB:.2f} | {peak / row['tokens']:.0f} | {row['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def environment(device: str) -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent, capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        **{package: version(package) for package in ("torch", "triton", "trl", "liger-kernel")},
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python -m lowmem_grpo.benchmarks.bench_policy_loss", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"N = {SIZES[0]} alone")
    parser.add_argument("--output", type=Path, help="file for the same as JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(device)
    results = [row for tokens in SIZES[: 1 if arguments.quick else None] for row in measure(tokens, device)]
    print(", ".join(f"{key} {value}" for key, value in about.items() if key not in ("commit", "command")))
    print(f"{SETTINGS}; median of {REPEATS} after {WARM_UPS}, order rotated\n\n{table(results)}")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"environment": about, "settings": SETTINGS, "results": results}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
