"""A reward adapter on the policy's own base as a reward function: no second model in memory."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.config.fields import LARGEST
from lowmem_grpo.data.text import part_of, refuse_part
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.lookup import has_score_head
from lowmem_grpo.model.adapter_folder import read_adapter_config, read_weights
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.score_head import RANGE, config_without_head, read_range, without_head
from lowmem_grpo.model.turn_end import after_the_end
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.paths import expanded
from lowmem_grpo.rewards.reward_model import get_model_reward, ids_as_in_a_pair
from lowmem_grpo.rewards.rows import in_place, of_each, sound

OF_A_RUN = ("adapter", "best")  # folders in a run's output_dir, which has the better name


def get_adapter_reward(
    adapter: str, normalize: bool = False, reward_range: list[float] | None = None, missing_eos_penalty: float = 0.0,
    part: str = "all", token_budget: int = 16384,
) -> "AdapterReward":  # fmt: skip
    """The score that a reward adapter, as `lowmem-grpo reward` trains one, gives a prompt with its completion.

    It is worn on the policy's own base for the time of scoring, and sees the very ids that were sampled. One of another
    base is loaded beside the policy, as get_model_reward() does.

    Args:
        adapter: its folder, as rm/adapter.
        normalize: take from a score the mean over training pairs, and divide by their deviation.
        reward_range: least and largest reward, after that, such as [-10, 10].
        missing_eos_penalty: what is taken from the reward of a completion that no end-of-sequence token ends.
        part: "answer" scores what follows the last `</think>`, rendered and tokenized anew.
        token_budget: most tokens that are computed at once, padding included.

    Raises:
        InputError: there is no such adapter, or it lacks what is asked for.
    """
    refuse_part(part)
    if not isinstance(adapter, str | Path):
        raise InputError(f"adapter={shown(adapter)} is no folder; give that of a reward adapter, such as 'rm/adapter'")
    if not isinstance(normalize, bool):
        raise InputError(f"normalize={shown(normalize)} is not True or False; give one of the two")
    if reward_range is not None:
        ends = reward_range if isinstance(reward_range, list | tuple) else []
        if not (len(ends) == 2 and all(map(_is_number, ends)) and ends[0] < ends[1]):
            raise InputError(
                f"reward_range={shown(reward_range)} is not the least and the largest reward, such as [-10, 10]"
            )
    if not _is_number(missing_eos_penalty) or missing_eos_penalty < 0:
        raise InputError(f"missing_eos_penalty={shown(missing_eos_penalty)} is no number of 0 or more, such as 1.0")
    if type(token_budget) is not int or token_budget < 1:
        raise InputError(f"token_budget={shown(token_budget)} is no whole number of tokens; leave it at 16384")
    folder = expanded(adapter)
    return AdapterReward(folder, normalize, reward_range, missing_eos_penalty, part, token_budget)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


class AdapterReward:
    """A reward function that train() gives the policy, by bind().

    Attributes:
        base: the name or folder of the model that it is of.
        config: of the adapter, by PEFT, without its score head.
        reads_prompt_ids: True: the runner gives it the prompts' ids, too.
    """

    reads_prompt_ids = True

    def __init__(
        self, folder: str, normalize: bool, reward_range: list[float] | None, missing_eos_penalty: float, part: str,
        token_budget: int,
    ):  # fmt: skip
        if not has_score_head(folder):
            raise InputError(f"{folder!r} is no reward adapter; train one with `lowmem-grpo reward`")
        config = read_adapter_config(folder)
        self.folder, self.base = Path(folder), Path(str(config.base_model_name_or_path))
        self.config = config_without_head(config)
        weights, score = without_head(read_weights(folder))
        if score is None:
            raise InputError(f"the reward adapter in {folder!r} has no score head; train it with `lowmem-grpo reward`")
        self.lowest, self.highest = map(float, reward_range or (-torch.inf, torch.inf))
        self.mean, self.deviation = 0.0, 1.0
        if normalize:
            known = read_range(self.folder)
            if known is None:
                raise InputError(
                    f"{folder!r} has no {RANGE} to normalize by, which is in a finished run's adapter/ and not in its "
                    "best/; finish the run, with load_best_model_at_end for its best, or leave normalize out"
                )
            self.mean, self.deviation = known
        self.missing_eos_penalty, self.part = missing_eos_penalty, part
        name = Path(folder).absolute()
        self.__name__ = name.parent.name if name.name in OF_A_RUN and name.parent.name else name.name
        values = [*weights.values(), score]
        as_bytes = [one.contiguous().view(torch.uint8).numpy().tobytes() for one in values]  # numpy has no bfloat16
        self.num_parameters = sum(one.numel() for one in values)
        weights_sha256 = hashlib.sha256(b"".join(as_bytes)).hexdigest()
        self.budget = TokenBudget(token_budget)
        # What decides a reward, by which a resumed run knows it again. What bind() sets is none of it.
        self.settings = {
            "weights": weights_sha256, "mean": self.mean, "deviation": self.deviation, "lowest": self.lowest,
            "highest": self.highest, "missing_eos_penalty": missing_eos_penalty, "part": part,
        }  # fmt: skip
        self.policy: Any = None
        self.worn = ""  # the name of the adapter on the policy's base
        self.after: dict[int, list[int]] = {}  # ids that the template writes after an end, by that
        self.model: Any = None  # the reward of a model of its own, where the base is another one

    def is_of(self, base: str) -> bool:
        """Tell whether the adapter is one of the model of this name or folder."""
        return os.path.realpath(self.base) == os.path.realpath(base)

    def bind(self, policy: Any) -> str:
        """Put the adapter on the policy's base, or load its own base where that is another; says which.

        Raises:
            InputError: the adapter does not fit the base that it names.
        """
        self.policy, self.model, self.after = policy, None, {}
        if not self.is_of(policy.base.name_or_path):
            self.model = get_model_reward(
                str(self.folder), token_budget=self.budget.num_tokens, device=str(policy.device), part=self.part
            )
            return (
                f"{self.__name__} is an adapter of {self.base}, and the policy's base is {policy.base.name_or_path}: "
                "it has a model of its own in memory, which no plan counts"
            )
        self.worn = next(name for name in map("reward{}".format, range(999)) if name not in policy.model.peft_config)
        policy.add_from(self.worn, str(self.folder))
        return f"{self.__name__} is worn on the policy's own base: no second model is in memory"

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]],
        prompt_ids: list[list[int]] | None = None, **kwargs: Any,
    ) -> list:  # fmt: skip
        if self.policy is None or prompt_ids is None:  # tried out before there is a model
            return [None] * len(completions)
        if self.model is not None:
            scores = self.model(prompts=prompts, completions=completions)
        elif self.part == "all":
            both = zip(prompts, completion_ids, strict=True)
            texts = [ids if isinstance(prompt, str) else self._with_end(ids) for prompt, ids in both]
            scores = self._scores(prompt_ids, texts).tolist()
        else:
            rendered = of_each(self._rendered, prompts, completions)
            known = sound(rendered)
            scores = in_place(self._scores([ids[:1] for ids in known], [ids[1:] for ids in known]).tolist(), rendered)
        if "log_metric" in kwargs:
            self._log_length_correlation(scores, completion_ids, kwargs["log_metric"])
        ends = set(self.policy.eos_token_ids)
        return [
            score if isinstance(score, Exception) else self._reward(score, bool(ids) and ids[-1] in ends)
            for score, ids in zip(scores, completion_ids, strict=True)
        ]

    def _log_length_correlation(self, scores: list, completion_ids: list[list[int]], log_metric: Any) -> None:
        """Log the correlation of scores with numbers of tokens: near 1, length is what is paid for."""
        both = zip(scores, map(len, completion_ids), strict=True)
        known = [(score, length) for score, length in both if isinstance(score, float)]
        if len({score for score, _ in known}) > 1 and len({length for _, length in known}) > 1:
            value = torch.corrcoef(torch.tensor(known, dtype=torch.float64).T)[0, 1].item()
            log_metric(f"{self.__name__}/length_correlation", value)

    def _reward(self, score: float, has_end: bool) -> float:
        normal = (score - self.mean) / self.deviation
        return min(max(normal, self.lowest), self.highest) - (0.0 if has_end else self.missing_eos_penalty)

    def _with_end(self, ids: list[int]) -> list[int]:
        """A completion as the template writes it in a chat, with what comes after its end, as a line's end."""
        last = ids[-1] if ids else -1
        if last not in self.after:
            self.after[last] = after_the_end(self.policy.tokenizer, last)
        return [*ids, *self.after[last]]

    def _rendered(self, prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
        return ids_as_in_a_pair(self.policy.tokenizer, prompt, part_of(completion, self.part))

    def _scores(self, prompts: list[list[int]], texts: list[list[int]]) -> Tensor:
        """The score of each text after its prompt, (B,) fp32 on the CPU; a prompt that repeats is computed once."""
        policy, group = self.policy, _group(prompts)

        def compute(token_budget: int) -> Tensor:
            scores = torch.zeros(len(texts), device=policy.device)
            batches = pack(
                prompts[::group], [[*text, policy.pad_token_id] for text in texts], token_budget=token_budget,
                pad_token_id=policy.pad_token_id, device=policy.device, num_generations=group,
                padding_free=policy.packs, last_only=True,
            )  # fmt: skip
            with policy.inference(), policy.wearing(self.worn):
                for batch in batches:
                    scores[batch.sequences] = policy.scores(batch)
            return scores.cpu()

        return self.budget.fit(compute, [len(a) + len(b) + 1 for a, b in zip(prompts, texts, strict=True)])


def _group(prompts: list[list[int]]) -> int:
    """How often each prompt follows itself, where that is the same for all; 1 where it is not."""
    first = next((index for index, ids in enumerate(prompts) if ids != prompts[0]), len(prompts)) or 1
    groups = [prompts[index : index + first] for index in range(0, len(prompts), first)]
    return first if all(len(group) == first and all(ids == group[0] for ids in group) for group in groups) else 1
