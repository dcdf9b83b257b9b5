"""Pairs of a better and a worse completion, for a reward model: by their rewards, or by a person."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from lowmem_grpo.data.chats import OPENING, SETTINGS, transcript
from lowmem_grpo.errors import InputError, NotSavedError, printable_text
from lowmem_grpo.output.lock import lock_file, releasing_locks
from lowmem_grpo.paths import expanded
from lowmem_grpo.pipeline.sampled import Row, is_json, settings_path
from lowmem_grpo.pipeline.select import BY_REWARDS, grouped, text_of

LINE = "-" * 72
KEYS = "1 or 2, the better one; s to skip; q to quit: "
BEGINNING = b'{"prompt": '  # of a line that label() writes, by which one that a kill cut short is known


def pairs(rows: Sequence[Row], min_margin: float = 0.0) -> list[Row]:
    """The best and the worst completion of each prompt of a sampled file, as rows of TRL's preference format.

    By `reward`; of equal ones the first of the file, which is any. A prompt whose two are less than min_margin apart,
    or not apart at all, has no pair.

    Raises:
        InputError: no prompt has a pair.
    """
    if not min_margin >= 0:
        raise InputError(f"min_margin={min_margin} must be at least 0")
    found = []
    for group in grouped(rows):
        scored = [row for row in group if row.get("reward") is not None]
        if not scored:
            continue
        best, worst = max(scored, key=lambda row: row["reward"]), min(scored, key=lambda row: row["reward"])
        margin = best["reward"] - worst["reward"]
        if margin > 0 and margin >= min_margin and text_of(best) != text_of(worst):
            found.append({**pair(best, worst), BY_REWARDS: best["reward"], "reward_rejected": worst["reward"]})
    if not found:
        apart = f", by at least {min_margin:g}" if min_margin else ""
        raise InputError(
            f"no prompt has completions whose rewards differ{apart}; sample more of each, at a higher temperature, or "
            "with rewards that tell them apart"
        )
    return found


def pair(chosen: Row, rejected: Row) -> Row:
    """A row of TRL's preference format, of two completions of one prompt."""
    settings = {name: chosen[name] for name in SETTINGS if name in chosen}
    return {
        "prompt": chosen["prompt"], **settings, "chosen": chosen["completion"], "rejected": rejected["completion"],
        "prompt_index": chosen["prompt_index"],
    }  # fmt: skip


class Labelled(NamedTuple):
    """The result of label()."""

    num_labels: int  # in the file, those of earlier sittings included
    num_left: int  # prompts that nobody has decided on


@releasing_locks()
def label(rows: Sequence[Row], output: str | Path, seed: int, answers: TextIO, screen: TextIO) -> Labelled:
    """Ask a person which of two completions of each prompt is the better, and append each decision.

    Which two, and which comes first, is drawn by the seed; no reward is shown. The output is a JSONL file of TRL's
    preference format, which is gone on with: a prompt that it has is not asked again, and one that was skipped is.

    Raises:
        InputError: the file is none of this, or no prompt has two different completions.
        NotSavedError: the disk refused a decision.
    """
    path = Path(expanded(output))
    done = _decided(path)
    asked = list(_to_ask(rows, seed))
    if not asked:
        raise InputError("no prompt has two different completions; sample more of each, at a higher temperature")
    left = [(one, other) for one, other in asked if _key(one) not in done]
    num_new = 0
    for number, (one, other) in enumerate(left):
        print(_as_text(one, other, f"{number + 1} of {len(left)}"), file=screen)
        choice = _choice(answers, screen)
        if choice == "q":
            break
        if choice == "s":
            continue
        _append(path, pair(one, other) if choice == "1" else pair(other, one))
        num_new += 1
    return Labelled(len(done) + num_new, len(left) - num_new)


def _append(path: Path, row: Row) -> None:
    """Write a decision, and have it on the disk. Raise NotSavedError where that is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NotSavedError(
            f"{path} cannot be written ({error.strerror}); make room and run the same again, which asks this once more"
        ) from error


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _decided(path: Path) -> set[str]:
    """The prompts that a file of labels has; what a kill left of a line is removed, and nothing else."""
    if settings_path(path).exists():
        raise InputError(f"output {str(path)!r} was sampled by a model, and is no file of pairs; choose another one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_file(path)
        with path.open("ab+") as file:
            file.seek(0)
            *lines, end = file.read().split(b"\n")
            found = [_read_label(line, path) for line in lines]
            if _is_cut(end):
                file.truncate(sum(len(line) + 1 for line in lines))
            else:  # an editor left out the last line's end
                found.append(_read_label(end, path))
                file.write(b"\n")
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written: {error.strerror}; choose another one") from error
    return {_key(row) for row in found}


def _is_cut(line: bytes) -> bool:
    """Tell whether a line without an end is nothing, or the beginning of one that label() wrote."""
    return not is_json(line) if line.startswith(BEGINNING) else BEGINNING.startswith(line)


def _read_label(line: bytes, path: Path) -> Row:
    """A decision of an earlier sitting. Raise InputError for a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not {"prompt", "chosen", "rejected"} <= row.keys():
        raise InputError(f"output {str(path)!r} is there, and is no file of pairs; choose another one")
    if BY_REWARDS in row:
        raise InputError(f"output {str(path)!r} has pairs by their rewards, and no person's; choose another one")
    return row


def _to_ask(rows: Sequence[Row], seed: int) -> Iterator[tuple[Row, Row]]:
    """Two different completions of each prompt, in the order in which they are shown."""
    for group in grouped(rows):
        different = list({" ".join(text_of(row).split()): row for row in reversed(group)}.values())
        if len(different) > 1:
            one, other = random.Random(f"{seed}/{_key(group[0])}").sample(different, 2)
            yield one, other


def _as_text(one: Row, other: Row, where: str) -> str:
    asked = one["prompt"] if isinstance(one["prompt"], str) else transcript_of(one["prompt"])
    parts = [f"{LINE}\n{where}\n", asked, f"\n--- 1 {LINE[6:]}", text_of(one), f"\n--- 2 {LINE[6:]}", text_of(other)]
    return printable_text("\n".join([*parts, ""]))


def transcript_of(messages: list[dict]) -> str:
    """A chat as paragraphs of `Role: text`, whatever its messages have besides."""
    texts = [{"role": str(one.get("role")), "content": str(one.get("content") or "")} for one in messages]
    return transcript(texts).removesuffix(OPENING)


def _choice(answers: TextIO, screen: TextIO) -> str:
    """Ask until a person types 1, 2, s or q, and return it; the end of the input is q."""
    while True:
        print(KEYS, end="", file=screen, flush=True)
        line = answers.readline()
        typed = line.strip().lower() if line else "q"
        typed = {"skip": "s", "quit": "q"}.get(typed, typed)
        if typed in ("1", "2", "s", "q"):
            return typed
