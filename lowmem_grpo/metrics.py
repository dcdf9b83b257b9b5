"""A step's metrics, under TRL's names, and where they go: metrics.jsonl, and a line that a person watches."""

import contextlib
import io
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
from lowmem_grpo.rollout import Completion, Rollout

# Metrics that are the mean of what an update recorded, where it did: by metric, what it is the mean of.
_MEANS = {"kl": "kl", "cispo_clip_ratio": "cispo_clipped", "vespo/phi_seq_mean": "phi_seq"}


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
        self.rollout = rollout
        self.device = device
        self.seen = self._zeros().bool()
        self.values: dict[str, Tensor] = {}  # (M,) fp32 each, 0 where not seen

    def _zeros(self) -> Tensor:
        return torch.zeros(int(self.rollout.offsets[-1]), device=self.device)

    def add(self, tokens: Tensor, **values: Tensor) -> None:
        """Record values (N,) at tokens (N,) of the rollout; a later iteration, or another attempt, overwrites them."""
        self.seen[tokens] = True
        for name, value in values.items():
            self.values.setdefault(name, self._zeros())[tokens] = value.detach().float()

    def mean(self, name: str, part: Rollout) -> float | None:
        """Over the tokens of a part of the rollout that counted, those that `keep` leaves out excepted, if any did."""
        where = slice(part.first_token, part.first_token + int(part.offsets[-1]))
        counted = self.seen[where] if part.keep is None else self.seen[where] & part.keep
        values = self.values.get(name, self._zeros())[where][counted]
        return values.mean().item() if len(values) else None

    def metrics(self) -> dict[str, float]:
        """Means over the tokens that counted; clip minimum and maximum are over completions, as in TRL."""
        count = self.seen.sum().clamp(min=1)
        zeros = self._zeros()
        clipped_low, clipped_high = (self.values.get(name, zeros) for name in ("clipped_low", "clipped_high"))
        low, high = (self._completion_means(x) for x in (clipped_low, clipped_high))
        values = {
            "frac_tokens_skipped": 1 - self.seen.float().mean(),
            "entropy": self.values.get("entropy", zeros).sum() / count,
            "clip_ratio/low_mean": clipped_low.sum() / count,
            "clip_ratio/low_min": low.min() if len(low) else count * 0,
            "clip_ratio/high_mean": clipped_high.sum() / count,
            "clip_ratio/high_max": high.max() if len(high) else count * 0,
            "clip_ratio/region_mean": (clipped_low + clipped_high).sum() / count,
        }
        for name, of in _MEANS.items():
            if of in self.values:
                values[name] = self.values[of].sum() / count
        if self.rollout.sampling_logprobs is not None:
            difference = self.values.get("difference", zeros)
            fresh = self.seen[: self.rollout.fresh_tokens].sum().clamp(min=1)  # those that this step's policy sampled
            values["sampling/sampling_logp_difference/mean"] = difference.sum() / fresh
            values["sampling/sampling_logp_difference/max"] = difference.max() if len(difference) else count * 0
        for name, of in (("ratio", "ratio"), ("sampling/importance_sampling_ratio", "correction")):
            if of in self.values and self.seen.any():
                seen = self.values[of][self.seen]
                values |= {f"{name}/mean": seen.mean(), f"{name}/min": seen.min(), f"{name}/max": seen.max()}
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
    """completions/completions_{step}.parquet, one row a completion, as TRL writes it.

    A column that Parquet cannot hold, since a reward function may log anything, is written as text.
    """
    folder = output_dir / "completions"
    folder.mkdir(exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    columns = {"step": [step] * len(table["completion"]), **table}
    try:
        Dataset.from_dict(columns).to_parquet(path)
    except Exception:  # pyarrow's exceptions have no common base, and values may raise their own
        columns = {name: values if _fits_parquet(values) else _as_texts(values) for name, values in columns.items()}
        Dataset.from_dict(columns).to_parquet(path)


def _fits_parquet(values: list) -> bool:
    try:
        Dataset.from_dict({"values": values}).to_parquet(io.BytesIO())
    except Exception:
        return False
    return True


def _as_texts(values: list) -> list[str | None]:
    """str() of each, a character that UTF-8 lacks as its escape."""
    return [None if v is None else str(v).encode("utf-8", "backslashreplace").decode() for v in values]


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
