"""EnvPool: `--env envpool:HalfCheetah-v4`. C++ environments on a thread pool; spaces and actions as in `gymnasium.py`.

EnvPool resets a done environment in the step after; here it is reset at once, by a partial `reset(done_ids)`, so that
the protocol's same-step reset holds and the true last observations are kept.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import envpool
import numpy as np

from .gymnasium import NumpyVecEnv
from .gymnasium import defaults as gymnasium_defaults


class EnvPoolEnv(NumpyVecEnv):
    def _reset(self, mask, obs):
        part, info = self.vec.reset(np.flatnonzero(mask))
        ids = info["env_id"]  # which environment each row of `part` belongs to

        def put(rows, new):
            rows = np.array(rows)
            rows[ids] = new
            return rows

        return {name: put(obs[name], part[name]) for name in part} if isinstance(part, dict) else put(obs, part)

    def render(self) -> np.ndarray:
        """Picture of environment 0; needs `play=True`.

        Raises:
            RuntimeError: it cannot be drawn here, as where there is no OpenGL.
        """
        if not can_draw(self.cfg["id"]):
            raise RuntimeError(f"EnvPool cannot draw {self.cfg['id']} here; its MuJoCo tasks need OpenGL")
        return self.vec.render(0)[0]


@functools.cache
def can_draw(name: str) -> bool:
    """Tried in a process of its own: without OpenGL EnvPool's renderer ends the process that calls it."""
    settings = f"{name!r}, env_type='gymnasium', num_envs=1, render_mode='rgb_array'"
    source = f"import envpool; env = envpool.make({settings}); env.reset(); env.render(0)[0].shape; print('drawn')"
    return "drawn" in subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout


def make(
    name: str, num_envs: int, device: str = "cpu", seed: int = 0, cfg=None, play: bool = False, terminations: bool = True
) -> EnvPoolEnv:
    """`num_envs` environments of an EnvPool task; `cfg` goes to `envpool.make`. `play` switches the renderer on."""
    options = dict(cfg or {})
    if not terminations:
        raise ValueError(f"--no-terminations: envpool:{name} ends its episodes itself and cannot be told not to")
    if name not in envpool.list_all_envs():
        raise ValueError(f"envpool:{name}: EnvPool has no such environment; envpool.list_all_envs() names them")
    if play:
        options.setdefault("render_mode", "rgb_array")
    # Environment i takes first + i, so that neighbouring seeds must lie far apart.
    first = int(np.random.SeedSequence(seed).generate_state(1)[0] // 2)
    vec = envpool.make(name, env_type="gymnasium", num_envs=num_envs, seed=first, **options)
    obs, _ = vec.reset()
    cfg = {k: v for k, v in vec.config.items() if isinstance(v, (str, int, float, bool))}
    limit = vec.config["max_episode_steps"]
    return EnvPoolEnv(vec, obs, vec.observation_space, vec.action_space, limit, device, dict(cfg, id=name))


def defaults(name: str) -> dict:
    """As for Gymnasium, with more environments: EnvPool is an order of magnitude faster."""
    return dict(gymnasium_defaults(name), num_envs=64, num_steps_per_env=64)
