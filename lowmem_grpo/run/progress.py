"""The line that a person watches while a run goes on."""

import sys

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem_grpo.rollout.metrics import in_words
from lowmem_grpo.rollout.rollout import Rollout


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
