"""A trial of our layouts: each layer's outputs compared with the model's own, once, on a few tokens.

The trial is in fp32, whatever the run computes in. In 16 bits the rounding of 30 layers moves a log-probability by up
to 0.8 nats, which is more than a wrong mask in one of them does; in fp32 what is right is 1e-5 off, and what is wrong
is not: a layer that carries a thousandth of one sequence into the next shows. Gradients are compared of attention
alone, the one part with a layout of its own: a layer whose outputs are right and whose backward is not goes unseen.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any, TypeVar

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.model.attention import Scoring, Silent, UnknownAttention, attending, configs_of, laid_out, refusal
from lowmem_grpo.model.head import forward_replaced
from lowmem_grpo.model.mixing import Call, Forward
from lowmem_grpo.model.packed_attention import Packed
from lowmem_grpo.model.packing import MicroBatch, pack

HALF = (torch.bfloat16, torch.float16)
WINDOW = 6  # tokens of a sliding window in a trial: texts as long as real windows would take seconds
TEXTS = (
    "Tom has 12 apples and gives 5 of them to his sister. How many apples does he have now? He had 12, and 12 - 5 = 7, "
    "so the answer is 7. On the way home they meet an old friend, who asks if it is going to rain.",
    "The sky over the hills was dark, and the wind had turned since noon. We should leave early, she said, or wait for "
    "the next train; it costs 8 euros more, but there are 3 seats left, and nobody has to stand.",
    "Let x be the number of red balls in the box. There are 4 times as many blue ones, 35 in all, so 5 x = 35 and x is "
    "7. To check this, count the blue ones: 28, and 28 + 7 = 35. What if one of them is lost?",
)  # fmt: skip

T = TypeVar("T")
Outputs = dict[str, Tensor]  # of each layer and of each of its parts: (N, D) fp32, on the CPU

# Of outputs in fp32. Those of SmolLM2 and Gemma 3 270M are 1e-5 away at most; of tiny random models, where a state
# goes on from one sequence into the next, 0.4 to 0.95.
LEAST, MOST = 5e-5, 1e-3
# Of attention in 16 bits from that in fp32 on the same queries, keys and values, softened: 0.003 at most, its gradients
# 0.008; one key more in a window of WINDOW tokens is 0.3 away.
ROUGH = 0.05

# Of a layer with a state for a text in parts: its outputs, and the gradient that goes through its states. In fp32 those
# of 12 families are 6e-7 and 6e-6 away, and Mamba 1's, which ignores a state, 3e-3 and more; in bf16 0.003 and 0.006.
IN_PARTS, IN_PARTS_ROUGHLY = (1e-4, 1e-3), (2e-2, 5e-2)
TOKENS, PROMPT, LATE = 20, 12, 3  # of that text, of its prompt, and before the second text that begins in it

LAST = "its last hidden state"  # the name of what a decoder gives


def pieces(policy: Any, text: str, lengths: Sequence[int]) -> list[list[int]]:
    """The token ids of a text in pieces of these lengths, begun again where it ends; none is special.

    The first ids of the vocabulary where the tokenizer is a stand-in that reads no text, as those of benchmarks are.
    """
    vocabulary = range(policy.head.weight.shape[0])
    special = {*getattr(policy.tokenizer, "all_special_ids", ()), *policy.eos_token_ids}
    reads = callable(policy.tokenizer)
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids if reads else range(100)
    ids = [i for i in ids if i in vocabulary and i not in special] or [i for i in vocabulary if i not in special]
    endless = cycle(ids)
    return [[next(endless) for _ in range(length)] for length in lengths]


def parts(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A decoder's layers by name, and the modules beside them."""
    for name, module in decoder.named_children():
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{number}", layer) for number, layer in module.named_children())
        elif any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
            yield from ((f"{name}.{part}", inner) for part, inner in parts(module))
        else:
            yield name, module


@contextlib.contextmanager
def in_fp32(policy: Any) -> Iterator[Any]:
    """The policy computing in fp32 inside the `with`: its 4-bit weights as they are, the others cast.

    The weights of a layer are fp32 from its forward to the next layer's, so that one layer at a time takes the memory.
    """
    exact = copy.copy(policy)
    exact.dtype, exact.varlen = torch.float32, False
    quantized: list[Any] = [layer for layer in policy.base.modules() if isinstance(layer, Linear4bit)]
    dtypes = [(layer.compute_dtype, layer.weight.quant_state.dtype) for layer in quantized]
    given: list[tuple[Tensor, Tensor]] = []
    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    before = [product.fp32_precision for product in products]

    def give_back() -> None:
        while given:
            tensor, data = given.pop()
            tensor.data = data

    def cast(part: nn.Module, _: Any) -> None:
        give_back()
        for tensor in (*part.parameters(), *part.buffers()):
            if tensor.dtype in HALF and not isinstance(tensor, Params4bit):
                given.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    hooks = [
        module.register_forward_hook(lambda _, __, looked_up: looked_up.float())
        for module in policy.decoder.modules()
        if isinstance(module, nn.Embedding)
    ]
    hooks += [
        part.register_forward_pre_hook(cast) for _, part in parts(policy.decoder) if not isinstance(part, nn.Embedding)
    ]
    try:
        for product in products:  # and not in TF32, or in bf16
            product.fp32_precision = "ieee"
        for layer in quantized:  # which rounds its weight to quant_state's for a backward of its own
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
        yield exact
    finally:
        give_back()
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision
        for layer, (compute_dtype, dtype) in zip(quantized, dtypes, strict=True):
            layer.compute_dtype, layer.weight.quant_state.dtype = compute_dtype, dtype
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def narrow_windows(model: Any) -> Iterator[None]:
    """Narrow sliding windows to WINDOW tokens inside the `with`."""
    owners = [owner for owner in (*configs_of(model), *model.modules()) if "sliding_window" in vars(owner)]
    before = [(owner, owner.sliding_window) for owner in owners if owner.sliding_window]
    try:
        for owner, window in before:
            owner.sliding_window = min(WINDOW, window)
        yield
    finally:
        for owner, window in before:
            owner.sliding_window = window


@contextlib.contextmanager
def outputs_kept(decoder: nn.Module, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call keep(name, output (R, T, ...)) for each layer, each of its parts and the decoder, inside the `with`."""
    calls: dict[str, int] = {}

    def kept(name: str, output: Any) -> None:
        output = getattr(output, "last_hidden_state", output)
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.dim() >= 3 and output.is_floating_point():
            calls[name] = calls.get(name, 0) + 1
            keep(name if calls[name] == 1 else f"{name}, call {calls[name]},", output.flatten(2))

    watched = [(LAST, decoder)]
    for name, layer in parts(decoder):
        if name.rpartition(".")[2].isdigit():
            watched += [(name, layer), *((f"{name}.{child}", module) for child, module in layer.named_children())]
    hooks = [m.register_forward_hook(lambda _, __, out, name=name: kept(name, out)) for name, m in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outputs(
    policy: Any, batches: Iterable[MicroBatch], count: int, run: Callable[[MicroBatch], object] | None = None
) -> Outputs:
    """The layers' outputs at the positions that predict the batches' N tokens, by layer.

    `run` computes them, by default the decoder alone.
    """
    compute = policy.hidden_states if run is None else run
    found: Outputs = {}
    for batch in batches:

        def keep(name: str, output: Tensor, batch: MicroBatch = batch) -> None:
            if output.shape[:2] == batch.input_ids.shape:
                rows = output.flatten(0, 1).index_select(0, batch.predictors).float().cpu()
                found.setdefault(name, rows.new_full((count, rows.shape[1]), torch.nan))[batch.token_index.cpu()] = rows

        with outputs_kept(policy.decoder, keep):
            compute(batch)
    return found


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference of two tensors, relative to that of the second."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30)).item()


def distances(ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """The root mean square error of each output over its tokens, by name, each relative to a size.

    The size is the token's own or, where that is smaller, the median token's: between a model's norms some tokens are
    small, and would show their rounding.
    """
    found = {}
    for name in [name for name in theirs if name in ours]:
        size = theirs[name].norm(dim=1)
        error = (ours[name] - theirs[name]).norm(dim=1) / size.clamp(min=size.median().clamp(min=1e-30))
        found[name] = error.square().mean().sqrt().item()
    return found


def too_far(errors: dict[str, float], noise: dict[str, float]) -> str | None:
    """A sentence on the first output further away than LEAST and 3 times its noise; or None."""
    for name, error in errors.items():
        if not error <= min(max(LEAST, 3 * noise.get(name, 0.0)), MOST):  # a NaN is too far, too
            return f"{name} is {error:.1g} away"
    return None


class Differs(ValueError):
    """One of our layouts gives something else, and the message says what and how far."""


def once_more(work: Callable[[], T]) -> T:
    """Return work(), begun anew once where memory ran out. A trial is small, and other memory may be free by then."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return work()
    return work()


def refused(policy: Any, trial: Callable[[Any, str], str | None], *, in_a_layout: bool = True) -> str | None:
    """Why a trial of the policy fails with each of TEXTS, or None; what it raises is a reason too.

    Every layer has to call the layout in force, unless the trial has none. A text that is refused is followed by
    another: a rounding may swap two experts of equal weight.
    """
    try:
        with policy.inference(), narrow_windows(policy.base):
            reason = once_more(partial(by_itself, policy)) if in_a_layout else None
            for text in () if reason else TEXTS:
                reason = once_more(partial(trial, policy, text))
                if reason is None:
                    return None
    except torch.OutOfMemoryError:
        raise
    except (Differs, UnknownAttention) as error:
        return in_a_line(error)
    except Exception as error:  # whatever foreign code raises where it is called in a way that it does not expect
        return f"its own code fails there, {in_a_line(error)}"
    return reason


class _Heard(Silent):
    """A layout that knows the numbers of the layers that called it."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        self.layers.add(asked.layer)
        return super().attend(query, key, value, asked)

    def mix(self, mixer: Any, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        self.layers.add(mixer.layer_idx)
        return forward(hidden, Call(), None)


def by_itself(policy: Any) -> str | None:
    """A sentence on a layer of a policy's decoder that mixes tokens without calling the layout in force, or None.

    A layer may have nothing to call for, as one of experts alone; what calls knows its layer's number.
    """
    heard, token = _Heard(), torch.zeros(1, 1, dtype=torch.int64, device=policy.device)
    try:
        with torch.no_grad(), policy.autocast(), attending(policy.configs), laid_out(heard):
            policy.decoder(input_ids=token, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except UnknownAttention as error:
        return in_a_line(error)
    except Exception:  # of a model that is given no mask, and counts on one
        if heard.layers:
            return None
    if not heard.layers:
        return "its attention cannot be replaced"
    for name, layer in parts(policy.decoder):
        number = name.rpartition(".")[2]
        if number.isdigit() and int(number) not in heard.layers:
            own = [path for path, module in layer.named_modules() if path and "layer_idx" in vars(module)]
            if own:
                return f"{name}.{own[-1]} mixes tokens in a way of its own"
    return None


def difference_when_packed(policy: Any, text: str) -> str | None:
    """A sentence on how packed rows differ from separate ones, or None. Two prompts, of which one is shared."""
    lengths = (26, 1, 9, 5, 1, 14, 7, 2, 12, 3)
    texts = pieces(policy, text, lengths)

    def batches(token_budget: int = 1000, padding_free: bool = False) -> Iterator[MicroBatch]:
        return pack(
            texts[:2], texts[2:], num_generations=4, padding_free=padding_free, token_budget=token_budget,
            pad_token_id=policy.pad_token_id, device=policy.device,
        )  # fmt: skip

    count = sum(lengths[2:])
    with in_fp32(policy) as exact:
        with attending(policy.configs, "eager"):
            truth = outputs(exact, batches(), count)
            noise = distances(outputs(exact, batches(token_budget=90), count), truth)
        reason = too_far(distances(outputs(exact, batches(padding_free=True), count), truth), noise)
    if reason:
        return f"{reason} in a packed row from what it is in a separate one"
    if policy.dtype != torch.float32:
        for batch in batches(padding_free=True):
            assert batch.packing is not None
            layout = InBothPrecisions(Packed(batch.packing, policy.varlen), batch.predictors)
            with policy.autocast(), attending(policy.configs), laid_out(layout):
                policy.decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return None


def softened(query: Tensor, key: Tensor, asked: Scoring) -> Scoring:
    """The settings of a layer's attention with a scaling by which scores are about 4 at most.

    Attention that picks one key says little of the others, and its gradient is little but rounding.
    """
    lengths = query.float().norm(dim=-1).mean() * key.float().norm(dim=-1).mean()
    return asked._replace(scaling=min(asked.scaling, 4 / max(lengths.item(), 1e-30)))


@dataclass(frozen=True)
class InBothPrecisions:
    """A layout that raises Differs where attention or its gradient in 16 bits is far from fp32."""

    packed: Packed
    predictors: Tensor  # (N,) int64: the tokens whose results count; those of padding are any

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        soft = softened(query, key, asked)

        def run(packed: Packed, dtype: torch.dtype, upstream: Tensor | None = None) -> list[Tensor]:
            """Fp32 results (N, H, D), and gradients of query, key and value under upstream, or under the results."""
            q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
            with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
                out = packed.attend(q, k, v, soft)[0]
                out = out.index_select(0, self.predictors).float()
                gradients = torch.autograd.grad(out, leaves, out.detach() if upstream is None else upstream)
            return [out.detach(), *(gradient.float() for gradient in gradients)]

        exact = run(replace(self.packed, varlen=False), torch.float32)
        found = run(self.packed, query.dtype, exact[0])
        names = ("result", "query's gradient", "key's gradient", "value's gradient")
        for name, rounded, truth in zip(names, found, exact, strict=True):
            error = distance(rounded, truth)
            if not error < ROUGH:
                raise Differs(f"its attention's {name} in {query.dtype} is {error:.1g} away from that in fp32")
        return self.packed.attend(query, key, value, asked)

    def mix(self, mixer: Any, forward: Forward, hidden: Tensor) -> Tensor:
        return self.packed.mix(mixer, forward, hidden)


def difference_in_parts(policy: Any, text: str) -> None:
    """Raise Differs where a kind of layer does not go on from its states as it does within a text.

    The trial of whole rows is too blunt for this: a state that is ignored may move an output by less than MOST.
    """
    with in_fp32(policy) as exact:
        run_in_parts(exact, text, *IN_PARTS)
    if policy.dtype != torch.float32:  # in which other kernels may be taken
        run_in_parts(policy, text, *IN_PARTS_ROUGHLY)


def run_in_parts(policy: Any, text: str, most: float | None = None, most_of_gradient: float = 0.0) -> None:
    """Run a policy's decoder on the first tokens of a text, in the layout InParts. Raises Differs as that does."""
    (batch,) = pack(
        pieces(policy, text, (TOKENS,)), [[0]], padding_free=True, token_budget=100,
        pad_token_id=policy.pad_token_id, device=policy.device,
    )  # fmt: skip
    assert batch.packing is not None
    layout = InParts(Packed(batch.packing, False), most, most_of_gradient)
    with torch.no_grad(), policy.autocast(), attending(policy.configs), laid_out(layout):
        policy.decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)


@dataclass(frozen=True)
class InParts:
    """A layout of one text that raises Differs where a layer's states do not join its parts."""

    packed: Packed
    most: float | None = None  # of its error, relative; None where tensors have no memory, and only the graph is read
    most_of_gradient: float = 0.0
    tried: set[type] = field(default_factory=set)  # one layer of each kind is enough

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        return self.packed.attend(query, key, value, asked)

    def mix(self, mixer: Any, forward: Forward, hidden: Tensor) -> Tensor:
        if type(mixer) not in self.tried:
            self.tried.add(type(mixer))
            with torch.enable_grad():
                self._try(type(mixer).__name__, forward, hidden[:, :TOKENS].detach().requires_grad_())
        return self.packed.mix(mixer, forward, hidden)

    def _try(self, name: str, forward: Forward, text: Tensor) -> None:
        """Compare two texts in three parts with the same in one; the second is text (1, T, D) from LATE on.

        Prompts are one call, which masks what the second has not; then come tails, and then a token alone.
        """
        starts = 0, LATE
        mask = torch.ones(2, PROMPT, dtype=torch.bool, device=text.device)
        mask[1, :LATE] = False
        prompts, tails, lasts = (part.expand(2, -1, -1) for part in text.tensor_split((PROMPT, TOKENS - 1), 1))
        first = Call()
        begun = forward(prompts, first, mask)
        second = Call(first.after)
        gone_on = forward(tails, second, None)
        for (kind, _), state in first.after.items():
            if _gradient(gone_on, state) is None:
                raise Differs(f"{name} does not go on from its {kind} state, or has no gradient for it")
        with torch.no_grad():  # as a step of decoding
            ended = forward(lasts, Call(second.after, writable=True), None)
        if self.most is None:
            try:
                _gradient(gone_on, text)
            except RuntimeError as error:  # as of Kimi Linear, whose step writes into what this backward reads
                raise Differs(f"{name} has no gradient through its states: {in_a_line(error)}") from error
            return
        parted = [torch.cat(rows)[start:] for start, *rows in zip(starts, begun, gone_on, ended, strict=True)]
        whole = [forward(text[:, start:], Call(), None)[0] for start in starts]
        found, truth = ({name: torch.cat(texts).detach().float().cpu()} for texts in (parted, whole))
        error = distances(found, truth)[name]
        if not error <= self.most:
            raise Differs(f"{name} is {error:.1g} away in a text that goes on from its states from what it is in one")
        ours, theirs = (torch.cat([tokens[PROMPT - TOKENS : -1] for tokens in texts]) for texts in (parted, whole))
        found, truth = (_gradient(tail, text, theirs)[:, :PROMPT] for tail in (ours, theirs))
        error = distance(found, truth)
        if not error <= self.most_of_gradient:
            raise Differs(f"{name} has a gradient through its states that is {error:.1g} away from that within a text")


def _gradient(of: Tensor, by: Tensor, upstream: Tensor | None = None) -> Any:
    """The gradient by a tensor of another under an upstream, itself without; None where there is none."""
    given = (of if upstream is None else upstream).detach()
    return torch.autograd.grad(of, by, given, True, allow_unused=True)[0] if by.requires_grad else None


def refuse_untrainable(policy: Any) -> None:
    """Raise InputError where training would learn nothing, or something else than what is sampled from.

    In training mode a forward must give the same twice, and the same whatever token comes later; and a backward must
    reach the adapter.
    """
    name = type(policy.base).__name__
    if policy.base.config.get_text_config() is not policy.base.config:
        reason = refused(policy, difference_by_itself, in_a_layout=False)
        if reason:
            raise InputError(
                f"{name} reads a text otherwise than its decoder does, which is trained ({reason}); name another model"
            )
    try:
        with lora_dropout_off(policy.model):
            reason = once_more(partial(_difference_in_training, policy))
            once_more(partial(_backward, policy))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever foreign code raises
        raise InputError(f"{name} cannot be trained here: {in_a_line(error)}") from error
    learns = any(p.grad is not None and p.grad.count_nonzero() for p in policy.parameters_of(policy.adapter).values())
    policy.model.zero_grad()
    if reason:
        raise InputError(f"{name} {reason}")
    if not learns:
        raise InputError(
            f"no weight of the adapter {policy.adapter!r} gets a gradient: lora_alpha or both of its factors are zero, "
            f"or {name} does not use the modules that have it; give the adapter other target_modules"
        )


def difference_by_itself(policy: Any, text: str) -> str | None:
    """A sentence on how a whole model reads a text otherwise than its decoder alone does, or None."""
    prompt, completion = pieces(policy, text, (7, 9))
    head = policy.base.get_output_embeddings()

    def whole(batch: MicroBatch) -> None:
        with forward_replaced(head, lambda states: states):  # it stays in 16 bits
            policy.base(input_ids=batch.input_ids, use_cache=False)

    batch = _batch(policy, prompt, completion)
    with in_fp32(policy) as exact:
        with _eagerly(policy):
            alone = outputs(exact, [batch], len(completion))
        # As it is otherwise called: one whose prompts see what follows does so by PyTorch's attention alone.
        is_flash = "flash" in str(policy.base.config._attn_implementation)
        with _eagerly(policy) if is_flash else contextlib.nullcontext():
            found = outputs(exact, [batch], len(completion), whole)
    return too_far(distances(found, alone), {})


def _eagerly(policy: Any) -> contextlib.AbstractContextManager:
    """An attention that takes fp32, as flash attention does not; the model's own where it cannot be replaced."""
    return contextlib.nullcontext() if refusal(policy.base) else attending(policy.configs, "eager")


def _difference_in_training(policy: Any) -> str | None:
    """Why two forwards in training mode differ, or None. Their last token alone is another one, and predicts none."""
    prompt, completion, others = pieces(policy, TEXTS[0], (7, 9, 9))
    last = next((token for token in others if token != completion[-1]), completion[-1])

    def forward(completion: list[int]) -> Outputs:
        with torch.no_grad(), _eagerly(policy), in_fp32(policy) as exact:
            return outputs(exact, [_batch(policy, prompt, completion)], len(completion))

    first = forward(completion)
    if not first[LAST].isfinite().all():  # which the first rollout says
        return None
    reason = too_far(distances(forward([*completion[:-1], last]), first), {})
    if reason is None:
        return None
    unsteady = too_far(distances(forward(completion), first), {})
    if unsteady:
        return f"computes something else each time in training mode ({unsteady}); switch that off in it"
    return f"is no causal language model: its outputs depend on later tokens ({reason})"


def _backward(policy: Any) -> None:
    prompt, completion = pieces(policy, TEXTS[0], (7, 9))
    policy.model.zero_grad()
    policy.logprobs(_batch(policy, prompt, completion), 1.0).sum().backward()


def _batch(policy: Any, prompt: list[int], completion: list[int]) -> MicroBatch:
    (batch,) = pack([prompt], [completion], token_budget=100, pad_token_id=policy.pad_token_id, device=policy.device)
    return batch


@contextlib.contextmanager
def lora_dropout_off(model: nn.Module) -> Iterator[None]:
    """Switch off the adapters' own dropout inside the `with`, and nothing else of the training mode."""
    dropouts = [module for path, module in model.named_modules() if "lora_dropout" in path and module.training]
    try:
        for module in dropouts:
            module.training = False
        yield
    finally:
        for module in dropouts:
            module.training = True
