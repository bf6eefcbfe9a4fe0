"""Environments written for rsl_rl 1 (legged_gym and its descendants) and 2 (Isaac Lab 2.0 to 2.2), in today's protocol.

The scripts wrap such an environment by themselves where this file is beside them; it needs no other file of `envs/`.
"""

from __future__ import annotations

from tensordict import TensorDict


class Legacy:
    """The environment itself, whose `get_observations` and `step` give observation groups.

    rsl_rl 1: `get_observations` gives a tensor (N, O), `get_privileged_observations` another or None, and `step` five values
    with both of them. Here they are the groups `policy` and `critic`.
    rsl_rl 2: observations are a tensor and `extras["observations"]`, the other groups. Here the tensor is `policy`.
    """

    def __init__(self, env):
        vars(self)["env"] = env

    def __getattr__(self, name):
        return getattr(vars(self)["env"], name)

    def __setattr__(self, name, value):
        setattr(self.env, name, value)

    def get_observations(self) -> TensorDict:
        obs = self.env.get_observations()
        if isinstance(obs, tuple):  # rsl_rl 2
            return self._groups(obs[0], obs[1].get("observations", {}))
        privileged = getattr(self.env, "get_privileged_observations", lambda: None)()
        return self._groups(obs, {"critic": privileged})

    def step(self, actions):
        obs, *privileged, rewards, dones, extras = self.env.step(actions)
        others = {"critic": privileged[0]} if privileged else extras.get("observations", {})
        return self._groups(obs, others), rewards, dones, extras

    def _groups(self, obs, others) -> TensorDict:
        groups = dict(obs.items() if hasattr(obs, "keys") else [("policy", obs)]) | {name: x for name, x in others.items() if x is not None}
        return TensorDict(groups, batch_size=[self.num_envs])
