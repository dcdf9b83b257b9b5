"""The doctor's look at any training: who says what was found, and what every kind of run may suffer from.

A situation is a function of what was given that returns a sentence with cause and remedy, or None where all is well.
"""

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from lowmem_grpo.doctor.doctor import Doctor, Finding
from lowmem_grpo.doctor.symptoms import Course, symptoms
from lowmem_grpo.errors import counted
from lowmem_grpo.inputs.training import RunInputs
from lowmem_grpo.output.folder import read_state
from lowmem_grpo.run.checkpoint import load_part
from lowmem_grpo.terminal import show

# TRL's GRPO begins at 1e-6, and the demo's LoRA learns at 1e-3. Adam moves a weight by about the rate a step: at 1e-8,
# by 1e-5 in a thousand steps.
LEARNING_RATES = (1e-8, 2e-3)


def having_looked(
    inputs: RunInputs, find: Callable[[], list[Finding]], rewards: Sequence[str] = (),
    look_for: Callable[[Course, int], dict[str, str]] = symptoms,
) -> Doctor:  # fmt: skip
    """A doctor who has looked at a run's inputs and said what is new; no weights are read.

    A resumed run's doctor knows what was said before. `look_for` is what is looked for at each step.

    Raises:
        UnhealthyRunError: doctor="stop", and something was found.
    """
    doctor = Doctor(inputs.config, inputs.total_steps, rewards, look_for)
    if inputs.resume is not None:
        load_part(inputs.resume, "doctor", doctor.load, read_state(inputs.resume))
    lines = doctor.note(0, [] if doctor.is_off else find())
    doctor.refuse()  # in all the words of these lines
    for line in lines:
        show(f"doctor: {line['text']}", sys.stderr)
    return doctor


def seen(situations: Iterable[Callable[[Any], str | None]], given: Any) -> list[Finding]:
    """A finding for each situation that what is given is in."""
    found = ((situation.__name__, situation(given)) for situation in situations)
    return [Finding(name, text) for name, text in found if text]


def learnt_by_heart(what: str, trained: Iterable[Hashable], measured: Sequence[Hashable]) -> str | None:
    """Say how many rows that are held out, "prompts" say, are trained on."""
    shared = sum(map(set(trained).__contains__, measured))
    if not shared:
        return None
    return (
        f"the training data have {shared} of {len(measured)} evaluation {what} too, so that the evaluation measures "
        "what was learnt by heart; take them out of one of the two"
    )


def mostly_dropped(inputs: RunInputs, what: str, limit: str) -> str | None:
    """Say that most rows are longer than a setting allows, such as max_length."""
    kept, dropped = inputs.num_rows, inputs.num_dropped
    if dropped <= kept:
        return None
    return (
        f"only {kept} of {kept + dropped} {what} have at most {limit}={getattr(inputs.config, limit)} tokens, and the "
        "others are left out; raise it"
    )


def question_not_in_prompt(inputs: RunInputs) -> str | None:
    """Say which columns that ask, Alpaca's `input` say, the model never sees."""
    if not inputs.unseen:
        return None
    columns = " and ".join(inputs.unseen)
    return (
        f"most rows have something in {columns} that their texts do not show, so that the model never sees it; write "
        f"it into the texts, or remove or rename {columns}"
    )


def empty_texts(inputs: RunInputs) -> str | None:
    """Say how many rows have nothing in a column that is learnt from."""
    if not inputs.empty:
        return None
    counts = " and ".join(f"an empty {column} in {count}" for column, count in inputs.empty.items())
    return f"there is {counts} of the rows, which teaches to say nothing, or to answer nothing; leave these rows out"


def joined_words(inputs: RunInputs) -> str | None:
    """Say that prompts run into what follows them."""
    if not inputs.has_joined_words:
        return None
    return (
        "most prompts run into the text after them without a space, since texts are joined as they are; end prompts "
        'with white space, or make both lists of messages such as [{"role": "user", "content": ...}]'
    )


def implausible_learning_rate(inputs: RunInputs) -> str | None:
    """Say that the learning rate is far from those that LoRA learns with."""
    rate, (low, high) = inputs.config.learning_rate, LEARNING_RATES
    if low <= rate <= high:
        return None
    what = "moves an adapter hardly at all" if rate < low else "soon ruins an adapter"
    return f"learning_rate={rate:g} {what}; LoRA is trained with 1e-6 to 1e-3"


def warmup_beyond_the_end(inputs: RunInputs) -> str | None:
    """Say that a run is over before its warm-up, so that the learning rate never gets to its peak."""
    warmup, steps = inputs.config.warmup_steps, inputs.total_steps
    if not warmup or warmup < steps:
        return None
    return (
        f"warmup_steps={warmup} are not over when the run ends, after {counted(steps, 'step')}, so that the learning "
        "rate never gets to its peak; lower warmup_steps"
    )


OF_ANY = (question_not_in_prompt, implausible_learning_rate, warmup_beyond_the_end)
OF_TEXTS = (empty_texts, joined_words)  # that are imitated or compared, which a prompt alone is not
