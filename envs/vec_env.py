"""The environment protocol: rsl_rl's VecEnv, as a `typing.Protocol`. Nothing has to inherit from it.

Every environment written for rsl_rl (Isaac Lab, mjlab, Genesis, your own) has these attributes already. A script only
reads them; it never imports this file at run time.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tensordict import TensorDict


class VecEnv(Protocol):
    """N copies of one environment that step together.

    Same-step reset: where `dones` is set, the observation returned by that same `step` is already the first one of the
    next episode; the last one of the finished episode is in `extras["final_obs"]`, if the environment offers it.
    """

    num_envs: int
    """N, the number of environments that step together."""
    num_actions: int
    """A, the number of actions of one environment."""
    max_episode_length: int | torch.Tensor
    """Env steps after which an episode is cut by a time-out: one number for all environments."""
    episode_length_buf: torch.Tensor
    """(N,) integer: env steps since the last reset. Settable: training starts with random episode lengths."""
    device: torch.device | str
    """Where observations, rewards and dones live."""
    cfg: Any
    """The environment's configuration (dict, dataclass, anything): written to the run folder. Optional."""

    # Optional, used where present:
    #   step_dt: float                         seconds per env step (else 1.0)
    #   capturable: bool                       `step` may run inside a CUDA graph, and in torch.inference_mode: static shapes,
    #                                          state updated in place, logs in tensors. To be declared by the class itself:
    #                                          what a subclass or a wrapper inherits does not count
    #   generator: torch.Generator             the environment's own random stream (a CUDA graph has to know it)
    #   state_dict() / load_state_dict(d)      full simulation state, in tensors, numbers, strings, lists and dicts, so that a
    #                                          resumed run continues where it stopped; where it is not all, and episodes start
    #                                          afresh, load_state_dict returns False
    #   render() -> (H, W, 3) uint8 array      a picture of environment 0, or None
    #   tracking() -> {name: (N, 2) tensor}    commanded and actual value of each tracked quantity, for `--play`
    #   symmetry(env, obs, actions)            mirror function for ppo_symmetry.py
    #   mirror_state()                         mirrors the whole simulation in place, to check that function: ppo_symmetry.py
    #                                          steps deep copies of the environment, with `play = True` for silence
    #   contacts() -> {foot: (N,) bool}        feet on the ground, in left-right pairs, for its `--play`
    #   action_bounds: (low, high)             what `step` clips every action to; policies that are exported do so too
    #   export_metadata() -> {name: value}     what a robot's runner has to know: strings, numbers, and lists of them
    #   view(policy)                           the simulator's own viewer, for `--play --viewer`
    #   close()                                called when training ends

    def get_observations(self) -> TensorDict:
        """Return the current observation groups, each (N, ...); reading twice gives the same numbers."""
        ...

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        """Advance every environment by one control step.

        Args:
            actions: (N, A).

        Returns:
            obs: TensorDict of observation groups, each (N, ...).
            rewards: (N,).
            dones: (N,) bool, integer or float; set where the episode ended with this step.
            extras: `time_outs` (N,), those dones that are only time limits; `final_obs`, a TensorDict like obs with the
                true last observations where the time limit ended an episode, and anything elsewhere; `log`, a dict of
                numbers or tensors (averaged for logging; `episode` wins where both are there).
        """
        ...
