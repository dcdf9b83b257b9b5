"""The policy: a frozen 4-bit base with adapters, its head, its attention, and how micro-batches are packed for it."""
