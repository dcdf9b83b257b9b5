"""The line that a person watches while a run goes on."""

import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem_grpo.errors import printable, printable_text
from lowmem_grpo.rollout.metrics import in_words
from lowmem_grpo.terminal import bar, columns_of, fitted, flowed, is_ascii

LONGEST = 24  # columns of the bar
SHORTEST = 8


class Screen(Console):
    """A console whose reader may go away, as `| head` does: what comes after that is dropped."""

    def on_broken_pipe(self) -> None:  # rich's own ends the process
        self.quiet = True


class Progress:
    """The line a person watches: rewritten in place on a terminal, one line a step elsewhere. On standard error."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.file = sys.stderr
        self.console = Screen(file=self.file, highlight=False, markup=False, emoji=False)
        # Standard output goes where it went: only where that is the terminal too would it tear the line.
        self.live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())

    def __enter__(self) -> "Progress":
        if self.live:
            with contextlib.suppress(OSError):
                self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            with contextlib.suppress(OSError):  # a terminal that was closed meanwhile
                self.live.stop()

    def step(self, metrics: dict[str, float], remarks: Sequence[str] = ()) -> None:
        """One finished step: of the metrics those that a person follows, and what the loop has to say."""
        # Where tokens were computed, a NaN is shown as one: something is broken.
        words = in_words if metrics.get("frac_tokens_skipped") == 1 else format
        aim = ("reward", "reward", in_words, ".3f") if "reward" in metrics else ("loss", "loss", format, ".4f")
        shown = [
            aim, ("length", "completions/mean_length", in_words, ".1f"), ("accuracy", "accuracy", format, ".3f"),
            ("accuracy", "mean_token_accuracy", format, ".3f"), ("entropy", "entropy", words, ".3f"),
            ("calls", "tools/call_frequency", format, ".2f"), ("kl", "kl", words, ".4f"),
            ("teacher kl", "teacher_kl", in_words, ".4f"),
        ]  # fmt: skip
        parts = [
            f"step {metrics['step']:.0f}/{self.total_steps}",
            *(f"{word} {write(metrics[name], form)}" for word, name, write, form in shown if name in metrics),
            f"{metrics['step_time']:.2f} s",
            f"peak {max(v for k, v in metrics.items() if k.endswith('peak_mib')):.0f} MiB",
            *remarks,
        ]
        if self.live:
            with contextlib.suppress(OSError):
                self.live.update(Text(self.in_place(metrics["step"] / self.total_steps, parts)), refresh=True)
        else:
            self.say("  ".join(parts))

    def in_place(self, share: float, parts: Sequence[str]) -> str:
        """A step's line with a bar, where there is room for one; else lines of whole parts."""
        width = columns_of(self.file) or self.console.width
        words = [printable(part) for part in parts]
        lines = list(flowed([words[0], *(f"  {word}" for word in words[1:])], width, "  "))
        room = min(LONGEST, width - len(lines[0]) - 2)
        if len(lines) == 1 and room >= SHORTEST:
            lines[0] = f"{bar(share, room, is_ascii=is_ascii(self.file))}  {lines[0]}"
        return "\n".join(lines)

    def say(self, text: str) -> None:
        """Print a line. On a terminal that was closed nobody sees it, and the run goes on."""
        with contextlib.suppress(OSError):
            self.console.print(fitted(printable_text(text), columns_of(self.file)), soft_wrap=True)
