"""A run as people see it: lines in the terminal, trackers, model cards, report.html, and at its end the hub."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_grpo.distributed import is_main
from lowmem_grpo.errors import NotUploadedError, in_a_line
from lowmem_grpo.inputs.training import RunInputs, name_of
from lowmem_grpo.output.hub import repository, upload
from lowmem_grpo.output.secrets import without_secrets
from lowmem_grpo.output.trackers import Place, Trackers, tracker_names
from lowmem_grpo.report import report
from lowmem_grpo.run import about
from lowmem_grpo.run.card import write_card
from lowmem_grpo.run.progress import Progress
from lowmem_grpo.run.randomness import same_randomness
from lowmem_grpo.run.room import refusal


class Publisher:
    """Tells people of a run, on rank 0. What it cannot write or send is said, and costs the run nothing."""

    def __init__(
        self,
        inputs: RunInputs,
        step: int,  # at which the run goes on; 0 where it begins
        dropped: Sequence[dict[str, Any]],  # lines of its log that a resume has taken back, which trackers have
        *,
        is_here: bool,  # the run goes on in its own folder
    ):
        assert inputs.output_dir is not None
        self.inputs, self.config, self.folder = inputs, inputs.config, inputs.output_dir
        self.progress = Progress(inputs.total_steps)
        self.told: set[str] = set()  # what was said once
        name = self.config.run_name or "/".join(self.folder.resolve().parts[-2:])
        place = Place(self.folder, self.config.project, name, None, step, self.config.trackio_space_id)
        names = tracker_names(self.config.trackers) if is_main() else []
        self.trackers = Trackers(names, place, is_resumed=is_here, known=dropped)

    @contextlib.contextmanager
    def opened(self) -> Iterator["Publisher"]:
        """Show progress and send lines to trackers until the run ends."""
        with self.progress:
            with same_randomness():  # which a tracker may draw a name from
                self.trackers.start(self._tracked_settings())
            try:
                yield self
            finally:
                self.trackers.finish()
                self._say_news()

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def say_once(self, what: str, text: str) -> None:
        """Print a line, once for each `what` in a run."""
        if what not in self.told:
            self.told.add(what)
            self.say(text)

    def step(self, metrics: dict[str, float], remarks: Sequence[str]) -> None:
        """Show a finished step."""
        self.progress.step(metrics, remarks)

    def track(self, line: Mapping[str, float | str]) -> None:
        """Send a line of metrics.jsonl to the trackers, and say what has become of earlier ones."""
        self.trackers.log(line)
        self._say_news()

    def without(self, what: str, write: Callable[[], None], then: str = "; the run goes on") -> None:
        """Write what a run can do without. Where the disk refuses, that is said once."""
        if not is_main():
            return
        try:
            write()
        except OSError as error:
            self.say_once(what, f"{self.folder / what} cannot be written ({refusal(error)}){then}")

    def card(self, folder: Path) -> None:
        """Write the model card of an adapter into its folder."""
        if is_main():
            write_card(folder, self.say)

    def end(self, step: int, how: str, why: str, best: Path) -> None:
        """Write how the run has ended at a step, the card of its best adapter, and report.html."""
        self.without(about.RUN, partial(about.write_end, self.folder, step, how, why), then="")
        self.card(best)
        self.without(report.NAME, self._report, then="")

    def push(self) -> None:
        """Upload the adapter with its card and the page, where push_to_hub says so."""
        config, adapter = self.config, self.folder / "adapter"
        if not config.push_to_hub or not is_main():
            return
        repo_id = repository(config.hub_model_id, self.folder)
        self.say(f"uploading {adapter} to {repo_id}")
        try:
            address = upload(
                adapter, repo_id, private=config.hub_private_repo,
                revision=config.hub_revision, beside=self._page_for_others(),
            )  # fmt: skip
        except NotUploadedError as error:
            self.say(str(error))
        else:
            self.say(f"{adapter} is uploaded to {address}")

    def _page_for_others(self) -> dict[str, str]:
        """The page that is uploaded, by its name. Nothing where it cannot be made, which was said."""
        with contextlib.suppress(Exception):
            return {report.NAME: report.page_for_others(self.folder)}
        return {}

    def _report(self) -> None:
        """Write report.html. Raise OSError where the disk refuses; whatever else fails is said."""
        try:
            self.say(f"report: {report.write_report(self.folder)}")
        except OSError:
            raise
        except Exception as error:
            self.say(f"{self.folder / report.NAME} cannot be made ({in_a_line(error)})")

    def _tracked_settings(self) -> dict[str, Any]:
        """The model, the data and the settings of the run, which a tracker shows beside its numbers."""
        inputs = self.inputs
        data = {f"{name}_dataset": value for name, value in inputs.datasets.items()}
        settings = {"kind": self.config.kind, "model": name_of(inputs.model), **data, **asdict(self.config)}
        return without_secrets(settings)

    def _say_news(self) -> None:
        for text in self.trackers.news():
            self.say(text)
