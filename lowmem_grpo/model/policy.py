"""Policy: one frozen 4-bit base with LoRA adapters. The reference is the same model with the adapters switched off."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.kernels.int8_product import product_int8
from lowmem_grpo.kernels.linear_logprobs import linear_logprobs
from lowmem_grpo.model.adapter_folder import read_adapter_config, read_weights
from lowmem_grpo.model.adapter_names import AdapterNames
from lowmem_grpo.model.adapters import Adapters, active_adapter
from lowmem_grpo.model.attention import attending, configs_of, laid_out, refusal
from lowmem_grpo.model.head import read_head
from lowmem_grpo.model.layer_shapes import LayerShape, layer_shapes
from lowmem_grpo.model.lora import every_module, keep_one_input
from lowmem_grpo.model.mixing import mixers
from lowmem_grpo.model.outline import Unknown
from lowmem_grpo.model.outlined import OutlinedLayers, may_go_by_outline, take_out
from lowmem_grpo.model.outlined_trial import outlined_layers
from lowmem_grpo.model.packed_attention import Packed, flash_serves
from lowmem_grpo.model.packing import MicroBatch
from lowmem_grpo.model.score_head import SCORE, ScoreHead, add_to_folder, config_without_head, without_head
from lowmem_grpo.model.trial import difference_in_parts, difference_when_packed, once_more, refused
from lowmem_grpo.model.turn_end import named_ends, with_turn_end
from lowmem_grpo.warn import warn


class Policy:
    """A language model that completes prompts, and that learns through its adapter alone.

    Other adapters may share the base: add() puts them on it, and wearing() has the layers compute with one of them. An
    adapter may have a score head, which is learnt, saved and loaded with it, as a reward adapter's or a critic's.
    """

    def __init__(self, model: PeftModel, tokenizer, dtype: torch.dtype, names: AdapterNames | None = None):
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.names = names or AdapterNames()  # of adapters' tensors in their files
        self.base: Any = model.get_base_model()  # a PreTrainedModel that generates
        self.adapter, self.adapters = active_adapter(model), Adapters(model)
        self.score_heads: dict[str, ScoreHead] = {}  # by the name of the adapter that each belongs to
        self.decoder: Any = self.base.get_decoder()  # the PreTrainedModel in it that has no head
        self.head = read_head(self.base)
        self.device = self.head.weight.device
        self.eos_token_ids = eos_token_ids(self.base, tokenizer)
        self.pad_token_id = self.eos_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.configs = configs_of(self.base)
        # Entered around each forward: where what it saves for the backward goes.
        self.saved_activations: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.reference: dict[str, Tensor] | None = None  # the adapters of the reference; None: the base without any
        self.varlen = False  # whether packed rows go through flash attention
        self.outlined: OutlinedLayers | None = None  # what computes its layers on packed rows in their place

    def fork_rng(self) -> contextlib.AbstractContextManager[None]:
        """torch's fork_rng(): after the `with` the generators of the CPU and of the policy's device are as before."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The trained parameters of an adapter, in the model's order and by its names, and last its score head."""
        head = self.score_heads.get(name)
        return {**self.adapters.parameters_of(name), **({} if head is None else {SCORE: head.weight})}

    def add(self, name: str, peft_config: LoraConfig | None = None, *, copy_of: str | None = None) -> None:
        """Put one more adapter on the base, without wearing it: fp32, on the base's device, 4 bytes a parameter.

        It starts without effect, as LoRA does, or as a copy of another adapter's values. By default its configuration
        is that of the policy's own adapter.

        Raises:
            InputError: the name is taken, or no adapter of this configuration can be added.
        """
        if peft_config is not None and copy_of is not None:
            raise InputError("peft_config has no effect beside copy_of, whose configuration a copy has; leave it out")
        if peft_config is None:
            peft_config = copy.copy(self.adapters.config_of(copy_of or self.adapter))
            peft_config.init_lora_weights = True
        self.adapters.add(name, peft_config)
        keep_one_input(self.model)
        if self.outlined is not None:  # of linear layers as they were
            take_out(self.decoder)
            self.outlined = self._outlined_layers()
        if copy_of is not None:
            self.adapters.copy(name, copy_of)

    def add_from(self, name: str, folder: str) -> None:
        """Put the adapter in a folder on the base, with its score head where it has one, without wearing it.

        Raises:
            InputError: the name is taken, the folder cannot be read, or its adapter is not one of this base.
        """
        weights, score = without_head(self.names.from_file(read_weights(folder)))
        config: Any = config_without_head(read_adapter_config(folder))
        with self.fork_rng():  # values come from the file
            self.add(name, config)
        own = {path: values.shape for path, values in self.adapter_state(name).items()}
        if own != {path: values.shape for path, values in weights.items()}:
            raise InputError(
                f"the adapter in {folder!r} has other weights than one of {type(self.base).__name__} with the settings "
                "in its adapter_config.json; take the adapter of this model"
            )
        self.load_adapter_state(name, weights)
        if score is not None:
            self.add_score_head(name, seed=0)
            self.score_heads[name].load(score)

    def add_score_head(self, name: str, seed: int) -> None:
        """Give an adapter a new score head, which is drawn without torch's own generator.

        Raises:
            InputError: there is no adapter of that name.
        """
        self.adapters.config_of(name)
        self.score_heads[name] = ScoreHead(self.head.weight.shape[1], self.device, seed)

    @contextlib.contextmanager
    def wearing(self, name: str) -> Iterator[None]:
        """Have the layers compute with an adapter inside the `with`, in training, sampling and recomputation.

        A forward made inside may have its backward outside: what a checkpointed layer wore, it wears again.
        """
        self.adapters.config_of(name)
        with self.adapters.wearing((name,)):
            yield

    def logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Log-probability under temperature of each of the batch's N tokens, (N,) fp32, with its gradient."""
        return linear_logprobs(**self._head_inputs(batch, temperature))

    def logprobs_and_entropy(
        self, batch: MicroBatch, temperature: float, *, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each of the batch's N tokens, (N,) fp32 each.

        The log-probability carries its gradient, the entropy only with entropy_grad.
        """
        inputs = self._head_inputs(batch, temperature)
        return linear_logprobs(**inputs, return_entropy=True, entropy_grad=entropy_grad)

    def scores(self, batch: MicroBatch) -> Tensor:
        """The worn adapter's score of the text before each of the batch's N tokens, (N,) fp32, with its gradient.

        The score of a whole text is that before one more token, any, which is packed after its last.
        """
        (name,) = self.adapters.worn
        return self.score_heads[name](self.hidden_states(batch))

    def logprobs_and_top(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each of the batch's N tokens, (N,) fp32, and whether none is likelier, (N,) bool."""
        return linear_logprobs(**self._head_inputs(batch, 1.0), return_top=True)

    def logprobs_entropy_and_top(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each of the batch's N tokens, (N,) fp32, its entropy, and whether none is likelier.

        The log-probability carries its gradient.
        """
        return linear_logprobs(**self._head_inputs(batch, 1.0), return_entropy=True, return_top=True)

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """The head's input for each of the batch's N tokens, (N, D) in the head's dtype."""
        with self.autocast(), self._laid_out(batch), self.saved_activations():
            places = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
            hidden = self.decoder(input_ids=batch.input_ids, use_cache=False, **places).last_hidden_state  # (R, T, D)
        return hidden.flatten(0, 1).index_select(0, batch.predictors).to(self.head.dtype)

    def _head_inputs(self, batch: MicroBatch, temperature: float) -> dict[str, Any]:
        return dict(
            hidden_states=self.hidden_states(batch), labels=batch.labels, temperature=temperature, **self.head.inputs()
        )  # fmt: skip

    @contextlib.contextmanager
    def _laid_out(self, batch: MicroBatch) -> Iterator[None]:
        """Have the model attend as the batch is packed, or by its own attention where rows are padded."""
        if batch.packing is None:
            yield
            return
        by_outline: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.outlined is not None:
            by_outline = self.outlined.a_pass(batch.packing.longest_key)
        with attending(self.configs), laid_out(Packed(batch.packing, self.varlen)), by_outline:
            yield

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The next token's logits (S, V) of last hidden states (S, D), on a GPU in fp32. For sampling alone."""
        logits, softcap = self.bare_logits(hidden_states), self.head.softcap
        logits = logits if self.head.logit_scale == 1 else logits * self.head.logit_scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def bare_logits(self, hidden_states: Tensor) -> Tensor:
        """The head's product and bias, (S, V), before its scale and softcap."""
        weight, scale, bias = self.head.weight, self.head.scale, self.head.bias
        rows = hidden_states.to(self.head.dtype)
        with torch.autocast(self.device.type, enabled=False):
            if scale is not None:
                logits = product_int8(rows, weight, scale)
            elif rows.is_cuda and rows.dtype != torch.float32:
                logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
            else:
                logits = rows @ weight.t()
        return logits if bias is None else logits + bias

    @cached_property
    def layer_shapes(self) -> dict[int, LayerShape]:
        """Sizes of what each layer that attends calls attention with, by its number. Tried once, on one token."""
        return once_more(partial(layer_shapes, self))

    @cached_property
    def packs(self) -> bool:
        """True where the policy can be trained on packed rows. Tried once, on a few tokens, with a warning."""
        reason = refusal(self.base) or self.state_refusal
        if not reason:
            self.varlen = flash_serves(self.device, self.dtype)
            reason = refused(self, difference_when_packed)
        name = type(self.base).__name__
        if reason and self.varlen:
            warn(f"{name} attends without flash attention, which is slower: {reason}")
            self.varlen = False
            reason = refused(self, difference_when_packed)
        if reason:
            warn(f"{name} is trained on padded rows, which takes more memory: {reason}")
        else:
            self.outlined = self._outlined_layers()
        return not reason

    def _outlined_layers(self) -> OutlinedLayers | None:
        """Checkpointed layers by their outlines, or None. Tried on a few tokens, with a warning."""
        if not may_go_by_outline(self.decoder):
            return None
        try:
            return outlined_layers(self)
        except Unknown as error:
            warn(f"{type(self.base).__name__} is trained by its own layers, which is slower: {error}")
            return None

    @cached_property
    def state_refusal(self) -> str | None:
        """Why a layer with a state does not go on from one as it does within a text, or None. Tried once."""
        return refused(self, difference_in_parts) if mixers(self.base) else None

    def autocast(self) -> torch.autocast:
        """Cast the fp32 adapters to the compute dtype inside each product; the masters stay fp32."""
        enabled = self.dtype != torch.float32
        # Kept, a cast that a checkpointed layer's forward made without a gradient would serve its recomputation too.
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled, cache_enabled=False)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Switch off gradients, dropout and checkpointing inside the `with`; afterwards the training mode is back."""
        was_training = self.model.training
        set_training(self.model, False)
        try:
            with torch.no_grad():
                yield
        finally:
            set_training(self.model, was_training)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Take off all adapters inside the `with`, for inference."""
        with self.inference(), self.adapters.wearing(()):
            yield

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute as the reference inside the `with`: without adapters, or with the snapshot of them."""
        if self.reference is None:
            with self.as_base():
                yield
            return
        with self.inference(), self.wearing(self.adapter):
            own = {name: parameter.data for name, parameter in self.parameters_of(self.adapter).items()}
            try:
                self._point_to(self.reference)
                yield
            finally:
                self._point_to(own)

    def snapshot_reference(self) -> None:
        """Make a copy of the adapter as it is the reference from now on: 4 bytes a parameter."""
        self.reference = {
            name: parameter.detach().clone() for name, parameter in self.parameters_of(self.adapter).items()
        }

    def sync_reference(self, share: float) -> None:
        """Move the snapshot to share times the policy plus the rest of itself (TR-DPO, arXiv:2404.09656)."""
        assert self.reference is not None
        for name, parameter in self.parameters_of(self.adapter).items():
            self.reference[name].lerp_(parameter.detach(), share)

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint besides the adapter: the reference's snapshot, where there is one."""
        return self.reference or {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what state() returned."""
        if self.reference is not None:
            self.reference = {name: value.to(self.device) for name, value in state.items()}

    def _point_to(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters_of(self.adapter).items():
            parameter.data = values[name]

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter and of its score head, by the names that PEFT has for them here."""
        head = self.score_heads.get(name)
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        return {**state, **({} if head is None else {SCORE: head.weight.detach()})}

    def load_adapter_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Give an adapter, and its score head, the values that adapter_state() has of another like it."""
        weights, score = without_head(state)
        set_peft_model_state_dict(self.model, weights, adapter_name=name)
        if score is not None:
            self.score_heads[name].load(score)

    def save(self, folder: Path, name: str | None = None) -> None:
        """Write an adapter in PEFT's format, by default the policy's own, and the tokenizer beside it.

        One with a score head is written as a model for sequence classification has it.

        Raises:
            NotFiniteError: an adapter's weight is not finite; nothing is written.
        """
        name = name or self.adapter
        broken = not_finite(self.parameters_of(name))
        if broken:
            raise NotFiniteError(f"the adapter is not saved, since {broken} has numbers that are not finite")
        self.model.save_pretrained(str(folder), selected_adapters=[name])
        if name != "default":  # PEFT writes that one into the folder itself, and each other into one of its own in it
            for path in (folder / name).iterdir():
                path.replace(folder / path.name)
            (folder / name).rmdir()
        self.names.write(folder)
        if name in self.score_heads:
            add_to_folder(folder, self.score_heads[name])
        self.tokenizer.save_pretrained(folder)


def set_training(model: nn.Module, mode: bool) -> None:
    """Do what model.train(mode) does, in half of its time: 3.7 CPU ms for 2,300 modules, 28 layers with adapters."""
    for module in every_module(model):
        as_usual = type(module).train in (nn.Module.train, PreTrainedModel.train)
        if as_usual and not (isinstance(module, PreTrainedModel) and module.use_kernels):
            vars(module)["training"] = mode
        else:
            module.train(mode)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that has a NaN or an infinity, if any has."""
    return next((name for name, values in tensors.items() if not values.isfinite().all()), None)


def eos_token_ids(model: PreTrainedModel, tokenizer) -> list[int]:
    """Every id that ends a completion, by the model, its generation config, the tokenizer and the chat template."""
    ids = named_ends(model.config, model.config.get_text_config(), model.generation_config, tokenizer)
    if not ids:
        raise InputError("neither model nor tokenizer names an end-of-sequence token; set tokenizer.eos_token")
    for token_id in ids:
        if not isinstance(token_id, int):
            raise InputError(f"the model's end-of-sequence token is {token_id!r:.60}; set eos_token_id to a number")
    return sorted(with_turn_end(tokenizer, ids))
