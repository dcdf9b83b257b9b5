"""A trial of outlined layers beside the model's own, once, in fp32: what each adds, and all of its gradients."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_grpo.errors import in_a_line
from lowmem_grpo.model.attention import Scoring, attending, laid_out
from lowmem_grpo.model.outline import Listening, Unknown, read_layers
from lowmem_grpo.model.outlined import OutlinedLayers, take_out
from lowmem_grpo.model.packed_attention import Packed
from lowmem_grpo.model.packing import MicroBatch, pack
from lowmem_grpo.model.trial import TEXTS, distance, in_fp32, once_more, pieces

# How far off a result or gradient may be, relative to its norm. Those of tiny models of 19 families are 9e-7 off.
EXACT = 1e-4
LENGTHS = (9, 7, 5)  # tokens of a prompt and of its completions
GROWN = 0.02  # the share by which a query grows that is not merely rounded
NAMES = ("what", "the gradient of what", "the adapters' gradient of what")


def outlined_layers(policy: Any) -> OutlinedLayers:
    """A policy's layers by their outlines, put in place. Its own adapter is worn for the trial.

    Raises:
        Unknown: the layers are not understood, or compute something else than their outlines.
    """
    with policy.wearing(policy.adapter):
        return _tried(policy)


def _tried(policy: Any) -> OutlinedLayers:
    with policy.inference(), policy.autocast():
        stream = _given(policy, _batch(policy))[0][0]
        if stream.dtype != policy.dtype:
            raise Unknown(f"its residual stream is in {stream.dtype}, not in {policy.dtype}")
        layers = OutlinedLayers(policy.decoder, read_layers(policy))
    try:
        with policy.inference(), policy.autocast():
            layers.reach = _reach(policy)
        for name, error in once_more(lambda: list(_distances(policy, layers))):
            if not error <= EXACT:  # a NaN is too far, too
                raise Unknown(f"{name} is {error:.1g} away from the model's own")
        once_more(lambda: _runs(policy, layers))
    except Exception as error:
        take_out(policy.decoder)
        raise error if isinstance(error, Unknown | torch.OutOfMemoryError) else Unknown(in_a_line(error)) from error
    return layers


def _reach(policy: Any) -> int | None:
    """How long texts may be before queries grow with their place, which no outline has; None: however long.

    Ministral 3's do from original_max_position_embeddings on. A rotation leaves a query's size as it is.
    """
    most = getattr(policy.decoder.config, "max_position_embeddings", None) or 2**17
    places = [0, *(2**power - 1 for power in range(5, 21) if 2**power <= most)]
    listening, (ids,) = Listening(), pieces(policy, TEXTS[0], (1,))
    token_ids, position_ids = torch.tensor([[ids * len(places)], [places]], device=policy.device)
    with attending(policy.configs), laid_out(listening):
        policy.decoder(input_ids=token_ids, position_ids=position_ids, use_cache=False)
    sizes = torch.stack([call.query[0].float().norm(dim=2).amax(0) for call in listening.calls.values()])
    alike = ((sizes - sizes[:, :1]).abs() <= GROWN * sizes[:, :1]).all(0).tolist()
    return None if all(alike) else places[alike.index(False) - 1] + 1


def _batch(policy: Any) -> MicroBatch:
    prompt, *completions = pieces(policy, TEXTS[0], LENGTHS)
    (batch,) = pack(
        [prompt], completions, num_generations=len(completions), padding_free=True, token_budget=1000,
        pad_token_id=policy.pad_token_id, device=policy.device,
    )  # fmt: skip
    return batch


def _distances(policy: Any, layers: OutlinedLayers) -> Iterator[tuple[str, float]]:
    """Distances of what each layer adds to the first one's input and of its gradients, by name."""
    batch = _batch(policy)
    assert batch.packing is not None
    layout = _Heard(batch.packing, varlen=False)
    with in_fp32(policy) as in_full, policy.inference():
        given = _given(in_full, batch)
        hidden = given[0][0]
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        with torch.enable_grad(), attending(policy.configs), laid_out(layout):
            for index, (layer, worn) in enumerate(zip(layers.layers, layers.worn(), strict=True)):
                stream, keywords = hidden.clone().requires_grad_(), given[index][1]
                theirs = layer.own(stream, **keywords)  # by itself, for which its weights become fp32
                if layout.asked[index] != layer.asked:
                    yield f"the scaling, window, softcap or sinks of layer {index}", torch.inf
                with layer.computing_with(worn):
                    ours = layer.forward(stream, keywords["position_embeddings"])
                asked = [stream, *layer.parameters_of(worn)]
                found = [_results(out, asked, hidden, upstream) for out in (ours, theirs)]
                for name, own, other in zip(NAMES, *found, strict=True):
                    yield f"{name} layer {index} adds", distance(own, other)


@dataclass(frozen=True)
class _Heard(Packed):
    """A layout that knows what each layer asked for last, by its number."""

    asked: dict[int, Scoring] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        self.asked[asked.layer] = asked._replace(scaling=float(asked.scaling))
        return super().attend(query, key, value, asked)


def _results(out: Tensor, asked: list[Tensor], hidden: Tensor, upstream: Tensor) -> list[Tensor]:
    """A layer's share of the stream, its gradient, and the gradient of the adapters, where there are any."""
    of_stream, *rest = torch.autograd.grad(out, asked, upstream)
    return [out.detach() - hidden, of_stream - upstream, torch.cat([of_stream.new_zeros(1), *map(torch.flatten, rest)])]


def _given(policy: Any, batch: MicroBatch) -> list[tuple[Tensor, dict[str, Any]]]:
    """Input and keywords that the decoder calls each layer with."""
    given: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        given.append((arguments[0], keywords))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in policy.decoder.layers]
    try:
        policy.hidden_states(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _runs(policy: Any, layers: OutlinedLayers) -> None:
    """Run forward and backward as training will, in its dtype and with its attention."""
    trying, batch = copy.copy(policy), _batch(policy)
    trying.outlined = layers
    with policy.inference(), torch.enable_grad():
        hidden = trying.hidden_states(batch)
        parameters = [p for p in policy.decoder.parameters() if p.requires_grad]
        if hidden.requires_grad:
            torch.autograd.grad(hidden, parameters, torch.zeros_like(hidden), allow_unused=True)
