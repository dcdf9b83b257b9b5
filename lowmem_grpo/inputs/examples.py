"""The inputs of supervised training, checked before long work: model, examples, folder, and a plan."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.examples import Example, Examples, form_of, tokenize_examples
from lowmem_grpo.data.order import shares_of
from lowmem_grpo.data.rows import read_rows
from lowmem_grpo.distributed import main_first
from lowmem_grpo.errors import InputError, counted
from lowmem_grpo.inputs.callbacks import callbacks_of
from lowmem_grpo.inputs.texts import empty_texts, run_together, unseen_columns
from lowmem_grpo.inputs.training import (
    RunInputs,
    begin,
    evaluation_rows,
    left_out,
    name_of,
    refuse_other_config,
    settled,
    too_long,
)


@dataclass(frozen=True, kw_only=True)
class ExampleInputs(RunInputs):
    """The inputs of a run that imitates examples, checked, before any weights are read."""

    given: SFTConfig
    config: SFTConfig
    examples: Examples[Example]
    eval_examples: list[Example]  # empty where nothing is evaluated

    @property
    def num_rows(self) -> int:
        """How many examples an epoch has."""
        return len(self.examples.all)

    @property
    def num_eval_rows(self) -> int:
        """How many examples are held out to be evaluated on."""
        return len(self.eval_examples)


@main_first
def read_example_inputs(
    model: Any, train_dataset: Any, eval_dataset: Any, config: SFTConfig, peft_config: Any = None,
    tokenizer: Any = None, callbacks: Any = (),
) -> ExampleInputs:  # fmt: skip
    """The inputs of sft(), which documents them.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    refuse_other_config(config, SFTConfig)
    callbacks = callbacks_of(callbacks)
    named = {"train": name_of(train_dataset), "eval": name_of(eval_dataset)}
    run = begin(model, config, peft_config, tokenizer, callbacks, named)
    datasets, eval_rows = read_datasets(train_dataset, config), evaluation_rows(eval_dataset, config, read_rows)
    examples, sizes, dropped = [], [], 0
    for name, rows in datasets.items():
        found, too_many = tokenize_examples(rows, run.tokenizer, config, name=name)
        examples, sizes, dropped = examples + found, [*sizes, len(found)], dropped + too_many
    if config.dataset_weights and 0 in shares_of(len(examples), config.dataset_weights):
        raise InputError(
            f"dataset_weights={config.dataset_weights} leaves a dataset without an example of {len(examples)}; raise "
            "its weight, or leave it out"
        )
    eval_examples, eval_dropped = [], 0
    if eval_rows is not None:
        eval_examples, eval_dropped = tokenize_examples(eval_rows, run.tokenizer, config, name="eval_dataset")
    unseen = [*dict.fromkeys(column for rows in datasets.values() for column in unseen_columns(rows))]
    all_ids = [one.ids for one in examples + eval_examples]
    run.notes.extend(
        filter(None, [too_long(run.model, all_ids, config, "the longest example has", "lower max_length")])
    )
    run.notes.extend(left_out(dropped, eval_dropped, "example", f"more than {config.max_length} tokens"))
    data = {"rows": [list(asdict(one).values()) for one in examples]} | ({"sizes": sizes} if len(sizes) > 1 else {})
    empty = Counter()
    for rows in datasets.values():
        empty.update(empty_texts(rows, form_of(rows.column_names) or ()))
    run = replace(
        settled(run, data, max(map(len, all_ids))), num_dropped=dropped, unseen=unseen, empty=empty,
        has_joined_words=any(run_together(rows, "completion") for rows in datasets.values()),
    )  # fmt: skip
    return ExampleInputs(
        **vars(run), eval_examples=eval_examples,
        examples=Examples(examples, run.config, sizes=sizes, weights=config.dataset_weights),
    )  # fmt: skip


def read_datasets(given: Any, config: SFTConfig) -> dict[str, Dataset]:
    """The rows of a dataset, or of each of several in a list, by what messages call them.

    Raises:
        InputError: one cannot be read, or there are not as many weights as datasets.
    """
    several = isinstance(given, list) and bool(given) and not any(isinstance(one, Mapping) for one in given)
    if several and len(given) == 1:
        given, several = given[0], False
    num_weights = len(config.dataset_weights or [])
    if num_weights and num_weights != (len(given) if several else 1):
        raise InputError(
            f"dataset_weights has {counted(num_weights, 'weight')} for "
            f"{counted(len(given) if several else 1, 'dataset')}; give one for each"
        )
    if not several:
        return {"train_dataset": read_rows(given, config)}
    found = {}
    for number, one in enumerate(given, 1):
        name = f"train_dataset {number}"
        try:
            found[name] = read_rows(one, config)
        except InputError as error:
            raise InputError(f"{name} of {len(given)}: {error}") from error
    return found
