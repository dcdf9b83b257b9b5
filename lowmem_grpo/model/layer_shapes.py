"""Which layers of a model attend, to whose keys and values, and of what sizes: read off one token's forward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.model.attention import Scoring, Silent, UnknownAttention, attending, laid_out


class LayerShape(NamedTuple):
    """Sizes of what one layer calls attention with."""

    heads: int  # of queries
    kv_heads: int
    head_dim: int
    source: int  # the layer whose keys and values these are: an earlier one's where it shares them, or itself


def layer_shapes(policy: Any) -> dict[int, LayerShape]:
    """The LayerShape of each layer that attends, by its number, in the order of their calls.

    Runs one token through the decoder, whose tensors may be fake. A layer shares another's keys and values where it is
    given the very tensors. Takes no number of torch's generator.

    Raises:
        UnknownAttention: a layer attends more than once.
    """
    recorder = _Recorder()
    token = torch.full((1, 1), policy.pad_token_id, device=policy.device)
    with policy.inference(), policy.autocast(), attending(policy.configs), laid_out(recorder):
        policy.decoder(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False)
    return recorder.shapes


class _Recorder(Silent):
    """A layout that notes the sizes of what each layer calls attention with."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.given: dict[int, tuple[Tensor, Tensor]] = {}  # held, so that no other tensor takes their place in memory

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        if asked.layer in self.shapes:
            raise UnknownAttention("a layer of its attends more than once")
        source = next((first for first, (k, v) in self.given.items() if k is key and v is value), asked.layer)
        self.given[asked.layer] = key, value
        self.shapes[asked.layer] = LayerShape(query.shape[1], key.shape[1], key.shape[3], source)
        return super().attend(query, key, value, asked)
