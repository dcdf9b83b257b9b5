"""CPU time of a step in each of several processes, and bytes between them.

    python -m lowmem_grpo.benchmarks.bench_ranks [--ranks N ...] [--steps N] [--output FILE]

A small random model learns by GRPO from the same completions of the same prompts, however many processes share them.
Processes share the cores of one machine, so that the clock on the wall says nothing of processes with a device each;
the CPU time of the slowest does. Bytes are counted where they are handed to torch.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lowmem_grpo import distributed
from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.random_model import make_random_model
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.run import meter

WORK = {"prompts_per_step": 16, "num_generations": 6, "max_completion_length": 48, "beta": 0.02}
PHASES = ("rollout", "reference", "update")
PROMPTS = [{"prompt": f"{number:032d}"} for number in range(64)]  # a byte is a token
WARMUP = 1  # steps that are not counted


def variety(completions: list, **columns: Any) -> list[float]:
    """A reward that costs nothing and differs within a group: how many different characters a completion has."""
    return [float(len(set(completion))) for completion in completions]


def run_rank(rank: int, ranks: int, port: int, steps: int, folder: str, pipe: Connection) -> None:
    """Train as one of the processes, and send CPU seconds and bytes of each step."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sent = {"summed_bytes": 0, "exchanged_bytes": 0, "exchanges": 0}
    all_reduce, all_gather = distributed.dist.all_reduce, distributed.dist.all_gather_object

    def counted_reduce(tensor: torch.Tensor, async_op: bool) -> Any:
        sent["summed_bytes"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, async_op=async_op)

    def counted_gather(found: list, message: object) -> None:
        sent["exchanged_bytes"] += len(pickle.dumps(message))
        sent["exchanges"] += 1
        all_gather(found, message)

    distributed.dist.all_reduce, distributed.dist.all_gather_object = counted_reduce, counted_gather
    marks = []

    def mark(step: int, metrics: dict[str, Any], policy: Any) -> None:
        of_phases = {name: metrics[f"time/{name}_s"] for name in PHASES}
        marks.append(({"cpu_s": time.process_time(), **sent}, of_phases))

    meter.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined] # phases in CPU time
    config = GRPOConfig(
        output_dir=f"{folder}/out", use_cpu=True, max_steps=steps + WARMUP, save_steps=10**6, doctor="off", **WORK
    )
    with contextlib.redirect_stderr(io.StringIO()):
        train(f"{folder}/model", variety, PROMPTS, config=config, callbacks=mark)
    found = []
    for (before, _), (after, of_phases) in zip(marks[WARMUP - 1 :], marks[WARMUP:], strict=False):
        found.append({**{name: after[name] - before[name] for name in after}, **of_phases})
    pipe.send(found)


def measured(ranks: int, steps: int) -> dict[str, Any]:
    """The medians of a step: of its slowest process, of all together, and what one process sends."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        make_random_model("tiny", None, Path(folder, "model"))
        pipes, started = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(rank, ranks, port, steps, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        by_rank = [pipe.recv() for pipe in pipes]
        for process in started:
            process.join()
    by_step = list(zip(*by_rank, strict=True))
    return {
        "slowest_cpu_s": statistics.median(max(one["cpu_s"] for one in step) for step in by_step),
        "all_cpu_s": statistics.median(sum(one["cpu_s"] for one in step) for step in by_step),
        **{name: statistics.median(step[0][name] for step in by_step) for name in by_step[0][0] if name != "cpu_s"},
    }  # fmt: skip


def tables(found: dict[str, Any]) -> str:
    """The document as a table for people: a row for each number of processes."""
    results = found["results"]
    rows = []
    for one in results:
        less = [results[0][name] / one[name] for name in ("slowest_cpu_s", *PHASES)]
        sums = [
            f"{one['summed_bytes'] / 10**6:.2f}",
            f"{one['exchanged_bytes'] / 10**3:.0f}",
            f"{one['exchanges']:.0f}",
        ]
        times = [f"{one['slowest_cpu_s']:.2f}", *(f"{value:.2f}" for value in less), f"{one['all_cpu_s']:.2f}"]
        rows.append([str(one["ranks"]), *times, *sums])
    heads = ["processes", "CPU s a step, the slowest", "times less", *PHASES, "CPU s, all", "summed, MB"]
    heads += ["exchanged, kB", "exchanges"]
    return measure.markdown_table(heads, rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--ranks", nargs="+", type=measure.positive, default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--steps", type=measure.positive, default=3, help="that are measured, after one that is not")
    given = parser.parse_args(argv)
    results = []
    for ranks in given.ranks:
        results.append({"ranks": ranks, **measured(ranks, given.steps)})
        found = measure.document("bench_ranks", argv, torch.device("cpu"), work=WORK, results=results)
        measure.save(found, given.output)
        measure.show(tables({**found, "results": results}))


if __name__ == "__main__":
    main()
