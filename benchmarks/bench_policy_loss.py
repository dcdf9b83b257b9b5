"""The policy loss, its gradient and its metrics from (N,) log-probabilities: ours beside TRL's and Liger's.

    python -m lowmem_grpo.benchmarks.bench_policy_loss [--quick] [--output FILE.json]

Time is a forward and a backward; memory is the peak above the inputs, of which the
gradient, 4 N bytes, is a part in all of them. TRL's is GRPOTrainer._compute_loss as it stands, whose metrics wait for
the device. Liger's is the loss that its fused linear GRPO compiles and runs; its Triton kernel starts from full logits,
(N, vocabulary), and so has no place here. The gradient's error is the largest, against fp64, over its largest entry.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.kernels.policy_loss import policy_loss

SIZES = (1024, 16384, 131072)
COMPLETION = 512  # tokens of each completion; none is padded, so that everyone does the same work
SETTINGS: dict[str, Any] = dict(epsilon_low=0.2, epsilon_high=0.28, delta=None, beta=0.04, use_bias_correction_kl=False)
WARM_UPS, REPEATS = 3, 10

# A pass from (logprobs with a gradient, old, ref, advantages), the first three (B, T) and the last (B,), to the loss.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(backend: Literal["triton", "torch"]) -> Loss:
    def run(logprobs, old, ref, advantages):
        weight = torch.full((), 1 / logprobs.numel(), device=logprobs.device)
        return policy_loss(
            logprobs.view(-1), old.view(-1), ref.view(-1), advantages[:, None].expand_as(logprobs).reshape(-1),
            weight.expand(logprobs.numel()), **SETTINGS, backend=backend,
        )[0]  # fmt: skip

    return run


def trl() -> Loss:
    """The bound loss method of a trainer that has only what the method reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer

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


def implementations(device: str) -> dict[str, Loss | None]:
    """The implementations that this machine has."""
    makers = {"lowmem_grpo, PyTorch twin": lambda: ours("torch"), "TRL": trl, "Liger": lambda: liger(False)}
    if device == "cuda":
        makers = {"lowmem_grpo, Triton": lambda: ours("triton"), **makers, "Liger, compiled": lambda: liger(True)}
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:
            found[name] = None
    return found


def make_inputs(num_tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    shape = (num_tokens // COMPLETION, COMPLETION)
    logprobs = -4 * torch.rand(shape, generator=draw)
    old, ref = (logprobs + 0.2 * torch.randn(shape, generator=draw) for _ in range(2))
    inputs = logprobs, old, ref, torch.randn(shape[0], generator=draw)
    return tuple(x.to(device) for x in inputs)


def one_pass(loss: Loss, inputs: tuple[Tensor, ...]) -> Tensor:
    """The gradient (B, T)."""
    logprobs = inputs[0].detach().requires_grad_()
    loss(logprobs, *inputs[1:]).backward()
    assert logprobs.grad is not None
    return logprobs.grad


def bench(num_tokens: int, device: torch.device) -> dict[str, dict]:
    """Per implementation: failed, or seconds (Timing), peak_bytes and error, the gradient's."""
    inputs = make_inputs(num_tokens, device.type)
    losses = implementations(device.type)
    exact = one_pass(ours("torch"), tuple(x.double() for x in inputs))
    here = {name: loss for name, loss in losses.items() if loss}
    runs = {name: lambda turn, loss=loss: one_pass(loss, inputs) for name, loss in here.items()}
    results: dict[str, dict] = {name: {"failed": "not installed"} for name in losses if name not in here}
    for name, timing in measure.time_each(runs, device, REPEATS, WARM_UPS).items():
        if isinstance(timing, measure.Failed):
            results[name] = {"failed": timing.reason}
            continue
        error = (one_pass(here[name], inputs).double() - exact).abs().max() / exact.abs().max()
        peak = measure.peak_allocated(partial(one_pass, here[name], inputs), device)
        results[name] = {"seconds": timing, "peak_bytes": peak, "error": float(error)}
    return results


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    rows = []
    for entry in found["sizes"]:
        for name, result in entry["results"].items():
            if "failed" in result:
                rows.append([name, str(entry["N"]), result["failed"], "", "", ""])
                continue
            peak = result["peak_bytes"]
            rows.append(
                [
                    name, str(entry["N"]), measure.spread(result["seconds"], 1e3), f"{peak / 2**20:.2f}",
                    f"{peak / entry['N']:.0f}", f"{result['error']:.1e}",
                ]
            )  # fmt: skip
    clock = "ms" if "gpu" in found["machine"] else "CPU ms"
    header = ["implementation", "N", clock, "peak MiB above inputs", "bytes a token", "gradient error"]
    return measure.markdown_table(header, rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"N = {SIZES[0]} alone")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [{"N": tokens, "results": bench(tokens, device)} for tokens in SIZES[: 1 if arguments.quick else None]]
    found = measure.document("bench_policy_loss", argv, device, settings=SETTINGS, sizes=sizes)
    measure.show(tables(found))
    measure.save(found, arguments.output)


if __name__ == "__main__":
    main()
