"""Facts of a run and of one of its adapters, read from its files for a model card."""

import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from lowmem_grpo.errors import printable
from lowmem_grpo.lookup import DATA_FILES
from lowmem_grpo.output.folder import NAME as CHECKPOINT
from lowmem_grpo.output.folder import step_of
from lowmem_grpo.output.places import public_name
from lowmem_grpo.output.saved import read_object
from lowmem_grpo.report.reading import EVALUATION, RunFiles, for_others, is_run, mapping, number, read_run, texts
from lowmem_grpo.run.methods import Method, methods_of
from lowmem_grpo.tasks import is_task_name
from lowmem_grpo.tasks.gsm8k import ON_HUB as GSM8K

LICENSE = ("license", "license_name", "license_link")


class Facts:
    """The files of a run and of one of its adapters, without paths of this machine but `folder` and `base`.

    What lacks, or cannot be read, is empty or None.
    """

    def __init__(self, folder: Path):
        """`folder` is an adapter's; the run is the folder that it is in."""
        self.folder, run = folder, folder.resolve().parent
        self.run = (
            for_others(read_run(run)) if is_run(run) else RunFiles(run, "grpo", {}, {}, {}, [], [], [], [], 0, False)
        )
        self.settings, self.kind = self.run.settings, self.run.kind
        self.is_known = bool(self.settings)  # the run has left what it was trained with
        self.adapter = read_object(folder / "adapter_config.json")
        self.base = str(self.adapter.get("base_model_name_or_path") or "")
        self.base_name = public_name(self.base)
        self.is_scorer = self.adapter.get("task_type") == "SEQ_CLS"  # a reward adapter, which gives a text one number
        datasets = mapping(self.run.about.get("datasets"))
        self.train_names, self.eval_names = (
            [one if is_task_name(one) else public_name(one) for one in texts(datasets.get(of))]
            for of in ("train", "eval")
        )

    @cached_property
    def methods(self) -> list[Method]:
        """The methods of the run, the foremost first."""
        return methods_of(self.kind, self.settings) if self.is_known else []

    @cached_property
    def step(self) -> int | None:
        """The step that the adapter is of."""
        best = read_object(self.folder / "best.json")
        if self.folder.name == "adapter" and self.settings.get("load_best_model_at_end"):
            best = read_object(self.run.folder / "best/best.json")
        if type(best.get("step")) is int:
            return best["step"]
        if CHECKPOINT.fullmatch(self.folder.name):
            return step_of(self.folder)
        return max((line["step"] for line in [*self.run.steps, *self.run.evaluations]), default=None)

    @cached_property
    def evaluations(self) -> tuple[dict[str, float | None] | None, dict[str, float | None] | None]:
        """The metrics of the evaluation before training, and of that at the adapter's step."""
        found = {line["step"]: _numbers(line) for line in self.run.evaluations}
        by_pipeline = _numbers(mapping(self.of_pipeline.get("metrics")))
        if by_pipeline and not found and self.step:
            return None, {**by_pipeline, "step": self.step}
        return found.get(0), found.get(self.step) if self.step else None

    @cached_property
    def of_pipeline(self) -> dict[str, Any]:
        """The evaluation of the last step's adapter by the pipeline that the run is a phase of."""
        return read_object(self.run.folder / EVALUATION) if self.folder.name == "adapter" else {}

    @property
    def num_generations_eval(self) -> Any:
        """How many completions of each prompt were sampled in evaluations, or None for a greedy one."""
        if self.run.evaluations:
            return self.settings.get("num_generations_eval")
        return mapping(mapping(self.of_pipeline.get("of")).get("settings")).get("num_generations_eval")

    @property
    def is_chosen(self) -> bool:
        """True where the adapter was chosen among several by the evaluation that its card shows."""
        is_best = self.folder.name == "best" or bool(self.settings.get("load_best_model_at_end"))
        return is_best and len(self.run.evaluations) > 2

    @cached_property
    def base_config(self) -> Any:
        """The configuration of the base, if it is on this machine and runs no code of its own."""
        with suppress(Exception):  # whatever transformers raises on what it does not find or know
            return AutoConfig.from_pretrained(self.base, local_files_only=True)
        return None

    @cached_property
    def license(self) -> dict[str, str]:
        """The licence in the base's own card, if that is on this machine, by the names of the metadata."""
        path = Path(self.base) / "README.md"
        with suppress(Exception):  # no such file, or whatever YAML and the hub's code raise on a damaged one
            if not path.is_file():
                path = Path(str(try_to_load_from_cache(self.base, "README.md")))
            data = metadata_load(path) or {}
            return {name: printable(data[name]) for name in LICENSE if isinstance(data.get(name), str)}
        return {}

    @property
    def has_chat_template(self) -> bool:
        """True where the tokenizer in the folder has a chat template."""
        in_settings = read_object(self.folder / "tokenizer_config.json").get("chat_template")
        return bool(in_settings) or (self.folder / "chat_template.jinja").is_file()

    @property
    def dtype(self) -> str:
        """The name of torch's dtype that the base was computed in."""
        if self.settings.get("fp16"):
            return "float16"
        return "float32" if self.settings.get("bf16") is False else "bfloat16"


def _numbers(line: dict[str, Any]) -> dict[str, float | None]:
    """A line without what is no number; None is the mean of nothing."""
    return {name: number(value) for name, value in line.items() if value is None or number(value) is not None}


def hub_id(name: Any) -> str | None:
    """A name that a repository on the hub may have, or None for any other, and for a path."""
    if not isinstance(name, str) or os.path.exists(name):  # False for one that is too long for a path
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def dataset_id(name: Any) -> str | None:
    """The repository on the hub that a dataset or a task is read from. None for files, rows and other tasks."""
    if isinstance(name, str) and is_task_name(name):
        return GSM8K if name.partition("?")[0] == "gsm8k" else None
    found = hub_id(name)
    return found if found and "/" in found and not found.endswith(DATA_FILES) else None
