"""What the built-in tasks share: same-step resets, time-outs, `final_obs` and saving, without one host synchronisation."""

from __future__ import annotations

import ctypes
import functools
import math
import sys

import torch
from tensordict import TensorDict


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed. It would return large blocks to the kernel, which clears every page anew: on a CPU a
    third of the time of a training with small networks, whoever's it is."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest there is: blocks below it come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the heap's end stays


@functools.cache
def compiled(fn):
    # Hundreds of small kernels: those that do not need each other's results become one.
    return torch.compile(fn, dynamic=False, options={"combo_kernels": True})


class TorchEnv:
    """Base of the built-in tasks: the protocol of `vec_env.py` around three methods that a task fills in.

    A task creates its state tensors, (N, ...) each, in `__init__`, calls `self.reset_all()` as the last thing there, and
    implements `_advance`, `_reset` and `_observe`. Every tensor that outlives a step is updated IN PLACE and no value is
    read on the host, so that `step` can be captured in a CUDA graph: a task that keeps to it says `capturable = True`.
    Random numbers come from `self.generator` only.

    Args:
        num_envs: N, the number of environments.
        num_actions: A, the number of actions.
        episode_length_s: length of an episode that is not terminated [s].
        step_dt: duration of one env step [s].
        device: where all tensors live.
        seed: seed of the environment's own random stream.
        terminations: False: nothing but the time limit ends an episode (for `--play --no-terminations`).
        cfg: what to write to the run folder.
    """

    compile = False  # the three methods, with torch.compile

    def __init__(self, num_envs, num_actions, episode_length_s, step_dt, device="cpu", seed=0, terminations=True, cfg=None):
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: at least 1 environment is needed")
        self.num_envs, self.num_actions, self.step_dt = num_envs, num_actions, step_dt
        self.max_episode_length = math.ceil(episode_length_s / step_dt)  # env steps
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = torch.get_default_dtype()
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.terminations = terminations
        self.cfg = dict(cfg or {}, episode_length_s=episode_length_s, step_dt=step_dt, seed=seed)
        self._episode_length = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._obs: TensorDict | None = None

    # Filled in by the task

    def _advance(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Integrate one step in place; return rewards (N,), terminated (N,) bool and a dict of tensors to log."""
        raise NotImplementedError

    def _reset(self, mask: torch.Tensor) -> None:
        """Start a new episode, in place, in the environments where mask (N,) is True."""
        raise NotImplementedError

    def _observe(self) -> TensorDict:
        """Return the observation groups of the current state, as new tensors."""
        raise NotImplementedError

    # The protocol

    @property
    def episode_length_buf(self) -> torch.Tensor:
        """(N,) env steps since the last reset; assigning copies into the same memory."""
        return self._episode_length

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        self._episode_length.copy_(value)

    def get_observations(self) -> TensorDict:
        return self._obs.clone()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        # Inference mode makes small operations a third cheaper. What is made in it cannot be changed outside of it, so only
        # tasks that keep their state in place run in it, and what is returned is copied outside.
        task = type(self)
        advance, reset, observe = (compiled(fn) if self.compile else fn for fn in (task._advance, task._reset, task._observe))
        with torch.inference_mode(vars(task).get("capturable", False)):
            self._episode_length += 1
            rewards, terminated, log = advance(self, actions.to(self.dtype))
            terminated = terminated & self.terminations
            time_outs = (self._episode_length >= self.max_episode_length) & ~terminated
            dones = terminated | time_outs
            final_obs = observe(self)
            reset(self, dones)
            self._episode_length.masked_fill_(dones, 0)
            self._obs.update_(observe(self))
        extras = {"time_outs": time_outs.clone(), "final_obs": final_obs.clone(), "log": {k: x.clone() for k, x in log.items()}}
        return self._obs.clone(), rewards.clone(), dones.clone(), extras

    def reset_all(self) -> None:
        """Start a new episode everywhere."""
        self._reset(torch.ones(self.num_envs, dtype=torch.bool, device=self.device))
        self._episode_length.zero_()
        self._obs = self._observe()

    # For the tasks

    def _uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Uniform random numbers of shape (N, *shape) from the environment's own stream."""
        size = (self.num_envs, *shape)
        return low + (high - low) * torch.rand(size, generator=self.generator, device=self.device, dtype=self.dtype)

    def _normal(self, *shape: int) -> torch.Tensor:
        """Standard normal random numbers of shape (N, *shape) from the environment's own stream."""
        size = (self.num_envs, *shape)
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.dtype)

    def _assign(self, mask: torch.Tensor, **values: torch.Tensor | float) -> None:
        """Write `values` into the state tensors of the same name, in place, where mask (N,) is True."""
        for name, value in values.items():
            state = getattr(self, name)
            state.copy_(torch.where(mask.view(-1, *[1] * (state.dim() - 1)), value, state))

    # Saving

    def state_dict(self) -> dict:
        """The whole simulation state: every tensor of this object, and the random stream."""
        tensors = {k: v.clone() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return {"tensors": tensors, "obs": self._obs.clone().to_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken."""
        for name, value in state["tensors"].items():
            getattr(self, name).copy_(value)
        self._obs.update_(TensorDict(state["obs"], batch_size=[self.num_envs]))
        if state["generator"].numel() == self.generator.get_state().numel():  # a GPU's random stream cannot go on on a CPU
            self.generator.set_state(state["generator"].cpu())
