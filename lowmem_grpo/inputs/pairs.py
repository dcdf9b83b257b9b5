"""The inputs of a reward model's training, checked before long work: model, pairs, folder, and a plan."""

from dataclasses import asdict, dataclass
from typing import Any

from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.data.examples import Examples
from lowmem_grpo.data.pairs import Pair, tokenize_pairs
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
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.planner.plan import plan_to_fit


@dataclass(frozen=True, kw_only=True)
class PairInputs(RunInputs):
    """The inputs of a run that learns scores from pairs, checked, before any weights are read."""

    given: RewardConfig
    config: RewardConfig
    pairs: Examples[Pair]
    eval_pairs: list[Pair]  # empty where nothing is evaluated

    @property
    def num_rows(self) -> int:
        """How many pairs an epoch has."""
        return len(self.pairs.all)

    @property
    def num_eval_rows(self) -> int:
        """How many pairs are held out to be evaluated on."""
        return len(self.eval_pairs)

    def load_policy(self) -> Policy:
        """The policy, its adapter and its score head drawn by the configuration's seed."""
        policy = super().load_policy()
        policy.add_score_head(policy.adapter, self.config.seed)
        return policy


@main_first
def read_pair_inputs(
    model: Any, train_dataset: Any, eval_dataset: Any, config: RewardConfig, peft_config: Any = None,
    tokenizer: Any = None, callbacks: Any = (),
) -> PairInputs:  # fmt: skip
    """The inputs of train_reward_model(), which documents them.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    refuse_other_config(config, RewardConfig)
    callbacks, model = callbacks_of(callbacks), expanded(model)
    output_dir, resume, notes = begin(config)
    rows = read_rows(train_dataset, config)
    eval_rows = None if eval_dataset is None else read_rows(eval_dataset, config, name="eval_dataset", split="test")
    refuse_without_evaluation(config, eval_rows)
    find_model(model, config, peft_config)
    device = run_device(config)
    tokenizer = tokenizer_of(tokenizer, model, config)
    pairs, dropped = tokenize_pairs(rows, tokenizer, config)
    eval_pairs, eval_dropped = [], 0
    if eval_rows is not None:
        eval_pairs, eval_dropped = tokenize_pairs(eval_rows, tokenizer, config, name="eval_dataset")
    longest = max(len(text) for pair in pairs + eval_pairs for text in pair.texts)
    notes += filter(None, [check_pairs(model, pairs + eval_pairs, longest, config)])
    for count, what in ((dropped, "pairs"), (eval_dropped, "evaluation pairs")):
        note = f"{count} {what} have a text of more than {config.max_length} tokens and are left out"
        notes += [note] if count else []
    base, adapter, given = read_config(model, config), adapter_config(model, config, peft_config), config
    identity = identity_of(base, adapter, tokenizer, {"pairs": [list(asdict(pair).values()) for pair in pairs]})
    if resume is not None:
        refuse_another_run(resume, identity)
    plan = None
    if config.vram_budget is not None:
        plan = plan_to_fit(base, config, adapter, longest)
        config = plan.config
    return PairInputs(
        model=model, peft_config=peft_config, tokenizer=tokenizer, given=given, config=config, device=device,
        notes=notes, output_dir=output_dir, resume=resume, plan=plan, callbacks=callbacks, num_dropped=dropped,
        identity=identity, datasets={"train": name_of(train_dataset), "eval": name_of(eval_dataset)},
        pairs=Examples(pairs, config), eval_pairs=eval_pairs,
    )  # fmt: skip


def check_pairs(model: Any, pairs: list[Pair], longest: int, config: RewardConfig) -> str | None:
    """Say whether the longest text has more tokens than the model was made for.

    Raises:
        InputError: one has more tokens than the budget, or ids or positions that the model lacks.
    """
    if longest >= config.token_budget:  # a token is packed after it
        raise InputError(
            f"the longest text has {longest} tokens, not less than token_budget={config.token_budget}; raise it, or "
            "lower max_length"
        )
    largest = max(max(text) for pair in pairs for text in pair.texts)
    num_ids = read_config(model, config).get_text_config().vocab_size
    if largest >= num_ids:
        raise InputError(
            f"the tokenizer makes id {largest}, and the model has {num_ids}; pass the tokenizer of the model"
        )
    return beyond_context(model, config, longest, "the longest text", "lower max_length")
