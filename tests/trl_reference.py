"""TRL's own GRPO loss, called on a trainer that has nothing but what it reads there, and numbers to give it."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

DEFAULTS = dict(
    loss_type="dapo", epsilon=0.2, epsilon_high=0.28, delta=None, beta=0.0, use_bias_correction_kl=False,
    importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
    vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, off_policy_mask_threshold=None,
    top_entropy_quantile=1.0, entropy_coef=0.0,
)  # fmt: skip


def padded(seed=0):
    """(B, T) log-probabilities of three kinds, (B,) advantages and a (B, T) mask, one row masked out; fp64."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 12, 5, 9, 3])
    kept = torch.tensor([True, True, True, False, True, True])
    mask = (torch.arange(12) < lengths[:, None]) & kept[:, None]
    logprobs = -3 * torch.rand(6, 12, generator=draw, dtype=torch.float64)
    old, ref = (logprobs + 0.5 * torch.randn(6, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    return logprobs, old, ref, torch.randn(6, generator=draw, dtype=torch.float64), mask, lengths, kept


def trl_loss(
    logprobs, old, ref, advantages, mask, *, entropies=None, importance_weights=None, sampling=None,
    trainer_class=None, **changes
):  # fmt: skip
    """(loss, metrics) of TRL's own `_compute_loss`; tensors are (B, T), importance_weights may be (B, 1)."""
    trl = pytest.importorskip("trl", minversion="1.16")
    settings = SimpleNamespace(**DEFAULTS | changes, steps_per_generation=1)
    trainer = object.__new__(trainer_class or trl.GRPOTrainer)
    metrics = {"train": defaultdict(list)}
    entropies = torch.zeros_like(logprobs) if entropies is None else entropies
    for name, value in {
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (logprobs, entropies, None),
        "model": SimpleNamespace(training=True),
        "args": settings,
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
        "aux_loss_enabled": False, "top_entropy_quantile": settings.top_entropy_quantile,
        "off_policy_mask_threshold": settings.off_policy_mask_threshold,
        "importance_sampling_level": settings.importance_sampling_level, "use_vllm": importance_weights is not None,
        "vllm_importance_sampling_correction": True, "_entropy_bonus_enabled": settings.entropy_coef > 0,
        "use_adaptive_entropy": False, "entropy_coef": settings.entropy_coef,
        "current_gradient_accumulation_steps": 1, "loss_type": settings.loss_type, "beta": settings.beta,
        "max_completion_length": 16, "epsilon_low": settings.epsilon, "epsilon_high": settings.epsilon_high,
        "_metrics": metrics,
    }.items():  # fmt: skip
        setattr(trainer, name, value)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if importance_weights is not None:
        inputs["importance_sampling_ratio"] = importance_weights
    if sampling is not None:
        inputs["sampling_per_token_logps"] = sampling
    return trainer._compute_loss(None, inputs), {name: values[0] for name, values in metrics["train"].items()}
