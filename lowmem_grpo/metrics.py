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
    """Mean, least and greatest length, of all completions and of those that ended; NaN where none did."""
    lengths = torch.tensor([len(c.ids) for c in completions], dtype=torch.float32)
    ended = torch.tensor([c.finish != "length" for c in completions])
    terminated = lengths[ended] if ended.any() else torch.full((1,), torch.nan)
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
    """Means and deviations of rewards (B, R): NaN where no completion has a reward, or only one to deviate."""
    columns = torch.cat([rewards, advantages.rewards[:, None]], dim=1)
    several = columns.isnan().logical_not().sum(dim=0) > 1
    means, deviations = columns.nanmean(dim=0), nanstd(columns, dim=0).where(several, torch.nan)
    metrics = {}
    for name, mean, deviation in zip(names, means.tolist(), deviations.tolist(), strict=False):
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": deviation}
    return metrics | {
        "reward": means[-1].item(),
        "reward_std": deviations[-1].item(),
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
            known = self.values.setdefault(name, self._zeros())
            known[tokens] = value.detach().to(known.dtype)

    def mean(self, name: str, part: Rollout) -> float | None:
        """Over the tokens of a part of the rollout that counted, those that `keep` leaves out excepted, if any did."""
        where = slice(part.first_token, part.first_token + int(part.offsets[-1]))
        counted = self.seen[where] if part.keep is None else self.seen[where] & part.keep
        values = self.values.get(name, self._zeros())[where][counted]
        return values.mean().item() if len(values) else None

    def metrics(self) -> dict[str, float]:
        """Means over the tokens that counted; clip minimum and maximum are over completions, as in TRL.

        What is the mean of nothing is NaN and not 0: where no token counted, because no group has a difference, or
        every completion is masked, nobody knows the policy's entropy.
        """
        count, zeros = self.seen.sum(), self._zeros()  # a sum of nothing, 0, divided by 0 is NaN
        clipped_low, clipped_high = (self.values.get(name, zeros) for name in ("clipped_low", "clipped_high"))
        low, high = (self._completion_means(x) for x in (clipped_low, clipped_high))
        nothing = zeros.sum() / 0
        values = {
            "frac_tokens_skipped": 1 - self.seen.float().mean(),
            "entropy": self.values.get("entropy", zeros).sum() / count,
            "clip_ratio/low_mean": clipped_low.sum() / count,
            "clip_ratio/low_min": low.min() if len(low) else nothing,
            "clip_ratio/high_mean": clipped_high.sum() / count,
            "clip_ratio/high_max": high.max() if len(high) else nothing,
            "clip_ratio/region_mean": (clipped_low + clipped_high).sum() / count,
        }
        for name, of in _MEANS.items():
            if of in self.values:
                values[name] = self.values[of].sum() / count
        if self.rollout.ref_logprobs is not None and "kl" not in self.rollout.metrics:
            values.setdefault("kl", nothing)
        if self.rollout.sampling_logprobs is not None:
            difference = self.values.get("difference", zeros)
            fresh = self.seen[: self.rollout.fresh_tokens].sum()  # those that this step's policy sampled
            values["sampling/sampling_logp_difference/mean"] = difference.sum() / fresh
            values["sampling/sampling_logp_difference/max"] = difference.max() if fresh else nothing
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
            torch.zeros(len(lengths), device=values.device).index_add_(0, owner, x)
            for x in (values, self.seen.to(values.dtype))
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

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The line of the evaluation at a step, if there was one."""
        return next((line for line in self.lines() if "eval_reward" in line and line["step"] == step), None)

    def write(self, metrics: dict[str, float]) -> None:
        """Append one line; what is not finite becomes null, which JSON has."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")


class Progress:
    """The line a person watches: rewritten in place on a terminal, one line a step elsewhere. On standard error."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        # Standard output goes where it went: only where that is the terminal too would it tear the line.
        self.live = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def step(self, metrics: dict[str, float], rollout: Rollout) -> None:
        # Where tokens were computed, a NaN is shown as one: something is broken.
        words = in_words if metrics["frac_tokens_skipped"] == 1 else format
        parts = [
            f"step {metrics['step']:.0f}/{self.total_steps}",
            f"reward {in_words(metrics['reward'], '.3f')}",
            f"length {metrics['completions/mean_length']:.1f}",
            f"entropy {words(metrics['entropy'], '.3f')}",
            *([f"kl {words(metrics['kl'], '.4f')}"] if "kl" in metrics else []),
            f"{metrics['step_time']:.2f} s",
            f"peak {max(v for k, v in metrics.items() if k.endswith('peak_mib')):.0f} MiB",
            *_remarks(metrics, rollout),
        ]
        if self.live:
            done = int(24 * metrics["step"] / self.total_steps)
            self.live.update(Text("━" * done + "─" * (24 - done) + "  " + "  ".join(parts)), refresh=True)
        else:
            self.say("  ".join(parts))

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def _remarks(metrics: dict[str, float], rollout: Rollout) -> list[str]:
    """What a person should know who sees a step teach little."""
    differs = rollout.advantages != 0
    remarks = []
    if not differs.any():
        remarks.append("no difference in any group")
    elif not (differs & rollout.completion_mask).any():
        remarks.append("all that differ are masked")
    cut_off = metrics["completions/clipped_ratio"]
    if cut_off > 0.5:
        remarks.append(f"{100 * cut_off:.0f} % cut off at max_completion_length")
    return remarks


def in_words(value: float | None, form: str) -> str:
    """A metric for people, formatted as `.3f` says; - where it is the mean of nothing."""
    return "-" if value is None or math.isnan(value) else format(value, form)
