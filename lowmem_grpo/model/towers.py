"""Models that see or hear: the class of a configuration, and what of a model its text does not need.

Such a model has a decoder of texts and, beside it, towers that make embeddings of images or sounds. Rows are texts, so
the towers are set aside: they take no memory, and get neither 4 bits nor an adapter. They are told by their place.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from lowmem_grpo.errors import InputError, shown


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes a model of a configuration, or None where none of texts does."""
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if auto.__name__ in remote or type(config) in auto._model_mapping:
            return auto
    return None


def decoder_path(model: Any) -> str:
    """The path of a model's decoder in it, such as "model.language_model".

    Raises:
        InputError: it has none apart from its head.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    if not path or any(module is head for module in decoder.modules()):
        raise InputError(
            f"{type(model).__name__} has no decoder of texts apart from its head; a causal language model is needed"
        )
    return path


def beside_the_decoder(model: Any) -> list[str]:
    """Paths of modules with parameters that are neither on the path to the decoder, nor in it, nor the head.

    A model whose configuration is of text alone has none: what stands beside its decoder is a part of its head.
    """
    if model.config.get_text_config() is model.config:
        return []
    path, head = decoder_path(model), model.get_output_embeddings()

    def beside(module: nn.Module, above: str) -> Iterator[str]:
        for name, child in module.named_children():
            place = f"{above}{name}"
            if path.startswith(f"{place}.") or any(part is head for part in child.modules() if child is not head):
                yield from beside(child, f"{place}.")
            elif place != path and child is not head and next(child.parameters(), None) is not None:
                yield place

    return list(beside(model, ""))


def within(paths: Sequence[str]) -> str:
    """A regular expression of the modules at these paths and in them, as PEFT's exclude_modules matches whole names."""
    return rf"(?:{'|'.join(map(re.escape, paths))})(?:\..*)?"


def set_aside(model: Any) -> None:
    """Put None in the place of each module beside the decoder, in place."""
    paths = beside_the_decoder(model)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    if paths:  # which a folder has: transformers would list each of its weights as one too many
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | {rf"^{re.escape(path)}\." for path in paths}


@contextlib.contextmanager
def made_without_towers(kind: type) -> Iterator[None]:
    """Have a class make its models without what is beside the decoder inside the `with`.

    from_pretrained() makes a model on the device that has no memory and reads what it finds a place for, so that of a
    tower nothing is read.
    """
    own: Any = kind.__init__

    @wraps(own)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        set_aside(self)

    kind.__init__ = made  # type: ignore[misc]
    try:
        yield
    finally:
        kind.__init__ = own  # type: ignore[misc]


def refuse_targets_beside(config: PeftConfig, model: Any, what: str = "peft_config") -> None:
    """Raise InputError where an adapter's configuration names modules that are all beside the decoder."""
    beside = beside_the_decoder(model)
    if not beside:
        return
    given: Any = config
    names = given.target_modules if isinstance(given.target_modules, list | set | tuple) else []
    for name in [*names, *(given.modules_to_save or [])]:
        named = [path for path, _ in model.named_modules() if path == name or path.endswith(f".{name}")]
        if named and all(re.fullmatch(within(beside), path) for path in named):
            raise InputError(
                f"{what} has {shown(name)}, which is {named[0]}, beside the decoder of texts: it is set aside, since "
                "only text is trained on; leave it out"
            )
