"""A five-line environment, as a user might write one, and ways in which it can go wrong."""

import torch
from tensordict import TensorDict


class Toy:
    """Push a point to the origin. Has what the protocol requires and nothing else: no cfg, no time_outs, no final_obs."""

    max_episode_length = 20

    def __init__(self, num_envs=8, device="cpu", seed=0, groups=("policy",), fault=None):
        self.num_envs, self.num_actions, self.device, self.groups, self.fault = num_envs, 1, device, groups, fault
        self.episode_length_buf, self.steps = torch.zeros(num_envs, dtype=torch.long), 0
        self.x = torch.linspace(-1.0, 1.0, num_envs)[:, None]

    def get_observations(self):
        return TensorDict({group: self.x.clone() for group in self.groups}, batch_size=[self.num_envs])

    def step(self, actions):
        self.steps += 1
        self.x = (self.x + 0.1 * actions).clamp(-2.0, 2.0)
        self.episode_length_buf = self.episode_length_buf + 1
        dones = self.episode_length_buf >= self.max_episode_length
        self.episode_length_buf = torch.where(dones, 0, self.episode_length_buf)
        obs, rewards = self.get_observations(), -self.x[:, 0].abs()
        if self.fault and self.steps == self.fault[1]:
            (obs[self.groups[0]] if self.fault[0] == "obs" else rewards)[3] = self.fault[2]
        return obs, rewards, dones.long(), {}


def make(num_envs, device, seed):
    return Toy(num_envs, device, seed)
