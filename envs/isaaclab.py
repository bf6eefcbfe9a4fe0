"""Isaac Lab, 2 and 3: `--env isaaclab:Isaac-Velocity-Flat-Anymal-D-v0`, in 3 `isaaclab:Isaac-Velocity-Flat-AnymalD`.

Any registered task, also of a module of your own: `--env isaaclab:my_tasks:My-Velocity-v0`. `--env-cfg` sets fields of its
configuration, in 3 also the selectors: `--env-cfg physics=newton_mjwarp episode_length_s=10`.
Run by this project: 2.3.2's environments and wrapper without physics, on stand-ins of Isaac Sim's modules, and 3.0.0's with
Newton, both on a CPU. NOT RUN: Isaac Sim.

Isaac Sim has to start before anything of Isaac Lab 2 is imported, hence the imports inside functions; Isaac Lab 3 starts it for
the tasks that need it. No window opens, unless `HEADLESS=0`. In 2, tasks with cameras and videos need `ENABLE_CAMERAS=1`.
The wrapper of 2 draws new sensor noise whenever observations are read, and both reuse their reward buffer; neither is passed on.
True last observations are asked for (`compute_final_obs`) where the installed version has them.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import os
import re

try:
    from isaaclab.app import launch_simulation  # Isaac Lab 3
except ImportError:
    from isaaclab.app import AppLauncher

    launch_simulation = None
from tensordict import TensorDict

from .options import set_fields, task_of
from .settings import from_rsl_rl

KEPT = {"scene.num_envs": "--num-envs", "seed": "--seed", "sim.device": "--device"}


class IsaacLabEnv:
    """A wrapped Isaac Lab task that keeps the promises of `vec_env.VecEnv`; everything else is the wrapper's.

    Args:
        env: `isaaclab_rl.rsl_rl.RslRlVecEnvWrapper`.
    """

    def __init__(self, env):
        self.env = env
        self._obs = env.get_observations()

    def __getattr__(self, name):
        return getattr(self.env, name)

    @property
    def episode_length_buf(self):
        return self.env.episode_length_buf

    @episode_length_buf.setter
    def episode_length_buf(self, value):
        self.env.episode_length_buf = value

    @property
    def step_dt(self) -> float:
        return self.env.unwrapped.step_dt  # s

    @property
    def symmetry(self):
        """The mirror function that the task's settings for rsl_rl name; ppo_symmetry.py takes it."""
        spec = self.env.unwrapped.spec
        for key in ("rsl_rl_with_symmetry_cfg_entry_point", "rsl_rl_cfg_entry_point"):
            cfg = _runner(spec.id, key).algorithm.symmetry_cfg if key in spec.kwargs else None
            if cfg is not None:
                return cfg.data_augmentation_func
        raise AttributeError("symmetry")

    def get_observations(self) -> TensorDict:
        return self._obs.clone()

    def step(self, actions):
        self._obs, rewards, dones, extras = self.env.step(actions)
        extras = dict(extras)  # Isaac Lab's own, which it goes on writing to
        if isinstance(extras.get("final_obs"), dict):
            extras["final_obs"] = TensorDict(extras["final_obs"], batch_size=[self.env.num_envs])
        return self._obs.clone(), rewards.clone(), dones, extras

    def render(self):
        """(H, W, 3) uint8 picture in Isaac Lab 2, with `play=True` and `ENABLE_CAMERAS=1`; None in 3."""
        return self.env.unwrapped.render()

    def export_metadata(self) -> dict[str, list]:
        """What a robot's runner has to know, by the names of whole_body_tracking's exporter, which are mjlab's too.

        Joints are in the order of the robot; `action_*` (joint = scale * action + offset) in that of the actions, where all of
        them move joints. Gains [N m/rad, N m s/rad] are the configured ones, whatever events have made of them. Empty for tasks
        that are not made of managers, or have no `robot`.
        """
        env = self.env.unwrapped
        if not hasattr(env, "action_manager") or "robot" not in env.scene.keys():
            return {}
        robot, terms = env.scene["robot"], [env.action_manager.get_term(name) for name in env.action_manager.active_terms]
        names = list(robot.joint_names)
        facts = {"joint_names": names, "default_joint_pos": _values(robot.data.default_joint_pos, len(names))}
        for gain in ("stiffness", "damping"):
            gains = {name: x for part in robot.actuators.values() for name, x in _gains(part, gain).items()}
            facts[f"joint_{gain}"] = [gains.get(name, 0.0) for name in names]
        facts["command_names"] = list(env.command_manager.active_terms)
        facts["observation_names"] = list(env.observation_manager.active_terms.get("policy", ()))
        if all(hasattr(term, "_joint_names") for term in terms):
            facts["action_joint_names"] = [name for term in terms for name in term._joint_names]
            for fact in ("scale", "offset"):
                values = [_values(getattr(term, f"_{fact}"), len(term._joint_names)) for term in terms]
                facts[f"action_{fact}"] = sum(values, [])
        return facts

    def state_dict(self) -> dict:
        """The step counter that curricula follow."""
        return {"common_step_counter": self.env.unwrapped.common_step_counter}

    def load_state_dict(self, state: dict) -> bool:
        """False: episodes start afresh all the same."""
        self.env.unwrapped.common_step_counter = state["common_step_counter"]
        return False


def make(name, num_envs, device="cuda:0", seed=0, cfg: dict | None = None, play=False, terminations=True) -> IsaacLabEnv:
    """Build a task; `cfg` are fields of its configuration, by dotted names (`{"rewards.alive.weight": 2.0}`).

    `play` takes the task's own play variant: `...-Play-v0` where that is registered, and what its configuration does in
    `play_mode()`, where it has one. Options of what that does not have, say of a push, are left out there.
    """
    if not terminations:
        raise ValueError(f"--no-terminations: isaaclab:{name} ends its episodes itself; its play variant may not")
    task, options = _task(name), dict(cfg or {})
    import gymnasium
    from isaaclab_tasks.utils import parse_env_cfg

    chosen = []
    if launch_simulation:
        chosen = [f"{x}={options.pop(x)}" for x in ("physics", "renderer", "presets") if x in options]

    def parse():
        try:
            return parse_env_cfg(task, device=str(device), **({"overrides": chosen} if chosen else {}))
        except ValueError as error:
            raise ValueError(f"--env-cfg {' '.join(chosen)}: {' '.join(str(error).split())}") if chosen else error from None

    env_cfg = parse()
    set_fields(env_cfg, options, KEPT)
    if play:
        task = _variant(task)
        env_cfg = parse()
        if hasattr(env_cfg, "play_mode"):
            env_cfg.play_mode()
        for option, value in options.items():
            with contextlib.suppress(ValueError):  # of what it does not have
                set_fields(env_cfg, {option: value})
    env_cfg.scene.num_envs, env_cfg.seed = num_envs, seed
    if hasattr(env_cfg, "compute_final_obs"):
        env_cfg.compute_final_obs = True
    if launch_simulation:
        _launch(env_cfg)
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper

    picture = "rgb_array" if play and not launch_simulation else None
    return IsaacLabEnv(RslRlVecEnvWrapper(gymnasium.make(task, cfg=env_cfg, render_mode=picture)))


def defaults(name: str) -> dict:
    """The task's own PPO settings, and those for distillation, where it has any."""
    task = _task(name)
    import gymnasium

    def read(kind):
        key = f"rsl_rl_{kind}_entry_point"
        return from_rsl_rl(_runner(task, key).to_dict()) if key in gymnasium.spec(task).kwargs else {}

    students = read("distillation_cfg")
    return read("cfg") | ({"distillation": students} if students else {})


def _task(name: str) -> str:
    """Start what has to start first, and import the modules that register tasks; the id of one of them."""
    if not launch_simulation:
        _start()
    import gymnasium
    import isaaclab_tasks  # noqa: F401

    task = task_of(name)
    known = [x for x, spec in gymnasium.registry.items() if "env_cfg_entry_point" in spec.kwargs]
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3, cutoff=0.0)
        raise ValueError(f"isaaclab:{name}: there is no such task; near it are {', '.join(near)}")
    return task


def _runner(task: str, key: str):
    """The task's settings of rsl_rl's runner."""
    from isaaclab_tasks import utils

    cfg = utils.load_cfg_from_registry(task, key)
    return utils.resolve_presets(cfg) if launch_simulation else cfg


def _values(x, count: int) -> list[float]:
    """Of the first environment; one number stands for all."""
    x = getattr(x, "torch", x)  # in 3 what was a tensor is an array of Warp
    return [float(x)] * count if isinstance(x, (int, float)) else x[0].tolist()


def _gains(actuator, gain: str) -> dict[str, float]:
    """Of an actuator's joints, from its configuration, or where that says nothing from the robot's file."""
    from isaaclab.utils.string import resolve_matching_names_values

    names, value = list(actuator.joint_names), getattr(actuator.cfg, gain)
    if isinstance(value, dict):
        _, found, values = resolve_matching_names_values(value, names)
        return dict(zip(found, map(float, values)))
    return dict(zip(names, _values(getattr(actuator, gain) if value is None else value, len(names))))


def _headless() -> bool:
    return os.environ.get("HEADLESS", "1") != "0"


@functools.cache
def _start():
    """Isaac Lab 2: start Isaac Sim, once. It is stopped when Python exits: closing it may end the process."""
    app = AppLauncher(headless=_headless(), device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}").app
    atexit.register(app.close)


def _launch(cfg):
    """Isaac Lab 3: start what this configuration's physics and cameras need, which for Newton is nothing; it stops when Python exits."""
    from isaaclab.utils.version import has_kit

    if not has_kit():  # of an environment before it
        stack = contextlib.ExitStack()
        stack.enter_context(
            launch_simulation(cfg, {"device": cfg.sim.device, "visualizer": "none" if _headless() else "newton_gl"})
        )
        atexit.register(stack.close)


def _variant(name: str) -> str:
    """`Isaac-Task-v0` -> `Isaac-Task-Play-v0`, if that is registered."""
    import gymnasium

    play = re.sub(r"(-v\d+)?$", r"-Play\1", name, count=1)
    return play if play in gymnasium.registry else name
