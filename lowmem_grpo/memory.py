"""What a run will need: the peak of each phase, predicted from a model's configuration alone, and what to do about it.

Weights and adapters are counted on the whole model, built without memory. The layers' activations are not written down
as formulas, which would go stale: the training code itself runs, on fake tensors that have a shape and no memory, for
2 and for 3 layers of each kind that the model has. A whole model is these, by their number.
"""

import contextlib
import copy
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedConfig, masking_utils

from lowmem_grpo.attention import UnknownAttention, in_a_line, refusal
from lowmem_grpo.config import GRPOConfig
from lowmem_grpo.generate.plan import kv_shape, plan_rollout
from lowmem_grpo.kernels.linear_logprobs import default_chunks
from lowmem_grpo.packing import MicroBatch, pack
from lowmem_grpo.policy import Policy, add_adapter, equip, lora_config

CONTEXT_BYTES = 512 * 2**20  # of CUDA, its libraries and their workspaces: an estimate
PROMPT_TOKENS = 512  # assumed where max_prompt_length is none


@dataclass(frozen=True)
class Forecast:
    """Bytes on the GPU: what is there throughout, and what each phase adds at its peak, by name."""

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    padded: str | None = None  # why it is trained on padded rows and sampled from by transformers' generate

    def peaks(self) -> dict[str, int]:
        return {name: sum(self.resident.values()) + sum(parts.values()) for name, parts in self.phases.items()}

    def peak(self) -> int:
        return max(self.peaks().values())

    def largest_phase(self) -> str:
        peaks = self.peaks()
        return max(peaks, key=lambda name: peaks[name])


@dataclass(frozen=True)
class Change:
    """A setting that the plan chose."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """The settings that fit a budget, or as near to it as they come."""

    config: GRPOConfig
    forecast: Forecast
    budget: int | None
    changes: list[Change]
    prompt_tokens: int  # of the longest prompt
    assumptions: list[str]  # sentences
    remedy: str | None = None  # what would have to change besides; None where everything fits


def plan(
    model: PreTrainedConfig,
    config: GRPOConfig,
    adapter: PeftConfig | None = None,  # the one that is trained, where not config's lora fields say it
    longest_prompt: int | None = None,  # its tokens; None where no prompt is known yet
) -> Plan:
    """The cheapest settings with which every phase stays within vram_budget; config's own are kept where they fit."""
    key = _Key(model, adapter or lora_config(config))
    # Within here, max_prompt_length is the length that is planned for.
    prompt = longest_prompt or config.max_prompt_length or PROMPT_TOKENS
    chosen, found, changes = _fit(key, replace(config, max_prompt_length=prompt))
    budget, assumptions, remedy = config.vram_budget_bytes, [], None
    if found.padded:
        assumptions.append(f"Trained on padded rows, sampled from by transformers' generate: {found.padded}.")
    if longest_prompt is None:
        given = "none" if config.max_prompt_length is None else prompt
        assumptions.append(f"The longest prompt is assumed to have {prompt} tokens: max_prompt_length is {given}.")
    if budget is not None and found.peak() > budget:
        remedy = _remedy(key, chosen, found, budget)
    chosen = replace(chosen, max_prompt_length=config.max_prompt_length)
    return Plan(chosen, found, budget, changes, prompt, assumptions, remedy)


def plan_to_fit(
    model: PreTrainedConfig, config: GRPOConfig, adapter: PeftConfig | None = None, longest_prompt: int | None = None
) -> Plan:
    """plan(), for a run. Raises ValueError, with the remedy, where nothing fits."""
    found = plan(model, config, adapter, longest_prompt)
    if found.remedy is not None:
        peak = f"{found.forecast.peak() / 10**9:.2f} GB"
        raise ValueError(
            f"vram_budget={config.vram_budget} is too little, the predicted peak is {peak}; {found.remedy}"
        )
    return found


@contextlib.contextmanager
def limit_memory(found: Plan | None, device: torch.device) -> Iterator[None]:
    """For the while, torch allocates the plan's budget and no more, which does not count the CUDA context."""
    if found is None or found.budget is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = max(0.0, (found.budget - CONTEXT_BYTES) / total)
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _fit(key: "_Key", config: GRPOConfig) -> tuple[GRPOConfig, Forecast, list[Change]]:
    budget, changes = config.vram_budget_bytes, {}
    found = _forecast(key, config)
    while budget is not None and found.peak() > budget:
        for change in _changes(key.model, config, found):
            changed = replace(config, **{change.name: change.value})
            try:
                found = _forecast(key, changed)
            except ValueError:  # not for this model
                continue
            config, changes[change.name] = changed, change
            break
        else:
            break
    return config, found, list(changes.values())


def _changes(model: PreTrainedConfig, config: GRPOConfig, found: Forecast) -> Iterator[Change]:
    """What would make the largest phase smaller, the least costly first."""
    phase, longest = found.largest_phase(), _longest(config)
    if phase == "rollout" and config.rollout_token_budget > longest:
        halved = max(longest, min(config.rollout_token_budget, _rollout_tokens(config, shared=not found.padded)) // 2)
        yield Change("rollout_token_budget", halved, "fewer completions are sampled at once")
    if config.token_budget > longest:
        halved = max(longest, min(config.token_budget, _step_tokens(config)) // 2)
        yield Change("token_budget", halved, "smaller micro-batches, and more of them")
    if phase == "update" and not config.gradient_checkpointing:
        yield Change("gradient_checkpointing", True, "activations are computed again, a third more work in the update")
    if config.optim in ("adamw_torch", "adamw_torch_fused"):
        yield Change("optim", "adamw_8bit", "a quarter of the optimizer's state")
    if phase != "rollout" and not config.tiled_mlp and longest > 1024:
        yield Change("tiled_mlp", True, "MLPs a tile at a time, computed once more in the update")
    if phase == "update" and config.gradient_checkpointing and not config.activation_offloading:
        yield Change("activation_offloading", True, "checkpoints go to CPU memory and back")
    if phase == "rollout" and config.rollout_kv == "full" and not found.padded:
        yield Change("rollout_kv", "int8", "keys and values in half the memory, rounded")
    if not config.offload_embedding and not model.get_text_config().tie_word_embeddings:
        yield Change("offload_embedding", True, "the embedding is looked up in CPU memory")


def _remedy(key: "_Key", config: GRPOConfig, found: Forecast, budget: int) -> str:
    """The smallest change of the task itself that would fit."""
    resident = sum(found.resident.values())
    if resident > budget:
        return f"the model and CUDA alone take {_in_words(resident)}: choose a smaller model"
    smallest, length = config, config.max_completion_length
    while length > 64:
        length = length * 3 // 4 // 32 * 32
        # Everything that a plan would choose, chosen at once.
        smallest = replace(smallest, max_completion_length=length)
        smallest = replace(smallest, token_budget=_longest(smallest), rollout_token_budget=_longest(smallest))
        if _forecast(key, smallest).peak() <= budget:
            return f"max_completion_length={length} would fit"
    needed = math.ceil(_forecast(key, smallest).peak() / 10**8) / 10
    return f"not even max_completion_length={length} would fit, it takes {needed:.1f} GB: choose a smaller model"


def forecast(model: PreTrainedConfig, config: GRPOConfig, adapter: PeftConfig | None = None) -> Forecast:
    """Peaks of the phases, each with the parts that it is made of. Nothing is downloaded or allocated."""
    return _forecast(_Key(model, adapter or lora_config(config)), config)


def _forecast(key: "_Key", config: GRPOConfig) -> Forecast:
    text = key.model.get_text_config()
    dtype = getattr(torch, config.compute_dtype)
    traced = _trace(key, config)
    resident = {
        **traced.resident,
        "gradients": 4 * traced.adapter_numbers,
        "optimizer state": _state_bytes(config, traced.adapter_sizes),
        "CUDA and its libraries": CONTEXT_BYTES,
    }
    # The head's scores and pull, in tiles as of a card of the budget's size.
    tokens, entries = default_chunks("cuda", (config.vram_budget_bytes or 0) / 2**30, text.hidden_size)
    head = 4 * tokens * (entries + text.hidden_size)
    layer = dtype.itemsize * traced.largest_linear if config.load_in_4bit else 0  # bitsandbytes dequantizes a whole one
    rollout = (
        _generate_bytes(key, config, traced, layer) if traced.padded else _engine_bytes(key, config, traced, layer)
    )
    phases = {
        "rollout": {**rollout, "adapters in the compute dtype": dtype.itemsize * traced.adapter_numbers},
        "reference": {"activations": traced.ran.inference, "head": head, "one dequantized layer": layer},
        "update": {
            "activations kept": traced.ran.kept,
            "one layer at work": traced.ran.peak - traced.ran.kept,
            "head": head,
            "one dequantized layer": layer,
        },
    }
    if config.beta == 0:
        del phases["reference"]
    return Forecast(resident, phases, traced.padded)


def _engine_bytes(key: "_Key", config: GRPOConfig, traced: "Traced", layer: int) -> dict[str, int]:
    text = key.model.get_text_config()
    dtype = torch.int8 if config.rollout_kv == "int8" else getattr(torch, config.compute_dtype)
    rollout = plan_rollout(
        prompt_tokens=_prompt_tokens(config), prompts=config.prompts_per_step, num_generations=config.num_generations,
        max_completion_length=config.max_completion_length, budget_tokens=config.rollout_token_budget, paged=True,
    )  # fmt: skip
    # fp32 logits, and where they are truncated transformers' sorted copies, their indices, softmax and cumulative sum.
    logits = 4 * rollout.slots * text.vocab_size * (7 if _truncates(config) else 1)
    return {
        "keys and values": rollout.tokens() * kv_shape(key.model, dtype).token_bytes,
        "prefill or logits": max(traced.ran.prefill + layer, logits),
    }


def _generate_bytes(key: "_Key", config: GRPOConfig, traced: "Traced", layer: int) -> dict[str, int]:
    if config.rollout_kv == "int8":
        raise ValueError(f"rollout_kv='int8' does not serve this model: {traced.padded}; set rollout_kv='full'")
    rows = min(
        config.prompts_per_step * config.num_generations, max(1, config.rollout_token_budget // _longest(config))
    )
    row, size = traced.generated, getattr(torch, config.compute_dtype).itemsize
    assert row is not None
    # generate's copies of the logits: its own, one in fp32, one processed, probabilities; more where it truncates.
    logits = (size + 4 * (9 if _truncates(config) else 3)) * key.model.get_text_config().vocab_size
    prefill = {"keys and values": rows * row.prompt_cache, "prefill or logits": rows * row.prefill + layer}
    decode = {"keys and values": rows * row.cache, "prefill or logits": rows * (row.decode + logits) + layer}
    return max(prefill, decode, key=lambda parts: sum(parts.values()))


def _truncates(config: GRPOConfig) -> bool:
    return config.top_p < 1 or config.top_k > 0 or bool(config.min_p)


@dataclass(frozen=True)
class Ran:
    """Bytes of activations of the layers that ran."""

    kept: int  # what the backward of the largest micro-batch waits with
    peak: int  # at the peak of its forward and backward
    inference: int  # at the peak of its forward without a backward
    prefill: int  # the same for a batch of prompts


@dataclass(frozen=True)
class Generated:
    """Bytes of a row in transformers' generate: its cache at the end of the prompt and in full, and what is besides."""

    prompt_cache: int
    prefill: int
    cache: int
    decode: int  # one more token


@dataclass(frozen=True)
class Traced:
    """What building a model and running its layers shows, for the whole of it."""

    resident: dict[str, int]
    adapter_sizes: tuple[int, ...]  # numbers in each trained parameter
    largest_linear: int  # numbers in the largest 4-bit layer
    ran: Ran
    padded: str | None  # as in Forecast
    generated: Generated | None  # where it is padded

    @property
    def adapter_numbers(self) -> int:
        return sum(self.adapter_sizes)


def _trace(key: "_Key", config: GRPOConfig) -> Traced:
    # Only what the activations depend on, so that trying other settings costs nothing.
    fields = (
        "num_generations prompts_per_step max_completion_length max_prompt_length token_budget padding_free tiled_mlp "
        "gradient_checkpointing activation_offloading offload_embedding load_in_4bit bf16 fp16 beta trust_remote_code"
    )
    return _traced(key, tuple((name, getattr(config, name)) for name in fields.split()))


@dataclass(frozen=True)
class _Key:
    """A model's configuration and its adapter's, that a cache can look up."""

    model: PreTrainedConfig
    adapter: PeftConfig

    def text(self) -> str:
        adapter = json.dumps(self.adapter.to_dict(), default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        return self.model.to_json_string() + adapter

    def __hash__(self) -> int:
        return hash(self.text())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text() == other.text()


@cache
def _traced(key: _Key, settings: tuple[tuple[str, Any], ...]) -> Traced:
    config = GRPOConfig(**dict(settings))
    try:
        whole = _skeleton(key, config.compute_dtype, config.trust_remote_code)
        padded = _why_padded(whole, config)
        config = replace(config, padding_free=config.padding_free and not padded)
        generated = _generate(whole, config) if padded else None
        return Traced(*_resident(whole, config), _run_layers(whole, config), padded, generated)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever foreign code raises where its tensors have no memory
        message = f"the memory of a {key.model.model_type!r} model cannot be predicted: {in_a_line(error)}"
        raise ValueError(message) from error


@lru_cache(maxsize=4)
def _skeleton(key: _Key, compute_dtype: str, trust_remote_code: bool) -> PeftModel:
    """The model with its adapter, all of its layers, on the device that has no memory."""
    adapter = copy.copy(key.adapter)
    # One that is continued is trained again, and what its values are is no matter.
    adapter.inference_mode, adapter.init_lora_weights = False, True  # type: ignore[attr-defined]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            copy.deepcopy(key.model), dtype=getattr(torch, compute_dtype), trust_remote_code=trust_remote_code
        )
        return add_adapter(base.requires_grad_(False), adapter)


def _why_padded(whole: PeftModel, config: GRPOConfig) -> str | None:
    """Why a model's rows can neither be packed nor sampled by the engine, as far as shows without values; or None."""
    reason = refusal(whole.get_base_model())
    if reason is not None:
        return reason
    with _fake_policy(whole, tuple(sorted(set(_kinds(whole)))), config) as policy:
        try:
            _inference(policy, _prompts(policy, 8, 1, padding_free=True))
        except UnknownAttention as error:
            return in_a_line(error)
    return None


def _run_layers(whole: PeftModel, config: GRPOConfig) -> Ran:
    """What all layers take, from runs of 2 and 3 of each kind, and of 2 of all kinds."""
    kinds = _kinds(whole)

    @cache
    def run(*chosen: int) -> Ran:
        with _fake_policy(whole, chosen, config) as policy:
            return _run(policy, config)

    if len(kinds) <= 2:  # as it is: the first layer, whose input has no gradient, keeps less than the others
        return run(*range(len(kinds)))
    distinct = sorted(set(kinds))
    all_kinds = run(*(kind for kind in distinct for _ in range(2)))
    # What one more layer of a kind keeps, and what it takes besides while it is at work.
    keeps = {kind: run(kind, kind, kind).kept - run(kind, kind).kept for kind in distinct}
    works = {kind: run(kind, kind, kind).peak - run(kind, kind, kind).kept for kind in distinct}
    common = all_kinds.kept - 2 * sum(keeps.values())
    if config.activation_offloading:  # the inputs of two layers are on the device at a time
        kept = common + 2 * max(keeps.values())
        peak = kept + max(works.values())
    else:
        below = list(accumulate(keeps[kind] for kind in kinds))
        kept = common + below[-1]
        # While a layer is at work in the backward, those below it wait.
        peak = common + max(waiting + works[kind] for waiting, kind in zip(below, kinds, strict=True))
    return replace(all_kinds, kept=kept, peak=peak)


def _kinds(whole: PeftModel) -> list[int]:
    """For each layer the first that is like it: of the same modules, parameters and attention."""
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
        shapes = [(k, tuple(p.shape), p.requires_grad) for k, p in module.named_parameters(recurse=False)]
        modules.append((name, type(module), tuple(map(repr, simple)), tuple(shapes)))
    return tuple(modules)


def _text_config(whole: PeftModel) -> Any:
    return whole.get_base_model().config.get_text_config()  # type: ignore[union-attr]


def _layers(whole: PeftModel) -> nn.ModuleList:
    """Raises ValueError where a model has no list of its layers."""
    base: Any = whole.get_base_model()
    count = _text_config(whole).num_hidden_layers
    for module in base.get_decoder().children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"the memory of a {base.config.model_type!r} model cannot be predicted: its layers are not in one list"
    )


@contextlib.contextmanager
def _fake_policy(whole: PeftModel, chosen: tuple[int, ...], config: GRPOConfig) -> Iterator[Policy]:
    """A policy of the chosen layers, each a copy, whose tensors have no memory; inside, neither has any new one."""
    adapted = _with_layers(whole, chosen)
    # A GPU's settings change what the device holds, and not what is computed.
    config = replace(config, use_liger_kernel=False, offload_embedding=False, activation_offloading=False)
    if config.fp16:  # of the same size, and more operations have a fake of it
        config = replace(config, fp16=False)
    dtype = getattr(torch, config.compute_dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _unpacked_rows():
        for module in adapted.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=torch.float32 if parameter.requires_grad else dtype)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        adapted.get_base_model().tie_weights()  # type: ignore[operator]
        equip(adapted, config)
        yield Policy(adapted, SimpleNamespace(eos_token_id=0, pad_token_id=0), dtype)


@contextlib.contextmanager
def _unpacked_rows() -> Iterator[None]:
    """Where it cannot read positions, transformers takes rows for packed ones: a mask, and keys repeated to suit it."""
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # type: ignore[assignment]
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


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
    adapted = copy.deepcopy(whole, {**shared, id(layers): nn.ModuleList(copies)})
    text = _text_config(adapted)
    text.num_hidden_layers = len(chosen)
    if "layer_types" in vars(text) and text.layer_types:
        text.layer_types = [text.layer_types[i] for i in chosen]
    return adapted


def _run(policy: Policy, config: GRPOConfig) -> Ran:
    prompt = _prompt_tokens(config)
    batch = _largest_micro_batch(policy, config)
    kept, peak = _activations(policy, batch)
    inference = _inference(policy, batch) if config.beta else 0
    count = max(1, min(config.token_budget // prompt, config.prompts_per_step))
    return Ran(kept, peak, inference, _inference(policy, _prompts(policy, prompt, count, config.padding_free)))


def _prompts(policy: Policy, tokens: int, count: int, padding_free: bool) -> MicroBatch:
    given: dict[str, Any] = dict(token_budget=10**9, pad_token_id=0, device=policy.device, padding_free=padding_free)
    (batch,) = pack([[0] * tokens] * count, [[0]] * count, **given)
    return batch


def _largest_micro_batch(policy: Policy, config: GRPOConfig) -> MicroBatch:
    """As the trainer packs a step: of completions of full length, or of shorter ones that fill the budget better."""
    prompt = _prompt_tokens(config)
    found = [
        next(
            pack(
                [[0] * prompt] * config.prompts_per_step,
                [[0] * length] * (config.prompts_per_step * config.num_generations),
                token_budget=config.token_budget,
                pad_token_id=0,
                device=policy.device,
                num_generations=config.num_generations,
                padding_free=config.padding_free,
            )
        )
        for length in {max(1, config.max_completion_length // part) for part in (1, 2, 4, 8)}
    ]
    return max(found, key=lambda batch: batch.input_ids.numel())


def _activations(policy: Policy, batch: MicroBatch) -> tuple[int, int]:
    """(bytes kept between forward and backward, bytes at the peak), the gradients of the adapters not counted."""
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    with Live(policy.model) as live:
        rows = policy.hidden_states(batch)
        upstream = torch.zeros_like(rows)  # the head makes it while it computes the log-probabilities
        kept = live.now - rows.nbytes  # rows are gone as soon as there are log-probabilities
        rows.backward(upstream)
    return kept, live.peak


def _inference(policy: Policy, batch: MicroBatch) -> int:
    with policy.as_reference(), Live(policy.model) as live:
        policy.hidden_states(batch)
    return live.peak


def _generate(whole: PeftModel, config: GRPOConfig) -> Generated:
    """From two layers of each kind, with a mask, as where prompts are of uneven lengths."""
    kinds, prompt = _kinds(whole), _prompt_tokens(config)
    chosen = tuple(kind for kind in sorted(set(kinds)) for _ in range(2))

    def forward(tokens: int, before: int = 0, cache: Any = None) -> tuple[int, int, Any]:
        """(bytes of the whole model's cache, the others at the peak, the cache)"""
        mask = torch.ones(1, before + tokens, dtype=torch.long)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with policy.inference(), policy.autocast(), Live(policy.model) as live:
            out = policy.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        layers = [[x for x in tree_leaves(vars(y)) if isinstance(x, Tensor)] for y in out.past_key_values.layers]
        sizes = [sum(x.nbytes for x in held) for held in layers]
        return sum(sizes[chosen.index(kind)] for kind in kinds), live.peak - sum(sizes), out.past_key_values

    with _fake_policy(whole, chosen, config) as policy:
        prompt_cache, prefill, _ = forward(prompt)
        tokens = prompt + config.max_completion_length - 1  # the last one's keys and values are never asked for
        cache, _, filled = forward(tokens)
        _, decode, _ = forward(1, tokens, filled)
    return Generated(prompt_cache, prefill, cache, decode)


class Live(TorchDispatchMode):
    """Counts the bytes of storages while they live, but for those of a model's parameters, gradients and buffers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, tuple[int, weakref.ref]] = {}
        given = [*model.parameters(), *model.buffers()]
        for tensor in [*given, *(p.grad for p in given if p.grad is not None)]:
            self._know(tensor, 0)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        tree_map_only(Tensor, self._see, out)
        return out

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


def _resident(whole: PeftModel, config: GRPOConfig) -> tuple[dict[str, int], tuple[int, ...], int]:
    """Bytes of the weights by kind, the numbers in each trained parameter, those in the largest 4-bit layer."""
    base: Any = whole.get_base_model()
    size = getattr(torch, config.compute_dtype).itemsize
    quantized, largest, counted = 0, 0, set()
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if type(module) is nn.Linear and module is not head and "lora_" not in name and config.load_in_4bit:
            quantized += nf4_bytes(module.weight.numel())
            largest = max(largest, module.weight.numel())
            counted.add(id(module.weight))
    adapters = [p for p in whole.parameters() if p.requires_grad]
    counted |= {id(p) for p in adapters}
    away = id(base.get_input_embeddings().weight) if config.offload_embedding else None
    others = {id(p): size * p.numel() for p in whole.parameters() if id(p) not in counted and id(p) != away}
    resident = {
        "4-bit linear layers": quantized,
        "embedding, head and the rest": sum(others.values()) + sum(b.nbytes for b in whole.buffers()),
        "adapters": sum(4 * p.numel() for p in adapters),
    }
    return resident, tuple(p.numel() for p in adapters), largest


def nf4_bytes(numbers: int) -> int:
    """Of a bitsandbytes weight in NF4 with double quantization: codes, a scale for 64, and a scale of those for 256."""
    scales = math.ceil(numbers / 64)
    return math.ceil(numbers / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def _state_bytes(config: GRPOConfig, sizes: tuple[int, ...]) -> int:
    if config.optim.startswith("paged"):
        return 0
    if config.optim == "adamw_8bit":
        return sum(2 * n + 8 * math.ceil(n / 256) if n >= 4096 else 8 * n for n in sizes)
    return sum(8 * n for n in sizes)


def _prompt_tokens(config: GRPOConfig) -> int:
    return config.max_prompt_length or PROMPT_TOKENS


def _longest(config: GRPOConfig) -> int:
    return _prompt_tokens(config) + config.max_completion_length


def _rollout_tokens(config: GRPOConfig, shared: bool) -> int:
    """Of keys and values, were everything sampled at once."""
    if not shared:
        return _step_tokens(config)
    return config.prompts_per_step * (_prompt_tokens(config) + config.num_generations * config.max_completion_length)


def _step_tokens(config: GRPOConfig) -> int:
    return config.prompts_per_step * config.num_generations * _longest(config)


def _in_words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def as_dict(found: Plan) -> dict[str, Any]:
    """For JSON: bytes throughout."""
    return {
        "resident": found.forecast.resident, "phases": found.forecast.phases, "peaks": found.forecast.peaks(),
        "peak": found.forecast.peak(), "prompt_tokens": found.prompt_tokens, "assumptions": found.assumptions,
        "budget": found.budget, "fits": found.remedy is None,
        "changes": [asdict(change) for change in found.changes], "remedy": found.remedy,
    }  # fmt: skip


def as_text(found: Plan) -> str:
    """A table for people, and what the plan chose."""
    peaks = found.forecast.peaks()
    lines = [f"{'resident throughout':<34}{_in_words(sum(found.forecast.resident.values())):>12}"]
    lines += [f"  {name:<32}{_in_words(size):>12}" for name, size in found.forecast.resident.items()]
    for phase, parts in found.forecast.phases.items():
        lines.append(f"{f'at the peak of the {phase}':<34}{_in_words(peaks[phase]):>12}")
        lines += [f"  {name:<32}{_in_words(size):>12}" for name, size in parts.items()]
    lines.append("")
    lines += found.assumptions
    lines.append(f"Predicted peak: {found.forecast.peak() / 10**9:.2f} GB, in the {found.forecast.largest_phase()}.")
    lines += [f"Set {change.name}={change.value}: {change.reason}." for change in found.changes]
    if found.budget is not None:
        within = "This fits" if found.remedy is None else "This does not fit"
        lines.append(f"{within} {found.budget / 10**9:g} GB{'' if found.remedy is None else f'; {found.remedy}'}.")
    return "\n".join(lines)
