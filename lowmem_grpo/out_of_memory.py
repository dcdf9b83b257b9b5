"""Out of memory: the one place where work is tried again, and the token budget that shrinks."""

import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lowmem_grpo.determinism import deterministic

T = TypeVar("T")


# cuBLAS' and cuDNN's handles and workspaces, and what the driver tells Triton and bitsandbytes.
SAYINGS = re.compile(r"out of memory|ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY", re.IGNORECASE)


@contextlib.contextmanager
def as_torch_says_it() -> Iterator[None]:
    """Turn a library's own error for want of memory into torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not SAYINGS.search(str(error)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def tried_again(work: Callable[[], T], failed: Callable[[torch.OutOfMemoryError], None]) -> T:
    """Return work(), begun anew after each out-of-memory, when all memory that can be let go is.

    failed(error) comes before: there the next attempt is made smaller, or the error raised where nothing is left to do.
    """
    while True:
        try:
            with as_torch_says_it():
                return work()
        except torch.OutOfMemoryError as error:
            failed(error)
        let_go()  # only here is the error gone, and with it the frames that held what did not fit


def let_go() -> None:
    """Give back the memory of what nobody uses any more, and of tensors that were in reference cycles."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class TokenBudget:
    """The most tokens of a micro-batch: token_budget at first, and less after an out-of-memory.

    With `deterministic`, what is fitted computes in one order, to the last bit; see there.

    Attributes:
        give_way: lets go what is kept for other phases; called before anything is tried again.
    """

    def __init__(self, num_tokens: int, deterministic: bool = False):
        self.num_tokens, self.deterministic = num_tokens, deterministic
        self.give_way: Callable[[], None] = lambda: None
        self.out_of_memory = 0  # how often

    def fit(self, work: Callable[[int], T], lengths: list[int]) -> T:
        """Run work(num_tokens), which starts anew with each call, until it fits in memory; returns its result.

        Out of memory, free memory is given back and the call repeated; then repeated with half of the tokens of the
        micro-batch that failed, as often as need be. The lower budget stays. Random numbers are drawn as if nothing had
        happened; but a micro-batch that was split draws other masks of lora_dropout, which follow the micro-batches.
        `lengths` are the sequences'.

        Raises:
            torch.OutOfMemoryError: one sequence alone does not fit; a note has the remedy.
        """
        seen = self.out_of_memory
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None

        def failed(error: torch.OutOfMemoryError) -> None:
            self.note()
            if self.out_of_memory > seen + 1:
                self._halve(error, lengths)
            torch.set_rng_state(drawn[0])
            if drawn[1] is not None:
                torch.cuda.set_rng_state(drawn[1])

        with deterministic(self.deterministic):
            return tried_again(lambda: work(self.num_tokens), failed)

    def note(self) -> None:
        """Count an out-of-memory, also of something without micro-batches, and let other phases' memory go."""
        self.out_of_memory += 1
        self.give_way()

    def _halve(self, error: torch.OutOfMemoryError, lengths: list[int]) -> None:
        longest = max(lengths, default=0)
        # Outside of a micro-batch nobody knows how many tokens were too many.
        guess = min(self.num_tokens, sum(lengths))
        num_tokens, alone = getattr(error, "micro_batch", (guess, guess <= longest))
        if alone:
            error.add_note(
                f"A micro-batch of one sequence, of {longest} tokens, does not fit. Lower max_completion_length, "
                "max_prompt_length or max_length, or choose a smaller model."
            )
            raise error
        # Where short sequences are too many for memory, each with its keys, the longest by itself may still fit.
        self.num_tokens = max(num_tokens // 2, longest if longest < num_tokens else 1)

    def metrics(self) -> dict[str, float]:
        return {"memory/token_budget": self.num_tokens, "memory/out_of_memory": self.out_of_memory}
