"""select(): the sampled completions that are worth training on, by rules, and what each rule leaves."""

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.data.text import completion_text
from lowmem_grpo.errors import InputError, counted
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.paths import expanded
from lowmem_grpo.pipeline.sampled import Row, refuse_row, settings_path

NGRAM = 3  # words
BY_REWARDS = "reward_chosen"  # a column of pairs that no person chose
# A word, a number or a sign; a letter of a script that puts no spaces between words is one.
WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|[^\w\s]")


class Left(NamedTuple):
    """How much is left after a rule."""

    rule: str  # in words, as "max_tokens 2048"
    num_completions: int
    num_prompts: int


class Selection(NamedTuple):
    """The rows that every rule keeps, in the order of the file, and what was left after each."""

    rows: list[Row]
    funnel: list[Left]


Group = list[Row]
Rule = Callable[[Group], Group]


def select(rows: Sequence[Row], config: SelectConfig | None = None) -> Selection:
    """The rows of a sampled file that are worth training on; they are rows of supervised training as they are.

    Rules are applied one after the other to the completions of each prompt. Where some of a prompt's are alike, and
    where per_prompt takes some, those come first that `choice` prefers.

    Raises:
        InputError: a row is none of a sampled file, a rule leaves nothing, or there is no reward that a rule needs.
    """
    config = SelectConfig() if config is None else config
    for place, row in enumerate(rows):
        refuse_row(row, f"row {place}")
    _refuse_without_rewards(rows, config)
    _refuse_without_tokens(rows, config)
    draw = random.Random(config.seed)
    groups = [_ranked(group, config, draw) for group in grouped(rows)]
    funnel = [Left("sampled", len(rows), len(groups))]
    for words, rule in _rules(config):
        groups = [left for group in groups if (left := rule(group))]
        funnel.append(Left(words, sum(map(len, groups)), len(groups)))
        _refuse_nothing(funnel)
    kept = {id(row) for group in groups for row in group}
    chosen = [row for row in rows if id(row) in kept]
    if config.max_rows is not None:
        if len(chosen) > config.max_rows:
            places = sorted(draw.sample(range(len(chosen)), config.max_rows))
            chosen = [chosen[place] for place in places]
        funnel.append(Left(f"max_rows {config.max_rows}", len(chosen), len(grouped(chosen))))
    return Selection(chosen, funnel)


def grouped(rows: Sequence[Row]) -> list[Group]:
    """The rows by prompt, each group and all groups in the order of the rows."""
    groups: dict[str, Group] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row)
    return list(groups.values())


def _ranked(group: Group, config: SelectConfig, draw: random.Random) -> Group:
    """The completions of a prompt, those that are to be kept first at the beginning."""
    if config.choice == "random":
        return draw.sample(group, len(group))
    return sorted(group, key=lambda row: (-_sum(row), _length(row)))


def _length(row: Row) -> int:
    """A completion's tokens, or where nobody counted them its characters."""
    return len(text_of(row)) if row["tokens"] is None else row["tokens"]


def _sum(row: Row) -> float:
    reward = row.get("reward")
    return float("-inf") if reward is None else reward


def _first(row: Row) -> float | None:
    return next(iter(row["rewards"].values()), None)


def _rules(config: SelectConfig) -> list[tuple[str, Rule]]:
    """The rules that a configuration asks for, each in words, and what it keeps of a group."""
    rules: list[tuple[str, Rule]] = []

    def each(words: str, keeps: Callable[[Row], bool]) -> None:
        rules.append((words, lambda group: [row for row in group if keeps(row)]))

    least, most = config.min_pass_rate, config.max_pass_rate
    passing = 1.0 if config.min_reward is None else config.min_reward
    if least is not None:
        rules.append((f"min_pass_rate {least:g}", lambda group: group if _pass_rate(group, passing) >= least else []))
    if most is not None:
        rules.append((f"max_pass_rate {most:g}", lambda group: group if _pass_rate(group, passing) <= most else []))
    if config.min_reward is not None:
        each(f"min_reward {config.min_reward:g} ({config.reward_of})", lambda row: _reaches(row, config))
    finishes = config.finish or ["eos", "stop"]
    each(f"finish {', '.join(finishes)}", lambda row: row["finish"] in finishes)
    shortest, longest = config.min_tokens, config.max_tokens
    if shortest is not None:
        each(f"min_tokens {shortest}", lambda row: row["tokens"] >= shortest)
    if longest is not None:
        each(f"max_tokens {longest}", lambda row: row["tokens"] <= longest)
    if config.language:
        each(f"language {', '.join(config.language)}", _speaks(config.language, config.min_language_share))
    repeated = config.max_repetition
    if repeated is not None:
        each(f"max_repetition {repeated:g}", lambda row: repetition(text_of(row)) <= repeated)
    for pattern in config.drop_regex or []:
        found = re.compile(pattern)
        each(f"drop_regex {pattern}", lambda row, found=found: found.search(text_of(row)) is None)
    if config.drop_duplicates:
        rules.append(("drop_duplicates", _without_copies))
    overlap = config.max_similarity
    if overlap is not None:
        rules.append((f"max_similarity {overlap:g}", lambda group: _without_alike(group, overlap)))
    if config.per_prompt is not None:
        rules.append((f"per_prompt {config.per_prompt} ({config.choice})", lambda group: group[: config.per_prompt]))
    return rules


def text_of(row: Row) -> str:
    """The text of a row's completion."""
    return completion_text(row["completion"])


def _pass_rate(group: Group, passing: float) -> float:
    """The share of a prompt's completions whose first reward is at least `passing`; one without any does not pass."""
    return sum((value := _first(row)) is not None and value >= passing for row in group) / len(group)


def _reaches(row: Row, config: SelectConfig) -> bool:
    assert config.min_reward is not None
    values = {"first": [_first(row)], "all": [*row["rewards"].values()], "sum": [row["reward"]]}[config.reward_of]
    known = [value for value in values if value is not None]  # with "all", a function that gives none has no say
    return bool(known) and min(known) >= config.min_reward


def _speaks(scripts: list[str], least: float) -> Callable[[Row], bool]:
    from lowmem_grpo.rewards.language import get_language_consistency_reward, language_consistency_reward  # and torch

    of_prompt = scripts == ["prompt"]
    consistency = language_consistency_reward if of_prompt else get_language_consistency_reward(scripts)

    def keeps(row: Row) -> bool:
        (share,) = consistency(prompts=[row["prompt"]], completions=[row["completion"]])
        return share is None or (isinstance(share, float) and share >= least)

    return keeps


def words_of(text: str) -> list[str]:
    """A text's words, numbers and signs in lower case; a Chinese character is a word."""
    return WORD.findall(text.lower())


def _ngrams(text: str) -> list[tuple[str, ...]]:
    """Every n-gram of words of a text; of a shorter text, all its words as one."""
    words = words_of(text)
    return [tuple(words[start : start + NGRAM]) for start in range(max(1, len(words) - NGRAM + 1))]


def repetition(text: str) -> float:
    """The share of a text's n-grams of words that occurred in it before, from 0 to below 1."""
    ngrams = _ngrams(text)
    return 1 - len(set(ngrams)) / len(ngrams)


def similarity(one: set, other: set) -> float:
    """Jaccard's similarity of two sets, from 0 to 1."""
    return len(one & other) / len(one | other)


def _without_copies(group: Group) -> Group:
    seen: dict[str, Row] = {}
    for row in group:
        seen.setdefault(" ".join(text_of(row).split()), row)
    return list(seen.values())


def _without_alike(group: Group, overlap: float) -> Group:
    kept: list[tuple[Row, set]] = []
    for row in group:
        own = set(_ngrams(text_of(row)))
        if all(similarity(own, other) <= overlap for _, other in kept):
            kept.append((row, own))
    return [row for row, _ in kept]


def _refuse_without_rewards(rows: Sequence[Row], config: SelectConfig) -> None:
    """Raise InputError where a rule is about rewards and rows have none, or different first ones."""
    asked = [name for name in ("min_reward", "min_pass_rate", "max_pass_rate") if getattr(config, name) is not None]
    if asked and not any(value is not None for row in rows for value in row["rewards"].values()):
        raise InputError(f"{asked[0]} is given, and no completion has a reward; sample with reward_funcs")
    firsts = sorted({next(iter(row["rewards"])) for row in rows if row["rewards"]})
    if asked and len(firsts) > 1 and config.reward_of == "first":
        raise InputError(
            f"{asked[0]} is about the first reward, which is {firsts[0]} in some rows and {firsts[1]} in others; "
            "select from files of the same reward_funcs"
        )


def _refuse_without_tokens(rows: Sequence[Row], config: SelectConfig) -> None:
    """Raise InputError where a rule is about tokens and a row does not say how many it has."""
    asked = [name for name in ("min_tokens", "max_tokens") if getattr(config, name) is not None]
    if asked and any(row["tokens"] is None for row in rows):
        raise InputError(f"{asked[0]} is given, and the server that sampled did not count tokens; leave it out")


def _refuse_nothing(funnel: list[Left]) -> None:
    if funnel[-1].num_completions == 0:
        raise InputError(
            f"{funnel[-1].rule} leaves nothing of {counted(funnel[-2].num_completions, 'completion')}; loosen it, or "
            f"sample more (so far: {', '.join(f'{left.rule}: {left.num_completions}' for left in funnel)})"
        )


def as_text(funnel: Sequence[Left]) -> str:
    """The funnel for people, a line a rule."""
    width = max(len(left.rule) for left in funnel)
    lines = [f"{'':<{width}}  completions  prompts"]
    lines += [f"{left.rule:<{width}}  {left.num_completions:>11}  {left.num_prompts:>7}" for left in funnel]
    return "\n".join(lines)


def write_rows(path: str | Path, rows: Sequence[Row], inputs: Sequence[str | Path] = ()) -> Path:
    """Write a JSONL file, whole or not at all. Returns its path.

    Raises:
        InputError: it is one of the inputs or any file but one of such rows, which would be lost, or cannot be written.
    """
    path = Path(expanded(path))
    if any(os.path.realpath(path) == os.path.realpath(expanded(one)) for one in inputs):
        raise InputError(f"output {str(path)!r} is what is read, and would be lost; choose another one")
    _refuse_to_replace(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written: {error.strerror}; choose another one") from error
    return path


def _refuse_to_replace(path: Path) -> None:
    """Raise InputError for a file that is no result of a selection or of pairs(), by its first line."""
    if settings_path(path).exists():
        raise InputError(f"output {str(path)!r} was sampled by a model, and would be lost; choose another one")
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError:
        return
    try:
        row = json.loads(line or "{}")
        if line and not (isinstance(row, dict) and "chosen" in row):
            refuse_row(row, "its first line")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"output {str(path)!r} is there, is no file of `select` or `pairs`, and would be lost; choose another one"
        ) from error
    if "chosen" in row and BY_REWARDS not in row:
        raise InputError(f"output {str(path)!r} has a person's labels, which would be lost; choose another one")
