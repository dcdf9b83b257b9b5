"""The preview of a reward model's training: one pair as the model gets it."""

from typing import Any

from lowmem_grpo.data.pairs import Pair
from lowmem_grpo.distributed import by_main
from lowmem_grpo.errors import counted
from lowmem_grpo.inputs.pairs import PairInputs
from lowmem_grpo.preview.show import show_and_write


@by_main
def show_pair(inputs: PairInputs) -> None:
    """Print the first pair on standard error, and write it to output_dir/data_preview.txt."""
    show_and_write(inputs, as_text(inputs.pairs.all[0], len(inputs.pairs.all), inputs.tokenizer))


def as_text(pair: Pair, count: int, tokenizer: Any) -> str:
    """A pair for a person: what both texts begin with, and how each goes on."""
    parts = {
        f"both begin with {counted(pair.num_shared, 'token')}": pair.chosen[: pair.num_shared],
        f"chosen goes on with {len(pair.chosen) - pair.num_shared}": pair.chosen[pair.num_shared :],
        f"rejected goes on with {len(pair.rejected) - pair.num_shared}": pair.rejected[pair.num_shared :],
    }
    lines = [f"data preview: pair 1 of {count} as the model gets it"]
    for title, ids in parts.items():
        words = tokenizer.decode(ids, clean_up_tokenization_spaces=False).split("\n")
        lines += [f"  {title}:", *(f"    {line}" for line in words)]
    return "\n".join(lines)
