"""One update: passes over micro-batches, and the optimizer."""
