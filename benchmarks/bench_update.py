"""Time and memory of one update's gradient: padded rows, rows one by one, and packed rows that share their prompt.

    python -m lowmem_grpo.benchmarks.bench_update [--shape NAME] [--prompts 1] [--num_generations 8]
        [--prompt_length 512] [--completion_length 128] [--uneven] [--rungs] [--host] [--output FILE]

With --rungs, packed rows with each of the settings that `lowmem-grpo plan` chooses from (but for sampling's, which
bench_rollout has), and the optimizers' steps. With --host, the host's time alone of an update and a reference pass, by
outlines and by the model's own layers: 28 layers of tiny widths on a CPU, with 4-bit products, attention and this
package's kernels left out; and their launches, of which each of those is one. MFU at 16,384 tokens a micro-batch:
--prompts 4 --prompt_length 512 --completion_length 448 --checkpointing, on a card of PEAKS.

All compute the same gradient of the same random 4-bit model's LoRA adapters; the last column says how far apart they
are. Peak memory is above the loaded model.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.benchmarks.random_model import SHAPES, random_policy
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.determinism import deterministic, prepare
from lowmem_grpo.kernels import layer_pass
from lowmem_grpo.model.load import ONLY_ON_GPU
from lowmem_grpo.model.lora import plain_lora_layers
from lowmem_grpo.model.packed_attention import Packed
from lowmem_grpo.model.packing import MicroBatch
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.optimizer import make_optimizer
from lowmem_grpo.update.passes import backward, micro_batches
from lowmem_grpo.update.token_metrics import TokenMeter

# How a step's completions become micro-batches; all in one unless token_budget says otherwise, of the step's tokens.
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed, prompt shared": {},
    "padded rows": {"padding_free": False},
    "one by one": {"padding_free": False, "token_budget": 0.0},
}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
PEFTS, LIGERS = "adapters as PEFT has them", "gradient_checkpointing, use_liger_kernel"
OWN, ONE_ORDER = "packed, by the model's own layers", "packed, full_determinism"
RUNGS: dict[str, dict[str, Any]] = {
    "half of token_budget": {"token_budget": 0.5},
    "tiled_mlp": {"tiled_mlp": True},
    "gradient_checkpointing": CHECKPOINTED,
    "gradient_checkpointing, half of token_budget": {**CHECKPOINTED, "token_budget": 0.5},
    "gradient_checkpointing, tiled_mlp": {**CHECKPOINTED, "tiled_mlp": True},
    "gradient_checkpointing, activation_offloading": {**CHECKPOINTED, "activation_offloading": True},
    "gradient_checkpointing, offload_embedding": {**CHECKPOINTED, "offload_embedding": True},
    LIGERS: {**CHECKPOINTED, "use_liger_kernel": True},
    PEFTS: {},
    "none of these": {},
}
IMPLEMENTATIONS = LAYOUTS | RUNGS | {ONE_ORDER: {}, OWN: {}}
# Dense 16-bit FLOP/s of tensor cores with fp32 sums, by a part of the card's name, by NVIDIA's data sheets.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


class Work(NamedTuple):
    """Prompts and completions to learn from."""

    shape: str
    prompts: int
    num_generations: int
    prompt_length: int
    completion_length: int
    uneven: bool  # lengths from an eighth of completion_length up to it
    checkpointing: bool
    device: str


@cache
def make_policy(shape: str, device: str, name: str, **settings: bool) -> Policy:
    policy = random_policy(shape, device, **settings)
    assert policy.packs
    if name == PEFTS:
        for layer in plain_lora_layers(policy.base):
            del layer.forward
    if name == OWN:
        policy.outlined = None
    return policy


def serves(work: Work, name: str) -> bool:
    """Tell whether a device and shape know the setting."""
    settings = IMPLEMENTATIONS[name]
    if "offload_embedding" in settings and SHAPES[work.shape][6]:  # it is the head, too
        return False
    return work.device == "cuda" or not settings.keys() & set(ONLY_ON_GPU)


def make_rollout(work: Work) -> Rollout:
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(10, SHAPES[work.shape][5] - 1, (length,), generator=draw).tolist()

    count = work.prompts * work.num_generations
    lengths = torch.full((count,), work.completion_length)
    if work.uneven:
        lengths = torch.randint(
            max(1, work.completion_length // 8), work.completion_length + 1, (count,), generator=draw
        )
    prompts = [text(work.prompt_length) for _ in range(work.prompts)]
    return Rollout.bare(prompts, [text(int(length)) for length in lengths], torch.randn(count, generator=draw))


def gradient(work: Work, name: str) -> Tensor:
    """The update's gradient, flat."""
    settings = {"gradient_checkpointing": work.checkpointing, **IMPLEMENTATIONS[name]}
    share, padding_free = settings.pop("token_budget", None), settings.pop("padding_free", True)
    policy = make_policy(work.shape, work.device, name if name in (PEFTS, OWN) else "", **settings)
    rollout = make_rollout(work)
    texts = work.prompts * (work.prompt_length + work.num_generations * work.completion_length)  # at most
    budget = 10**9 if share is None else max(1, ceil(share * texts))
    config = GRPOConfig(token_budget=budget, padding_free=padding_free)
    scaler, tokens = torch.amp.GradScaler(work.device, enabled=False), TokenMeter(rollout, policy.device)
    with deterministic(name == ONE_ORDER and work.device == "cuda"):
        backward(policy, rollout, tokens, Coefficients(0.0, 0.0), scaler, config, config.token_budget)
    return torch.cat([p.grad.flatten() for p in policy.parameters_of(policy.adapter).values() if p.grad is not None])


def build(name: str, work: Work, small: bool) -> measure.Run:
    """Make inputs and the call for measure.peak_above_inputs(), on a CPU in a process of its own."""
    if small:
        work = work._replace(prompt_length=8, completion_length=4, prompts=1)
    gradient(work._replace(prompt_length=8, completion_length=4, prompts=1), name)
    return lambda: gradient(work, name)


def bench(work: Work, names: list[str], repetitions: int, warmups: int) -> dict[str, dict]:
    """Per implementation: failed, or seconds (Timing), peak_bytes, mfu, error: the distance to the last gradient."""
    device = torch.device(work.device)

    runs = {name: lambda turn, name=name: gradient(work, name) for name in names}
    timings = measure.time_each(runs, device, repetitions, warmups)
    alive = [name for name in names if not isinstance(timings[name], Failed)]
    truth = gradient(work, alive[-1]) if alive else torch.zeros(1)
    results: dict[str, dict] = {}
    for name in names:
        if isinstance(timing := timings[name], Failed):
            results[name] = {"failed": timing.reason}
            continue
        results[name] = {
            "seconds": timing,
            "peak_bytes": measure.peak_above_inputs(partial(build, name, work), device),
            "mfu": mfu(work, timing.median, torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
            "error": ((gradient(work, name) - truth).norm() / truth.norm()).item(),
        }
    return results


def flops(work: Work) -> int:
    """Floating point operations of an update's forward and backward, without what is computed again.

    The weights are frozen, so that each takes 4 a token (a product, and its input's gradient): those of the layers for
    every token, the head's for those of completions. Attention takes 12 times the hidden size, a layer and a pair of
    tokens of which one sees the other. Adapters are not counted.
    """
    layers, hidden, mlp, heads, kv_heads, vocabulary, _ = SHAPES[work.shape]
    weights = layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * mlp)
    rollout = make_rollout(work)
    lengths = rollout.offsets.diff().tolist()
    tokens, counted = work.prompts * work.prompt_length + sum(lengths), sum(lengths)
    pairs = work.prompts * work.prompt_length**2 // 2
    pairs += sum(length * work.prompt_length + length**2 // 2 for length in lengths)
    return 4 * weights * tokens + 4 * vocabulary * hidden * counted + 12 * hidden * layers * pairs


def mfu(work: Work, seconds: float, card: str) -> float | None:
    """Model FLOP/s utilization of an update that took so many seconds: flops(work) of the card's peak, by PEAKS.

    None where the card is not in PEAKS.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    return None if peak is None else flops(work) / seconds / peak


class _Attention(torch.autograd.Function):
    """One launch for attention, and one for its gradient, which compute nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.zeros_like(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        both = torch.zeros_like(query)
        return both, both[:, : key.shape[1]], both[:, : value.shape[1]]


def _attend(self: Packed, query: Tensor, key: Tensor, value: Tensor, asked: Any) -> Tensor:
    return _Attention.apply(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)))[None]


# Kernels of a layer's pass as one launch each, which compute nothing.
STAND_INS: dict[str, Callable] = {
    "normed": lambda x, norm: torch.zeros_like(x),
    "added": lambda x, result, after, share, before: (total := torch.zeros_like(x), total),
    "normed_backward": lambda grad, x, norm, onto=None: torch.zeros_like(x),
    "heads": lambda x, norm, cos_sin, head_dim, paired: x.new_zeros(len(x), x.shape[1] // head_dim, head_dim),
    "heads_backward": lambda grad, x, norm, cos_sin, paired: grad.new_zeros(len(grad), grad.shape[1] * grad.shape[2]),
    "gated": lambda gate_up, activation: torch.zeros_like(gate_up[0]),
    "gated_backward": lambda grad, gate_up, activation: [*gate_up[:-1], gate_up[-1].zero_()],
}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside the `with`, 4-bit products, attention and this package's kernels are a launch each and compute nothing."""
    own = {name: getattr(layer_pass, name) for name in STAND_INS}
    attend = Packed.attend
    for name, stand_in in STAND_INS.items():
        setattr(layer_pass, name, stand_in)
    Packed.attend = _attend
    try:
        with _without_products():
            yield
    finally:
        Packed.attend = attend
        for name, kernel in own.items():
            setattr(layer_pass, name, kernel)


@contextlib.contextmanager
def _without_products() -> Iterator[None]:
    """Have bitsandbytes' 4-bit product on a CPU return zeros at once inside the `with`, through all of its calls."""
    library = torch.library.Library("bitsandbytes", "IMPL")

    def zeros(x: Tensor, codes: Tensor, shape: list[int], *_: Any, **__: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], shape[0])

    library.impl("gemm_4bit", zeros, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


NO_LAUNCH = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
    "expand", "is_same_size", "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that are a launch on a GPU: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in NO_LAUNCH
        return function(*arguments, **(keywords or {}))


def bench_host(repetitions: int, warmups: int) -> dict[str, dict]:
    """Seconds of this thread, and launches a layer, of updates and reference passes of 28 layers on 28 tokens.

    So small are the tensors that the time is the host's. It is in fp32, since a CPU's products of few rows in 16 bits
    take 7 times as long; launches are those of bf16, with its casts.
    """
    found: dict[str, dict] = {}
    for bf16 in (False, True):
        policy = make_policy("28-tiny-layers", "cpu", "", gradient_checkpointing=True, bf16=bf16)
        work = Work("28-tiny-layers", 1, 3, 7, 7, uneven=False, checkpointing=True, device="cpu")
        rollout, config = make_rollout(work), GRPOConfig(token_budget=10**9, bf16=bf16)
        (batch,) = micro_batches(policy, rollout, config, config.token_budget, [True] * 3)
        outlined = policy.outlined

        def update(policy: Policy, batch: MicroBatch) -> None:
            policy.logprobs(batch, 1.0).sum().backward()

        def reference(policy: Policy, batch: MicroBatch) -> None:
            with policy.as_base():
                policy.logprobs(batch, 1.0)

        with as_on_a_gpu():
            for name, run in (("update", update), ("reference", reference)):
                for policy.outlined in (outlined, None):
                    way = "by outline" if policy.outlined else "by the model's own layers"
                    result = found.setdefault(f"{name}, {way}", {})
                    run(policy, batch)
                    if bf16:
                        with Launches() as launches:
                            run(policy, batch)
                        result["launches"] = launches.count / 28
                        continue
                    spent = []
                    for _ in range(warmups + repetitions):
                        start = time.thread_time()
                        run(policy, batch)
                        spent.append(time.thread_time() - start)
                    spent = sorted(spent[warmups:])
                    result["seconds"] = measure.Timing(spent[len(spent) // 2], spent[0], spent[-1], repetitions)
        policy.outlined = outlined
    return found


def bench_optimizers(work: Work, repetitions: int, warmups: int) -> dict[str, dict]:
    """Per optimizer: failed, or seconds (Timing) of a step, and state_bytes that it keeps on the device."""
    device = torch.device(work.device)
    policy = make_policy(work.shape, work.device, "", gradient_checkpointing=work.checkpointing)
    results: dict[str, dict] = {}
    for name in OPTIMIZERS:
        if work.device == "cpu" and name.startswith("paged"):
            continue
        parameters = [nn.Parameter(p.detach().clone()) for p in policy.parameters_of(policy.adapter).values()]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = make_optimizer(parameters, GRPOConfig(optim=name))
        timing = measure.time_each({name: lambda turn, step=optimizer.step: step()}, device, repetitions, warmups)[name]
        if isinstance(timing, Failed):
            results[name] = {"failed": timing.reason}
            continue
        state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
        kept = {x.data_ptr(): x.nbytes for x in state if x.numel() > 1 and not getattr(x, "is_paged", False)}
        results[name] = {"seconds": timing, "state_bytes": sum(kept.values())}
    return results


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    made = [_updates(found)] if found["results"] else []
    if "host" in found:
        rows = [
            [name, measure.spread(result["seconds"], 1e3), f"{result['launches']:.0f}"]
            for name, result in found["host"].items()
        ]
        made.append(measure.markdown_table(["28 tiny layers", "CPU ms", "launches a layer"], rows))
    if "optimizers" in found:
        made.append(_optimizers(found))
    return "\n\n".join(made)


def _optimizers(found: dict[str, Any]) -> str:
    def row(name: str, result: dict) -> list[str]:
        if "failed" in result:
            return [name, result["failed"], ""]
        return [name, measure.spread(result["seconds"], 1e3), f"{result['state_bytes'] / 2**20:.1f}"]

    clock = "ms" if found["work"]["device"] == "cuda" else "CPU ms"
    rows = [row(name, result) for name, result in found["optimizers"].items()]
    return measure.markdown_table([f"{found['work']['shape']}: a step by optim", clock, "state, MiB"], rows)


def _updates(found: dict[str, Any]) -> str:
    work, clock = Work(**found["work"]), "s" if found["work"]["device"] == "cuda" else "CPU s"

    def row(name: str, result: dict) -> list[str]:
        if "failed" in result:
            return [name, result["failed"], "", "", ""]
        used = "" if result.get("mfu") is None else f"{result['mfu']:.1%}"
        seconds, peak = measure.spread(result["seconds"]), measure.mib(result["peak_bytes"])
        return [name, seconds, used, peak, f"{result['error']:.1e}"]

    title = (
        f"{work.shape}: {work.prompts} prompts of {work.prompt_length} x {work.num_generations} of "
        f"{'up to ' if work.uneven else ''}{work.completion_length}{', checkpointed' if work.checkpointing else ''}"
    )
    return measure.markdown_table(
        [title, clock, "MFU", "peak MiB", "gradient, from the last row's"],
        [row(n, r) for n, r in found["results"].items()],
    )


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompts", type=measure.positive, default=1)
    parser.add_argument("--num_generations", type=measure.positive, default=8)
    parser.add_argument("--prompt_length", type=measure.positive, default=512)
    parser.add_argument("--completion_length", type=measure.positive, default=128)
    parser.add_argument("--uneven", action="store_true", help="lengths from an eighth of completion_length up to it")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--rungs", action="store_true", help="the settings that need less memory, with packed rows")
    parser.add_argument("--host", action="store_true", help="the host's time alone, and nothing else")
    parser.add_argument("--only", action="append", choices=IMPLEMENTATIONS, help="may be given more than once")
    parser.add_argument("--quick", action="store_true", help="tiny lengths: does everything run?")
    parser.add_argument("--repetitions", type=measure.positive, default=5)
    parser.add_argument("--warmups", type=measure.natural, default=1)
    measure.add_device(parser)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if arguments.device == "cpu":
        measure.preload("lowmem_grpo.benchmarks.bench_update")  # as a program, __name__ is another
    lengths = (16, 8) if arguments.quick else (arguments.prompt_length, arguments.completion_length)
    work = Work(
        arguments.shape, arguments.prompts, arguments.num_generations, *lengths, arguments.uneven,
        arguments.checkpointing, arguments.device,
    )  # fmt: skip
    names = arguments.only or [name for name in (RUNGS if arguments.rungs else LAYOUTS) if serves(work, name)]
    if ONE_ORDER in names and arguments.device == "cuda":
        prepare(device)
    repetitions = 1 if arguments.quick else arguments.repetitions
    results: dict[str, Any] = {"results": {}}
    if arguments.host:
        results["host"] = bench_host(repetitions, arguments.warmups)
    else:
        results["results"] = bench(work, names, repetitions, arguments.warmups)
    if arguments.rungs:
        results["optimizers"] = bench_optimizers(work, repetitions, arguments.warmups)
    found = measure.document("bench_update", argv, device, work=work, **results)
    measure.show(tables(found))
    measure.save(found, arguments.output)


if __name__ == "__main__":
    main()
