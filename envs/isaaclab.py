"""Isaac Lab: `--env isaaclab:Isaac-Velocity-Flat-Anymal-D-v0`, any registered task. NOT RUN by this project: no Isaac Sim
at hand; written to the source of `isaaclab_rl.rsl_rl.RslRlVecEnvWrapper` and tested against a stub of it.

Isaac Sim has to start before anything of Isaac Lab is imported, hence the imports inside functions. It starts without a
window; `HEADLESS=0` opens one. Tasks with cameras, and videos, need `ENABLE_CAMERAS=1`.
The wrapper draws new sensor noise whenever observations are read and reuses its reward buffer; neither is passed on. True
last observations are asked for (`compute_final_obs`) where the installed version has them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os

from isaaclab.app import AppLauncher
from tensordict import TensorDict

from .settings import from_rsl_rl


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

    def get_observations(self) -> TensorDict:
        return self._obs.clone()

    def step(self, actions):
        self._obs, rewards, dones, extras = self.env.step(actions)
        final_obs = extras.get("final_obs")
        if isinstance(final_obs, dict):
            extras["final_obs"] = TensorDict(final_obs, batch_size=[self.env.num_envs])
        return self._obs.clone(), rewards.clone(), dones, extras

    def render(self):
        """(H, W, 3) uint8 picture; needs `play=True` and `ENABLE_CAMERAS=1`."""
        return self.env.unwrapped.render()


def make(name, num_envs, device="cuda:0", seed=0, play=False, terminations=True, **options) -> IsaacLabEnv:
    """Build a task. `play` takes the task's own play variant (`...-Play-v0`) where there is one; `options` go to `gym.make`."""
    if not terminations:
        raise ValueError(f"--no-terminations: isaaclab:{name} ends its episodes itself; its play variant may not")
    _start()
    import gymnasium
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
    from isaaclab_tasks.utils import parse_env_cfg

    name = _variant(name) if play else name
    cfg = parse_env_cfg(name, device=str(device), num_envs=num_envs)
    cfg.seed = seed
    if hasattr(cfg, "compute_final_obs"):
        cfg.compute_final_obs = True
    env = gymnasium.make(name, cfg=cfg, render_mode="rgb_array" if play else None, **options)
    return IsaacLabEnv(RslRlVecEnvWrapper(env))


def defaults(name: str) -> dict:
    """The task's own PPO settings, and those for distillation, where it has any."""
    _start()
    from isaaclab_tasks.utils import load_cfg_from_registry

    def read(kind):
        return from_rsl_rl(load_cfg_from_registry(name, f"rsl_rl_{kind}_entry_point").to_dict())

    settings = read("cfg")
    with contextlib.suppress(ValueError):  # there is none
        settings["distillation"] = read("distillation_cfg")
    return settings


@functools.cache
def _start():
    """Start Isaac Sim, once, and register the tasks. It is stopped when Python exits: closing it may end the process."""
    headless = os.environ.get("HEADLESS", "1") != "0"
    app = AppLauncher(headless=headless, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}").app
    atexit.register(app.close)
    import isaaclab_tasks  # noqa: F401

    return app


def _variant(name: str) -> str:
    """`Isaac-Task-v0` -> `Isaac-Task-Play-v0`, if that is registered."""
    import gymnasium

    base, _, version = name.rpartition("-")
    play = f"{base}-Play-{version}"
    return play if play in gymnasium.registry else name
