"""Which completion is in which slot, and which prompt in which prefix row. Host only: no tensor is known here."""

from collections import deque


class Scheduler:
    """First come, first served. Completion i answers prompt i // num_generations.

    Attributes:
        slots: the completion in each slot, or None.
        prefixes: the prompt in each prefix row, or None. Without prefix rows, every slot has its prompt itself.
    """

    def __init__(self, completions: list[int], num_generations: int, slots: int, prefixes: int):
        self.waiting = deque(completions)
        self.num_generations = num_generations
        self.slots: list[int | None] = [None] * slots
        self.prefixes: list[int | None] = [None] * prefixes

    @property
    def running(self) -> int:
        return sum(completion is not None for completion in self.slots)

    def prompt_of(self, completion: int) -> int:
        return completion // self.num_generations

    def admit(self) -> tuple[list[int], list[int]]:
        """Fill free slots from the queue's front: (slots, prefix rows) that are new and have to be filled.

        The queue waits while the prompt at its front finds no free prefix row.
        """
        new_slots, new_prefixes = [], []
        for slot, holder in enumerate(self.slots):
            if holder is not None:
                continue
            if not self.waiting:
                break
            prompt = self.prompt_of(self.waiting[0])
            if self.prefixes and prompt not in self.prefixes:
                if None not in self.prefixes:
                    break
                row = self.prefixes.index(None)
                self.prefixes[row] = prompt
                new_prefixes.append(row)
            self.slots[slot] = self.waiting.popleft()
            new_slots.append(slot)
        return new_slots, new_prefixes

    def finish(self, slot: int) -> None:
        """Free a slot, and its prompt's prefix row if nobody else needs it."""
        completion, self.slots[slot] = self.slots[slot], None
        assert completion is not None
        prompt = self.prompt_of(completion)
        needed = any(c is not None and self.prompt_of(c) == prompt for c in (*self.slots, *self.waiting))
        if self.prefixes and not needed:
            self.prefixes[self.prefixes.index(prompt)] = None

    def compact(self, rows: int) -> list[tuple[int, int]]:
        """Move every running completion below `rows`: (from, to) of each move."""
        free = [slot for slot in range(rows) if self.slots[slot] is None]
        moves = []
        for source in range(rows, len(self.slots)):
            if self.slots[source] is not None:
                target = free.pop(0)
                self.slots[target], self.slots[source] = self.slots[source], None
                moves.append((source, target))
        return moves
