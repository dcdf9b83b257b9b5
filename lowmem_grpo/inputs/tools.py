"""The tools of a run, checked before long work."""

from typing import Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import ToolFields
from lowmem_grpo.errors import InputError
from lowmem_grpo.tools.form import ToolForm
from lowmem_grpo.tools.names import find_tools
from lowmem_grpo.tools.toolbox import Toolbox


def toolbox_of(tools: Any, config: GRPOConfig) -> Toolbox | None:
    """The tools that a run is given, or None where there are none.

    Raises:
        InputError: one is no tool, or a setting needs tools, or does not go with them.
    """
    if tools is None:
        for name in ToolFields.__dataclass_fields__:
            if getattr(config, name) != getattr(GRPOConfig, name):
                raise InputError(f"{name} is about tools, and there are none; give some, or leave {name} out")
        return None
    if config.replay_buffer_size:
        raise InputError("replay_buffer_size keeps what was sampled, but no conversation with tools; leave it out")
    return Toolbox(find_tools(tools), config.tool_timeout)


def schemas_of(toolbox: Toolbox | None, tokenizer: Any, config: GRPOConfig) -> list[dict[str, Any]]:
    """Descriptions of the tools, as prompts have them; none without tools.

    Raises:
        InputError: the chat template shows no tools, no calls, or no results.
    """
    if toolbox is None:
        return []
    ToolForm(tokenizer, {**(config.chat_template_kwargs or {}), "tools": toolbox.schemas})
    return toolbox.schemas
