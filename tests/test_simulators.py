"""Each simulator's adapter keeps the protocol's promises, with the real simulator; Isaac Lab's with a stub of its wrapper.

Every simulator has an environment of its own (`pip install -e ".[mjlab]" pytest`); tests of those that are missing are skipped.
"""

import importlib
import importlib.util
import math
import pathlib
import subprocess
import sys
import time
import types
import urllib.request

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import envs
from envs.check import check, examine


def needs(extra: str, *packages: str):
    missing = any(importlib.util.find_spec(package) is None for package in packages)
    return pytest.mark.skipif(missing, reason=f'needs pip install -e ".[{extra}]"')


needs_mjlab, needs_gymnasium = needs("mjlab", "mjlab"), needs("gymnasium", "gymnasium", "mujoco")  # EnvPool brings only one
needs_envpool, needs_genesis = needs("envpool", "envpool"), needs("genesis", "genesis")
needs_playground = needs("playground", "mujoco_playground")


def train(env_id: str, env=None, **settings) -> list[dict]:
    """Train as the command line does: with the settings that the environment recommends."""
    from ppo_continuous import Args, train

    fields = Args.__dataclass_fields__
    recommended = {name: value for name, value in envs.defaults(env_id).items() if name in fields}
    common = {"env": env_id, "logger": "none", "log_root": "", "device": "cpu"}  # the numbers below are a CPU's
    return train(Args(**recommended | common | settings), env)


def best(history: list[dict], tag: str = "Train/mean_reward") -> float:
    """Of the second half: with random episode lengths the first episodes are cut short, and so cost less."""
    return max(metrics[tag] for metrics in history[len(history) // 2 :] if not math.isnan(metrics[tag]))  # NaN: none ended


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # simulators and runs write files


# ---- Missing simulators, unknown tasks ----


@pytest.mark.parametrize("prefix", envs.SIMULATORS)
def test_missing_simulator(prefix, monkeypatch):
    packages = {"gym": "gymnasium", "playground": "mujoco_playground", "isaaclab": "isaaclab.app"}
    module = f"envs.{envs.SIMULATORS[prefix]}"
    for name in [name for name in sys.modules if name == module or name == "envs.gymnasium"]:
        monkeypatch.delitem(sys.modules, name)
    package = packages.get(prefix, prefix)
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))  # imported before the simulator itself
    monkeypatch.setitem(sys.modules, "jax.numpy", types.ModuleType("jax.numpy"))
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    for ask in (lambda: envs.make(f"{prefix}:task", num_envs=2), lambda: envs.defaults(f"{prefix}:task")):
        with pytest.raises(ImportError) as caught:
            ask()
        message = str(caught.value)
        assert f"{prefix}:<task> needs {package.split('.')[0]}" in message and "pip install" in message and "\n" not in message


class Missing:
    """An import hook that makes one package look as if it were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package or name.startswith(self.package + "."):
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


@pytest.mark.parametrize(
    "env_id",
    [
        pytest.param("mjlab:Nope", marks=needs_mjlab),
        pytest.param("gym:Nope-v0", marks=needs_gymnasium),
        pytest.param("envpool:Nope-v0", marks=needs_envpool),
        pytest.param("playground:Nope", marks=needs_playground),
        pytest.param("genesis:nope", marks=needs_genesis),
    ],
)
def test_unknown_task(env_id):
    with pytest.raises(ValueError, match=env_id) as caught:
        envs.make(env_id, num_envs=2)
    assert "\n" not in str(caught.value)


# ---- Gymnasium ----


@needs_gymnasium
@pytest.mark.parametrize("env_id", ["gym:Pendulum-v1", "gym:Hopper-v5"])
def test_gymnasium_conforms(env_id):
    assert check(envs.make(env_id, num_envs=4)) == []


@needs_gymnasium
@pytest.mark.parametrize("limit", [1000, 15])
def test_gymnasium_steps_like_a_plain_environment(limit):
    """Observations, rewards, ends, last and first observations of every episode equal those of single environments."""
    import gymnasium

    num_envs, seed = 3, 5
    env = envs.make("gym:Hopper-v5", num_envs=num_envs, seed=seed, max_episode_steps=limit)
    plain = [gymnasium.make("Hopper-v5", max_episode_steps=limit) for _ in range(num_envs)]
    seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
    first = [single.reset(seed=seeds[i])[0] for i, single in enumerate(plain)]
    neighbours = envs.make("gym:Hopper-v5", num_envs=num_envs, seed=seed + 1).get_observations()["policy"]
    assert not any(torch.equal(ours, other) for ours in env.get_observations()["policy"] for other in neighbours)
    assert torch.equal(env.get_observations()["policy"], float32(first))
    generator, ended = torch.Generator().manual_seed(0), {"terminated": 0, "truncated": 0}
    for _ in range(150):
        actions = 2.0 * torch.rand(num_envs, env.num_actions, generator=generator) - 1.0  # Hopper's own bounds
        obs, rewards, dones, extras = env.step(actions)
        for i, single in enumerate(plain):
            last, reward, terminated, truncated, _ = single.step(actions[i].numpy())
            ended["terminated"] += terminated
            ended["truncated"] += truncated and not terminated
            assert torch.equal(extras["final_obs"]["policy"][i], float32(last))
            assert rewards[i] == float32(reward) and dones[i] == (terminated or truncated)
            assert extras["time_outs"][i] == (truncated and not terminated)
            assert torch.equal(obs["policy"][i], float32(single.reset()[0] if dones[i] else last))
    assert ended["truncated" if limit == 15 else "terminated"] > 5


def float32(values):

    return torch.tensor(np.asarray(values), dtype=torch.float32)


@needs_gymnasium
def test_gymnasium_maps_actions_to_the_bounds():
    env = envs.make("gym:Pendulum-v1", num_envs=3)  # torque within +-2 N m
    env.step(torch.tensor([[0.5], [-1.0], [7.0]]))
    assert [single.unwrapped.last_u for single in env.vec.envs] == [1.0, -2.0, 2.0]


@needs_gymnasium
def test_gymnasium_spaces():
    """Dict spaces become groups, images (C, H, W), unbounded actions pass; what has no obvious mapping is refused."""
    import gymnasium
    from gymnasium.spaces import Box, Dict, Discrete

    class Custom(gymnasium.Env):
        def __init__(self, observation_space=None, action_space=None):
            infinite = Box(-np.inf, np.inf, (2, 2))
            groups = {"state": Box(-1.0, 1.0, (2, 3), np.float64), "camera": Box(0, 255, (8, 9, 3), np.uint8)}
            self.observation_space, self.action_space = observation_space or Dict(groups), action_space or infinite

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            self.action = action
            return self.observation_space.sample(), 0.0, False, False, {}

    gymnasium.register("Custom-v0", Custom)
    env = envs.make("gym:Custom-v0", num_envs=2)
    assert check(env) == [] and env.max_episode_length == 1000
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in env.get_observations().items()}
    assert shapes == {"state": ((2, 6), torch.float32), "camera": ((2, 3, 8, 9), torch.uint8)}
    env.step(torch.tensor([[5.0, -6.0, 7.0, 8.0]] * 2))
    assert env.vec.envs[0].unwrapped.action.tolist() == [[5.0, -6.0], [7.0, 8.0]]
    half = envs.make("gym:Custom-v0", num_envs=2, action_space=Box(np.array([0.0, -np.inf]), np.array([np.inf, 1.0])))
    half.step(torch.tensor([[-0.5, -3.0], [2.0, 4.0]]))
    assert [single.unwrapped.action.tolist() for single in half.vec.envs] == [[0.0, -3.0], [2.0, 1.0]]
    for spaces, named in (
        ({"action_space": Discrete(3)}, r"Discrete\(3\)"),
        ({"action_space": Box(0, 9, (2,), np.int64)}, "int64"),
        ({"action_space": Dict(a=Box(-1, 1, (2,)))}, "action space Dict"),
        ({"observation_space": Discrete(5)}, "policy is a Discrete"),
        ({"observation_space": Dict(a=Discrete(5))}, "a is a Discrete"),
    ):
        with pytest.raises(ValueError, match=named):
            envs.make("gym:Custom-v0", num_envs=2, **spaces)


@needs_gymnasium
def test_gymnasium_trains():
    assert best(train("gym:Pendulum-v1", max_iterations=100)) > -250.0  # random: -1200; a swing-up costs about -150


# ---- EnvPool ----


@needs_envpool
@pytest.mark.parametrize("env_id", ["envpool:HalfCheetah-v4", "envpool:Go1JoystickFlatTerrain-v1"])
def test_envpool_conforms(env_id):
    assert check(envs.make(env_id, num_envs=4)) == []


@needs_envpool
@pytest.mark.parametrize("limit", [1000, 15])
def test_envpool_steps_like_a_plain_environment(limit):
    """The same as single EnvPool environments, which reset one step later, with an action that is ignored."""
    import envpool

    num_envs, seed = 3, 5
    env = envs.make("envpool:Hopper-v4", num_envs=num_envs, seed=seed, max_episode_steps=limit)
    settings = dict(env_type="gymnasium", num_envs=1, max_episode_steps=limit)
    start = int(np.random.SeedSequence(seed).generate_state(1)[0] // 2)
    plain = [envpool.make("Hopper-v4", seed=start + i, **settings) for i in range(num_envs)]
    first = [single.reset()[0][0] for single in plain]
    assert torch.equal(env.get_observations()["policy"], float32(first))
    generator, ended = torch.Generator().manual_seed(0), {"terminated": 0, "truncated": 0}
    for _ in range(150):
        actions = 2.0 * torch.rand(num_envs, env.num_actions, generator=generator) - 1.0
        obs, rewards, dones, extras = env.step(actions)
        for i, single in enumerate(plain):
            action = actions[i : i + 1].numpy().astype(np.float64)
            last, reward, terminated, truncated, _ = (x[0] if isinstance(x, np.ndarray) else x for x in single.step(action))
            ended["terminated"] += terminated
            ended["truncated"] += truncated
            assert torch.equal(extras["final_obs"]["policy"][i], float32(last))
            assert rewards[i] == float32(reward) and dones[i] == (terminated or truncated)
            assert extras["time_outs"][i] == (truncated and not terminated)
            assert torch.equal(obs["policy"][i], float32(single.step(action)[0][0] if dones[i] else last))
    assert ended["truncated" if limit == 15 else "terminated"] > 5


@needs_envpool
def test_playing_envpool_ends_well(tmp_path):
    """Also where its renderer would end the process: then without a film, which is said."""
    script = pathlib.Path(envs.__file__).parents[1] / "ppo_continuous.py"
    command = [sys.executable, script, "--env", "envpool:HalfCheetah-v4", "--play", "--agent", "zero", "--play-envs", "2"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    drawn = list(tmp_path.glob("logs/*/play_zero.gif"))
    assert run.returncode == 0 and run.stdout.count("\nepisode ") == 2, run.stderr
    assert len(drawn) == 1 or "no film or plot: RuntimeError: EnvPool cannot draw HalfCheetah-v4 here" in run.stdout


@needs_envpool
def test_envpool_trains():
    assert best(train("envpool:HalfCheetah-v4", max_iterations=100)) > 500.0  # random: -300


# ---- mjlab ----


@needs_mjlab
def test_mjlab_conforms():
    env = envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=4)
    assert check(env) == [] and env.step_dt == pytest.approx(0.05)


@needs_mjlab
def test_mjlab_depth_camera_conforms():
    env = envs.make("mjlab:Mjlab-Lift-Cube-Yam-Depth", num_envs=2)
    assert check(env) == [] and env.get_observations()["camera"].dim() == 4


@needs_mjlab
def test_mjlab_settings_are_the_tasks_own():
    from mjlab.tasks.registry import load_rl_cfg

    settings, cfg = envs.defaults("mjlab:Mjlab-Velocity-Flat-Unitree-Go1"), load_rl_cfg("Mjlab-Velocity-Flat-Unitree-Go1")
    assert settings["actor_hidden_dims"] == tuple(cfg.actor.hidden_dims) == (512, 256, 128)
    assert settings["entropy_coef"] == cfg.algorithm.entropy_coef and settings["critic_obs"] == ("critic",)
    assert envs.defaults("mjlab:Mjlab-Lift-Cube-Yam-Depth")["cnn_output_channels"] == (16, 32)


@needs_mjlab
def test_mjlab_play_configuration():
    from mjlab.tasks.registry import load_env_cfg

    task = "Mjlab-Velocity-Flat-Unitree-Go1"
    assert load_env_cfg(task).episode_length_s != load_env_cfg(task, play=True).episode_length_s
    env = envs.make(f"mjlab:{task}", num_envs=1, play=True, terminations=False)
    assert env.cfg.episode_length_s == load_env_cfg(task, play=True).episode_length_s
    assert env.cfg.terminations == {} and env.unwrapped.render_mode == "rgb_array"
    assert env.max_episode_length == load_env_cfg(task).episode_length_s / env.step_dt, "a film has to end"


@needs_mjlab
def test_mjlab_trains():
    env = envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=256, episode_length_s=4.0)
    assert best(train("mjlab:Mjlab-Cartpole-Balance", env, max_iterations=50)) >= 3.8  # of 4


@needs_mjlab
def test_mjlab_checkpoints_cross(tmp_path):
    """mjlab's runner (what `mjlab play` uses) acts like ours on our checkpoint; training resumes from mjlab's."""
    import dataclasses

    from mjlab.rl import MjlabOnPolicyRunner
    from mjlab.tasks.registry import load_rl_cfg

    from ppo_continuous import Args, load_policy

    task = "Mjlab-Cartpole-Swingup"
    env = envs.make(f"mjlab:{task}", num_envs=8)
    train(f"mjlab:{task}", env, max_iterations=2, log_root="logs")
    [ours] = tmp_path.glob("logs/cartpole/*/model_1.pt")
    runner = MjlabOnPolicyRunner(env, dataclasses.asdict(load_rl_cfg(task)) | {"upload_model": False}, device="cpu")
    runner.load(str(ours), load_cfg={"actor": True}, strict=True, map_location="cpu")
    obs = env.get_observations()
    assert torch.allclose(runner.get_inference_policy()(obs), load_policy(ours).act(obs), atol=1e-6)

    theirs = tmp_path / "model_4.pt"
    runner.alg.actor.distribution.std_param.data.fill_(0.7)
    runner.current_learning_iteration = 4
    runner.save(str(theirs))
    history = train(f"mjlab:{task}", env, max_iterations=6, resume=True, checkpoint=str(theirs))
    assert len(history) == 1 and history[0]["Policy/mean_std"] == pytest.approx(0.7, abs=0.02)
    defaults = {k: v for k, v in envs.defaults(f"mjlab:{task}").items() if k in Args.__dataclass_fields__}
    policy = load_policy(theirs, Args(**defaults | {"device": "cpu"}), env)
    assert torch.allclose(runner.get_inference_policy()(obs), policy.act(obs), atol=1e-6)


@needs_mjlab
def test_mjlab_plays_our_checkpoint(tmp_path):
    """The command `mjlab play` itself: it loads our checkpoint, films it, and serves its viewer until it is stopped."""
    train("mjlab:Mjlab-Cartpole-Swingup", num_envs=8, max_iterations=2, log_root="logs")
    [ours] = tmp_path.glob("logs/cartpole/*/model_1.pt")
    options = f"--checkpoint-file {ours} --num-envs 2 --viewer viser --video True --video-length 20".split()
    command = [pathlib.Path(sys.executable).with_name("play"), "Mjlab-Cartpole-Swingup", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.time() + 150
        while process.poll() is None and time.time() < deadline and not list(tmp_path.rglob("rl-video-step-0.mp4")):
            time.sleep(0.5)
        process.kill()
        output = process.stdout.read()
    [film] = tmp_path.rglob("rl-video-step-0.mp4")
    assert "Actor Model: MLPModel" in output, output


@needs_mjlab
@pytest.mark.parametrize("display", ["", ":65535"])
def test_mjlab_viewer_in_the_browser(display, monkeypatch):
    """Where no display answers: the page is served, seen from above the floor, and a policy hears of every new episode."""
    from mjlab.viewer import ViserPlayViewer

    class Policy:
        pages, begun = [], []

        def __call__(self, obs):
            with urllib.request.urlopen(f"http://localhost:{viewers[-1]._server.get_port()}") as page:
                self.pages.append(page.read())
            return torch.zeros(2, 1)

        def reset(self, dones):
            self.begun.append(dones.tolist())

    viewers, run = [], ViserPlayViewer.run
    monkeypatch.setattr(ViserPlayViewer, "run", lambda viewer: viewers.append(viewer) or run(viewer, num_steps=3))
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    env, policy = envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=2, play=True, episode_length_s=0.1), Policy()
    env.view(policy)
    assert len(policy.pages) == 3 and all(b"<title>Viser</title>" in page for page in policy.pages)
    assert policy.begun == [[True, True], [False, False], [True, True]] and viewers[-1].cfg.elevation > 0


@needs_mjlab
def test_mjlab_depth_camera_trains_through_ppo_cnn():
    import ppo_cnn

    task = "mjlab:Mjlab-Lift-Cube-Yam-Depth"
    settings = {k: v for k, v in envs.defaults(task).items() if k in ppo_cnn.Args.__dataclass_fields__}
    settings |= dict(env=task, device="cpu", logger="none", log_root="", num_envs=2, num_steps_per_env=4, num_mini_batches=2)
    history = ppo_cnn.train(ppo_cnn.Args(**settings | {"max_iterations": 2}))
    assert len(history) == 2 and all(math.isfinite(metrics["Loss/surrogate"]) for metrics in history)


# ---- MuJoCo Playground ----


@needs_playground
def test_playground_keeps_the_promises_that_its_wrapper_does_not():
    env = envs.make("playground:CartpoleBalance", num_envs=4)
    assert check(env) == []
    env.step(torch.ones(4, 1))
    state = env._state
    env.get_observations()
    assert env._state is state, "reading observations must not reset"

    env.episode_length_buf = torch.tensor([0, 5, env.max_episode_length - 1, 0])
    initial = env._initial.obs
    obs, rewards, dones, extras = env.step(torch.ones(4, 1))
    assert dones.tolist() == extras["time_outs"].tolist() == [False, False, True, False]
    assert env.episode_length_buf.tolist() == [1, 6, 0, 1]
    assert torch.equal(obs["state"][2], torch.from_dlpack(initial)[2])
    assert not torch.equal(obs["state"][2], extras["final_obs"]["state"][2])
    assert torch.equal(obs["state"][:2], extras["final_obs"]["state"][:2])

    kept = rewards.clone()
    env.step(-torch.ones(4, 1))
    assert torch.equal(rewards, kept)


@needs_playground
def test_playground_episodes_begin_anew():
    """Initial states are drawn anew once per episode length, and the random stream of a task is not set back."""
    env = envs.make("playground:CartpoleBalance", num_envs=4, episode_length=5)
    starts = [env.get_observations()["state"]]
    for _ in range(3):
        dones = [env.step(torch.zeros(4, 1))[2].all().item() for _ in range(5)]
        assert dones == [False, False, False, False, True]
        starts.append(env.get_observations()["state"])
    assert len({start.numpy().tobytes() for start in starts}) == 4
    assert env._state.info["rng"].tolist() != env._initial.info["rng"].tolist()


@needs_playground
def test_playground_trains():
    env = envs.make("playground:CartpoleBalance", num_envs=256, episode_length=250)
    assert best(train("playground:CartpoleBalance", env, max_iterations=200)) > 200.0  # of 250; at first 90


# ---- Genesis ----


@needs_genesis
def test_genesis_conforms_and_trains():
    """One test: Genesis compiles for a minute, and may be initialised once in a process."""
    env = envs.make("genesis:go2", num_envs=256)
    assert check(env) == []
    env.reset_all()
    fallen, start = False, env.start
    for _ in range(100):
        _, _, dones, extras = env.step(3.0 * torch.randn(256, 12))
        if dones.any():
            fallen = True
            assert not extras["time_outs"][dones].any()
            assert torch.allclose(env.robot.get_qpos()[dones], start.expand(int(dones.sum()), -1))
            assert (env.episode_length_buf[dones] == 0).all()
    assert fallen
    assert best(train("genesis:go2", env, max_iterations=40)) > 0.2  # at first -0.16


# ---- Isaac Lab: a stub with the attributes and return types of its wrapper, simulator left out ----


class StubTask:
    """Stands for a ManagerBasedRLEnv: noisy observations, persistent reward buffer and extras, `compute_final_obs`."""

    step_dt, max_episode_length = 0.02, 10

    def __init__(self, cfg, render_mode=None):
        self.cfg, self.num_envs, self.device, self.render_mode = cfg, cfg.scene.num_envs, cfg.sim.device, render_mode
        self.unwrapped, self.extras = self, {}
        self.action_manager = types.SimpleNamespace(total_action_dim=2)
        self.observation_manager = types.SimpleNamespace(compute=self.compute)
        self.reward_buf, self.state = torch.zeros(self.num_envs), torch.zeros(self.num_envs, 3)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)

    def compute(self):
        return {"policy": self.state + 0.01 * torch.rand(self.num_envs, 3), "critic": self.state.clone()}

    def reset(self):
        self.state = torch.rand(self.num_envs, 3)
        return self.compute(), self.extras

    def step(self, actions):
        self.episode_length_buf += 1
        self.state = self.state + 1.0
        self.reward_buf += 1.0
        terminated, truncated = torch.zeros(self.num_envs, dtype=torch.bool), self.episode_length_buf >= self.max_episode_length
        if truncated.any():
            if self.cfg.compute_final_obs:
                self.extras["final_obs"] = self.compute()
            self.state[truncated] = torch.rand(self.num_envs, 3)[truncated]
            self.episode_length_buf[truncated] = 0
        self.extras["log"] = {"Episode_Reward/track": torch.tensor(0.5)}
        return self.compute(), self.reward_buf, terminated, truncated, self.extras

    def render(self):
        return "picture"

    def close(self):
        self.closed = True


class StubWrapper:
    """The attributes and return types of `isaaclab_rl.rsl_rl.RslRlVecEnvWrapper`."""

    def __init__(self, env, clip_actions=None):
        self.env, self.clip_actions = env, clip_actions
        self.num_envs, self.device = self.unwrapped.num_envs, self.unwrapped.device
        self.max_episode_length = self.unwrapped.max_episode_length
        self.num_actions = self.unwrapped.action_manager.total_action_dim
        self.env.reset()

    unwrapped = property(lambda self: self.env.unwrapped)
    cfg = property(lambda self: self.unwrapped.cfg)

    @property
    def episode_length_buf(self):
        return self.unwrapped.episode_length_buf

    @episode_length_buf.setter
    def episode_length_buf(self, value):
        self.unwrapped.episode_length_buf = value

    def get_observations(self):
        return TensorDict(self.unwrapped.observation_manager.compute(), batch_size=[self.num_envs])

    def step(self, actions):
        obs, rewards, terminated, truncated, extras = self.env.step(actions)
        if not self.unwrapped.cfg.is_finite_horizon:
            extras["time_outs"] = truncated
        return TensorDict(obs, batch_size=[self.num_envs]), rewards, (terminated | truncated).to(torch.long), extras

    def close(self):
        return self.env.close()


class Cfg(types.SimpleNamespace):
    def to_dict(self):
        return {k: v.to_dict() if isinstance(v, Cfg) else v for k, v in vars(self).items()}


AGENT = Cfg(
    num_steps_per_env=24,
    max_iterations=300,
    save_interval=50,
    experiment_name="anymal_d_flat",
    clip_actions=None,
    obs_groups={"policy": ["policy"], "critic": ["policy", "critic"]},
    empirical_normalization=False,
    policy=Cfg(
        init_noise_std=0.8, noise_std_type="log", state_dependent_std=False, activation="elu",
        actor_hidden_dims=[128, 64], critic_hidden_dims=[256, 64], actor_obs_normalization=True,
    ),
    algorithm=Cfg(class_name="PPO", entropy_coef=0.005, learning_rate=1e-3, rnd_cfg=None),
)  # fmt: skip


@pytest.fixture
def isaac(monkeypatch):
    """Modules of Isaac Lab that refuse to be imported before the app has started. Yields what happened, in order."""
    events = []

    class AppLauncher:
        def __init__(self, launcher_args=None, **kwargs):
            events.append(("launch", kwargs))
            self.app = types.SimpleNamespace(close=lambda: None)
            module("isaaclab_tasks")
            module("isaaclab_rl.rsl_rl", RslRlVecEnvWrapper=StubWrapper)
            module("isaaclab_tasks.utils", parse_env_cfg=parse_env_cfg, load_cfg_from_registry=load_cfg_from_registry)
            module("gymnasium", registry={"Isaac-Walk-v0", "Isaac-Walk-Play-v0"}, make=make)

    def module(name, **attributes):
        new = types.ModuleType(name)
        vars(new).update(attributes)
        monkeypatch.setitem(sys.modules, name, new)

    def parse_env_cfg(task_name, device="cuda:0", num_envs=None, use_fabric=None):
        scene, sim = types.SimpleNamespace(num_envs=num_envs), types.SimpleNamespace(device=device)
        return types.SimpleNamespace(scene=scene, sim=sim, seed=None, is_finite_horizon=False, compute_final_obs=False)

    def load_cfg_from_registry(task_name, entry_point_key):
        if entry_point_key != "rsl_rl_cfg_entry_point":
            raise ValueError(f"Could not find configuration for the environment: '{task_name}'.")
        return AGENT

    def make(name, cfg, render_mode=None):
        events.append(("make", name, cfg.seed))
        return StubTask(cfg, render_mode)

    for name in ("isaaclab_tasks", "isaaclab_tasks.utils", "isaaclab_rl", "isaaclab_rl.rsl_rl"):
        monkeypatch.setitem(sys.modules, name, None)  # import fails until AppLauncher has run
    module("isaaclab")
    module("isaaclab.app", AppLauncher=AppLauncher)
    monkeypatch.delitem(sys.modules, "envs.isaaclab", raising=False)
    yield events
    sys.modules.pop("envs.isaaclab", None)


def test_isaaclab_conforms(isaac):
    env = envs.make("isaaclab:Isaac-Walk-v0", num_envs=4, device="cpu", seed=3)
    (launch, how), made = isaac
    assert launch == "launch" and how["headless"] and made == ("make", "Isaac-Walk-v0", 3)
    report = examine(env)
    assert report.errors == [] and report.notes == [], "noise when read and the reward buffer must not pass through"
    assert check(StubWrapper(env.unwrapped)) != [], "the stub has the wrapper's faults"
    assert env.step_dt == 0.02 and env.cfg.compute_final_obs and env.num_actions == 2
    env.close()
    assert env.unwrapped.closed


def test_isaaclab_final_obs(isaac):
    env = envs.make("isaaclab:Isaac-Walk-v0", num_envs=2, device="cpu")
    env.episode_length_buf = torch.tensor([0, 9])
    obs, _, dones, extras = env.step(torch.zeros(2, 2))
    assert dones.tolist() == [0, 1] and isinstance(extras["final_obs"], TensorDict)
    assert extras["final_obs"]["critic"][1].min() >= 1.0 > obs["critic"][1].max()


def test_isaaclab_play_variant_and_settings(isaac):
    assert envs.make("isaaclab:Isaac-Walk-v0", num_envs=1, device="cpu", play=True).render() == "picture"
    envs.make("isaaclab:Isaac-Run-v0", num_envs=1, device="cpu", play=True)
    assert [event[1] for event in isaac if event[0] == "make"] == ["Isaac-Walk-Play-v0", "Isaac-Run-v0"]
    settings = envs.defaults("isaaclab:Isaac-Walk-v0")
    assert len([event for event in isaac if event[0] == "launch"]) == 1, "Isaac Sim starts once"
    assert settings["actor_hidden_dims"] == (128, 64) and settings["critic_hidden_dims"] == (256, 64)
    assert settings["critic_obs"] == ("policy", "critic") and settings["actor_obs"] == ("policy",)
    assert settings["init_std"] == 0.8 and settings["std_type"] == "log" and settings["obs_normalization"] is True
    assert settings["entropy_coef"] == 0.005 and "rnd_cfg" not in settings and "clip_actions" not in settings


def test_settings_of_both_layouts():
    from envs.settings import from_rsl_rl

    model = {"hidden_dims": [32], "activation": "elu", "obs_normalization": False}
    distribution = {"class_name": "HeteroscedasticGaussianDistribution", "init_std": 0.5, "std_type": "log"}
    memory = {"rnn_type": "gru", "rnn_hidden_dim": 64, "rnn_num_layers": 1}
    cfg = {"obs_groups": {"actor": ("a", "b")}, "algorithm": {"gamma": 0.9}, "num_steps_per_env": 8}
    cfg |= {"actor": model | memory | {"distribution_cfg": distribution}, "critic": model | {"hidden_dims": (64, 32)}}
    assert from_rsl_rl(cfg) == {
        "num_steps_per_env": 8, "gamma": 0.9, "actor_obs": ("a", "b"), "activation": "elu", "obs_normalization": False,
        "actor_hidden_dims": (32,), "critic_hidden_dims": (64, 32), "distribution": "heteroscedastic", "init_std": 0.5,
        "std_type": "log", **memory,
    }  # fmt: skip
    cfg["actor"]["distribution_cfg"] = {"class_name": "rsl_rl.modules.BetaDistribution", "action_range": [-2.0, 2.0]}
    cfg["actor"]["cnn_cfg"] = {g: {"output_channels": [8, 16], "kernel_size": k} for g, k in {"depth": 3, "rgb": 5}.items()}
    settings = from_rsl_rl(cfg)
    assert settings["distribution"] == "beta" and settings["action_range"] == (-2.0, 2.0)
    assert settings["cnn_output_channels"] == (8, 16) and "cnn_kernel_size" not in settings


def test_nothing_of_a_configuration_is_dropped_in_silence(capsys):
    """What has no counterpart is printed once; Isaac Lab's MISSING, which comes as {}, is nothing that was said."""
    from envs.settings import from_rsl_rl, say

    say.cache_clear()
    policy = {"class_name": "ActorCritic", "actor_obs_normalization": {}, "critic_obs_normalization": {}, "activation": "elu"}
    policy |= {"actor_hidden_dims": [32], "critic_hidden_dims": [64], "init_noise_std": 1.0, "state_dependent_std": False}
    cfg = {"policy": policy, "algorithm": {"class_name": "PPO", "gamma": 0.98}, "empirical_normalization": False, "seed": 42}
    assert from_rsl_rl(cfg)["obs_normalization"] is False and capsys.readouterr().out == ""
    cfg["algorithm"] |= {"symmetry_cfg": {"use_mirror_loss": True}, "warm_up": 5}
    cfg["policy"] |= {"actor_obs_normalization": True, "critic_obs_normalization": False, "rnn_type": {}}
    for _ in range(2):
        assert from_rsl_rl(cfg)["obs_normalization"] is True
    left = "algorithm.warm_up 5, algorithm.symmetry_cfg (run ppo_symmetry.py), policy.critic_obs_normalization False"
    assert capsys.readouterr().out == f"the task's configuration also says, and no setting here does: {left}\n"

    model = {"class_name": "MLPModel", "hidden_dims": [32], "activation": "elu", "obs_normalization": True}
    normal = {"class_name": "GaussianDistribution", "init_std": 0.5, "std_range": [0.1, 2.0]}
    cfg = {"actor": model | {"distribution_cfg": normal}, "critic": model | {"activation": "relu"}, "algorithm": {}}
    assert from_rsl_rl(cfg | {"init_at_random_ep_len": False})["init_at_random_ep_len"] is False
    left = "actor.distribution_cfg.std_range [0.1, 2.0], critic.activation relu"
    assert capsys.readouterr().out.endswith(f"does: {left}\n")


def test_settings_for_distillation():
    from envs.settings import from_rsl_rl

    policy = {"class_name": "StudentTeacher", "student_hidden_dims": [128], "teacher_hidden_dims": [64], "activation": "elu"}
    policy |= {"student_obs_normalization": False, "teacher_obs_normalization": False, "init_noise_std": 0.1}
    groups = {"policy": ["policy"], "teacher": ["policy", "privileged"]}
    cfg = {"policy": policy, "algorithm": {"class_name": "Distillation", "gradient_length": 15, "loss_type": "mse"}}
    assert from_rsl_rl(cfg | {"obs_groups": groups}) == {
        "student_hidden_dims": (128,), "activation": "elu", "obs_normalization": False, "init_std": 0.1, "gradient_length": 15,
        "loss_type": "mse", "student_obs": ("policy",), "teacher_obs": ("policy", "privileged"),
    }  # fmt: skip
