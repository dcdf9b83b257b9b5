"""The model card, README.md beside an adapter, made from the files of its run alone."""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lowmem_grpo.errors import counted, in_a_line, printable
from lowmem_grpo.evaluation.show import with_interval
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.output.markdown import block, code, points, table
from lowmem_grpo.output.places import public_name
from lowmem_grpo.report.page import duration
from lowmem_grpo.report.reading import changed_settings, mapping, number, texts
from lowmem_grpo.run.about import IN_PYTHON
from lowmem_grpo.run.facts import Facts, dataset_id, hub_id
from lowmem_grpo.run.snippet import snippet

NAME = "README.md"
LEFT_OUT = re.compile(r"(?!eval_)|.*/(ci_|difference)|eval_completions/(min|max|mean_terminated)_")  # of a table's rows


def write_card(folder: Path, say: Callable[[str], None]) -> None:
    """Write the card of an adapter into its folder, if it is there. What keeps it from being written is said."""
    try:
        if (folder / "adapter_config.json").is_file():
            write_file(folder / NAME, str(card_of(folder)))
    except Exception as error:  # no card is worth a run
        say(f"{folder / NAME} cannot be written ({in_a_line(error)}); the adapter beside it is whole")


def card_of(folder: Path, *, name: str | None = None, onto: str | None = None, notes: Sequence[str] = ()) -> ModelCard:
    """The card of a run's adapter: of the folder `adapter`, `best` or a checkpoint. It names no path of this machine.

    A section whose files are not there is left out.

    Args:
        folder: of the adapter.
        name: what the program on the card loads, a folder or a hub id. By default it is the repository that the run
            uploads to, or else the end of `folder`.
        onto: "original" or "nf4", the weights that the adapter was merged into; the card is then of the whole model.
        notes: sentences on the merge, in Markdown, such as what its check has measured.
    """
    facts = Facts(folder)
    name = name or _repository(facts) or public_name(str(folder))
    sections = {
        "Model": points([*_model(facts), *_merged(facts, onto), *notes]),
        "Method": points([_linked(method.text, method.source) for method in facts.methods]),
        "Data and rewards": points(_data(facts)),
        "Evaluation": _evaluation(facts),
        "Use": _use(facts, name, is_merged=onto is not None),
        "Settings": _settings(facts),
        "Reproduce": _reproduce(facts),
        "Limits": points(_limits(facts, onto)),
    }
    parts = [f"# {code(facts.run.folder.name)}", _summary(facts, is_merged=onto is not None)]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    metadata = _metadata(facts, is_merged=onto is not None).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n")


def _repository(facts: Facts) -> str | None:
    """The repository of the hub that the run uploads the adapter to, if that is named."""
    named = facts.settings.get("hub_model_id") if facts.settings.get("push_to_hub") else None
    return named if isinstance(named, str) and "/" in named and facts.folder.name == "adapter" else None


def _metadata(facts: Facts, *, is_merged: bool) -> ModelCardData:
    """The card's head, which the hub reads: names that only this machine knows are left out."""
    base = hub_id(facts.base_name)
    datasets = sorted(filter(None, map(dataset_id, facts.train_names)))
    results = _results(facts)
    further: dict[str, Any] = {**facts.license}
    if base:
        further |= {"base_model": base, "base_model_relation": "finetune" if is_merged else "adapter"}
    if results:
        further |= {"eval_results": results, "model_name": printable(facts.run.folder.name)}
    return ModelCardData(
        library_name="transformers" if is_merged else "peft", pipeline_tag=_task(facts), datasets=datasets or None,
        tags=["lowmem_grpo", *([] if is_merged else ["lora"]), *(one.tag for one in facts.methods if one.tag)],
        **further,
    )  # fmt: skip


def _results(facts: Facts) -> list[EvalResult]:
    """The means of the adapter's evaluation, as the hub has them."""
    line, names = facts.evaluations[1] or {}, facts.eval_names or ["held-out rows"]
    return [
        EvalResult(
            task_type=_task(facts), dataset_type=dataset_id(names[0]) or "unknown",
            dataset_name=printable(", ".join(names)),
            metric_type=printable(_short(name)), metric_value=round(value, 4),
        )
        for name, value in line.items()
        if name in _means(line) and value is not None and math.isfinite(value)
    ]  # fmt: skip


def _task(facts: Facts) -> str:
    return "text-classification" if facts.is_scorer else "text-generation"


def _means(line: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation that a card shows, without their intervals and differences."""
    return [name for name in line if not LEFT_OUT.match(name)]


def _short(name: str) -> str:
    return name.removeprefix("eval_")


def _linked(text: str, address: str) -> str:
    """A sentence with where it was published."""
    paper = re.sub(r"^https://(arxiv\.org/abs/)?", lambda found: "arXiv:" if found[1] else "", address)
    return f"{text} ([{paper.partition('/')[0]}]({address}))" if address else text


def _model_name(name: str) -> str:
    found = hub_id(name)
    return f"[{code(name)}](https://huggingface.co/{found})" if found else code(name)


def _dataset_name(name: str) -> str:
    found = dataset_id(name)
    return f"[{code(name)}](https://huggingface.co/datasets/{found})" if found else code(name)


def _summary(facts: Facts, *, is_merged: bool) -> str:
    """A few sentences: the kind of model, its base, and its foremost number before training and after."""
    what = "reward model" if facts.is_scorer else "language model"
    how = f"A {what}, made by merging a LoRA adapter into" if is_merged else f"A {what}: a LoRA adapter of"
    text = f"{how} {_model_name(facts.base_name)}. It was trained with lowmem_grpo."
    before, after = facts.evaluations
    foremost = next((name for name in _means(after or {}) if name in (before or {})), None)
    if before is None or after is None or foremost is None:
        return text
    first, last = (with_interval(line, foremost, ".3f") for line in (before, after))
    return f"{text} On held-out rows, {code(_short(foremost))} was {first} before training and is {last}."


def _model(facts: Facts) -> list[str]:
    license = facts.license.get("license")
    license = facts.license.get("license_name") if license == "other" else license
    terms = f"under the licence {code(license)}" if license else "under the licence that its own page has"
    lines = [f"base: {_model_name(facts.base_name)}, {terms}, which holds for this too"]
    start = facts.run.about.get("model")
    if isinstance(start, str) and public_name(start) != facts.base_name:
        lines.append(f"training went on from {_model_name(public_name(start))}")
    r, alpha = number(facts.adapter.get("r")), number(facts.adapter.get("lora_alpha"))
    if r is not None and alpha is not None:
        lines.append(f"adapter: rank {r:.0f}, alpha {alpha:g}")
    return lines


def _merged(facts: Facts, onto: str | None) -> list[str]:
    """A sentence on the weights that the adapter was merged into, if it was."""
    if onto is None:
        return []
    if onto == "nf4":
        return ["the adapter was merged into the numbers that the base's 4 bits stand for, on which it was trained"]
    others = ", and not into the 4 bits that it was trained on" if _was_in_4bit(facts) else ", on which it was trained"
    return [f"the adapter was merged into the base's own weights{others}"]


def _was_in_4bit(facts: Facts) -> bool:
    return facts.settings.get("load_in_4bit", True)


def _data(facts: Facts) -> list[str]:
    lines, rows = [], mapping(facts.run.about.get("rows"))
    for words, given, count in (
        ("trained on", facts.train_names, number(rows.get("train"))),
        ("evaluated on", facts.eval_names, number(rows.get("eval"))),
    ):
        if given:
            in_memory = any("in memory" in name for name in given)
            rows_of = "" if count is None or in_memory else f", {counted(int(count), 'row')}"
            lines.append(f"{words} {', '.join(map(_dataset_name, given))}{rows_of}")
    rewards = texts(facts.run.about.get("rewards"))
    weights = texts(facts.settings.get("reward_weights")) or ["1.0"] * len(rewards)
    lines += [f"reward {code(one)}, weight {code(weight)}" for one, weight in zip(rewards, weights, strict=False)]
    teacher = facts.settings.get("teacher")
    return lines + ([f"teacher {_model_name(public_name(teacher))}"] if isinstance(teacher, str) else [])


def _evaluation(facts: Facts) -> str:
    """A table of the evaluations before and after, and what its numbers are of."""
    before, after = facts.evaluations
    if after is None and facts.step == 0:
        before, after = None, before
    if after is None:
        return "It was not evaluated on held-out rows." if facts.is_known else ""
    shown = [line for line in (before, after) if line is not None]
    differs = before is not None and any(f"{name}/difference" in after for name in after)
    head = ["metric", *(f"at step {line['step']:.0f}" if line["step"] else "before training" for line in shown)]
    rows = []
    for name in _means(after):
        changed = f"{name}/difference"
        cells = [code(_short(name)), *(with_interval(line, name, ".3f") for line in shown)]
        cells += [with_interval(after, changed, "+.3f") if changed in after else ""] if differs else []
        rows.append(cells)
    k = facts.num_generations_eval
    each = f"{k} sampled completions" if k else "one greedy completion"
    words = []
    if any(name.endswith("/ci_low") for name in after):
        of_each = f", with {each} of each" if facts.kind == "grpo" else ""
        words.append(f"In brackets are 95 % intervals over the held-out rows{of_each}.")
    if facts.is_chosen:
        words.append("The adapter was chosen among the run's by these very rows, which flatters it.")
    shown_table = table([*head, *(["difference"] if differs else [])], rows)
    return "\n\n".join(filter(None, [shown_table, " ".join(words)]))


def _use(facts: Facts, name: str, *, is_merged: bool) -> str:
    """A program that loads it, and commands that go on with it."""
    of, base = shlex.quote(printable(name)), shlex.quote(printable(facts.base_name))
    if facts.is_scorer:
        commands = [f"lowmem-grpo train --model {base} --dataset DATA --reward_funcs {of}"]
    else:
        commands = [f"lowmem-grpo eval --model {of} --dataset DATA --reward_funcs REWARD"]
        commands += [] if is_merged else [f"lowmem-grpo export --model {of} --merge FOLDER"]
    program = snippet(facts, name, is_merged=is_merged)
    return "\n\n".join([block(program, "python"), block("\n".join(commands), "sh")])


def _settings(facts: Facts) -> str:
    """A table of the settings that differ from their defaults, and what was set to fit into memory."""
    if not facts.is_known:
        return ""
    changed = changed_settings(facts.run)
    rows = [[code(name), _value(value), _value(default)] for name, value, default in changed]
    text = table(["setting", "value", "default"], rows) if rows else "All settings are the defaults."
    changes = facts.run.plan.get("changes")
    named = [one for one in changes if "name" in mapping(one)] if isinstance(changes, list) else []
    set_to_fit = [f"{code(one['name'])} = {_value(one.get('value'))}" for one in named]
    return f"{text}\n\nSet by the plan, to fit into memory: {', '.join(set_to_fit)}." if set_to_fit else text


def _value(value: Any) -> str:
    return code(json.dumps(value, ensure_ascii=False, default=str))


def _reproduce(facts: Facts) -> str:
    about, lines = facts.run.about, []
    command = str(about.get("command") or "")
    if command.endswith(IN_PYTHON):
        lines.append(f"by {code(command.removesuffix(IN_PYTHON).strip())}, called in Python with the settings above")
        command = ""
    if about.get("device"):
        lines.append(f"device: {code(about['device'])}")
    versions = mapping(about.get("versions"))
    if versions:
        lines.append(f"versions: {code(', '.join(f'{name} {of}' for name, of in versions.items()))}")
    times = [took for _, took in facts.run.values("step_time")]
    if times:
        lines.append(f"{counted(len(times), 'step')} took {duration(sum(times))}, without evaluations and saving")
    return "\n\n".join(filter(None, [block(command, "sh") if command else "", points(lines)]))


def _limits(facts: Facts, onto: str | None) -> list[str]:
    if not facts.is_known:
        return []
    lines = [
        f"one run with one seed, {code(facts.settings.get('seed'))}: the intervals say nothing of other seeds",
        "it was measured by what is above and by nothing else, least of all for truth and safety of what it writes",
    ]
    if facts.kind == "grpo" and facts.settings.get("teacher") is None:
        lines.append("what it has learnt is to earn its rewards, also where they pay for what is not right")
    if _was_in_4bit(facts) and onto != "nf4":
        where = "on one in 16 bits" if onto is None else "here"
        lines.append(f"it was trained on a base in 4 bits, and computes other numbers {where}")
    return lines + [f"found in training: {code(line.get('text'))}" for line in facts.run.findings]
