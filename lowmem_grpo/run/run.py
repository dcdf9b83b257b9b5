"""The common part of every training: its steps, one after the other, and the work between them."""

import contextlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from os.path import lexists
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowmem_grpo.distributed import (
    by_main,
    from_main,
    gathered,
    is_main,
    lost_rank,
    own_randomness,
    refuse_differences,
    world_size,
)
from lowmem_grpo.doctor.doctor import Doctor
from lowmem_grpo.errors import InputError, LostRankError, NotFiniteError, NotSavedError, counted
from lowmem_grpo.evaluation.show import as_line
from lowmem_grpo.inputs.identity import refuse_other_ends, refuse_other_weights, weights_of
from lowmem_grpo.inputs.training import RunInputs
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.output import manifest
from lowmem_grpo.output.folder import (
    checkpoints,
    mend_folder,
    read_state,
    remove,
    remove_old_checkpoints,
    set_damaged_aside,
    write_folder,
)
from lowmem_grpo.output.saved import is_evaluation, whole
from lowmem_grpo.planner.plan import as_text, limit_memory
from lowmem_grpo.report import report
from lowmem_grpo.run import about, samples
from lowmem_grpo.run.best import BestAdapter
from lowmem_grpo.run.checkpoint import Part, State, load_adapter, load_part, save_checkpoint
from lowmem_grpo.run.evaluations import Evaluations
from lowmem_grpo.run.interruption import Interruption
from lowmem_grpo.run.log import HeardLog, MetricsLog, write_completions
from lowmem_grpo.run.meter import Meter, of_all_ranks
from lowmem_grpo.run.publish import Publisher
from lowmem_grpo.run.randomness import randomness, restore_randomness, same_randomness
from lowmem_grpo.run.rest import Rest
from lowmem_grpo.run.room import adapter_bytes, checkpoint_bytes, look_for_room, not_saved, writing_to
from lowmem_grpo.run.step import Step
from lowmem_grpo.update.critic import Critic
from lowmem_grpo.update.optimizer import Learner, loss_scale_overflows

T = TypeVar("T")
Callback = Callable[[int, dict[str, Any], Policy], None]
SKIPPED = ("nonfinite_steps", "nonfinite_critic_steps")  # by learner: the names that a checkpoint has for their counts


@dataclass(frozen=True)
class TrainResult:
    """The result of train()."""

    history: list[dict[str, Any]]  # one dict a step, under TRL's metric names; a resumed run's earlier steps included
    eval_history: list[dict[str, Any]]  # one dict an evaluation, the one before training first
    output_dir: str  # adapter/ the trained adapter, best/ the best evaluation's, checkpoint-N/ all that a resume needs
    policy: Policy
    findings: list[dict[str, Any]] = field(default_factory=list)  # the doctor's: "step", "doctor" (which), "text"


class Run:
    """A training run around an algorithm's loop: folder, log, checkpoints, evaluations, interruption.

        with Run(inputs, policy, learner, parts, doctor_of(inputs), losses_of(inputs, policy)) as run:
            for step in run.steps():
                with step.phase("update"):
                    loss, _ = run.update(step, backward, lengths, why_not_finite)
                run.finish(step, {"loss": loss})
        return run.result()

    Before a step's first update() the loop may change random generators and parts alone. An error or Ctrl-C until then
    saves the last whole step, and a resumed run begins the interrupted one anew.
    """

    def __init__(
        self,
        inputs: RunInputs,
        policy: Policy,
        learner: Learner,
        parts: Mapping[str, Part],  # what the algorithm wants in a checkpoint, by the name of its file
        doctor: Doctor,  # who has looked at the inputs
        evaluations: Evaluations,
        critic: Critic | None = None,  # which learns beside the policy
    ):
        assert inputs.output_dir is not None
        self.inputs, self.config, self.folder = inputs, inputs.config, inputs.output_dir
        self.policy, self.learner, self.total_steps = policy, learner, inputs.total_steps
        # Read as a checkpoint is written, since a copy of their weights would take as much memory again.
        self.trained: dict[str, Part] = {"optimizer": learner, **({"critic": critic} if critic else {})}
        self.learners = [learner, *([critic.learner] if critic else [])]
        self.evaluations = evaluations
        self.doctor = doctor
        self.rest = Rest()
        self.parts: dict[str, Part] = {**parts, "doctor": doctor, "rest": self.rest, "first_evaluation": evaluations}
        self.step, self.num_tokens = 0, 0
        self.is_whole = True  # False while the weights are not those that a checkpoint may have: within an update
        self.updates_a_step: int | None = None
        self.is_unsaved = False  # True where the disk refused the last checkpoint
        self.circumstances = about.circumstances(inputs.device)
        self.changed_circumstances: list[str] = []  # since the checkpoint that is resumed, in words
        self.is_best_missing = False  # True where a resumed run's best adapter is not in the folder
        on_gpu = inputs.device.type == "cuda"
        self.budget = TokenBudget(self.config.token_budget, self.config.full_determinism and on_gpu)
        self.identity = {**inputs.identity, "weights": weights_of(policy), "ends": policy.eos_token_ids}
        given = {
            **self.identity, "eval_dataset": evaluations.data,
            "resume_from_checkpoint": inputs.resume and (inputs.resume / manifest.NAME).read_text(encoding="utf-8"),
        }  # fmt: skip
        for name in ("sources", "helpers", "objective"):  # in which a user's object may name its address
            given.pop(name, None)
        refuse_differences("inputs", given)
        with writing_to(self.folder):
            by_main(mend_folder)(self.folder)
            if inputs.resume is not None:
                self._load(inputs.resume)
            log = self._begin_folder() if is_main() else None
            lines = from_main(log.lines() if log else [])
            self.log = log or HeardLog(lines)
            self.publisher = Publisher(inputs, self.step, log.dropped if log else [], is_here=self.is_here)
            self.best = BestAdapter(self.folder, self.config, fresh=inputs.resume is None)
        self.shown = list(dict.fromkeys([self.best.metric, *self.config.measured[1:]]))

    def _begin_folder(self) -> MetricsLog:
        """Write what a folder has from a run's beginning, set aside what is not the run's, and return its log."""
        set_damaged_aside(self.folder, self.step, self.inputs.resume)
        log = MetricsLog(self.folder, self.step)
        # The run has evaluated, and its best adapter was left behind where the checkpoint was copied from.
        self.is_best_missing = bool(self.evaluations.first) and not lexists(self.folder / "best")
        settings = json.dumps(asdict(self.inputs.given), indent=1)
        (self.folder / f"{self.config.kind}_config.json").write_text(settings, encoding="utf-8")
        about.write_about(self.inputs, self.step)
        remove(self.folder / report.NAME)  # of the run as it was before, which one that is killed would leave there
        if self.inputs.resume is None:
            remove(self.folder / samples.NAME)
        return log

    @property
    def is_over(self) -> bool:
        """True where no step is left, or a callback has ended the run."""
        return self.rest.is_last or self.step >= self.total_steps

    @property
    def is_here(self) -> bool:
        """True where the run goes on from a checkpoint in its own folder."""
        return self.inputs.resume is not None and self.inputs.resume.resolve().parent == self.folder.resolve()

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            stack.enter_context(limit_memory(self.inputs.plan, self.inputs.device))
            stack.enter_context(self.publisher.opened())
            self._say_what_is_given()
            self._remember()
            room = look_for_room(
                self.folder, self.config, self.total_steps - self.step, adapter_bytes(self.learner),
                checkpoint_bytes(self.learners, self.whole),
            )  # fmt: skip
            if room:
                self.publisher.say(room)
            logged = self.log.lines()
            for line in self.doctor.found:
                if line not in logged:  # it is of the inputs, and was said before the log was there
                    self._log(line)
            self.saved = self.whole if self.is_here else None  # what checkpoint-{step} holds, if it is there
            self.interruption = stack.enter_context(Interruption())
            self.contexts = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        with self.contexts:
            if error is None:
                self._say_what_was_skipped()
                if self.doctor.found and not self.doctor.is_off:
                    self.publisher.say(self.doctor.summary())
                self.publisher.end(self.step, "finished", "", self.best.folder)
                self.publisher.push()
                return
            self.interruption.hold()
            signalled, error = error, lost_rank(error) or error
            is_lost = isinstance(error, LostRankError)
            if is_lost and error.speaks and not is_main():  # rank 0 is gone, which alone saves and has the log
                error.args = (f"{error}; {self._what_is_left()}",)
            elif self.step and self.is_whole and not isinstance(error, NotSavedError):
                try:
                    self.publisher.say(f"stopped; {self._save()} has everything up to step {self.step}")
                except (NotFiniteError, NotSavedError) as refused:
                    self.publisher.say(f"stopped; {refused}")
            elif is_lost or self.interruption.error is not None:
                when = "at once" if self.step else "before the end of the first step"
                self.publisher.say(f"stopped {when}; {self._what_is_left()}")
            how = "stopped" if about.is_stop(error) else "failed"
            self.publisher.end(self.step, how, about.reason(error), self.best.folder)
            if isinstance(error, NotFiniteError):
                good = self._last_good()
                where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
                raise NotFiniteError(f"{error}; {where}") from error
            if is_lost and error is not signalled:
                raise error from signalled
            if not is_lost and error is not self.interruption.error:  # torchrun's signal has nothing to add to a loss
                self.interruption.release()

    def steps(self) -> Iterator[Step]:
        """The steps that are left.

        Before the first comes an evaluation; after the last one another, and then output_dir/adapter is written: of the
        last step, or with load_best_model_at_end of the best evaluation.
        """
        if self.step == 0:
            self._evaluate()
        if self.rest.metrics is not None:
            self._complete(self.rest.metrics)
        while not self.is_over:
            yield Step(self.step + 1, Meter(self.policy.device), self.interruption, self.learner.learning_rate)
        self._evaluate()
        line = self.log.evaluation(self.step) or {}
        compared = [f"{name}/difference" for name in self.shown if f"{name}/difference" in line]
        if compared:
            self.publisher.say(f"difference (after - before, 95 % intervals): {as_line(line, compared, '+.3f')}")
        refused = [from_main(self._refusal_of(self._save) if self.is_unsaved else "")]
        if self.config.load_best_model_at_end:
            self.is_whole = False  # no checkpoint may have these weights
            self.best.load(self.policy)
        refused.append(from_main(self._refusal_of(self._write_adapter)))
        self.publisher.card(self.folder / "adapter")
        if any(refused):
            raise NotSavedError("; ".join(filter(None, refused)))

    def update(
        self,
        step: Step,
        # Sets gradients within a token budget; returns the loss and more. With several ranks, gradients, loss and every
        # other tensor are this rank's part of a sum.
        backward: Callable[[int], tuple[Tensor, T]],
        lengths: list[int],  # tokens of each sequence in it
        why_not_finite: Callable[[T, float, bool], str],  # of what backward returned, the loss, and fp16's overflow
        learner: Learner | None = None,  # the policy's by default
    ) -> tuple[float, T]:
        """Take one optimizer step, or none where loss or gradient is not finite.

        Returns the loss, and what else backward returned. Once the gradient is there an interruption waits for
        finish(), since weights are about to change.
        """
        learner = learner or self.learner
        # Masks of lora_dropout, by a seed that a resumed run has too.
        with own_randomness(self.policy.device, self.config.seed, step.number, step.num_updates):
            loss, more = self.budget.fit(backward, lengths)
        self.interruption.hold_everywhere()
        learner.sum_over_ranks(loss, *(one for one in tree_leaves(more) if isinstance(one, Tensor)))
        grad_norm = learner.clip(self.budget.note)
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the host waits for both here
        if learner is self.learner:
            step.grad_norm = grad_norm
        self.interruption.check()
        self.interruption.hold()
        self.is_whole = False
        step.num_updates += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            learner.step(self.budget.note)
            learner.nonfinite_steps = 0
        else:
            overflows = loss_scale_overflows(learner.scaler, loss)
            step.num_skipped += 1
            learner.nonfinite_steps += not overflows
            learner.cause = why_not_finite(more, loss, overflows)
            self.publisher.say_once(
                learner.cause, f"step {step.number}: {learner.cause}; no weight is changed (see skipped_steps)"
            )
        learner.release()
        return loss, more

    def finish(
        self,
        step: Step,
        metrics: dict[str, float],
        *,
        num_tokens: int = 0,  # that the step took from the data or sampled
        work: Mapping[str, int] | None = None,  # tokens by phase, for tokens_per_s/{phase}
        table: dict[str, list] | None = None,  # columns of a row a completion, for log_completions
        remarks: Sequence[str] = (),  # what a person who watches should know
    ) -> None:
        """End a step: write its metrics, raise an interruption that waited, evaluate, call back, and save.

        From the moment that the step is whole, an error or an interruption saves it, and a resumed run does the rest.

        Raises:
            NotFiniteError: a weight has left fp32's range, or too many optimizer steps in a row changed none.
        """
        for learner in self.learners:
            learner.advance()
            if not learner.weights_norm(self.budget.note).isfinite():
                rate = self._rate_of(learner)
                raise NotFiniteError(
                    f"step {step.number} moved the adapter's weights out of fp32's range (likely cause: "
                    f"{rate}={getattr(self.config, rate)}, weight_decay={self.config.weight_decay} or "
                    f"adam_epsilon={self.config.adam_epsilon})"
                )
        self.step, self.updates_a_step = step.number, step.num_updates
        self.num_tokens += num_tokens
        metrics = {
            **metrics, "step": step.number, "grad_norm": step.grad_norm, "skipped_steps": step.num_skipped,
            "learning_rate": step.learning_rate, "num_tokens": self.num_tokens, **self.budget.metrics(),
            **step.meter.metrics, **step.meter.rates(dict(work or {})),
            "step_time": time.perf_counter() - step.started,
        }  # fmt: skip
        metrics = of_all_ranks(metrics)
        found = self.doctor.look(step.number, metrics)
        self.rest.metrics, self.rest.num_called = metrics, 0
        self._remember()
        self.is_whole = True
        self._log(metrics)
        if table is not None and self.config.log_completions:
            self.publisher.without("completions", partial(write_completions, self.folder, step.number, table))
        self.publisher.step(metrics, remarks)
        for line in found:
            self._log(line)
            self.publisher.say(f"doctor: {line['text']}")
        self.interruption.release()
        self._complete(metrics)
        for learner in self.learners:
            if learner.nonfinite_steps > self.config.max_nonfinite_steps:
                raise NotFiniteError(
                    f"optimizer steps in a row that changed no weight: {learner.nonfinite_steps}, where "
                    f"max_nonfinite_steps is {self.config.max_nonfinite_steps}; in step {step.number} {learner.cause}; "
                    f"lower {self._rate_of(learner)}, or mend that cause"
                )
        self.doctor.refuse()

    def result(self) -> TrainResult:
        """The result of train(), once steps() has come to its end."""
        lines = self.log.lines()
        return TrainResult(
            history=[line for line in lines if "loss" in line],
            eval_history=[line for line in lines if is_evaluation(line)],
            output_dir=str(self.folder),
            policy=self.policy,
            findings=self.doctor.found,
        )

    def _rate_of(self, learner: Learner) -> str:
        """The name of a learner's learning rate among the settings."""
        return "learning_rate" if learner is self.learner else "critic_learning_rate"

    def _complete(self, metrics: dict[str, float]) -> None:
        """Evaluate where it is due, call back, and save: what may be left of a step whose checkpoint is resumed."""
        if self.config.eval_steps and self.step % self.config.eval_steps == 0:
            self._evaluate()
        for callback in self.inputs.callbacks[self.rest.num_called :]:
            try:
                self._call(callback, metrics)
            finally:
                if self.interruption.error is None:  # else it was cut off, and a resumed run calls it again
                    self.rest.num_called += 1
                    self._remember_rest()
            self.interruption.check()
        self.rest.is_last = any(gathered(self.rest.is_last))  # what one process ends, as by its clock, all do
        self.rest.metrics = None
        self._remember_rest()
        if self.is_over or self.step % self.config.save_steps == 0:
            refused = self._refusal_of(self._save)
            self.is_unsaved = bool(refused)
            if refused:
                self.publisher.say(f"{refused}; the run goes on")

    def _call(self, callback: Callback, metrics: dict[str, float]) -> None:
        """Call a callback with a copy of the metrics, which it may change; StopIteration makes the step the last one.

        Raises:
            InputError: it returned something to await, which nobody does.
            NotFiniteError: it left a weight that is not finite.
        """
        name = getattr(callback, "__name__", type(callback).__name__)
        returned: Any = None
        try:
            returned = callback(self.step, dict(metrics), self.policy)
        except StopIteration:
            self.rest.is_last = True
            self.publisher.say(f"callback {name} ends the run after {counted(self.step, 'step')}")
        if inspect.isawaitable(returned):
            raise InputError(f"callback {name} returned something to await; have it return when all is done")
        if not self.learner.weights_norm(self.budget.note).isfinite():
            raise NotFiniteError(f"callback {name} left a weight that is not finite at step {self.step}")

    def _evaluate(self) -> None:
        """Evaluate once a step; a resumed run finds in the log the evaluations before it stopped."""
        if self.evaluations.are_off or self.log.evaluation(self.step):
            return
        with same_randomness():  # a run is the same, however often it is evaluated
            metrics = self.evaluations.at(self.step, self.shown)
            self.interruption.check()
        self.publisher.without("best", partial(self.best.keep, self.policy, self.step, metrics))
        self.publisher.without(
            samples.NAME, partial(samples.write_samples, self.folder, self.step, self.evaluations.samples)
        )
        self._log({"step": self.step, **metrics})
        when = f"at step {self.step}" if self.step else "before training"
        when = f"after {counted(self.step, 'step')}" if self.is_over else when
        self.publisher.say(f"evaluation {when}: {as_line(metrics, self.shown)}")

    def _remember(self) -> None:
        """Keep the states of generators and parts after a whole step, since the next one changes them."""
        states: dict[str, State] = {name: part.state() for name, part in self.parts.items()}
        skipped = {name: each.nonfinite_steps for name, each in zip(SKIPPED, self.learners, strict=False)}
        states["counts"] = {"num_tokens": self.num_tokens, **skipped}
        if world_size() > 1:  # rewards may have drawn from Python's generators, on each rank by itself
            restore_randomness(from_main(randomness()))
        # In one assignment: an interruption saves either all of the step or all of the one before.
        self.whole = {**states, "random_states": randomness()}

    def _remember_rest(self) -> None:
        """Keep what is left of the step, and the random generators: evaluations keep those, callbacks may draw."""
        self.whole = {**self.whole, "rest": self.rest.state(), "random_states": randomness()}

    def _log(self, line: Mapping[str, float | str]) -> None:
        if isinstance(self.log, HeardLog):
            self.log.write(line)
        self.publisher.without("metrics.jsonl", partial(self.log.write, line))
        self.publisher.track(line)

    def _refusal_of(self, write: Callable[[], object]) -> str:
        """Write a folder; the sentence of a disk that refuses, else an empty text."""
        try:
            write()
        except NotSavedError as error:
            return str(error)
        return ""

    def _write_adapter(self) -> None:
        """Write output_dir/adapter, on rank 0. Raise NotSavedError where the disk refuses."""
        if not is_main():
            return
        try:
            write_folder(self.folder / "adapter", self.policy.save)
        except OSError as error:
            needed = adapter_bytes(self.learner)
            raise not_saved("adapter", self.folder, self.step, error, needed, self._last_good()) from error

    def _last_good(self) -> Path | None:
        """The newest checkpoint of this run, or the one that it goes on from."""
        return next(reversed(checkpoints(self.folder)), self.inputs.resume)

    def _what_is_left(self) -> str:
        """Words on the checkpoint that is left where a run ends without saving."""
        good = self._last_good()
        nothing = "there is no checkpoint yet" if self.step else "there is nothing to save"
        return f"the last whole checkpoint is {good}" if good else nothing

    def _save(self) -> Path:
        """Write, on rank 0, the checkpoint of the last whole step. Raise NotSavedError where the disk refuses."""
        folder = self.folder / f"checkpoint-{self.step}"
        if not is_main():
            return folder
        values = {
            "step": self.step, "identity": self.identity, "config": asdict(self.inputs.given),
            "circumstances": self.circumstances,
        }  # fmt: skip
        try:
            if self.saved is not self.whole:
                trained = {name: part.state() for name, part in self.trained.items()}
                save_checkpoint(folder, self.policy, {**trained, **self.whole}, values)
                self.saved = self.whole
            remove_old_checkpoints(self.folder, self.config.save_total_limit)
        except OSError as error:
            needed = checkpoint_bytes(self.learners, self.whole)
            raise not_saved(folder.name, self.folder, self.step, error, needed, self._last_good()) from error
        return folder

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint: adapter, optimizer, parts, and last the random generators."""
        saved = read_state(folder)
        refuse_other_ends(folder, self.identity["ends"])
        refuse_other_weights(folder, self.identity["weights"])
        load_adapter(folder, self.policy)
        loads = {name: part.load for name, part in {**self.trained, **self.parts}.items()}
        del loads["doctor"]  # who knows it, and what the inputs have shown since
        for name, load in {**loads, "counts": self._load_counts, "random_states": restore_randomness}.items():
            load_part(folder, name, load, saved)
        self.step = saved["step"]
        before = saved.get("circumstances", {})  # an older version has none
        self.changed_circumstances = [
            f"{name} {value} (was {before[name]})"
            for name, value in self.circumstances.items()
            if name in before and before[name] != value
        ]

    def _load_counts(self, counts: State) -> None:
        self.num_tokens = whole(counts["num_tokens"], "num_tokens")
        for name, learner in zip(SKIPPED, self.learners, strict=False):
            learner.nonfinite_steps = whole(counts[name], name)

    def _say_what_is_given(self) -> None:
        """Tell whoever watches what the run has been given, before the first step."""
        if self.inputs.plan is not None:
            self.publisher.say(as_text(self.inputs.plan))
        for note in self.inputs.notes:
            self.publisher.say(note)
        if self.inputs.resume is not None and self.is_over:
            at = f"{self.inputs.resume} is at step {self.step} of {self.total_steps}"
            self.publisher.say(f"{at}: nothing is left to train")
        if self.changed_circumstances:
            self.publisher.say(
                f"going on with {', '.join(self.changed_circumstances)}: what is computed may be rounded otherwise "
                "than by the run that was stopped"
            )
        if self.is_best_missing:
            self.publisher.say(
                f"{self.folder} has no best/ of the run so far: put it there before a resume, or the next evaluation "
                "is the best"
            )
        if self.evaluations.have_changed:
            self.publisher.say(
                "eval_dataset or num_generations_eval has changed, so there is no difference from the start"
            )

    def _say_what_was_skipped(self) -> None:
        """Tell whoever watches how many optimizer steps of the whole run changed no weight, if any."""
        skipped = sum(line.get("skipped_steps", 0) for line in self.log.lines())
        if skipped:
            of_all = "" if self.updates_a_step is None else f" of {self.step * self.updates_a_step}"
            search = ", as while fp16 looks for its loss scale" if self.config.fp16 else ""
            self.publisher.say(
                f"{skipped}{of_all} optimizer steps changed no weight: loss or gradient was not finite{search}"
            )
