"""The completion in each slot, the prompt in each prefix row, and the pages of each slot. No tensors."""

from collections import deque
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

NOBODYS = 0  # the page that slots without one of their own write to


class Scheduler:
    """A queue of completions, first come, first served; completion i is of prompt i // num_generations.

    Attributes:
        slots: the completion in each slot, or None.
        prefixes: the prompt in each prefix row, or None. Without prefix rows, every slot has its prompt itself.
        pages: the pages of each slot, in order. Without pages, every slot has its own room.
    """

    def __init__(
        self, completions: list[int], num_generations: int, num_slots: int, num_prefixes: int, num_pages: int,
        page_tokens: int,
    ):  # fmt: skip
        self.waiting = deque(completions)
        self.num_generations = num_generations
        self.slots: list[int | None] = [None] * num_slots
        self.prefixes: list[int | None] = [None] * num_prefixes
        self.pages: list[list[int]] = [[] for _ in range(num_slots)]
        self.page_tokens = page_tokens
        self.free = [page for page in range(num_pages) if page != NOBODYS]
        self.admitted = [0] * num_slots  # when each slot's completion started, in admissions
        self.admissions = 0
        self.preempted = 0  # times that a completion was sent back for want of pages
        self.short = False  # that happened, and none has ended since

    @property
    def running(self) -> int:
        return sum(completion is not None for completion in self.slots)

    def prompt_of(self, completion: int) -> int:
        return completion // self.num_generations

    def admit(self, running: Sequence[int], starting: Callable[[int], int]) -> tuple[list[int], list[int]]:
        """Fill free slots from the queue's front; returns the slots and prefix rows that are new.

        The queue waits where the next prompt finds no free prefix row, or where free pages are too few. The pages asked
        for are those of running[slot] tokens a slot, and of starting(completion) tokens of a new one.
        """
        new_slots, new_prefixes = [], []
        spare = len(self.free) - sum(
            max(0, self._pages(tokens) - len(self.pages[slot]))
            for slot, tokens in enumerate(running)
            if self.slots[slot] is not None
        )
        for slot, holder in enumerate(self.slots):
            if holder is not None:
                continue
            if not self.waiting or (self.short and self.running):
                break
            spare -= self._pages(starting(self.waiting[0]))
            if spare < 0 and self.running:
                break
            prompt = self.prompt_of(self.waiting[0])
            if self.prefixes and prompt not in self.prefixes:
                if None not in self.prefixes:
                    break
                row = self.prefixes.index(None)
                self.prefixes[row] = prompt
                new_prefixes.append(row)
            self.slots[slot] = self.waiting.popleft()
            self.admissions += 1
            self.admitted[slot] = self.admissions
            new_slots.append(slot)
        return new_slots, new_prefixes

    def reserve(self, num_tokens: list[int]) -> list[int]:
        """Give each running slot, the oldest first, pages for num_tokens[slot] tokens; returns the preempted slots.

        Where pages run out, the youngest goes back to the queue's front.
        """
        preempted = []
        if not self.page_tokens:
            return preempted
        for slot in sorted((s for s, c in enumerate(self.slots) if c is not None), key=lambda s: self.admitted[s]):
            while self.slots[slot] is not None and len(self.pages[slot]) < self._pages(num_tokens[slot]):
                if self.free:
                    self.pages[slot].append(self.free.pop())
                    continue
                running = [s for s, c in enumerate(self.slots) if c is not None]
                youngest = max(running, key=lambda s: self.admitted[s])
                self.waiting.appendleft(self._leave(youngest))
                preempted.append(youngest)
                self.preempted += 1
                self.short = True
        return preempted

    def _pages(self, num_tokens: int) -> int:
        return ceil(num_tokens / self.page_tokens) if self.page_tokens else 0

    def finish(self, slot: int) -> None:
        """Free a slot and its pages, and its prompt's prefix row if nobody else needs it."""
        prompt = self.prompt_of(self._leave(slot))
        self.short = False
        needed = any(c is not None and self.prompt_of(c) == prompt for c in (*self.slots, *self.waiting))
        if self.prefixes and not needed:
            self.prefixes[self.prefixes.index(prompt)] = None

    def _leave(self, slot: int) -> int:
        completion, self.slots[slot] = self.slots[slot], None
        assert completion is not None
        self.free += self.pages[slot]
        self.pages[slot] = []
        return completion

    def compact(self, num_rows: int) -> list[tuple[int, int]]:
        """Move every running completion below num_rows; returns (from, to) of each move."""
        free = [slot for slot in range(num_rows) if self.slots[slot] is None]
        every: list[list[Any]] = [self.slots, self.pages, self.admitted]
        moves = []
        for source in range(num_rows, len(self.slots)):
            if self.slots[source] is not None:
                target = free.pop(0)
                for values in every:
                    values[target], values[source] = values[source], values[target]
                moves.append((source, target))
        return moves
