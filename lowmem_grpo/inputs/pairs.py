"""The inputs of a reward model's training, checked before long work: model, pairs, folder, and a plan."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.data.examples import Examples
from lowmem_grpo.data.pairs import Pair, tokenize_pairs
from lowmem_grpo.data.rows import read_rows
from lowmem_grpo.distributed import main_first
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
from lowmem_grpo.model.policy import Policy


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
    callbacks = callbacks_of(callbacks)
    named = {"train": name_of(train_dataset), "eval": name_of(eval_dataset)}
    run = begin(model, config, peft_config, tokenizer, callbacks, named)
    rows, eval_rows = read_rows(train_dataset, config), evaluation_rows(eval_dataset, config, read_rows)
    pairs, dropped = tokenize_pairs(rows, run.tokenizer, config)
    eval_pairs, eval_dropped = [], 0
    if eval_rows is not None:
        eval_pairs, eval_dropped = tokenize_pairs(eval_rows, run.tokenizer, config, name="eval_dataset")
    texts = [text for pair in pairs + eval_pairs for text in pair.texts]
    has = "the longest text and the token that is packed after it have"
    run.notes.extend(filter(None, [too_long(run.model, texts, config, has, "lower max_length", added=1)]))
    run.notes.extend(left_out(dropped, eval_dropped, "pair", f"a text of more than {config.max_length} tokens"))
    data = {"pairs": [list(asdict(pair).values()) for pair in pairs]}
    columns = [column for column in ("prompt", "chosen", "rejected") if column in rows.column_names]
    run = replace(
        settled(run, data, max(map(len, texts))), num_dropped=dropped, unseen=unseen_columns(rows),
        empty=empty_texts(rows, columns), has_joined_words=run_together(rows, "chosen"),
    )  # fmt: skip
    return PairInputs(
        **vars(run),
        pairs=Examples(pairs, run.config),
        eval_pairs=eval_pairs,
    )
