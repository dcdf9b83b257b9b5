"""Symptoms: what the last steps of a run show where it does not learn what it should.

Each is a function of a run's course that returns a sentence with cause and remedy, or None. The sentence begins with
what was seen. A number that a step did not measure is None, and shows nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.losses import LOSS_TYPES, OWN_LOSS

Metrics = Mapping[str, float | None]  # of a step, what is not finite as None

NUM_FIRST = 5  # steps at the start that later ones are compared with
ENOUGH = 3  # of the last steps that measured a metric: no entropy is known where no group has a difference
SHORTEST = 5  # steps of a run in which a symptom that takes longer is looked for all the same, at its end
READ = {
    "step", "reward", "reward_std", "frac_reward_zero_std", "frac_tokens_skipped", "entropy", "kl", "grad_norm",
    "skipped_steps", "completions/clipped_ratio", "completions/mean_length", "clip_ratio/region_mean", "ratio/min",
    "ratio/max", "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean",
    "dynamic_sampling/rounds", "dynamic_sampling/dropped_groups", "replay/groups", "loss", "value/explained_variance",
    "teacher_kl",
}  # fmt: skip
SKIPPED = "skipped_so_far"  # optimizer steps of the run that changed no weight

MANY = 0.5  # of the completions at the start
MOST_RISEN = 1.0  # nats a token of a loss, by which steps differ less
COLD, HOT = 0.3, 2.0  # temperatures below and above which a completion is nearly certain, or noise
MOST_ALIKE = 0.75  # of the groups, where it is cold: one in four differs by chance
LEAST_FAILURES = 0.1  # of the completions: below, a reward that times out now and then costs little
# Nats a token. At 0.005 the likeliest token has 0.999, so that 1,000 tokens are sampled like greedily; the demo, which
# solves its task, ends at 0.02.
LEAST_ENTROPY = 0.005
MOST_ENTROPY = 4.0  # nats a token: as of a choice among 55 equal ones, where a text by a trained model has 0.1 to 2
MOST_KL = 1.0  # nats a token: a hundred tokens are e^100 times as likely as under the reference; the demo has 0.2
# Nats a token: the teacher finds a token 20 times less likely than the policy that wrote it. A larger model of one
# family begins at 0.1 to 1, and the demo's, after reinforcement learning, at 0.3.
MOST_TEACHER_KL = 3.0
MOST_CLIPPED = 0.3  # of the tokens; 0.001 to 0.1 is usual, and 0.15 of sequences (https://arxiv.org/abs/2507.18071)
FAR = 2.0  # or its inverse: a token's ratio of new to old policy where nothing has moved, which is 1 but for rounding
MOST_DIFFERENCE = 0.1  # nats a token between sampler and training; 0.002 to 0.02 in bfloat16
LEAST_WEIGHT = 0.5  # the mean importance weight: half of what was sampled is masked
LEAST_EXPLAINED = -1.0  # of the returns' variance: such values double what a constant would leave of it
MOST_SCALED_DOWN = 100  # times max_grad_norm
# Optimizer steps of a run that may be skipped: one; in fp16 twice the 16 in which the loss scale comes down from 65,536
# to 1, since it grows again, once in 2,000 steps.
MOST_SKIPPED, MOST_SKIPPED_FP16 = 1, 32
PENALTIES = {"repetition_penalty_reward", "soft_overlong_punishment_reward"}  # 0 is the most that they give


@dataclass(frozen=True)
class Course:
    """The course of a run, as far as symptoms read it."""

    config: Any  # the training's
    rewards: list[str]  # the names of the reward functions
    first: list[Metrics]  # the run's first steps
    last: list[Metrics]  # the newest steps, oldest first; a symptom gets as many as it asks for

    def after(self, metrics: Mapping[str, float]) -> "Course":
        """The course with one more step."""
        step: dict[str, float | None] = {
            name: value if math.isfinite(value) else None
            for name, value in metrics.items()
            if name in READ or name.startswith("rewards/")
        }
        before = self.last[-1].get(SKIPPED) if self.last else 0
        step[SKIPPED] = (before or 0) + (step.get("skipped_steps") or 0)
        first = [*self.first, step] if len(self.first) < NUM_FIRST else self.first
        return replace(self, first=first, last=[*self.last, step][-NUM_LAST:])

    def each(self, name: str, holds: Callable[[float], bool]) -> bool:
        """True where a condition holds of a metric in each of the last steps that measured it, and enough did."""
        known = _known(self.last, name)
        return len(known) >= ENOUGH and all(map(holds, known))

    def never(self, name: str) -> bool:
        """True where a metric was a mean of nothing in every one of the last steps."""
        return all(name in step and step[name] is None for step in self.last)

    def values(self, name: str) -> list[float | None]:
        """A metric in the last steps; None where a step did not measure it."""
        return [step.get(name) for step in self.last]

    def mean(self, name: str) -> float:
        """The mean of a metric over those of the last steps that measured it; NaN where none did."""
        return _mean(self.last, name)

    @property
    def steps(self) -> str:
        """The last steps in words, for a sentence."""
        return f"the last {len(self.last)} steps"

    @property
    def constant_reward(self) -> float | None:
        """The reward of every completion of the last steps, where that is one number."""
        return _constant(self, "reward", "reward_std")


def _known(steps: list[Metrics], name: str) -> list[float]:
    return [value for step in steps if (value := step.get(name)) is not None]


def _mean(steps: list[Metrics], name: str) -> float:
    known = _known(steps, name)
    return sum(known) / len(known) if known else math.nan


def _least(steps: list[Metrics], name: str) -> float:
    return min(_known(steps, name), default=math.nan)


def _constant(course: Course, mean: str, deviation: str) -> float | None:
    """The number that all means are, where no step had a deviation; None where there is no such number."""
    value = _least(course.last, mean)
    same = course.each(mean, lambda one: math.isclose(one, value, rel_tol=1e-6))
    return value if same and not any(course.values(deviation)) else None


def all_truncated(course: Course) -> str | None:
    # Where most ended by themselves in a step at the start, they have grown: lengths_at_limit.
    before, config = _least(course.first, "completions/clipped_ratio"), course.config
    if before <= MANY or not course.each("completions/clipped_ratio", lambda share: share == 1):
        return None
    masked = ", and mask_truncated_completions leaves all out of the loss" if config.mask_truncated_completions else ""
    return (
        f"every completion of {course.steps} was cut off at max_completion_length={config.max_completion_length}"
        f"{masked}: either that is too little, or the model never says the token that ends its turn; raise it, or look "
        "at completions with `lowmem-grpo eval --show 5`"
    )


def lengths_at_limit(course: Course) -> str | None:
    before = _least(course.first, "completions/clipped_ratio")
    if not (before <= MANY and course.each("completions/clipped_ratio", lambda share: share >= 0.9)):
        return None
    now = course.mean("completions/clipped_ratio")
    return (
        f"completions have grown to the limit: in {course.steps} {now:.0%} were cut off at max_completion_length="
        f"{course.config.max_completion_length}, and in one at the start {before:.0%}; look for repetitions with "
        "log_completions, raise the limit, or reward what is short (get_soft_overlong_punishment)"
    )


def lengths_collapsed(course: Course) -> str | None:
    before, now = _mean(course.first, "completions/mean_length"), course.mean("completions/mean_length")
    if course.config.max_completion_length <= 2:
        return None
    if course.each("completions/mean_length", lambda length: length <= 1.5):
        return (
            f"completions of {course.steps} have {now:.1f} tokens on average, since the model ends its turn at once: "
            "the chat template may lack a generation prompt, or an empty completion is rewarded; see with "
            "`lowmem-grpo data` what the model gets, and what an empty completion gets"
        )
    if now <= before / 10 and course.mean("reward") <= _mean(course.first, "reward"):
        return (
            f"completions have shrunk from {before:.0f} tokens at the start to {now:.1f} in {course.steps}, and the "
            "reward has not risen; look at them with log_completions, and lower learning_rate or set beta"
        )
    return None


def no_reward(course: Course) -> str | None:
    if not course.never("reward"):
        return None
    failed = [name for name in course.rewards if any(course.values(f"rewards/{name}/failures"))]
    cause = f"{_joined(failed)} failed" if failed else f"{_joined(course.rewards)} returned None (does not apply)"
    return (
        f"no completion of {course.steps} has a reward, so that nothing is learned: {cause}; mend that, or the columns "
        "that are read"
    )


def no_difference(course: Course) -> str | None:
    value, config = course.constant_reward, course.config
    least = MOST_ALIKE if config.temperature < COLD else 1
    alike, num_steps = course.mean("frac_reward_zero_std"), len(_known(course.last, "reward"))
    if num_steps < ENOUGH or not alike >= least:  # NaN, where nothing compares
        return None
    if config.has_critic and value is None:  # which compares no group
        return None
    means = [f"{name} {course.mean(f'rewards/{name}/mean'):.3g}" for name in course.rewards]
    if value is None:
        seen = f"the completions of a prompt all had one reward, in every group of {course.steps}"
        cause = "raise num_generations, or set dynamic_sampling_rounds, to find prompts that are solved now and then"
    else:
        seen = f"every completion of {course.steps} had the reward {value:.3g}"
        cause = (
            "the task is too hard or too easy for the model, or the reward does not see its answers; see with "
            "`lowmem-grpo data` what a right one gets, and completions with `lowmem-grpo eval --show 5`"
        )
    if config.top_k == 1:
        cause = "top_k=1 makes them alike; leave it out"
    elif config.temperature < COLD:
        seen = f"the completions of a prompt had one reward, in {alike:.0%} of the groups of {course.steps}"
        cause = f"temperature={config.temperature} makes them alike; set it to 1"
    elif config.temperature > HOT:
        cause = f"temperature={config.temperature} makes completions noise; set it to 1"
    return f"{seen} ({_joined(means)} on average), so that nothing is learned: {cause}"


def never_filled(course: Course) -> str | None:
    rounds = course.config.dynamic_sampling_rounds
    used_up = course.each("dynamic_sampling/rounds", lambda used: used == rounds)
    if not rounds or not used_up or not all(_groups_missing(step, course.config) > 0 for step in course.last):
        return None
    missing = sum(_groups_missing(step, course.config) for step in course.last) / len(course.last)
    return (
        f"dynamic sampling used its {rounds} further rounds in each of {course.steps} and still lacked "
        f"{missing:.1f} of {course.config.prompts_per_step} groups with a difference, at a mean reward of "
        f"{course.mean('reward'):.3g}; choose prompts of which the model solves some but not all completions, or set "
        "curriculum_skip"
    )


def _groups_sampled(step: Metrics, config: GRPOConfig) -> float:
    """How many prompts a step sampled completions of."""
    dropped, replayed = step.get("dynamic_sampling/dropped_groups"), step.get("replay/groups")
    return config.prompts_per_step + (dropped or 0) - (replayed or 0)


def _groups_missing(step: Metrics, config: GRPOConfig) -> int:
    """How many of a step's groups have no difference, though dynamic sampling looked for some."""
    dull = step.get("frac_reward_zero_std")
    differ = (1 - (1 if dull is None else dull)) * _groups_sampled(step, config)
    return round(config.prompts_per_step - (step.get("replay/groups") or 0) - differ)


def reward_fell(course: Course) -> str | None:
    before, now = _mean(course.first, "reward"), course.mean("reward")
    spread = _mean(course.first, "reward_std")  # rewards around 0 have no half
    if course.config.curriculum_skip or len(course.first) < NUM_FIRST or not _are_apart(course):
        return None
    least = _least(course.first, "reward")
    if not (course.each("reward", lambda value: value < least) and before - now >= max(abs(before), spread) / 2):
        return None
    return (
        f"the reward has fallen from {before:.3g} at the start to {now:.3g} in {course.steps}; go back to an earlier "
        f"checkpoint, lower learning_rate={course.config.learning_rate}, or set beta"
    )


def _are_apart(course: Course) -> bool:
    """True where the last steps are all later than the first ones."""
    newest_of_first, oldest_of_last = course.first[-1].get("step"), course.last[0].get("step")
    return newest_of_first is not None and oldest_of_last is not None and newest_of_first < oldest_of_last


def entropy_collapse(course: Course) -> str | None:
    if not course.each("entropy", lambda entropy: entropy <= LEAST_ENTROPY):
        return None
    if course.config.temperature < COLD:
        cause = f"temperature={course.config.temperature} leaves no choice; set it to 1"
    else:
        cause = (
            "nothing new is tried any more; unless the task is solved, go back to an earlier checkpoint and lower "
            "learning_rate, or set epsilon_high=0.28 or an entropy_coef"
        )
    return f"the entropy of a token was at most {LEAST_ENTROPY} nats in {course.steps}: {cause}"


def entropy_explosion(course: Course) -> str | None:
    # The least of the first steps, since in these it may have risen already.
    before, now = _least(course.first, "entropy"), course.mean("entropy")
    high = course.each("entropy", lambda entropy: entropy >= MOST_ENTROPY)
    risen = _are_apart(course) and course.each("entropy", lambda entropy: entropy >= max(3 * before, before + 1))
    if not (high or risen):
        return None
    coefficient = ", entropy_coef" if course.config.has_entropy_bonus else ""
    return (
        f"the entropy of a token was {now:.2f} nats in {course.steps}, as of a choice among {math.exp(now):.0f} equal "
        f"tokens ({before:.2f} at the start): completions are turning into noise; lower temperature="
        f"{course.config.temperature}, learning_rate{coefficient}, or see that the model has been trained at all"
    )


def kl_explosion(course: Course) -> str | None:
    if not course.each("kl", lambda kl: kl >= MOST_KL):
        return None
    return (
        f"the KL to the reference was {course.mean('kl'):.2f} nats a token in {course.steps}, where 0.001 to 0.3 is "
        f"usual: the policy has left it; lower learning_rate={course.config.learning_rate}, or raise beta="
        f"{course.config.beta}"
    )


def teacher_far(course: Course) -> str | None:
    if not course.each("teacher_kl", lambda kl: kl > MOST_TEACHER_KL):
        return None
    return (
        f"the teacher finds what the policy writes unlikely: teacher_kl is {course.mean('teacher_kl'):.1f} nats a "
        f"token in {course.steps}; it may know another chat template or another task than the policy's prompts have, "
        "so teach the policy by examples first (`lowmem-grpo sft`), or name another teacher"
    )


def ratio_on_policy(course: Course) -> str | None:
    config = course.config
    above, below = _known(course.last, "ratio/max"), _known(course.last, "ratio/min")
    farthest = [max(most, 1 / max(least, 1e-9)) for most, least in zip(above, below, strict=True)]
    if not _is_on_policy(config) or len(farthest) < ENOUGH or min(farthest) < FAR:
        return None
    dropout = f"set lora_dropout={config.lora_dropout} to 0" if config.lora_dropout else "report it, with the model"
    return (
        f"a token's ratio of new to old policy was off by a factor of {max(farthest):.3g} in {course.steps}, where "
        f"nothing has moved yet and it should be 1: the two are computed differently; {dropout}"
    )


def _is_on_policy(config: GRPOConfig) -> bool:
    """True where each rollout has one update, by the policy that sampled all of it."""
    return config.num_iterations == 1 and config.steps_per_generation == 1 and not config.replay_buffer_size


def tokens_clipped(course: Course) -> str | None:
    if _is_on_policy(course.config) or not course.each("clip_ratio/region_mean", lambda share: share >= MOST_CLIPPED):
        return None
    return (
        f"{course.mean('clip_ratio/region_mean'):.0%} of the tokens were clipped in {course.steps}, which teach "
        "nothing: each update moves too far from the policy that sampled; lower learning_rate, num_iterations or "
        "steps_per_generation, or raise epsilon_high"
    )


def sampling_apart(course: Course) -> str | None:
    name = "sampling/sampling_logp_difference/mean"
    if not course.each(name, lambda difference: difference >= MOST_DIFFERENCE):
        return None
    config = course.config
    cause = "report it, with the model"
    if config.lora_dropout:
        cause = f"lora_dropout={config.lora_dropout} is on in training alone; lower it"
    elif config.rollout_kv == "int8":
        cause = "leave out rollout_kv='int8'"
    return (
        f"sampling and training gave a token log-probabilities {course.mean(name):.2g} nats apart in {course.steps}, "
        f"where 0.02 is much: steps learn from another policy's completions; {cause}"
    )


def weights_masked(course: Course) -> str | None:
    name, config = "sampling/importance_sampling_ratio/mean", course.config
    if sampling_apart(course) or not course.each(name, lambda weight: weight < LEAST_WEIGHT):
        return None
    cause = "lower replay_buffer_size, whose groups an older policy sampled" if config.replay_buffer_size else (
        "set importance_sampling_mode='token_truncate', or leave out what makes sampling differ: top_p, top_k, min_p, "
        "repetition_penalty, lora_dropout"
    )  # fmt: skip
    return (
        f"the importance weights were {course.mean(name):.2g} on average in {course.steps}, so that most of what was "
        f"sampled does not count; {cause}"
    )


def not_finite(course: Course) -> str | None:
    step, config = course.last[-1], course.config
    skipped = step.get(SKIPPED) or 0
    if not step.get("skipped_steps") or skipped <= (MOST_SKIPPED_FP16 if config.fp16 else MOST_SKIPPED):
        return None
    if config.fp16:
        cause = "float16's loss scale, which takes 16, should have settled; lower learning_rate, or try bf16"
    else:
        cause = "their loss or gradient was not finite; mend the cause that was told of the first"
    return f"{skipped} optimizer steps so far have changed no weight: {cause}"


def no_gradient(course: Course) -> str | None:
    # Where no group has a difference or all is masked, a gradient of 0 is right, and other symptoms say so.
    is_dull, weight = {None, 1.0}, "sampling/importance_sampling_ratio/mean"
    differ = [s for s in course.last if s.get("frac_reward_zero_std") not in is_dull and s.get(weight) != 0]
    if not course.each("grad_norm", lambda norm: norm == 0) or len(differ) < 3:
        return None
    cause = f"loss_type={course.config.loss_type!r} does not depend on the log-probabilities; mend it"
    if LOSS_TYPES[course.config.loss_type] is not OWN_LOSS:
        cause = (
            "completions that differ in reward may be the same, of a token or two; look at them with log_completions, "
            "and raise max_completion_length"
        )
    if course.each("frac_tokens_skipped", lambda share: share == 1):
        if all_truncated(course):  # which says so
            return None
        cause = "every completion that differs was cut off and is masked; raise max_completion_length"
    return f"the gradient was 0 in {course.steps}, though rewards differ within groups: {cause}"


def gradient_scaled_down(course: Course) -> str | None:
    limit = MOST_SCALED_DOWN * course.config.max_grad_norm
    if not course.each("grad_norm", lambda norm: norm > limit):
        return None
    return (
        f"the gradient was scaled down more than {MOST_SCALED_DOWN} times in each of {course.steps}, from a norm of "
        f"{course.mean('grad_norm'):.3g} to max_grad_norm={course.config.max_grad_norm}: one step's outlier drowns the "
        "others; raise max_grad_norm, or lower the rewards' scale, beta or entropy_coef"
    )


def critic_misleads(course: Course) -> str | None:
    if not course.each("value/explained_variance", lambda share: share <= LEAST_EXPLAINED):
        return None
    return (
        f"the critic's values explained {course.mean('value/explained_variance'):.1f} of the returns' variance in "
        f"{course.steps}, where a constant explains 0: they are noise in every advantage; set critic_warmup, raise "
        f"critic_learning_rate={course.config.critic_learning_rate:g} where value_loss falls slowly, lower it where "
        "that rises"
    )


def reward_failing(course: Course, name: str) -> str | None:
    failures = sum(step.get(f"rewards/{name}/failures") or 0 for step in course.last)
    asked = course.config.num_generations * sum(_groups_sampled(step, course.config) for step in course.last)
    if course.never("reward") or failures < LEAST_FAILURES * asked:
        return None
    return (
        f"{name} has failed on {failures / asked:.0%} of the completions of {course.steps}, which go without it; mend "
        "it, or raise reward_timeout where it ran out of time"
    )


def reward_missing(course: Course, name: str) -> str | None:
    failed = any(course.values(f"rewards/{name}/failures"))
    if failed or course.never("reward") or not course.never(f"rewards/{name}/mean"):
        return None
    return (
        f"{name} has returned None (does not apply) for every completion of {course.steps}; leave it out, or mend the "
        "columns that it reads"
    )


def reward_constant(course: Course, name: str) -> str | None:
    """Look for a reward that gives all completions one number: not 1, nor one that it has risen to."""
    value = _constant(course, f"rewards/{name}/mean", f"rewards/{name}/std")
    if value is None or name in PENALTIES or course.constant_reward is not None:  # no_difference says so of the sum
        return None
    weights = dict(zip(course.rewards, course.config.reward_weights or [1.0] * len(course.rewards), strict=True))
    if weights[name] == 0 or value == 1 or value > _least(course.first, f"rewards/{name}/mean"):
        return None
    return (
        f"{name} has given {value:g} to every completion of {course.steps}, so that it teaches nothing beside "
        f"{_joined([other for other in course.rewards if other != name])}; unless it is a penalty that none deserves, "
        "see with `lowmem-grpo data` what a right answer gets, or ask for what it looks for in the prompt"
    )


def _joined(names: list[str]) -> str:
    """Names as a list in a sentence."""
    *others, last = names or ["the rewards"]
    return f"{', '.join(others)} and {last}" if others else last


# The number of steps that must all show a symptom. A state that is there at once needs few; whether a reward ever
# differs or applies needs more: in ten steps of 64 completions, one in 640 would be seen.
SYMPTOMS: dict[Callable[[Course], str | None], int] = {
    all_truncated: 3, no_reward: 3, lengths_at_limit: 5, lengths_collapsed: 5, reward_fell: 5, entropy_collapse: 5,
    entropy_explosion: 5, kl_explosion: 5, teacher_far: 5, ratio_on_policy: 5, tokens_clipped: 5, sampling_apart: 5,
    weights_masked: 5, not_finite: 1, critic_misleads: 10, no_difference: 10, never_filled: 10, no_gradient: 10,
    gradient_scaled_down: 10,
}  # fmt: skip
OF_A_REWARD: dict[Callable[[Course, str], str | None], int] = {
    reward_failing: 5, reward_missing: 10, reward_constant: 10
}  # fmt: skip
NUM_LAST = max(*SYMPTOMS.values(), *OF_A_REWARD.values())


def symptoms(course: Course, total_steps: int) -> dict[str, str]:
    """Sentences by the names of the situations that a run shows, a reward's name behind a slash."""
    found = {}
    for symptom, num_steps in SYMPTOMS.items():
        if seen := _seen(course, num_steps, total_steps):
            found[symptom.__name__] = symptom(seen)
    for symptom, num_steps in OF_A_REWARD.items():
        if seen := _seen(course, num_steps, total_steps):
            found |= {f"{symptom.__name__}/{reward}": symptom(seen, reward) for reward in course.rewards}
    return {name: text for name, text in found.items() if text is not None}


def symptoms_of_examples(course: Course, total_steps: int) -> dict[str, str]:
    """Sentences by the names of the situations that a run which imitates examples shows."""
    found = {}
    for symptom, num_steps in {not_finite: 1, loss_rises: 5, gradient_scaled_down: 10}.items():
        if seen := _seen(course, num_steps, total_steps):
            found[symptom.__name__] = symptom(seen)
    return {name: text for name, text in found.items() if text is not None}


def loss_rises(course: Course) -> str | None:
    before, now = _least(course.first, "loss"), course.mean("loss")
    if len(course.first) < NUM_FIRST or not _least(course.last, "loss") > before + MOST_RISEN:
        return None
    return (
        f"the loss has risen from {before:.3g} at the start to {now:.3g} in {course.steps}, which ruins the adapter; "
        f"lower learning_rate={course.config.learning_rate:g}, or set warmup_steps and lr_scheduler_type"
    )


def _seen(course: Course, num_steps: int, total_steps: int) -> Course | None:
    """The course with so many last steps, or None while there are fewer; a short run has them all."""
    num_steps = min(num_steps, max(SHORTEST, total_steps))
    return replace(course, last=course.last[-num_steps:]) if len(course.last) >= num_steps else None
