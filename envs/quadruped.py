"""Quadruped: a 12 kg robot with 12 joints learns to walk as commanded, on flat ground or on rough terrain.

A reduced-order model in plain PyTorch, made so that one CPU core learns to walk in minutes: one rigid body, massless legs with
rotor inertia at the joints, point feet on an analytic height field. It shows every part of legged-robot training, but it is
no digital twin: for sim-to-real use a full simulator such as mjlab (`--env mjlab:Mjlab-Velocity-Flat-Unitree-Go1`).

State
    position of the centre of mass [m] and velocity [m/s] in the world frame (x, y, z up), quaternion (w, x, y, z) from the
    body frame (x forward, y left, z up) to the world frame, angular velocity [rad/s] in the body frame, joint angles [rad]
    and velocities [rad/s]. Joints are ordered leg by leg, FL FR RL RR, each leg hip, thigh, calf.
Action (12)
    joint targets = default pose + 0.25 * action [rad], followed by PD control: torque = 25 gain (target - q) - 0.6 q_dot, at
    most 24 Nm. Control runs at 50 Hz, physics at 200 Hz (semi-implicit Euler).
Contact
    normal force: spring-damper. Tangential force: a spring-damper to an anchor, the point where the foot touched down; it is
    scaled down onto Coulomb's cone, and the anchor slides along with it.

Observation groups
    policy (47), noisy: angular velocity * 0.25 (3), gravity direction in the body frame (3), command v_x, v_y [m/s], yaw rate
        [rad/s] (3), joint angles - default pose (12), joint velocities * 0.05 (12), last action (12), sine and cosine of the
        2 Hz gait clock (2)
    velocity (3), noisy: linear velocity in the body frame [m/s], as a state estimator would give it
    privileged (60; rough: 87), exact: linear velocity in the body frame [m/s] (3), angular velocity * 0.25 (3), gravity
        direction (3), joint angles - default pose (12), joint velocities * 0.05 (12), foot forces in the body frame / 100 N
        (12), feet in contact (4), height of the feet and of the body above the ground [m] (5), (mass - 12 kg) / 2 (1),
        friction (1), gain (1), centre of mass * 10 [m] (3); rough: ground normals at the feet in the body frame (12),
        ground below the body on a 5 x 3 grid, as in `scan` (15)
    scan (1, 13, 9), rough only: height of the ground relative to the body [m], + 0.3, at x = -0.6 ... 0.6 m (forward) and
        y = -0.4 ... 0.4 m (left) around the body in its yaw frame
Reward
    the sum over `REWARDS`, weight * term * 0.02 s: follow the commanded velocities, stay level and smooth, keep the feet to a
    trot clock. Logged term by term, in reward per second. A fall ends the episode.
Termination
    tilted by more than 60 degrees, or the centre of mass less than 0.15 m above the ground; time-out after 20 s.
Randomised per episode: mass, centre of mass, friction, motor gain, terrain. Pushes every 6 s, new commands every 5 s.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict

from .torch_env import TorchEnv

SUBSTEPS, SUBSTEP_DT, GRAVITY = 4, 0.005, 9.81  # -, s, m/s^2
MASS, INERTIA = 12.0, (0.045, 0.135, 0.150)  # kg, kg m^2
HIP_X, HIP_Y, HIP_LINK, LEG_LINK = 0.19, 0.047, 0.08, 0.213  # m; thigh and calf are equally long
ROTOR_INERTIA, KP, KD, MAX_TORQUE = 0.02, 25.0, 0.6, 24.0  # kg m^2, Nm/rad, Nm s/rad, Nm
ACTION_SCALE, JOINT_STIFFNESS = 0.25, 60.0  # rad, Nm/rad beyond a joint's limits
JOINT_LIMITS = ((-0.8, 0.8), (-0.8, 2.6), (-2.6, -0.6))  # rad: hip, thigh, calf
DEFAULT_POSE = ((0.0, 0.8, -1.5), (0.0, 0.8, -1.5), (0.0, 1.0, -1.5), (0.0, 1.0, -1.5))  # rad: FL, FR, RL, RR
NORMAL_STIFFNESS, NORMAL_DAMPING = 3000.0, 30.0  # N/m, N s/m
TANGENT_STIFFNESS, TANGENT_DAMPING = 2000.0, 15.0  # N/m, N s/m
BODY_SIZE = (0.38, 0.20, 0.10)  # m: what touches the ground after a fall, and what `render` draws

CLOCK_HZ, SWING_HEIGHT = 2.0, 0.09  # Hz, m
COMMAND_RANGE = (1.0, 0.5, 1.0)  # m/s, m/s, rad/s: uniform in +- this
STANDING_SHARE, COMMAND_INTERVAL, PUSH_INTERVAL, PUSH_SPEED = 0.1, 250, 300, 0.6  # -, env steps, env steps, m/s
NOISE = dict(ang_vel=0.2, gravity=0.05, joint_pos=0.01, joint_vel=1.5, velocity=0.1)  # rad/s, -, rad, rad/s, m/s: +- this
MAX_LEVEL, NUM_WAVES = 9, 3

REWARDS = {  # name: weight
    "track_velocity": 1.5,  # exp(-|v_xy error|^2 / 0.25)
    "track_yaw_rate": 0.75,  # exp(-(yaw rate error)^2 / 0.25)
    "vertical_velocity": -2.0,  # v_z^2 in the body frame
    "roll_pitch_rate": -0.05,  # |w_xy|^2
    "tilt": -2.5,  # |g_xy|^2, g: gravity direction in the body frame
    "torque": -2e-4,  # |tau|^2
    "action_rate": -0.01,  # |a_t - a_{t-1}|^2
    "pose": -0.05,  # |q - default pose|^2
    "slip": -0.05,  # |v_xy|^2 of the feet in contact
    "gait": 0.3,  # number of feet whose contact agrees with the trot clock, - 2
    "clearance": -2.0,  # how far the swinging feet are below the height that the clock asks for [m]
}

_TRAINING = dict(
    num_envs=1024,
    actor_hidden_dims=(128, 64),
    critic_hidden_dims=(128, 64),
    critic_obs=("policy", "privileged"),
    num_learning_epochs=3,
    num_mini_batches=4,
)
_DISTILLATION = dict(
    num_envs=128,
    num_learning_epochs=4,
    max_iterations=60,
    learning_rate=2e-3,
    learning_rate_decay=0.95,
    max_grad_norm=1.0,
    rnn_type="gru",  # velocity is not observed: it has to be inferred from the past
    rnn_hidden_dim=128,
)
# A student's own last action is among its observations: clipped, or one that is still bad may talk itself into infinity.
_ROUGH_DISTILLATION = dict(_DISTILLATION, num_envs=256, rnn_hidden_dim=64, clip_actions=10.0)
DEFAULTS = {
    "quadruped": dict(_TRAINING, max_iterations=220, distillation=_DISTILLATION),
    "quadruped-rough": dict(_TRAINING, max_iterations=400, distillation=_ROUGH_DISTILLATION),
}


# Kinematics. Inside the physics environments come LAST, (..., N): then every component of a vector is contiguous in memory,
# which is several times faster. Small matrix products are written as multiply and sum, so that TF32 cannot touch them.


def rotation(quat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotation matrix R (3, 3, N) of unit quaternions (4, N), and L (3, 4, N) with d quat/dt = L^T omega / 2."""
    w, x, y, z = quat
    nx, ny, nz = -quat[1:]
    n = quat.shape[1]
    left = torch.stack((nx, w, z, ny, ny, nz, w, x, nz, y, nx, w)).view(3, 4, n)
    right = torch.stack((nx, w, nz, y, ny, z, w, nx, nz, ny, x, w)).view(3, 4, n)
    return (right.unsqueeze(1) * left).sum(2), left  # R = right left^T


def rotate(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Multiply matrices (3, 3, N) with vectors (..., 3, N)."""
    return (matrix * vector.unsqueeze(-3)).sum(-2)


def leg_kinematics(joint_pos: torch.Tensor, hips: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the feet are, and how they move.

    Args:
        joint_pos: (4, 3, N) hip, thigh and calf angle of each leg [rad].
        hips: (4, 3, N) hip positions relative to the centre of mass, body frame [m].
        side: (4, 1) signed length of the hip link: left +, right - [m].

    Returns:
        foot: (4, 3, N) foot positions relative to the centre of mass, body frame [m].
        jacobian: (4, 6, 3, N) d foot / d (rotation of the body about x, y, z; hip, thigh, calf).
    """
    hip, thigh, calf = joint_pos.unbind(1)  # (4, N) each
    angles = torch.stack((hip, thigh, thigh + calf))
    (sin_hip, sin_thigh, sin_shin), (cos_hip, cos_thigh, cos_shin) = angles.sin(), angles.cos()
    shin_x, shin_z = -LEG_LINK * sin_shin, -LEG_LINK * cos_shin  # the shin in the plane of the leg
    leg_x, leg_z = shin_x - LEG_LINK * sin_thigh, shin_z - LEG_LINK * cos_thigh  # thigh and shin
    leg_y, leg_down = side * cos_hip - leg_z * sin_hip, side * sin_hip + leg_z * cos_hip  # turned by the hip about x
    foot = hips + torch.stack((leg_x, leg_y, leg_down), 1)
    x, y, z = foot.unbind(1)
    nx, ny, nz = (-foot).unbind(1)
    o = torch.zeros_like(x)
    columns = (
        (o, nz, y),  # e_x cross foot
        (z, o, nx),  # e_y cross foot
        (ny, x, o),  # e_z cross foot
        (o, -leg_down, leg_y),
        (leg_z, leg_x * sin_hip, -leg_x * cos_hip),
        (shin_z, shin_x * sin_hip, -shin_x * cos_hip),
    )
    return foot, torch.stack([entry for column in columns for entry in column], 1).unflatten(1, (6, 3))


class Quadruped(TorchEnv):
    """N quadrupeds; see the top of the file.

    Args:
        num_envs: N.
        device: where all tensors live.
        seed: seed of all randomisation.
        terrain: "flat", or "rough": slopes, waves and stairs, harder as the robot gets better (`terrain_level` 0 to 9).
        play: no sensor noise, no pushes, and no curriculum: the terrain levels are spread evenly and stay.
        terminations: False: a fall does not end the episode.
        compile: compile the step, which makes far fewer kernels of it; the first one takes long.
    """

    capturable = True

    def __init__(self, num_envs, device="cpu", seed=0, terrain="flat", play=False, terminations=True, compile=False):
        if terrain not in ("flat", "rough"):
            raise ValueError(f'terrain is "{terrain}"; there are "flat" and "rough"')
        cfg = dict(terrain=terrain, play=play, rewards=REWARDS)
        super().__init__(num_envs, 12, 20.0, SUBSTEPS * SUBSTEP_DT, device, seed, terminations, cfg)
        self.rough, self.play, self.compile = terrain == "rough", play, compile
        # State: (N, ...) views of memory that is laid out (..., N)
        self.pos, self.quat = self._zeros(3), self._zeros(4)  # m, -
        self.lin_vel, self.ang_vel = self._zeros(3), self._zeros(3)  # m/s, rad/s
        self.joint_pos, self.joint_vel = self._zeros(4, 3), self._zeros(4, 3)  # rad, rad/s
        self.anchor, self.force = self._zeros(4, 3), self._zeros(4, 3)  # m, N: of the feet, world frame
        self.foot_pos, self.foot_vel = self._zeros(4, 3), self._zeros(4, 3)  # m, m/s: world frame
        self.torque, self.action, self.command = self._zeros(4, 3), self._zeros(12), self._zeros(3)  # Nm, -, m/s and rad/s
        self.phase = self._zeros()  # of the gait clock, 0 ... 1
        self.mass, self.com, self.friction, self.gain = self._zeros(), self._zeros(3), self._zeros(), self._zeros()
        if self.rough:
            self.slope, self.wave = self._zeros(2), self._zeros(NUM_WAVES, 2)  # -, rad/m
            self.amplitude, self.wave_phase = self._zeros(NUM_WAVES), self._zeros(NUM_WAVES)  # m, rad
            self.terrain_level = self._zeros()
            self.walked, self.commanded = self._zeros(), self._zeros()  # m, in this episode
            if play:  # robot 0, which is drawn, walks on level 6
                self.terrain_level += (6 + torch.arange(num_envs, device=self.device)) % (MAX_LEVEL + 1)
        self._make_constants()
        self.reset_all()

    def _zeros(self, *shape: int) -> torch.Tensor:
        """Zeros of shape (N, *shape), with the environments last in memory."""
        return torch.zeros(*shape, self.num_envs, dtype=self.dtype, device=self.device).movedim(-1, 0)

    def _make_constants(self) -> None:
        """Tensors that never change. `step` makes none: copying to the device would wait for it."""

        def tensor(values, dtype=self.dtype):
            return torch.tensor(values, dtype=dtype, device=self.device)

        left = tensor([[1.0], [-1.0], [1.0], [-1.0]])  # (4, 1) FL, FR, RL, RR
        self.side = HIP_LINK * left
        self.hips = tensor([(x, y, 0.0) for x in (HIP_X, -HIP_X) for y in (HIP_Y, -HIP_Y)]).unsqueeze(-1)  # (4, 3, 1)
        self.corners = tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * tensor(BODY_SIZE)
        self.default_pose = tensor(DEFAULT_POSE).unsqueeze(-1)  # (4, 3, 1)
        self.default_foot = leg_kinematics(self.default_pose, self.hips, self.side)[0]  # (4, 3, 1)
        self.identity = tensor([1.0, 0.0, 0.0, 0.0])
        self.joint_low, self.joint_high = tensor(JOINT_LIMITS).unsqueeze(-1).unbind(1)  # (3, 1) each
        self.inertia = tensor(INERTIA).unsqueeze(-1)  # (3, 1)
        self.gyration = (self.inertia.roll(-1, 0) - self.inertia.roll(-2, 0)) / self.inertia  # (I_y - I_z) / I_x, ...
        self.up = tensor([0.0, 0.0, 1.0]).unsqueeze(-1)  # (3, 1)
        self.gravity = GRAVITY * self.up  # (3, 1) m/s^2
        self.reward_weights = tensor(list(REWARDS.values())).unsqueeze(-1)  # (K, 1)
        self.command_range = tensor(COMMAND_RANGE)
        self.trot = tensor([0.0, 0.5, 0.5, 0.0]).unsqueeze(-1)  # (4, 1) of a period: FL and RR swing together
        n = NOISE
        self.noise = tensor(
            [0.25 * n["ang_vel"]] * 3 + [n["gravity"]] * 3 + [0.0] * 3 + [n["joint_pos"]] * 12
            + [0.05 * n["joint_vel"]] * 12 + [0.0] * 14 + [n["velocity"]] * 3
        )  # fmt: skip
        if self.rough:
            self.scan_x = tensor([[0.1 * i] for i in range(-6, 7)])  # (13, 1) m
            self.scan_y = tensor([[0.1 * i] for i in range(-4, 5)])  # (9, 1) m
            self.scan_subset = tensor([9 * i + j for i in (0, 3, 6, 9, 12) for j in (0, 4, 8)], torch.long)
            self.harmonics = tensor([1.0, 2.0, 3.0]).unsqueeze(-1)  # (3, 1)
            # floor(u) = u - 1/2 + sum_k sin(2 pi k u) / (pi k), rounded by Lanczos' factors
            self.step_series = torch.sinc(self.harmonics / 4) / (math.pi * self.harmonics)
        self.mirrors = {k: (tensor(index, torch.long), tensor(sign)) for k, (index, sign) in _mirrors(self.rough).items()}

    # Terrain

    def _ground(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Height of the ground [m] and its derivatives along x and y at points (P, N) of the world: (P, N) each."""
        if not self.rough:
            flat = torch.zeros_like(x)
            return flat, flat, flat
        slope, wave, amplitude = self.slope.T, self.wave.movedim(0, -1), self.amplitude.T.unsqueeze(1)
        wave_x, wave_y = wave.unsqueeze(1).unbind(2)  # (K, 1, N) each
        angle = wave_x * x + wave_y * y + self.wave_phase.T.unsqueeze(1)  # (K, P, N)
        height = slope[0] * x + slope[1] * y + (amplitude * angle.sin()).sum(0)
        rise = amplitude * angle.cos()
        return height, slope[0] + (wave_x * rise).sum(0), slope[1] + (wave_y * rise).sum(0)

    def _scan(self, forward: torch.Tensor) -> torch.Tensor:
        """Height of the ground relative to the body, + 0.3 [m], on the scan's grid (117, N), turned to forward (2, N)."""
        forward = forward / forward.square().sum(0).sqrt()
        leftward = torch.stack((-forward[1], forward[0]))
        slope, wave, amplitude = self.slope.T, self.wave.movedim(0, -1), self.amplitude.T.unsqueeze(1)
        # On a grid a wave is sin(a + b) = sin(a) cos(b) + cos(a) sin(b) with a along the rows and b along the columns.
        center = self.pos.T[:2]
        a = (wave * center).sum(1, keepdim=True) + self.wave_phase.T.unsqueeze(1)
        a = a + (wave * forward).sum(1, keepdim=True) * self.scan_x  # (K, 13, N)
        b = (wave * leftward).sum(1, keepdim=True) * self.scan_y  # (K, 9, N)
        rows, columns = (amplitude * a.sin(), amplitude * a.cos()), (b.cos(), b.sin())
        height = (slope * forward).sum(0) * self.scan_x  # (13, N)
        height = height + ((slope * center).sum(0) - self.pos[:, 2] + 0.3)
        height = height.unsqueeze(1) + (slope * leftward).sum(0) * self.scan_y  # (13, 9, N)
        for row, column in zip(rows, columns):
            for k in range(NUM_WAVES):
                height.addcmul_(row[k].unsqueeze(1), column[k])
        return height.flatten(0, 1)

    def _normal_vector(self, slope_x: torch.Tensor, slope_y: torch.Tensor) -> torch.Tensor:
        """Unit normals (P, 3, N) of ground with these derivatives, (P, N) each."""
        normal = torch.stack((-slope_x, -slope_y, torch.ones_like(slope_x)), 1)
        return normal / normal.square().sum(1, keepdim=True).sqrt()

    def _above_ground(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Height of the feet and the centre of mass above the ground [m], and the slopes of the ground: (5, N) each."""
        point = torch.cat((self.foot_pos.movedim(0, -1), self.pos.T.unsqueeze(0)))  # (5, 3, N)
        height, slope_x, slope_y = self._ground(point[:, 0], point[:, 1])
        return point[:, 2] - height, slope_x, slope_y

    def _body_frame(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotation from the world to the body frame (3, 3, N), and there the velocity and the direction of gravity, (3, N)."""
        to_body = rotation(self.quat.T)[0].transpose(0, 1)
        return to_body, rotate(to_body, self.lin_vel.T), -to_body[:, 2]

    # Physics

    def _contact(self, pos, vel, anchor):
        """Forces (P, 3, N) of the ground on moving points [N], world frame.

        Args:
            pos: (P, 3, N) where they are [m].
            vel: (P, 3, N) how they move [m/s].
            anchor: (P, 3, N) where their tangential springs are fixed [m]; moved in place.
        """
        height, slope_x, slope_y = self._ground(pos[:, 0], pos[:, 1])
        normal = self._normal_vector(slope_x, slope_y) if self.rough else self.up
        depth = (height - pos[:, 2]).unsqueeze(1) * normal[..., 2:, :]  # (P, 1, N)
        spring = NORMAL_STIFFNESS * depth - NORMAL_DAMPING * (vel * normal).sum(1, keepdim=True)
        pressure = spring.clamp(min=0.0) * (depth > 0.0)
        pull = TANGENT_STIFFNESS * (pos - anchor) + TANGENT_DAMPING * vel
        pull = pull - normal * (pull * normal).sum(1, keepdim=True)
        # Coulomb: |tangential force| <= friction * pressure. In the air both are 0 and the anchor goes with the foot.
        grip = self.friction * pressure / (pull.square().sum(1, keepdim=True).sqrt() + 1e-6)
        grip = grip.clamp(max=1.0)
        anchor.copy_(torch.lerp(pos, anchor, grip))
        return pressure * normal - grip * pull

    def _substep(self, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Integrate SUBSTEP_DT, in place.

        Args:
            target: (4, 3, N) joint angles that the motors aim at [rad].

        Returns:
            torque [Nm], and of the feet, world frame: force [N], position [m], velocity [m/s]; (4, 3, N) each.
        """
        pos, quat, lin_vel, ang_vel = self.pos.T, self.quat.T, self.lin_vel.T, self.ang_vel.T  # (3, N), (4, N), ...
        q, q_dot = self.joint_pos.movedim(0, -1), self.joint_vel.movedim(0, -1)  # (4, 3, N)
        matrix, left = rotation(quat)
        foot, jacobian = leg_kinematics(q, self.hips - self.com.T, self.side)
        rates = torch.cat((ang_vel.expand(4, 3, -1), q_dot), 1).unsqueeze(2)  # (4, 6, 1, N)
        foot_vel = lin_vel + rotate(matrix, (jacobian * rates).sum(1))
        foot_pos = pos + rotate(matrix, foot)
        force = self._contact(foot_pos, foot_vel, self.anchor.movedim(0, -1))
        # The legs are massless: a foot force acts on the body where the foot is, and on the joints through J^T.
        body_force = rotate(matrix.transpose(0, 1), force).unsqueeze(1)  # (4, 1, 3, N)
        moment = (jacobian * body_force).sum(2)  # (4, 6, N)
        total_force, total_moment = force.sum(0), moment[:, :3].sum(0)  # (3, N), world and body frame
        if not self.terminations:  # a fallen robot has to lie on something
            fallen_force, fallen_moment = self._fallen(matrix)
            total_force, total_moment = total_force + fallen_force, total_moment + fallen_moment
        torque = (KP * self.gain * (target - q) - KD * q_dot).clamp(-MAX_TORQUE, MAX_TORQUE)
        stop = JOINT_STIFFNESS * (q.clamp(self.joint_low, self.joint_high) - q)
        # Semi-implicit Euler: velocities first, then positions with the new velocities.
        q_dot.add_(torque + stop + moment[:, 3:], alpha=SUBSTEP_DT / ROTOR_INERTIA)
        q.add_(q_dot, alpha=SUBSTEP_DT)
        lin_vel.add_(total_force / self.mass - self.gravity, alpha=SUBSTEP_DT)
        pos.add_(lin_vel, alpha=SUBSTEP_DT)
        gyroscopic = self.gyration * ang_vel.roll(-1, 0) * ang_vel.roll(-2, 0)  # -w cross (I w) / I
        ang_vel.add_(total_moment / self.inertia + gyroscopic, alpha=SUBSTEP_DT)
        quat.add_((left * ang_vel.unsqueeze(1)).sum(0), alpha=SUBSTEP_DT / 2)
        quat.div_(quat.square().sum(0).sqrt())
        return torque, force, foot_pos, foot_vel

    def _fallen(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Force (3, N), world frame, and moment (3, N), body frame, of the ground on the corners of the body."""
        corner = (self.corners.unsqueeze(-1) - self.com.T).expand(-1, -1, self.num_envs)  # (8, 3, N)
        ang_vel = self.ang_vel.T.expand_as(corner)
        pos = self.pos.T + rotate(matrix, corner)
        vel = self.lin_vel.T + rotate(matrix, torch.linalg.cross(ang_vel, corner, dim=1))
        force = self._contact(pos, vel, pos.clone())  # no anchors: viscous friction
        return force.sum(0), torch.linalg.cross(corner, rotate(matrix.transpose(0, 1), force), dim=1).sum(0)

    # One env step

    def _advance(self, actions):
        action_rate = (actions - self.action).square().sum(1)
        self.action.copy_(actions)
        target = self.default_pose + ACTION_SCALE * self.action.T.unflatten(0, (4, 3))
        for _ in range(SUBSTEPS):
            feedback = self._substep(target)
        for state, value in zip((self.torque, self.force, self.foot_pos, self.foot_vel), feedback):
            state.movedim(0, -1).copy_(value)
        self.phase.copy_((self.phase + CLOCK_HZ * self.step_dt) % 1.0)

        _, velocity, gravity = self._body_frame()
        ang_vel, command, height = self.ang_vel.T, self.command.T, self._above_ground()[0]
        velocity_error = (command[:2] - velocity[:2]).square().sum(0)  # m^2/s^2
        yaw_rate_error = (command[2] - ang_vel[2]).square()
        contact = self.force.movedim(0, -1)[:, 2] > 0.0  # (4, N)
        swing = ((self.phase + self.trot) * 2.0 * math.pi).sin() * (command.square().sum(0) > 0.01)  # > 0: foot in the air
        foot_vel = self.foot_vel.movedim(0, -1)
        terms = {
            "track_velocity": torch.exp(-velocity_error / 0.25),
            "track_yaw_rate": torch.exp(-yaw_rate_error / 0.25),
            "vertical_velocity": velocity[2].square(),
            "roll_pitch_rate": ang_vel[:2].square().sum(0),
            "tilt": gravity[:2].square().sum(0),
            "torque": self.torque.square().sum((1, 2)),
            "action_rate": action_rate,
            "pose": (self.joint_pos.movedim(0, -1) - self.default_pose).square().sum((0, 1)),
            "slip": (foot_vel[:, :2].square().sum(1) * contact).sum(0),
            "gait": (contact ^ (swing > 0.0)).sum(0) - 2.0,
            "clearance": (SWING_HEIGHT * swing.clamp(min=0.0) - height[:4]).clamp(min=0.0).sum(0),
        }
        rewards = self.reward_weights * torch.stack([terms[name] for name in REWARDS])  # (K, N) per second
        log = {f"Reward/{name}": value for name, value in zip(REWARDS, rewards)}
        log["Metrics/velocity_error"], log["Metrics/yaw_rate_error"] = velocity_error.sqrt(), yaw_rate_error.sqrt()

        terminated = (gravity[2] > -math.cos(math.radians(60.0))) | (height[4] < 0.15)
        if self.rough:
            speed = command[:2].square().sum(0).sqrt()  # m/s
            self.walked += self.step_dt * (velocity[:2] * command[:2]).sum(0) / (speed + 1e-6)
            self.commanded += self.step_dt * speed
            log["Curriculum/terrain_level"] = self.terrain_level
        self._events()
        return rewards.sum(0) * self.step_dt, terminated, log

    def _events(self) -> None:
        """New commands and pushes, at fixed times of the episode."""
        self._assign(self._episode_length % COMMAND_INTERVAL == 0, command=self._commands())
        if not self.play:
            push = PUSH_SPEED * (self._episode_length % PUSH_INTERVAL == 0)
            self.lin_vel[:, :2] += push.unsqueeze(1) * self._uniform(-1.0, 1.0, 2)

    def _commands(self) -> torch.Tensor:
        """Random commands (N, 3)."""
        moving = self._uniform(0.0, 1.0, 1) > STANDING_SHARE
        return self.command_range * self._uniform(-1.0, 1.0, 3) * moving

    # Episodes

    def _reset(self, mask):
        if self.rough:
            self._reset_terrain(mask)
        u = self._uniform(-1.0, 1.0, 13)
        mass, friction, gain, com = MASS + 2.0 * u[:, 0], 0.8 + 0.4 * u[:, 1], 1.0 + 0.1 * u[:, 2], 0.02 * u[:, 3:6]
        self._assign(mask, mass=mass, friction=friction, gain=gain, com=com)
        self._assign(mask, phase=0.5 + 0.5 * u[:, 6], command=self._commands(), action=0.0)
        # Stand in the default pose with the lowest foot 2 cm above the highest ground.
        foot = self.default_foot - self.com.T  # (4, 3, N)
        height = (self._ground(foot[:, 0], foot[:, 1])[0] - foot[:, 2]).amax(0) + 0.02
        pos = height.unsqueeze(1) * self.up.T  # (N, 3)
        foot_pos = pos.unsqueeze(1) + foot.movedim(-1, 0)
        joint_pos = self.default_pose.movedim(-1, 0)
        self._assign(mask, pos=pos, quat=self.identity, lin_vel=0.3 * u[:, 7:10], ang_vel=0.3 * u[:, 10:13])
        self._assign(mask, joint_pos=joint_pos, joint_vel=0.0, torque=0.0)
        self._assign(mask, foot_pos=foot_pos, foot_vel=0.0, anchor=foot_pos, force=0.0)

    def _reset_terrain(self, mask: torch.Tensor) -> None:
        """New slopes, waves or stairs: a level up for robots that followed their commands, down for those that did not."""
        if not self.play:
            up = self.walked > 0.7 * self.commanded
            down = self.walked < 0.4 * self.commanded
            level = self.terrain_level + up.to(self.dtype) - down.to(self.dtype)
            # Those who master the hardest level are sent to any.
            anywhere = self._uniform(0.0, MAX_LEVEL + 1.0).floor()
            level = torch.where(level > MAX_LEVEL, anywhere, level).clamp(min=0.0)
            self._assign(mask, terrain_level=level, walked=0.0, commanded=0.0)
        hard = (self.terrain_level / MAX_LEVEL).unsqueeze(1)  # (N, 1) 0 ... 1
        u = self._uniform(0.0, 1.0, 11)
        kind = 3.0 * u[:, :1]  # (N, 1) below 1: waves, below 2: slope, else stairs
        stairs, hill = kind > 2.0, (kind > 1.0) & (kind <= 2.0)
        depth, rise = 0.35 + 0.15 * u[:, 1:2], 0.02 + 0.1 * hard  # m, of one stair
        heading = 2.0 * math.pi * torch.where(stairs, u[:, 2:3], u[:, 2:5])  # (N, 3)
        length = torch.where(stairs, depth / self.harmonics.T, 0.6 + 1.2 * u[:, 5:8])  # m
        amplitude = torch.where(stairs, rise * self.step_series.T, torch.where(hill, 0.01, 0.04) * hard)
        wave_phase = torch.where(stairs, 0.0, 2.0 * math.pi * u[:, 8:11])
        steepness = torch.where(stairs, rise / depth, 0.35 * hard * hill)  # (N, 1)
        direction = torch.stack((heading.cos(), heading.sin()), -1)  # (N, 3, 2)
        wave = 2.0 * math.pi / length.unsqueeze(-1) * direction
        self._assign(mask, slope=steepness * direction[:, 0], wave=wave, amplitude=amplitude, wave_phase=wave_phase)

    # Observations

    def _observe(self):
        to_body, velocity, gravity = self._body_frame()
        ang_vel, joint_vel = 0.25 * self.ang_vel.T, 0.05 * self.joint_vel.movedim(0, -1).flatten(0, 1)
        joint_pos = (self.joint_pos.movedim(0, -1) - self.default_pose).flatten(0, 1)
        angle = 2.0 * math.pi * self.phase
        clock = torch.stack((angle.sin(), angle.cos()))
        sensed = torch.cat((ang_vel, gravity, self.command.T, joint_pos, joint_vel, self.action.T, clock, velocity))
        sensed = sensed.T.contiguous()  # (N, 50)
        if not self.play:
            sensed = sensed + self.noise * self._uniform(-1.0, 1.0, 50)

        height, slope_x, slope_y = self._above_ground()
        force = self.force.movedim(0, -1)  # (4, 3, N)
        body = torch.stack(((self.mass - MASS) / 2.0, self.friction, self.gain))
        exact = [velocity, ang_vel, gravity, joint_pos, joint_vel]
        exact += [0.01 * rotate(to_body, force).flatten(0, 1), force[:, 2] > 0.0, height, body, 10.0 * self.com.T]
        groups = {"policy": sensed[:, :47], "velocity": sensed[:, 47:]}
        if self.rough:
            scan = self._scan(to_body[0, :2])  # (117, N)
            normal = rotate(to_body, self._normal_vector(slope_x[:4], slope_y[:4])).flatten(0, 1)
            exact += [normal, scan.index_select(0, self.scan_subset)]
            groups["scan"] = scan.T.reshape(-1, 1, 13, 9)
        groups["privileged"] = torch.cat(exact).T.contiguous()
        return TensorDict(groups, batch_size=[self.num_envs], device=self.device)

    # Left-right symmetry

    def mirror_state(self) -> None:
        """Mirror the whole simulation in place, randomisation included: y -> -y in the world, left legs become right legs.

        Optional in the protocol; it lets a test ask that step(T x) = T step(x).
        """
        kinds = dict(pos="polar", quat="quat", lin_vel="polar", ang_vel="axial", joint_pos="joints", joint_vel="joints")
        kinds |= dict(anchor="feet", force="feet", foot_pos="feet", foot_vel="feet", torque="joints", action="joints")
        kinds |= dict(command="command", com="polar")
        for name, kind in kinds.items():
            state, (index, sign) = getattr(self, name), self.mirrors[kind]
            state.copy_((state.flatten(1)[:, index] * sign).view(state.shape))
        self.phase.copy_((self.phase + 0.5) % 1.0)
        if self.rough:
            self.slope[:, 1] *= -1.0
            self.wave[..., 1] *= -1.0
        self._obs.update_(symmetry(self, self._obs, None)[0][self.num_envs :])

    @staticmethod
    def symmetry(env, obs, actions):
        """See the function `symmetry` of this file."""
        return symmetry(env, obs, actions)

    # Watching

    def contacts(self) -> dict[str, torch.Tensor]:
        """Which feet touch the ground, (N,) bool each; left and right of a pair one after the other."""
        return {name: self.force[:, leg, 2] > 0.0 for leg, name in enumerate(("FL", "FR", "RL", "RR"))}

    def tracking(self) -> dict[str, torch.Tensor]:
        """Commanded and actual velocities, (N, 2) each."""
        _, velocity, _ = self._body_frame()
        actual = (velocity[0], velocity[1], self.ang_vel[:, 2])
        names = ("v_x [m/s]", "v_y [m/s]", "yaw rate [rad/s]")
        return {name: torch.stack((self.command[:, i], actual[i]), 1) for i, name in enumerate(names)}

    def render(self, width: int = 640, height: int = 480):
        """(height, width, 3) uint8 picture of robot 0, seen from its right front; feet in contact are orange.

        Arrows: commanded (green) and actual (blue) velocity.
        """
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        def array(x):  # environment 0 of a tensor (..., N)
            return x[..., 0].double().cpu().numpy()

        scale, sky, sun = 2, np.array([236.0, 241.0, 246.0]), np.array([0.35, -0.5, 0.79])  # drawn twice as large
        body, matrix = array(self.pos.T), array(rotation(self.quat.T)[0])
        feet, contact = array(self.foot_pos.movedim(0, -1)), array(self.force.movedim(0, -1))[:, 2] > 0.0

        # A perspective camera that keeps its direction and follows the body
        forward = np.array([-0.50, 0.76, -0.42])
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        axes = np.stack((right, np.cross(forward, right), forward))  # right, down, forward
        eye, focal = body - 1.9 * forward - [0.0, 0.0, 0.04], 1.45 * scale * height

        def project(points):
            """(..., 3) world [m] -> (..., 2) pixels and (...) distance along the line of sight [m]."""
            x, y, depth = np.moveaxis((np.asarray(points) - eye) @ axes.T, -1, 0)
            depth = np.maximum(depth, 0.1)
            return np.stack((scale * width / 2 + focal * x / depth, scale * height / 2 + focal * y / depth), -1), depth

        def ground(xy):
            """(P, 2) -> (P, 3): the points of the ground above or below."""
            points = torch.as_tensor(xy, dtype=self.dtype, device=self.device)
            x, y = points.unsqueeze(-1).expand(-1, -1, self.num_envs).unbind(1)  # (P, N)
            return np.concatenate((xy, array(self._ground(x, y)[0])[:, None]), 1)

        image = Image.new("RGB", (scale * width, scale * height), tuple(sky.astype(int)))
        draw = ImageDraw.Draw(image, "RGBA")

        def polygon(points, color, opacity=255):
            draw.polygon([tuple(p) for p in project(points)[0]], fill=(*(int(c) for c in np.clip(color, 0, 255)), opacity))

        def limb(start, end, radius, color, opacity=255):
            (a, b), depth = project([start, end])
            radius = focal * radius / depth.mean()
            fill = (*color, opacity)
            draw.line((*a, *b), fill=fill, width=max(int(2 * radius), 1))
            for x, y in (a, b) if opacity == 255 else ():
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

        # Ground: a chequered mesh, far tiles first, that fades into the sky
        tile, reach = (0.1, 3.2) if self.rough else (0.4, 4.0)  # m
        count = int(2 * reach / tile)
        corner = np.floor((body[:2] + 1.4 * forward[:2] - reach) / tile)
        index = corner + np.stack(np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij"), -1)
        mesh = ground(tile * index.reshape(-1, 2)).reshape(count + 1, count + 1, 3)
        quads = np.stack((mesh[:-1, :-1], mesh[1:, :-1], mesh[1:, 1:], mesh[:-1, 1:]), 2).reshape(-1, 4, 3)
        normals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
        light = 0.2 + 0.95 * (normals @ sun) / np.linalg.norm(normals, axis=1)
        chequer = np.floor(tile * (index[:-1, :-1].reshape(-1, 2) + 0.5) / 0.4).sum(1) % 2
        center = quads.mean(1)
        fade = np.clip(np.linalg.norm(center[:, :2] - body[:2], axis=1) / reach, 0.0, 1.0)[:, None] ** 2
        color = np.where(chequer[:, None], [200.0, 207.0, 212.0], [183.0, 192.0, 199.0]) * light[:, None]
        color = color + fade * (sky - color)
        for i in np.argsort(-((center - eye) @ forward)):
            if (quads[i] - eye).dot(forward).min() > 0.3:
                polygon(quads[i], color[i])

        # Joints of the legs, and the corners of the body
        hip, thigh, _ = array(self.joint_pos.movedim(0, -1)).T  # (4,)
        com, side = array(self.com.T), self.side[:, 0].double().cpu().numpy()
        hips = self.hips[..., 0].double().cpu().numpy() - com
        shoulders = hips + np.stack((0 * hip, side * np.cos(hip), side * np.sin(hip)), 1)
        knees = shoulders + LEG_LINK * np.stack((-np.sin(thigh), np.cos(thigh) * np.sin(hip), -np.cos(thigh) * np.cos(hip)), 1)
        hips, shoulders, knees = (body + points @ matrix.T for points in (hips, shoulders, knees))
        box = body + (self.corners.double().cpu().numpy() * [1.2, 1.0, 1.0] - com) @ matrix.T  # (8, 3): x, y, z slowest first

        # Shadows, straight below
        polygon(ground(box[[0, 2, 6, 4], :2]), (40, 50, 60), 70)
        for chain in zip(shoulders, knees, feet):
            for start, end in zip(chain, chain[1:]):
                limb(*ground(np.stack((start, end))[:, :2]), 0.014, (40, 50, 60), 50)

        # Robot: far parts first
        def paint_leg(leg):
            limb(hips[leg], shoulders[leg], 0.035, (69, 90, 100))
            limb(shoulders[leg], knees[leg], 0.024, (55, 71, 79))
            limb(knees[leg], feet[leg], 0.016, (38, 50, 56))
            limb(feet[leg], feet[leg], 0.022, (245, 124, 0) if contact[leg] else (120, 144, 156))

        def paint_body(_):
            faces = ([0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3])  # -x +x -y +y -z +z
            outward = np.repeat(matrix.T, 2, axis=0) * np.array([-1, 1] * 3)[:, None]
            for number, (face, normal) in enumerate(zip(faces, outward)):
                if (box[face].mean(0) - eye) @ normal < 0.0:
                    paint = np.array([255.0, 167.0, 38.0] if number == 1 else [96.0, 125.0, 139.0])
                    polygon(box[face], paint * (0.75 + 0.4 * normal @ sun))

        parts = [(paint_leg, leg, shoulders[leg]) for leg in range(4)] + [(paint_body, 0, body)]
        for paint, leg, _ in sorted(parts, key=lambda part: -(part[2] - eye) @ forward):
            paint(leg)

        # Commanded and actual velocity: arrows above the body, and numbers
        pairs = np.array([pair[0].tolist() for pair in self.tracking().values()])  # (3, 2)
        heading = matrix[:, :2] / np.linalg.norm(matrix[:, :2], axis=0)
        for column, paint in ((0, (46, 125, 50)), (1, (21, 101, 192))):
            start = body + [0.0, 0.0, 0.16 + 0.03 * column]
            arrow = 0.4 * heading @ pairs[:2, column]
            limb(start, start + arrow, 0.007, paint)
            length = np.linalg.norm(arrow)
            if length > 0.02:
                ahead, aside = 0.05 * arrow / length, 0.025 * np.array([-arrow[1], arrow[0], 0.0]) / length
                polygon((start + arrow + ahead, start + arrow + aside, start + arrow - aside), paint)
        font = ImageFont.load_default(15 * scale)
        for row, (label, paint, column) in enumerate((("command", (46, 125, 50), 0), ("actual", (21, 101, 192), 1))):
            numbers = "v_x {:+.2f}  v_y {:+.2f} m/s  yaw {:+.2f} rad/s".format(*pairs[:, column])
            for x, text in ((14, label), (94, numbers)):
                draw.text((x * scale, (12 + 20 * row) * scale), text, fill=paint, font=font)
        return np.asarray(image.resize((width, height), Image.LANCZOS))


def _mirrors(rough: bool) -> dict[str, tuple[list[int], list[float]]]:
    """The mirror image of x is sign * x[index]: index and sign of each observation group and each kind of state."""

    def join(*parts):
        index, sign = [], []
        for i, s in parts:
            index, sign = index + [len(index) + k for k in i], sign + s
        return index, sign

    def legs(*sign):  # n values per leg: swap FL and FR, RL and RR
        n = len(sign)
        return [leg * n + k for leg in (1, 0, 3, 2) for k in range(n)], list(sign) * 4

    def same(n):
        return list(range(n)), [1.0] * n

    polar, axial, command = ([0, 1, 2], [1.0, -1.0, 1.0]), ([0, 1, 2], [-1.0, 1.0, -1.0]), ([0, 1, 2], [1.0, -1.0, -1.0])
    joints, feet = legs(-1.0, 1.0, 1.0), legs(1.0, -1.0, 1.0)
    clock = [0, 1], [-1.0, -1.0]  # half a period later
    privileged = [polar, axial, polar, joints, joints, feet, legs(1.0), legs(1.0), same(1), same(3), polar]
    if rough:
        grid = [3 * i + 2 - j for i in range(5) for j in range(3)], [1.0] * 15
        privileged += [feet, grid]
    return {
        "policy": join(axial, polar, command, joints, joints, joints, clock),
        "velocity": polar,
        "privileged": join(*privileged),
        "polar": polar,
        "axial": axial,
        "quat": ([0, 1, 2, 3], [1.0, -1.0, 1.0, -1.0]),
        "joints": joints,
        "feet": feet,
        "command": command,
    }


def symmetry(env, obs: TensorDict | None = None, actions: torch.Tensor | None = None):
    """Append the left-right mirror image: (B, ...) -> (2B, ...), the originals first.

    Args:
        env: the environment (for the constants of the mirror map).
        obs: any of the observation groups, (B, ...) each, or None.
        actions: (B, 12) or None.
    """

    def mirrored(kind, x):
        if kind == "scan":
            return x.flip(-1)
        index, sign = (part.to(x.device) for part in env.mirrors[kind])
        return x.index_select(1, index) * sign

    if obs is not None:
        groups = {name: torch.cat((group, mirrored(name, group))) for name, group in obs.items()}
        obs = TensorDict(groups, batch_size=[2 * obs.batch_size[0]], device=obs.device)
    if actions is not None:
        actions = torch.cat((actions, mirrored("joints", actions)))
    return obs, actions
