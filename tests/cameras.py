"""A task with two image groups, one of integers and one of floats, for the tests of ppo_cnn.py."""

from __future__ import annotations

import torch

from envs.navigation import Pixels


class Cameras(Pixels):
    """The pixels task, seen by a second camera too: `depth` (1, 9, 7), distances [m] from a grid to the goal."""

    def _observe(self):
        obs = super()._observe()
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, 9, dtype=self.dtype), torch.linspace(-1, 1, 7, dtype=self.dtype), indexing="ij"
        )
        grid = torch.stack((x, y), -1).reshape(-1, 2)  # (63, 2) m
        goal = (self.goal - self.position)[:, None]  # (N, 1, 2) m
        obs["depth"] = (goal - grid).norm(dim=2).view(-1, 1, 9, 7)
        return obs


def make(num_envs: int, device: str = "cpu", seed: int = 0) -> Cameras:
    return Cameras(num_envs, device, seed)
