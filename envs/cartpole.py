"""Cart-pole swing-up: the smallest task with everything in it. For tests and first steps.

State: cart position x [m] and velocity [m/s], pole angle theta [rad] (0 upright, pi hanging) and angular velocity [rad/s].
Action (1): horizontal force on the cart, 1.0 = 10 N; clipped to [-1, 1].
Observation group `policy` (5): x / 2.4, x_dot / 5, cos theta, sin theta, theta_dot / 10.
Reward per step: (1 + cos theta) / 2, times 1 - (x / 2.4)^2 / 2, minus 0.01 action^2. At most 500 an episode.
Terminates when the cart leaves +-2.4 m; time-out after 10 s (500 steps of 0.02 s).
Starts hanging, at rest up to small random offsets.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict

from .torch_env import TorchEnv

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, TRACK = 9.81, 1.0, 0.1, 0.5, 10.0, 2.4  # m/s^2, kg, kg, m, N, m

DEFAULTS = {
    "cartpole": dict(
        num_envs=256, max_iterations=150, actor_hidden_dims=(64, 64), critic_hidden_dims=(64, 64), entropy_coef=0.005
    )
}


class Cartpole(TorchEnv):
    """N carts with one pole each; Barto, Sutton and Anderson's equations of motion (1983), semi-implicit Euler.

    Args:
        num_envs: N.
        device: where all tensors live.
        seed: seed of the random initial states.
        play: accepted for uniformity; the task has no randomisation to switch off.
        terminations: False: leaving the track does not end the episode.
    """

    capturable = True

    def __init__(self, num_envs, device="cpu", seed=0, play=False, terminations=True):
        super().__init__(num_envs, 1, 10.0, 0.02, device, seed, terminations)
        self.state = torch.zeros(num_envs, 4, dtype=self.dtype, device=self.device)  # x, x_dot, theta, theta_dot
        self.reset_all()

    def _advance(self, actions):
        x, x_dot, theta, theta_dot = self.state.unbind(1)  # (N,) each
        action = actions[:, 0].clamp(-1.0, 1.0)
        mass, moment = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
        sin, cos = theta.sin(), theta.cos()
        push = (FORCE * action + moment * theta_dot**2 * sin) / mass
        theta_acc = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cos**2 / mass))
        x_acc = push - moment * theta_acc * cos / mass
        x_dot, theta_dot = x_dot + self.step_dt * x_acc, theta_dot + self.step_dt * theta_acc
        x, theta = x + self.step_dt * x_dot, theta + self.step_dt * theta_dot
        self.state.copy_(torch.stack((x, x_dot, theta, theta_dot), 1))
        upright = (1.0 + theta.cos()) / 2.0
        rewards = upright * (1.0 - 0.5 * (x / TRACK).clamp(-1.0, 1.0) ** 2) - 0.01 * action**2
        return rewards, x.abs() > TRACK, {"Metrics/upright": upright}

    def _reset(self, mask):
        state = self._uniform(-0.05, 0.05, 4)
        state[:, 2].add_(math.pi)  # hanging
        self._assign(mask, state=state)

    def _observe(self):
        x, x_dot, theta, theta_dot = self.state.unbind(1)
        policy = torch.stack((x / TRACK, x_dot / 5.0, theta.cos(), theta.sin(), theta_dot / 10.0), 1)
        return TensorDict({"policy": policy}, batch_size=[self.num_envs], device=self.device)

    def render(self):
        """(240, 480, 3) uint8 picture of cart 0."""
        import numpy as np
        from PIL import Image, ImageDraw

        x, _, theta, _ = self.state[0].tolist()
        image = Image.new("RGB", (480, 240), "white")
        draw = ImageDraw.Draw(image)
        cx, cy = 240 + 90 * x, 150
        draw.line((24, cy + 16, 456, cy + 16), fill="#999999", width=2)
        draw.rectangle((cx - 26, cy - 14, cx + 26, cy + 14), fill="#37474f")
        tip = (cx + 110 * math.sin(theta), cy - 110 * math.cos(theta))
        draw.line((cx, cy, *tip), fill="#d9480f", width=8)
        draw.ellipse((tip[0] - 9, tip[1] - 9, tip[0] + 9, tip[1] + 9), fill="#d9480f")
        return np.asarray(image)
