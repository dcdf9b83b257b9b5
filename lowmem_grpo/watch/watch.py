"""watch(): a run, or a pipeline, in the terminal while it goes on, in a process of its own."""

import contextlib
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lowmem_grpo.errors import InputError, in_a_line, printable
from lowmem_grpo.output.lock import is_in_use
from lowmem_grpo.report.reading import DONE, EVALUATION, OF_THE_BASE, is_run, mapping, phases_of
from lowmem_grpo.terminal import columns_of
from lowmem_grpo.terminal import is_ascii as has_only_ascii
from lowmem_grpo.watch.log import SavedObject
from lowmem_grpo.watch.run import WatchedRun, active_phase
from lowmem_grpo.watch.view import STYLES, View

EVERY = 1.0  # s between two looks


class Watched:
    """A folder that is watched: a run's, or a pipeline's with the phase that goes on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run: WatchedRun | None = None
        self.evaluations: dict[Path, SavedObject] = {}  # of a pipeline's base and of its phases

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            InputError: nothing of a run is there.
        """
        folder = active_phase(self.folder) or self.folder
        if self.run is None or self.run.folder != folder:
            self.run = WatchedRun(folder)
        self.run.refresh()
        if folder == self.folder and not is_run(folder) and not is_in_use(folder) and not phases_of(folder):
            raise InputError(
                f"{folder} holds no run: it has neither metrics.jsonl nor run.json; give the output_dir of a training "
                "or of a pipeline, or --wait for one that begins"
            )

    @property
    def is_over(self) -> bool:
        """True where nobody writes there any more."""
        return self.run is not None and self.run.state.is_over and not is_in_use(self.folder)

    def lines(self, width: int | None, height: int | None, *, is_ascii: bool) -> list[Text]:
        """The view, in at most `height` lines."""
        assert self.run is not None
        view = View(width, is_ascii=is_ascii)
        phases = phases_of(self.folder)
        state = ("running", STYLES["running"]) if is_in_use(self.folder) else ("not running", "dim")
        above = [view.line((self.folder.resolve().name, "bold"), ("  a pipeline  ", "dim"), state)] if phases else []
        for phase in phases:
            word = "done" if (phase / DONE).is_file() else "running" if is_in_use(phase) else "begun"
            word = "" if phase.name == OF_THE_BASE else word if phase.is_dir() else "not begun"
            mark = "> " if phase == self.run.folder else "  "
            found = self.evaluations.setdefault(phase, SavedObject(phase / EVALUATION)).read().get("metrics")
            measured = view.measured(mapping(found))
            stands = ["  ", (word, STYLES.get(word, ""))] if word else []
            above.append(view.line(mark, phase.name, *stands, *measured))
        if phases and self.run.folder == self.folder:  # none has begun
            return above[:height]
        above += [Text()] if above else []
        return [*above, *view.of_run(self.run, None if height is None else max(3, height - len(above)))][:height]


def watch(folder: Path, *, once: bool = False, wait: bool = False) -> None:
    """Show a run until it ends, or once where that is asked or the output is no terminal.

    With `wait`, a folder that holds no run yet is looked at until it does.

    Raises:
        InputError: the folder holds no run, or cannot be read.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    watched = Watched(folder)
    _first_look(watched, console, wait=wait)
    if not once and console.is_terminal and not console.is_dumb_terminal and not watched.is_over:
        _go_on(watched, console)
    lines = watched.lines(columns_of(console.file), None, is_ascii=has_only_ascii(console.file))
    console.print(*lines, sep="\n", soft_wrap=True)


def _first_look(watched: Watched, console: Console, *, wait: bool) -> None:
    """Look until there is a run to see, or once."""
    is_told = False
    while True:
        try:
            return watched.refresh()
        except InputError:
            if not wait:
                raise
        except OSError as error:
            raise InputError(
                f"{watched.folder} cannot be read ({in_a_line(error)}); give a folder that you may read"
            ) from error
        if not is_told and console.is_terminal:
            console.print(Text(printable(f"waiting for a run in {watched.folder}; Ctrl-C ends that")))
            is_told = True
        time.sleep(EVERY)


def _go_on(watched: Watched, console: Console) -> None:
    """Draw the whole terminal anew every second, until the run is over."""
    with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
        while not watched.is_over:
            lines = watched.lines(console.width, console.height, is_ascii=has_only_ascii(console.file))
            live.update(Group(*lines), refresh=True)
            time.sleep(EVERY)
            with contextlib.suppress(InputError, OSError):  # a folder that is replaced at this moment
                watched.refresh()
