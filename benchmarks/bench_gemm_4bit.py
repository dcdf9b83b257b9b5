"""A layer's linear products by number of rows: bitsandbytes' choice, its fused kernel, and dequantizing first.

    python -m lowmem_grpo.benchmarks.bench_gemm_4bit [--shape NAME] [--rows N ...] [--choose] [--output FILE]

bitsandbytes has a kernel that multiplies with 4-bit weights as they are, and chooses by shape and card between it and
dequantizing a whole matrix before an ordinary product. A rollout's slots are the rows. The layer is that of the shape,
with random NF4 weights, double quantization, bf16, no gradient and no adapters. On a GPU there are more copies of it
than a cache holds, and each pass over them is one CUDA graph, as in a rollout, so that launches do not count.

--choose times, of each product of a decoding step (q, k, v at once; o; gate, up at once; down), bitsandbytes' and
kernels/nf4_product.py with some numbers of splits, and keeps the fastest over all rows for this card, where the
kernel's splits_of finds it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]: public, but in no __all__
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.benchmarks.random_model import SHAPES
from lowmem_grpo.kernels import nf4_product

CACHE_BYTES = {"cuda": 256 * 2**20, "cpu": 0}  # more than any GPU's
ROWS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256]
CHOSEN_BY = [1, 16, 64]  # rows of each tile of the kernel
Weight = tuple[Tensor, QuantState, Tensor]  # 4-bit numbers, what they mean, and the same in bf16
Product = Callable[[Tensor, Weight], Tensor]  # (rows, in) bf16 to (rows, out)


def _chosen(x: Tensor, weight: Weight) -> Tensor:
    return matmul_4bit(x, weight[0], weight[1])


def _fused(x: Tensor, weight: Weight) -> Tensor:
    from bitsandbytes.backends.cuda.ops import _gemm_4bit_kernel_impl  # what the public one calls where it chooses it

    numbers, state, _ = weight
    nested: Any = state.state2  # of the scales: there with double quantization
    return _gemm_4bit_kernel_impl(
        x, numbers, state.shape, nested.absmax, state.blocksize, state.quant_type, absmax_8bit=state.absmax,
        absmax_code=nested.code, absmax_offset=state.offset,
    )  # fmt: skip


def _dequantized(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x, dequantize_4bit(weight[0], weight[1]))


IMPLEMENTATIONS: dict[str, Product] = {
    "bitsandbytes' choice": _chosen,
    "fused": _fused,
    "dequantized each time": _dequantized,
    "bf16 weights": lambda x, weight: F.linear(x, weight[2]),
}


def sizes(shape: str) -> list[tuple[int, int]]:
    """The (out, in) sizes of q, k, v, o, gate, up and down."""
    _, hidden, mlp, heads, kv_heads, _, _ = SHAPES[shape]
    kv = hidden // heads * kv_heads
    return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (mlp, hidden), (mlp, hidden), (hidden, mlp)]


def products_of_a_step(shape: str) -> dict[str, tuple[list[int], int]]:
    """Rows of the weights that are multiplied at once, and their columns."""
    q, k, v, o, gate, up, down = sizes(shape)
    together = {"q, k, v": [q, k, v], "o": [o], "gate, up": [gate, up], "down": [down]}
    return {name: ([out for out, _ in members], members[0][1]) for name, members in together.items()}


def make_weights(shape: str, device: torch.device) -> list[Weight]:
    """Random 4-bit weights of more layers than a cache holds, at least one."""
    numbers = sum(out * into for out, into in sizes(shape))
    layers = max(1, ceil(CACHE_BYTES[device.type] / (numbers / 2)))
    made = []
    for out, into in sizes(shape) * layers:
        dense = torch.randn(out, into, device=device, dtype=torch.bfloat16) / into**0.5
        quantized, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        made.append((quantized, state, dequantize_4bit(quantized, state)))
    return made


@torch.no_grad()
def products(product: Product, weights: list[Weight], inputs: dict[int, Tensor]) -> list[Tensor]:
    return [product(inputs[weight[2].shape[1]], weight) for weight in weights]


def repeatable(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that repeats a call, on CUDA as one graph."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):  # compiles and takes its workspaces
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bench(
    shape: str, rows: Sequence[int], names: list[str], device: torch.device, repetitions: int, warmups: int
) -> dict[str, dict]:
    """Seconds (Timing) of a layer and the error of its products, or failed, by implementation and rows."""
    weights = make_weights(shape, device)
    first = weights[: len(sizes(shape))]
    layers = len(weights) // len(first)
    found: dict[str, dict] = {name: {} for name in names}
    for count in rows:
        inputs = {into: torch.randn(count, into, device=device, dtype=torch.bfloat16) for _, into in sizes(shape)}
        truth = products(IMPLEMENTATIONS["bf16 weights"], first, inputs)

        def prepared(product: Product, inputs=inputs, truth=truth) -> tuple[Callable[[], Any], float]:
            made = products(product, first, inputs)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(made, truth, strict=True))
            return repeatable(lambda: products(product, weights, inputs), device), error

        tried = {name: measure.attempt(partial(prepared, IMPLEMENTATIONS[name])) for name in names}
        runs = {name: made for name, made in tried.items() if not isinstance(made, Failed)}
        timings = measure.time_each(
            {name: lambda turn, run=run: run() for name, (run, _) in runs.items()}, device, repetitions, warmups
        )
        for name, timing in (tried | timings).items():
            if isinstance(timing, Failed):
                found[name][count] = {"failed": timing.reason}
            else:
                seconds = measure.Timing(*(value / layers for value in timing[:3]), repetitions=timing.repetitions)
                found[name][count] = {"seconds": seconds, "error": runs[name][1]}
    return found


def choose(
    shape: str, rows: Sequence[int], device: torch.device, repetitions: int, warmups: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield by product of a step seconds (Timing) of `copies` by contender and rows, and the fastest's splits.

    The fastest has the least product of medians over all rows. Splits None, "bitsandbytes" by name, is one product
    for each weight.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    for name, (outs, into) in products_of_a_step(shape).items():
        copies = max(1, ceil(CACHE_BYTES[device.type] / (sum(outs) * into / 2)))
        weights = [[_quantized(out, into, device) for out in outs] for _ in range(copies)]
        default = nf4_product.default_splits(outs, into, processors)
        contenders: dict[str, int | None] = {"bitsandbytes": None}
        contenders |= {f"split in {n}": n for n in sorted({max(1, default // 2), default, 2 * default})}
        seconds: dict[int, dict] = {}
        for count in rows:
            x = torch.randn(count, into, device=device, dtype=torch.bfloat16)
            runs = {
                contender: measure.attempt(partial(repeatable, partial(_multiply, x, weights, splits), device))
                for contender, splits in contenders.items()
            }
            timings = measure.time_each(
                {contender: lambda turn, run=run: run() for contender, run in runs.items() if callable(run)},
                device, repetitions, warmups,
            )  # fmt: skip
            seconds[count] = runs | timings
        finished = {c: n for c, n in contenders.items() if all(isinstance(seconds[m][c], measure.Timing) for m in rows)}
        total = {contender: prod(seconds[count][contender].median for count in rows) for contender in finished}
        chosen = min(total, key=lambda contender: total[contender])
        yield name, {
            "key": nf4_product.shape_key(outs, into), "chosen": chosen, "splits": contenders[chosen],
            "copies": copies, "by_rows": seconds,
        }  # fmt: skip


def _quantized(out: int, into: int, device: torch.device) -> tuple[Tensor, QuantState]:
    dense = torch.randn(out, into, device=device, dtype=torch.bfloat16) / into**0.5
    return quantize_4bit(dense, quant_type="nf4", compress_statistics=True)


@torch.no_grad()
def _multiply(x: Tensor, weights: list[list[tuple[Tensor, QuantState]]], splits: int | None) -> None:
    for group in weights:
        if splits is None:
            for numbers, state in group:
                matmul_4bit(x, numbers, state)
        else:
            nested: list[Any] = [state.state2 for _, state in group]
            nf4_product.product(
                x,
                [
                    nf4_product.Weight(numbers, state.absmax, outer.absmax, state.offset, outer.code)
                    for (numbers, state), outer in zip(group, nested, strict=True)
                ],
                splits=splits,
            )


def keep(found: dict[str, dict[str, Any]], card: str) -> None:
    """Write what was chosen to where a decoding step looks for it, beside what other cards and shapes have."""
    path = nf4_product.table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table.setdefault(card, {}).update({result["key"]: result["splits"] for result in found.values()})
    new = path.with_suffix(".new")
    new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def table_of_choices(found: dict[str, Any]) -> str:
    """The document of --choose as a table for people."""
    clock = "us" if "gpu" in found["machine"] else "CPU us"
    body = []
    for name, result in found["results"].items():
        by_rows = list(result["by_rows"].values())
        for contender in by_rows[0]:
            cells = [
                f"{1e6 * timings[contender]['median'] / result['copies']:.1f}"
                if "median" in timings[contender]
                else timings[contender]["reason"]
                for timings in by_rows
            ]
            body.append([name, contender + (", chosen" if contender == result["chosen"] else ""), *cells])
    rows = list(next(iter(found["results"].values()))["by_rows"])
    return measure.markdown_table([f"{found['shape']}: {clock}, by rows", "", *map(str, rows)], body)


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    rows = list(next(iter(found["results"].values())))
    if "by_rows" in rows:
        return table_of_choices(found)
    clock = "us" if "gpu" in found["machine"] else "CPU us"

    def cell(result: dict) -> str:
        return result["failed"] if "failed" in result else f"{1e6 * result['seconds']['median']:.0f}"

    body = [[name, *(cell(results[count]) for count in rows)] for name, results in found["results"].items()]
    return measure.markdown_table([f"{found['shape']}: {clock} a layer, by rows", *map(str, rows)], body)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--rows", type=measure.positive, nargs="+", default=ROWS)
    parser.add_argument("--only", action="append", choices=IMPLEMENTATIONS, help="may be given more than once")
    parser.add_argument("--quick", action="store_true", help="few rows of a tiny layer: does everything run?")
    parser.add_argument("--repetitions", type=measure.positive, default=5)
    parser.add_argument("--warmups", type=measure.natural, default=1)
    measure.add_device(parser)
    parser.add_argument(
        "--choose", action="store_true", help="time each product of a step, and keep the fastest for this card"
    )
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    skipped = () if given.device == "cuda" else ("fused",)
    names = given.only or [name for name in IMPLEMENTATIONS if name not in skipped]
    shape, rows = ("tiny", [1, 8]) if given.quick else (given.shape, given.rows)
    repetitions = 1 if given.quick else given.repetitions
    if given.choose:
        rows = [1, 8] if given.quick else CHOSEN_BY if given.rows is ROWS else given.rows
        chosen: dict[str, dict[str, Any]] = {}
        for name, result in choose(shape, rows, device, repetitions, given.warmups):
            chosen[name] = result
            found = measure.document("bench_gemm_4bit", argv, device, shape=shape, results=chosen)
            measure.save(found, given.output)
        measure.show(tables(found))
        keep(chosen, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
        return
    results = bench(shape, rows, names, device, repetitions, given.warmups)
    found = measure.document("bench_gemm_4bit", argv, device, shape=shape, results=results)
    measure.show(tables(found))
    measure.save(found, given.output)


if __name__ == "__main__":
    main()
