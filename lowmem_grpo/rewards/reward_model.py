"""A sequence-classification model as a reward function."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from lowmem_grpo.data.text import ended, part_of, refuse_part, text_ids
from lowmem_grpo.errors import InputError
from lowmem_grpo.lookup import has_score_head, is_adapter, look_up_model
from lowmem_grpo.paths import expanded
from lowmem_grpo.rewards.rows import in_place, of_each, sound


def get_model_reward(
    model: str | PreTrainedModel, tokenizer: Any = None, token_budget: int = 16384, device: str | None = None,
    part: str = "all",
) -> Callable:  # fmt: skip
    """A reward model's logit for a prompt with its completion, a chat in its own chat template.

    `model` is a hub id, a folder, or a loaded model with one label. It stays in memory (device: the GPU where there is
    one, a loaded model's own), which no plan of the run counts. token_budget: most tokens of a batch, padding included.
    A text longer than the model's positions keeps its end. part: "answer" scores what follows the last `</think>`.

    Raises:
        InputError: no such model, one without a trained head, or one of several labels.
    """
    refuse_part(part)
    model, tokenizer = expanded(model), expanded(tokenizer)
    name = model if isinstance(model, str) else model.config._name_or_path
    scorer: Any = _load(model) if isinstance(model, str) else model
    if device or isinstance(model, str):
        scorer = scorer.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if scorer.config.num_labels != 1:
        raise InputError(f"reward model {name!r} has {scorer.config.num_labels} labels; give one with a single score")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _load_tokenizer(tokenizer or name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = scorer.config.get_text_config()
    settings.pad_token_id = tokenizer.pad_token_id
    longest = getattr(settings, "max_position_embeddings", None) or token_budget
    scorer.eval()

    learnt_from_pairs = isinstance(model, str) and has_score_head(model)

    def ids_of(prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
        said = part_of(completion, part)
        if learnt_from_pairs:
            return ids_as_in_a_pair(tokenizer, prompt, said)[-longest:]
        return tokenizer(whole_text(tokenizer, prompt, said), add_special_tokens=False)["input_ids"][-longest:]

    def reward(prompts: list, completions: list, **kwargs) -> list[float | Exception]:
        if not tokenizer.chat_template and not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"reward model {name!r} has no chat template, and prompts are chats; give them as texts")
        texts = of_each(ids_of, prompts, completions)
        rows = sound(texts)
        scores = [0.0] * len(rows)
        for batch in _batches([*map(len, rows)], token_budget):
            for place, score in zip(batch, _logits(scorer, [rows[place] for place in batch]).tolist(), strict=True):
                scores[place] = score
        return in_place(scores, texts)

    reward.__name__ = Path(name).name or type(scorer).__name__
    vars(reward).update(scorer=scorer, tokenizer=tokenizer, part=part)  # by which a resumed run knows them again
    return reward


def _load(name: str) -> PreTrainedModel:
    if is_adapter(name) and not has_score_head(name):
        raise InputError(
            f"adapter {name!r} writes texts and scores none; give one that `lowmem-grpo reward` has trained"
        )
    look_up_model(name, what="reward model")
    try:
        if is_adapter(name):
            return AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype="auto")
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype="auto", output_loading_info=True
        )
    except (pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            f"the weights of reward model {name!r} hold more than tensors, or are cut short, and reading them could "
            "run code; take a copy in safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        words = " ".join(str(error).split())
        raise InputError(
            f"{name!r} is no built-in reward, no module.function and no reward model that loads: {words:.300}"
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # and `report` is of the adapter, not of the head
        raise InputError(f"{name!r} is an adapter on the hub; download it, and give its folder")
    if report["missing_keys"]:
        raise InputError(
            f"{name!r} has no trained reward head ({', '.join(sorted(report['missing_keys'])[:3])} is missing); "
            "give a model that was trained for sequence classification"
        )
    return model


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"reward model {name!r} has no tokenizer; pass get_model_reward(model, tokenizer=...)"
        ) from error


def whole_text(tokenizer: Any, prompt: str | list[dict], completion: str | list[dict]) -> str:
    """A prompt with its completion as one text, a chat by the tokenizer's template."""
    if isinstance(prompt, str):
        return prompt + str(completion)
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def ids_as_in_a_pair(tokenizer: Any, prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
    """Ids of a prompt with its completion, as a reward adapter learns a pair's texts: a text with its end."""
    text = whole_text(tokenizer, prompt, completion)
    if isinstance(prompt, str):
        return text_ids(tokenizer, ended(tokenizer, text))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of at most token_budget tokens, padding included, the longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """The model's logits (B,) fp32, of rows padded on the right as TRL pads them.

    An adapter has learnt to score a text's last token, and many a tokenizer pads with that: its rows have another pad.
    """
    settings = model.config.get_text_config()
    pad = kept = settings.pad_token_id
    if isinstance(model, PeftModel):
        ends = {row[-1] for row in ids if row}
        pad = next(token_id for token_id in itertools.count() if token_id not in ends)
    width = max(1, *map(len, ids))
    rows = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=model.device)
    try:
        settings.pad_token_id = pad  # by which the model finds each text's last token
        return model(input_ids=rows, attention_mask=mask).logits[:, 0].float()
    finally:
        settings.pad_token_id = kept  # a resumed run knows the model by it
