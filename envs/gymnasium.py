"""Gymnasium: `--env gym:HalfCheetah-v5`, any id with a Box of actions. Runs on the CPU, one environment after the other.

Observations: a Box is the group `policy`, a Dict of Boxes has one group per key; vectors in float32, images (C, H, W) in
their own type (channels-last ones, with at most 4 channels, are transposed).
Actions: [-1, 1] is mapped to the bounds of the Box and clipped there; a dimension without finite bounds passes unchanged.
Time limit: the task's own (`max_episode_steps`), else 1000 steps.
"""

from __future__ import annotations

import os
import sys

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict


class NumpyVecEnv:
    """A vector of CPU environments that speak Gymnasium's language, as a `vec_env.VecEnv`.

    The vector itself never resets: `step` reads the true last observations first, then resets what is done. The time limit
    is kept here, so that `episode_length_buf` may be set.

    Args:
        vec: steps N environments at once, as a `gymnasium.vector.VectorEnv` with autoreset disabled.
        obs: the first observations of `vec`.
        observation_space: of one environment.
        action_space: of one environment.
        max_episode_length: env steps.
        device: where the tensors go.
        cfg: what to write to the run folder.
    """

    def __init__(self, vec, obs, observation_space, action_space, max_episode_length, device, cfg):
        self.vec, self.cfg, self.device = vec, cfg, torch.device(device)
        self.num_envs, self.max_episode_length = cfg["num_envs"], max_episode_length
        self._groups = _groups(observation_space)
        self._action_space = _continuous(action_space)
        self.num_actions = int(np.prod(action_space.shape))
        if np.isfinite([action_space.low, action_space.high]).all():
            self.action_bounds = (-1.0, 1.0)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self._obs = self._to_groups(obs)

    def get_observations(self) -> TensorDict:
        return self._obs.clone()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        last, rewards, terminated, truncated, _ = self.vec.step(self._to_bounds(actions))
        self.episode_length_buf += 1
        limit = (self.episode_length_buf >= self.max_episode_length).cpu().numpy()
        time_outs = (truncated | limit) & ~terminated
        dones = terminated | time_outs
        final_obs = self._to_groups(last)
        self._obs = self._to_groups(self._reset(dones, last)) if dones.any() else final_obs
        rewards, dones, time_outs = (
            torch.tensor(x, dtype=t, device=self.device)
            for x, t in ((rewards, torch.float32), (dones, torch.bool), (time_outs, torch.bool))
        )
        self.episode_length_buf.masked_fill_(dones, 0)
        return self._obs.clone(), rewards, dones, {"time_outs": time_outs, "final_obs": final_obs}

    def export_metadata(self) -> dict:
        """What [-1, 1] is mapped to: a robot's runner has to do it itself."""
        return {name: getattr(self._action_space, name).ravel().tolist() for name in ("low", "high")} | {
            "actions": "[-1, 1] is low, high"
        }

    def close(self) -> None:
        self.vec.close()

    def _reset(self, mask: np.ndarray, obs):
        """Reset where mask (N,) is set; return the observations of all environments, those of `obs` elsewhere."""
        return self.vec.reset(options={"reset_mask": mask})[0]

    def _to_bounds(self, actions: torch.Tensor) -> np.ndarray:
        """(N, A) in [-1, 1] to the action space; where that is not bounded on both sides, as they are, up to a bound."""
        space = self._action_space
        actions = actions.detach().cpu().numpy().reshape(self.num_envs, *space.shape)
        finite = np.isfinite(space.low) & np.isfinite(space.high)
        low, high = np.where(finite, space.low, -1.0), np.where(finite, space.high, 1.0)
        scaled = low + (actions.clip(-1.0, 1.0) + 1.0) / 2.0 * (high - low)
        return np.where(finite, scaled, actions.clip(space.low, space.high)).astype(space.dtype)

    def _to_groups(self, obs) -> TensorDict:
        """Observations of the vector as new tensors."""
        obs = obs if isinstance(obs, dict) else {"policy": obs}
        tensors = {}
        for name, space in self._groups.items():
            if len(space.shape) == 3:
                value = np.moveaxis(obs[name], -1, 1) if _channels_last(space) else obs[name]  # (N, C, H, W)
            else:
                value = np.asarray(obs[name], dtype=np.float32).reshape(self.num_envs, -1)  # (N, O)
            tensors[name] = torch.tensor(value, device=self.device)
        return TensorDict(tensors, batch_size=[self.num_envs], device=self.device)


class GymnasiumEnv(NumpyVecEnv):
    @property
    def step_dt(self) -> float:
        return float(getattr(self.vec.envs[0].unwrapped, "dt", 1.0))  # s, where the environment knows

    def render(self) -> np.ndarray:
        """Picture of environment 0; needs `play=True`."""
        return self.vec.envs[0].render()


def make(
    name: str, num_envs: int, device: str = "cpu", seed: int = 0, cfg=None, play: bool = False, terminations: bool = True
) -> GymnasiumEnv:
    """`num_envs` copies of a registered environment; `cfg` goes to its constructor. `play` switches the renderer on."""
    options = dict(cfg or {})
    if not terminations:
        raise ValueError(f"--no-terminations: gym:{name} ends its episodes itself and cannot be told not to")
    if play:
        options.setdefault("render_mode", "rgb_array")
        if sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo tasks draw without a window; read when mujoco is imported
    try:
        vector = dict(autoreset_mode=AutoresetMode.DISABLED)
        vec = gymnasium.make_vec(name, num_envs, vectorization_mode="sync", vector_kwargs=vector, **options)
    except (gymnasium.error.Error, TypeError) as error:  # the latter for an option that there is not
        raise ValueError(f"gym:{name}: {error}") from None
    # seed + i would give the seeds 1 and 2 all their environments but one in common.
    obs, _ = vec.reset(seed=np.random.SeedSequence(seed).generate_state(num_envs).tolist())
    cfg = dict(id=name, num_envs=num_envs, seed=seed, **options)
    limit = options.get("max_episode_steps") or vec.spec.max_episode_steps or 1000
    return GymnasiumEnv(vec, obs, vec.single_observation_space, vec.single_action_space, limit, device, cfg)


def defaults(name: str) -> dict:
    """Settings for tasks that step on a CPU: few environments, small networks; and values that are free to move.

    Returns of Gymnasium's tasks go into the hundreds, and rsl_rl's value clipping lets a value move by clip_param, 0.2, in an
    iteration: with it Hopper ends at a quarter of the return.
    """
    return dict(
        num_envs=16,
        num_steps_per_env=128,
        num_learning_epochs=10,
        num_mini_batches=8,
        use_clipped_value_loss=False,
        actor_hidden_dims=(64, 64),
        critic_hidden_dims=(64, 64),
        entropy_coef=0.0,
        max_iterations=500,
    )


def _groups(space) -> dict[str, Box]:
    """Observation groups of a space: refused where there is no obvious mapping, never guessed."""
    groups = space.spaces if isinstance(space, Dict) else {"policy": space}
    for name, part in groups.items():
        if not isinstance(part, Box):
            raise ValueError(f"observation space {space}: {name} is a {type(part).__name__}, only a Box can be a group")
    return groups


def _continuous(space) -> Box:
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"action space {space}: continuous actions need a Box of floats")
    return space


def _channels_last(space: Box) -> bool:
    return space.shape[-1] <= 4 < space.shape[0]
