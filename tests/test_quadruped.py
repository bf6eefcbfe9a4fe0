"""The quadruped against what must be true of it: mechanics, symmetry, and the rules of a vectorised environment."""

import copy
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from envs import make, quadruped
from envs.quadruped import GRAVITY, INERTIA, KP, ROTOR_INERTIA, leg_kinematics, rotate, rotation, symmetry

TERRAINS = ("quadruped", "quadruped-rough")


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def walk(env, steps, scale=0.7):
    for _ in range(steps):
        out = env.step(scale * torch.randn(env.num_envs, 12))
    return out


def state_of(env):
    return {k: v.clone() for k, v in vars(env).items() if torch.is_tensor(v) and v.shape[0] == env.num_envs}


def thrown(num_envs):
    """Robots high above the ground that move and tumble."""
    env = make("quadruped", num_envs, play=True, terminations=False)
    env.pos[:, 2] = 50.0
    env.lin_vel.normal_()
    env.ang_vel.copy_(torch.nn.functional.normalize(torch.randn(num_envs, 3)) * 4.0)
    return env


# Mechanics


def test_free_fall():
    env = thrown(5)
    pos, vel = env.pos.clone(), env.lin_vel.clone()
    walk(env, 25)
    t, g = 25 * env.step_dt, torch.tensor([0.0, 0.0, -GRAVITY])
    torch.testing.assert_close(env.lin_vel, vel + t * g)
    # semi-implicit Euler falls half a substep's worth further than the parabola
    torch.testing.assert_close(env.pos, pos + t * vel + 0.5 * t * (t + quadruped.SUBSTEP_DT) * g)


def test_tumbling_conserves_energy_and_angular_momentum():
    env = thrown(16)
    inertia = torch.tensor(INERTIA)

    def measure():
        momentum = rotate(rotation(env.quat.T)[0], (inertia * env.ang_vel).T)  # world frame
        return 0.5 * (inertia * env.ang_vel**2).sum(1), momentum.T

    energy, momentum = measure()
    walk(env, 25)
    energy_after, momentum_after = measure()
    # Euler's method is of first order: here 1 % in half a second; a wrong sign of the gyroscopic term turns momentum by 140 %.
    assert ((energy_after - energy).abs() / energy).max() < 0.03
    assert ((momentum_after - momentum).norm(dim=1) / momentum.norm(dim=1)).max() < 0.03
    torch.testing.assert_close(env.quat.norm(dim=1), torch.ones(16))


def test_rotation_follows_angular_velocity():
    quat = torch.nn.functional.normalize(torch.randn(4, 7), dim=0)
    omega = torch.randn(3, 7)
    matrix, left = rotation(quat)
    eye = torch.eye(3).unsqueeze(-1).expand(3, 3, 7)
    torch.testing.assert_close(torch.einsum("ijn,kjn->ikn", matrix, matrix), eye)
    torch.testing.assert_close(torch.linalg.det(matrix.movedim(-1, 0)), torch.ones(7))
    step = 1e-6 * (left * omega.unsqueeze(1)).sum(0) / 2
    rate = (rotation(quat + step)[0] - rotation(quat - step)[0]) / 2e-6
    x, y, z = omega
    o = torch.zeros_like(x)
    skew = torch.stack((o, -z, y, z, o, -x, -y, x, o)).view(3, 3, 7)
    torch.testing.assert_close(rate, torch.einsum("ijn,jkn->ikn", matrix, skew), rtol=1e-6, atol=1e-6)


def test_jacobian_is_the_derivative_of_the_kinematics():
    env = make("quadruped", 3)
    q, hips = torch.randn(4, 3, 3), env.hips - env.com.T
    foot, jacobian = leg_kinematics(q, hips, env.side)
    for i in range(3):
        step = torch.zeros_like(q)
        step[:, i] = 1e-6
        forward, backward = (leg_kinematics(q + s, hips, env.side)[0] for s in (step, -step))
        torch.testing.assert_close(jacobian[:, 3 + i], (forward - backward) / 2e-6, rtol=1e-7, atol=1e-8)
        axis = torch.eye(3)[i].view(1, 3, 1).expand_as(foot)
        torch.testing.assert_close(jacobian[:, i], torch.linalg.cross(axis, foot, dim=1))


@pytest.mark.parametrize("terminations", [True, False])
def test_feet_carry_the_weight(terminations):
    env = make("quadruped", 16, play=True, terminations=terminations)
    walk(env, 250, scale=0.0)
    weight = env.mass * GRAVITY
    # After five seconds it still sways a little.
    torch.testing.assert_close(env.force.sum(1)[:, 2], weight, rtol=0.01, atol=0.0)
    assert env.force.sum(1)[:, :2].norm(dim=1).max() < 0.03 * weight.min()
    assert env.lin_vel.norm(dim=1).max() < 0.05


def test_a_fallen_robot_lies_on_the_ground():
    env = make("quadruped", 4, play=True, terminations=False)
    env.quat.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # on its back
    walk(env, 150, scale=0.0)
    assert env.pos[:, 2].min() > 0.0 and env.pos[:, 2].max() < 0.3 and env.lin_vel.norm(dim=1).max() < 0.05


def test_passive_robot_gains_no_energy():
    """Dropped with motors that hold the default pose, so springs: kinetic, potential and spring energy only get less."""
    env = make("quadruped", 32, play=True, terminations=False)
    env.friction.fill_(0.8)
    env.lin_vel.copy_(0.5 * torch.randn(32, 3))
    env.pos[:, 2] += 0.05

    def energy():
        kinetic = env.mass * env.lin_vel.square().sum(1) + (torch.tensor(INERTIA) * env.ang_vel**2).sum(1)
        stretch = env.joint_pos - env.default_pose.movedim(-1, 0)
        motors = ROTOR_INERTIA * env.joint_vel.square() + KP * env.gain.view(-1, 1, 1) * stretch.square()
        return 0.5 * (kinetic + motors.sum((1, 2))) + env.mass * GRAVITY * env.pos[:, 2]

    start = energy()
    for _ in range(60):
        walk(env, 1, scale=0.0)
        assert (energy() - start).max() < 1e-3 * start.max()  # the discretisation's share
    assert (energy() < 0.9 * start).all()


@pytest.mark.parametrize("name", TERRAINS)
def test_friction_cone(name):
    env = make(name, 64)
    env.friction.uniform_(0.05, 0.8)  # slippery: many feet on the cone
    slipping = 0
    for _ in range(40):
        friction = env.friction.clone()
        foot, force = env.foot_pos.movedim(0, -1), env.force.movedim(0, -1)
        done = walk(env, 1, scale=2.0)[2]
        _, slope_x, slope_y = env._ground(foot[:, 0], foot[:, 1])
        normal = env._normal_vector(slope_x, slope_y)
        pressure = (force * normal).sum(1)
        tangent = (force - normal * pressure.unsqueeze(1)).norm(dim=1)
        same = ~done  # those that start anew have no forces yet, and other ground
        assert pressure.min() >= 0.0 and (tangent - friction * pressure)[:, same].max() < 1e-9
        slipping += ((tangent > 0.99 * friction * pressure) & (pressure > 1.0))[:, same].sum()
    assert slipping > 100  # else this tested nothing


def test_ground_slopes_and_scan():
    env = make("quadruped-rough", 30, play=True)
    walk(env, 20)
    x, y = torch.randn(2, 6, 30)
    height, slope_x, slope_y = env._ground(x, y)
    for dx, dy, slope in ((1e-6, 0.0, slope_x), (0.0, 1e-6, slope_y)):
        rise = env._ground(x + dx, y + dy)[0] - env._ground(x - dx, y - dy)[0]
        torch.testing.assert_close(slope, rise / 2e-6, rtol=1e-5, atol=1e-7)
    normal = env._normal_vector(slope_x, slope_y)
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(6, 30))
    torch.testing.assert_close(normal[:, 0] + normal[:, 2] * slope_x, torch.zeros(6, 30))
    torch.testing.assert_close(normal[:, 1] + normal[:, 2] * slope_y, torch.zeros(6, 30))
    matrix, scan = rotation(env.quat.T)[0], env._observe()["scan"]
    yaw = torch.atan2(matrix[1, 0], matrix[0, 0])
    for i, j in ((0, 0), (3, 8), (12, 2)):
        ahead, left = 0.1 * (i - 6), 0.1 * (j - 4)  # m
        x = env.pos[:, 0] + ahead * yaw.cos() - left * yaw.sin()
        y = env.pos[:, 1] + ahead * yaw.sin() + left * yaw.cos()
        torch.testing.assert_close(scan[:, 0, i, j], env._ground(x[None], y[None])[0][0] - env.pos[:, 2] + 0.3)
    kinds = torch.stack((env.slope.norm(dim=1) == 0.0, env.amplitude[:, 0] < 0.011))
    assert kinds.any(1).all() and env.amplitude.max() < 0.1  # m


# Symmetry


@pytest.mark.parametrize("name", TERRAINS)
def test_mirroring_twice_is_the_identity(name):
    env = make(name, 8)
    obs, actions = walk(env, 5)[0][:5], torch.randn(5, 12)  # any number of rows
    obs_2, actions_2 = symmetry(env, obs, actions)
    obs_4, actions_4 = env.symmetry(env=env, obs=obs_2, actions=actions_2)
    for name, group in obs.items():
        assert obs_2[name].shape == (10, *group.shape[1:])
        torch.testing.assert_close(obs_2[name][:5], group, rtol=0, atol=0)
        torch.testing.assert_close(obs_4[name][15:], group, rtol=0, atol=0)
        assert not torch.equal(obs_2[name][5:], group)
    torch.testing.assert_close(actions_4[15:], actions, rtol=0, atol=0)
    assert symmetry(env, None, actions)[0] is None and symmetry(env, obs.select("policy"), None)[1] is None


@pytest.mark.parametrize("name", TERRAINS)
def test_the_mirror_image_of_a_robot_walks_as_its_mirror_image(name):
    env, image = (make(name, 32, play=True, seed=3) for _ in range(2))
    torch.manual_seed(1)
    walk(env, 10)
    torch.manual_seed(1)
    walk(image, 10)
    image.mirror_state()
    alive = torch.ones(32, dtype=torch.bool)
    for _ in range(20):
        actions = torch.randn(32, 12)
        obs, rewards, dones, _ = env.step(actions)
        obs_image, rewards_image, dones_image, _ = image.step(symmetry(env, None, actions)[1][32:])
        assert torch.equal(dones, dones_image)
        alive &= ~dones
        mirrored = symmetry(env, obs, None)[0][32:]
        for group in obs.keys():
            torch.testing.assert_close(obs_image[group][alive], mirrored[group][alive], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rewards_image[alive], rewards[alive], rtol=1e-9, atol=1e-9)
    assert alive.sum() > 16


# Rules of a vectorised environment


@pytest.mark.parametrize("name", TERRAINS)
def test_one_robot_alone_does_the_same_as_among_many(name):
    many, alone = make(name, 9, play=True), make(name, 1, play=True, seed=5)
    walk(many, 7)
    for key, value in state_of(many).items():
        getattr(alone, key).copy_(value[4:5])
    for _ in range(15):
        actions = torch.randn(9, 12)
        obs, rewards, dones, _ = many.step(actions)
        obs_alone, rewards_alone, _, _ = alone.step(actions[4:5])
        assert not dones[4]
        for group in obs.keys():
            torch.testing.assert_close(obs_alone[group][0], obs[group][4])
        torch.testing.assert_close(rewards_alone[0], rewards[4])


@pytest.mark.parametrize("name", TERRAINS)
def test_state_dict_continues_identically(name):
    env = make(name, 6, seed=1)
    env.episode_length_buf = torch.arange(985, 991)  # resets follow soon
    walk(env, 5)
    other = make(name, 6, seed=2)
    other.load_state_dict(env.state_dict())
    for group, value in env.get_observations().items():
        assert torch.equal(value, other.get_observations()[group])
    for _ in range(20):
        actions = torch.randn(6, 12)
        (obs, *rest), (obs_other, *rest_other) = env.step(actions), other.step(actions)
        assert torch.equal(rest[0], rest_other[0]) and torch.equal(rest[1], rest_other[1])
        assert all(torch.equal(obs[group], obs_other[group]) for group in obs.keys())


@pytest.mark.parametrize("name", TERRAINS)
def test_reset_touches_only_the_masked(name):
    env = make(name, 20)
    walk(env, 10)
    before, mask = state_of(env), torch.arange(20) % 3 == 0
    env._reset(mask)
    after = state_of(env)
    for key in before:
        assert torch.equal(before[key][~mask], after[key][~mask]), key
    for key in ("pos", "quat", "joint_pos", "mass", "com", "friction", "gain", "command", "phase", "foot_pos"):
        assert not torch.equal(before[key][mask], after[key][mask]), key
    feet = leg_kinematics(env.joint_pos.movedim(0, -1), env.hips - env.com.T, env.side)[0].movedim(-1, 0)
    torch.testing.assert_close(env.foot_pos[mask], (env.pos.unsqueeze(1) + feet)[mask])
    assert env._observe()["privileged"][mask][:, 49:53].min() > 0.019  # m: no foot starts in the ground


def test_final_obs_is_the_last_of_the_finished_episode():
    env = make("quadruped", 4, play=True)
    walk(env, 3)
    tilt = math.radians(80.0)
    env.quat[1] = torch.tensor([math.cos(tilt / 2), math.sin(tilt / 2), 0.0, 0.0])
    env.episode_length_buf = torch.tensor([3, 3, env.max_episode_length - 1, 3])
    obs, _, dones, extras = env.step(torch.zeros(4, 12))
    final = extras["final_obs"]
    assert dones.tolist() == [False, True, True, False] and extras["time_outs"].tolist() == [False, False, True, False]
    assert env.episode_length_buf.tolist() == [4, 0, 0, 4]
    assert final["policy"][1, 5] > -0.5 and obs["policy"][1, 5] < -0.99  # gravity z: tilted, upright again
    for group in obs.keys():
        assert torch.equal(obs[group][[0, 3]], final[group][[0, 3]])
        assert not torch.isclose(obs[group][2], final[group][2]).all()
    assert torch.equal(env.get_observations()["policy"], obs["policy"])


def test_no_terminations():
    env = make("quadruped", 2, play=True, terminations=False)
    env.quat[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert not walk(env, 50)[2].any() and env.pos.isfinite().all()


def test_rewards_are_the_sum_of_what_is_logged():
    env = make("quadruped", 10)
    _, rewards, _, extras = walk(env, 5)
    logged = [extras["log"][f"Reward/{name}"] for name in quadruped.REWARDS]
    torch.testing.assert_close(rewards, env.step_dt * torch.stack(logged).sum(0))
    assert extras["log"]["Metrics/velocity_error"].shape == extras["log"]["Metrics/yaw_rate_error"].shape == (10,)


def test_curriculum():
    env = make("quadruped-rough", 4)
    env.terrain_level.copy_(torch.tensor([3.0, 3.0, 0.0, 9.0]))
    env.commanded.fill_(10.0)
    env.walked.copy_(torch.tensor([9.0, 1.0, 1.0, 5.0]))
    env._reset(torch.tensor([True, True, True, True]))
    assert env.terrain_level.tolist() == [4.0, 2.0, 0.0, 9.0] and env.walked.sum() == env.commanded.sum() == 0.0


@pytest.mark.parametrize("name", TERRAINS)
def test_play_switches_noise_and_pushes_off(name):
    quiet, noisy = make(name, 8, play=True), make(name, 8)
    assert torch.equal(quiet._observe()["policy"], quiet._observe()["policy"])
    first, second = noisy._observe(), noisy._observe()
    assert not torch.equal(first["policy"], second["policy"]) and torch.equal(first["privileged"], second["privileged"])
    for env, pushed in ((quiet, False), (noisy, True)):
        env.episode_length_buf = torch.full((8,), quadruped.PUSH_INTERVAL)
        before = env.lin_vel.clone()
        env._events()
        assert torch.equal(before, env.lin_vel) != pushed


def test_standing_and_observation_of_forces():
    """The privileged group shows what stands in its documentation: contacts, heights, weight."""
    env = make("quadruped", 8, play=True)
    obs = walk(env, 150, scale=0.0)[0]["privileged"]
    forces, contacts, heights = obs[:, 33:45].view(-1, 4, 3), obs[:, 45:49], obs[:, 49:54]
    torch.testing.assert_close(100.0 * forces.sum(1).norm(dim=1), env.mass * GRAVITY, rtol=0.01, atol=0.0)  # it sways a little
    assert (contacts == 1.0).all() and heights[:, :4].abs().max() < 0.03 and (heights[:, 4] - 0.27).abs().max() < 0.05
    torch.testing.assert_close(12.0 + 2.0 * obs[:, 54], env.mass)
    torch.testing.assert_close(obs[:, 55:60], torch.cat((env.friction[:, None], env.gain[:, None], 10.0 * env.com), 1))


class CountSynchronisations(TorchDispatchMode):
    """Operators that read a value on the host, or whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        boolean = name.startswith("index") and any(
            torch.is_tensor(i) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        if boolean or any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TERRAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_never_waits_for_the_device(name, dtype):
    torch.set_default_dtype(dtype)
    env = make(name, 4)
    actions = torch.randn(4, 12)
    memory = {key: value.data_ptr() for key, value in vars(env).items() if torch.is_tensor(value)}
    with CountSynchronisations() as count:
        obs, rewards, _, _ = env.step(actions)
        symmetry(env, obs, actions)
    assert count.found == []
    assert rewards.dtype == dtype and all(group.dtype == dtype for group in obs.values())
    assert memory == {key: value.data_ptr() for key, value in vars(env).items() if torch.is_tensor(value)}  # in place


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_it_walks_alike():
    """Rounding apart, through resets; the state stays where it is, and a copy has a state of its own."""
    env, compiled = make("quadruped", 8, seed=3), make("quadruped", 8, seed=3, compile=True)
    for walker in (env, compiled):
        walker.episode_length_buf = torch.arange(990, 998)
    memory = compiled.pos.data_ptr()
    for _ in range(12):
        actions = 0.3 * torch.randn(8, 12)
        expected, ours = env.step(actions), compiled.step(actions)
        for group, value in expected[0].items():
            torch.testing.assert_close(ours[0][group], value, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-7, atol=1e-7)
        assert torch.equal(ours[2], expected[2])
    assert compiled.pos.data_ptr() == memory and not torch.equal(compiled.pos, env.pos)
    before = compiled.pos.clone()
    copy.deepcopy(compiled).step(actions)
    assert torch.equal(compiled.pos, before)


@pytest.mark.parametrize("name", TERRAINS)
def test_render_and_tracking(name):
    env = make(name, 2, play=True)
    walk(env, 10)
    image = env.render()
    assert image.shape == (480, 640, 3) and image.dtype.name == "uint8" and image.std() > 10.0
    for column, pair in enumerate(env.tracking().values()):
        assert pair.shape == (2, 2) and torch.equal(pair[:, 0], env.command[:, column])
    torch.testing.assert_close(env.tracking()["v_x [m/s]"][:, 1], env._observe()["privileged"][:, 0])


@pytest.mark.parametrize("name", TERRAINS)
def test_survives_any_actions(name):
    env = make(name, 32, play=True)
    for scale in (1.0, 10.0, 1e3):
        obs, rewards, _, _ = walk(env, 50, scale)
        assert all(group.isfinite().all() for group in obs.values()) and rewards.isfinite().all()
