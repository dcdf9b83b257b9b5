"""The inputs of supervised training, checked before long work: model, examples, folder, and a plan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.examples import Example, Examples, tokenize_examples
from lowmem_grpo.data.order import shares_of
from lowmem_grpo.data.rows import read_rows
from lowmem_grpo.distributed import main_first
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.callbacks import callbacks_of
from lowmem_grpo.inputs.identity import identity_of, refuse_another_run
from lowmem_grpo.inputs.training import (
    RunInputs,
    begin,
    expanded,
    name_of,
    refuse_other_config,
    refuse_without_evaluation,
    tokenizer_of,
)
from lowmem_grpo.model.find import adapter_config, beyond_context, find_model, read_config
from lowmem_grpo.model.load import run_device
from lowmem_grpo.planner.plan import plan_to_fit


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
    callbacks, model = callbacks_of(callbacks), expanded(model)
    output_dir, resume, notes = begin(config)
    datasets = read_datasets(train_dataset, config)
    eval_rows = None if eval_dataset is None else read_rows(eval_dataset, config, name="eval_dataset", split="test")
    refuse_without_evaluation(config, eval_rows)
    find_model(model, config, peft_config)
    device = run_device(config)
    tokenizer = tokenizer_of(tokenizer, model, config)
    examples, sizes, dropped = [], [], 0
    for name, rows in datasets.items():
        found, left_out = tokenize_examples(rows, tokenizer, config, name=name)
        examples, sizes, dropped = examples + found, [*sizes, len(found)], dropped + left_out
    if config.dataset_weights and 0 in shares_of(len(examples), config.dataset_weights):
        raise InputError(
            f"dataset_weights={config.dataset_weights} leaves a dataset without an example of {len(examples)}; raise "
            "its weight, or leave it out"
        )
    eval_examples, eval_dropped = [], 0
    if eval_rows is not None:
        eval_examples, eval_dropped = tokenize_examples(eval_rows, tokenizer, config, name="eval_dataset")
    longest = max(len(one.ids) for one in examples + eval_examples)
    notes += filter(None, [check_examples(model, examples + eval_examples, longest, config)])
    for count, what in ((dropped, "examples"), (eval_dropped, "evaluation examples")):
        notes += [f"{count} {what} have more than {config.max_length} tokens and are left out"] if count else []
    base, adapter, given = read_config(model, config), adapter_config(model, config, peft_config), config
    data = {"rows": [list(asdict(one).values()) for one in examples]} | ({"sizes": sizes} if len(sizes) > 1 else {})
    identity = identity_of(base, adapter, tokenizer, data)
    if resume is not None:
        refuse_another_run(resume, identity)
    plan = None
    if config.vram_budget is not None:
        plan = plan_to_fit(base, config, adapter, longest)
        config = plan.config
    return ExampleInputs(
        model=model, peft_config=peft_config, tokenizer=tokenizer, given=given, config=config, device=device,
        notes=notes, output_dir=output_dir, resume=resume, plan=plan, callbacks=callbacks, num_dropped=dropped,
        identity=identity, datasets={"train": name_of(train_dataset), "eval": name_of(eval_dataset)},
        eval_examples=eval_examples,
        examples=Examples(examples, config, sizes=sizes, weights=config.dataset_weights),
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
            f"dataset_weights has {num_weights} weights for {len(given) if several else 1} datasets; give one for each"
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


def check_examples(model: Any, examples: list[Example], longest: int, config: SFTConfig) -> str | None:
    """Say whether the longest example has more tokens than the model was made for.

    Raises:
        InputError: one has more tokens than the budget, or ids or positions that the model lacks.
    """
    if longest > config.token_budget:
        raise InputError(
            f"the longest example has {longest} tokens, more than token_budget={config.token_budget}; raise it, or "
            "lower max_length"
        )
    largest, num_ids = max(max(one.ids) for one in examples), read_config(model, config).get_text_config().vocab_size
    if largest >= num_ids:
        raise InputError(
            f"the tokenizer makes id {largest}, and the model has {num_ids}; pass the tokenizer of the model"
        )
    return beyond_context(model, config, longest, "the longest example", "lower max_length")
