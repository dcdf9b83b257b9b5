"""The preview of supervised training: one example as the model gets it, and which of its tokens are learnt."""

from typing import Any

from lowmem_grpo.data.examples import Example
from lowmem_grpo.distributed import by_main
from lowmem_grpo.inputs.examples import ExampleInputs
from lowmem_grpo.preview.show import show_and_write

LEARNT = "[[%s]]"


@by_main
def show_example(inputs: ExampleInputs) -> None:
    """Print the first example on standard error, and write it to output_dir/data_preview.txt."""
    text = as_text(inputs.examples.all[0], len(inputs.examples.all), inputs.tokenizer)
    show_and_write(inputs, text if len(inputs.examples.sizes) < 2 else f"{datasets_as_text(inputs)}\n{text}")


def datasets_as_text(inputs: ExampleInputs) -> str:
    """A line for each dataset: its examples, and how often a run goes through them."""
    examples, count = inputs.examples, inputs.total_steps * inputs.config.examples_per_step
    return "\n".join(
        f"train_dataset {number}: {size} examples, each seen {epochs:.3g} times in the run"
        for number, (size, epochs) in enumerate(zip(examples.sizes, examples.epochs_of(count), strict=True), 1)
    )


def as_text(example: Example, count: int, tokenizer: Any) -> str:
    """An example for a person, what is learnt of it in double brackets."""
    learnt = sum(example.counted)
    lines = marked(example, tokenizer).split("\n")
    return "\n".join([
        f"data preview: example 1 of {count} as the model gets it, {learnt} of {len(example.ids)} tokens are learnt",
        *(f"    {line}" for line in lines),
    ])  # fmt: skip


def marked(example: Example, tokenizer: Any) -> str:
    """The text of an example with each run of learnt tokens in double brackets."""
    runs: list[tuple[bool, list[int]]] = []
    for token_id, counted in zip(example.ids, example.counted, strict=True):
        if not runs or runs[-1][0] != counted:
            runs.append((counted, []))
        runs[-1][1].append(token_id)
    texts = [(counted, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for counted, ids in runs]
    return "".join(LEARNT % text if counted else text for counted, text in texts)
