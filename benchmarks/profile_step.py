"""Time of the demo's step on a CPU, phase by phase: kinds of operations, and Python between them.

    python -m lowmem_grpo.benchmarks.profile_step [--steps 4] [--seed 0] [--output FILE]

By torch's profiler, whose own time counts too: a small operation looks a few microseconds longer than it is.
"""

import contextlib
import io
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe
from lowmem_grpo.loops.grpo import train

# Of operations that compute something, by name without "aten::" and the "_" of one in place.
KINDS = {
    "matrix products": "mm addmm bmm baddbmm mkldnn_linear",
    "attention and softmax": "_scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward _softmax _softmax_backward_data _log_softmax",
    "copies, casts, lookups": "copy cat index index_select gather scatter embedding repeat repeat_interleave fill zero "
    "masked_fill _local_scalar_dense _index_put_impl index_add index_select_backward gather_backward",
    "sums, products, functions of numbers": "add sub rsub mul div pow mean sum rsqrt sqrt neg silu silu_backward exp "
    "log max min amax argmax maximum minimum cumsum where clamp clamp_min clamp_max sin cos tanh sigmoid addcmul "
    "addcdiv linalg_vector_norm ge gt le lt eq ne bitwise_and bitwise_or bitwise_not logical_not logical_and any all "
    "square sort topk searchsorted arange isneginf logsumexp _fused_adamw _foreach_norm _foreach_mul _foreach_add",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
FUNCTIONS = "autograd: its nodes, functions in Python, 4-bit products, optimizer"
DISPATCH = "views, allocations, and torch's way to an operation"
PYTHON = "Python: transformers' layers and this package"
PHASE = "phase/"


def kind_of(name: str) -> str:
    if not name.startswith("aten::"):
        return FUNCTIONS
    bare = name.removeprefix("aten::")
    return KIND_OF.get(bare) or KIND_OF.get(bare.removesuffix("_"), DISPATCH)


def milliseconds(events: Iterable[Any], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds by phase and kind, of one of so many steps, after a first that is left out.

    An event's own time is without that of the events in it.
    """
    events = list(events)
    phases = sorted((e for e in events if e.name.startswith(PHASE)), key=lambda e: e.time_range.start)
    starts = [e.time_range.start for e in phases]
    first = {e.name: place for place, e in reversed(list(enumerate(phases)))}
    found: dict[str, Counter] = defaultdict(Counter)
    for event in events:
        place = bisect_right(starts, event.time_range.start) - 1
        if place < 0 or event.time_range.end > phases[place].time_range.end or place in first.values():
            continue
        kind = PYTHON if event.name.startswith(PHASE) else kind_of(event.name)
        found[phases[place].name.removeprefix(PHASE)][kind] += event.self_cpu_time_total / 1e3 / steps
    return {phase: dict(kinds) for phase, kinds in found.items()}


def run(steps: int, seed: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = replace(recipe(folder, seed), max_steps=steps + 1, save_steps=10**6)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            rewards = [task.answer_reward, task.tag_format_reward]
            train(str(MODEL), rewards, task.rows(task.splits()[0]), config=config)
    return milliseconds(profiled.events() or [], steps)


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    spent = found["milliseconds"]
    phases = sorted(spent, key=lambda phase: -sum(spent[phase].values()))
    kinds = sorted(
        {kind for of in spent.values() for kind in of}, key=lambda k: -sum(of.get(k, 0) for of in spent.values())
    )
    rows = [[kind, *(f"{spent[phase].get(kind, 0):.0f}" for phase in phases)] for kind in kinds]
    total = ["together", *(f"{sum(spent[phase].values()):.0f}" for phase in phases)]
    return measure.markdown_table(["ms a step of the demo, profiled", *phases], [*rows, total])


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--steps", type=measure.positive, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    spent = run(given.steps, given.seed)
    found = measure.document("profile_step", argv, torch.device("cpu"), milliseconds=spent)
    measure.show(tables(found))
    measure.save(found, given.output)


if __name__ == "__main__":
    main()
