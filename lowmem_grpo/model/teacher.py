"""A run's teacher: found before any weights are read, and worn on the policy's base or loaded beside it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import OWN_BASE, AdapterFields
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.model.adapter_folder import read_adapter_config
from lowmem_grpo.model.find import adapter_config, ends_of_model, find_model, read_config
from lowmem_grpo.model.load import load_policy, load_tokenizer
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.turn_end import named_ends, with_turn_end
from lowmem_grpo.paths import expanded
from lowmem_grpo.warn import warn

ADAPTER = "teacher"  # the name that a teacher's adapter has on the policy's base


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher, before any weights are read."""

    name: str  # "base", an adapter's folder, or a model's folder or hub id
    adapter: PeftConfig | None  # which it wears
    model: PreTrainedConfig | None = None  # its own base; None: the policy's


def find_teacher(model: Any, config: GRPOConfig, *, needs_weights: bool = True) -> FoundTeacher | None:
    """The teacher that a configuration names for a run's model; None where it names none.

    A plan does without the weights of a model's folder.

    Raises:
        InputError: there is no such model or adapter, or it is the policy's own base.
    """
    if config.teacher is None:
        return None
    name = expanded(config.teacher)
    if name == OWN_BASE:
        if config.teacher_system_prompt is None:
            raise InputError(
                "teacher='base' would only hold the policy to its own base, as beta does; set teacher_system_prompt, "
                "name another teacher, or set beta instead"
            )
        return FoundTeacher(name, None)
    try:
        find_model(name, as_teacher(name, config), needs_weights=needs_weights)
    except InputError as error:
        raise InputError(f"the teacher cannot be taken: {error}") from error
    if is_adapter(name):
        adapter = read_adapter_config(name)
        if _same(str(adapter.base_model_name_or_path), _base_of(model)):
            return FoundTeacher(name, adapter)
    elif config.teacher_system_prompt is None and _same(name, _base_of(model)):
        warn(
            f"the teacher {shown(name)} is the policy's own base, which is held twice, and only holds the policy to "
            "it, as beta does; name a larger model or an adapter, or set beta instead"
        )
    own = as_teacher(name, config)
    return FoundTeacher(name, adapter_config(name, own), read_config(name, own))


def as_teacher(name: str, config: GRPOConfig) -> GRPOConfig:
    """The configuration that a teacher with a base of its own is loaded by: the policy's, for inference alone.

    What is no adapter gets the least one that there is, since a policy has one, and takes it off.
    """
    adapter: dict[str, Any] = {field.name: field.default for field in fields(AdapterFields)}
    if not is_adapter(name):
        adapter |= {"lora_r": 1, "lora_alpha": 1}
    return replace(
        config, **adapter, model_init_kwargs=None, activation_offloading=False, offload_embedding=False,
        load_head_in_8bit=False,
    )  # fmt: skip


def _base_of(model: Any) -> str:
    """The name or folder of a model's base, loaded or not."""
    if isinstance(model, PeftModel | PreTrainedModel):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return base.name_or_path
    return str(read_adapter_config(model).base_model_name_or_path) if is_adapter(model) else model


def _same(one: str, other: str) -> bool:
    """Tell whether two names are of one model: the same hub id, or the same folder."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def refuse_other_tokens(found: FoundTeacher, model: Any, tokenizer: Any, config: GRPOConfig) -> None:
    """Raise InputError where a teacher would read the policy's tokens as others.

    Ids of one vocabulary mean something else in another, and nothing would say so
    (https://github.com/huggingface/trl/issues/4562).
    """
    if found.model is None:
        return
    own = load_tokenizer(found.name, config)
    here, there = tokenizer.get_vocab(), own.get_vocab()
    differ = [token for token, token_id in here.items() if there.get(token) != token_id]
    remedy = "name a teacher of the same family, or let it write examples for `lowmem-grpo sft`"
    if differ:
        token = min(differ, key=lambda token: here[token])
        theirs = there.get(token)
        raise InputError(
            f"the teacher {shown(found.name)} has another vocabulary: {len(differ)} of the policy's {len(here)} tokens "
            f"are others there, such as {shown(token)}, {here[token]} here and "
            f"{'none' if theirs is None else theirs} there; {remedy}"
        )
    sizes = [one.get_text_config().vocab_size for one in (read_config(model, config), found.model)]
    if sizes[0] > sizes[1]:
        raise InputError(
            f"the teacher {shown(found.name)} has {sizes[1]} tokens in its embedding, and the policy {sizes[0]}, so "
            f"that it cannot read all that the policy may write; {remedy}"
        )
    ends = [_ends(model, tokenizer, config), _ends(found.name, own, as_teacher(found.name, config))]
    if not ends[0] & ends[1]:
        words = [" and ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(each)))) for each in ends]
        raise InputError(
            f"the teacher {shown(found.name)} ends what it says with {words[1]}, and the policy with {words[0]}, so "
            f"that it would teach never to end; set eos_token_id in the policy's generation_config.json, or {remedy}"
        )


def _ends(model: Any, tokenizer: Any, config: GRPOConfig) -> set[int]:
    """The ids that end a completion: by the model's settings, the tokenizer and its chat template."""
    named = ends_of_model(model, config) | named_ends(tokenizer)
    return with_turn_end(tokenizer, {one for one in named if isinstance(one, int)})


class Teacher:
    """A frozen model that says how likely it finds what the policy wrote."""

    def __init__(self, policy: Policy, adapter: str | None):
        self.policy = policy  # a model of its own, or the run's policy
        self.adapter = adapter  # the one that it wears

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the teacher's policy compute as the teacher inside the `with`, without a gradient."""
        if self.adapter is None:
            with self.policy.as_base():
                yield
        else:
            with self.policy.inference(), self.policy.wearing(self.adapter):
                yield


def load_teacher(found: FoundTeacher, policy: Policy, config: GRPOConfig) -> Teacher:
    """The teacher that was found: on the policy's base, or on a base of its own beside it.

    What is drawn on the way changes no later random number.
    """
    with policy.fork_rng():
        if found.model is not None:
            own = load_policy(found.name, policy.tokenizer, as_teacher(found.name, config), is_found=True)
            own.model.requires_grad_(False)
            return Teacher(own, own.adapter if is_adapter(found.name) else None)
        if found.adapter is not None:
            policy.add_from(ADAPTER, found.name)
    return Teacher(policy, None if found.adapter is None else ADAPTER)
