"""run_pipeline(): the phases of R1, of R1-Zero or of RLHF, one run after another, from what each before has made."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lowmem_grpo.distributed import refuse_several
from lowmem_grpo.errors import InputError, in_a_line, printable_text
from lowmem_grpo.evaluation.show import as_line
from lowmem_grpo.out_of_memory import let_go
from lowmem_grpo.output.folder import checkpoints, set_aside, writable_folder
from lowmem_grpo.output.lock import lock_folder, releasing_locks
from lowmem_grpo.pipeline.check import check, check_evaluation, with_datasets
from lowmem_grpo.pipeline.file import Phase
from lowmem_grpo.pipeline.kinds import Outlook, entries
from lowmem_grpo.pipeline.phases import BASE, Evaluation, PhaseRun, Pipeline, begun_anew, naming, resolve, up_to
from lowmem_grpo.pipeline.record import (
    fingerprint,
    is_done,
    origin_of,
    read_record,
    refuse_changed,
    write_phases,
    write_record,
)  # fmt: skip
from lowmem_grpo.pipeline.table import Row, as_table, evaluated, known, row_of, write_table
from lowmem_grpo.planner.plan import as_text
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.report.pipeline import ACCURACY, REWARD
from lowmem_grpo.report.reading import EVALUATION, OF_A_PHASE, OF_THE_BASE, phases_of
from lowmem_grpo.report.report import NAME, write_report
from lowmem_grpo.run.card import write_card
from lowmem_grpo.run.interruption import interruptible
from lowmem_grpo.run.progress import Screen
from lowmem_grpo.terminal import columns_of, fitted


@dataclass(frozen=True)
class PipelineResult:
    """The result of run_pipeline()."""

    output_dir: str
    adapter: str | None  # the folder of the last phase's that trained the policy; None where none is done
    metrics: dict[str, dict[str, Any]]  # of each phase that is done, its last step's
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # the table's rows


@without_progress_bars
@releasing_locks()
@interruptible
def run_pipeline(
    model: str,
    phases: Sequence[Phase],
    output_dir: str = "pipeline-output",
    *,
    common: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    until: str | None = None,
    begin_at: str | None = None,
    dry_run: bool = False,
) -> PipelineResult:
    """Run phases one after another, each an ordinary run in output_dir/NN-name that goes on from those before.

    A phase that is done is left as it is, and one that was stopped goes on from its last checkpoint. All that can be
    checked of the phases to do is checked before the first of them begins.

    Args:
        model: hub id, model folder or adapter folder, which each phase loads anew.
        phases: in their order; see Phase.
        output_dir: the folder of the phases' folders, and of the table of evaluations.
        common: settings for each phase that has them.
        evaluation: dataset, reward_funcs and settings of an evaluation before the first phase and after each that
            trains the policy; without it there is none.
        until: name of the last phase to run.
        begin_at: name of a phase that is done anew, with all after it; their folders are kept under other names.
        dry_run: check, and print phases, data and plans; nothing is trained or written.

    Raises:
        InputError: bad input, or an earlier phase has changed; one sentence, which begins with the phase's name.
        NotFiniteError, NotSavedError, UnhealthyRunError: as train() raises them, with the phase's name.
    """
    refuse_several("run_pipeline()")
    pipeline = resolve(model, phases, output_dir, common, evaluation)
    wanted = up_to(pipeline, until)
    anew = begun_anew(pipeline, begin_at, wanted)
    if not dry_run:
        lock_folder(writable_folder(str(pipeline.output_dir)))
    _refuse_other_phases(pipeline)
    done = _done(pipeline, wanted, anew)
    to_do = [run for run in wanted if run not in done]
    console = Screen(file=sys.stdout if dry_run else sys.stderr, highlight=False, markup=False, emoji=False)
    if pipeline.evaluation is not None and to_do:
        outlook = check_evaluation(pipeline, pipeline.evaluation)
        if dry_run:
            _say(console, "\n".join(["evaluation, before the first phase and after each", *_lines(outlook)]))
    for run in wanted:
        if run in to_do:
            with naming(f"phase {run.name}"):
                outlook = check(pipeline, run, to_do, planned=dry_run)
        if dry_run:
            state = "is done" if run in done else _begins(run, is_anew=run in anew)
            _say(console, _described(pipeline, run, state, outlook if run in to_do else None))
    if dry_run:
        return PipelineResult(str(pipeline.output_dir), None, {run.name: read_record(run)["metrics"] for run in done})
    for run in reversed(anew):  # so that none is left which seems to be made of one that is to come
        if run.folder.exists():
            _say(console, f"{run.folder} is now {set_aside(run.folder, 'before').name}")

    write_phases(pipeline)
    rows: list[Row] = []
    later = _rows_of_later(pipeline, wanted, anew)
    try:
        if pipeline.evaluation is not None:
            folder = pipeline.output_dir / OF_THE_BASE
            rows.append(row_of(BASE, None, _evaluated(console, BASE, folder, pipeline.model, pipeline.evaluation)))
            write_table(pipeline.output_dir, [*rows, *later])
        for run in wanted:
            with naming(f"phase {run.name}"):
                _say(console, f"phase {_place(pipeline, run)}: {'is done' if run in done else _begins(run)}")
                if run not in done:
                    made_of = fingerprint(pipeline, run)
                    metrics = run.kind.run(pipeline.model_of(run), run.config, run.output, **_given(pipeline, run))
                    let_go()
                    write_record(run, made_of, metrics)
                if pipeline.evaluation is not None and run.kind.trains_policy:
                    is_known = run in done and (run.folder / EVALUATION).is_file()
                    found = _evaluated(console, run.name, run.folder, str(run.output), pipeline.evaluation)
                    if not is_known:  # the card was written before it
                        write_card(run.output, partial(_say, console))
                    rows.append(row_of(run.name, origin_of(run), found))
                    write_table(pipeline.output_dir, [*rows, *later])
        table = write_table(pipeline.output_dir, [*rows, *later]) if rows else []
        if table:
            _say(console, as_table(table, columns_of(console.file)))
    finally:  # of a pipeline that is stopped or fails, too
        _report(pipeline, console)
    adapters = [str(run.output) for run in wanted if run.kind.trains_policy]
    metrics = {run.name: read_record(run)["metrics"] for run in wanted}
    return PipelineResult(str(pipeline.output_dir), adapters[-1] if adapters else None, metrics, table)


def _evaluated(console: Console, name: str, folder: Path, model: str, evaluation: Evaluation) -> dict[str, Any]:
    """A model's evaluation, known or else measured, which takes as long as several steps and is said."""
    found = known(folder, model, evaluation)
    if found is None:
        _say(console, f"evaluation of {name} begins")
        found = evaluated(folder, model, evaluation)
        let_go()
        names = [metric for metric in (REWARD, ACCURACY) if metric in found["metrics"]]
        _say(console, f"evaluation of {name}: {as_line(found['metrics'], names)}")
    return found


def _rows_of_later(pipeline: Pipeline, wanted: list[PhaseRun], anew: list[PhaseRun]) -> list[Row]:
    """The table's rows of phases after the last that is wanted, which are done and stay as they are."""
    evaluation, rows = pipeline.evaluation, []
    for run in pipeline.runs[len(wanted) :]:
        if evaluation is not None and run.kind.trains_policy and run not in anew and is_done(run):
            found = known(run.folder, str(run.output), evaluation)
            rows += [] if found is None else [row_of(run.name, origin_of(run), found)]
    return rows


def _report(pipeline: Pipeline, console: Console) -> None:
    """Write report.html of all phases, if one has begun. Whatever fails is said, and costs no pipeline."""
    try:
        if phases_of(pipeline.output_dir):
            _say(console, f"report: {write_report(pipeline.output_dir)}")
    except Exception as error:
        _say(console, f"{pipeline.output_dir / NAME} cannot be made ({in_a_line(error)})")


def _refuse_other_phases(pipeline: Pipeline) -> None:
    """Raise InputError where the folder has a phase that is not one of these, or is one of another number."""
    known = {run.folder.name for run in pipeline.runs} | {OF_THE_BASE}
    there = sorted(pipeline.output_dir.iterdir()) if pipeline.output_dir.is_dir() else []
    for path in there:
        if path.is_dir() and OF_A_PHASE.fullmatch(path.name) and path.name not in known:
            raise InputError(
                f"{path} is of a phase that is not in this pipeline, or has another place there; move it away, or "
                "choose another output_dir"
            )


def _done(pipeline: Pipeline, wanted: list[PhaseRun], anew: list[PhaseRun]) -> list[PhaseRun]:
    """The phases that are done, each made of what it would be made of now.

    Raises:
        InputError: one has changed, or is done without one that it goes on from.
    """
    done: list[PhaseRun] = []
    for run in wanted:
        if run in anew or not is_done(run):
            continue
        with naming(f"phase {run.name}"):
            for other in pipeline.needed(run):
                if other not in done:
                    raise InputError(
                        f"it is done, and {other.name}, which it is made from, is not; put {other.folder} back, or do "
                        f"both anew with --from {other.name}"
                    )
            refuse_changed(run, fingerprint(pipeline, run))
        done.append(run)
    if anew and any(run not in done for run in pipeline.runs[: pipeline.runs.index(anew[0])]):
        raise InputError(f"--from {anew[0].name}: a phase before it is not done yet; leave --from out to go on")
    return done


def _given(pipeline: Pipeline, run: PhaseRun) -> dict[str, Any]:
    """The inputs of a run, with what phases before it have made in the place of their names."""
    inputs = {}
    for name, value in run.inputs.items():
        given = [pipeline.filled(run, one, lambda other: str(other.output)) for one in entries(value)]
        inputs[name] = given if len(given) > 1 else given[0]
    return with_datasets(run, inputs)


def _place(pipeline: Pipeline, run: PhaseRun) -> str:
    return f"{pipeline.runs.index(run) + 1} of {len(pipeline.runs)}, {run.name} ({run.kind.name})"


def _begins(run: PhaseRun, *, is_anew: bool = False) -> str:
    there = [] if is_anew else checkpoints(run.folder)
    how = f"goes on at {there[-1].name}" if there else "begins"
    return f"{how}, {f'from {origin_of(run)}, ' if run.kind.has_model else ''}in {run.folder}"


def _described(pipeline: Pipeline, run: PhaseRun, state: str, outlook: Outlook | None) -> str:
    """A phase for --dry_run: what is to be done, with what, and the plan of its memory."""
    lines = [f"phase {_place(pipeline, run)}: {state}"]
    for name, value in run.inputs.items():
        words = [one if isinstance(one, str) else getattr(one, "__name__", "in memory") for one in entries(value)]
        lines.append(f"  {name}: {', '.join(words)}")
    return "\n".join([*lines, *(_lines(outlook) if outlook else [])])


def _lines(outlook: Outlook) -> list[str]:
    lines = [f"  {fact}" for fact in outlook.facts]
    if outlook.plan is not None:
        lines += [f"  {line}" for line in as_text(outlook.plan).partition("\n\n")[2].splitlines()]
    return lines


def _say(console: Console, text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has been closed, or a full disk
        console.print(fitted(printable_text(text), columns_of(console.file)), soft_wrap=True)
