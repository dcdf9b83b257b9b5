"""The doctor's look at pairs and settings before the first step of a reward model's training."""

from lowmem_grpo.checkup.training import OF_ANY, OF_TEXTS, having_looked, learnt_by_heart, mostly_dropped, seen
from lowmem_grpo.data.pairs import Pair
from lowmem_grpo.doctor.doctor import Doctor, Finding
from lowmem_grpo.doctor.symptoms import symptoms_of_examples
from lowmem_grpo.errors import counted
from lowmem_grpo.inputs.pairs import PairInputs

MOST_LONGER = 0.9  # of the pairs; in UltraFeedback and HH-RLHF the better text is the longer one in 55 to 65 %
ENOUGH = 16  # pairs of which a share says something


def doctor_of_pairs(inputs: PairInputs) -> Doctor:
    """The doctor of a reward model's training, who has looked at its inputs; no weights are read.

    Raises:
        UnhealthyRunError: doctor="stop", and something was found.
    """
    return having_looked(inputs, lambda: findings(inputs), look_for=symptoms_of_examples)


def findings(inputs: PairInputs) -> list[Finding]:
    """List what keeps a run with these inputs from learning the right thing; no weights are read."""
    return seen([*SITUATIONS, *OF_TEXTS, *OF_ANY], inputs)


def evaluated_on_training_pairs(inputs: PairInputs) -> str | None:
    """Say how many evaluation pairs are trained on."""
    trained, measured = ([_key(pair) for pair in pairs] for pairs in (inputs.pairs.all, inputs.eval_pairs))
    return learnt_by_heart("pairs", trained, measured)


def pairs_of_one_text(inputs: PairInputs) -> str | None:
    """Say how many pairs have the same text as better and as worse, which teaches nothing."""
    pairs = inputs.pairs.all
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    return f"chosen and rejected are one text in {same} of {len(pairs)} pairs; leave these out" if same else None


def pairs_in_both_orders(inputs: PairInputs) -> str | None:
    """Say how many pairs are there the other way round, too."""
    known = {_key(pair) for pair in inputs.pairs.all if pair.chosen != pair.rejected}
    both = sum((rejected, chosen) in known for chosen, rejected in known) // 2
    if not both:
        return None
    pairs = counted(both, "pair is", "pairs are")
    return f"{pairs} there in both orders, so that neither text is the better one; keep one of each"


def length_tells_the_better(inputs: PairInputs) -> str | None:
    """Say that nearly always the longer, or the shorter, text is the better one."""
    pairs = inputs.pairs.all
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    shorter = sum(len(pair.chosen) < len(pair.rejected) for pair in pairs)
    share, word = max((longer / len(pairs), "longer"), (shorter / len(pairs), "shorter"))
    if len(pairs) < ENOUGH or share < MOST_LONGER:
        return None
    return (
        f"in {share:.0%} of the pairs the {word} text is the better one, so that length alone may be learnt, and a "
        "policy would be paid for it; add pairs of like lengths"
    )


def most_pairs_dropped(inputs: PairInputs) -> str | None:
    """Say that most of the data is too long for max_length."""
    return mostly_dropped(inputs, "pairs", "max_length")


def _key(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pair's ids, as sets and mappings take them."""
    return tuple(pair.chosen), tuple(pair.rejected)


SITUATIONS = (
    evaluated_on_training_pairs, pairs_of_one_text, pairs_in_both_orders, length_tells_the_better, most_pairs_dropped,
)  # fmt: skip
