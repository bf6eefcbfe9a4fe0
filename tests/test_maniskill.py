"""ManiSkill's adapter, with the real simulator on a CPU: `pip install -e ".[maniskill]" pytest`, and a Vulkan driver.

No GPU is needed: SwiftShader will do, which Debian's package chromium-common brings; VK_ICD_FILENAMES names its
vk_swiftshader_icd.json.
"""

import functools
import importlib.util
import re

import numpy as np
import pytest
import torch

import envs
from envs.check import check

if importlib.util.find_spec("mani_skill") is None:
    pytest.skip('needs pip install -e ".[maniskill]"', allow_module_level=True)


@functools.cache
def vulkan() -> bool:
    import sapien

    try:
        return bool(sapien.render.RenderMaterial())
    except RuntimeError:
        return False


needs_vulkan = pytest.mark.skipif(not vulkan(), reason="SAPIEN finds no Vulkan driver")
TASK = "maniskill:PushCube-v1"
OWN_TASK = """
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.utils.registration import register_env

@register_env("Mine-v1", max_episode_steps=6, override=True)
class Mine(PushCubeEnv):
    def evaluate(self):
        y, steps = self.obj.pose.p[:, 1], self.elapsed_steps
        return {"success": (y > 0.03) & (steps == 4), "fail": (y < -0.03) & (steps == 5)}
"""


@pytest.fixture(autouse=True)
def my_tasks(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@needs_vulkan
@pytest.mark.parametrize("task", [TASK, "maniskill:MS-HopperHop-v1", "maniskill:TwoRobotPickCube-v1"])
def test_conforms(task):
    env = envs.make(task, num_envs=2)
    assert check(env) == [] and 0.0 < env.step_dt < 0.1


@needs_vulkan
def test_steps_like_plain_environments():
    """Observations, rewards, ends, last and first observations equal those of single environments; a task of one's own.

    A success is not the end of what would have come, a failure is.
    """
    import gymnasium

    num_envs, seed = 4, 5
    options = {"enhanced_determinism": True}  # episodes follow from an environment's seed alone
    env = envs.make("maniskill:my_tasks:Mine-v1", num_envs=num_envs, seed=seed, cfg=options)
    settings = options | dict(num_envs=1, obs_mode="state", sim_backend="physx_cpu", render_backend="none")
    plain = [gymnasium.make("Mine-v1", **settings) for _ in range(num_envs)]
    seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
    first = [single.reset(seed=[x])[0] for single, x in zip(plain, seeds)]
    assert torch.equal(env.get_observations()["policy"], torch.cat(first)) and env.max_episode_length == 6
    generator, seen = torch.Generator().manual_seed(0), {"success": 0, "fail": 0, "time": 0}
    for _ in range(40):
        actions = 2.0 * torch.rand(num_envs, env.num_actions, generator=generator) - 1.0
        obs, rewards, dones, extras = env.step(actions)
        ended = []
        for i, single in enumerate(plain):
            last, reward, terminated, truncated, info = single.step(actions[i : i + 1])
            kind = next((name for name in ("success", "fail") if info[name]), "time" if truncated else None)
            assert bool(dones[i]) == bool(terminated | truncated) == (kind is not None)
            assert bool(extras["time_outs"][i]) == (kind in ("success", "time"))
            assert torch.equal(extras["final_obs"]["policy"][i : i + 1], last) and rewards[i] == reward
            assert torch.equal(obs["policy"][i : i + 1], single.reset()[0] if kind else last)
            if kind:
                ended.append(kind == "success")
                seen[kind] += 1
        assert extras["log"].get("Metrics/success_once", torch.zeros(0)).tolist() == ended
    assert min(seen.values()) > 3, seen
    forever = envs.make("maniskill:my_tasks:Mine-v1", num_envs=num_envs, seed=seed, cfg=options, terminations=False)
    ends = [forever.step(torch.zeros(num_envs, 8))[2].all().item() for _ in range(12)]
    assert ends == [False] * 5 + [True] + [False] * 5 + [True]


def test_one_environment_of_many():
    """As on a GPU, by a stand-in: a part of the rows is reset, and every row keeps its own."""
    import gymnasium
    from gymnasium.spaces import Box
    from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv

    from envs.maniskill import ManiSkillEnv

    class Many(gymnasium.Env):
        num_envs, device, control_timestep, max_episode_steps, reconfiguration_freq = 3, torch.device("cpu"), 0.1, 5, 0
        single_action_space = Box(np.array([-2.0, -np.inf]), np.array([4.0, np.inf]), dtype=np.float32)
        single_observation_space = action_space = observation_space = None
        elapsed_steps, resets = torch.zeros(3, dtype=torch.int32), torch.zeros(3)

        def reset(self, seed=None, options=None):
            rows = (options or {}).get("env_idx", torch.arange(3))
            self.elapsed_steps[rows] = 0
            self.resets[rows] += 1
            return self.observe(), {}

        def observe(self):
            return torch.stack((self.elapsed_steps, self.resets), 1).float()

        def step(self, actions):
            self.actions = actions
            self.elapsed_steps += 1
            success = self.elapsed_steps == torch.tensor([9, 3, 9])
            return self.observe(), actions[:, 0], success.clone(), self.elapsed_steps >= 5, {"success": success}

    many = Many()
    env = ManiSkillEnv([ManiSkillVectorEnv(many, record_metrics=True)], "cpu", 0, {})
    env.episode_length_buf = torch.tensor([1, 2, 3])
    obs, rewards, dones, extras = env.step(torch.tensor([[0.0, 7.0], [-1.0, -7.0], [5.0, 0.0]]))
    assert many.actions.tolist() == [[1.0, 7.0], [-2.0, -7.0], [4.0, 0.0]] and rewards.tolist() == [1.0, -2.0, 4.0]
    assert not hasattr(env, "action_bounds")
    assert dones.tolist() == [False, True, False] == extras["time_outs"].tolist()
    assert extras["final_obs"]["policy"].tolist() == [[2, 1], [3, 1], [4, 1]] and env.step_dt == 0.1
    assert obs["policy"].tolist() == [[2, 1], [0, 2], [4, 1]] and extras["log"]["Metrics/success_once"].tolist() == [1.0]
    obs, _, dones, extras = env.step(torch.zeros(3, 2))
    assert dones.tolist() == [False, False, True] == extras["time_outs"].tolist()
    assert obs["policy"].tolist() == [[3, 1], [1, 2], [0, 2]] and env.episode_length_buf.tolist() == [3, 1, 0]
    assert extras["log"]["Metrics/success_once"].tolist() == [0.0]


@needs_vulkan
def test_actions_are_mapped_to_the_bounds():
    env = envs.make(TASK, num_envs=2, cfg={"control_mode": "pd_joint_pos"})
    data, space = env.export_metadata(), env.vecs[0].single_action_space
    assert env.action_bounds == (-1.0, 1.0) and data["control_mode"] == "pd_joint_pos" and len(data["low"]) == 8
    low, middle, high = (env._to_bounds(torch.full((2, 8), x))[0].numpy() for x in (-3.0, 0.0, 1.0))
    assert np.allclose(low, space.low) and np.allclose(high, space.high) and np.allclose(middle, (space.low + space.high) / 2)


@needs_vulkan
def test_seeds():
    one, same, other = (envs.make(TASK, num_envs=2, seed=x).get_observations()["policy"] for x in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one[0], one[1]) and not (one[:, None] == other[None]).all(-1).any()


@needs_vulkan
@pytest.mark.parametrize("play", [False, True])
def test_pictures(play):
    """Where SAPIEN can draw: what the task's cameras see as groups, and a film."""
    try:
        env = envs.make(TASK, num_envs=2, play=play, cfg={} if play else {"obs_mode": "rgb+depth"})
    except ValueError as error:
        assert "needs a Vulkan driver" in str(error)
        pytest.skip(str(error))
    if play:
        picture = env.render()
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8 and picture.std() > 5.0
    else:
        shapes = {name: (value.shape[1:], value.dtype) for name, value in env.get_observations().items()}
        assert shapes["rgb"] == ((3, 128, 128), torch.uint8) and shapes["depth"] == ((1, 128, 128), torch.float32)
        assert check(env) == [] and shapes["state"][1] == torch.float32


@needs_vulkan
def test_play_without_pictures():
    env = envs.make(TASK, num_envs=1, play=True, cfg={"render_backend": "none"})
    assert env.render() is None


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("PushCub-v1", {}, "maniskill:PushCub-v1: there is no such task; there are PushCube-v1"),
        ("nowhere:Mine-v1", {}, "there is no module nowhere"),
        ("PushCube-v1", {"num_envs": 3}, "--env-cfg num_envs=3: say --num-envs"),
        ("PushCube-v1", {"obs_mode": "pointcloud"}, "obs_mode=pointcloud: .* there are state, rgb"),
        pytest.param("PushCube-v1", {"control_mode": "pd"}, "control_mode=pd: .* ..pd_joint_delta_pos", marks=needs_vulkan),
        pytest.param("PushCube-v1", {"sim_backend": "mjx"}, "sim_backend=mjx: .*mjx", marks=needs_vulkan),
        pytest.param("PushCube-v1", {"speed": 3}, "speed=3: .* unexpected keyword argument 'speed'", marks=needs_vulkan),
    ],
)
def test_refusals(name, options, said):
    with pytest.raises(ValueError) as caught:
        envs.make(f"maniskill:{name}", num_envs=2, cfg=options)
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)


def test_without_vulkan(monkeypatch):
    import envs.maniskill

    def fail(*_, **__):
        raise RuntimeError("failed to find a rendering device")

    monkeypatch.setattr(envs.maniskill, "make_gym", fail)
    with pytest.raises(ValueError, match="failed to find a rendering device: SAPIEN needs a Vulkan driver$"):
        envs.make(TASK, num_envs=2)


def test_settings_are_the_baselines():
    from mani_skill.utils.registration import REGISTERED_ENVS

    from envs.maniskill import TASKS
    from ppo_continuous import Args

    settings = envs.defaults(TASK)
    assert settings.keys() <= Args.__dataclass_fields__.keys()
    assert (settings["gamma"], settings["num_envs"], settings["max_iterations"]) == (0.8, 4096, 3051)
    assert envs.defaults("maniskill:MS-AntRun-v1")["entropy_coef"] == 1e-3 and settings["entropy_coef"] == 0.0
    assert envs.defaults("maniskill:my_tasks:Mine-v1")["num_envs"] == 512
    assert {task for tasks in TASKS for task in tasks.split()} <= REGISTERED_ENVS.keys()


@needs_vulkan
def test_trains():
    from ppo_continuous import Args, train

    task = "maniskill:MS-CartpoleSwingUp-v1"
    few = dict(num_envs=8, num_steps_per_env=100, num_mini_batches=8, max_iterations=30, learning_rate=1e-3)
    settings = envs.defaults(task) | few | dict(env=task, device="cpu", logger="none", log_root="")
    env = envs.make(task, num_envs=8, seed=1, cfg={"max_episode_steps": 200})
    rewards = [metrics["Train/mean_reward"] for metrics in train(Args(**settings), env)]
    assert np.nanmean(rewards[-5:]) > 1.4 * np.nanmean(rewards[4:9])  # the first episodes are cut short
