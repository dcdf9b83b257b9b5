"""A run: what train() returns, and what tells one run's data from another's."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.model.policy import Policy


@dataclass(frozen=True)
class TrainResult:
    history: list[dict[str, Any]]  # one dict a step, under TRL's metric names; a resumed run's earlier steps included
    eval_history: list[dict[str, Any]]  # one dict an evaluation, the one before training first
    output_dir: str  # adapter/ the trained adapter, best/ the best evaluation's, checkpoint-N/ all that a resume needs
    policy: Policy


def fingerprint(prompts: list[Prompt]) -> str:
    """Tells apart lists of prompts, so that a resumed run goes on with its own."""
    return hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()


def eval_fingerprint(prompts: list[Prompt], k: int | None) -> str:
    """Tells apart what evaluations measure: prompts, gold answers, and how many completions are sampled of each."""
    rows = [[prompt.ids, prompt.columns] for prompt in prompts]
    return hashlib.sha256(json.dumps([k, rows], default=str).encode()).hexdigest()
