"""Findings of the doctor in a run's inputs, before the first step."""

from lowmem_grpo.inputs import Inputs
from lowmem_grpo.run.doctor import Finding


def findings(inputs: Inputs) -> list[Finding]:
    """Each situation in which a run with these inputs does not learn what it should."""
    return []
