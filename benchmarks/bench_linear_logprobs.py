"""Time, memory and error of per-token log-probabilities under a frozen head: ours, and what others do.

    python -m lowmem_grpo.benchmarks.bench_linear_logprobs [--shape N,D,V ...] [--only NAME ...] [--output FILE]

All get the same bf16 hidden states (N, D), head (V, D) and labels (N,), return (N,) log-probabilities, and are
differentiated with respect to the hidden states with a random gradient for each token. The logits have a standard
deviation of 2.5, and p of the label runs from 1e-10 to 0.99999: with half of the rows it is an improbable token, the
other half is pushed towards theirs. Errors are those of 256 rows against fp64, a gradient's relative to its own row.
"""

import argparse
import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.kernels import head_shares
from lowmem_grpo.kernels.linear_logprobs import linear_logprobs, quantize_head

SHAPES = {
    "cpu": [(1024, 896, 151936)],
    "cuda": [(n, d, v) for d, v in [(1536, 151936), (3584, 151936), (4096, 128256)] for n in (4096, 16384, 32768)],
}
QUICK = [(100, 64, 3000)]
# Of tiles that stay in an L2 cache of 50 MB, and of few and large ones.
SWEEP = [
    (1024, 4096), (1024, 8192), (2048, 4096), (2048, 8192), (4096, 4096), (4096, 8192), (4096, 16384), (8192, 4096),
    (8192, 8192),
]  # fmt: skip
REPETITIONS = {"cpu": (3, 0), "cuda": (10, 3)}  # timed, warm-ups; every implementation has run once before these
TRL, LIGER, CCE = "trl.trainer.utils", "liger_kernel.chunked_loss.fused_linear_ppo", "cut_cross_entropy"
LOGIT_STD = 2.5
ROWS_CHECKED = 256


class Inputs(NamedTuple):
    hidden: Tensor  # (N, D) bf16
    weight: Tensor  # (V, D) bf16, frozen
    labels: Tensor  # (N,) int64
    gradient: Tensor  # (N,) fp32, d loss / d logp


class Implementation(NamedTuple):
    logprobs: Callable[[Tensor, Any, Tensor, float], Tensor]  # hidden, what head gave, labels, temperature -> (N,)
    calls: str  # what exactly is measured
    module: str | None = None  # the library's module that it imports
    head: Callable[[Tensor], Any] = lambda weight: weight  # done once beforehand, neither timed nor counted
    setting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    is_exact: bool = True  # False where the result is not a log-probability


class Errors(NamedTuple):
    logprob_max: float
    gradient_median: float
    gradient_max: float


def make_inputs(shape: tuple[int, int, int], device: torch.device, seed: int = 0) -> Inputs:
    rows, width, vocabulary = shape
    generator = torch.Generator(device).manual_seed(seed)
    bf16 = {"dtype": torch.bfloat16, "device": device}
    weight = torch.empty(vocabulary, width, **bf16).normal_(0, LOGIT_STD / width**0.5, generator=generator)
    hidden = torch.empty(rows, width, device=device).normal_(generator=generator)
    labels = torch.randint(vocabulary, (rows,), device=device, generator=generator)
    # log sum exp of Gaussian logits. A label's logit raised to 6 below or 12 above it has p = 0.002 to 0.99999.
    level = math.log(vocabulary) + LOGIT_STD**2 / 2
    raised = torch.empty(rows, 1, device=device).uniform_(level - 6, level + 12, generator=generator)
    raised[rows // 2 :] = 0
    direction = weight[labels].float()
    hidden += raised * direction / direction.square().sum(-1, keepdim=True)
    gradient = torch.empty(rows, device=device).normal_(generator=generator)
    return Inputs(hidden.bfloat16(), weight, labels, gradient)


def implementations(device: torch.device, sweep_chunks: bool = False) -> dict[str, Implementation]:
    """All implementations to compare on a device; a library that is missing shows when it is called."""
    on_cuda = device.type == "cuda"
    found = {f"ours{suffix}": _ours(**options) for suffix, options in _our_options(on_cuda, sweep_chunks).items()}
    found["ours int8 head"] = Implementation(
        _int8_head, "linear_logprobs(weight_scale=...), as with load_head_in_8bit", head=quantize_head
    )
    found |= {
        "TRL": Implementation(_trl, "ChunkedLogProbFunction with log_probs and entropy, as GRPOTrainer does", TRL),
        "TRL no entropy": Implementation(
            partial(_trl, outputs=("log_probs",)), "the same with log_probs alone, as for its reference model", TRL
        ),
        "TRL fp32 head": Implementation(
            _trl_fp32_head, "as cast_lm_head_to_fp32 does; its fp32 head (4 V D bytes) not counted", TRL, Tensor.float
        ),
        "Liger": Implementation(
            _liger, "LigerFusedLinearPPOBase.chunk_forward, which LigerFusedLinearGRPOLoss calls", LIGER
        ),
    }
    if on_cuda:
        found |= {
            "ours, product and fold apart": _ours()._replace(setting=_apart),
            "Liger TF32": Implementation(_liger, "the same with TF32 for fp32 operands", LIGER, setting=_tf32),
            "CCE": Implementation(_cce, "linear_cross_entropy(reduction='none'), its gradient filter on", CCE),
            "CCE unfiltered": Implementation(partial(_cce, filter_eps=None), "the same with filter_eps=None", CCE),
        }
    found |= {
        "full logits bf16": Implementation(_full_bf16, "F.linear, / temperature, log_softmax in bf16, gather"),
        "full logits fp32": Implementation(
            _full_fp32, "F.linear in bf16, .float(), / temperature, log_softmax, gather"
        ),
    }
    if on_cuda:
        compiled = torch.compile(_full_fp32, dynamic=False)
        found["full logits compiled"] = Implementation(compiled, "torch.compile of full logits fp32")
    found[FLOOR] = Implementation(
        lambda hidden, weight, labels, temperature: _BareGemms.apply(hidden, weight),
        "bf16 tile = h W^T, then tile W summed up; the forward alone is one GEMM. No log-probabilities: a floor",
        is_exact=False,
    )
    if not on_cuda:
        found["two bare fp32 GEMMs"] = Implementation(
            lambda hidden, weight, labels, temperature: _BareGemms.apply(hidden.float(), weight),
            "the same in fp32, the head widened part by part: the floor of fp32 tiles on a CPU",
            is_exact=False,
        )
    return found


FLOOR = "two bare GEMMs"


def _our_options(on_cuda: bool, sweep_chunks: bool) -> dict[str, dict]:
    known = inspect.signature(linear_logprobs).parameters
    options: dict[str, dict] = {"": {}, " with entropy": {"return_entropy": True}}
    if "tile_dtype" in known and not on_cuda:
        options[" bf16 tiles"] = {"tile_dtype": torch.bfloat16}
    if "backend" in known and on_cuda:
        options[" torch backend"] = {"backend": "torch"}
    if sweep_chunks:
        options |= {f" {c} x {vb}": {"chunks": (c, vb)} for c, vb in SWEEP}
    return options


def _ours(**options) -> Implementation:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
        result = linear_logprobs(hidden, weight, labels, temperature=temperature, **options)
        return result[0] if options.get("return_entropy") else result

    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    return Implementation(logprobs, f"linear_logprobs({shown})")


def _int8_head(hidden: Tensor, weight: tuple[Tensor, Tensor], labels: Tensor, temperature: float) -> Tensor:
    return linear_logprobs(hidden, weight[0], labels, weight_scale=weight[1], temperature=temperature)


def _trl(hidden, weight, labels, temperature, outputs=("log_probs", "entropy")) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK_SIZE

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, temperature, CHUNK_SIZE, None, 1.0, outputs)[0]


def _trl_fp32_head(hidden, weight, labels, temperature) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return _trl(hidden.float(), weight, labels, temperature)


def _liger(hidden, weight, labels, temperature) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, labels[None], temperature=temperature)[0]


@contextlib.contextmanager
def _apart():
    """Keep product and fold apart: a library's product into fp32 scores, which another kernel folds."""
    own, head_shares.serves = head_shares.serves, lambda hidden, weight: False
    try:
        yield
    finally:
        head_shares.serves = own


@contextlib.contextmanager
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cce(hidden, weight, labels, temperature, **options) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]: not in the pinned set

    scaled = hidden if temperature == 1.0 else hidden / temperature  # it knows no temperature
    return -linear_cross_entropy(scaled, weight, labels, reduction="none", **options)


def _full_bf16(hidden, weight, labels, temperature) -> Tensor:
    logits = F.linear(hidden, weight)
    return (logits / temperature).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _full_fp32(hidden, weight, labels, temperature) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return (logits / temperature).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


class _BareGemms(torch.autograd.Function):
    """The matrix products of a training pass and nothing else, with a library's own preferred output dtype."""

    @staticmethod
    def forward(ctx, hidden, weight, width=16384):
        products = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        tile = hidden.new_empty(hidden.shape[0], min(width, weight.shape[0]))
        for part in weight.split(width):
            part = part.to(hidden.dtype)
            scores = torch.mm(hidden, part.t(), out=tile[:, : part.shape[0]])
            if products is not None:
                products.addmm_(scores, part)
        ctx.save_for_backward(products)
        return tile[:, 0].float()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0], None, None


def call(implementation: Implementation, inputs: Inputs, temperature: float, backward: bool) -> tuple[Tensor, ...]:
    """The result (logp (N,),) or with backward also d loss / dh (N, D)."""
    hidden = inputs.hidden.detach().requires_grad_(backward)
    with implementation.setting(), torch.set_grad_enabled(backward):
        logprobs = implementation.logprobs(hidden, inputs.weight, inputs.labels, temperature)
        if not backward:
            return (logprobs,)
        (gradient,) = torch.autograd.grad(logprobs, hidden, inputs.gradient.to(logprobs.dtype))
        return logprobs.detach(), gradient


def truth(inputs: Inputs, temperature: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The fp64 (logp, d loss / dh) of these rows, the head widened vocabulary chunk by vocabulary chunk."""
    hidden, labels, gradient = inputs.hidden[rows].double(), inputs.labels[rows], inputs.gradient[rows].double()
    scores = torch.cat([hidden @ part.double().t() / temperature for part in inputs.weight.split(8192)], -1)  # (N, V)
    logprobs = scores.log_softmax(-1)
    slope = logprobs.exp().neg_()
    slope[torch.arange(len(rows), device=rows.device), labels] += 1
    slope *= gradient[:, None] / temperature
    parts = zip(slope.split(8192, -1), inputs.weight.split(8192), strict=True)
    return logprobs.gather(-1, labels[:, None])[:, 0], torch.stack([s @ w.double() for s, w in parts]).sum(0)


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, Tensor], rows: Tensor) -> Errors:
    """Largest error of a log-probability, and the errors of the gradients' rows, each relative to its length."""
    logprobs, gradient = (values[rows].double() for values in found)
    relative = (gradient - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)
    return Errors((logprobs - exact[0]).abs().max().item(), relative.median().item(), relative.max().item())


def build(
    name: str, shape: tuple[int, int, int], temperature: float, backward: bool, sweep_chunks: bool, device: str,
    small: bool,
) -> measure.Run:  # fmt: skip
    """Make inputs and the call for measure.peak_above_inputs(), on a CPU in a process of its own."""
    rows, width, vocabulary = shape
    inputs = make_inputs((min(rows, 64), width, min(vocabulary, 4096)) if small else shape, torch.device(device))
    implementation = implementations(torch.device(device), sweep_chunks)[name]
    inputs = inputs._replace(weight=implementation.head(inputs.weight))
    return lambda: call(implementation, inputs, temperature, backward)


def bench_shape(
    shape: tuple[int, int, int], chosen: dict[str, Implementation], device: torch.device, arguments: argparse.Namespace
) -> dict[str, dict]:
    """Per implementation: calls, and either failed, or train_s, score_s, train_bytes, score_bytes and errors."""
    sets = [make_inputs(shape, device, seed) for seed in range(_sets_of_inputs(shape, device))]
    rows = torch.linspace(0, shape[0] - 1, min(ROWS_CHECKED, shape[0]), device=device).long()
    exact = truth(sets[0], arguments.temperature, rows)
    torch.compiler.reset()  # a function that has been compiled for eight shapes would run eagerly for the ninth

    results: dict[str, dict] = {name: {"calls": implementation.calls} for name, implementation in chosen.items()}
    for name, implementation in chosen.items():
        found = _first_call(implementation, sets[0], arguments.temperature)
        if isinstance(found, Failed):
            results[name]["failed"] = found.reason
        elif implementation.is_exact:
            results[name]["errors"] = errors(found, exact, rows)._asdict()
        del found
    alive = {name: implementation for name, implementation in chosen.items() if "failed" not in results[name]}

    heads = {name: [implementation.head(inputs.weight) for inputs in sets] for name, implementation in alive.items()}

    def run(name: str, backward: bool, turn: int) -> None:
        inputs = sets[turn % len(sets)]
        inputs = inputs._replace(weight=heads[name][turn % len(sets)])
        call(alive[name], inputs, arguments.temperature, backward)

    for key, backward in {"train_s": True, "score_s": False}.items():
        runs = {name: partial(run, name, backward) for name in alive}
        for name, timing in measure.time_each(runs, device, arguments.repetitions, arguments.warmups).items():
            results[name][key] = timing
    heads.clear()
    sets.clear()
    for key, backward in {"train_bytes": True, "score_bytes": False}.items():
        for name in alive:
            given = partial(build, name, shape, arguments.temperature, backward, arguments.sweep_chunks, str(device))
            results[name][key] = measure.peak_above_inputs(given, device)
    return results


def _first_call(implementation: Implementation, inputs: Inputs, temperature: float) -> tuple[Tensor, ...] | Failed:
    """Check a result and warm up: the first call imports, compiles and tunes."""
    if implementation.module and measure.missing(implementation.module):
        return Failed(measure.NOT_INSTALLED)

    def run() -> tuple[Tensor, ...]:
        head = implementation.head(inputs.weight)
        return call(implementation, inputs._replace(weight=head), temperature, True)

    return measure.attempt(run)


def _sets_of_inputs(shape: tuple[int, int, int], device: torch.device) -> int:
    """Sets of inputs, so many that none is in the L2 cache from the turn before."""
    if device.type != "cuda":
        return 1
    rows, width, vocabulary = shape
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, math.ceil(2 * cache / (2 * width * (rows + vocabulary))))


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    unit = "ms" if "gpu" in found["machine"] else "CPU s"
    return "\n\n".join(_tables(entry["N,D,V"], entry["results"], unit) for entry in found["shapes"])


def _tables(shape: Sequence[int], results: dict[str, dict], unit: str) -> str:
    scale = 1e3 if unit == "ms" else 1.0

    def row(name: str, result: dict) -> list[str]:
        if "failed" in result:
            return [name, result["failed"], *[""] * 7]
        error = [f"{value:.1e}" for value in result["errors"].values()] if "errors" in result else [""] * 3
        return [
            name, measure.spread(result["train_s"], scale), measure.spread(result["score_s"], scale),
            _multiples(result, floor), measure.mib(result["train_bytes"]), measure.mib(result["score_bytes"]), *error,
        ]  # fmt: skip

    header = [
        "N {}, D {}, V {}".format(*shape), f"forward + backward, {unit}", f"forward only, {unit}", "of bare GEMMs",
        "peak MiB", "forward only", "logp error", "gradient error, median", "largest",
    ]  # fmt: skip
    floor = results.get(FLOOR, {})
    table = measure.markdown_table(header, [row(name, result) for name, result in results.items()])
    return f"{table}\n\n{_ratios(results)}"


def _multiples(result: dict, floor: dict) -> str:
    """Times of a training pass and of one without gradient over those of the bare products."""
    if any("median" not in one.get(key, {}) for one in (result, floor) for key in ("train_s", "score_s")):
        return ""
    return " / ".join(f"{result[key]['median'] / floor[key]['median']:.2f}" for key in ("train_s", "score_s"))


def _ratios(results: dict[str, dict]) -> str:
    """Times of the others over ours, forward and backward / forward only."""

    def median(name: str, key: str) -> float:
        return results[name][key]["median"]

    timed = [name for name in results if "train_s" in results[name]]
    ours = [name for name in timed if name.startswith("ours")]
    others = [name for name in timed if name not in ours]
    rows = [
        [other, *(" / ".join(f"{median(other, k) / median(o, k):.2f}" for k in ("train_s", "score_s")) for o in ours)]
        for other in others
    ]
    return measure.markdown_table(["time as a multiple of", *ours], rows) if ours and others else ""


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", action="append", type=_shape, metavar="N,D,V", help="may be given more than once")
    parser.add_argument("--quick", action="store_true", help="a tiny shape: does everything run?")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="an implementation; may be given more than once"
    )
    parser.add_argument(
        "--sweep_chunks", action="store_true", help="ours with other sizes of tile; beside these --only and bare GEMMs"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repetitions", type=measure.positive, help="3 on a CPU, 10 on a GPU")
    parser.add_argument(
        "--warmups", type=measure.natural, help="0 on a CPU, 3 on a GPU, besides the run that is checked"
    )
    parser.add_argument(
        "--threads", type=measure.positive, help="on a CPU; with 1, CPU time holds no waiting for other threads"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def _shape(text: str) -> tuple[int, int, int]:
    rows, width, vocabulary = map(int, text.split(","))
    return rows, width, vocabulary


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    device = torch.device(arguments.device)
    repetitions, warmups = REPETITIONS[device.type]
    arguments.repetitions = repetitions if arguments.repetitions is None else arguments.repetitions
    arguments.warmups = warmups if arguments.warmups is None else arguments.warmups
    chosen = implementations(device, arguments.sweep_chunks)
    unknown = set(arguments.only or ()) - set(chosen)
    if unknown:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: there are {', '.join(chosen)}")
    names = arguments.only or chosen
    if arguments.sweep_chunks:
        swept = {"ours", *(f"ours {c} x {vb}" for c, vb in SWEEP), FLOOR}
        names = [name for name in chosen if name in swept or name in (arguments.only or ())]
    chosen = {name: chosen[name] for name in names}

    if device.type == "cpu":
        measure.preload(linear_logprobs.__module__, *sorted({one.module for one in chosen.values() if one.module}))
        torch.set_num_threads(arguments.threads or torch.get_num_threads())
    shapes = arguments.shape or (QUICK if arguments.quick else SHAPES[device.type])
    found = measure.document("bench_linear_logprobs", argv, device, temperature=arguments.temperature, shapes=[])
    for shape in shapes:
        results = measure.plain(bench_shape(shape, chosen, device, arguments))
        found["shapes"].append({"N,D,V": shape, "results": results})
        measure.show(tables({**found, "shapes": found["shapes"][-1:]}))
        measure.save(found, arguments.output)


if __name__ == "__main__":
    main()
