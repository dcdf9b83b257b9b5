"""The methods that a run's settings ask for, in words, each with where it was published."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ARXIV = "https://arxiv.org/abs/"


class Method(NamedTuple):
    """A method that a run used."""

    text: str  # a sentence without its full stop
    source: str = ""  # address of where it was published, if it was
    tag: str = ""  # its name on the hub, of what a run is foremost


GRPO = Method(
    "GRPO: each prompt is completed several times, and a reward is compared with its group's",
    f"{ARXIV}2402.03300",
    "grpo",
)
PPO = Method("PPO: a critic says at each token what is to be expected", f"{ARXIV}1707.06347", "ppo")
SFT = Method("supervised fine-tuning: the likelihood of examples is raised", tag="sft")
REWARD = Method(
    "a reward model: Bradley and Terry's likelihood that the better text of a pair has the higher score",
    f"{ARXIV}2203.02155",
    "reward-model",
)
DISTILLATION = Method(
    "on-policy distillation: a teacher judges every token that the policy samples",
    "https://thinkingmachines.ai/blog/on-policy-distillation",
    "distillation",
)
LORA = Method(
    "LoRA: the base is frozen, and low-rank adapters beside its linear layers are trained", f"{ARXIV}2106.09685"
)
QLORA = Method("QLoRA: while it was trained, the base was held in 4 bits (NF4)", f"{ARXIV}2305.14314")
# By the setting that asks for it, and its value.
LOSSES = {
    "dapo": Method("DAPO's loss: every token of a step weighs the same", f"{ARXIV}2503.14476"),
    "dr_grpo": Method("Dr. GRPO's loss: without a bias by length", f"{ARXIV}2503.20783"),
    "bnpo": Method("the loss that TRL calls bnpo: a mean over the tokens of a mini-batch"),
    "luspo": Method("LUSPO's loss: a completion weighs as long as it is", f"{ARXIV}2602.05261"),
    "cispo": Method("CISPO's loss: the ratio is bounded, and no token loses its gradient", f"{ARXIV}2506.13585"),
    "sapo": Method("SAPO's loss: a smooth gate in the place of the clip", f"{ARXIV}2511.20347"),
    "vespo": Method("VESPO's loss", f"{ARXIV}2602.10693"),
    "gmpo": Method("GMPO's loss: the geometric mean of a completion's ratios", f"{ARXIV}2507.20673"),
    "dft": Method("DFT's loss: the likelihood of a token weighs as much as the token is likely", f"{ARXIV}2508.05629"),
}
GSPO = Method("GSPO: one ratio of new to old policy for a completion", f"{ARXIV}2507.18071")
ESTIMATORS = {
    "rloo": Method("RLOO: a reward is compared with the mean of the others of its group", f"{ARXIV}2402.14740"),
    "reinforce_plus_plus": Method("REINFORCE++: a reward is compared with the batch's", f"{ARXIV}2501.03262"),
    "reinforce_plus_plus_baseline": Method(
        "REINFORCE++ with a baseline: a reward is compared with its group's mean, and scaled in the batch",
        f"{ARXIV}2501.03262",
    ),
    "gae": Method("GAE: an advantage for each token, from its reward and the critic's values", f"{ARXIV}1506.02438"),
}
GDPO = Method("GDPO: each reward is compared by itself before they are summed", f"{ARXIV}2601.05242")
DYNAMIC = Method("dynamic sampling: groups whose rewards are all alike are replaced", f"{ARXIV}2503.14476")
DUAL_CLIP = Method("the dual clip of the ratio", f"{ARXIV}1912.09729")


def methods_of(kind: str, settings: Mapping[str, Any]) -> list[Method]:
    """The methods of a run, the foremost first.

    `kind` is grpo, sft or reward, and `settings` are those of the configuration by their names; one that lacks is taken
    for its default.
    """
    loss = LOSSES.get(str(settings.get("loss_type")))
    found = {"grpo": _of_rewards, "sft": lambda _: [SFT], "reward": lambda _: [REWARD]}[kind](settings)
    return [*found, *([loss] if loss else []), LORA, *([QLORA] if settings.get("load_in_4bit", True) else [])]


def _of_rewards(settings: Mapping[str, Any]) -> list[Method]:
    found = [PPO if settings.get("adv_estimator") == "gae" else GRPO]
    if settings.get("teacher") is not None:
        found = [DISTILLATION]
    estimator = ESTIMATORS.get(str(settings.get("adv_estimator")))
    asked = [
        (settings.get("importance_sampling_level", "token") != "token", GSPO),
        (settings.get("multi_objective_aggregation") == "normalize_then_sum", GDPO),
        (settings.get("dynamic_sampling_rounds"), DYNAMIC),
        (settings.get("delta"), DUAL_CLIP),
    ]
    return [*found, *([estimator] if estimator else []), *(method for is_asked, method in asked if is_asked)]
