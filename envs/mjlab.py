"""mjlab (MuJoCo Warp): `--env mjlab:Mjlab-Velocity-Flat-Unitree-Go1`, any task of its registry.

`--env mjlab:my_tasks:Task` is one that the module my_tasks registers. Options are dotted names of the task's configuration,
`--env-cfg rewards.action_rate_l2.weight=-0.02`; null leaves a whole term out, `curriculum.command_vel=null`.
Its own wrapper has the protocol already; added here are the task's settings, a picture, the viewers, and rewards that the
next step does not overwrite. Groups are the task's: `actor`, `critic`, and `camera` on tasks that see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os

import mjlab.tasks  # noqa: F401  fills the registry
from mjlab.envs import ManagerBasedRlEnv
from mjlab.rl import RslRlVecEnvWrapper
from mjlab.rl.exporter_utils import get_base_metadata, list_to_csv_str
from mjlab.tasks.registry import list_tasks, load_env_cfg, load_rl_cfg

from .options import set_fields, task_of
from .settings import from_rsl_rl

KEPT = {"scene.num_envs": "--num-envs", "num_envs": "--num-envs", "seed": "--seed", "device": "--device"}


class MjlabEnv(RslRlVecEnvWrapper):
    @property
    def step_dt(self) -> float:
        return self.unwrapped.step_dt  # s

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        return obs, rewards.clone(), dones, extras

    def render(self):
        """(H, W, 3) uint8 picture from the task's camera; needs `play=True`."""
        return self.unwrapped.render()

    def view(self, policy) -> None:
        """Run `policy` (obs -> actions) in mjlab's own viewer: a window where a display answers, else a page in the browser."""
        import glfw
        from mjlab.viewer import NativeMujocoViewer, ViserPlayViewer

        def act(obs):  # the viewers do not say which episodes have ended, by themselves or by hand
            if hasattr(policy, "reset"):
                policy.reset(self.episode_length_buf == 0)
            return policy(obs)

        if (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")) and glfw.init():
            NativeMujocoViewer(self, act).run()
        else:
            self.cfg.viewer.elevation *= -1  # the page counts the camera's elevation the other way: it would look from below
            ViserPlayViewer(self, act).run()
        self.close()

    def export_metadata(self) -> dict[str, str]:
        """What mjlab's exporter writes into the ONNX file, for its C++ runners; empty on tasks for which it does not."""
        import wandb

        try:
            data = get_base_metadata(self.unwrapped, wandb.run.name if wandb.run else "local")
        except (KeyError, AssertionError):  # no robot, no action `joint_pos`, or no group `actor`
            return {}
        if "motion" in data["command_names"]:  # what its runner for motion tracking adds
            motion = self.unwrapped.command_manager.get_term("motion").cfg
            data |= {"anchor_body_name": motion.anchor_body_name, "body_names": list(motion.body_names)}
        return {name: list_to_csv_str(x) if isinstance(x, list) else str(x) for name, x in data.items()}

    def state_dict(self) -> dict:
        """What mjlab's own checkpoints keep of the environment: the step counter that its curricula follow."""
        return {"common_step_counter": self.unwrapped.common_step_counter}

    def load_state_dict(self, state: dict) -> bool:
        """False: episodes start afresh all the same."""
        self.unwrapped.common_step_counter = state["common_step_counter"]
        return False


def make(name, num_envs, device="cpu", seed=0, cfg=None, play=False, terminations=True) -> MjlabEnv:
    """Build a task; `cfg` are options, dotted name -> value.

    `play` takes the play configuration (no noise, no pushes, no end) and switches the renderer on. Options of what it does
    not have, say of a curriculum, are left out there.
    """
    task, options = _known(name), cfg or {}
    config = trained = load_env_cfg(task)
    set_fields(trained, options, KEPT)
    if play:
        config = load_env_cfg(task, play=True)
        for option, value in options.items():
            with contextlib.suppress(ValueError):
                set_fields(config, {option: value})
    config.seed, config.scene.num_envs = seed, num_envs
    if not terminations:
        config.terminations = {}
    if getattr(config.commands.get("motion"), "motion_file", None) == "":
        raise ValueError(f"--env mjlab:{name}: has no motion; say --env-cfg commands.motion.motion_file=<file>.npz")
    asked = {option: _number(vars(config), option) for option in options}
    env = MjlabEnv(ManagerBasedRlEnv(config, device=str(device), render_mode="rgb_array" if play else None))
    now = vars(config) | {"rewards": env.unwrapped.reward_manager.cfg}
    for option, value in asked.items():  # what does nothing must not look as if it did
        if config.curriculum and value != _number(now, option):
            off = " ".join(f"curriculum.{term}=null" for term in config.curriculum)
            print(f"--env-cfg {option}={value}: the task's curriculum makes it {_number(now, option)}; to keep yours add {off}")
    if play:  # never out of time; a film of it is as long as an episode of training
        env.max_episode_length = math.ceil(trained.episode_length_s / env.step_dt)
    return env


def defaults(name: str) -> dict:
    """The task's own PPO settings."""
    return from_rsl_rl(dataclasses.asdict(load_rl_cfg(_known(name))))


def _known(name: str) -> str:
    task = task_of(name)
    if task not in list_tasks():
        raise ValueError(f"mjlab:{name}: there is no such task; there are {', '.join(list_tasks())}")
    return task


def _number(cfg: dict, option: str):
    """A number, or a tuple of numbers, by its dotted name; of anything else None."""
    value = cfg
    for step in option.split("."):
        value = value.get(step) if isinstance(value, dict) else getattr(value, step, None)
    numbers = value if isinstance(value, tuple) else (value,)
    return value if all(isinstance(x, (int, float)) for x in numbers) else None
