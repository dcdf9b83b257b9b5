"""An evaluation for people: tables with intervals, and completions as text that a terminal can trust."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_grpo.data.gold import gold_of
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.data.text import as_read
from lowmem_grpo.errors import InputError, printable
from lowmem_grpo.evaluation.evaluate import Evaluation
from lowmem_grpo.rollout.metrics import in_words
from lowmem_grpo.terminal import indented, table


def as_table(found: dict[str, dict[str, float]], width: int | None) -> str:
    """A row a metric and a column a model, with intervals, for a terminal of `width` columns."""
    return _table("evaluation; in brackets 95 % intervals over prompts", found, ".3f", width)


def as_difference_table(metrics: dict[str, float], width: int | None) -> str:
    """A row for each of an adapter's metrics that have a difference from the base's."""
    changed = {name.replace("/difference", ""): value for name, value in metrics.items() if "/difference" in name}
    return _table("adapter minus base, on the same prompts", {"difference": changed}, "+.3f", width)


def _table(title: str, found: dict[str, dict[str, float]], form: str, width: int | None) -> str:
    names = [name for name in next(iter(found.values())) if not name.endswith(("/ci_low", "/ci_high"))]
    columns = [[with_interval(metrics, name, form) for name in names] for metrics in found.values()]
    rows = list(zip([name.removeprefix("eval_") for name in names], *columns, strict=True))
    return f"{title}\n\n{table(['', *found], rows, width)}\n"


def as_line(metrics: Mapping[str, float | None], names: Sequence[str], form: str = ".3f") -> str:
    """Some metrics with their intervals, as `reward 0.310 [0.250, 0.377]`."""
    short = [name.removeprefix("eval_").removesuffix("/difference") for name in names]
    return "  ".join(f"{word} {with_interval(metrics, name, form)}" for word, name in zip(short, names, strict=True))


def with_interval(metrics: Mapping[str, float | None], name: str, form: str) -> str:
    """A metric and, where it has one, its interval."""
    value, low, high = (in_words(metrics.get(key), form) for key in (name, f"{name}/ci_low", f"{name}/ci_high"))
    return value if "-" in (low, high) else f"{value} [{low}, {high}]"


def examples(found: dict[str, Evaluation], count: int) -> list[dict[str, Any]]:
    """The first completions of every prompt, then the second ones, count in all, of each evaluation."""
    first = next(iter(found.values()))
    k = len(first.completions) // len(first.prompts)
    chosen = sorted(sorted(range(len(first.completions)), key=lambda place: place % k)[:count])
    return [
        {
            "prompt": first.prompts[place // k].text,
            "gold": _gold(first.prompts[place // k]),
            **{
                who: {
                    "completion": as_read(one.texts[place]),
                    "cut_off": one.completions[place].finish == "length",
                    "rewards": {name: values[place] for name, values in one.rewards.items()},
                }
                for who, one in found.items()
            },
        }
        for place in chosen
    ]


def _gold(prompt: Prompt) -> Any:
    """The gold answer that a prompt's row has, as the built-in rewards find it; None without one that they read."""
    try:
        return gold_of(prompt.columns)
    except InputError:
        return None


def examples_as_text(shown: list[dict[str, Any]]) -> str:
    """Examples as text for a terminal, in which nothing foreign moves the cursor or passes for our own lines."""
    lines = []
    for number, example in enumerate(shown, 1):
        prompt = example["prompt"]
        chat = [f"{m['role']}: {m.get('content', '')}" for m in prompt] if isinstance(prompt, list) else [prompt]
        lines += [f"{number} of {len(shown)}", "  prompt", *indented("\n".join(chat))]
        if example["gold"] is not None:
            lines += ["  gold answer", *indented(str(example["gold"]))]
        for who in [key for key in example if key not in ("prompt", "gold")]:
            of = example[who]
            facts = [f"{printable(name)} {in_words(value, '.3f')}" for name, value in of["rewards"].items()]
            facts += ["cut off"] if of["cut_off"] else []
            lines += [f"  {who}: {', '.join(facts)}", *indented(of["completion"])]
        lines.append("")
    return "\n".join(lines)
