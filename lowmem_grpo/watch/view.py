"""Lines of a terminal that show a run, made of its files."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lowmem_grpo.errors import printable
from lowmem_grpo.report.page import duration, method_of
from lowmem_grpo.report.reading import mapping, number, resumes_of
from lowmem_grpo.terminal import USUAL, bar
from lowmem_grpo.watch.chart import chart, sparkline
from lowmem_grpo.watch.run import Sample, WatchedRun

STYLES = {
    "running": "bold green", "starting": "bold yellow", "finished": "bold green", "stopped": "bold yellow",
    "failed": "bold red", "cut off": "bold red", "done": "green", "not begun": "dim",
}  # fmt: skip
# By kind of run: the metrics that have a chart, the foremost first, each with its title.
CHARTS = {
    "grpo": {
        "reward": "reward", "completions/mean_length": "tokens a completion", "kl": "KL to the reference",
        "teacher_kl": "KL to the teacher", "entropy": "entropy", "completions/clipped_ratio": "share cut off",
        "tools/call_frequency": "calls of tools", "value_loss": "the critic's loss",
    },
    "sft": {"loss": "loss", "mean_token_accuracy": "accuracy of tokens", "entropy": "entropy"},
    "reward": {"accuracy": "accuracy", "loss": "loss", "margin": "margin"},
}  # fmt: skip
MOST_CHARTS = 6
LONGEST = 50  # characters that say how a run stands, beside its name
NARROWEST = 34  # columns of a chart
FEWEST_LINES = 6  # that are left for completions, where there are charts enough
LABELS = 9  # columns of a chart's numbers
PARTS = ("rewards/", "/mean")
MIB = 2**20


class View:
    """Lines of so many columns, in ASCII alone or not; of a file only the curves have a width."""

    def __init__(self, width: int | None, *, is_ascii: bool = False):
        self.is_file, self.is_ascii = width is None, is_ascii
        self.width = USUAL if width is None else max(LABELS + 6, width)

    def of_run(self, run: WatchedRun, height: int | None = None) -> list[Text]:
        """A run in at most `height` lines, the most important first; without it in as many as it takes."""
        rest = [self.parts(run), self.evaluation(run), self.findings(run), self.memory(run)]
        head, high, most = self.head(run), 5, None
        if height is not None:
            high = 5 if height >= 30 else 3
            most = height - len(head) - 1 - sum(len(block) + 1 for block in rest if block)
            most = max(most - FEWEST_LINES, high + 2)  # one row of charts, whatever else there is no room for
        lines: list[Text] = []
        for block in filter(None, [head, self.charts(run, high, most), *rest]):
            if height is None or len(lines) + len(block) + 1 <= height:
                lines += [*([Text()] if lines else []), *block]
        room = 24 if height is None else height - len(lines) - 1
        shown = self.samples(run, room)
        lines += [Text(), *shown] if shown else []
        for line in lines:
            line.rstrip()
        return lines[:height]

    def line(self, *parts: str | tuple[str, str]) -> Text:
        """One line of texts, each perhaps with a style, whatever is in them, cut off where the terminal ends."""
        text = Text(no_wrap=True, overflow="ellipsis")
        for part in parts:
            words, style = part if isinstance(part, tuple) else (part, "")
            text.append(self.plain(words), style)
        return self.fitted(text, self.width)

    def flow(self, parts: Sequence[str | tuple[str, str]], indent: int = 2) -> list[Text]:
        """Parts one after another, two columns apart, in lines of whole parts; only one that is too long is cut."""
        lines, line = [], Text(no_wrap=True, overflow="ellipsis")
        for part in parts:
            words, style = part if isinstance(part, tuple) else (part, "")
            words = self.plain(words)
            if line and not self.is_file and line.cell_len + 2 + cell_len(words) > self.width:
                lines.append(line)
                line = Text(" " * indent, no_wrap=True, overflow="ellipsis")
            elif line:
                line.append("  ")
            line.append(words, style)
        return [self.fitted(line, self.width) for line in [*lines, line]]

    def plain(self, words: str) -> str:
        """A text in one line, which moves no cursor."""
        words = printable(words.replace("\t", " "))
        return words.encode("ascii", "backslashreplace").decode() if self.is_ascii else words

    def fitted(self, text: Text, width: int, *, pad: bool = False) -> Text:
        """A line of at most `width` columns, or exactly so many."""
        if pad or not self.is_file:
            text.truncate(width, overflow="crop" if self.is_ascii else "ellipsis", pad=pad)
        return text

    def head(self, run: WatchedRun) -> list[Text]:
        """Lines on what the run is, how it stands, and how long it will take."""
        state, about = run.state, run.about
        model = about.get("model")
        method = method_of(run.kind, run.settings) if run.kind else "a run"
        what = f"{method}{f' of {model}' if isinstance(model, str) else ''}"
        style, is_long = STYLES.get(state.word, "bold"), len(state.text) > LONGEST
        stands = state.word if is_long else f"{state.word} {state.text}".rstrip()
        lines = self.flow([(run.folder.resolve().name, "bold"), (stands, style), (what, "dim")])
        lines += _wrapped(Text(self.plain(state.text), style), self.width, 3, self) if is_long else []
        total, last, a_step = run.total_steps, run.log.last, run.log.step_time
        facts = [f"step {run.step}{f' of {total}' if total else ''}"]
        if total:
            facts.append(f"{bar(run.step / total, 20, is_ascii=self.is_ascii)} {100 * run.step // total} %")
        if a_step is not None:
            facts.append(f"{duration(a_step)} a step")
            if total and not state.is_over and total > run.step:
                facts.append(f"{duration((total - run.step) * a_step)} left")
        lines += self.flow(facts)
        facts = [
            f"{value:,.0f} tokens/s {name.removeprefix('tokens_per_s/')}"
            for name, value in _numbers(last, "tokens_per_s/")
        ]
        again = resumes_of(about)
        facts += [f"resumed at step {again[-1].get('step')}"] if again else []
        silence = run.silence
        if not state.is_over and silence is not None and silence > 3 * (a_step or 10):
            facts.append(f"nothing new for {duration(round(silence))}")
        return [*lines, *(self.flow([(fact, "dim") for fact in facts]) if facts else [])]

    def charts(self, run: WatchedRun, height: int, most: int | None) -> list[Text]:
        """Curves side by side, each `height` lines high, in at most so many lines."""
        named = CHARTS.get(run.kind, {**CHARTS["grpo"], **CHARTS["sft"]})
        shown = [(name, title) for name, title in named.items() if _is_worth(run, name)][:MOST_CHARTS]
        across = max(1, min(3, self.width // NARROWEST, len(shown)))
        width = (self.width - 2 * (across - 1)) // across
        cells = [self.chart(run.log.curves[name].values(), title, run, name, width, height) for name, title in shown]
        lines = []
        for first in range(0, len(cells), across):
            if most is not None and len(lines) + height + 2 > most:
                break
            beside = cells[first : first + across]
            lines += [Text("  ").join(row) for row in zip(*beside, strict=True)]
        return lines

    def chart(
        self, points: Sequence[tuple[float, float]], title: str, run: WatchedRun, name: str, width: int, height: int
    ) -> list[Text]:
        """A curve with its title, its last value, and the numbers of its ends."""
        last = number(run.log.last.get(name))
        head = Text.assemble((title, "bold"), f"  {_short(last)}", no_wrap=True)
        drawn = chart(points, max(4, width - LABELS - 1), height, is_ascii=self.is_ascii)
        values = [value for _, value in points]
        labels = [_short(max(values)), *[""] * (height - 2), _short(min(values))]
        side = "|" if self.is_ascii else "│"
        rows = [
            Text.assemble((f"{label:>{LABELS - 1}} {side}", "dim"), (row, "cyan"))
            for label, row in zip(labels, drawn, strict=True)
        ]
        first, end = f"step {points[0][0]:.0f}", f"{run.step}"
        below = f"{'':{LABELS}}{first}{end:>{max(1, width - LABELS - len(first))}}"
        return [self.fitted(line, width, pad=True) for line in [head, *rows, Text(below, "dim")]]

    def parts(self, run: WatchedRun) -> list[Text]:
        """The reward functions of a run that has several, a line each."""
        names = [name for name in run.log.curves if name.startswith(PARTS[0])]
        if len(names) < 2:
            return []
        longest = min(30, max(len(_part(name)) for name in names))
        lines = []
        for name in names[:8]:
            points = run.log.curves[name].values()
            curve = sparkline(points, max(8, min(40, self.width - longest - 20)), is_ascii=self.is_ascii)
            label = self.fitted(Text(self.plain(_part(name))), longest, pad=True)
            text = Text.assemble(label, f" {_short(number(run.log.last.get(name))):>8}  ", (curve, "cyan"))
            lines.append(self.fitted(text, self.width))
        return lines

    def evaluation(self, run: WatchedRun) -> list[Text]:
        """The last evaluation beside the first, with intervals."""
        if not run.log.evaluations:
            return []
        first, last = run.log.evaluations[0], run.log.evaluations[-1]
        at = f"at step {last['step']}" if last["step"] else "before training"
        lines = [self.line((f"held out, {at}", "bold"))]
        for name in _of_evaluation(last):
            value = f"{_short(number(last.get(name)))} {_interval(last, name)}".rstrip()
            before = f"{_short(number(first.get(name)))} {_interval(first, name)}".rstrip()
            change = number(last.get(f"{name}/difference"))
            words = [("  " + name.removeprefix("eval_"), "dim"), value]
            if change is not None:
                words.append((f"{change:+.3f} {_interval(last, f'{name}/difference', '+.3f')}", _sign(last, name)))
            words += [(f"before {before}", "dim")] if last is not first else []
            lines += self.flow(words, 6)
        return lines

    def measured(self, metrics: dict[str, Any]) -> list[str]:
        """An evaluation in the words of one line, each after two spaces."""
        names = [name for name in _of_evaluation(metrics) if number(metrics.get(name)) is not None]
        words = [
            f"{name.removeprefix('eval_')} {_short(number(metrics[name]))} {_interval(metrics, name)}" for name in names
        ]
        return [f"  {one.rstrip()}" for one in words]

    def findings(self, run: WatchedRun) -> list[Text]:
        """The doctor's last sentences."""
        lines = []
        for line in run.log.findings[-3:]:
            text = Text(self.plain(f"doctor, step {line['step']}: {line.get('text')}"), "yellow")
            lines += _wrapped(text, self.width, 3, self)
        return lines

    def memory(self, run: WatchedRun) -> list[Text]:
        """The most memory of each phase, beside what was planned."""
        planned = {name: number(size) for name, size in mapping(run.plan.get("peaks")).items()}
        facts: list[str | tuple[str, str]] = [("memory, GiB", "bold")]
        for phase, mib in run.log.peaks.items():
            plan = planned.get(phase)
            of_plan = f" of {plan / 2**30:.2f} planned" if plan else ""
            facts.append((f"{phase} {mib / 1024:.2f}{of_plan}", "bold red" if plan and mib * MIB > 1.02 * plan else ""))
        return self.flow(facts) if run.log.peaks else []

    def samples(self, run: WatchedRun, room: int) -> list[Text]:
        """Completions with their prompts and rewards, in so many lines."""
        if not run.samples or room < 4:
            return []
        lines = [self.line((run.samples_of, "bold"))]
        each = max(1, (room - 1) // max(1, min(len(run.samples), 2)) - 2)
        prompt = ""
        for sample in run.samples:
            block = self.sample(sample, min(each, 6), with_prompt=sample.prompt != prompt)
            if len(lines) + len(block) > room:
                break
            lines, prompt = [*lines, *block], sample.prompt
        return lines if len(lines) > 1 else []

    def sample(self, sample: Sample, most: int, *, with_prompt: bool) -> list[Text]:
        rewards = [f"{name} {_short(value)}" for name, value in sample.rewards.items()]
        prompt = _on_a_line(sample.prompt[: self.width], self.is_ascii)
        lines = [self.line((f"  {prompt}", "dim"))] if with_prompt else []
        lines += self.flow([(f"  {rewards[0]}", "cyan"), *((one, "cyan") for one in rewards[1:])]) if rewards else []
        text = Text(self.plain(_on_a_line(sample.completion[: most * self.width], self.is_ascii)))
        return [*lines, *(Text("    ") + row for row in _wrapped(text, self.width - 4, most, self))]


def _on_a_line(text: str, is_ascii: bool) -> str:
    """A text with a sign in the place of each end of a line."""
    return (" / " if is_ascii else " ↵ ").join(text.split("\n"))


def _wrapped(text: Text, width: int, most: int, view: View) -> list[Text]:
    """A text in lines of `width` columns, of which `most` are kept; the last then ends in dots. In a file one line."""
    if view.is_file:
        return [text]
    lines = list(text[: (most + 1) * width].wrap(Console(width=width, color_system=None), width, overflow="fold"))
    if len(lines) > most:
        lines = lines[:most]
        lines[-1].append(" ...")
        view.fitted(lines[-1], width)
    return lines


def _is_worth(run: WatchedRun, name: str) -> bool:
    """True for a curve that has a value other than 0."""
    curve = run.log.curves.get(name)
    return curve is not None and any(value for _, value in curve.values())


def _part(name: str) -> str:
    return name.removeprefix(PARTS[0]).removesuffix(PARTS[1])


def _of_evaluation(line: dict[str, Any]) -> list[str]:
    """The metrics of an evaluation that are shown: those with an interval, else the first three."""
    means = [name for name in line if name.startswith("eval_") and "/ci_" not in name and "/difference" not in name]
    certain = [name for name in means if f"{name}/ci_low" in line]
    return certain or means[:3]


def _interval(line: dict[str, Any], name: str, form: str = ".3f") -> str:
    low, high = (number(line.get(f"{name}/ci_{end}")) for end in ("low", "high"))
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _sign(line: dict[str, Any], name: str) -> str:
    """The style of a difference: dim where its interval has 0 in it."""
    low, high = (number(line.get(f"{name}/difference/ci_{end}")) or 0.0 for end in ("low", "high"))
    return "dim" if low <= 0 <= high else "bold"


def _numbers(line: dict[str, Any], prefix: str) -> Iterable[tuple[str, float]]:
    found = ((name, number(value)) for name, value in line.items() if name.startswith(prefix))
    return ((name, value) for name, value in found if value is not None)


def _short(value: float | None) -> str:
    """A number in at most 8 characters; - for the mean of nothing."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size > 1e-9 and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"
