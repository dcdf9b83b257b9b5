"""The file that says a pipeline, or a recipe that comes with the package, read without anything that computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import InputError, did_you_mean, shown
from lowmem_grpo.paths import expanded
from lowmem_grpo.settings_file import read_settings_file

RECIPES = Path(__file__).parents[1] / "recipes"
KEYS = ("model", "output_dir", "common", "eval", "phases")  # of a file


class Phase:
    """A phase of a pipeline: a name, a kind of run, and its settings.

        Phase("cold-start", "sft", dataset="cold.jsonl", num_train_epochs=2)
        Phase("sft", "sft", from_="base", dataset=["rejection-sampling", "general.jsonl"])

    `from_` names what its model is: "base", or the phase whose adapter it goes on with; by default the last phase
    before it that trains the policy. Datasets and rewards may be names of phases before it.
    """

    def __init__(self, name: str, kind: str, /, *, from_: str | None = None, **settings: Any):
        self.name, self.kind, self.from_, self.settings = name, kind, from_, settings

    def __repr__(self) -> str:
        return f"Phase({self.name!r}, {self.kind!r}, from_={self.from_!r}, **{self.settings!r})"


def read_pipeline_file(path: str) -> dict[str, Any]:
    """The content of a file, or of a recipe by its name, with `phases` as a list of Phase.

    Raises:
        InputError: there is no such file, or it does not say a pipeline.
    """
    where = f"config file {shown(path)}"
    found = read_settings_file(str(pipeline_file(path)))
    for key in found:
        if key not in KEYS:
            hint = did_you_mean(key, KEYS, f"a pipeline has {', '.join(KEYS)}")
            raise InputError(f"{where} has {shown(key)}; {hint}")
    for key in ("common", "eval"):
        if found.get(key, {}) is None:  # all of its lines are comments
            del found[key]
        if not isinstance(found.get(key, {}), dict):
            raise InputError(f"{where} has {key}: {shown(found[key])}; make it a mapping of settings")
        if key in found:
            found[key] = _with_underscores(found[key], f"{key} of {where}")
    rows = found.get("phases")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where} needs phases: a list, each with a name, a kind and its settings")
    phases = []
    for number, row in enumerate(rows, 1):
        settings = _with_underscores(row, f"phase {number} of {where}")
        for key in ("name", "kind"):
            if not isinstance(settings.get(key), str):
                has = f"{key}: {shown(settings[key])}" if key in settings else f"no {key}"
                raise InputError(f"phase {number} of {where} has {has}; give it a text, in quotes where it is a number")
        name, kind, origin = settings.pop("name"), settings.pop("kind"), settings.pop("from", None)
        if "from_" in settings:
            raise InputError(f"phase {number} of {where} has from_, as in Python; write from")
        phases.append(Phase(name, kind, from_=origin, **settings))
    return {**found, "phases": phases}


def _with_underscores(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by the names that they have in Python: learning_rate where learning-rate was written."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name in found:
            raise InputError(f"{where} has {name} twice, with a hyphen and with an underscore; keep one")
        found[name] = value
    return found


def pipeline_file(name: str) -> Path:
    """The file of a path, or of a recipe's name. Raise InputError where it is neither."""
    path = Path(expanded(name))
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if name not in recipes():
        hint = did_you_mean(name, recipes(), f"the recipes are {', '.join(recipes())}")
        raise InputError(f"--config {shown(name)} is neither a YAML file nor a recipe; {hint}")
    return RECIPES / f"{name}.yaml"


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
