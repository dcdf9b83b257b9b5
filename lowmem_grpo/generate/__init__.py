"""Sampling completions from the resident policy: prompts and a group size in, completions out."""

from lowmem_grpo.generate.hf import sample
from lowmem_grpo.generate.sampling import SamplingParams

__all__ = ["SamplingParams", "sample"]
