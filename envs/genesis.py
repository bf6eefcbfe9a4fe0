"""Genesis: `--env genesis:go2`, a Unitree Go2 that learns to walk forward at 0.5 m/s, as in Genesis' own example.

Genesis is a simulator without an env layer; this file is that layer, and a pattern for tasks of your own: a module my_tasks
that does `envs.genesis.TASKS["name"] = (MyTask, {"gamma": 0.98})` is used by `--env genesis:my_tasks:name`. Options are
keyword arguments of the task: `--env-cfg kp=30 command=[1,0,0]`.
Observation group `policy` (45): angular velocity * 0.25, projected gravity, command * (2, 2, 0.25), joint positions less the
default pose, joint velocities * 0.05, last action.
Action (12): joint position targets, pose + 0.25 * action [rad], carried out one step late as on the robot; kp 20, kd 0.5.
Rewards per second: exp(-|v_xy error|^2 / 0.25) + 0.2 exp(-yaw rate error^2 / 0.25) - v_z^2 - 50 (height - 0.3)^2
- 0.005 |action change|^2 - 0.1 |pose offset|_1.
Terminates when rolled or pitched past 10 degrees; time-out after 20 s (1000 steps of 0.02 s).
"""

from __future__ import annotations

import math

import genesis as gs
import torch
from genesis.utils.geom import inv_quat, transform_by_quat
from tensordict import TensorDict

from .options import check_keywords, task_of
from .torch_env import TorchEnv

JOINTS = [f"{leg}_{joint}_joint" for leg in ("FR", "FL", "RR", "RL") for joint in ("hip", "thigh", "calf")]
POSE = [0.0, 0.8, -1.5] * 2 + [0.0, 1.0, -1.5] * 2  # rad
START = [0.0, 0.0, 0.42, 1.0, 0.0, 0.0, 0.0]  # m, quaternion (w, x, y, z)
COMMAND = (0.5, 0.0, 0.0)  # m/s, m/s, rad/s


class Go2(TorchEnv):
    """N robots on a plane.

    Args:
        num_envs: N.
        device: must be the one Genesis was initialised with.
        seed: seed of Genesis.
        play: add a camera for `render`.
        terminations: False: falling over does not end the episode.
        command: velocities that are commanded, forward, sideways [m/s] and about the vertical [rad/s].
        kp: stiffness of the joints [N m/rad].
        kd: their damping [N m s/rad].
        episode_length_s: time limit [s].
    """

    capturable = False

    def __init__(
        self,
        num_envs,
        device="cpu",
        seed=0,
        play=False,
        terminations=True,
        command=COMMAND,
        kp=20.0,
        kd=0.5,
        episode_length_s=20.0,
    ):
        super().__init__(num_envs, 12, episode_length_s, 0.02, device, seed, terminations)
        if not gs._initialized:
            backend = gs.gpu if self.device.type == "cuda" else gs.cpu
            gs.init(backend=backend, precision="32", logging_level="warning", seed=seed)
        self.scene = gs.Scene(
            sim_options=gs.options.SimOptions(dt=self.step_dt, substeps=2),
            rigid_options=gs.options.RigidOptions(max_collision_pairs=30),
            vis_options=gs.options.VisOptions(rendered_envs_idx=[0]),
            show_viewer=False,
        )
        self.scene.add_entity(gs.morphs.URDF(file="urdf/plane/plane.urdf", fixed=True))
        self.robot = self.scene.add_entity(gs.morphs.URDF(file="urdf/go2/urdf/go2.urdf", pos=START[:3], quat=START[3:]))
        self.camera = self.scene.add_camera(res=(640, 480), pos=(2.0, -2.0, 1.2), lookat=(0.0, 0.0, 0.3)) if play else None
        self.scene.build(n_envs=num_envs)
        self.motors = [self.robot.get_joint(name).dofs_idx_local[0] for name in JOINTS]
        self.robot.set_dofs_kp([kp] * 12, self.motors)
        self.robot.set_dofs_kv([kd] * 12, self.motors)

        self.pose = self._tensor(POSE)  # (12,)
        self.start = torch.cat((self._tensor(START), torch.zeros(12, device=self.device)))  # (19,) as Genesis orders its joints
        self.start[[7 + motor - 6 for motor in self.motors]] = self.pose
        self.command = self._tensor(command).float().repeat(num_envs, 1)  # (N, 3)
        self.action = torch.zeros(num_envs, 12, device=self.device)
        self.reset_all()

    def _advance(self, actions):
        self.robot.control_dofs_position(self.pose + 0.25 * self.action, self.motors)  # the action of the last step
        self.scene.step()
        change, self.action = (actions - self.action).square().sum(1), actions.clone()
        linear, angular, gravity, position, _ = self._sense()
        terms = {
            "tracking_lin_vel": torch.exp(-(self.command[:, :2] - linear[:, :2]).square().sum(1) / 0.25),
            "tracking_ang_vel": 0.2 * torch.exp(-(self.command[:, 2] - angular[:, 2]).square() / 0.25),
            "lin_vel_z": -linear[:, 2].square(),
            "base_height": -50.0 * (self.robot.get_pos()[:, 2] - 0.3).square(),
            "action_rate": -0.005 * change,
            "pose": -0.1 * (position - self.pose).abs().sum(1),
        }
        roll, pitch = torch.atan2(-gravity[:, 1], -gravity[:, 2]), torch.asin(gravity[:, 0].clamp(-1.0, 1.0))
        fallen = torch.maximum(roll.abs(), pitch.abs()) > math.radians(10.0)
        rewards = self.step_dt * torch.stack(tuple(terms.values())).sum(0)
        log = {f"Reward/{name}": value for name, value in terms.items()}
        return rewards, fallen, log | {"Metrics/velocity_error": (self.command[:, :2] - linear[:, :2]).norm(dim=1)}

    def _reset(self, mask):
        ids = mask.nonzero().flatten()
        if len(ids):
            self.robot.set_qpos(self.start.repeat(len(ids), 1), envs_idx=ids, zero_velocity=True)
            self.action[ids] = 0.0

    def _observe(self):
        _, angular, gravity, position, velocity = self._sense()
        command = self.command * self._tensor([2.0, 2.0, 0.25])
        policy = torch.cat((0.25 * angular, gravity, command, position - self.pose, 0.05 * velocity, self.action), 1)
        return TensorDict({"policy": policy}, batch_size=[self.num_envs], device=self.device)

    def _sense(self):
        """Linear [m/s] and angular velocity [rad/s] and gravity direction in the body frame; joint positions and velocities."""
        to_body = inv_quat(self.robot.get_quat())
        down = self._tensor([0.0, 0.0, -1.0]).repeat(self.num_envs, 1)
        frame = [transform_by_quat(v, to_body) for v in (self.robot.get_vel(), self.robot.get_ang(), down)]
        return *frame, self.robot.get_dofs_position(self.motors), self.robot.get_dofs_velocity(self.motors)

    def _tensor(self, values):
        return torch.tensor(values, device=self.device)

    def tracking(self):
        """Commanded and actual forward velocity [m/s], (N, 2)."""
        return {"v_x": torch.stack((self.command[:, 0], self._sense()[0][:, 0]), 1)}

    def render(self):
        """(480, 640, 3) uint8 picture of robot 0; needs `play=True`."""
        x, y, _ = self.robot.get_pos()[0].tolist()
        self.camera.set_pose(pos=(x + 2.0, y - 2.0, 1.2), lookat=(x, y, 0.3))
        return self.camera.render()[0]

    def state_dict(self):
        robot = {"qpos": self.robot.get_qpos().clone(), "velocity": self.robot.get_dofs_velocity().clone()}
        return super().state_dict() | robot

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.robot.set_qpos(state["qpos"])
        self.robot.set_dofs_velocity(state["velocity"])

    def close(self):
        self.scene.destroy()


# Name: class, and the settings that it is best trained with; of Genesis' example what `Args` does not have already.
TASKS = {"go2": (Go2, dict(max_iterations=101, obs_normalization=False))}


def make(name, num_envs, device="cpu", seed=0, cfg=None, play=False, terminations=True):
    """Build a task; `cfg` are keyword arguments of its class."""
    task, _ = _known(name)
    check_keywords(task, cfg or {}, taken=("num_envs", "device", "seed", "play", "terminations"))
    return task(num_envs=num_envs, device=device, seed=seed, play=play, terminations=terminations, **(cfg or {}))


def defaults(name: str) -> dict:
    return _known(name)[1]


def _known(name: str):
    task = task_of(name)
    if task not in TASKS:
        raise ValueError(f"genesis:{name}: there is no such task; there are {', '.join(TASKS)}")
    return TASKS[task]
