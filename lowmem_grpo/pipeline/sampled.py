"""A file of sampled completions: JSONL, a line a completion, group after group.

A line has

    prompt, completion   as the data has prompts: texts, or lists of messages
    columns              the row's other columns
    tools, chat_template_kwargs   where the row has them, as supervised training reads them
    rewards              by reward function, null where one gives none
    reward               their weighted sum, null where there is none
    finish               "eos", "stop" (a stop string, or an endpoint's end where there are some) or "length" (cut off)
    tokens               how many were sampled, the one that ends it included; null where an endpoint does not count
    logprob_mean         mean log-probability of a token under temperature alone; null where the sampler does not say
    prompt_index         of the prompt among those of the data that are not too long
    seed, model          what the group was drawn from; of an endpoint's, seed is null

NAME.run, beside NAME, has the settings and the identity of the model, the data and the rewards.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowmem_grpo.config.fields import LARGEST, refuse_changes
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.select import FINISHES
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.output.lock import lock_file
from lowmem_grpo.paths import expanded

FORMAT = 1  # of NAME.run; to be raised where the lines change their shape
Row = dict[str, Any]
OTHERWISE = "choose another output"


class SampledFile:
    """The file that sample() writes: what of it is whole, and whether a run may go on with it.

    Attributes:
        done: the prompts of which it holds whole groups, in its order; those of one model here are the first ones.
        sampler: the state of the sampler that drew them, or None before there is one.
    """

    def __init__(self, output: str, num_generations: int, in_order: bool = True):
        self.path = Path(expanded(output))
        self.settings_path = settings_path(self.path)
        self.num_generations, self.in_order = num_generations, in_order
        self.done: list[int] = []
        self.saved: Row | None = None

    @property
    def num_groups(self) -> int:
        """How many whole groups it holds."""
        return len(self.done)

    @property
    def sampler(self) -> Row | None:
        return None if self.saved is None else self.saved["sampler"]

    def prepare(self, config: SampleConfig, identity: Mapping[str, Any]) -> list[str]:
        """Look at what is there, and cut off what a kill left of a group. Returns what to tell of changed settings.

        Raises:
            InputError: nothing can be written there, or what is there is of other settings, data or rewards.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_file(self.path)
            with self.path.open("ab"):  # which makes it, or raises
                pass
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise InputError(
                f"output {str(self.path)!r} cannot be written: {error.strerror}; choose another one"
            ) from error
        if self.path.stat().st_size == 0:
            return []
        self.saved = self._read_settings()
        changed = refuse_changes(config, self.saved["config"], OTHERWISE)
        self.refuse_another(identity)
        seen: set[int] = set()
        whole = lines[: len(lines) // self.num_generations * self.num_generations]
        for place, line in enumerate(whole):
            row = read_row(line, f"line {place + 1} of {self.path}")
            index, begins = row["prompt_index"], place % self.num_generations == 0
            expected = len(self.done) if self.in_order and begins else index if begins else self.done[-1]
            if index != expected or (begins and index in seen):
                raise InputError(
                    f"line {place + 1} of {self.path} is of prompt {index}, and not of "
                    f"{'another one' if index == expected else expected}: the file was changed; {OTHERWISE}"
                )
            if begins:
                self.done.append(index)
                seen.add(index)
        os.truncate(self.path, sum(len(line) + 1 for line in whole))
        return [f"going on with {self.path}, with {', '.join(changed)}"] if changed else []

    def refuse_another(self, identity: Mapping[str, Any]) -> None:
        """Raise InputError where the file's groups are of another identity."""
        from lowmem_grpo.inputs.identity import first_difference  # seconds, which a reader of the file does without

        differs = None if self.saved is None else first_difference(identity, self.saved["identity"])
        if differs:
            raise InputError(f"{self.path} was sampled with other {differs}; go on with the same, or {OTHERWISE}")

    def begin(self, config: Mapping[str, Any], identity: Mapping[str, Any], sampler: Mapping[str, Any]) -> None:
        """Write down what the file's lines are sampled by, before the first of them."""
        if self.saved is not None:
            return
        self.saved = {"format": FORMAT, "config": config, "identity": identity, "sampler": sampler}
        write_file(self.settings_path, json.dumps(self.saved, indent=1))

    def append(self, groups: list[list[Row]]) -> None:
        """Write whole groups, one after the other, and have them on the disk."""
        with self.path.open("ab") as file:
            for group in groups:
                text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in group)
                file.write(text.encode())
                file.flush()
                self.done.append(group[0]["prompt_index"])
            os.fsync(file.fileno())

    def _read_settings(self) -> Row:
        remedy = f"move {self.path} away, or {OTHERWISE}"
        try:
            saved = json.loads(self.settings_path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(
                f"{self.path} is there, and without {self.settings_path.name} beside it nobody knows what it was "
                f"sampled by; {remedy}"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{self.settings_path} cannot be read; {remedy}") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise InputError(f"{self.settings_path} is of another format than {FORMAT}; {remedy}")
        if not all(isinstance(saved.get(name), dict) for name in ("config", "identity", "sampler")):
            raise InputError(f"{self.settings_path} is damaged; {remedy}")
        return saved


def settings_path(path: Path) -> Path:
    """The file beside a sampled one that says what its lines were sampled by."""
    return path.with_name(f"{path.name}.run")


def read_row(line: bytes, where: str) -> Row:
    """One line of a sampled file. Raise InputError for what is none."""
    try:
        row = json.loads(line)
        if b"\\u" in line:  # of which one may be half a character, that no file can be written with
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON; give a file that `lowmem-grpo sample` wrote") from error
    refuse_row(row, where)
    return row


def refuse_row(row: Any, where: str) -> None:
    """Raise InputError for what is no row of a sampled file."""
    wrong = next((name for name, fits in FIELDS.items() if not _fits(row, name, fits)), None)
    if wrong is not None:
        raise InputError(
            f"{where} has no {wrong} as `lowmem-grpo sample` writes it: {shown(row)}; give a file that it wrote"
        )


def _fits(row: Any, name: str, fits: Callable[[Any], bool]) -> bool:
    return isinstance(row, dict) and name in row and fits(row[name])


def _is_text(value: Any) -> bool:
    """Tell whether a value is a text, or messages with texts as contents, if with any."""
    return isinstance(value, str) or (isinstance(value, list) and value != [] and all(map(_is_message, value)))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content") or "", str)


def _is_reward(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) <= LARGEST)  # which NaN is not


def _are_rewards(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_reward, value.values()))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


FIELDS: dict[str, Callable[[Any], bool]] = {  # what a line must have, and of what kind
    "prompt": _is_text, "completion": _is_text, "rewards": _are_rewards, "reward": _is_reward,
    "finish": lambda value: value in FINISHES, "tokens": lambda value: value is None or _is_count(value),
    "prompt_index": _is_count,
}  # fmt: skip


def read_sampled(path: str | Path) -> list[Row]:
    """The rows of a sampled file, without a last line that a kill cut short.

    Raises:
        InputError: it is not there, has no row, or has a line that is none.
    """
    path = Path(expanded(path))
    try:
        *lines, end = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}; give a sampled file") from error
    if end.rstrip().endswith(b"}") and is_json(end):  # an editor left out its end
        lines.append(end)
    if not lines:
        raise InputError(f"{str(path)!r} has no line; sample into it first, with `lowmem-grpo sample`")
    return [read_row(line, f"line {place + 1} of {path}") for place, line in enumerate(lines)]


def is_json(line: bytes) -> bool:
    """Tell whether a line is JSON, as one that a kill cut short is not."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
