"""A cart-pole in Newton, as an example of an environment of one's own: `--env newton_env:NewtonCartpole` (from `tests/`).

N worlds step together; Newton's arrays and these tensors are the same memory, so that nothing is copied. On a CPU; on a GPU
`finalize` takes its device, and Newton has to step on torch's stream: `wp.ScopedStream(wp.stream_from_torch())`.
"""

import newton
import torch
import warp as wp
from tensordict import TensorDict

from envs.torch_env import TorchEnv


class NewtonCartpole(TorchEnv):
    """Balance: the pole starts near upright, at most 300 steps of 0.02 s; falling, or leaving +-2.4 m, ends the episode."""

    defaults = dict(num_envs=128, max_iterations=80, actor_hidden_dims=(64, 64), critic_hidden_dims=(64, 64))

    def __init__(self, num_envs, seed=0, terminations=True):
        super().__init__(num_envs, 1, 6.0, 0.02, seed=seed, terminations=terminations)
        one, world = newton.ModelBuilder(), newton.ModelBuilder()
        cart, pole = one.add_link(), one.add_link()
        one.add_shape_box(cart, hx=0.1, hy=0.1, hz=0.05)  # 1000 kg/m^3: 4 kg
        one.add_shape_box(pole, hx=0.02, hy=0.02, hz=0.5)  # 1.6 kg
        slide = one.add_joint_prismatic(-1, cart, axis=newton.Axis.X)
        hinge = one.add_joint_revolute(cart, pole, axis=newton.Axis.Y, child_xform=wp.transform((0, 0, -0.5)))
        one.add_articulation([slide, hinge])
        world.replicate(one, num_envs)
        model = world.finalize(device="cpu")
        self.solver = newton.solvers.SolverFeatherstone(model)
        self.states, self.control = (model.state(), model.state()), model.control()
        self.q, self.qd = (wp.to_torch(x).view(num_envs, 2) for x in (self.states[0].joint_q, self.states[0].joint_qd))
        self.force = wp.to_torch(self.control.joint_f).view(num_envs, 2)  # N on the cart, N m on the pole: always 0
        self.reset_all()

    def _advance(self, actions):
        self.force[:, 0] = 40.0 * actions[:, 0].clamp(-1.0, 1.0)
        for now, then in (self.states, self.states[::-1]):  # two steps of half the time, there and back
            self.solver.step(now, then, self.control, None, self.step_dt / 2)
        height = self.q[:, 1].cos()  # of the pole's tip, 1 where it stands
        return height, (height < 0.7) | (self.q[:, 0].abs() > 2.4), {"Metrics/height": height}

    def _reset(self, mask):
        self._assign(mask, q=self._uniform(-0.2, 0.2, 2), qd=self._uniform(-0.2, 0.2, 2))

    def _observe(self):
        policy = torch.cat((self.q, self.qd), 1)
        return TensorDict({"policy": policy}, batch_size=[self.num_envs])
