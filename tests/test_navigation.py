"""The three navigation tasks: their physics, what is seen when, and that they can be solved, but not by cheating."""

import math
from collections import deque

import pytest
import torch
from PIL import ImageColor

from envs import make
from envs.navigation import CUE_STEPS, DRAG, FORCE, PIXEL, RADIUS, ROBOT_COLOR, SCALE, SIDE, STEP_DT, draw_occupancy

TASKS = ["navigation-cue", "navigation-pixels", "navigation-maze"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random_actions(env, generator, scale=2.0):
    return scale * torch.randn(env.num_envs, 2, generator=generator)


def put(env, position, velocity=(0.0, 0.0)):
    env.position.copy_(torch.tensor(position).expand_as(env.position))
    env.velocity.copy_(torch.tensor(velocity).expand_as(env.velocity))


def drive(env, target, speed=1.0):
    """Actions that give the robot, within one step if the force allows it, the velocity towards `target` (N, 2)."""
    velocity = ((target - env.position) / STEP_DT).clamp(-speed, speed)
    return ((velocity - env.velocity) / STEP_DT + DRAG * env.velocity) / FORCE


def success_over_one_episode(env, policy):
    """Success of every environment in its first episode, (N,) bool."""
    done_before, succeeded = torch.zeros(2, env.num_envs, dtype=torch.bool)
    for _ in range(env.max_episode_length):
        _, _, dones, _ = env.step(policy())
        succeeded |= dones & ~done_before & env.success.bool()
        done_before |= dones
    assert done_before.all()
    return succeeded


def route(start, goal, blocked, step, width, height):
    """Shortest way from start to goal on a grid of points `step` apart, as a list of points (breadth first)."""
    cell = lambda point: (round(point[0] / step), round(point[1] / step))
    first, last = cell(start), cell(goal)
    previous, queue = {first: None}, deque([first])
    while last not in previous:
        x, y = queue.popleft()
        for nearby in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            inside = 0 <= nearby[0] * step <= width and 0 <= nearby[1] * step <= height
            if inside and nearby not in previous and not blocked(nearby[0] * step, nearby[1] * step):
                previous[nearby] = (x, y)
                queue.append(nearby)
    way = [last]
    while previous[way[-1]] is not None:
        way.append(previous[way[-1]])
    return [(x * step, y * step) for x, y in reversed(way)]


def follow(env, ways, ahead):
    """A policy that follows one way for each environment: `ahead` points at a time, but round no corner at once."""
    aims = []
    for way in ways:
        aim = []
        for i, (x, y) in enumerate(way):
            aim.append([p for p in way[i : i + ahead + 1] if p[0] == x or p[1] == y][-1])
        aims.append(aim)
    length = max(map(len, ways))
    points, aims = (torch.tensor([w + [w[-1]] * (length - len(w)) for w in x]) for x in (ways, aims))  # (N, L, 2)

    def policy():
        nearest = (points - env.position[:, None]).norm(dim=2).argmin(1)
        return drive(env, aims[torch.arange(env.num_envs), nearest])

    return policy


# ---- Robot ----


def test_terminal_velocity_is_force_over_drag():
    env = make("navigation-cue", 3)
    action = torch.tensor([[1.0, -0.5], [5.0, 0.0], [0.25, -9.0]])  # clipped to [-1, 1]
    expected = torch.tensor([[1.0, -0.5], [1.0, 0.0], [0.25, -1.0]]) * FORCE / DRAG
    put(env, (2.0, 2.0))
    for step in range(1, 200):
        env._move(action)
        env.position.fill_(2.0)  # the room is too small to get up to speed in
        decay = (1.0 - DRAG * STEP_DT) ** step  # of semi-implicit Euler, for 1 kg
        torch.testing.assert_close(env.velocity, expected * (1.0 - decay), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(env.velocity, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kick", [0.0, 1000.0])
def test_walls_cannot_be_crossed(kick):
    env = make("navigation-maze", 64)
    generator = torch.Generator().manual_seed(0)
    free = torch.tensor([[letter != "#" for letter in row] for row in env.world])
    for _ in range(2000):
        env.velocity += kick * torch.randn(64, 2, generator=generator)
        env.step(random_actions(env, generator).sign())
        x, y = env.position.long().unbind(1)
        assert free[y, x].all()
    assert env.velocity.isfinite().all()


def test_wall_stops_one_axis_only():
    env = make("navigation-cue", 1)
    put(env, (4.0 - RADIUS - 0.01, 2.0), (2.0, 1.0))
    env._move(torch.zeros(1, 2))
    torch.testing.assert_close(env.position[0, 0].item(), 4.0 - RADIUS)
    assert env.velocity[0, 0] == 0.0 and env.velocity[0, 1] == pytest.approx(1.0 - DRAG * STEP_DT)


# ---- Cue ----


def test_cue_is_shown_for_four_steps_in_which_actions_do_nothing():
    env = make("navigation-cue", 64)
    start, cue = env.position.clone(), env.cue.clone()
    assert (cue.sum(1) == 1).all() and (cue.sum(0) > 0).all()
    obs = env.get_observations()
    for _ in range(CUE_STEPS):
        assert torch.equal(obs["policy"][:, 4:], cue)
        obs = env.step(torch.ones(64, 2))[0]
        assert torch.equal(env.position, start)
    assert torch.equal(obs["policy"][:, 4:], torch.zeros_like(cue)) and torch.equal(obs["privileged"], cue)
    env.step(torch.ones(64, 2))
    assert (env.position > start).all()


def test_cue_memoryless_policies_are_right_one_time_in_four():
    """The best that a policy without memory can do is to pick a landmark: K of n = 4000 episodes are right, K binomial
    with p = 1/4. Hoeffding: P(K / n > 1/4 + e) <= exp(-2 n e^2) = 3e-7 for e = 0.0434."""
    env = make("navigation-cue", 4000)
    for landmark in env.landmarks:
        rate = success_over_one_episode(env, lambda: drive(env, landmark)).double().mean().item()
        assert 0.25 - 0.0434 < rate < 0.25 + 0.0434
        env.reset_all()


def test_cue_oracle_always_succeeds_and_is_paid_for_it():
    env = make("navigation-cue", 256)
    distance = (env.goal - env.position).norm(dim=1)
    total, succeeded = torch.zeros(2, 256)
    for _ in range(env.max_episode_length):
        _, rewards, dones, _ = env.step(drive(env, env.goal))
        total += torch.where(succeeded > 0, 0.0, rewards)
        succeeded += dones
    assert env.success.all() and (succeeded > 0).all()
    assert ((total - 1.0 - 0.5 * distance).abs() < 0.5 * math.sqrt(2) * (SIDE / 2 + RADIUS)).all()


# ---- Pixels ----


def test_image_shows_goal_and_crates_where_they_are():
    env = make("navigation-pixels", 2)
    put(env, (1.0, 2.0))
    env.goal.copy_(torch.tensor([1.0 + 4.5 * PIXEL, 2.0 - 2.5 * PIXEL]).expand(2, 2))  # middle of column 16, row 9
    env.crates.fill_(-100.0)
    env.crates[1, 0] = torch.tensor([1.0 - PIXEL / 2, 2.0 + PIXEL / 2])  # middle of column 11, row 12
    goal, crates = env._observe()["image"].unbind(1)
    side = (SIDE / 2 - PIXEL / 2) / PIXEL  # 1/3: how far the square reaches into the pixels beside it
    expected = torch.zeros(24, 24)
    expected[8:11, 15:18] = torch.outer(*[torch.tensor([side, 1.0, side])] * 2) * 255
    assert torch.equal(goal[0], expected.round().to(torch.uint8)) and expected[9, 16] == 255 and goal[0, 8, 15] == 28
    assert torch.equal(crates[1, 11:14, 10:13], goal[1, 8:11, 15:18])
    assert crates[0].sum() == 0 and crates[1].sum() == goal[1].sum()


def test_image_is_egocentric():
    env = make("navigation-pixels", 4)
    put(env, (2.0, 2.0))
    before = env._observe()["image"]
    put(env, (2.0 + 2 * PIXEL, 2.0 - PIXEL))
    moved = env._observe()["image"]
    assert (moved[..., 1:, :-2].int() - before[..., :-1, 2:].int()).abs().max() <= 1  # rounding
    assert not torch.equal(moved, before)


def test_pixels_starts_are_free_and_oracle_always_succeeds():
    env = make("navigation-pixels", 64)
    assert not env._touches(env.crates).any() and not env._touches(env.goal[:, None]).any()
    gap = SIDE / 2 + RADIUS + 0.04
    ways = []
    for start, goal, crates in zip(env.position.tolist(), env.goal.tolist(), env.crates.tolist()):
        blocked = lambda x, y: any(max(abs(x - cx), abs(y - cy)) < gap for cx, cy in crates)
        ways.append(route(start, goal, blocked, 0.05, 4.0, 4.0))
    assert success_over_one_episode(env, follow(env, ways, 2)).all()


def test_pixels_crate_ends_the_episode_and_costs_one():
    env = make("navigation-pixels", 1)
    put(env, (2.0, 2.0))
    env.goal.copy_(torch.tensor([[2.0, 0.5]]))
    env.crates[0, 0] = torch.tensor([2.0, 2.0])
    _, rewards, dones, extras = env.step(torch.zeros(1, 2))
    assert rewards.item() == -1.0 and dones.item() and not extras["time_outs"].item() and not env.success.item()


# ---- Maze ----


def test_maze_oracle_always_succeeds_and_random_never():
    env = make("navigation-maze", 32)
    wall = lambda x, y: env.world[int(y)][int(x)] == "#" if 0 <= x < 9 and 0 <= y < 7 else True
    cell = [tuple(int(v) for v in point[0].tolist()) for point in (env.position, env.goal)]
    way = [(x + 0.5, y + 0.5) for x, y in route(*cell, wall, 1, 8, 6)]
    assert len(way) == 21
    reward = success_over_one_episode(env, follow(env, [way] * 32, 1))
    assert reward.all()
    generator = torch.Generator().manual_seed(0)
    env = make("navigation-maze", 256)
    for _ in range(2 * env.max_episode_length):
        _, rewards, _, extras = env.step(random_actions(env, generator))
        assert not rewards.any()
    assert extras["log"]["Metrics/visited"] < 0.75 and env.visits.sum() == 256 * 600


def test_occupancy_picture_tells_visited_cells():
    env = make("navigation-maze", 8)
    empty = draw_occupancy(env.visits)
    put(env, (0.6, 1.1))
    env.step(torch.zeros(8, 2))
    picture = draw_occupancy(env.visits)
    assert picture.shape == empty.shape and picture.dtype == empty.dtype == "uint8"
    changed = (picture != empty).any(2).nonzero()
    scale = picture.shape[1] / (len(env.world[0]) + 1)
    y, x = (sum(c) / len(c) / scale - 0.5 for c in changed)  # mean place of what changed, in metres
    assert (x, y) == pytest.approx((0.625, 1.125), abs=0.02)  # the square of 0.25 m


# ---- All tasks ----


@pytest.mark.parametrize("task", TASKS)
def test_success_is_that_of_the_latest_finished_episode(task):
    env = make(task, 4)
    assert not env.success.any()
    env.position[0] = env.goal[0]
    *_, dones, extras = env.step(torch.zeros(4, 2))
    assert dones.tolist() == [True, False, False, False] and env.success.tolist() == [1.0, 0.0, 0.0, 0.0]
    extras = env.step(torch.zeros(4, 2))[3]
    assert extras["log"]["Episode/success"].float().mean() == 0.25
    env.episode_length_buf = torch.full((4,), env.max_episode_length - 1)
    dones = env.step(torch.zeros(4, 2))[2]
    assert dones.all() and not env.success.any()


@pytest.mark.parametrize("task", TASKS)
def test_state_dict_round_trip_continues_identically(task):
    generator = torch.Generator().manual_seed(0)
    env, other = make(task, 16, seed=1), make(task, 16, seed=2)
    for _ in range(50):
        env.step(random_actions(env, generator))
    other.load_state_dict(env.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(env.get_observations().values(), other.get_observations().values()))
    for _ in range(100):
        actions = random_actions(env, generator)
        (obs, rewards, dones, _), (obs2, rewards2, dones2, _) = env.step(actions), other.step(actions)
        assert torch.equal(rewards, rewards2) and torch.equal(dones, dones2)
        assert all(torch.equal(obs[name], obs2[name]) for name in obs.keys())


@pytest.mark.parametrize("task", TASKS)
def test_reset_touches_only_masked_environments(task):
    env = make(task, 16)
    env.velocity.fill_(0.5)
    tensors = {k: v for k, v in vars(env).items() if torch.is_tensor(v) and v.shape[:1] == (16,)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    mask = torch.arange(16) % 2 == 0
    env._reset(mask)
    for name, tensor in tensors.items():
        assert tensor is getattr(env, name)  # in place
        if name != "cells":  # 16 of them, and not a state
            assert torch.equal(tensor[~mask], before[name][~mask]), name
    assert not env.velocity[mask].any() and (env.position[mask] != before["position"][mask]).any()


@pytest.mark.parametrize("task", TASKS)
def test_final_obs_is_the_true_last_observation(task):
    env, twin = make(task, 8, seed=3), make(task, 8, seed=3)
    twin.max_episode_length = 10**6  # its episodes go on, so that its observation is the one after the last step
    for e in (env, twin):
        e.episode_length_buf = torch.full((8,), env.max_episode_length - 1)
    obs, _, dones, extras = env.step(torch.ones(8, 2))
    last = twin.step(torch.ones(8, 2))[0]
    assert dones.all() and extras["time_outs"].all()
    assert all(torch.equal(extras["final_obs"][name], last[name]) for name in last.keys())
    assert not torch.equal(extras["final_obs"]["policy"], obs["policy"])
    assert all(torch.equal(obs[name], env.get_observations()[name]) for name in obs.keys())


@pytest.mark.parametrize("task", TASKS)
def test_nan_actions_show_in_the_observation_and_end_with_the_episode(task):
    env = make(task, 4)
    env.episode_length_buf = torch.full((4,), CUE_STEPS)
    nan = torch.zeros(4, 2)
    nan[1] = math.nan
    obs = env.step(nan)[0]
    assert obs["policy"].isnan().any(1).tolist() == [False, True, False, False]
    env.episode_length_buf = torch.full((4,), env.max_episode_length - 1)
    assert not env.step(torch.zeros(4, 2))[0]["policy"].isnan().any()


@pytest.mark.parametrize("task", TASKS)
def test_float64(task):
    torch.set_default_dtype(torch.float64)
    try:
        env = make(task, 8)
        numbers = [value for value in vars(env).values() if torch.is_tensor(value) and value.is_floating_point()]
        assert all(value.dtype == torch.float64 for value in numbers)
        for _ in range(90):
            obs, rewards, _, extras = env.step(torch.randn(8, 2))
        assert rewards.dtype == obs["policy"].dtype == extras["final_obs"]["policy"].dtype == torch.float64
        assert all(group.dtype in (torch.float64, torch.uint8) for group in obs.values())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("task", TASKS)
def test_render_shows_the_robot_where_it_is(task):
    env = make(task, 2)
    first = env.render()
    for _ in range(CUE_STEPS + 3):
        env.step(torch.ones(2, 2))
    second = env.render()
    assert first.dtype == second.dtype == "uint8" and first.shape == second.shape and first.shape[2] == 3
    x, y = ((env.position[0] + 0.5) * SCALE).int().tolist()
    assert tuple(second[y, x]) == ImageColor.getrgb(ROBOT_COLOR) != tuple(first[y, x])
