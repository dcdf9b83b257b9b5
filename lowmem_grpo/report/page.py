"""The parts of a run's page, as texts, numbers and charts that a template lays out."""

import datetime
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from lowmem_grpo.report.chart import Dot, dot_in_words, in_digits, in_words
from lowmem_grpo.report.curves import MOST_LINES, charts_of
from lowmem_grpo.report.reading import (
    RunFiles,
    changed_settings,
    mapping,
    mean,
    number,
    readable,
    resumes_of,
    standing_of,
    texts,
)

# Most of each on a page, so that it stays below 1 MB whatever a run has written.
MOST_CHARACTERS, MOST_ROWS = 3000, 40
METHODS = {"grpo": "GRPO", "sft": "Supervised fine-tuning", "reward": "Reward model"}
HEADLINES = {  # by kind, the metrics of an evaluation, foremost first, and how they are called
    "grpo": {"eval_pass@1": "Held-out accuracy", "eval_reward": "Held-out reward"},
    "sft": {"eval_loss": "Held-out loss"},
    "reward": {"eval_accuracy": "Held-out accuracy", "eval_loss": "Held-out loss"},
}
UNITS = {"grpo": "prompts", "sft": "examples", "reward": "pairs"}  # by kind, what is held out
OF_TRAINING = {"grpo": "reward", "sft": "loss", "reward": "accuracy"}  # which stands in where nothing is evaluated
LEFT_OUT = re.compile(r"/ci_|/difference|min_|max_|terminated")  # of an evaluation's metrics, from its table
NONE = "–"  # stands for what is not known
SHARE = 0.1  # of the steps at each end of the run, of which that is a mean


def page_of(run: RunFiles) -> dict[str, Any]:
    """All that the template run.html shows of a run, by the names that it has there."""
    before, after = samples_of(run)
    return {
        "method": method_of(run.kind, run.settings), "model": model_of(run),
        "data": ", ".join(texts(datasets_of(run).get("train"))),
        "rewards": texts(run.about.get("rewards") or []), "state": state_of(run), "headline": headline_of(run),
        "facts": facts_of(run), "findings": findings_of(run), "doctor": run.settings.get("doctor"),
        "charts": charts_of(run), "phases": phases_of_step(run), "memory": memory_of(run),
        "budget": number(run.plan.get("budget")), "evaluations": evaluations_of(run),
        "history": history_of(run), "samples": pairs_of(before, after), "num_damaged": run.num_damaged,
        "best": best_of(run), "held_out": UNITS[run.kind],
        "has_intervals": any(name.endswith("/ci_low") for name in run.evaluations[-1]) if run.evaluations else False,
        "sampled_at": [when_of(one) for one in (before, after) if one],
        "settings": [(name, as_value(value), as_value(default)) for name, value, default in changed_settings(run)],
        "has_settings": bool(run.settings), "changes": changes_of(run), "about": about_of(run),
    }  # fmt: skip


def method_of(kind: str, settings: Mapping[str, Any]) -> str:
    """The method in words: PPO is GRPO's run with a critic, and distillation one with a teacher."""
    if kind != "grpo":
        return METHODS[kind]
    if settings.get("teacher"):
        return "On-policy distillation"
    return "PPO" if settings.get("adv_estimator") == "gae" else METHODS["grpo"]


def model_of(run: RunFiles) -> str:
    """The model's name, of a folder the last part."""
    name = str(run.about.get("model") or "")
    return os.path.basename(name.rstrip("/\\")) if os.path.isabs(name) else name


def datasets_of(run: RunFiles) -> dict[str, Any]:
    """The names of the datasets that a run was given, by what each is for."""
    return mapping(run.about.get("datasets"))


def last_step(run: RunFiles) -> int:
    """The last step that was done."""
    return run.steps[-1]["step"] if run.steps else 0


def state_of(run: RunFiles) -> dict[str, str]:
    """How the run ended: a word, and a sentence."""
    ended, total = mapping(run.about.get("ended")), number(run.about.get("total_steps"))
    done = f"after step {last_step(run):,}{'' if total is None else f' of {total:,.0f}'}"
    resume = "; it can be resumed" if any(run.folder.glob("checkpoint-*")) else ", before its first checkpoint"
    word = standing_of(run.about, is_running=run.is_running)
    all_done = "The one step is done." if last_step(run) == 1 else f"All {last_step(run):,} steps are done."
    is_early = (number(ended.get("step")) or math.inf) < (total or 0)
    sentences = {
        "finished": f"A callback ended the run {done}." if is_early else all_done,
        "stopped": f"The run was stopped {done}{resume}.",
        "failed": f"The run failed {done}: {ended.get('why') or ''}",
        "running": f"The run goes on {done}.",
        "cut off": f"The run was cut off {done}, as by a kill{resume}.",
        "": f"The log ends {done}.",
    }
    return {"word": word, "text": sentences[word]}


def headline_of(run: RunFiles) -> dict[str, Any] | None:
    """The number that a run is about, before and after it; None where there are not two of it."""
    known, lines = HEADLINES[run.kind], run.evaluations
    wanted = run.settings.get("metric_for_best_model")
    names = [*([str(wanted), f"eval_{wanted}"] if wanted else []), *known]
    for name in names:
        values = run.values(name, lines)
        if len(values) > 1 and (any(value for _, value in values) or name == names[-1]):
            (first, _), (last, _) = values[0], values[-1]
            begin, end = ({line["step"]: line for line in lines}[step] for step in (first, last))
            rows = number(mapping(run.about.get("rows")).get("eval"))
            return {
                "name": known.get(name, name), "before": parts_of(begin, name), "after": parts_of(end, name),
                "difference": dot_of(end, f"{name}/difference") or difference_of(begin, end, name),
                "of": "" if rows is None else f"on {rows:,.0f} held-out {UNITS[run.kind]}",
                "steps": (first, last),
            }  # fmt: skip
    return training_headline_of(run)


def best_of(run: RunFiles) -> str:
    """A sentence on the best evaluation, where that is not the last, and on whose adapter the run has left."""
    step, value = (number(run.best.get(name)) for name in ("step", "value"))
    if step is None or value is None or step == last_step(run):
        return ""
    adapters = "adapter/ and best/ have" if run.settings.get("load_best_model_at_end") else "best/ has"
    metric = str(run.best.get("metric")).removeprefix("eval_")
    return f"The best evaluation was that of step {step:.0f} ({metric} {in_digits(value)}), whose adapter {adapters}."


def training_headline_of(run: RunFiles) -> dict[str, Any] | None:
    """The mean of a metric of training over the first steps and over the last, where nothing was evaluated."""
    name = OF_TRAINING[run.kind] if run.names(OF_TRAINING[run.kind]) else "loss"
    values = run.values(name)
    count = max(1, int(SHARE * len(values)))
    of = f"mean of the first and of the last {count} steps" if count > 1 else "of the first step and of the last"
    why = "there are not two evaluations yet" if run.evaluations else "nothing was held out"
    if len(values) < 2:
        return None
    before, after = (mean(value for _, value in part) or 0.0 for part in (values[:count], values[-count:]))
    return {
        "name": f"Training {name}", "before": (in_digits(before), ""), "after": (in_digits(after), ""),
        "difference": None, "of": f"{of}; {why}", "steps": (values[0][0], values[-1][0]),
    }  # fmt: skip


def parts_of(line: dict[str, Any], name: str) -> tuple[str, str]:
    """A metric of an evaluation and its interval, each in words; the latter empty where it has none."""
    value, _, interval = (dot_of(line, name) or NONE).partition(" ")
    return value, interval


def dot_of(line: dict[str, Any], name: str) -> str | None:
    """A metric of an evaluation with its interval, in words; None where it has none."""
    value, low, high = (number(line.get(key)) for key in (name, f"{name}/ci_low", f"{name}/ci_high"))
    if value is None:
        return None
    return signed(value, low, high) if "/difference" in name else dot_in_words(Dot(0, value, low, high))


def difference_of(before: dict[str, Any], after: dict[str, Any], name: str) -> str | None:
    """The difference of a metric without an interval, in words."""
    begin, end = number(before.get(name)), number(after.get(name))
    return None if begin is None or end is None else signed(end - begin)


def signed(value: float, low: float | None = None, high: float | None = None) -> str:
    """A difference with its sign and interval: "+0.14 [+0.05, +0.23]"."""
    words = in_digits(value, "+")
    return words if low is None or high is None else f"{words} [{in_digits(low, '+')}, {in_digits(high, '+')}]"


def facts_of(run: RunFiles) -> list[tuple[str, str]]:
    """A few numbers of the whole run, as (name, value)."""
    seconds = sum(value for _, value in run.values("step_time"))
    peaks = [value for name in run.names("memory/[^/]+/peak_mib") for _, value in run.values(name)]
    tokens = run.values("num_tokens")
    total = number(run.about.get("total_steps"))
    found = {
        "steps": f"{last_step(run):,}" + (f" of {total:,.0f}" if total is not None and total != last_step(run) else ""),
        "time in steps": duration(seconds) if run.steps else "",
        "tokens": f"{tokens[-1][1]:,.0f}" if tokens else "",
        "peak memory": gib(max(peaks) * 2**20) if peaks else "",
        "device": shortened(str(run.about.get("device") or ""), 200),
    }
    return [(name, value) for name, value in found.items() if value]


def duration(seconds: float) -> str:
    """A time as a person says it: "41 s", "3 min 12 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def gib(num_bytes: float) -> str:
    """Bytes as GPUs' memories are told: "0.82 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"


def findings_of(run: RunFiles) -> list[dict[str, Any]]:
    """The doctor's findings, shortened."""
    return [{**line, "text": shortened(str(line.get("text")), 600)} for line in run.findings[:20]]


def phases_of_step(run: RunFiles) -> list[dict[str, Any]]:
    """Time by phase: seconds of the whole run, their share of all steps', and tokens a second."""
    whole = sum(value for _, value in run.values("step_time"))
    found = []
    for phase in phase_names(run):
        seconds = sum(value for _, value in run.values(f"time/{phase}_s"))
        rate = mean(value for _, value in run.values(f"tokens_per_s/{phase}"))
        found.append({"name": phase, "seconds": seconds, "rate": rate})
    rest = whole - sum(one["seconds"] for one in found)
    if found and rest > 0.005 * whole:
        found.append({"name": "between the phases", "seconds": rest, "rate": None})
    return [
        {**one, "share": one["seconds"] / whole, "time": duration(one["seconds"])}
        for one in found
        if whole > 0 and one["seconds"] >= 0
    ]


def phase_names(run: RunFiles) -> list[str]:
    """The phases of a run's steps, in the order of the log."""
    return [name.split("/")[1] for name in run.names("memory/[^/]+/peak_mib")]


def memory_of(run: RunFiles) -> list[dict[str, Any]]:
    """Memory by phase in bytes: the measured peak, the planned one, and the lengths of their bars in per cent."""
    planned = {name: number(value) for name, value in mapping(run.plan.get("peaks")).items()}
    peaks = {
        phase: 2**20 * max((value for _, value in run.values(f"memory/{phase}/peak_mib")), default=0.0)
        for phase in phase_names(run)
    }
    names = [*peaks, *(name for name in planned if name not in peaks)]
    budget = number(run.plan.get("budget"))
    largest = max([*peaks.values(), *filter(None, planned.values()), budget or 0.0], default=0.0)
    found = []
    for name in names if largest else []:
        peak, size = peaks.get(name, 0.0), planned.get(name)
        found.append({
            "name": name, "peak": gib(peak) if peak else "", "width": 100 * peak / largest,
            "planned": gib(size) if size else "", "mark": 100 * size / largest if size else None,
        })  # fmt: skip
    return found


def evaluations_of(run: RunFiles) -> list[dict[str, str]]:
    """A row a metric of the evaluations: before, after, and the difference."""
    if not run.evaluations:
        return []
    before, after = run.evaluations[0], run.evaluations[-1]
    rows = []
    for name in [name for name in after if name.startswith("eval_") and not LEFT_OUT.search(name)][:MOST_ROWS]:
        begin, end, changed = dot_of(before, name), dot_of(after, name), None
        if before is not after:
            changed = dot_of(after, f"{name}/difference") or difference_of(before, after, name)
        rows.append({
            "name": name.removeprefix("eval_").removeprefix("rewards/").removesuffix("/mean"), "before": begin or NONE,
            "after": NONE if before is after else end or NONE, "difference": changed or "",
        })  # fmt: skip
    return rows


def history_of(run: RunFiles) -> dict[str, Any] | None:
    """The foremost metrics of every evaluation, where there are more than two."""
    names = [name for name in HEADLINES[run.kind] if run.values(name, run.evaluations)]
    if len(run.evaluations) < 3 or not names:
        return None
    every = max(1, -(-len(run.evaluations) // MOST_ROWS))
    lines = run.evaluations[::every]
    lines += run.evaluations[-1:] if lines[-1] is not run.evaluations[-1] else []
    rows = [(line["step"], [dot_of(line, name) or NONE for name in names]) for line in lines]
    return {"names": [name.removeprefix("eval_") for name in names], "rows": rows}


def samples_of(run: RunFiles) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples of the first evaluation and of the last; the latter empty where there was one alone."""
    steps = sorted({line["step"] for line in run.samples})
    at = [[line for line in run.samples if line["step"] == step][:8] for step in (steps[:1] + steps[1:][-1:])]
    return (at[0] if at else []), (at[1] if len(at) > 1 else [])


def when_of(samples: list[dict[str, Any]]) -> str:
    """When samples were taken: "before training", or "after step 60"."""
    return f"after step {samples[0]['step']}" if samples[0]["step"] else "before training"


def pairs_of(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts with what was said to each, before and after training, shortened."""
    found = []
    for place, one in enumerate(before):
        same = [other for other in after[place : place + 1] if other.get("prompt") == one.get("prompt")]
        sides = [side_of(side) for side in (one, *same)]
        found.append({"prompt": shortened(str(one.get("prompt"))), "sides": sides})
    return found


def side_of(sample: dict[str, Any]) -> dict[str, Any]:
    """A completion with its rewards, as (name, value in words)."""
    rewards = {"reward": sample.get("reward"), **mapping(sample.get("rewards"))}
    named = [(name, number(value)) for name, value in list(rewards.items())[: 1 + MOST_LINES]]
    named = named[:1] if len(named) == 2 else named
    return {
        "text": shortened(str(sample.get("completion"))), "cut_off": bool(sample.get("cut_off")),
        "rewards": [(name, NONE if value is None else in_words(value)) for name, value in named],
    }  # fmt: skip


def changes_of(run: RunFiles) -> list[dict[str, str]]:
    """The settings that the plan chose, with its reasons."""
    changes = run.plan.get("changes")
    given = run.settings
    return [
        {"name": str(one.get("name")), "value": as_value(one.get("value")), "reason": str(one.get("reason")),
         "given": as_value(given.get(str(one.get("name"))))}
        for one in (changes if isinstance(changes, list) else [])[:MOST_ROWS]
        if isinstance(one, dict)
    ]  # fmt: skip


def about_of(run: RunFiles) -> dict[str, Any]:
    """How the run is done again: command or Python call, model, data, device, versions and times."""
    command, again = str(run.about.get("command") or ""), resumes_of(run.about)[-5:]
    rows = {
        "model": str(run.about.get("model") or ""),
        "trained on": ", ".join(texts(datasets_of(run).get("train"))),
        "evaluated on": ", ".join(texts(datasets_of(run).get("eval"))),
        "device": str(run.about.get("device") or ""),
        "versions": ", ".join(f"{name} {version}" for name, version in mapping(run.about.get("versions")).items()),
        "started": when(run.about.get("started")),
        "resumed": ", ".join(f"{when(one.get('started'))} from step {one.get('step')}" for one in again),
        "ended": when(mapping(run.about.get("ended")).get("at")),
    }
    return {
        "command": shortened(command) if command.startswith("lowmem-grpo ") else "",
        "call": command if command and not command.startswith("lowmem-grpo ") else "",
        "rows": [(name, shortened(value, 1000)) for name, value in rows.items() if value],
        "config": f"{run.kind}_config.json" if run.settings else "",
    }  # fmt: skip


def when(value: Any) -> str:
    """A time of a file in words: "2026-11-27 08:47 UTC"."""
    try:
        return datetime.datetime.fromisoformat(value).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError):
        return ""


def as_value(value: Any) -> str:
    """A setting's value as it is written in a configuration."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shortened(text, 300)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text that is readable(), or its beginning and how many characters it has."""
    shown = readable(text[:most])
    is_whole = len(text) <= most and len(shown) <= most
    return shown if is_whole else f"{shown[:most]} … of {len(text):,} characters"
