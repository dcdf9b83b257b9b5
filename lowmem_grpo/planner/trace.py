"""Memory of a model's weights and activations, seen on tensors that have a shape and no memory.

Weights and adapters are counted on the whole model. Its activations are those of the training code itself, which runs
two or three layers of each kind that the model has; a whole model is these, by their number.
"""

import contextlib
import copy
import inspect
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, masking_utils

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import ModelFields
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.generate.delta_rule import steps_in_place
from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.shape import StoreShape
from lowmem_grpo.generate.states import States, StateShapes, state_bytes, state_shapes
from lowmem_grpo.model import experts
from lowmem_grpo.model.adapters import add_adapter
from lowmem_grpo.model.attention import Silent, UnknownAttention, attending, laid_out, refusal
from lowmem_grpo.model.find import without_weights
from lowmem_grpo.model.head_8bit import has_untied_head
from lowmem_grpo.model.layer_shapes import LayerShape
from lowmem_grpo.model.load import LINEAR, equip, shared_weights
from lowmem_grpo.model.mixing import CACHES, mixers
from lowmem_grpo.model.offload import token_embeddings
from lowmem_grpo.model.outline import Unknown, read_layers
from lowmem_grpo.model.outlined import OutlinedLayers, may_go_by_outline
from lowmem_grpo.model.packing import MicroBatch, filling_lengths, fills_one, pack
from lowmem_grpo.model.past_forward import kind_of, read_past_forward
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.quantizer import lay_out_4bit
from lowmem_grpo.model.teacher import FoundTeacher
from lowmem_grpo.model.towers import set_aside
from lowmem_grpo.model.trial import Differs, by_itself, run_in_parts

PROMPT_TOKENS = 512  # assumed where max_prompt_length is none
STEP_ROWS = 16  # of a step that is run to see what it takes for each row


def prompt_tokens(config: TrainingConfig) -> int:
    return config.max_prompt_length or PROMPT_TOKENS


@dataclass(frozen=True)
class Key:
    """A cache's key: a model's configuration and its adapter's; reward adapters leave a trace as it is."""

    model: PreTrainedConfig
    adapter: PeftConfig
    rewards: tuple[PeftConfig, ...] = ()  # adapters that are worn to score what was sampled
    teacher: FoundTeacher | None = None  # which no trace of the policy reads

    def text(self) -> str:
        adapter = json.dumps(self.adapter.to_dict(), default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        return self.model.to_json_string() + adapter

    def __hash__(self) -> int:
        return hash(self.text())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text() == other.text()


@dataclass(frozen=True)
class Ran:
    """Bytes of activations of the layers that ran."""

    kept: int  # what the backward of the largest micro-batch waits with
    peak: int  # at the peak of its forward and backward
    inference: int  # at the peak of its forward without a backward, as the base
    worn: int  # the same with its adapters
    prefill: int  # the same for a batch of prompts
    rows: int  # of the head's input, whose gradient is as large


@dataclass(frozen=True)
class Few:
    """Bytes that some layers took, and each of them, in their order."""

    ran: Ran
    before: int  # kept besides what layers keep
    keeps: tuple[int, ...]
    works: tuple[int, ...]  # beside what it and those below it keep, in its forward or backward, whichever is more


@dataclass(frozen=True)
class Generated:
    """Bytes of a row in transformers' generate: its cache, after the prompt and in full, and the rest."""

    prompt_cache: int
    prefill: int
    cache: int
    decode: int  # one more token


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one completion's states, and of what sampling takes beside these for each completion in flight."""

    held: int = 0  # by all layers
    step: int = 0  # at the peak of one layer's step
    captured_step: int = 0  # at that peak where steps are captured, whose trials leave states as they are
    start: int = 0  # of the largest one, copied as completions begin where their prompt ended


@dataclass(frozen=True)
class Traced:
    """Numbers of a whole model, from building it and running some of its layers."""

    resident: dict[str, int]
    adapter_sizes: tuple[int, ...]  # numbers in each trained parameter
    largest_linear: int  # numbers in the largest 4-bit layer
    dense: int  # bytes of all 4-bit layers in the compute dtype, which rollout_weights="dense" samples from
    ran: Ran
    layers: dict[int, LayerShape]  # that attend; none where it is padded
    states: StateBytes  # of the layers that keep one; 0 where there are none, or it is padded
    choices: int  # of experts in 4 bits that a token has; 0 where there are none, or it is padded
    padded: str | None  # why its rows are padded, and sampled by transformers' generate
    generated: Generated | None  # where it is padded

    @property
    def adapter_numbers(self) -> int:
        return sum(self.adapter_sizes)


class Watched:
    """A configuration that remembers, in `read`, the names of the fields that were read of it."""

    def __init__(self, config: TrainingConfig, read: set[str]):
        self._config, self._read = config, read

    def __getattr__(self, name: str) -> Any:
        found = getattr(type(self._config), name)
        if isinstance(found, property):
            return found.fget(self)  # type: ignore[misc] # which reads fields in its turn
        self._read.add(name)
        return getattr(self._config, name)


# For each model and kind of training what was traced, with the settings that the trace read: trying any other setting
# costs nothing.
_TRACED: dict[tuple[Key, type], list[tuple[dict[str, Any], Traced]]] = {}


def trace(key: Key, config: TrainingConfig) -> Traced:
    """Build a model and run its layers without memory, unless a trace under equal settings is known.

    Raises:
        InputError: the model cannot be run without memory.
    """
    known = _TRACED.setdefault((key, type(config)), [])
    for settings, traced in known:
        if all(getattr(config, name) == value for name, value in settings.items()):
            return traced
    read: set[str] = set()
    traced = _trace(key, config, read)
    known.append(({name: getattr(config, name) for name in read}, traced))
    return traced


def _trace(key: Key, config: TrainingConfig, read: set[str]) -> Traced:
    watched = cast(TrainingConfig, Watched(config, read))
    try:
        whole = skeleton(key, watched.compute_dtype, watched.trust_remote_code, watched.load_in_4bit)
        padded, layers, states, choices = _shapes(whole, watched.compute_dtype)
        if padded:
            watched = cast(TrainingConfig, Watched(replace(config, padding_free=False), read))
        generated = run_generate(whole, watched) if padded and watched.samples else None
        chosen = _few_of_each(_kinds(whole), layers)
        ran = run_layers(whole, watched, chosen)
        return Traced(*_resident(whole, watched, chosen), ran, layers, states, choices, padded, generated)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever foreign code raises where its tensors have no memory
        message = f"the memory of a {key.model.model_type!r} model cannot be predicted: {in_a_line(error)}"
        raise InputError(f"{message}; train it without vram_budget") from error


@lru_cache(maxsize=4)
def skeleton(key: Key, compute_dtype: str, trust_remote_code: bool, load_in_4bit: bool) -> PeftModel:
    """The model with its adapter, all of its layers, on the device that has no memory.

    With load_in_4bit its experts are in 4 bits; its linear layers are not.
    """
    adapter = copy.copy(key.adapter)
    # One that is continued is trained again, and what its values are is no matter.
    adapter.inference_mode, adapter.init_lora_weights = False, True  # type: ignore[attr-defined] # a LoraConfig's
    adapter.base_model_name_or_path = None  # which PEFT would compare with that of a model without files
    base = without_weights(key.model, trust_remote_code, getattr(torch, compute_dtype))
    set_aside(base)
    if load_in_4bit:
        lay_out_4bit(base, key.model)
    with torch.device("meta"):
        return add_adapter(base.requires_grad_(False), adapter)


@lru_cache(maxsize=4)
def _shapes(whole: PeftModel, compute_dtype: str) -> tuple[str | None, dict[int, LayerShape], StateBytes, int]:
    """The LayerShape of each layer that attends, bytes of states, and a token's choices, from one of each kind.

    Before them stands why a model can neither be packed nor sampled by the engine, as far as shapes show it, or None.
    """
    kinds = _kinds(whole)
    distinct, reason = sorted(set(kinds)), refusal(whole.get_base_model())
    if reason is not None:
        return reason, {}, StateBytes(), 0
    for mixer in mixers(whole):
        with steps_in_place(mixer, None):  # which compares numbers, once of a family; below there are none
            pass
    with fake_policy(whole, tuple(distinct), _computing(compute_dtype)) as policy, _assumed_routes() as choices:
        try:
            reason = by_itself(policy)
            if reason is None:
                run_in_parts(policy, "")
                of_kind, shapes = policy.layer_shapes, state_shapes(policy)
        except (Differs, UnknownAttention, AttributeError, TypeError) as error:  # the last two: code that wants a mask
            reason = in_a_line(error)
        if reason is not None:
            return reason, {}, StateBytes(), 0
        of_kind = {distinct[place]: shape for place, shape in of_kind.items()}
        states = {distinct[place]: state_bytes({place: named}) for place, named in shapes.items()}
        step, captured_step = (_step_bytes(policy, shapes, captured) for captured in (False, True))
    held = sum(states.get(kind, 0) for kind in kinds)
    start = max((shape.num_bytes for named in shapes.values() for shape in named.values()), default=0)
    layers = {}
    for number, kind in enumerate(kinds):
        if kind in of_kind:
            source = distinct[of_kind[kind].source]  # the kind of the layer whose keys and values it has
            last = number if source == kind else max(earlier for earlier in range(number) if kinds[earlier] == source)
            layers[number] = of_kind[kind]._replace(source=last)
    return None, layers, StateBytes(held, step, captured_step, start), max(choices, default=0)


class _Step(Silent):
    """A layout of a decoding step, which sees the bytes that layers with a state take at their peak."""

    def __init__(self, states: States, live: "Live"):
        self.states, self.live, self.peak = states, live, 0

    def mix(self, mixer: Any, forward: Any, hidden: Tensor) -> Tensor:
        self.live.take_peak()
        before = self.live.now
        out = self.states.advance(mixer, forward, hidden)
        self.peak = max(self.peak, self.live.take_peak() - before)
        return out


def _step_bytes(policy: Policy, shapes: StateShapes, captured: bool) -> int:
    """Bytes for each row at the peak of a layer's step, beside the states that States.advance moves on."""
    if not shapes:
        return 0
    ids = torch.zeros(STEP_ROWS, 1, dtype=torch.long)
    with Live(policy.model) as live, policy.inference(), policy.autocast(), attending(policy.configs):
        states = States(shapes, StoreShape(STEP_ROWS, 1, 0, 0), policy.device, Kept() if captured else None)
        with laid_out(step := _Step(states, live)):
            policy.decoder(input_ids=ids, position_ids=ids, use_cache=False)
    return math.ceil(step.peak / STEP_ROWS)


@lru_cache(maxsize=64)
def few_tokens_bytes(whole: PeftModel, num_tokens: int, choices: int, dtype: torch.dtype) -> int:
    """Bytes at the peak of a layer's experts, for at most as many tokens as a GPU computes by few_tokens.

    Where this machine has no GPU, those with the kernel or those without it, as on an older card, whichever are more.
    """
    found = 0
    for module in {_structure(module): module for _, module in experts.experts_of(whole)}.values():
        if choices == 0 or experts.dense_weights(module):
            continue
        stacks = experts.for_kernel(module, dtype, torch.device("meta"))
        for way in (stacks, *(() if torch.cuda.is_available() or stacks is None else (None,))):
            found = max(found, _few_tokens_bytes(module, num_tokens, choices, dtype, way))
    return found


def _few_tokens_bytes(
    module: Any, num_tokens: int, choices: int, dtype: torch.dtype, stacks: list[experts.Stack] | None
) -> int:
    rows = min(num_tokens, experts.most_choices(module, stacks) // choices)
    stack: Any = getattr(module, experts.packed_name(experts.weight_names(module)[0]))
    with Live(module) as live, torch.no_grad(), torch.device("meta"):
        hidden = torch.empty(rows, stack.shape[0 if stack.inputs_first else 1], dtype=dtype)
        stream = torch.empty_like(hidden)  # that the output is added to
        weights, chosen = torch.empty(rows, choices), torch.empty(rows, choices, dtype=torch.int64)
        experts.few_tokens(module, hidden, weights, chosen, dtype, stacks)
    del stream
    return live.peak


def _computing(compute_dtype: str) -> ModelFields:
    """Settings under which layers compute in a dtype, and keep what they like."""
    return ModelFields(bf16=compute_dtype == "bfloat16", fp16=compute_dtype == "float16", gradient_checkpointing=False)


def run_layers(whole: PeftModel, config: TrainingConfig, chosen: tuple[int, ...]) -> Ran:
    """Bytes that all layers take in the largest of a training step's micro-batches."""
    found = [_of_all_layers(few, _kinds(whole), chosen, config) for few in _run_few(whole, config, chosen)]
    return Ran(**{field.name: max(getattr(ran, field.name) for ran in found) for field in fields(Ran)})


def _few_of_each(kinds: list[int], layers: dict[int, LayerShape]) -> tuple[int, ...]:
    """Numbers of each kind's first and last layer, of the model's last, and of those that others read.

    For 24 of one kind 0, 22 and 23: layer 0 makes what is there once, 22 is as all others are, and beside the backward
    of 23, which is no last one of its kind, no gradient of a layer above waits. In Gemma 4 E, layers read the keys and
    values of others.
    """
    last = len(kinds) - 1
    found = {last, *(layer.source for number, layer in layers.items() if layer.source != number)}
    for kind in set(kinds):
        of_kind = [number for number in range(last) if kinds[number] == kind]
        found |= {*of_kind[:1], *of_kind[-1:]}
    return tuple(sorted(found))


def _of_all_layers(few: Few, kinds: list[int], chosen: tuple[int, ...], config: TrainingConfig) -> Ran:
    """Bytes that all layers take, from a run in which the last of each kind stands for the others."""
    like = {kinds[number]: place for place, number in enumerate(chosen) if number < len(kinds) - 1}
    if config.activation_offloading and len(kinds) > 2:  # the inputs of two layers are on the device at a time
        like.setdefault(kinds[-1], len(chosen) - 1)
        common = few.ran.kept - sum(few.keeps[like[kinds[number]]] for number in chosen)
        kept = common + 2 * max(few.keeps[place] for place in like.values())
        return replace(few.ran, kept=kept, peak=kept + max(few.works))
    waiting, peak = few.before, 0
    for number, kind in enumerate(kinds):
        place = chosen.index(number) if number in chosen else like[kind]
        waiting += few.keeps[place]
        peak = max(peak, waiting + few.works[place])  # while a layer is at work in the backward, those below it wait
    return replace(few.ran, kept=waiting, peak=peak)


def _run_few(whole: PeftModel, config: TrainingConfig, chosen: tuple[int, ...]) -> list[Few]:
    """Memory of a few layers in each of largest_steps(), from a known run where settings are equal."""
    own = config._config if isinstance(config, Watched) else config
    known = _runs_of(whole).setdefault(type(own), [])
    # Compared unwatched: what a run that does not serve has read is nothing that this one depends on.
    found = next((run for run in known if all(getattr(own, name) == value for name, value in run[0].items())), None)
    if found is None:
        read: set[str] = set()
        watched = cast(TrainingConfig, Watched(own, read))
        with fake_policy(whole, chosen, watched) as policy:
            few = run_few(policy, watched)
        found = {name: getattr(own, name) for name in read}, few
        known.append(found)
    settings, few = found
    for name in settings:
        getattr(config, name)  # which a Watched one remembers: a whole model's trace depends on it as well
    return few


@lru_cache(maxsize=4)
def _runs_of(whole: PeftModel) -> dict[type, list[tuple[dict[str, Any], list[Few]]]]:
    """Known runs of a few of a model's layers, by kind of training, each with the settings that it read."""
    return {}


@lru_cache(maxsize=4)
def _kinds(whole: PeftModel) -> list[int]:
    """The index, for each layer, of the first with its modules, parameters and attention."""
    layers = _layers(whole)
    types = getattr(_text_config(whole), "layer_types", None) or [None] * len(layers)
    seen: dict[Any, int] = {}
    return [seen.setdefault((_structure(layer), types[i]), i) for i, layer in enumerate(layers)]


def _structure(layer: nn.Module) -> tuple:
    modules = []
    for name, module in layer.named_modules():
        # Windows, kinds of attention and the like; what is different in every layer is its number.
        simple = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str | None)}
        simple = sorted((k, v) for k, v in simple.items() if "layer_i" not in k)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(k, tuple(x.shape), x.requires_grad) for k, x in own]
        modules.append((name, type(module), tuple(map(repr, simple)), tuple(shapes)))
    return tuple(modules)


def _text_config(whole: PeftModel) -> Any:
    return whole.get_base_model().config.get_text_config()  # type: ignore[union-attr] # a PreTrainedModel's


def _layers(whole: PeftModel) -> nn.ModuleList:
    """The list of a model's layers, or of those that are left of them. Raise InputError where there is none."""
    base: Any = whole.get_base_model()
    for module in base.get_decoder().children():
        if isinstance(module, nn.ModuleList) and 0 < len(module) <= _text_config(whole).num_hidden_layers:
            return module
    raise InputError(
        f"the memory of a {base.config.model_type!r} model cannot be predicted: its layers are not in one list"
    )


@contextlib.contextmanager
def fake_policy(whole: PeftModel, chosen: tuple[int, ...], config: ModelFields) -> Iterator[Policy]:
    """A policy of copies of the chosen layers, whose tensors have no memory; new ones inside have none."""
    adapted = _with_layers(whole, chosen)
    # bfloat16 is of float16's size, and more operations have a fake of it.
    dtype = torch.bfloat16 if config.fp16 else getattr(torch, config.compute_dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _quietly(), _unpacked_rows(), _assumed_routes():
        made: dict[nn.Parameter, nn.Parameter] = {}  # one that stands in several places stays one
        for module in adapted.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in made:
                    fake = torch.empty(parameter.shape, dtype=torch.float32 if parameter.requires_grad else dtype)
                    made[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = None if parameter is None else made[parameter]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        policy = Policy(adapted, SimpleNamespace(eos_token_id=0, pad_token_id=0), dtype)
        # A GPU's settings, left out here, change what the device holds, and not what is computed.
        equip(policy, ModelFields(gradient_checkpointing=config.gradient_checkpointing, tiled_mlp=config.tiled_mlp))
        if may_go_by_outline(policy.decoder):
            with contextlib.suppress(Unknown), policy.inference(), policy.autocast():
                outlines = read_layers(policy, by_shape=True)
                policy.outlined = OutlinedLayers(policy.decoder, outlines)
        yield policy


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch from logging the traceback of what fails without memory, beside the sentence that is raised."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _unpacked_rows() -> Iterator[None]:
    """Keep transformers from taking rows for packed ones, as it does where it cannot read positions."""
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


@contextlib.contextmanager
def _assumed_routes() -> Iterator[list[int]]:
    """Have all tokens choose the same experts inside the `with`, which takes the most memory.

    Which ones are chosen is in the values of tensors, and those here have none. Yields how many a token has, of each
    layer that ran.
    """
    seen: list[int] = []

    def same_for_all(chosen: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
        tokens, choices = chosen.shape
        seen.append(choices)
        return torch.empty(chosen.numel(), dtype=torch.long), [tokens] * choices + [0] * (num_experts - choices)

    own = experts.by_expert
    experts.by_expert = same_for_all
    try:
        yield seen
    finally:
        experts.by_expert = own


def _with_layers(whole: PeftModel, chosen: tuple[int, ...]) -> PeftModel:
    """A copy of a model with copies of the chosen layers in place of its own."""
    layers = _layers(whole)
    configs = {id(c): c for m in whole.modules() if (c := getattr(m, "config", None)) is not None}
    shared = {key: copy.deepcopy(config) for key, config in configs.items()}
    copies = [copy.deepcopy(layers[i], dict(shared)) for i in chosen]
    for place, layer in enumerate(copies):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = place
            for name, by_number in vars(module).items():  # Zamba 2's layer_dic, of the adapters of a shared layer
                if (
                    not name.startswith("_")
                    and isinstance(by_number, dict)
                    and set(by_number) <= set(range(len(layers)))
                ):
                    vars(module)[name] = {new: by_number[old] for new, old in enumerate(chosen) if old in by_number}
    adapted = copy.deepcopy(whole, {**shared, id(layers): nn.ModuleList(copies)})
    text = _text_config(adapted)
    types = {name: own for name in ("layer_types", "layers_block_type") if (own := getattr(text, name, None))}
    if not getattr(text, "hidden_size_per_layer_input", None):
        text.num_hidden_layers = len(chosen)  # else there is an input for each of all the layers, whichever run
    for name, own in types.items():
        if name in vars(text):
            setattr(text, name, [own[i] for i in chosen])
        else:  # computed from a period, as Jamba's, or from a list of layers
            text.__class__ = type(type(text).__name__, (type(text),), {name: [own[i] for i in chosen]})
    return adapted


def run_few(policy: Policy, config: TrainingConfig) -> list[Few]:
    """The memory of the first micro-batch of each of largest_steps()."""
    prefill = 0
    if config.samples:
        prompt = prompt_tokens(config)
        count = max(1, min(config.token_budget // prompt, config.prompts_per_step))
        prefill = _inference(policy, _prompts(policy, prompt, count, config.padding_free))
    found = []
    for lengths in largest_steps(config):
        batch = _first_micro_batch(config, lengths, policy.device)
        few = _activations(policy, batch, config.has_entropy_bonus)
        sampling = cast(GRPOConfig, config)
        runs_without = config.samples and (
            sampling.beta or sampling.has_old_pass or sampling.has_critic or sampling.teacher
        )
        inference = _inference(policy, batch) if runs_without else 0
        worn = _inference(policy, batch, worn=True) if runs_without or not config.samples else 0  # of an evaluation
        found.append(replace(few, ran=replace(few.ran, inference=inference, worn=worn, prefill=prefill)))
    return found


def _prompts(policy: Policy, tokens: int, count: int, padding_free: bool) -> MicroBatch:
    given: dict[str, Any] = dict(token_budget=10**9, pad_token_id=0, device=policy.device, padding_free=padding_free)
    (batch,) = pack([[0] * tokens] * count, [[0]] * count, **given)
    return batch


def largest_steps(config: TrainingConfig) -> list[list[int]]:
    """Completion lengths of the steps that may take the most memory: one even, and where rows are packed one uneven.

    Even lengths are full ones, halves, quarters, eighths, or those that fill the budget best. Not counted is
    attention's padding where a step has mostly short texts: up to 31 tokens each.
    """
    completions, completion = config.prompts_per_step * config.num_generations, config.max_completion_length
    rows = math.ceil(config.token_budget / (prompt_tokens(config) + completion))  # more than fit at full length
    filling = config.token_budget // rows - prompt_tokens(config)
    found = [
        [length] * completions for length in {*(completion // part for part in (1, 2, 4, 8)), filling} if length > 0
    ]
    cpu = torch.device("cpu")
    steps = [max(found, key=lambda lengths: _first_micro_batch(config, lengths, cpu).input_ids.numel())]
    if not config.samples:  # examples of any length: as those with which the update is tried
        uneven = filling_lengths(1 + completion, completions, config.token_budget)
        uneven += [2] * (len(uneven) % config.num_generations)  # of a pair that is cut apart
        steps += [[length - 1 for length in uneven]]
    elif config.padding_free:
        uneven = fills_one(
            prompt_tokens(config), completion, num_prompts=config.prompts_per_step,
            num_generations=config.num_generations, token_budget=config.token_budget,
        )  # fmt: skip
        steps += [uneven] if uneven and uneven not in steps else []
    return steps


def _first_micro_batch(config: TrainingConfig, lengths: list[int], device: torch.device) -> MicroBatch:
    """The first micro-batch of a step, which is the largest, as the trainer packs one."""
    return next(
        pack(
            [[0] * prompt_tokens(config)] * (len(lengths) // config.num_generations),
            [[0] * length for length in lengths],
            token_budget=config.token_budget,
            pad_token_id=0,
            device=device,
            num_generations=config.num_generations,
            padding_free=config.padding_free,
            last_only=config.kind == "reward",  # whose scores are of each text's last token
        )
    )


def _activations(policy: Policy, batch: MicroBatch, entropy_bonus: bool) -> Few:
    """Bytes saved between forward and backward, and at the peak, without the adapters' gradients."""
    for parameter in policy.parameters_of(policy.adapter).values():
        parameter.grad = torch.zeros_like(parameter)
    layers = _layers(policy.model)
    entered, forward, backward = [], [], {}  # bytes alive as each is entered, and at the peak of each

    def enter(hidden: Tensor) -> None:
        place = len(entered)
        entered.append(live.now)
        forward.append(live.take_peak())
        if hidden.requires_grad:

            def leave(_: Tensor) -> None:  # the layer's backward is done
                backward[place] = live.take_peak()

            hidden.register_hook(leave)

    with Live(policy.model) as live, _entering(layers, enter):
        rows = policy.hidden_states(batch)
        upstream = torch.zeros_like(rows)  # the head makes it while it computes the log-probabilities
        lean = torch.zeros_like(rows) if entropy_bonus else None  # and this for the entropy's gradient
        kept, size = live.now - rows.nbytes, rows.nbytes  # rows are gone as soon as there are log-probabilities
        forward.append(live.take_peak())
        rows.backward(upstream)
        del lean
        rest = live.take_peak()  # of the layers that pass no gradient on
    after = [*entered[1:], kept]
    peaks = [max(forward[place + 1], backward.get(place, rest)) for place in range(len(layers))]
    works = tuple(peak - kept for peak, kept in zip(peaks, after, strict=True))
    keeps = tuple(end - start for start, end in zip(entered, after, strict=True))
    return Few(Ran(kept, max(peaks), inference=0, worn=0, prefill=0, rows=size), entered[0], keeps, works)


@contextlib.contextmanager
def _entering(layers: nn.ModuleList, enter: Callable[[Tensor], None]) -> Iterator[None]:
    """Call enter(hidden) as each layer is called inside the `with`, and not as its checkpoint computes it again."""

    def watched(own: type) -> type:
        def called(self, *arguments, **keywords):
            enter(arguments[0] if arguments else keywords["hidden_states"])
            return own.__call__(self, *arguments, **keywords)

        return type(own.__name__, (own,), {"__call__": called})

    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = watched(kind)
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def _inference(policy: Policy, batch: MicroBatch, *, worn: bool = False) -> int:
    with policy.inference() if worn else policy.as_base(), Live(policy.model) as live:
        policy.hidden_states(batch)
    return live.peak


def run_generate(whole: PeftModel, config: TrainingConfig) -> Generated:
    """The memory of a row in `generate`, from two layers of each kind, with a mask."""
    kinds, prompt = _kinds(whole), prompt_tokens(config)
    chosen = tuple(kind for kind in sorted(set(kinds)) for _ in range(2))

    def forward(tokens: int, before: int = 0, cache: Any = None) -> tuple[int, int, Any]:
        """(bytes of the whole model's cache, other bytes at the peak, the cache)"""
        mask = torch.ones(1, before + tokens, dtype=torch.long)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with policy.inference(), policy.autocast(), Live(policy.model) as live:
            out = policy.decoder(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache})
        layers = [[x for x in tree_leaves(vars(y)) if isinstance(x, Tensor)] for y in out[name].layers]
        sizes = [sum(x.nbytes for x in held) for held in layers]
        return sum(sizes[chosen.index(kind)] for kind in kinds), live.peak - sum(sizes), out[name]

    with fake_policy(whole, chosen, config) as policy:
        asked = inspect.signature(policy.decoder.forward).parameters
        name = next((name for name in CACHES if name in asked), CACHES[-1])
        prompt_cache, prefill, _ = forward(prompt)
        tokens = prompt + config.max_completion_length - 1  # the last one's keys and values are never asked for
        cache, _, filled = forward(tokens)
        _, decode, _ = forward(1, tokens, filled)
    return Generated(prompt_cache, prefill, cache, decode)


class Live(TorchDispatchMode):
    """Counts the bytes of living storages, but for a model's parameters, gradients and buffers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, tuple[int, weakref.ref]] = {}
        given = [*model.parameters(), *model.buffers()]
        for tensor in [*given, *(p.grad for p in given if p.grad is not None)]:
            self._know(tensor, 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which guards each call against a compiler that none of these meets
        return False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.prim.device.default:
            return arguments[0].fake_device
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def take_peak(self) -> int:
        """The most bytes since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def _see(self, tensor: Tensor) -> None:
        if id(tensor.untyped_storage()) not in self.known:
            self._know(tensor, tensor.untyped_storage().nbytes())

    def _know(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        self.known[key] = size, weakref.ref(storage, lambda _: self._forget(key))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.known.pop(key)[0]


def _resident(
    whole: PeftModel, config: ModelFields, chosen: tuple[int, ...]
) -> tuple[dict[str, int], tuple[int, ...], int, int]:
    """Bytes of the weights by kind, and the sizes of trained parameters and of 4-bit layers."""
    base: Any = whole.get_base_model()
    size = getattr(torch, config.compute_dtype).itemsize
    quantized, counted = [], set()
    head = base.get_output_embeddings()
    few = _with_layers(whole, chosen).get_base_model()
    read = {kind_of(few, name) for name in read_past_forward(few)}
    dense = {id(module) for name, module in base.named_modules() if kind_of(base, name) in read} | {id(head)}
    shared = shared_weights(base)
    for name, module in base.named_modules():
        if f"{name.removesuffix('.base_layer')}.weight" in shared:
            continue
        if type(module) in LINEAR and id(module) not in dense and "lora_" not in name and config.load_in_4bit:
            quantized.append(module.weight.numel())
            counted.add(id(module.weight))
    adapters = [p for p in whole.parameters() if p.requires_grad]
    counted |= {id(p) for p in adapters}
    counted |= {id(table.weight) for table in token_embeddings(base)} if config.offload_embedding else set()
    others = {id(p): size * p.numel() for p in whole.parameters() if id(p) not in counted}
    if config.load_head_in_8bit and has_untied_head(base):
        others[id(head.weight)] = head.weight.numel() + 4 * len(head.weight)
    packed = experts.packed_bytes(base)
    resident = {
        "4-bit linear layers": sum(map(nf4_bytes, quantized)),
        **({"4-bit experts": packed} if packed else {}),
        "embedding, head and the rest": sum(others.values()) + sum(b.nbytes for b in whole.buffers()) - packed,
        "adapters": sum(4 * p.numel() for p in adapters),
    }
    return resident, tuple(p.numel() for p in adapters), max(quantized, default=0), size * sum(quantized)


def nf4_bytes(numbers: int) -> int:
    """Bytes of a bitsandbytes weight in NF4: codes, a scale for 64, and double quantization's scale for 256."""
    scales = math.ceil(numbers / 64)
    return math.ceil(numbers / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)
