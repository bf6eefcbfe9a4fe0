"""Cart-poles for the edits: with episodes of 40 steps, and what an edit needs to read. For `--env cartpoles:<factory>`."""

import torch
from tensordict import TensorDict

from envs.cartpole import Cartpole


class Plain(Cartpole):
    capturable = True

    def __init__(self, num_envs, device="cpu", seed=0):
        super().__init__(num_envs, device, seed)
        self.max_episode_length = 40


class History(Plain):
    """The actor sees the last H = 6 observations, `history` (N, H, O), and the critic the newest."""

    def __init__(self, num_envs, device="cpu", seed=0):
        self.past = torch.zeros(num_envs, 6, 5, device=device)
        super().__init__(num_envs, device, seed)

    def _advance(self, actions):
        result = super()._advance(actions)
        self.past.copy_(torch.cat((self.past[:, 1:], super()._observe()["policy"][:, None]), dim=1))
        return result

    def _reset(self, mask):
        super()._reset(mask)
        self._assign(mask, past=super()._observe()["policy"][:, None].expand_as(self.past))

    def _observe(self):
        groups = {"history": self.past.clone(), "critic": super()._observe()["policy"]}
        return TensorDict(groups, batch_size=[self.num_envs])


class Rewards(Plain):
    """The reward in two parts, extras["reward_groups"] (N, 2): to be upright, and the effort."""

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        effort = -0.01 * actions[:, 0].clamp(-1.0, 1.0) ** 2
        return obs, rewards, dones, extras | {"reward_groups": torch.stack((rewards - effort, effort), dim=-1)}


class Privileged(Plain):
    """The actor sees positions, and the group `privileged` is the velocities."""

    def _observe(self):
        x, x_dot, cos, sin, theta_dot = super()._observe()["policy"].unbind(1)
        groups = {"policy": torch.stack((x, cos, sin), dim=1), "privileged": torch.stack((x_dot, theta_dot), dim=1)}
        return TensorDict(groups, batch_size=[self.num_envs])
