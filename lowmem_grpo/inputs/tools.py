"""The tools of a run, and its environments, checked before long work."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import ToolFields
from lowmem_grpo.data.prompts import Scene
from lowmem_grpo.errors import InputError
from lowmem_grpo.tools.environments import Begun, Environments
from lowmem_grpo.tools.form import ToolForm
from lowmem_grpo.tools.names import find_factories, find_tools
from lowmem_grpo.tools.toolbox import Toolbox

NUM_COMPARED = 2  # rows with which two instances are reset, whose texts must be one


def toolbox_of(tools: Any, environment_factory: Any, config: GRPOConfig) -> Toolbox | None:
    """The tools and environments that a run is given, or None where there are none.

    Raises:
        InputError: one is no tool or no environment, or a setting needs tools, or does not go with them.
    """
    if tools is None and environment_factory is None:
        for name in ToolFields.__dataclass_fields__:
            if getattr(config, name) != getattr(GRPOConfig, name):
                raise InputError(f"{name} is about tools, and there are none; give some, or leave {name} out")
        return None
    if config.replay_buffer_size:
        raise InputError("replay_buffer_size keeps what was sampled, but no conversation with tools; leave it out")
    functions = [] if tools is None else find_tools(tools)
    environments = None
    if environment_factory is not None:
        environments = Environments(find_factories(environment_factory), functions, config.tool_timeout)
    return Toolbox(functions, config.tool_timeout, environments)


def schemas_of(toolbox: Toolbox | None, tokenizer: Any, config: GRPOConfig) -> list[dict[str, Any]]:
    """Descriptions of the tools, as prompts have them; none without tools.

    Raises:
        InputError: the chat template shows no tools, no calls, or no results.
    """
    if toolbox is None:
        return []
    kinds = [] if toolbox.environments is None else toolbox.environments.kinds.values()
    for schemas in [kind.schemas for kind in kinds] or [toolbox.schemas]:
        ToolForm(tokenizer, {**(config.chat_template_kwargs or {}), "tools": schemas})
    return toolbox.schemas


def resets_of(toolbox: Toolbox | None) -> list[Callable]:
    """The reset of each kind of environment."""
    environments = None if toolbox is None else toolbox.environments
    return [] if environments is None else [kind.type.reset for kind in environments.kinds.values()]


def scenes_of(toolbox: Toolbox | None, rows: Dataset, name: str) -> list[Scene] | None:
    """The rows with what their environments say when they are reset with them; None without environments.

    A row's completions share its prompt, and so this text: it is read once, to be measured and planned with the prompt.

    Raises:
        InputError: an environment cannot be reset with a row, or says something else each time.
    """
    environments = None if toolbox is None else toolbox.environments
    if environments is None:
        return None
    if "environments" in rows.column_names:
        raise InputError(f"{name} has a column environments, by which reward functions get instances; rename it")
    scenes: list[Scene] = []
    for index, row in enumerate(rows):
        given: Any = row
        where = f"row {index} of {name}"
        first, *others = begin_with(environments, [given] * (2 if index < NUM_COMPARED else 1), where)
        if any(other.observation != first.observation for other in others):
            raise InputError(
                f"{where}: reset of the environment {type(first.environment).__name__} returns something else each "
                "time, and a row's completions have one prompt; draw what is random from the row, as from a column seed"
            )
        scenes.append(Scene(given, first.observation, environments.kind_of(given).schemas))
    return scenes


def begin_with(environments: Environments, rows: Sequence[Any], where: str) -> list[Begun]:
    """Instances that were reset with rows. Raise InputError where one cannot be."""
    try:
        begun = environments.reset(rows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    fault = next((one.fault for one in begun if one.fault), None)
    if fault is not None:
        column = "unexpected keyword argument" in fault
        remedy = "let it take **row, since it is called with each column" if column else "mend it, or leave the row out"
        raise InputError(f"{where}: {fault}; {remedy}")
    return begun
