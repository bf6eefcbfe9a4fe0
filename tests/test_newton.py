"""The example of an environment of one's own, in Newton: `pip install -e ".[newton]" pytest`."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import envs
from envs.check import check

missing = importlib.util.find_spec("newton") is None
pytestmark = pytest.mark.skipif(missing, reason='needs pip install -e ".[newton]"')
ENV = "newton_env:NewtonCartpole"


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.chdir(tmp_path)


def test_conforms():
    env = envs.make(ENV, num_envs=4)
    assert check(env) == [] and env.max_episode_length == 300


def test_a_pole_falls_as_the_textbook_says():
    """Upright, without a force: after half a second where the equations of motion of the two boxes put it."""
    env = envs.make(ENV, num_envs=2)
    env.q.copy_(torch.tensor([[0.0, 0.1], [0.0, -0.1]]))
    env.qd.zero_()
    for _ in range(25):
        env.step(torch.zeros(2, 1))
    cart, pole, half, inertia = 4.0, 1.6, 0.5, 1.6 * (1.0**2 + 0.04**2) / 12.0  # kg, kg, m, kg m^2
    angle, speed, step = 0.1, 0.0, 1e-5
    for _ in range(int(0.5 / step)):
        sin, cos = math.sin(angle), math.cos(angle)
        total, arm = cart + pole, pole * half
        turning = arm * sin * (9.81 - arm * speed**2 * cos / total) / (inertia + pole * half**2 - arm**2 * cos**2 / total)
        speed += step * turning
        angle += step * speed
    assert env.q[:, 1].tolist() == pytest.approx([angle, -angle], rel=0.05)  # Newton: steps of 0.01 s, and its damping


def test_resets_touch_their_own_world_only():
    env = envs.make(ENV, num_envs=3)
    env.episode_length_buf = torch.tensor([0, env.max_episode_length - 1, 0])
    obs, _, dones, extras = env.step(torch.ones(3, 1))
    assert dones.tolist() == [False, True, False] == extras["time_outs"].tolist()
    last = extras["final_obs"]["policy"]
    assert torch.equal(obs["policy"][::2], last[::2]) and not torch.equal(obs["policy"][1], last[1])


def test_goes_on_where_it_was_saved():
    env, other = envs.make(ENV, num_envs=3, seed=1), envs.make(ENV, num_envs=3, seed=2)
    env.episode_length_buf = torch.tensor([0, 280, 290])  # two are reset on the way
    env.step(torch.ones(3, 1))
    other.load_state_dict(env.state_dict())
    for _ in range(30):
        ours, theirs = (x.step(torch.ones(3, 1)) for x in (env, other))
        assert torch.equal(ours[0]["policy"], theirs[0]["policy"]) and torch.equal(ours[1], theirs[1])


def test_trains():
    from ppo_continuous import Args, train

    defaults = sys.modules["newton_env"].NewtonCartpole.defaults
    history = train(Args(**defaults | {"env": ENV, "device": "cpu", "logger": "none", "log_root": ""}))
    rewards = [metrics["Train/mean_reward"] for metrics in history]
    assert rewards[1] < 60.0 and max(rewards[-20:]) > 250.0  # of 300
