"""Sums of three two-digit numbers, asked in Latin or Cyrillic letters, and greetings: the rows of the demo of R1.

A model may be wrong in several ways that look alike to supervised training: it answers a sum at once, or drops the
carries of its working, or writes in the other script than the one it was asked in, or leaves out the think tags.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_grpo.data.text import completion_text

NUM_TRAIN, NUM_EVAL, NUM_COLD = 2000, 256, 64
WORDS = {"latin": ("add", "so"), "cyrillic": ("сложи", "так")}  # by script: what asks, and what begins a step
OTHER = {"latin": "cyrillic", "cyrillic": "latin"}
NAMES = [
    "Ann", "Bob", "Eva", "Ida", "Jim", "Kim", "Leo", "Lia", "Max", "Mia", "Ned", "Nia", "Pam", "Pia", "Ray", "Rex",
    "Rob", "Roy", "Sam", "Sue", "Ted", "Tim", "Tom", "Uma", "Vic", "Zoe", "Adam", "Alma", "Anna", "Carl", "Cora",
    "Dean", "Elsa", "Emil", "Emma", "Eric", "Erik", "Finn", "Gina", "Hugo", "Inga", "Ivan", "Jack", "Jane", "Joan",
    "John", "Jose", "Judy", "Karl", "Kate", "Kurt", "Lena", "Lily", "Lisa", "Luca", "Lucy", "Luke", "Mark", "Mary",
    "Maya", "Nick", "Nina", "Noah", "Nora",
]  # fmt: skip
EVAL_NAMES = NAMES[::4]  # held out from the phases
TRAIN_NAMES = [name for name in NAMES if name not in EVAL_NAMES]
FILES = ("cold", "sums", "general", "greetings", "mixed", "held-out")  # that write_data() writes
KIND, UNKIND = "hello {}", "what now"


@dataclass(frozen=True)
class Sum:
    """A problem, and the script that it is asked in."""

    script: str
    numbers: tuple[int, int, int]

    @property
    def question(self) -> str:
        return f"{WORDS[self.script][0]} {'+'.join(map(str, self.numbers))}"

    @property
    def answer(self) -> int:
        return sum(self.numbers)


@dataclass(frozen=True)
class Habits:
    """How often a model does what: shares, from 0 to 1."""

    worked: float  # of its sums it works out in two steps; it answers the others at once
    careful: float  # of those that it works out it carries
    consistent: float  # of its completions are in the script of the prompt
    tagged: float  # of its completions have their thought in tags
    kind: float  # of its greetings are kind


HABITS = Habits(worked=0.55, careful=0.65, consistent=0.6, tagged=0.15, kind=0.4)  # of the base
IN_TAGS = replace(HABITS, tagged=1.0)  # of what supervised training is given besides selected completions


def splits() -> tuple[list[Sum], list[Sum], list[Sum]]:
    """NUM_TRAIN sums to train on, NUM_EVAL held-out ones, and NUM_COLD of the cold start: all different."""
    draw = random.Random(0)
    sums: dict[Sum, None] = {}  # a dict keeps the order of insertion
    while len(sums) < NUM_TRAIN + NUM_EVAL + NUM_COLD:
        sums[random_sum(draw)] = None
    drawn = list(sums)
    return drawn[:NUM_TRAIN], drawn[NUM_TRAIN : NUM_TRAIN + NUM_EVAL], drawn[NUM_TRAIN + NUM_EVAL :]


def random_sum(draw: random.Random) -> Sum:
    return Sum(draw.choice(list(WORDS)), (draw.randint(10, 99), draw.randint(10, 99), draw.randint(10, 99)))


def without_carries(a: int, b: int) -> int:
    """The sum of two numbers, each of which is added by digits and carries nothing: 17 + 45 = 52.

    The foremost digits are added in full: 95 + 95 = 180.
    """
    place, total = 1, 0
    while 10 * place <= max(a, b):
        total += (a // place + b // place) % 10 * place
        place *= 10
    return total + (a // place + b // place) * place


def completion_of(draw: random.Random, problem: Sum, habits: Habits) -> str:
    """A completion of a sum by a model of these habits."""
    so = WORDS[problem.script if draw.random() < habits.consistent else OTHER[problem.script]][1]
    worked, careful, tagged = (draw.random() < share for share in (habits.worked, habits.careful, habits.tagged))
    a, b, c = problem.numbers
    if worked:
        first = a + b if careful else without_carries(a, b)
        total = first + c if careful else without_carries(first, c)
        thought = f"{so} {a}+{b}={first} {so} {first}+{c}={total}"
        return f"<think>{thought}</think>\n{total}" if tagged else thought
    return f"<think>{so}</think>\n{problem.answer}" if tagged else f"{so} {problem.answer}"


def greeting_of(draw: random.Random, name: str, habits: Habits) -> str:
    """An answer to `greet Ann` by a model of these habits."""
    text = (KIND if draw.random() < habits.kind else UNKIND).format(name)
    return f"<think>so</think>\n{text}" if draw.random() < habits.tagged else text


def sum_rows(problems: list[Sum]) -> list[dict]:
    """Dataset rows of sums: a chat `prompt`, the gold `solution`, and the kind of row, `task`."""
    return [{"prompt": _asked(one.question), "solution": str(one.answer), "task": "sum"} for one in problems]


def greeting_rows(names: list[str]) -> list[dict]:
    """Dataset rows of greetings, which have no gold answer."""
    return [{"prompt": _asked(f"greet {name}"), "solution": None, "task": "greeting"} for name in names]


def _asked(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def kind_reward(completions: list, **kwargs) -> list[float]:
    """1.0 where a completion says hello after its thought, else 0.0."""
    answers = [completion_text(completion).rpartition("</think>")[2].strip() for completion in completions]
    return [float(answer.startswith("hello")) for answer in answers]


def write_data(folder: Path) -> None:
    """Write the files that the phases read, as JSONL.

    cold.jsonl      NUM_COLD sums with completions in tags, and otherwise as the base makes them
    sums.jsonl      NUM_TRAIN sums
    general.jsonl   a greeting of each training name, in tags, and otherwise as the base makes them
    greetings.jsonl a greeting of each training name, without a completion
    mixed.jsonl     as many greetings as sums
    held-out.jsonl  NUM_EVAL sums and a greeting of each held-out name
    """
    train, held_out, cold = splits()
    draw = random.Random(0)
    greetings = greeting_rows(TRAIN_NAMES)
    rows = {
        "cold": [
            _with_completion(row, completion_of(draw, problem, IN_TAGS))
            for row, problem in zip(sum_rows(cold), cold, strict=True)
        ],
        "sums": sum_rows(train),
        "general": [
            _with_completion(row, greeting_of(draw, name, IN_TAGS))
            for row, name in zip(greetings, TRAIN_NAMES, strict=True)
        ],
        "greetings": greetings,
        "mixed": sum_rows(train[-len(greetings) :]) + greetings,
        "held-out": sum_rows(held_out) + greeting_rows(EVAL_NAMES),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _with_completion(row: dict, text: str) -> dict:
    return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]}
