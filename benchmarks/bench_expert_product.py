"""A mixture's experts for few tokens, by how their 4-bit weights are read.

    python -m lowmem_grpo.benchmarks.bench_expert_product [--shape NAME ...] [--rows N ...] [--quick] [--output FILE]

Of one layer both products of every choice, before the activation and after it: by kernels/expert_product.py, which
reads the experts that are chosen in 4 bits; with one expert dequantized at a time, which the host has to ask for; and
with one dequantized for each choice. Tokens choose at random, each of PASSES passes anew, so that no cache holds what
they chose. Bytes are those of the chosen experts in 4 bits, each read once, and their share is of what a copy of memory
reads and writes in that time. The error is relative to fp64. Weights are random, rows bf16.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.bench_gemm_4bit import repeatable
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.benchmarks.random_model import FAMILIES, fill_mxfp4, settings_of
from lowmem_grpo.kernels.expert_product import expert_product, grouped
from lowmem_grpo.model.experts import AT_ONCE, Mxfp4Stack, Nf4Stack, by_expert

MIXTURES = ["qwen3-30b-a3b", "gpt-oss-20b"]  # in NF4, and in MXFP4 with another shape
ROWS = [1, 4, 16, 64]
PASSES = 8
COPIED = {"cuda": 2**28, "cpu": 2**24}  # bytes, more than a cache holds
Stacks = tuple[Any, Any]  # before the activation, and after it


class Pass(NamedTuple):
    """Rows of a step of few tokens, and the experts that they choose."""

    hidden: Tensor  # (S, D)
    inner: Tensor  # (S k, width)
    chosen: Tensor  # (S k,) int64


def by_kernel(stacks: Stacks, one: Pass) -> list[Tensor]:
    groups = grouped(one.chosen, len(stacks[0].scales))
    inputs = zip(stacks, one[:2], strict=True)
    return [expert_product(x, stack.parts(), groups) for stack, x in inputs]


def one_by_one(stacks: Stacks, one: Pass) -> list[Tensor]:
    order, counts = by_expert(one.chosen, len(stacks[0].scales))
    places = order.split(counts)
    found = []
    for stack, x in zip(stacks, one[:2], strict=True):
        out = x.new_empty(len(one.chosen), stack.shape[0])
        for expert, own in enumerate(places):
            if len(own):
                out[own] = x[own // (len(one.chosen) // len(x))] @ stack.matrix(expert, x.dtype).T
        found.append(out)
    return found


def for_each_choice(stacks: Stacks, one: Pass) -> list[Tensor]:
    found = []
    for stack, x in zip(stacks, one[:2], strict=True):
        x = x.repeat_interleave(len(one.chosen) // len(x), 0)
        count = max(1, AT_ONCE // (2 * stack.shape[0] * stack.shape[1]))
        parts = zip(one.chosen.split(count), x.split(count), strict=True)
        found.append(torch.cat([(stack.matrices(which, x.dtype) @ rows[:, :, None])[..., 0] for which, rows in parts]))
    return found


IMPLEMENTATIONS: dict[str, Callable[[Stacks, Pass], list[Tensor]]] = {
    "lowmem_grpo": by_kernel,
    "an expert dequantized at a time": one_by_one,
    "dequantized for each choice": for_each_choice,
}


def make_stacks(shape: str, device: torch.device) -> Stacks:
    """Random experts of one layer, in the 4 bits that a model of this shape has them in."""
    settings = settings_of(shape)
    experts, width = (settings.get(a) or settings[b] for a, b in (
        ("num_experts", "num_local_experts"), ("moe_intermediate_size", "intermediate_size"),
    ))  # fmt: skip
    made = []
    for size in ((2 * width, settings["hidden_size"]), (settings["hidden_size"], width)):
        if "quantization_config" in settings:
            stack: Any = Mxfp4Stack(experts, size, device)
            fill_mxfp4(stack)
        else:
            stack = Nf4Stack(experts, size, False, device)
            for place in range(experts):
                stack.pack(place, torch.randn(1, *size, device=device, dtype=torch.bfloat16) / size[1] ** 0.5)
        made.append(stack)
    return made[0], made[1]


def make_passes(shape: str, stacks: Stacks, rows: int, device: torch.device) -> list[Pass]:
    each, experts = settings_of(shape)["num_experts_per_tok"], len(stacks[0].scales)
    draw = torch.Generator().manual_seed(rows)

    def one() -> Pass:
        chosen = torch.rand(rows, experts, generator=draw).topk(each).indices.flatten()
        hidden, inner = (
            torch.randn(count, stack.shape[1], generator=draw).to(device, torch.bfloat16)
            for count, stack in zip((rows, rows * each), stacks, strict=True)
        )
        return Pass(hidden, inner, chosen.to(device))

    return [one() for _ in range(PASSES)]


def in_fp64(stacks: Stacks, one: Pass) -> list[Tensor]:
    found = []
    for stack, x in zip(stacks, one[:2], strict=True):
        out = torch.empty(len(one.chosen), stack.shape[0], dtype=torch.float64, device=x.device)
        for expert in one.chosen.unique().tolist():
            own = (one.chosen == expert).nonzero()[:, 0]
            rows = x[own // (len(one.chosen) // len(x))].double()
            out[own] = rows @ stack.matrix(expert, torch.float32).double().T
        found.append(out)
    return found


def bytes_read(stacks: Stacks, one: Pass) -> int:
    """Bytes of the chosen experts' codes and scales."""
    of_one = sum(x[0].nbytes for stack in stacks for x in stack.buffers() if len(x) == len(stack.scales))
    return len(one.chosen.unique()) * of_one


def copy_speed(device: torch.device) -> float:
    """Bytes a second that a copy within the memory reads and writes."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [measure.seconds_of(lambda turn: target.copy_(source), turn, device) for turn in range(6)]
    return 2 * source.nbytes / max(1e-9, statistics.median(times[1:]))


@torch.no_grad()
def bench(shape: str, rows: list[int], device: torch.device, repetitions: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield by rows the bytes of a pass, and by implementation failed, or seconds (Timing) and error."""
    stacks = make_stacks(shape, device)
    for count in rows:
        passes = make_passes(shape, stacks, count, device)
        truth = in_fp64(stacks, passes[0])

        def prepared(name: str, passes=passes, truth=truth) -> tuple[Callable[[], Any], float]:
            run = IMPLEMENTATIONS[name]
            made = run(stacks, passes[0])
            error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(made, truth, strict=True))

            def all_passes() -> None:
                for one in passes:
                    run(stacks, one)

            return all_passes if run is one_by_one else repeatable(all_passes, device), error

        tried = {name: measure.attempt(partial(prepared, name)) for name in IMPLEMENTATIONS}
        runs = {name: made for name, made in tried.items() if not isinstance(made, Failed)}
        timings = measure.time_each(
            {name: lambda turn, run=run: run() for name, (run, _) in runs.items()}, device, repetitions, 1
        )
        results: dict[str, Any] = {}
        for name, timing in (tried | timings).items():
            if isinstance(timing, Failed):
                results[name] = {"failed": timing.reason}
                continue
            seconds = measure.Timing(*(value / PASSES for value in timing[:3]), repetitions=timing.repetitions)
            results[name] = {"seconds": seconds, "error": runs[name][1]}
        yield count, {"bytes": sum(bytes_read(stacks, one) for one in passes) / PASSES, "results": results}


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    clock = "us" if "gpu" in found["machine"] else "CPU us"
    shown = []
    for shape, by_rows in found["shapes"].items():
        body = []
        for count, entry in by_rows.items():
            for name, result in entry["results"].items():
                cells = [name, str(count), f"{entry['bytes'] / 1e6:.1f}"]
                if "failed" in result:
                    body.append([*cells, result["failed"], "", ""])
                    continue
                share = entry["bytes"] / max(1e-9, result["seconds"]["median"]) / found["copy_bytes_per_s"]
                body.append([*cells, measure.spread(result["seconds"], 1e6), f"{share:.0%}", f"{result['error']:.1e}"])
        header = [f"{shape}: a layer's experts", "rows", "MB of chosen ones", clock, "of a copy's speed", "error"]
        shown.append(measure.markdown_table(header, body))
    return "\n\n".join(shown)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    tiny = [f"tiny-{name}" for name in MIXTURES]
    choices = [name for name in [*FAMILIES, *tiny] if name.removeprefix("tiny-") in MIXTURES]
    parser.add_argument("--shape", action="append", choices=choices, help="may be given more than once")
    parser.add_argument("--rows", type=measure.positive, nargs="+", default=ROWS)
    parser.add_argument("--repetitions", type=measure.positive, default=5)
    parser.add_argument("--quick", action="store_true", help="few rows of tiny experts: does everything run?")
    given = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, rows, repetitions = given.shape or MIXTURES, given.rows, given.repetitions
    if given.quick:
        shapes, rows, repetitions = tiny, [1, 4], 1
    speed = copy_speed(device)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for shape in shapes:
        for count, entry in bench(shape, rows, device, repetitions):
            results.setdefault(shape, {})[count] = entry
            found = measure.document("bench_expert_product", argv, device, copy_bytes_per_s=speed, shapes=results)
            measure.save(found, given.output)
    measure.show(tables(found))


if __name__ == "__main__":
    main()
