"""The peak memory of each phase, predicted from a model's configuration, and settings that fit a budget.

The layers' activations are not written down as formulas, which would go stale: trace.py runs the training code.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import SamplingFields
from lowmem_grpo.config.sft import ASSUMED_LENGTH
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.distributed import alone, world_size
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.shape import PAGE, StoreShape, state_tokens, store_shape, token_bytes
from lowmem_grpo.generate.step import POSITIONS, RANK
from lowmem_grpo.kernels.decode_attention import scratch_bytes
from lowmem_grpo.kernels.linear_logprobs import default_chunks
from lowmem_grpo.kernels.nf4_product import default_splits
from lowmem_grpo.model.adapters import lora_config
from lowmem_grpo.model.head_8bit import has_untied_head
from lowmem_grpo.model.layer_shapes import LayerShape
from lowmem_grpo.model.offload import TILE_TOKENS, token_embeddings
from lowmem_grpo.model.teacher import FoundTeacher, as_teacher
from lowmem_grpo.planner.trace import PROMPT_TOKENS, Key, Ran, Traced, few_tokens_bytes, prompt_tokens, skeleton, trace
from lowmem_grpo.update.optimizer import state_bytes

CONTEXT_BYTES = 512 * 2**20  # of CUDA, its libraries and their workspaces: an estimate
PROCESSORS = 192  # more than a card has: with more of them a product has more parts
OF_SLOTS, OF_PROMPTS = "states of completions", "states of prompts"  # of layers that keep one
STEP_SIZES = {"sft": "examples_per_step", "reward": "pairs_per_step"}  # by kind; of others prompts_per_step
# What a plan may change, as it lets go of it again: as _changes() has it from its end, but graphs before more slots.
COSTLIEST_FIRST = (
    "load_head_in_8bit", "offload_embedding", "rollout_kv", "activation_offloading", "tiled_mlp", "optim",
    "gradient_checkpointing", "token_budget", "rollout_cuda_graphs", "rollout_token_budget", "rollout_weights",
    "rollout_graphs_last",
)  # fmt: skip
SPARE = 0.03  # of a budget, for what torch's allocator holds beyond what is allocated: an estimate


@dataclass(frozen=True)
class Forecast:
    """Bytes on the device, by name: resident ones, and those that each phase adds at its peak."""

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    padded: str | None = None  # why it is trained on padded rows and sampled from by transformers' generate
    state_tokens: int = 0  # as many tokens' keys and values take what a completion's states take

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

    config: Any  # the training's
    forecast: Forecast
    budget: int | None
    changes: list[Change]
    longest: int  # tokens of the longest prompt, or of the longest example
    assumptions: list[str]  # sentences
    remedy: str | None = None  # what would have to change besides; None where everything fits
    ranks: int = 1  # processes that share a step, each with the forecast's bytes on a device of its own


def plan(
    model: PreTrainedConfig,
    config: TrainingConfig,
    adapter: PeftConfig | None = None,  # the one that is trained, where not config's lora fields say it
    longest: int | None = None,  # tokens of the longest prompt, or example; None where none is known yet
    rewards: Sequence[PeftConfig] = (),  # reward adapters on the policy's own base
    teacher: FoundTeacher | None = None,
    ranks: int | None = None,  # processes that share a step; by default those of this run
) -> Plan:
    """The cheapest settings with which every phase stays within vram_budget; config's own where they fit."""
    ranks = ranks or world_size()
    key = Key(model, adapter or lora_config(config), tuple(rewards), teacher)
    name, assumed = ("max_prompt_length", PROMPT_TOKENS) if config.samples else ("max_length", ASSUMED_LENGTH)
    given = getattr(config, name)
    # Within here, that is the length which is planned for.
    planned = longest or given or assumed
    of_step = STEP_SIZES.get(config.kind, "prompts_per_step")
    whole, share = getattr(config, of_step), _share(config, ranks)
    chosen, found, changes = _fit(key, replace(config, **{name: planned, of_step: share}))
    budget, assumptions, remedy = config.vram_budget_bytes, [], None
    if ranks > 1:
        assumptions.append(f"Each of {ranks} processes has a device of its own and {share} of {of_step}={whole}.")
    if found.padded:
        trained = ["trained on padded rows"] if "update" in found.phases else []
        sampled = ["sampled from by transformers' generate"] if config.samples else []
        assumptions.append(f"{', '.join(trained + sampled).capitalize()}: {found.padded}.")
    if longest is None:
        what = {"sft": "example", "reward": "text of a pair"}.get(config.kind, "prompt")
        set_to = "none" if given is None else planned
        assumptions.append(f"The longest {what} is assumed to have {planned} tokens: {name} is {set_to}.")
    if budget is not None and not _fits(found, budget):
        remedy = _remedy(key, chosen, found, budget, asks_for_tiles=config.tiled_mlp)
    chosen = replace(chosen, **{name: given, of_step: whole})
    return Plan(chosen, found, budget, changes, planned, assumptions, remedy, ranks)


def _share(config: Any, ranks: int) -> int:
    """The most prompts, examples or pairs of a step that one of several processes has."""
    parts = getattr(config, "steps_per_generation", 1)
    return parts * math.ceil(config.prompts_per_step / parts / ranks)


def plan_to_fit(
    model: PreTrainedConfig, config: TrainingConfig, adapter: PeftConfig | None = None, longest: int | None = None,
    rewards: Sequence[PeftConfig] = (), teacher: FoundTeacher | None = None,
) -> Plan:  # fmt: skip
    """The plan of a run. Raise InputError, with the remedy, where nothing fits."""
    found = plan(model, config, adapter, longest, rewards, teacher)
    if found.remedy is not None:
        peak = f"{found.forecast.peak() / 10**9:.2f} GB"
        raise InputError(
            f"vram_budget={config.vram_budget} is too little, the predicted peak is {peak}; {found.remedy}"
        )
    return found


@contextlib.contextmanager
def limit_memory(found: Plan | None, device: torch.device) -> Iterator[None]:
    """Have torch allocate no more than the plan's budget inside the `with`, CUDA's context not counted."""
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


def for_evaluation(found: Plan | None, config: GRPOConfig) -> GRPOConfig:
    """The configuration for an evaluation, with no more keys and values than the plan's training step has."""
    if found is None:
        return config
    share = replace(config, prompts_per_step=_share(config, found.ranks))
    tokens = share.prompts_per_step * (found.longest + config.num_generations * config.max_completion_length)
    tokens += _num_states(share) * found.forecast.state_tokens
    return replace(config, rollout_token_budget=min(config.rollout_token_budget, tokens))


def _fit(key: Key, config: Any) -> tuple[Any, Forecast, list[Change]]:
    budget, changes, asked = config.vram_budget_bytes, {}, config
    found = _forecast(key, config)
    while not _fits(found, budget):
        for change in _changes(key, config, found):
            changed = replace(config, **{change.name: change.value})
            try:
                found = _forecast(key, changed)
            except InputError:  # not for this model
                continue
            config, changes[change.name] = changed, change
            break
        else:
            return config, found, list(changes.values())
    if changes:
        config, found = _eased(key, asked, config, found, changes)
    return config, found, list(changes.values())


def _eased(key: Key, asked: Any, config: Any, found: Forecast, changes: dict[str, Change]) -> tuple[Any, Forecast]:
    """Let go of what later savings have made needless, the costliest first, and raise what was lowered too far.

    Each was chosen while the largest phase was too large, before there was room for it by other means.
    """
    budget = config.vram_budget_bytes

    def try_(name: str, value: Any) -> bool:
        nonlocal config, found
        try:
            tried = replace(config, **{name: value})
            forecast = _forecast(key, tried)
        except InputError:  # not beside what else was chosen
            return False
        if not _fits(forecast, budget):
            return False
        config, found = tried, forecast
        return True

    for name in [name for name in COSTLIEST_FIRST if name in changes]:
        if try_(name, getattr(asked, name)):
            del changes[name]
            continue
        if name == "token_budget":  # each trial runs layers anew
            while 2 * config.token_budget < asked.token_budget and try_(name, 2 * config.token_budget):
                pass
        elif name == "rollout_token_budget":
            low, high = config.rollout_token_budget // PAGE, asked.rollout_token_budget // PAGE + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if try_(name, middle * PAGE) else (low, middle)
        changes[name] = replace(changes[name], value=getattr(config, name))
    return config, found


def _fits(found: Forecast, budget: int | None) -> bool:
    return budget is None or found.peak() <= (1 - SPARE) * budget


def _changes(key: Key, config: TrainingConfig, found: Forecast) -> Iterator[Change]:
    """Changes that would make the largest phase smaller, the least costly first."""
    phase, longest = found.largest_phase(), _longest(config)
    if isinstance(config, GRPOConfig):
        yield from _changes_of_sampling(config, found)
    if config.token_budget > longest:
        halved = max(longest, min(config.token_budget, _step_tokens(config)) // 2)
        yield Change("token_budget", halved, "smaller micro-batches, and more of them")
    learns = phase in ("update", "critic")
    if learns and not config.gradient_checkpointing:
        yield Change("gradient_checkpointing", True, "activations are computed again, a third more work in the update")
    if config.optim in ("adamw_torch", "adamw_torch_fused") and "optimizer state" in found.resident:
        yield Change("optim", "adamw_8bit", "a quarter of the optimizer's state")
    if phase != "rollout" and not config.tiled_mlp and longest > TILE_TOKENS:
        yield Change("tiled_mlp", True, "MLPs a tile at a time, computed once more in the update")
    if learns and config.gradient_checkpointing and not config.activation_offloading:
        yield Change("activation_offloading", True, "checkpoints go to CPU memory and back")
    if phase == "rollout" and isinstance(config, GRPOConfig) and config.rollout_kv == "full" and not found.padded:
        yield Change("rollout_kv", "int8", "keys and values in half the memory, rounded")
    base = _skeleton(key, config).get_base_model()
    if not config.offload_embedding and token_embeddings(base):
        uncaptured = ", and no decoding step is captured" if config.samples else ""
        yield Change("offload_embedding", True, f"the embedding is looked up in CPU memory{uncaptured}")
    if not config.load_head_in_8bit and has_untied_head(base):
        yield Change("load_head_in_8bit", True, "the head in half the memory, rounded")


def _changes_of_sampling(config: GRPOConfig, found: Forecast) -> Iterator[Change]:
    """Changes that make the memory of sampling smaller and change no result."""
    phase, longest = found.largest_phase(), _longest(config)
    if phase != "rollout" and config.has_lasting_graphs and not found.padded:
        yield Change("rollout_graphs_last", False, "the memory of captured steps is the rollout's alone")
    if phase == "rollout" and found.phases[phase].get("dense weights"):
        yield Change("rollout_weights", "4bit", "no copy of the weights to sample from")
    if phase == "rollout" and config.has_cuda_graphs and not found.padded:
        yield Change("rollout_cuda_graphs", False, "no memory of their own for captured steps")
    if phase == "rollout" and config.rollout_token_budget > longest:
        needed = _rollout_tokens(config, shared=not found.padded) + _num_states(config) * found.state_tokens
        halved = max(longest, min(config.rollout_token_budget, needed) // 2)
        yield Change("rollout_token_budget", halved, "fewer completions are sampled at once")


def _remedy(key: Key, config: TrainingConfig, found: Forecast, budget: int, *, asks_for_tiles: bool) -> str:
    """The smallest change of the task that would fit: shorter completions, else shorter prompts, or examples."""
    resident = sum(found.resident.values())
    if resident > budget:
        return f"the model and CUDA alone take {resident / 10**9:.2f} GB: choose a smaller model"

    def with_everything(**lengths: int) -> Forecast:
        """The forecast with every change that a plan could choose, which of short texts tiles are not."""
        changed = replace(config, **lengths)
        budgets = {
            name: _longest(changed) for name in ("token_budget", "rollout_token_budget") if hasattr(config, name)
        }
        tiles = asks_for_tiles or (changed.tiled_mlp and _longest(changed) > TILE_TOKENS)
        return _forecast(key, replace(changed, tiled_mlp=tiles, **budgets))

    if config.samples:
        short = {"max_completion_length": min(64, config.max_completion_length)}
        shortest = {**short, "max_prompt_length": min(64, config.max_prompt_length or 64)}
        tries = (("max_completion_length", {}), ("max_prompt_length", {}), ("max_prompt_length", short))
    else:
        shortest = {"max_length": min(64, _longest(config))}
        tries = (("max_length", {}),)
    for name, besides in tries:
        # In multiples of 32: the largest length that fits is at least 32 low, and below 32 high.
        low, high = 1, math.ceil(getattr(config, name) / 32)
        while high - low > 1:
            middle = (low + high) // 2
            fits = _fits(with_everything(**besides, **{name: 32 * middle}), budget)
            low, high = (middle, high) if fits else (low, middle)
        if low > 1:
            return f"{_in_settings({**besides, name: 32 * low})} would fit"
    needed = math.ceil(with_everything(**shortest).peak() / 10**8) / 10
    return f"not even {_in_settings(shortest)} would fit, it takes {needed:.1f} GB: choose a smaller model"


def _in_settings(values: dict[str, int]) -> str:
    return " and ".join(f"{name}={value}" for name, value in values.items())


def forecast(
    model: PreTrainedConfig, config: TrainingConfig, adapter: PeftConfig | None = None,
    teacher: FoundTeacher | None = None,
) -> Forecast:  # fmt: skip
    """The peak of each phase, in parts. Nothing is downloaded or allocated."""
    return _forecast(Key(model, adapter or lora_config(config), teacher=teacher), config)


@alone()  # what is traced is one process's
def _forecast(key: Key, config: TrainingConfig) -> Forecast:
    text = key.model.get_text_config()
    dtype = getattr(torch, config.compute_dtype)
    traced = trace(key, config)
    resident = {
        **traced.resident,
        "gradients": 4 * traced.adapter_numbers,
        "optimizer state": state_bytes(config.optim, traced.adapter_sizes),
        **({} if config.use_cpu else {"CUDA and its libraries": CONTEXT_BYTES}),
    }
    head = (2 if config.has_entropy_bonus else 1) * _head_bytes(text, config)
    if config.kind == "reward":  # of each text's last token, in fp32, its state and that one's gradient
        head = 8 * text.hidden_size * 2 * config.prompts_per_step
        resident["score head"] = 8 * text.hidden_size + state_bytes(config.optim, [text.hidden_size])
    layer = dtype.itemsize * traced.largest_linear if config.load_in_4bit else 0  # bitsandbytes dequantizes a whole one
    without_gradient = {"activations": traced.ran.inference, "head": head, "one dequantized layer": layer}
    worn = {**without_gradient, "activations": traced.ran.worn}  # with an adapter
    update = {
        "activations kept": traced.ran.kept,
        "one layer at work": traced.ran.peak - traced.ran.kept,
        "head": head,
        "one dequantized layer": layer,
    }
    if not isinstance(config, GRPOConfig):
        return Forecast(resident, {"update": update, "evaluation": worn}, traced.padded)
    of_adapter = config.reference == "initial" or config.sync_ref_model
    if of_adapter:
        resident["the reference's adapter"] = 4 * traced.adapter_numbers
    rollout, lasting = _rollout_bytes(key, config, traced, layer)
    resident |= lasting
    worth = _state_tokens(traced, config)
    if not config.learns:
        del resident["gradients"], resident["optimizer state"]
        return Forecast(resident, {"rollout": rollout}, traced.padded, worth)
    phases = {"rollout": rollout, "reference": worn if of_adapter else without_gradient, "update": update}
    if config.has_old_pass:
        phases["old"] = worn
    if config.beta == 0:
        del phases["reference"]
    if key.rewards:
        resident["reward adapters"] = sum(
            4 * (numbers + text.hidden_size) for numbers in _numbers_of_rewards(key, config)
        )
        scored = trace(key, replace(config, beta=1.0)).ran.worn  # a pass over the completions, as an old one's
        phases["reward"] = {"activations": scored, "one dequantized layer": layer}
    if config.has_critic:
        numbers = traced.adapter_numbers + text.hidden_size  # with a score head
        resident["the critic"] = 4 * numbers
        resident["the critic's optimizer state"] = state_bytes(config.optim, (*traced.adapter_sizes, text.hidden_size))
        values, update = _critic_bytes(traced.ran, dtype, config.has_entropy_bonus)
        phases["values"] = {**values, "one dequantized layer": layer}
        phases["critic"] = {**update, "one dequantized layer": layer, "the critic's gradients": 4 * numbers}
    if key.teacher is not None:
        held, phases["teacher"] = _teacher_bytes(key, config, worn)
        resident |= held
    return Forecast(resident, phases, traced.padded, worth)


def _rollout_bytes(key: Key, config: GRPOConfig, traced: Traced, layer: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a rollout, and of what it leaves for the next one; `layer` are those of a dequantized one."""
    dtype, lasting = getattr(torch, config.compute_dtype), {}
    # "auto" is dense on a CPU, where memory allows and the engine samples.
    auto = config.rollout_weights == "auto" and config.use_cpu and not traced.padded
    dense = config.rollout_weights == "dense" or auto
    count = _generate_bytes if traced.padded else _engine_bytes
    rollout = count(key, config, traced, 0 if dense else layer)
    if dense:
        rollout["dense weights"] = traced.dense
    adapters = dtype.itemsize * traced.adapter_numbers
    # Steps by an outline: ranks are filled up, and rotations stay. Layers that keep a state have none.
    if not config.use_cpu and not traced.padded and not traced.states.held:
        rank = key.adapter.r  # type: ignore[attr-defined] # a LoraConfig's
        adapters = adapters * math.ceil(rank / RANK) * RANK // rank
        positions = math.ceil(_longest(config) / POSITIONS) * POSITIONS
        largest = max(one.head_dim for one in traced.layers.values())
        lasting["cosines and sines"] = 2 * positions * largest * dtype.itemsize
    rollout["adapters in the compute dtype"] = adapters
    if config.has_lasting_graphs and not traced.padded:
        for name in ("captured steps", "adapters in the compute dtype", *([OF_SLOTS] if traced.states.held else [])):
            lasting[name] = rollout.pop(name)
    return rollout, lasting


def _numbers_of_rewards(key: Key, config: GRPOConfig) -> Iterator[int]:
    """How many numbers each reward adapter has, its score head apart."""
    for reward in key.rewards:
        whole = _skeleton(Key(key.model, reward), config)
        yield sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)


def _skeleton(key: Key, config: TrainingConfig) -> Any:
    return skeleton(key, config.compute_dtype, config.trust_remote_code, config.load_in_4bit)


def _head_bytes(text: PreTrainedConfig, config: TrainingConfig) -> int:
    """Bytes of the head's scores and pull, in tiles as of a card of the budget's size."""
    kind = "cpu" if config.use_cpu else "cuda"
    tokens, entries = default_chunks(kind, (config.vram_budget_bytes or 0) / 2**30, text.hidden_size)
    scratch = 4 * tokens * (entries + text.hidden_size)
    if not config.load_head_in_8bit:
        return scratch
    # A tile of the head and the labels' rows, rounded to 16 bits, the latter from int8 by way of fp32.
    size = getattr(torch, config.compute_dtype).itemsize
    return scratch + text.hidden_size * (size * entries + (size + 5) * tokens)


def _teacher_bytes(key: Key, config: GRPOConfig, worn: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a teacher holds throughout, and those that its pass adds, by name."""
    teacher = key.teacher
    assert teacher is not None
    if teacher.model is None:
        numbers = 0 if teacher.adapter is None else trace(Key(key.model, teacher.adapter), config).adapter_numbers
        return ({"the teacher's adapter": 4 * numbers} if numbers else {}), worn
    adapter, own = teacher.adapter, as_teacher(teacher.name, config)
    assert adapter is not None
    traced = trace(Key(teacher.model, adapter), own)
    layer = getattr(torch, config.compute_dtype).itemsize * traced.largest_linear if config.load_in_4bit else 0
    head = _head_bytes(teacher.model.get_text_config(), own)
    held = {f"the teacher's {name}": size for name, size in traced.resident.items()}
    return held, {"activations": traced.ran.inference, "head": head, "one dequantized layer": layer}


def _critic_bytes(ran: Ran, dtype: torch.dtype, has_entropy_bonus: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of activations of the critic's values and of its update, from those of the policy's passes.

    Its score head has no logits. It scores hidden states in fp32, and keeps these until their gradient is there. While
    layers are at work it holds neither hidden states nor their gradient, as the policy's pass does.
    """
    in_fp32 = 4 * ran.rows // dtype.itemsize
    kept = ran.kept - (2 if has_entropy_bonus else 1) * ran.rows  # less the gradients that the policy's head makes
    at_work = ran.peak - ran.kept - ran.rows  # of a layer, less the hidden states that the policy's passes hold
    values = {"activations": max(ran.worn, ran.rows + in_fp32)}
    return values, {"activations kept": kept, "a layer or the score head": max(at_work, 2 * in_fp32)}


def _engine_bytes(key: Key, config: GRPOConfig, traced: Traced, layer: int) -> dict[str, int]:
    text = key.model.get_text_config()
    dtype = _kv_dtype(config)
    shape = store_shape(
        prompt_tokens=prompt_tokens(config), num_prompts=config.prompts_per_step,
        num_generations=config.num_generations, max_completion_length=config.max_completion_length,
        budget_tokens=config.rollout_token_budget, paged=config.rollout_paged and not config.use_cpu,
        state_tokens=_state_tokens(traced, config),
    )  # fmt: skip
    # fp32 logits, and where they are truncated transformers' sorted copies, their indices, softmax and cumulative sum.
    # A repetition penalty has a copy of its own, and with a truncation two more for what that leaves.
    copies = (7 if _truncates(config) else 1) + (0 if config.repetition_penalty == 1 else 3)
    logits = 4 * shape.slots * text.vocab_size * copies
    # What a step takes, in a pool of its own: logits, beside a dequantized layer, the parts of the largest product, the
    # sums of attention, the experts of a layer, or the copies that one makes of states.
    parts, states = 4 * shape.slots * _parts(text, traced.layers), traced.states
    sums = shape.slots * _sums_bytes(shape, traced.layers)
    step = shape.slots * (states.captured_step if config.has_cuda_graphs else states.step)
    experts = _experts_bytes(key, config, traced, shape.slots)
    captured = {"captured steps": logits + max(layer, parts, sums, step, experts)}
    most = max(shape.slots, prompt_tokens(config) * config.prompts_per_step)
    return {
        "keys and values": shape.num_tokens() * token_bytes(traced.layers, dtype),
        **({OF_SLOTS: shape.slots * states.held, OF_PROMPTS: shape.prefixes * states.held} if states.held else {}),
        "prefill or logits": max(
            traced.ran.prefill + layer,
            logits,
            step,
            shape.slots * states.start,
            _experts_bytes(key, config, traced, most),
        ),
        **(captured if config.has_cuda_graphs else {}),
    }


def _experts_bytes(key: Key, config: GRPOConfig, traced: Traced, num_tokens: int) -> int:
    """Bytes at the peak of a layer's experts for few tokens, as decoding steps and short prompts have."""
    if config.use_cpu or not traced.choices:
        return 0
    whole = _skeleton(key, config)
    return few_tokens_bytes(whole, num_tokens, traced.choices, getattr(torch, config.compute_dtype))


def _parts(text: PreTrainedConfig, layers: dict[int, LayerShape]) -> int:
    """Number of fp32 parts of a row of the decoding step's largest product."""
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 0
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # Gemma 3n has one a layer
    products = [([inner, inner], hidden), ([hidden], inner)]
    for heads, kv_heads, head_dim, _ in set(layers.values()):
        queries, keys = heads * head_dim, kv_heads * head_dim
        products += [([queries, keys, keys], hidden), ([hidden], queries)]
    return max((default_splits(sizes, K, PROCESSORS) * sum(sizes) for sizes, K in products if sum(sizes)), default=0)


def _sums_bytes(shape: StoreShape, layers: dict[int, LayerShape]) -> int:
    """Bytes of the attention kernel's scratch for a row, in the layer where it is largest."""
    page = shape.page_tokens or shape.slot_tokens
    own_tokens = math.ceil(shape.slot_tokens / page) * page
    return max(
        (scratch_bytes(shape.prefix_tokens, own_tokens, layer.heads, layer.head_dim) for layer in layers.values()),
        default=0,
    )


def _generate_bytes(key: Key, config: GRPOConfig, traced: Traced, layer: int) -> dict[str, int]:
    for name, value in (("rollout_kv", "int8"), ("rollout_weights", "dense")):
        if getattr(config, name) == value:
            raise InputError(f"{name}={value!r} does not serve this model: {traced.padded}; leave it out")
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


def _truncates(config: SamplingFields) -> bool:
    return config.top_p < 1 or config.top_k > 0 or bool(config.min_p)


def _longest(config: TrainingConfig) -> int:
    return prompt_tokens(config) + config.max_completion_length


def _rollout_tokens(config: GRPOConfig, shared: bool) -> int:
    """Number of tokens with keys and values, if all completions are sampled at once."""
    if not shared:
        return _step_tokens(config)
    return config.prompts_per_step * (prompt_tokens(config) + config.num_generations * config.max_completion_length)


def _num_states(config: GRPOConfig) -> int:
    """Number of completions and prompts of a step, each with states where layers keep one."""
    return config.prompts_per_step * (1 + config.num_generations)


def _state_tokens(traced: Traced, config: GRPOConfig) -> int:
    return state_tokens(traced.states.held, token_bytes(traced.layers, _kv_dtype(config)))


def _kv_dtype(config: GRPOConfig) -> torch.dtype:
    return torch.int8 if config.rollout_kv == "int8" else getattr(torch, config.compute_dtype)


def _step_tokens(config: TrainingConfig) -> int:
    return config.prompts_per_step * config.num_generations * _longest(config)


def _in_words(size: int) -> str:
    return f"{size / 10**9:.3f} GB"


def as_dict(found: Plan) -> dict[str, Any]:
    """The plan for JSON, in bytes throughout."""
    longest = {"sft": "example_tokens", "reward": "text_tokens"}.get(found.config.kind, "prompt_tokens")
    return {
        "resident": found.forecast.resident, "phases": found.forecast.phases, "peaks": found.forecast.peaks(),
        "peak": found.forecast.peak(), longest: found.longest, "assumptions": found.assumptions,
        "budget": found.budget, "fits": found.remedy is None,
        "changes": [asdict(change) for change in found.changes], "remedy": found.remedy,
    }  # fmt: skip


def as_text(found: Plan) -> str:
    """The plan for people: a table in GB of 10^9 bytes, and the chosen settings."""
    peaks = found.forecast.peaks()
    lines = [f"{'resident throughout':<34}{_in_words(sum(found.forecast.resident.values())):>12}"]
    lines += [f"  {name:<32}{_in_words(size):>12}" for name, size in found.forecast.resident.items()]
    for phase, parts in found.forecast.phases.items():
        lines.append(f"{f'at the peak of the {phase}':<34}{_in_words(peaks[phase]):>12}")
        lines += [f"  {name:<32}{_in_words(size):>12}" for name, size in parts.items()]
    lines.append("")
    lines += found.assumptions
    lines.append(f"Predicted peak: {_in_words(found.forecast.peak())}, in the {found.forecast.largest_phase()}.")
    lines += [f"Set {change.name}={change.value}: {change.reason}." for change in found.changes]
    if found.budget is not None:
        within = "This fits" if found.remedy is None else "This does not fit"
        lines.append(f"{within} {found.budget / 10**9:g} GB{'' if found.remedy is None else f'; {found.remedy}'}.")
    return "\n".join(lines)
