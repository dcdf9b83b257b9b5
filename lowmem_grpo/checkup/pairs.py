"""The doctor's look at pairs and settings before the first step of a reward model's training."""

from lowmem_grpo.checkup.prompts import having_looked, implausible_rate, warmup_too_long
from lowmem_grpo.data.pairs import Pair
from lowmem_grpo.doctor.doctor import Doctor, Finding
from lowmem_grpo.doctor.symptoms import symptoms_of_examples
from lowmem_grpo.inputs.pairs import PairInputs

MOST_LONGER = 0.9  # of the pairs; in UltraFeedback and HH-RLHF the better text is the longer one in 55 to 65 %
ENOUGH = 16  # pairs of which a share says something


def doctor_of_pairs(inputs: PairInputs) -> Doctor:
    """The doctor of a reward model's training, who has looked at its inputs; no weights are read.

    Raises:
        UnhealthyRunError: doctor="stop", and something was found.
    """
    doctor = Doctor(inputs.config, inputs.total_steps, look_for=symptoms_of_examples)
    return having_looked(doctor, inputs, findings)


def findings(inputs: PairInputs) -> list[Finding]:
    """List what keeps a run with these inputs from learning the right thing; no weights are read."""
    found = {
        "evaluated_on_training_pairs": evaluated_on_training_pairs(inputs),
        "pairs_of_one_text": pairs_of_one_text(inputs.pairs.all),
        "pairs_in_both_orders": pairs_in_both_orders(inputs.pairs.all),
        "length_tells_the_better": length_tells_the_better(inputs.pairs.all),
        "most_pairs_dropped": most_pairs_dropped(inputs),
        "implausible_learning_rate": implausible_rate(inputs.config.learning_rate),
        "warmup_beyond_the_end": warmup_too_long(inputs.config.warmup_steps, inputs.total_steps),
    }
    return [Finding(name, text) for name, text in found.items() if text]


def evaluated_on_training_pairs(inputs: PairInputs) -> str | None:
    """Say how many evaluation pairs are trained on."""
    trained = {(tuple(pair.chosen), tuple(pair.rejected)) for pair in inputs.pairs.all}
    shared = sum((tuple(pair.chosen), tuple(pair.rejected)) in trained for pair in inputs.eval_pairs)
    if not shared:
        return None
    return (
        f"{shared} of {len(inputs.eval_pairs)} evaluation pairs are training pairs too, and measure what was learnt by "
        "heart; take them out of one of the two"
    )


def pairs_of_one_text(pairs: list[Pair]) -> str | None:
    """Say how many pairs have the same text as better and as worse, which teaches nothing."""
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    return f"{same} of {len(pairs)} pairs have one text as chosen and as rejected; leave them out" if same else None


def pairs_in_both_orders(pairs: list[Pair]) -> str | None:
    """Say how many pairs are there the other way round, too."""
    known = {(tuple(pair.chosen), tuple(pair.rejected)) for pair in pairs if pair.chosen != pair.rejected}
    both = sum((rejected, chosen) in known for chosen, rejected in known) // 2
    if not both:
        return None
    return f"{both} pairs are there in both orders, so that neither text is the better one; keep one of each"


def length_tells_the_better(pairs: list[Pair]) -> str | None:
    """Say that nearly always the longer, or the shorter, text is the better one."""
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
    kept, dropped = len(inputs.pairs.all), inputs.num_dropped
    if dropped <= kept:
        return None
    return (
        f"only {kept} of {kept + dropped} pairs have texts of at most max_length={inputs.config.max_length} tokens, "
        "and the others are left out; raise it"
    )
