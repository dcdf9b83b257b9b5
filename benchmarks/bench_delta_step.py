"""One layer's step of the gated delta rule for each slot: ours beside transformers' own and, where installed, fla's.

    python -m lowmem_grpo.benchmarks.bench_delta_step [--quick] [--output FILE.json]

The layer is Qwen3.5-4B's: 16 heads of keys, 32 of values, of 128 numbers, a state of 2 MiB a slot. Time is one token of
each slot, from bf16 query, key and value to the output and the state after it where the state before it stood. Memory
is the peak above the inputs. The state's error is the largest, against fp64.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.kernels.delta_step import delta_step

SLOTS = (8, 64)
H_K, H_V, K, V = 16, 32, 128, 128
WARM_UPS, REPEATS = 3, 10

# From (query, key, value, log_decay, strength, state), the last overwritten by the state after it, to the output.
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(backend: Literal["triton", "torch"]) -> Step:
    return partial(delta_step, normalize=True, commit=None, backend=backend)


def transformers() -> Step:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    rule = _out_of_place(inspect.unwrap(torch_recurrent_gated_delta_rule))
    if Version(version("transformers")) >= Version("5.21"):
        return rule

    def run(query, key, *others):  # before 5.21 the layer repeats them, for each value head one
        return rule(*(x.repeat_interleave(H_V // H_K, 1) for x in (query, key)), *others)

    return run


def fla() -> Step:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule  # pyright: ignore[reportMissingImports]

    return _out_of_place(fused_recurrent_gated_delta_rule)


def _out_of_place(rule: Callable[..., Any]) -> Step:
    """A rule that returns a new state, which is then copied to where the old one stands."""

    def run(query, key, value, log_decay, strength, state):
        out, after = rule(
            query[:, None], key[:, None], value[:, None], g=log_decay[:, None], beta=strength[:, None],
            initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        state.copy_(after)
        return out[:, 0]

    return run


def implementations(device: str) -> dict[str, Step | None]:
    """The implementations, None for one that this machine lacks."""
    makers: dict[str, Callable[[], Step]] = {"lowmem_grpo, PyTorch twin": partial(ours, "torch")}
    makers["transformers"] = transformers
    if device == "cuda":
        makers = {"lowmem_grpo, Triton": partial(ours, "triton"), **makers, "fla": fla}
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:
            found[name] = None
    return found


def make_inputs(slots: int, device: str) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(slots, H_K, K, generator=draw).bfloat16() for _ in range(2))
    value = torch.randn(slots, H_V, V, generator=draw).bfloat16()
    log_decay, strength = (-torch.rand(slots, H_V, generator=draw) for _ in range(2))
    inputs = query, key, value, log_decay, -strength.bfloat16(), torch.randn(slots, H_V, K, V, generator=draw)
    return tuple(x.to(device) for x in inputs)


def state_in_fp64(query, key, value, log_decay, strength, state) -> Tensor:
    """The state (S, H_v, K, V) after the token, by the rule's formula."""
    key = key.double() * torch.rsqrt(key.double().square().sum(-1, keepdim=True) + 1e-6)
    key = key.repeat_interleave(H_V // H_K, 1)[..., None]
    state = state.double() * log_decay.double().exp()[..., None, None]
    change = strength.double()[..., None, None] * (value.double()[:, :, None] - key.mT @ state)
    return state + key * change


def bench(slots: int, device: torch.device, repeats: int) -> dict[str, dict]:
    """Per implementation: failed, or seconds (Timing), peak_bytes and error, the state's."""
    inputs = make_inputs(slots, device.type)
    steps = implementations(device.type)
    few = tuple(x[:2] for x in inputs)
    exact = state_in_fp64(*few)
    here = {name: step for name, step in steps.items() if step}
    runs = {name: lambda turn, step=step: step(*inputs) for name, step in here.items()}
    errors = {}
    for name, step in here.items():
        state = few[5].clone()
        step(few[0], few[1], few[2], few[3], few[4], state)
        errors[name] = float((state.double() - exact).abs().max())
    results: dict[str, dict] = {name: {"failed": measure.NOT_INSTALLED} for name in steps if name not in here}
    for name, timing in measure.time_each(runs, device, repeats, WARM_UPS).items():
        if isinstance(timing, measure.Failed):
            results[name] = {"failed": timing.reason}
            continue
        peak = measure.peak_allocated(partial(here[name], *inputs), device)
        results[name] = {"seconds": timing, "peak_bytes": peak, "error": errors[name]}
    return results


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    clock = "ms" if "gpu" in found["machine"] else "CPU ms"
    rows = []
    for entry in found["slots"]:
        twice = 2 * entry["slots"] * H_V * K * V * 4  # bytes of the states, read and written
        for name, result in entry["results"].items():
            if "failed" in result:
                rows.append([name, str(entry["slots"]), result["failed"], "", "", ""])
                continue
            seconds = result["seconds"]
            rows.append(
                [
                    name, str(entry["slots"]), measure.spread(seconds, 1e3), f"{twice / seconds['median'] / 1e9:.0f}",
                    f"{result['peak_bytes'] / 2**20:.1f}", f"{result['error']:.1e}",
                ]
            )  # fmt: skip
    header = ["implementation", "slots", clock, "GB/s of states", "peak MiB above inputs", "state's error"]
    return measure.markdown_table(header, rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="2 slots alone, twice")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slots, repeats = ((2,), 2) if arguments.quick else (SLOTS, REPEATS)
    found = measure.document(
        "bench_delta_step", argv, device, heads=[H_K, H_V, K, V],
        slots=[{"slots": count, "results": bench(count, device, repeats)} for count in slots],
    )  # fmt: skip
    measure.show(tables(found))
    measure.save(found, arguments.output)


if __name__ == "__main__":
    main()
