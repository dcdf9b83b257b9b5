"""The documents' tables and the pictures, from the JSON that the suite writes; nothing in them is typed by hand.

    python -m lowmem_grpo.benchmarks.report [--documents README.md docs/*.md] [--results benchmarks/results]

A table stands between `<!-- FILE.json PART -->` and `<!-- end -->`, and is made anew from that part of that file. FILE
may have a star, as nvidia-*: then it is the newest result of them all, or "Not measured yet." until there is one. The
part `summary` of such files is a line for each part of the GPU programme.
`<!-- FILE.json PART: ROW; ROW | COLUMN; COLUMN -->` is the part's first table with these rows and columns alone, in
this order; without a bar every column. Pictures lie beside each file, by its name.
"""

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_grpo.benchmarks.measure import markdown_table

PLACE = re.compile(
    r"(<!-- (?P<file>\S+\.json) (?P<part>[^\s:]+)(?:: (?P<rows>[^|\n]+?)(?: \| (?P<columns>[^\n]+?))?)? -->\n)"
    r".*?<!-- end -->",
    re.DOTALL,
)
CARDS_GB = (6, 8, 12, 16, 24)


def tables(document: dict[str, Any]) -> str:
    """The tables of one part, by the benchmark that made it."""
    return importlib.import_module(f"lowmem_grpo.benchmarks.{document['benchmark']}").tables(document)


def narrowed(table: str, rows: str, columns: str | None) -> str:
    """The first of some tables with these rows, by their first cell, and these columns, by their heading.

    Raises:
        ValueError: the table has no such row or column.
    """
    lines = table.partition("\n\n")[0].splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    by_name = {row[0]: row for row in body}
    names, headings = rows.split("; "), [header[0], *columns.split("; ")] if columns else header
    for asked, known in ((names, by_name), (headings, header)):
        missing = [name for name in asked if name not in known]
        if missing:
            raise ValueError(f"the table has no {missing[0]!r}; it has {'; '.join(known)}")
    chosen = [header.index(heading) for heading in headings]
    return markdown_table(headings, [[by_name[name][index] for index in chosen] for name in names])


def caption(document: dict[str, Any]) -> str:
    """The command, machine and versions of a result, to run it again."""
    machine, versions = document["machine"], document["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    shown = ("torch", "transformers", "trl", "liger-kernel")
    used = ", ".join(f"{name} {versions[name]}" for name in shown if versions[name])
    commit = document["commit"] or "none (installed)"
    short = re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", commit)
    partial = f" Incomplete: {document['incomplete']}." if "incomplete" in document else ""
    return f"`{document['command']}` on {where}, {document['date']}, commit {short}, {used}.{partial}"


def fill(text: str, results: Path) -> str:
    """The text with every table made anew."""

    def made(match: re.Match) -> str:
        if "*" in match["file"]:
            return f"{match[1]}\n{newest_table(results, match)}\n\n<!-- end -->"
        path = results / match["file"]
        if not path.exists():
            raise ValueError(f"the text asks for {match['file']}, which is not in {results}")
        known = json.loads(path.read_text())["parts"]
        if match["part"] not in known:
            raise ValueError(f"{match['file']} has no part {match['part']}; it has {', '.join(known)}")
        document = known[match["part"]]
        if "benchmark" not in document:
            raise ValueError(f"{match['part']} of {match['file']} has no result: {document['incomplete']}")
        return f"{match[1]}\n{_table(document, match)}\n\n<!-- end -->"

    return PLACE.sub(made, text)


def _table(document: dict[str, Any], match: re.Match) -> str:
    made_anew = tables(document)
    if match["rows"]:
        made_anew = narrowed(made_anew, match["rows"], match["columns"])
    return f"{made_anew}\n\n{caption(document)}"


def newest(results: Path, pattern: str, part: str) -> dict[str, Any] | None:
    """A part's result of the last date among the files of a pattern, or None."""
    known = [json.loads(path.read_text()).get("parts", {}).get(part, {}) for path in sorted(results.glob(pattern))]
    return max(reversed([one for one in known if "benchmark" in one]), key=lambda one: one["date"], default=None)


def newest_table(results: Path, match: re.Match) -> str:
    if match["part"] == "summary":
        return summary(results, match["file"])
    document = newest(results, match["file"], match["part"])
    return _table(document, match) if document else NOT_YET


def summary(results: Path, pattern: str) -> str:
    """A row for each part of the GPU programme: what was measured, where, and at which commit."""
    rows = []
    for what, (part, shown) in SUMMARY.items():
        document = newest(results, pattern, part)
        try:
            where = f"{document['machine']['gpu']}, {str(document['commit'])[:7]}" if document else ""
            rows.append([what, shown(document) if document else NOT_YET, where])
        except (KeyError, IndexError):  # stopped before it had this
            rows.append([what, NOT_YET, ""])
    return markdown_table(["on one GPU", "measured", "card, commit"], rows)


def _in_steps(document: dict[str, Any]) -> str:
    return f"{document['results']['ours']['tokens_per_s']:,.0f} tokens/s"


def _in_all(document: dict[str, Any]) -> str:
    return f"{document['lengths'][0]['results']['ours']['tokens_per_s']:,.0f} tokens/s"


def _steps(document: dict[str, Any]) -> str:
    shown = []
    for name, (result,) in document["results"].items():
        label = f"{name}: " if len(document["results"]) > 1 else ""
        shown.append(label + (result.get("failed") or f"{result['step_s']:.2f} s, {result['peak_mib']:,.0f} MiB"))
    return "; ".join(shown)


def _ways(document: dict[str, Any]) -> str:
    results = document["results"]
    if len(results) < 2:  # from before there were outlines
        return NOT_YET
    return "; ".join(
        result.get("failed") or f"{result['seconds']['median']:.2f} s, {result['peak_bytes'] / 2**20:,.0f} MiB"
        for result in results.values()
    )


def _head(shape: int, document: dict[str, Any]) -> str:
    results = document["shapes"][shape]["results"]
    ours, floor = results["ours"], results["two bare GEMMs"]
    train, score = (ours[key]["median"] / floor[key]["median"] for key in ("train_s", "score_s"))
    return f"{train:.2f}, forward alone {score:.2f}"


def _budget(document: dict[str, Any]) -> str:
    result = document["results"][0]
    if result["plan"]["fits"] and "measured" not in result:  # stopped before it had this
        return NOT_YET
    return importlib.import_module("lowmem_grpo.benchmarks.bench_budgets").cell(result) + " GB"


def _experts(shape: str, document: dict[str, Any]) -> str:
    entry = document["shapes"][shape]["64"]
    seconds = entry["results"]["lowmem_grpo"]["seconds"]["median"]
    return f"{1e6 * seconds:.0f} us, {entry['bytes'] / seconds / document['copy_bytes_per_s']:.0%} of a copy's speed"


def _chosen(document: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {result['chosen']}" for name, result in document["results"].items())


def _overlap(document: dict[str, Any]) -> str:
    steps = {name: result["steps"] for name, result in document["results"].items() if "steps" in result}
    shown = [f"{name}: {1e3 * step['without']:.2f} to {1e3 * step['with']:.2f} ms" for name, step in steps.items()]
    return "; ".join([*shown, "chosen" if document["chosen"] else "not chosen"])


def _delta_step(document: dict[str, Any]) -> str:
    results = next(entry["results"] for entry in document["slots"] if entry["slots"] == 64)
    return f"{1e6 * results['lowmem_grpo, Triton']['seconds']['median']:.0f} us"


NOT_YET = "Not measured yet."
# What a row says, its part of the GPU programme, and the part's result in a few words.
SUMMARY: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "64 even completions of a 1.5B model, in steps": ("decode-1.5b", _in_steps),
    "64 completions of 100 tokens in the mean, at most 256, in all": ("rollout-1.5b", _in_all),
    "64 even completions of a 7B model, in steps": ("decode-7b", _in_steps),
    "a step of 4 x 8 x 128 tokens, 0.5B": ("step-0.5b", _steps),
    "a step of 4 x 8 x 128 tokens, 1.5B": ("step-1.5b", _steps),
    "a step of 4 x 8 x 32 tokens, 1.5B, beside others": ("step-beside", _steps),
    "an update of 5,120 tokens, 1.5B: by outlines, with full_determinism, by own layers": ("update-short-1.5b", _ways),
    "an update of 16,384 tokens, 1.5B, likewise": ("update-1.5b", _ways),
    "an update of 16,384 tokens, 7B, likewise": ("update-7b", _ways),
    "the head over two bare products, D 1536": ("head-tiles", partial(_head, 0)),
    "the head over two bare products, D 3584": ("head-tiles", partial(_head, 1)),
    "a step of 64 completions of 128 tokens, 1.5B, of GRPO and PPO": ("ppo-1.5b", _steps),
    "peak of a 1.5B model in 4 GB": ("budget-1.5b", _budget),
    "peak of a 7B model in 8 GB": ("budget-7b", _budget),
    "peak of a 7B model in 6 GB, 1 x 4 x (512 + 1,024) tokens": ("budget-7b-6gb", _budget),
    "64 even completions of Qwen3.5-4B's shape, in steps": ("decode-qwen3.5-4b", _in_steps),
    "64 even completions of gpt-oss-20b's shape, in steps": ("decode-gpt-oss-20b", _in_steps),
    "64 even completions of Qwen3-30B-A3B's shape, in steps": ("decode-qwen3-30b-a3b", _in_steps),
    "experts of Qwen3-30B-A3B's layer for 64 rows": ("expert_product", partial(_experts, "qwen3-30b-a3b")),
    "experts of gpt-oss-20b's layer for 64 rows": ("expert_product", partial(_experts, "gpt-oss-20b")),
    "peak of Qwen3.5-4B's shape in 12 GB": ("budget-qwen3.5-4b", _budget),
    "peak of gpt-oss-20b's shape in 16 GB": ("budget-gpt-oss-20b", _budget),
    "peak of Qwen3-30B-A3B's shape in 24 GB": ("budget-qwen3-30b-a3b", _budget),
    "products of a 1.5B model's step by this package's kernel": ("choose-1.5b", _chosen),
    "a layer's gated delta rule for 64 rows, of Qwen3.5-4B's": ("delta_step", _delta_step),
    "a step of a 1.5B model by rows, without and with overlapping kernels": ("overlap-1.5b", _overlap),
}


def draw_all(found: dict[str, Any], stem: Path) -> list[Path]:
    """Every picture for which the parts are there, as stem-NAME.svg: memory, scaling, learning, and a GPU's step."""
    made_by: dict[str, list[dict[str, Any]]] = {}
    for document in found["parts"].values():
        made_by.setdefault(document.get("benchmark", ""), []).append(document)
    scaling, context, learning = (made_by.get(f"bench_{name}", []) for name in ("scaling", "context", "learning"))
    figures = {}
    for document in scaling:
        if "max_completion_length" in [sweep["varied"] for sweep in document["sweeps"]]:
            figures["memory"] = draw_memory(document, context[0] if context else None)
    if scaling:
        figures["scaling"] = draw_scaling(scaling)
    if learning:
        figures["learning"] = draw_learning(learning[0])
    for document in made_by.get("bench_step", []):
        if "gpu" in document["machine"] and sum("step_s" in runs[0] for runs in document["results"].values()) > 1:
            figures["step"] = draw_step(document)
    paths = []
    for name, figure in figures.items():
        paths.append(stem.with_name(f"{stem.name}-{name}.svg"))
        figure.tight_layout()
        figure.savefig(paths[-1], metadata={"Date": None})
        _pyplot().close(figure)
    return paths


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lowmem_grpo"  # the same picture from the same numbers
    import matplotlib.pyplot as plt

    return plt


def draw_memory(scaling: dict[str, Any], context: dict[str, Any] | None) -> Any:
    """Peak memory against completion length: measured beside the peers, and predicted for real models."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2 if context else 1, figsize=(11 if context else 6, 4), squeeze=False)
    sweep = next(s for s in scaling["sweeps"] if s["varied"] == "max_completion_length")
    where = scaling["machine"].get("gpu") or scaling["machine"]["cpu"]
    _lines(axes[0][0], sweep, "peak_bytes", 2**20)
    axes[0][0].set(
        title=f"Measured ({where}): one update,\n{scaling['shape']}, {_rest(sweep)}", ylabel="peak above the model, MiB"
    )
    if context:
        right = axes[0][1]
        for place, (shape, ways) in enumerate(context["predicted"].items()):
            for style, (way, peaks) in zip(("-", "--"), ways.items(), strict=False):
                values = [peak / 10**9 for peak in peaks]
                right.plot(context["lengths"], values, style, color=f"C{place}", marker=".", label=f"{shape}, {way}")
        for card in CARDS_GB:
            right.axhline(card, color="grey", linewidth=0.5)
            right.annotate(f"{card} GB", (context["lengths"][0], card), fontsize=7, color="grey", va="bottom")
        right.set(
            title="Predicted, not measured: lowmem_grpo on a GPU,\na step of 8 x 8 completions, prompts of 512",
            xlabel="max_completion_length", ylabel="peak with CUDA, GB", ylim=(0, None),
        )  # fmt: skip
        _powers_of_two(right, context["lengths"])
        right.legend(fontsize=8)
    return figure


def draw_scaling(scaling: list[dict[str, Any]]) -> Any:
    """Memory and time of every sweep."""
    sweeps = [sweep for document in scaling for sweep in document["sweeps"]]
    figure, axes = _pyplot().subplots(2, len(sweeps), figsize=(4 * len(sweeps), 7), squeeze=False)
    clock = "s" if "gpu" in scaling[0]["machine"] else "CPU s"
    for column, sweep in zip(axes.T, sweeps, strict=True):
        for axis, key, unit, label in zip(
            column, ("peak_bytes", "seconds"), (2**20, 1), ("peak above the model, MiB", clock), strict=True
        ):
            _lines(axis, sweep, key, unit)
            axis.set(ylabel=label, title=_rest(sweep))
    return figure


def _lines(axis: Any, sweep: dict[str, Any], key: str, unit: float) -> None:
    for name, results in sweep["results"].items():
        points = [(n, one[key] / unit) for n, one in zip(sweep["sizes"], results, strict=True) if key in one]
        failed = [one["reason"] for one in results if "reason" in one]
        label = f"{name}{', then' if points else ':'} {failed[0]}" if failed else name
        axis.plot([n for n, _ in points], [y for _, y in points], marker=".", label=label)
    _powers_of_two(axis, sweep["sizes"])
    axis.set(xlabel=sweep["varied"], yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _powers_of_two(axis: Any, sizes: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])


def _rest(sweep: dict[str, Any]) -> str:
    names = {
        "prompt_length": "prompt",
        "max_completion_length": "length",
        "num_generations": "group",
        "vocabulary": "vocabulary",
    }
    return ", ".join(f"{words} {sweep['work'][name]:,}" for name, words in names.items() if name != sweep["varied"])


def draw_learning(learning: dict[str, Any]) -> Any:
    """Greedy accuracy by step, a line a seed."""
    figure, axis = _pyplot().subplots(figsize=(7, 4))
    for place, (name, runs) in enumerate(learning["results"].items()):
        for index, run in enumerate(run for run in runs if "failed" not in run):
            label = name if index == 0 else None
            axis.plot(*zip(*run["evaluations"], strict=True), color=f"C{place}", alpha=0.7, label=label)
    axis.set(xlabel="step", ylabel="greedy accuracy, held out", ylim=(0, 1.02), title="The demo's task, a line a seed")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_step(step: dict[str, Any]) -> Any:
    """Time and peak memory of a step, ours beside others."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(9, 3.5))
    runs = {name: run for name, (run,) in step["results"].items() if "step_s" in run}
    for axis, key, label in zip(axes, ("step_s", "peak_mib"), ("step, s", "peak above the model, MiB"), strict=True):
        axis.bar(list(runs), [run[key] for run in runs.values()], color=[f"C{place}" for place in range(len(runs))])
        axis.set(ylabel=label)
    work = step["work"]
    size = f"{work['prompts']} x {work['num_generations']} completions of {work['max_completion_length']}"
    figure.suptitle(f"{work['shape']}, {size}, {step['machine']['gpu']}", fontsize=10)
    return figure


def suites(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of whole suites among the results."""
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if "parts" in found:
            yield path, found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--documents", type=Path, nargs="+", default=[Path("README.md"), *sorted(Path().glob("docs/*.md"))]
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args(argv)
    for path in given.documents:
        if not path.exists():
            parser.error(f"there is no {path} here; run this in the checkout, or name others with --documents")
        path.write_text(fill(path.read_text(encoding="utf-8"), given.results), encoding="utf-8")
    for path, found in suites(given.results):
        print(*draw_all(found, path.with_suffix("")), sep="\n")


if __name__ == "__main__":
    main()
