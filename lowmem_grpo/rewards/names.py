"""Reward functions found by name."""

import ast
import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lowmem_grpo.errors import InputError, did_you_mean, in_a_line, shown
from lowmem_grpo.lookup import has_score_head, look_up_model
from lowmem_grpo.paths import expanded
from lowmem_grpo.rewards import BUILT_IN, BUILT_IN_FACTORIES
from lowmem_grpo.rewards.isolation.origin import OWN, PYTHON, origin_of, origin_of_function
from lowmem_grpo.rewards.route import inner_of


def resolve_reward_funcs(reward_funcs: Any) -> list[Callable]:
    """Functions from one or several functions, names or reward models.

    A name is a built-in's, or `module.function` on the Python path; either may be a call with keyword arguments that
    are literals, `get_cosine_scaled_reward(max_len=1024)`, of a function that makes a reward function. Or it is the hub
    id or folder of a reward model, which may be given loaded too.

    A configuration from elsewhere may name functions, so only a few are called: built-in ones, and those that a module
    of the user's own defines. A reward function may be of an installed package too, and none is of Python's own.

    Raises:
        InputError: no function, an unknown name, wrong arguments, or something that cannot be called.
    """
    return [_resolve(reward) for reward in _several(reward_funcs)]


def look_up_rewards(reward_funcs: Any) -> None:
    """Raise InputError for a name that resolve_reward_funcs() would refuse, without making any reward."""
    for reward in _several(reward_funcs):
        if isinstance(reward, str):
            _found(reward.strip())


def _several(reward_funcs: Any) -> list[Any]:
    several = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not several:
        raise InputError(f"reward_funcs is empty; give a function or one of {', '.join(BUILT_IN)}")
    return several


def _resolve(reward: Any) -> Callable:
    if isinstance(reward, str):
        reward = _found(reward.strip())()
    elif _is_loaded_model(reward):
        from lowmem_grpo.rewards.reward_model import get_model_reward

        reward = get_model_reward(reward)
    if isinstance(reward, type):  # whose call makes one of it, and scores nothing
        raise InputError(f"reward function {reward.__name__} is a class; give what it makes, {reward.__name__}(...)")
    if not callable(reward):
        raise InputError(f"reward function {shown(reward)} cannot be called; give a function or a name")
    return reward


def _found(reward: str) -> Callable[[], Any]:
    """The maker of a name's reward, which is found, and not called yet."""
    if reward.endswith(")"):
        name, arguments = _read_call(reward)
        if name in BUILT_IN:
            raise InputError(f"{name} is a reward function itself, and takes no arguments here; write {name}")
        factory = find_function(name, BUILT_IN_FACTORIES, "function makes a reward and")
        if BUILT_IN_FACTORIES.get(name.rpartition(".")[2]) is not factory and origin_of_function(factory) != OWN:
            raise InputError(
                f"reward function {reward!r} is not called, since no module of your own defines {name}; a name may "
                f"call {', '.join(BUILT_IN_FACTORIES)}, or a function that you write in a module of your own"
            )
        with _naming(name, factory), contextlib.suppress(ValueError):  # of a class that tells no signature
            # Not of what a decorator wraps, since a decorator may add arguments.
            inspect.signature(factory, follow_wrapped=False).bind(**arguments)
        return partial(_make, name, factory, arguments)
    if reward in BUILT_IN_FACTORIES:
        raise InputError(
            f"{reward} makes a reward function; call it: {reward}{_signature(BUILT_IN_FACTORIES[reward])}, "
            "with names for its arguments"
        )
    folder = expanded(reward)
    module, _, function = reward.partition(":")
    if (function.isidentifier() or module.endswith(".py")) and not os.path.isdir(folder):
        module = module.removesuffix(".py").lstrip("./").replace("/", ".")
        raise InputError(
            f"reward function {reward!r} is named by a file; name it as Python imports it: "
            f"{module}.{function or 'function'}"
        )
    if reward not in BUILT_IN and ("/" in reward or os.path.isdir(folder)):
        look_up_model(folder, what="reward model")
        return partial(_of_model, folder)
    function = find_function(reward, BUILT_IN)
    return lambda: function


def _is_loaded_model(reward: Any) -> bool:
    transformers = sys.modules.get("transformers")  # which nobody has loaded a model without
    return transformers is not None and isinstance(reward, transformers.PreTrainedModel)


def _of_model(folder: str) -> Callable:
    """The reward of a reward adapter's folder, or of another reward model."""
    if has_score_head(folder):
        from lowmem_grpo.rewards.reward_adapter import get_adapter_reward

        return get_adapter_reward(folder)
    from lowmem_grpo.rewards.reward_model import get_model_reward

    return get_model_reward(folder)


def _read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `name(argument=literal, ...)`."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError
        return ast.unparse(call.func), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"reward function {shown(text)} cannot be read; write it as name(argument=value), each value a number, "
            "a text, true or false as in Python, or a list of them"
        ) from error


def _make(name: str, factory: Callable, arguments: dict[str, Any]) -> Callable:
    with _naming(name, factory):
        return factory(**arguments)


@contextlib.contextmanager
def _naming(name: str, factory: Callable) -> Iterator[None]:
    """Have an error begin with the name of a function that makes rewards, and say its arguments."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}: {in_a_line(error)}; its arguments are {name}{_signature(factory)}") from error


def _signature(factory: Callable) -> str:
    try:
        return str(inspect.signature(factory).replace(return_annotation=inspect.Signature.empty))
    except (TypeError, ValueError):  # nothing that can be called, or a class that tells none
        return "(...)"


def find_function(name: str, known: Mapping[str, Callable], none: str = "", *, kind: str = "reward function") -> Any:
    """The function of a known name or of an import path: one that is of a `kind`, as errors say.

    Raises:
        InputError: there is none (in place of `no kind`, the sentence says `none`), or it is of Python's own.
    """
    if name in known:
        return known[name]
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        otherwise = f"the built-in ones are {', '.join(known)}" if known else "there are no built-in ones"
        several = len(re.split(r"[\s,]+", name)) > 1
        hint = "give each of several by itself" if several else did_you_mean(name, known, otherwise)
        raise InputError(f"no {none or kind} is named {name!r}; {hint} (one of your own is module.function)")
    if os.getcwd() not in sys.path:  # an installed command does not look in the current folder by itself
        sys.path.insert(0, os.getcwd())
    if origin_of(module_name) == PYTHON:
        raise _is_pythons(name, known, kind)
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # of a module of the user's, which may do anything
        root = module_name.partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == root
        where = f"; {shown(f'{root}.py')} is looked for in the current folder and on PYTHONPATH" if is_missing else ""
        raise InputError(f"{kind} {shown(name)} cannot be imported: {in_a_line(error)}{where}") from error
    if not callable(found):
        raise InputError(f"{name} is {shown(found)}, which is no {kind}; name a function of {module_name}")
    if origin_of_function(found) == PYTHON:
        raise _is_pythons(name, known, kind)
    return found


def _is_pythons(name: str, known: Mapping[str, Callable], kind: str) -> InputError:
    others = "".join(f"{one}, " for one in known) + ("or " if known else "")
    return InputError(f"{name} is of Python's own and no {kind}; give {others}module.function of your own")


def reward_adapters(reward_funcs: Any) -> list[Callable]:
    """The reward adapters among reward functions as a run is given them, which alone are read."""
    several = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    names = [name.strip() for name in several if isinstance(name, str)]
    return [_resolve(one) for one in names if one.startswith("get_adapter_reward(") or has_score_head(expanded(one))]


def reads_gold(function: Callable) -> bool:
    """Tell whether a function is a built-in reward that compares with gold answers."""
    made = inner = inner_of(function)
    while isinstance(made, partial):
        made = made.func
    is_ours = str(getattr(made, "__module__", "")).startswith("lowmem_grpo.rewards.")
    return is_ours and "solution" in inspect.signature(inner).parameters
