"""The rest of a step that is whole: its evaluation and callbacks, which an interruption may cut off."""

import math
from dataclasses import dataclass

from lowmem_grpo.output.saved import measured, whole
from lowmem_grpo.run.checkpoint import State


@dataclass
class Rest:
    """The rest of the last whole step, its evaluation and callbacks, as a part of a checkpoint."""

    metrics: dict[str, float] | None = None  # of the step, for callbacks; None where nothing is left
    num_called: int = 0  # callbacks that have had them
    is_last: bool = False  # a callback has ended the run

    def state(self) -> State:
        if self.metrics is None:
            return {}
        metrics = {name: None if math.isnan(value) else value for name, value in self.metrics.items()}
        return {"metrics": metrics, "num_called": self.num_called, "is_last": self.is_last}  # JSON has no NaN

    def load(self, state: State) -> None:
        if state:
            metrics = measured(state["metrics"])
            self.metrics = {name: math.nan if value is None else value for name, value in metrics.items()}
            self.num_called = whole(state["num_called"], "num_called")
            self.is_last = bool(state.get("is_last"))
