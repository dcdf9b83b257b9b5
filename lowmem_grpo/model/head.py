"""The head of a language model: read, and compared with the model's own logits."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.kernels.linear_logprobs import linear_logprobs
from lowmem_grpo.model.head_8bit import Head8bit

TRAINED = (
    "the head is trained or has an adapter, which is not supported yet; "
    "leave lm_head and the embeddings out of target_modules and modules_to_save"
)


class Head(NamedTuple):
    """The function from hidden states to logits, softcap(logit_scale (h . W + b))."""

    weight: Tensor  # (V, D), frozen
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype  # of h and W
    scale: Tensor | None = None  # (V,) fp32: the weight is int8, and W's rows are its times these

    def inputs(self) -> dict[str, Any]:
        """The keywords that say it to linear_logprobs."""
        return dict(
            weight=self.weight, weight_scale=self.scale, bias=self.bias, logit_scale=self.logit_scale,
            softcap=self.softcap,
        )  # fmt: skip


def output_embeddings(model: PreTrainedModel) -> nn.Module:
    """The layer that is a model's head. Raise InputError if there is none beside the decoder, or an adapter on it."""
    output = model.get_output_embeddings()
    if output is None:
        raise InputError(f"{type(model).__name__} has no output embedding; a causal language model is needed")
    if type(output).__module__.startswith("peft."):
        raise InputError(TRAINED)
    decoder: Any = model.get_decoder()
    if any(module is output for module in decoder.modules()):
        raise InputError(
            f"transformers does not tell the decoder of {type(model).__name__} from its head; take another model"
        )
    return output


def read_head(model: PreTrainedModel) -> Head:
    """The head of a model, with its scale and softcap. Raise InputError if it is trained or adapted."""
    output: Any = output_embeddings(model)
    weight = getattr(output, "weight", None)
    if weight is None or weight.requires_grad:
        raise InputError(TRAINED)
    if not weight.is_floating_point():
        raise InputError("the head is quantized; load the model with lm_head left out of the quantization")
    config = model.config.get_text_config()
    # Granite divides its logits, Cohere multiplies them.
    logit_scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    rows, scale = (output.rows, output.scale) if isinstance(output, Head8bit) else (weight, None)
    return Head(rows, getattr(output, "bias", None), logit_scale, softcap, weight.dtype, scale)


def probed_head(model: PreTrainedModel, head: Head) -> Head:
    """Give back a model's head, or the one that was measured on its logits where they are others.

    Raises:
        InputError: the measured head has other log-probabilities than the model, too.
    """
    try:
        probe_head(model, head)
    except InputError:
        head = _measured(model, head)
        probe_head(model, head)
    return head


def _measured(model: PreTrainedModel, head: Head) -> Head:
    """Read a head's scale, softcap and number of rows off the model's own logits.

    Far below a softcap logits are the scale times the product, and far above it they are the softcap. Inkling divides
    its logits by a number of its own, and cuts off the rows by which its vocabulary is filled up.
    """
    hidden = torch.randn(1, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight.device)
    hidden /= _head_in_fp32(head, hidden).abs().max()
    most = min(1e6, 3e4 / hidden.abs().max().item())  # which fp16 holds
    few, many = ((size * hidden).to(head.dtype).float() for size in (1e-2, most))
    theirs = _model_logits(model, few).double()
    count = theirs.shape[-1]
    bias, scale = (of if of is None else of[:count] for of in (head.bias, head.scale))
    head = Head(head.weight[:count], bias, 1.0, None, head.dtype, scale)
    ours = _head_in_fp32(head, few).double()
    logit_scale = ((ours * theirs).sum() / ours.square().sum()).item()
    largest = _model_logits(model, many).abs().max().item()
    capped = largest < 0.5 * abs(logit_scale) * _head_in_fp32(head, many).abs().max().item()
    return head._replace(logit_scale=logit_scale, softcap=largest if capped else None)


def probe_head(model: PreTrainedModel, head: Head) -> None:
    """Raise InputError where the head's logits differ from the model's own, in fp32.

    Random hidden states are scaled until the largest logit reaches twice the softcap (or 30), where a missing scale or
    softcap shows; a zero row shows a missing bias. Only the head runs, in slices, never the decoder.
    """
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, head.weight.shape[1], generator=draw).to(head.weight.device)
    largest = _head_in_fp32(head, hidden).abs().max() * head.logit_scale
    hidden *= 2 * (head.softcap or 15.0) / largest
    hidden = hidden.to(head.dtype).float()  # Mamba casts them to the head's dtype itself
    hidden[0] = 0
    theirs = _model_logits(model, hidden).log_softmax(-1)  # (4, V)
    labels = torch.stack([theirs[0].argmin(), theirs[1].argmax(), theirs[2].argmin(), theirs[3].argmax()])
    with torch.no_grad():
        ours = linear_logprobs(hidden, labels=labels, **head.inputs())
    gap = (ours - theirs.gather(1, labels[:, None])[:, 0]).abs().max().item()
    gap = gap if theirs.shape[1] == len(head.weight) else max(gap, 1.0)
    if math.isnan(gap):
        raise InputError(
            f"the head of {type(model).__name__} computes NaN: its weights are zero, infinite or NaN; take another copy"
        )
    if not gap < 1e-3:
        raise InputError(
            f"the head of {type(model).__name__} does something besides bias, scale and tanh softcap: its "
            f"log-probabilities are {gap:.2g} away from ours; this model is not supported"
        )


class _LastHiddenState(BaseModelOutputWithPast):
    """A decoder's output, with None for whatever else a model asks of it (router logits, cross attentions)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _model_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's own fp32 logits (R, V) for given last hidden states (R, D).

    Raises:
        InputError: it has none for a text alone.
    """
    output = model.get_output_embeddings()
    assert output is not None
    given, head = _LastHiddenState(last_hidden_state=hidden[None]), read_head(model)
    with (
        torch.no_grad(),
        forward_replaced(model.get_decoder(), lambda *args, **kwargs: given),
        forward_replaced(output, lambda states: _head_in_fp32(head, states)),
    ):
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        try:
            return model(input_ids=ids).logits[0].float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a family's own code, such as one that wants an image
            raise InputError(f"{type(model).__name__} has no logits for a text alone: {in_a_line(error)}") from error


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Have a module compute something else inside the `with`."""
    own = module.__dict__.get("forward")  # accelerate may have put one on the instance
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _head_in_fp32(head: Head, hidden: Tensor) -> Tensor:
    """hidden W^T + b in fp32, without an fp32 copy of the whole weight."""
    parts = [F.linear(hidden.float(), rows.float()) for rows in head.weight.split(4096)]
    logits = torch.cat(parts, dim=-1)
    logits = logits if head.scale is None else logits * head.scale
    return logits if head.bias is None else logits + head.bias.float()
