"""Tokens per second and memory of sampling: ours, and what transformers does with the same model.

    python -m lowmem_grpo.benchmarks.bench_rollout [--shape NAME or demo] [--prompts 4] [--num_generations 8]
        [--prompt_length 256] [--max_completion_length 256] [--only NAME ...] [--output FILE]

All sample from the same random 4-bit model with LoRA adapters, at temperature 1. One token in --mean_length of the
vocabulary ends a completion, so that lengths are uneven (a huge one: all of the maximum). Every implementation draws
its own completions, and a rate is its tokens over its time. Peak memory is above the loaded model, of a second call; on
a CPU also of a first one, which makes kernels, one for each shape of a product, that stay.
"""

from dataclasses import replace
from functools import cache, partial
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.measure import Failed
from lowmem_grpo.benchmarks.random_model import NAMES, random_policy, vocabulary_of
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt, tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe
from lowmem_grpo.generate import hf
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.generate.shape import StoreShape
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.policy import Policy

DEMO = "demo"  # the demo's own model and prompts, whose completions end by themselves
RECIPE = recipe("unused", seed=0)


class Work(NamedTuple):
    """Prompts and completions to sample."""

    shape: str
    prompts: int
    num_generations: int
    prompt_length: int
    max_completion_length: int
    mean_length: int
    device: str
    rollout_token_budget: int = 10**9

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_completion_length=self.max_completion_length, temperature=1.0)

    def texts(self) -> list[list[int]]:
        if self.shape == DEMO:
            rows = load_rows(task.rows(task.splits()[0][: self.prompts]), RECIPE)
            return [prompt.ids for prompt in tokenize_prompts(rows, make_policy(self).tokenizer, RECIPE)[0]]
        draw = torch.Generator().manual_seed(0)
        size = (self.prompts, self.prompt_length)
        return torch.randint(self.vocabulary // 2, self.vocabulary, size, generator=draw).tolist()

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.shape)


def make_policy(work: Work) -> Policy:
    return _demo(work.device) if work.shape == DEMO else _random(work)


@cache
def _demo(device: str) -> Policy:
    return load_policy(str(MODEL), AutoTokenizer.from_pretrained(MODEL), replace(RECIPE, use_cpu=device == "cpu"))


@cache
def _random(work: Work) -> Policy:
    return random_policy(work.shape, work.device, ends=max(1, work.vocabulary // work.mean_length))


class HalfTheSlots(Sampler):
    def store_shape(self, prompts: list[list[int]], num_generations: int, num_tokens: int) -> StoreShape:
        return super().store_shape(prompts, num_generations, num_tokens).at_most(len(prompts) * num_generations // 2)


@cache  # as in a run: what a first call learns serves the later ones
def _sampler(policy: Policy, work: Work, kind: type[Sampler], **settings) -> Sampler:
    config = GRPOConfig(
        max_completion_length=work.max_completion_length, rollout_token_budget=work.rollout_token_budget,
        **{"rollout_weights": "4bit", **settings},
    )  # fmt: skip
    return kind(policy, config)


def _ours(policy: Policy, work: Work, kind: type[Sampler] = Sampler, **settings) -> list[list[int]]:
    prompts = [Prompt("", text, {}) for text in work.texts()]
    sampled = _sampler(policy, work, kind, **settings).complete(prompts, work.num_generations)
    return [completion.ids for completion in sampled.completions]


def _generate(policy: Policy, work: Work) -> list[list[int]]:
    found, _ = hf.sample(policy, work.texts(), work.num_generations, work.params, work.rollout_token_budget)
    return [completion.ids for completion in found]


def _generate_static(policy: Policy, work: Work) -> list[list[int]]:
    policy.base.generate = partial(policy.base.generate, cache_implementation="static")
    try:
        return _generate(policy, work)
    finally:
        del policy.base.generate


def _generate_batch(policy: Policy, work: Work) -> list[list[int]]:
    rows = [text for text in work.texts() for _ in range(work.num_generations)]
    needed = len(rows) * ceil((work.prompt_length + work.max_completion_length) / 256)
    blocks = min(needed, ceil(work.rollout_token_budget / 256)) + 4
    config = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=2048)
    with policy.inference(), policy.autocast():
        out = policy.base.generate_batch(
            rows, generation_config=hf.generation_config(policy, work.params), continuous_batching_config=config,
            progress_bar=False,
        )  # fmt: skip
    policy.model.train()  # generate_batch leaves parts of the model in evaluation mode
    return [result.generated_tokens for result in out.values()]


IMPLEMENTATIONS = {
    "ours": _ours,
    "ours, half the slots": partial(_ours, kind=HalfTheSlots),
    "ours, int8 keys and values": partial(_ours, rollout_kv="int8"),
    "ours, without pages": partial(_ours, rollout_paged=False),
    "ours, without CUDA graphs": partial(_ours, rollout_cuda_graphs=False),
    "ours, dense weights": partial(_ours, rollout_weights="dense"),
    "generate": _generate,
    "generate, static cache": _generate_static,
    "generate_batch": _generate_batch,
}


def build(name: str, work: Work, first: bool, small: bool) -> measure.Run:
    """Make inputs and the call for measure.peak_above_inputs(), on a CPU in a process of its own."""
    policy = make_policy(work)
    if small and first:
        work = work._replace(prompt_length=8, max_completion_length=4, prompts=1)
    return lambda: IMPLEMENTATIONS[name](policy, work)


def bench(work: Work, names: list[str], repetitions: int, warmups: int) -> dict[str, dict]:
    """Per implementation: failed, or seconds (Timing), mean_length, tokens_per_s, peak_bytes and first_peak_bytes."""
    device = torch.device(work.device)
    policy = make_policy(work)
    counts: dict[str, list[int]] = {name: [] for name in names}

    def run(name: str, turn: int) -> None:
        torch.manual_seed(turn)
        counts[name].append(sum(map(len, IMPLEMENTATIONS[name](policy, work))))

    timings = measure.time_each({name: partial(run, name) for name in names}, device, repetitions, warmups)
    results: dict[str, dict] = {}
    for name, timing in timings.items():
        if isinstance(timing, Failed):
            results[name] = {"failed": timing.reason}
            continue
        tokens = sum(counts[name][warmups:])
        results[name] = {
            "seconds": timing,
            "mean_length": tokens / repetitions / (work.prompts * work.num_generations),
            "tokens_per_s": tokens / repetitions / timing.median,
            "peak_bytes": measure.peak_above_inputs(partial(build, name, work, False), device),
        }
        if work.device == "cpu":
            results[name]["first_peak_bytes"] = measure.peak_above_inputs(partial(build, name, work, True), device)
    return results


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    return "\n\n".join(_table(Work(**entry["work"]), entry["results"]) for entry in found["lengths"])


def _table(work: Work, results: dict[str, dict]) -> str:
    clock = "s" if work.device == "cuda" else "CPU s"
    base = results.get("generate", {}).get("tokens_per_s")
    first = any("first_peak_bytes" in result for result in results.values())

    def row(name: str, result: dict) -> list[str]:
        if "failed" in result:
            return [name, result["failed"], *[""] * (len(header) - 2)]
        rate = result["tokens_per_s"]
        return [
            name, measure.spread(result["seconds"]), f"{result['mean_length']:.0f}", f"{rate:.0f}",
            f"{rate / base:.2f}" if base else "", measure.mib(result["peak_bytes"]),
            *([measure.mib(result["first_peak_bytes"])] if first else []),
        ]  # fmt: skip

    header = [
        f"{work.shape}: {work.prompts} prompts of {work.prompt_length} x {work.num_generations}, at most "
        f"{work.max_completion_length} new"
        f"{'' if work.rollout_token_budget == 10**9 else f', {work.rollout_token_budget} tokens at once'}",
        clock, "mean length", f"tokens per {clock}", "x generate", "peak MiB", *(["of a first call"] if first else []),
    ]  # fmt: skip
    return measure.markdown_table(header, [row(name, result) for name, result in results.items()])


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", choices=[*NAMES, DEMO], default="tiny")
    parser.add_argument("--prompts", type=measure.positive, default=4)
    parser.add_argument("--num_generations", type=measure.positive, default=8)
    parser.add_argument(
        "--prompt_length", type=measure.positive, help="(default: 256; the demo's prompts have their own)"
    )
    parser.add_argument(
        "--max_completion_length", type=measure.positive, action="append", help="may be given more than once"
    )
    parser.add_argument(
        "--mean_length",
        type=measure.positive,
        help="of a completion that nothing cuts off (default: 100; not the demo's)",
    )
    parser.add_argument(
        "--rollout_token_budget", type=measure.positive, default=10**9, help="tokens of keys and values at once"
    )
    parser.add_argument("--only", action="append", choices=IMPLEMENTATIONS, help="may be given more than once")
    parser.add_argument("--quick", action="store_true", help="tiny lengths: does everything run?")
    parser.add_argument("--repetitions", type=measure.positive, default=5)
    parser.add_argument("--warmups", type=measure.natural, default=1)
    measure.add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.shape == DEMO and (arguments.prompt_length or arguments.mean_length):
        parser.error(
            "the demo's prompts and completions have lengths of their own; leave --prompt_length, --mean_length out"
        )
    device = torch.device(arguments.device)
    if arguments.device == "cpu":
        measure.preload("lowmem_grpo.benchmarks.bench_rollout")  # as a program, __name__ is another
    lengths = []
    for longest in [8] if arguments.quick else arguments.max_completion_length or [256, 64]:
        work = Work(
            arguments.shape, arguments.prompts, arguments.num_generations, 8 if arguments.quick else
            arguments.prompt_length or 256, longest, arguments.mean_length or 100, arguments.device,
            arguments.rollout_token_budget,
        )  # fmt: skip
        if work.shape == DEMO:
            work = work._replace(prompt_length=max(map(len, work.texts())))
        skipped = () if arguments.device == "cuda" else ("ours, without pages", "ours, without CUDA graphs")
        names = arguments.only or [name for name in IMPLEMENTATIONS if name not in skipped]
        lengths.append({"work": work._asdict(), "results": {}})
        # On a GPU one after the other, each saved as it is done: a machine there is lent for minutes.
        for group in [[name] for name in names] if arguments.device == "cuda" else [names]:
            results = bench(work, group, 1 if arguments.quick else arguments.repetitions, arguments.warmups)
            lengths[-1]["results"] |= measure.plain(results)
            measure.save(measure.document("bench_rollout", argv, device, lengths=lengths), arguments.output)
        measure.show(_table(work, lengths[-1]["results"]))


if __name__ == "__main__":
    main()
