"""mjlab (MuJoCo Warp): `--env mjlab:Mjlab-Velocity-Flat-Unitree-Go1`, any task of its registry.

Its own wrapper has the protocol already; added here are the task's settings, a picture, the viewers, and rewards that the
next step does not overwrite. Groups are the task's: `actor`, `critic`, and `camera` on tasks that see.
"""

from __future__ import annotations

import dataclasses
import math
import os

import mjlab.tasks  # noqa: F401  fills the registry
from mjlab.envs import ManagerBasedRlEnv
from mjlab.rl import RslRlVecEnvWrapper
from mjlab.tasks.registry import list_tasks, load_env_cfg, load_rl_cfg

from .settings import from_rsl_rl


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

    def state_dict(self) -> dict:
        """What mjlab's own checkpoints keep of the environment: the step counter that its curricula follow."""
        return {"common_step_counter": self.unwrapped.common_step_counter}

    def load_state_dict(self, state: dict) -> bool:
        """False: episodes start afresh all the same."""
        self.unwrapped.common_step_counter = state["common_step_counter"]
        return False


def make(name, num_envs, device="cpu", seed=0, play=False, terminations=True, **options) -> MjlabEnv:
    """Build a task; `options` replace fields of its config (`episode_length_s=5.0`).

    `play` takes the play configuration (no noise, no pushes, no end) and switches the renderer on.
    """
    cfg = dataclasses.replace(load_env_cfg(_known(name), play=play), seed=seed, **options)
    cfg.scene.num_envs = num_envs
    if not terminations:
        cfg.terminations = {}
    env = MjlabEnv(ManagerBasedRlEnv(cfg, device=str(device), render_mode="rgb_array" if play else None))
    if play and "episode_length_s" not in options:  # never out of time; a film of it is as long as an episode of training
        env.max_episode_length = math.ceil(load_env_cfg(name).episode_length_s / env.step_dt)
    return env


def defaults(name: str) -> dict:
    """The task's own PPO settings (of its CNN all but the spatial softmax, which rsl_rl does not have)."""
    return from_rsl_rl(dataclasses.asdict(load_rl_cfg(_known(name))))


def _known(name: str) -> str:
    if name not in list_tasks():
        raise ValueError(f"mjlab:{name}: there is no such task; there are {', '.join(list_tasks())}")
    return name
