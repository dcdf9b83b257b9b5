"""The number of processes that torchrun has started together, as it tells each of them."""

import os


def num_started() -> int:
    """The number of processes of which torchrun has started this one; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))
