"""Evaluation on held-out prompts, its statistics, and how it is shown."""
