"""`lowmem-grpo watch`: a run in the terminal, from its files alone, without torch."""
