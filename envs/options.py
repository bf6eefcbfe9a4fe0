"""A task's options, as the command line gives them: `--env-cfg rewards.action_rate.weight=-0.02 commands.twist.ranges.lin_vel_x=[-1,2]`.

Dotted names are fields of a simulator's configuration (`set_fields`); what stands in a tuple or list there has its own `name` for
one, or its number: `scene.sensors.feet_ground_contact.num_slots=2`. Plain names are keyword arguments (`check_keywords`).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import os
import sys
from typing import Any


def task_of(name: str) -> str:
    """`my_package.my_tasks:Task` -> `Task`, once the module that registers it has been imported; `Task` -> `Task`.

    Raises:
        ValueError: there is no such module.
    """
    module, _, task = name.rpartition(":")
    if module:
        sys.path.append(os.getcwd())  # a script's own folder may be another
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # a mistake in the module itself
                raise
            raise ValueError(f"--env {name}: there is no module {module} that could register {task}") from None
    return task


def set_fields(cfg: Any, options: dict[str, Any], kept: dict[str, str] | None = None) -> None:
    """Set dotted names of a configuration, which may be of dataclasses, dicts and `ml_collections.ConfigDict`, in place.

    A value takes the type of what it replaces: 1 is 1.0 where there was a float, a list a tuple. None takes anything.

    Args:
        cfg: the configuration.
        options: dotted name -> value.
        kept: names that a flag sets -> that flag; they are refused.

    Raises:
        ValueError: a name that there is not, with the nearest that there are; or a value of another type.
    """
    for name, value in options.items():
        if name in (kept or {}):
            raise ValueError(f"--env-cfg {name}={value}: say {kept[name]}")
        first, *path = name.split(".")
        _put(cfg, first, _changed(_field(cfg, first, name), path, value, name))


def check_keywords(function: Any, options: dict[str, Any], taken: tuple[str, ...] = ()) -> None:
    """Refuse options that `function` has no parameter for, or that flags decide (`taken`).

    Raises:
        ValueError: with the nearest that there are.
    """
    parameters = inspect.signature(function).parameters
    if any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        return
    known = [name for name in parameters if name not in taken]
    for name in options:
        if name not in known:
            raise ValueError(f"--env-cfg {name}: there is no such option; {_nearest(name, known)}")


def _changed(owner: Any, path: list[str], value: Any, name: str) -> Any:
    """A copy, with another value at this path: in mjlab's configurations actor and critic share their terms."""
    if not path:
        return _like(owner, value, name)
    new = _changed(_field(owner, path[0], name), path[1:], value, name)
    if isinstance(owner, (list, tuple)):
        return type(owner)(new if key == path[0] else x for key, x in zip(_keys(owner), owner))
    return _put(copy.copy(owner), path[0], new)


def _keys(owner: list | tuple) -> list[str]:
    """By its `name`, as mjlab's sensors have one, or its number."""
    return [str(getattr(x, "name", i)) for i, x in enumerate(owner)]


def _field(owner: Any, step: str, name: str) -> Any:
    if isinstance(owner, (list, tuple)):
        fields = dict(zip(_keys(owner), owner))
    else:
        fields = dict(owner.items()) if hasattr(owner, "keys") else dict(getattr(owner, "__dict__", {}))
    if step not in fields:
        raise ValueError(f"--env-cfg {name}: there is no {step}; {_nearest(step, fields)}")
    return fields[step]


def _put(owner: Any, step: str, value: Any) -> Any:
    if hasattr(owner, "keys"):
        owner[step] = value
    else:
        setattr(owner, step, value)
    return owner


def _nearest(name: str, known) -> str:
    known = [x for x in known if not x.startswith("_")]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:8]
    return f"there are {', '.join(near)}" if near else "there are none"


def _like(old: Any, value: Any, name: str) -> Any:
    """`value` in the type of what it replaces."""
    kind = type(old)
    if old is None or value is None or type(value) is kind:
        return value
    if kind is float and type(value) in (int, str):  # YAML takes 1e-3 for a text
        with contextlib.suppress(ValueError):
            return float(value)
    if kind is int and type(value) is float:  # `episode_length_s = 5` is how a configuration may say 5.0
        return value
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        return kind(_like(old[0], x, name) if old and len({type(y) for y in old}) == 1 else x for x in value)
    raise ValueError(f"--env-cfg {name}: {value!r} is {type(value).__name__}; there is {old!r} of {kind.__name__}")
