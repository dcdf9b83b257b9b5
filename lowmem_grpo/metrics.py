"""A step's metrics, under TRL's names, and where they go: metrics.jsonl, and a line that a person watches."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from lowmem_grpo.advantages import Advantages, nanstd
from lowmem_grpo.objective import TokenStats
from lowmem_grpo.packing import MicroBatch
from lowmem_grpo.rollout import Completion, Rollout


def length_metrics(completions: list[Completion]) -> dict[str, float]:
    lengths = torch.tensor([len(c.ids) for c in completions], dtype=torch.float32)
    ended = torch.tensor([c.finish != "length" for c in completions])
    terminated = lengths[ended] if ended.any() else torch.zeros(1)
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        "completions/mean_terminated_length": terminated.mean().item(),
        "completions/min_terminated_length": terminated.min().item(),
        "completions/max_terminated_length": terminated.max().item(),
    }


def reward_metrics(names: list[str], rewards: Tensor, advantages: Advantages) -> dict[str, float]:
    """rewards is (B, R); NaN, where no completion has a reward, is logged as NaN."""
    means, deviations = rewards.nanmean(dim=0), nanstd(rewards, dim=0)
    metrics = {}
    for name, mean, deviation in zip(names, means.tolist(), deviations.tolist(), strict=True):
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": deviation}
    return metrics | {
        "reward": advantages.rewards.nanmean().item(),
        "reward_std": nanstd(advantages.rewards, dim=0).item(),
        "frac_reward_zero_std": advantages.zero_std.float().mean().item(),
    }


class TokenMeter:
    """What an update saw at each of the rollout's M tokens that it computed, whatever the micro-batches."""

    def __init__(self, rollout: Rollout, device: torch.device):
        tokens = int(rollout.offsets[-1])
        self.rollout = rollout
        self.seen = torch.zeros(tokens, dtype=torch.bool, device=device)
        self.entropy, self.kl, self.clipped_low, self.clipped_high, self.difference = torch.zeros(
            5, tokens, device=device
        )
        self.ratio = torch.ones(tokens, device=device)
        self.with_kl = self.with_ratio = False

    def add(self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor, stats: TokenStats, *, first: bool) -> None:
        """Record one micro-batch; a later iteration over the same rollout, or another attempt, overwrites it.

        Only in the first iteration is the policy still the one that sampled.
        """
        self.with_ratio = not first
        if first and self.rollout.sampling_logprobs is not None:
            self.difference[batch.tokens] = (logprobs - self.rollout.sampling_logprobs[batch.tokens]).abs()
        self.seen[batch.tokens] = True
        self.entropy[batch.tokens] = entropy
        self.ratio[batch.tokens] = stats.ratio
        self.clipped_low[batch.tokens] = stats.clipped_low.float()
        self.clipped_high[batch.tokens] = stats.clipped_high.float()
        if stats.kl is not None:
            self.with_kl = True
            self.kl[batch.tokens] = stats.kl

    def metrics(self) -> dict[str, float]:
        """Means over the tokens that counted; clip minimum and maximum are over completions, as in TRL."""
        count = self.seen.sum().clamp(min=1)
        low, high = (self._completion_means(x) for x in (self.clipped_low, self.clipped_high))
        values = {
            "frac_tokens_skipped": 1 - self.seen.float().mean(),
            "entropy": self.entropy.sum() / count,
            "clip_ratio/low_mean": self.clipped_low.sum() / count,
            "clip_ratio/low_min": low.min() if len(low) else count * 0,
            "clip_ratio/high_mean": self.clipped_high.sum() / count,
            "clip_ratio/high_max": high.max() if len(high) else count * 0,
            "clip_ratio/region_mean": (self.clipped_low + self.clipped_high).sum() / count,
        }
        if self.rollout.sampling_logprobs is not None:
            values["sampling/sampling_logp_difference/mean"] = self.difference.sum() / count
            values["sampling/sampling_logp_difference/max"] = self.difference.max()
        if self.with_ratio:
            ratio = self.ratio[self.seen] if self.seen.any() else self.ratio
            values["ratio/mean"], values["ratio/min"], values["ratio/max"] = ratio.mean(), ratio.min(), ratio.max()
        if self.with_kl:
            values["kl"] = self.kl.sum() / count
        return {name: value.item() for name, value in values.items()}

    def _completion_means(self, values: Tensor) -> Tensor:
        """Means (B',) over each completion that counted at all."""
        lengths = self.rollout.offsets.diff().to(values.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
        sums, counts = (
            torch.zeros(len(lengths), device=values.device).index_add_(0, owner, x) for x in (values, self.seen.float())
        )
        return sums[counts > 0] / counts[counts > 0]


def write_completions(output_dir: Path, step: int, table: dict[str, list]) -> None:
    """completions/completions_{step}.parquet, one row a completion, as TRL writes it."""
    folder = output_dir / "completions"
    folder.mkdir(exist_ok=True)
    columns = {name: values if _one_type(values) else list(map(str, values)) for name, values in table.items()}
    Dataset.from_dict({"step": [step] * len(table["completion"]), **columns}).to_parquet(
        folder / f"completions_{step:05d}.parquet"
    )


def _one_type(values: list) -> bool:
    """Whether Arrow can make a column of them; what a reward function logged may be of several types."""
    return len({type(value) for value in values if value is not None}) < 2


class MetricsLog:
    """metrics.jsonl: one line a step or evaluation. A run resumed at first_step drops the lines after it."""

    def __init__(self, output_dir: Path, first_step: int):
        self.path = output_dir / "metrics.jsonl"
        kept = [line for line in self.lines() if line["step"] <= first_step] if first_step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a crash cut short
                lines.append(json.loads(line))
        return lines

    def write(self, metrics: dict[str, float]) -> None:
        """Append one line; what is not finite becomes null, which JSON has."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")


class Progress:
    """The line a person watches: rewritten in place on a terminal, one line a step elsewhere. On standard error."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.console = Console(file=sys.stderr, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def step(self, metrics: dict[str, float]) -> None:
        parts = [
            f"step {metrics['step']:.0f}/{self.total_steps}",
            f"reward {metrics['reward']:.3f}",
            f"length {metrics['completions/mean_length']:.1f}",
            f"entropy {metrics['entropy']:.3f}",
            *([f"kl {metrics['kl']:.4f}"] if "kl" in metrics else []),
            f"{metrics['step_time']:.2f} s",
            f"peak {max(v for k, v in metrics.items() if k.endswith('peak_mib')):.0f} MiB",
        ]
        if self.live:
            done = int(24 * metrics["step"] / self.total_steps)
            self.live.update(Text("━" * done + "─" * (24 - done) + "  " + "  ".join(parts)), refresh=True)
        else:
            self.console.print("  ".join(parts), soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
