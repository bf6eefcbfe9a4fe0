"""Environments by name. `make` imports a task or a simulator only when it is asked for."""

from __future__ import annotations

import importlib
import inspect

from .options import check_keywords

BUILT_IN = {  # id: (module, class, options)
    "quadruped": ("quadruped", "Quadruped", {"terrain": "flat"}),
    "quadruped-rough": ("quadruped", "Quadruped", {"terrain": "rough"}),
    "cartpole": ("cartpole", "Cartpole", {}),
    "navigation-cue": ("navigation", "Cue", {}),
    "navigation-pixels": ("navigation", "Pixels", {}),
    "navigation-maze": ("navigation", "Maze", {}),
}
SIMULATORS = {  # prefix: module (and extra of pyproject.toml), for ids of the form prefix:task
    "mjlab": "mjlab",
    "gym": "gymnasium",
    "envpool": "envpool",
    "playground": "playground",
    "genesis": "genesis",
    "isaaclab": "isaaclab",
    "maniskill": "maniskill",
}


def make(env_id: str, num_envs: int, device: str = "cpu", seed: int = 0, compile: bool = False, cfg=None, **options):
    """Build an environment with the protocol of `vec_env.VecEnv`.

    Args:
        env_id: a built-in task, `simulator:task`, or `package.module:factory` for a function of your own, which is
            called with those of `num_envs`, `device`, `seed`, `compile` and the options that it has parameters for.
        num_envs: number of environments.
        device: torch device.
        seed: seed of the environment.
        compile: the step may be compiled, where the task can (of the built-in ones: the quadruped).
        cfg: options of the task, name -> value: dotted names of a simulator's configuration, or keyword arguments.
        **options: passed on, e.g. `play=True`.

    Raises:
        ValueError: there is no such id; the message lists those that there are.
        ImportError: the simulator is not installed; the message is the command that installs it.
    """
    prefix, _, name = env_id.partition(":")
    if env_id in BUILT_IN:
        module, cls, preset = BUILT_IN[env_id]
        factory = getattr(importlib.import_module(f".{module}", __name__), cls)
        check_keywords(factory, cfg or {}, taken=("num_envs", "device", "seed", "compile", "play", "terminations"))
        if "compile" in inspect.signature(factory).parameters:
            options["compile"] = compile
        return factory(num_envs=num_envs, device=device, seed=seed, **preset | options | (cfg or {}))
    if name and prefix in SIMULATORS:
        return _simulator(prefix).make(name, num_envs=num_envs, device=device, seed=seed, cfg=cfg or {}, **options)
    if name:
        factory = getattr(importlib.import_module(prefix), name)
        check_keywords(factory, cfg or {})
        settings = dict(num_envs=num_envs, device=device, seed=seed, compile=compile) | options
        wanted = inspect.signature(factory).parameters
        return factory(**{key: value for key, value in settings.items() if key in wanted} | (cfg or {}))
    known = ", ".join([*BUILT_IN, *(f"{prefix}:<task>" for prefix in SIMULATORS), "package.module:factory"])
    raise ValueError(f"--env {env_id}: there is no such environment; there are {known}")


def defaults(env_id: str, fields=None) -> dict:
    """The settings a task is best trained with, as `Args` field names to values; empty where it has none.

    Args:
        env_id: as for `make`.
        fields: names of the settings that a script has. Others are left out; and a script with a `teacher` takes those that
            the task recommends for distillation, and of the rest what concerns environments and networks.
    """
    if env_id in BUILT_IN:
        settings = importlib.import_module(f".{BUILT_IN[env_id][0]}", __name__).DEFAULTS.get(env_id, {})
    else:
        prefix, _, name = env_id.partition(":")
        settings = _simulator(prefix).defaults(name) if name and prefix in SIMULATORS else {}
    if fields is None:
        return settings
    if "teacher" in fields:
        of_actor = {name: x["actor"] if isinstance(x, dict) and "actor" in x else x for name, x in settings.items()}
        renamed = {name.replace("actor_", "student_"): value for name, value in of_actor.items()}
        wanted = ("num_envs", "clip_actions", "activation", "student_hidden_dims")
        shared = {name: value for name, value in renamed.items() if name in wanted or name.startswith("cnn_")}
        settings = shared | settings.get("distillation", {})
    return {name: value for name, value in settings.items() if name in fields}


def _simulator(prefix: str):
    """Import one simulator's adapter, or say how to install the simulator."""
    module = SIMULATORS[prefix]
    try:
        return importlib.import_module(f".{module}", __name__)
    except ModuleNotFoundError as error:
        command = (
            'pip install "isaaclab[isaacsim,all]" (see its installation guide)'
            if module == "isaaclab"
            else f'pip install -e ".[{module}]"'
        )
        raise ImportError(f"{prefix}:<task> needs {error.name}, which is not installed: {command}") from None
