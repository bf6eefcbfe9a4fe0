"""Older versions of rsl_rl: environments for 1 (legged_gym and its descendants) and 2 (Isaac Lab 2.0 to 2.2), checkpoints of 2 to 4.

The scripts use it by themselves where it lies in `envs/` beside them; it needs no other file there.
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
        groups = dict(obs.items() if hasattr(obs, "keys") else [("policy", obs)]) | {
            name: x for name, x in others.items() if x is not None
        }
        return TensorDict(groups, batch_size=[self.num_envs])


def translate(checkpoint: dict) -> dict:
    """A checkpoint of rsl_rl 2, 3 or 4 in the words of rsl_rl 5; what is of 5 stays as it is.

    2 and 3 keep both networks in one module (`model_state_dict`: `actor.0.weight`, `critic.0.weight`, `std`), 2 the normalisers
    beside it; 4 has a state for each network. The optimizer's state fits where the order of the parameters is the same: with a
    memory it is not, and is left out.
    """
    checkpoint = dict(checkpoint)
    module = checkpoint.pop("model_state_dict", {})
    for part, normalizer in (("actor", "obs_norm"), ("critic", "privileged_obs_norm"), ("student", "obs_norm")):
        names = {f"{part}.": "mlp.", f"{part}_obs_normalizer.": "obs_normalizer.", f"memory_{part[0]}.": "rnn."}
        state = {f"obs_normalizer.{name}": x for name, x in checkpoint.get(f"{normalizer}_state_dict", {}).items()}
        for name, x in module.items():
            state |= {new + name.removeprefix(old): x for old, new in names.items() if name.startswith(old)}
        if any(name.startswith("mlp.") for name in state):
            stds = {name: module[name] for name in ("std", "log_std") if name in module and part != "critic"}
            checkpoint[f"{part}_state_dict"] = state | stds
    for part in ("actor", "student"):
        state = dict(checkpoint.get(f"{part}_state_dict", {}))
        for name in ("std", "log_std"):
            if name in state:
                state[f"distribution.{name}_param"] = state.pop(name)
        checkpoint |= {f"{part}_state_dict": state} if state else {}
    if any(name.startswith("memory_") for name in module):
        checkpoint.pop("optimizer_state_dict", None)
    return checkpoint
