"""The doctor's look at examples and settings before the first step of a supervised training."""

from lowmem_grpo.checkup.training import OF_ANY, OF_TEXTS, having_looked, learnt_by_heart, mostly_dropped, seen
from lowmem_grpo.data.examples import Example
from lowmem_grpo.doctor.doctor import Doctor, Finding
from lowmem_grpo.doctor.symptoms import symptoms_of_examples
from lowmem_grpo.inputs.examples import ExampleInputs
from lowmem_grpo.model.find import ends_of_model
from lowmem_grpo.model.turn_end import named_ends, with_turn_end

MANY_EPOCHS = 10  # over one dataset: cold starts take 2 to 3 (R1: 2, https://arxiv.org/abs/2501.12948)
END = 4  # tokens at an example's end, among which its end-of-sequence token is: a template may write white space after


def doctor_of_examples(inputs: ExampleInputs) -> Doctor:
    """The doctor of a supervised training, who has looked at its inputs; no weights are read.

    Raises:
        UnhealthyRunError: doctor="stop", and something was found.
    """
    return having_looked(inputs, lambda: findings(inputs), look_for=symptoms_of_examples)


def findings(inputs: ExampleInputs) -> list[Finding]:
    """List what keeps a run with these inputs from learning the right thing; no weights are read."""
    return seen([*SITUATIONS, *OF_TEXTS, *OF_ANY], inputs)


def evaluated_on_training_examples(inputs: ExampleInputs) -> str | None:
    """Say how many evaluation examples are trained on."""
    measured = [tuple(one.ids) for one in inputs.eval_examples]
    return learnt_by_heart("examples", (tuple(one.ids) for one in inputs.examples.all), measured)


def ends_of(inputs: ExampleInputs) -> set[int]:
    """The ids that end a completion: the model's, and that with which the chat template ends a turn."""
    ends = ends_of_model(inputs.model, inputs.config) | named_ends(inputs.tokenizer)
    return with_turn_end(inputs.tokenizer, ends)


def examples_without_an_end(inputs: ExampleInputs) -> str | None:
    """Say how many examples do not teach the model to end."""
    ends, missing = ends_of(inputs), 0
    for one in inputs.examples.all:
        missing += not ends & set(_learnt(one)[-END:])
    if not missing:
        return None
    return (
        f"no end-of-sequence token is learnt from {missing} of {len(inputs.examples.all)} examples, so that the model "
        "may not know when to stop; end them with it, or mend tokenizer.chat_template"
    )


def _learnt(example: Example) -> list[int]:
    return [token_id for token_id, counted in zip(example.ids, example.counted, strict=True) if counted]


def dataset_seen_too_often(inputs: ExampleInputs) -> str | None:
    """Say which dataset its weight repeats until it is learnt by heart."""
    examples, config = inputs.examples, inputs.config
    if config.dataset_weights is None:
        return None
    epochs = examples.epochs_of(inputs.total_steps * config.examples_per_step)
    most = max(epochs)
    if most <= MANY_EPOCHS or most <= 2 * min(epochs):
        return None
    number = epochs.index(most) + 1
    return (
        f"the {examples.sizes[number - 1]} examples of train_dataset {number} are each seen {most:.3g} times, which "
        "learns them by heart; lower its weight in dataset_weights, or the number of steps"
    )


def most_examples_dropped(inputs: ExampleInputs) -> str | None:
    """Say that most of the data is too long for max_length."""
    return mostly_dropped(inputs, "examples", "max_length")


SITUATIONS = (evaluated_on_training_examples, examples_without_an_end, most_examples_dropped, dataset_seen_too_often)
