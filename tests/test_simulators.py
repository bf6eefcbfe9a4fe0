"""Each simulator's adapter keeps the protocol's promises, with the real simulator. Isaac Lab's: test_isaaclab.py.

Every simulator has an environment of its own (`pip install -e ".[mjlab]" pytest`); tests of those that are missing are skipped.
"""

import importlib
import importlib.metadata
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

import envs
from envs.check import check


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
    packages = {"gym": "gymnasium", "playground": "mujoco_playground", "isaaclab": "isaaclab.app", "maniskill": "mani_skill"}
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
    env = envs.make("gym:Hopper-v5", num_envs=num_envs, seed=seed, cfg={"max_episode_steps": limit})
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
    half = envs.make("gym:Custom-v0", num_envs=2, cfg={"action_space": Box(np.array([0.0, -np.inf]), np.array([np.inf, 1.0]))})
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
            envs.make("gym:Custom-v0", num_envs=2, cfg=spaces)


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
    env = envs.make("envpool:Hopper-v4", num_envs=num_envs, seed=seed, cfg={"max_episode_steps": limit})
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
def test_mjlab_options(capfd):
    """Dotted names reach the simulation; what a flag decides, an unknown name and another type are refused."""
    task = "mjlab:Mjlab-Velocity-Flat-Unitree-Go1"
    for option, value, said in (
        ("rewards.action_rate.weight", -0.02, "there is no action_rate; there are action_rate_l2"),
        ("commands.twist.ranges.lin_vel_x", "fast", r"'fast' is str; there is \(-1.0, 1.0\) of tuple"),
        ("scene.sensors.feet.debug", True, "there is no feet; there are feet_ground_contact"),
        ("scene.num_envs", 3, "say --num-envs"),
        ("seed", 3, "say --seed"),
    ):
        with pytest.raises(ValueError, match=f"--env-cfg {option}.*{said}") as caught:
            envs.make(task, num_envs=2, cfg={option: value})
        assert "\n" not in str(caught.value)
    ranges = {"commands.twist.ranges.lin_vel_x": [-1, 2]}
    sensors = {"scene.sensors.foot_height_scan.max_distance": 2, "scene.sensors.foot_height_scan.pattern.rings.0.radius": 1}
    more = {"curriculum.command_vel": None, "rewards.action_rate_l2.weight": -1} | sensors
    env = envs.make(task, num_envs=2, cfg=ranges | more)
    scan, contact = env.cfg.scene.sensors
    assert scan.max_distance == 2.0 and scan.pattern.rings[0].radius == 1.0 and contact.name == "feet_ground_contact"
    assert env.unwrapped.command_manager.get_term_cfg("twist").ranges.lin_vel_x == (-1.0, 2.0)
    assert env.unwrapped.reward_manager.get_term_cfg("action_rate_l2").weight == -1.0
    assert "curriculum makes it" not in capfd.readouterr().out
    envs.make(task, num_envs=2, cfg=ranges)
    assert "lin_vel_x=(-1.0, 2.0): the task's curriculum makes it (-1.0, 1.0); to keep yours add" in capfd.readouterr().out
    played = envs.make(task, num_envs=1, play=True, cfg={"curriculum.command_vel": None, "episode_length_s": 3} | ranges)
    assert played.cfg.commands["twist"].ranges.lin_vel_x == (-1.0, 2.0) and played.max_episode_length == 150


@needs_mjlab
def test_mjlab_options_are_of_one_group():
    """In mjlab's configurations actor and critic share their terms; its managers, and our options, do not."""
    options = {"observations.actor.terms.cart_pos.scale": 0.5, "rewards.smooth_reward.weight": "1e-3"}  # as YAML gives it
    env = envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=2, cfg=options)
    actor, critic = (env.cfg.observations[group].terms["cart_pos"] for group in ("actor", "critic"))
    assert actor.scale == 0.5 and critic.scale is None
    assert env.unwrapped.reward_manager.get_term_cfg("smooth_reward").weight == 0.001
    obs = env.get_observations()
    assert torch.equal(obs["actor"][:, 0], 0.5 * obs["critic"][:, 0])


@needs_mjlab
def test_mjlab_tasks_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "from mjlab.tasks.registry import load_env_cfg, load_rl_cfg, register_mjlab_task\n"
        "cartpole = 'Mjlab-Cartpole-Balance'\n"
        "settings = load_rl_cfg(cartpole)\n"
        "settings.num_steps_per_env = 7\n"
        "register_mjlab_task('Mine', load_env_cfg(cartpole), load_env_cfg(cartpole, play=True), settings)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert envs.defaults("mjlab:my_tasks:Mine")["num_steps_per_env"] == 7
    assert envs.make("mjlab:my_tasks:Mine", num_envs=2).num_actions == 1
    for name, said in (
        ("my_tasks:Other", "there is no such task; there are Mine, Mjlab"),
        ("nowhere:Mine", "no module nowhere"),
    ):
        for ask in (envs.defaults, lambda name: envs.make(name, num_envs=2)):
            with pytest.raises(ValueError, match=f"{name}: .*{said}"):
                ask(f"mjlab:{name}")


@needs_mjlab
def test_mjlab_curricula_go_on(tmp_path):
    """The step counter, as mjlab's runner saves it, is our environment's state, and the curriculum follows it."""
    import dataclasses

    from mjlab.rl import MjlabOnPolicyRunner
    from mjlab.tasks.registry import load_rl_cfg

    task = "Mjlab-Velocity-Flat-Unitree-Go1"
    env = envs.make(f"mjlab:{task}", num_envs=2)
    env.step(torch.zeros(2, 12))
    runner = MjlabOnPolicyRunner(env, dataclasses.asdict(load_rl_cfg(task)) | {"upload_model": False}, device="cpu")
    runner.save(str(tmp_path / "model.pt"))
    infos = torch.load(tmp_path / "model.pt", weights_only=True)["infos"]
    assert infos == {"env_state": env.state_dict()} == {"env_state": {"common_step_counter": 1}}
    ranges = env.unwrapped.command_manager.get_term_cfg("twist").ranges
    assert ranges.lin_vel_x == (-1.0, 1.0)
    assert env.load_state_dict({"common_step_counter": 120_000}) is False and env.state_dict()["common_step_counter"] == 120_000
    env.reset()
    assert ranges.lin_vel_x == (-1.5, 2.0)


@needs_mjlab
@pytest.mark.parametrize("task", ["Mjlab-Velocity-Flat-Unitree-Go1", "Mjlab-Tracking-Flat-Unitree-G1"])
def test_mjlab_metadata_of_exported_policies(task, tmp_path):
    """What the task's own runner writes into its ONNX file; motion tracking needs a motion, here one of standing still."""
    import dataclasses

    import onnx
    from mjlab.tasks.registry import load_rl_cfg, load_runner_cls

    options = {}
    if "Tracking" in task:
        with pytest.raises(ValueError, match="commands.motion.motion_file=<file>.npz"):
            envs.make(f"mjlab:{task}", num_envs=2)
        options["commands.motion.motion_file"] = str(tmp_path / "motion.npz")
        motion = {"joint_pos": (29,), "joint_vel": (29,), "body_pos_w": (30, 3), "body_lin_vel_w": (30, 3)}
        motion |= {"body_quat_w": (30, 4), "body_ang_vel_w": (30, 3)}
        motion = {name: np.zeros((50, *shape)) for name, shape in motion.items()}
        motion["body_quat_w"][..., 0] = 1.0
        np.savez(tmp_path / "motion.npz", **motion)
    env = envs.make(f"mjlab:{task}", num_envs=2, cfg=options)
    cfg = dataclasses.asdict(load_rl_cfg(task)) | {"upload_model": False, "logger": "tensorboard"}
    load_runner_cls(task)(env, cfg, log_dir=None, device="cpu").save(str(tmp_path / "model.pt"))
    [file] = tmp_path.glob("*.onnx")
    data = env.export_metadata()
    assert data == {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert data["joint_names"].startswith(("FR_hip_joint,FR_thigh_joint,", "left_hip_pitch_joint,left_hip_roll_joint,"))
    assert data["default_joint_pos"].startswith(("0.100,0.900,-1.800,", "-0.312,0.000,"))
    assert data["command_names"] in ("twist", "motion") and (data["command_names"] == "motion") == ("body_names" in data)
    assert {"observation_names", "joint_stiffness", "joint_damping", "action_scale"} < data.keys()


@needs_mjlab
def test_mjlab_metadata_is_empty_where_mjlab_has_none():
    assert envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=1).export_metadata() == {}


@needs_mjlab
def test_mjlab_trains():
    env = envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=256, cfg={"episode_length_s": 4})
    assert best(train("mjlab:Mjlab-Cartpole-Balance", env, max_iterations=50)) >= 3.8  # of 4


@needs_mjlab
@pytest.mark.parametrize("task, num_envs, iterations", [("Cartpole-Balance", 64, 6), ("Velocity-Flat-Unitree-Go1", 16, 3)])
def test_mjlab_training_equals_rsl_rl(task, num_envs, iterations):
    """5.5.1, with the task's own settings: to the last bit. (mjlab brings 5.4, which learns the normalisation before the update.)"""
    if importlib.metadata.version("rsl-rl-lib") != "5.5.1":
        pytest.skip("needs pip install --no-deps rsl-rl-lib==5.5.1")
    import reference

    import ppo_continuous

    env_id = f"mjlab:Mjlab-{task}"
    settings = envs.defaults(env_id, ppo_continuous.Args.__dataclass_fields__) | dict(
        env=env_id, seed=7, device="cpu", log_root=""
    )
    settings |= dict(num_envs=num_envs, max_iterations=iterations, timeout_bootstrap="value")
    reference.assert_equal(
        ppo_continuous, ppo_continuous.Args(**settings), lambda: envs.make(env_id, num_envs=num_envs, seed=7)
    )


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
    cfg, policy = {"episode_length_s": 0.1}, Policy()
    env = envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs=2, play=True, cfg=cfg)
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


@needs_mjlab
def test_mjlab_spatial_softmax_crosses(tmp_path):
    """mjlab's runner acts like ours on our checkpoint, strictly loaded, and ours on mjlab's."""
    import dataclasses

    from mjlab.rl import MjlabOnPolicyRunner
    from mjlab.tasks.registry import load_rl_cfg

    import ppo_cnn

    task = "mjlab:Mjlab-Lift-Cube-Yam-Depth"
    settings = {k: v for k, v in envs.defaults(task).items() if k in ppo_cnn.Args.__dataclass_fields__}
    assert settings["cnn_global_pool"] == "spatial_softmax" and settings["cnn_temperature"] == 1.0
    settings |= dict(env=task, device="cpu", logger="none", num_envs=2, num_steps_per_env=4, num_mini_batches=2)
    args, env = ppo_cnn.Args(**settings | {"max_iterations": 1}), envs.make(task, num_envs=2)
    ours = ppo_cnn.train(args, env).run_dir / "model_0.pt"
    cfg = dataclasses.asdict(load_rl_cfg(task.removeprefix("mjlab:"))) | {"upload_model": False}
    runner, obs = MjlabOnPolicyRunner(env, cfg, device="cpu"), env.get_observations()
    runner.load(str(ours), load_cfg={"actor": True, "critic": True}, strict=True, map_location="cpu")
    assert torch.equal(runner.get_inference_policy()(obs), ppo_cnn.load_policy(ours).act(obs))
    for parameter in runner.alg.actor.cnns.parameters():
        parameter.data.normal_()
    runner.save(str(tmp_path / "theirs.pt"))
    policy = ppo_cnn.load_policy(tmp_path / "theirs.pt", args, env)
    assert torch.equal(runner.get_inference_policy()(obs), policy.act(obs))


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
    env = envs.make("playground:CartpoleBalance", num_envs=4, cfg={"episode_length": 5})
    starts = [env.get_observations()["state"]]
    for _ in range(3):
        dones = [env.step(torch.zeros(4, 1))[2].all().item() for _ in range(5)]
        assert dones == [False, False, False, False, True]
        starts.append(env.get_observations()["state"])
    assert len({start.numpy().tobytes() for start in starts}) == 4
    assert env._state.info["rng"].tolist() != env._initial.info["rng"].tolist()


@needs_playground
def test_playground_options():
    env = envs.make("playground:CartpoleBalance", num_envs=2, cfg={"episode_length": 5, "sim_dt": 0.005})
    assert env.max_episode_length == 5 and env.task.sim_dt == 0.005 and env.cfg["episode_length"] == 5
    for option, value, said in (
        ("episode_lenght", 5, "there is no episode_lenght; there are episode_length"),
        ("ctrl_dt", "fast", "'fast' is str; there is 0.01 of float"),
        ("episode_length", 5.5, "5.5 is of original type .*float"),
        ("num_envs", 3, "say --num-envs"),
        ("seed", 3, "say --seed"),
    ):
        with pytest.raises(ValueError, match=f"--env-cfg.*{option}.*{said}") as caught:
            envs.make("playground:CartpoleBalance", num_envs=2, cfg={option: value})
        assert "\n" not in str(caught.value)


@needs_playground
def test_playground_tasks_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_playground.py").write_text(
        "import functools\n"
        "from mujoco_playground import dm_control_suite, locomotion\n"
        "from mujoco_playground._src.dm_control_suite.cartpole import Balance, default_config\n"
        "for suite, name in ((dm_control_suite, 'Mine'), (locomotion, 'Legged')):\n"
        "    suite.register_environment(name, functools.partial(Balance, swing_up=True, sparse=False), default_config)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert envs.defaults("playground:my_playground:Legged")["experiment_name"] == "Legged"
    assert envs.defaults("playground:my_playground:Mine") == envs.defaults("playground:CartpoleBalance")
    env = envs.make("playground:my_playground:Mine", num_envs=2)
    assert env.num_actions == 1 and "swing_up" in env.task._reset_randomize.__name__ and check(env) == []
    with pytest.raises(ValueError, match="playground:my_playground:Other: there is no such task; there are .*Mine"):
        envs.make("playground:my_playground:Other", num_envs=2)


@needs_playground
def test_playground_trains():
    env = envs.make("playground:CartpoleBalance", num_envs=256, cfg={"episode_length": 250})
    assert best(train("playground:CartpoleBalance", env, max_iterations=200)) > 200.0  # of 250; at first 90


# ---- Genesis ----


@needs_genesis
def test_genesis_tasks_of_ones_own_and_options(tmp_path, monkeypatch):
    (tmp_path / "my_genesis.py").write_text(
        "from envs.genesis import TASKS, Go2\n"
        "class Mine(Go2):\n"
        "    def __init__(self, num_envs, device, seed, play, terminations, kp=30.0):\n"
        "        self.built = num_envs, device, seed, play, terminations, kp\n"
        "TASKS['mine'] = Mine, {'gamma': 0.98}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert envs.defaults("genesis:my_genesis:mine") == {"gamma": 0.98}
    made = envs.make("genesis:my_genesis:mine", num_envs=2, seed=3, cfg={"kp": 5.0}, terminations=False)
    assert made.built == (2, "cpu", 3, False, False, 5.0)
    for task, option, said in (("go2", "comand", "there are command"), ("my_genesis:mine", "num_envs", "there are kp")):
        with pytest.raises(ValueError, match=f"--env-cfg {option}: there is no such option; {said}"):
            envs.make(f"genesis:{task}", num_envs=2, cfg={option: 1})
    with pytest.raises(ValueError, match="genesis:my_genesis:other: there is no such task; there are go2, mine"):
        envs.make("genesis:my_genesis:other", num_envs=2)


@needs_genesis
def test_genesis_conforms_and_trains():
    """One test: Genesis compiles for a minute, and may be initialised once in a process."""
    env = envs.make("genesis:go2", num_envs=256, cfg={"command": [0.5, 0, 0], "kp": 20, "episode_length_s": 20})
    assert check(env) == [] and env.max_episode_length == 1000 and env.command[0].tolist() == [0.5, 0.0, 0.0]
    assert env.robot.get_dofs_kp(env.motors).flatten()[0] == 20.0
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
