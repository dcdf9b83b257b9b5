"""Completions of several turns, with tokens between them that the policy did not draw, such as what a tool returned."""

from typing import Protocol

from lowmem_grpo.generate.completion import Completion


class Turns(Protocol):
    """Tokens that stand between the turns of a call's completions, each by its number among them."""

    def end(self, number: int, completion: Completion) -> bool:
        """Take a completion whose turn has ended, with all that was before; returns whether it may go on."""
        ...

    def answers(self) -> dict[int, list[int]]:
        """The tokens that come next, of each completion that goes on; asked for when all turns have ended.

        They leave room for one token more at least. Of those that end() said may go on, one that is not here is done.
        """
        ...
