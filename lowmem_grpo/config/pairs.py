"""PairsConfig: which completions of a sampled file make a pair. Standard library only."""

from dataclasses import dataclass

from lowmem_grpo.config.fields import option
from lowmem_grpo.config.sections import TITLES, Checked


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Checked):
    """Settings of pairs of a prompt's best and worst completion. Raise InputError for a value out of its range."""

    min_margin: float = option(0.0, "least distance between the rewards of a pair", common=True, at_least=0)


TITLES[PairsConfig] = "rules"
