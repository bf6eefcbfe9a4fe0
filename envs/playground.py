"""MuJoCo Playground (MJX, on JAX): `--env playground:CartpoleBalance`, any task of its registry.

`--env playground:my_tasks:Task` is one that the module my_tasks registers with one of Playground's suites. Options are dotted
names of the task's configuration: `--env-cfg reward_config.scales.action_rate=-0.02`.
Its own wrapper for rsl_rl resets whenever observations are read, has float dones, no `episode_length_buf`, and begins every
episode of an environment in the same state, with the random numbers and counters of the last one. So the batched task is
wrapped here directly: one compiled step that also resets, from initial states that are drawn anew once per episode length.
Groups: `state`, or the task's own names (`state`, `privileged_state`). Actions are clipped to [-1, 1], as the tasks expect.
Locomotion and manipulation tasks fetch their robots from GitHub when they are first built.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes three quarters of the GPU from torch

import jax
import jax.numpy as jnp
import torch
from mujoco_playground import dm_control_suite, locomotion, manipulation, registry
from mujoco_playground.config import locomotion_params
from tensordict import TensorDict

from .options import set_fields, task_of
from .settings import from_rsl_rl

KEPT = {"num_envs": "--num-envs", "seed": "--seed", "device": "--device"}


class PlaygroundEnv:
    """N copies of a Playground task; tensors are shared with JAX, not copied.

    Args:
        task: a `mujoco_playground.MjxEnv`.
        num_envs: N.
        max_episode_length: env steps.
        device: torch device; JAX uses the same one.
        seed: seed of the initial states.
        cfg: what to write to the run folder.
    """

    action_bounds = (-1.0, 1.0)

    def __init__(self, task, num_envs, max_episode_length, device, seed, cfg):
        self.task, self.num_envs, self.cfg = task, num_envs, cfg
        self.device, self.max_episode_length = torch.device(device), max_episode_length
        self.num_actions, self.step_dt = task.action_size, task.dt
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        kind = "gpu" if self.device.type == "cuda" else "cpu"
        self._key = jax.device_put(jax.random.PRNGKey(seed), jax.devices(kind)[self.device.index or 0])
        self._reset, self._step = jax.jit(jax.vmap(task.reset)), jax.jit(self._step_and_reset)
        self._steps = 0
        self._state = self._draw_initial()
        self._obs = self._to_groups(self._state.obs)

    def get_observations(self) -> TensorDict:
        return self._obs.clone()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        self._steps += 1
        if self._steps % self.max_episode_length == 0:
            self._draw_initial()
        self.episode_length_buf += 1
        limit = _to_jax(self.episode_length_buf >= self.max_episode_length)
        self._state, last = self._step(self._state, self._initial, _to_jax(actions.detach().clamp(-1.0, 1.0)), limit)
        terminated = torch.from_dlpack(last.done).bool()
        dones = terminated | torch.from_dlpack(limit)
        self.episode_length_buf.masked_fill_(dones, 0)
        self._obs = self._to_groups(self._state.obs)
        extras = {
            "time_outs": dones & ~terminated,
            "final_obs": self._to_groups(last.obs),
            "log": {name: torch.from_dlpack(value) for name, value in last.metrics.items()},
        }
        return self._obs.clone(), torch.from_dlpack(last.reward), dones, extras

    def render(self):
        """(240, 320, 3) uint8 picture of environment 0; without a display set MUJOCO_GL=egl before starting."""
        return self.task.render(jax.tree.map(lambda x: x[0], self._state))

    def _draw_initial(self):
        """Draw the states in which the next episodes begin, one for each environment."""
        self._key, key = jax.random.split(self._key)
        self._initial = self._reset(jax.random.split(key, self.num_envs))
        return self._initial

    def _step_and_reset(self, state, initial, actions, limit):
        """Compiled: one step, and the state after the reset of what is done. Returns (next state, last state)."""
        last = jax.vmap(self.task.step)(state, actions)
        done = (last.done > 0) | limit

        def select(new, old):
            batched = new.shape[:1] == done.shape
            return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old) if batched else old

        following = jax.tree.map(select, initial, last)
        if "rng" in last.info:  # the stream goes on, else each episode has the noise of the one before
            following.info["rng"] = last.info["rng"]
        return following, last

    def _to_groups(self, obs) -> TensorDict:
        groups = obs if isinstance(obs, dict) else {"state": obs}
        tensors = {name: torch.from_dlpack(value) for name, value in groups.items()}
        return TensorDict(tensors, batch_size=[self.num_envs], device=self.device)


def make(name, num_envs, device="cpu", seed=0, cfg=None, play=False, terminations=True) -> PlaygroundEnv:
    """Build a task; `cfg` are options, dotted name -> value. `play` is accepted for uniformity."""
    task = _known(name)
    if not terminations:
        raise ValueError(f"--no-terminations: playground:{name} ends its episodes itself and cannot be told not to")
    config = registry.get_default_config(task)
    if torch.device(device).type == "cpu" and "impl" in config:
        config.impl = "jax"  # the default, Warp, is for GPUs
    try:
        set_fields(config, cfg or {}, KEPT)
    except TypeError as error:  # its configurations keep their types, so that 5.5 is no number of steps
        raise ValueError(f"--env-cfg: {error}") from None
    built = registry.load(task, config=config)
    return PlaygroundEnv(built, num_envs, config.episode_length, device, seed, dict(config, id=name, seed=seed))


def defaults(name: str) -> dict:
    """Playground's own rsl_rl settings for legged tasks; for the others, settings that learn the dm_control suite."""
    task = _known(name)
    if task in locomotion.ALL_ENVS:
        return from_rsl_rl(locomotion_params.rsl_rl_config(task).to_dict()) | {"experiment_name": task}
    small = dict(actor_hidden_dims=(64, 64), critic_hidden_dims=(64, 64), entropy_coef=0.0)
    return dict(num_envs=256, num_steps_per_env=32, gamma=0.995, max_iterations=500, **small)


def _known(name: str) -> str:
    task = task_of(name)
    tasks = [*dm_control_suite.ALL_ENVS, *locomotion.ALL_ENVS, *manipulation.ALL_ENVS]  # registry.ALL_ENVS lacks one's own
    if task not in tasks:
        raise ValueError(f"playground:{name}: there is no such task; there are {', '.join(tasks)}")
    return task


def _to_jax(tensor: torch.Tensor):
    return jnp.from_dlpack(tensor.contiguous())
