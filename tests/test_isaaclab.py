"""Isaac Lab, the real packages: 2.3.2's environments, managers, wrapper and tasks on a CPU, on stand-ins of Isaac Sim's modules and
without physics; 3.0.0's Cartpole with Newton's physics, on a CPU, with no stand-in. Each has to have an environment of its own.
"""

import copy
import glob
import importlib.metadata
import importlib.util
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import isaaclab_stand_ins as stand_ins
import pytest
import torch

import envs
import envs.settings
from envs.check import check, examine
from envs.settings import OWN, from_rsl_rl

try:
    VERSION = importlib.metadata.version("isaaclab")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""
PYTHON_3_11 = (
    'needs, with Python 3.11: pip install -e ".[test]" gymnasium==1.2.0 toml flatdict prettytable trimesh scipy h5py hidapi '
    "warp-lang opencv-python-headless && pip install --no-deps isaaclab==2.3.2.post1"
)
PYTHON_3_12 = (
    'needs, with Python 3.12: pip install -e ".[test]" gymnasium "newton[sim]==1.6.1" warp-lang==1.17.0 usd-core newton-usd-schemas '
    "lazy_loader hydra-core rich prettytable trimesh scipy h5py botocore filelock && pip install --no-deps isaaclab==3.0.0"
)
needs_2 = pytest.mark.skipif(not VERSION.startswith("2."), reason=PYTHON_3_11)
needs_3 = pytest.mark.skipif(not VERSION.startswith("3."), reason=PYTHON_3_12)
needs_any = pytest.mark.skipif(not VERSION, reason=f"{PYTHON_3_11}; or {PYTHON_3_12}")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Isaac Lab, and a module of a user's own that registers tasks. What its app changes in this process is put back."""
    before = {name: list(getattr(sys, name)) for name in ("path", "meta_path", "argv")}
    modules, stdout, environ, root = set(sys.modules), sys.stdout, dict(os.environ), logging.getLogger()
    handlers, level, signals = list(root.handlers), root.level, (signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV)
    callbacks = {number: signal.getsignal(number) for number in signals}
    sys.path.insert(0, str(tmp_path_factory.mktemp("modules")))
    pathlib.Path(sys.path[0], "my_tasks.py").write_text(MY_TASKS)
    if VERSION.startswith("2."):
        stand_ins.install()
        # Kit puts Isaac Lab's folders on the path; the wheel's own isaaclab/__init__.py has none of its modules.
        wheel = pathlib.Path(importlib.util.find_spec("isaaclab").origin).parent
        sys.path[:0] = glob.glob(f"{wheel}/source/*")
    yield
    for name, value in before.items():
        getattr(sys, name)[:] = value
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in (*stand_ins.ROOTS, "my_tasks") or "isaaclab" in name:
            del sys.modules[name]
    sys.stdout, root.handlers[:] = stdout, handlers
    root.setLevel(level)
    for number, callback in callbacks.items():
        signal.signal(number, callback or signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environ)


MY_TASKS = """
import isaaclab_stand_ins
isaaclab_stand_ins.register()
"""
if VERSION.startswith("3."):
    MY_TASKS = """
import gymnasium
kwargs = {"env_cfg_entry_point": "isaaclab_tasks.core.cartpole.cartpole_manager_env_cfg:CartpoleEnvCfg"}
gymnasium.register("My-Cartpole", "isaaclab.envs:ManagerBasedRLEnv", kwargs=kwargs)

from isaaclab.envs.mdp import JointEffortActionCfg, JointPositionActionCfg
from isaaclab.utils import configclass
from isaaclab_tasks.core.cartpole.cartpole_manager_env_cfg import CartpoleEnvCfg

@configclass
class Actions:
    pole = JointPositionActionCfg(asset_name="robot", joint_names=["cart_to_pole"], scale={".*pole": 0.25})
    cart = JointEffortActionCfg(asset_name="robot", joint_names=["slider_to_cart"], scale=100.0)

@configclass
class TwoActions(CartpoleEnvCfg):
    actions = Actions()

gymnasium.register("My-Two-Actions", "isaaclab.envs:ManagerBasedRLEnv", kwargs={"env_cfg_entry_point": TwoActions})
"""
REACH, CARTPOLE = "isaaclab:my_tasks:My-Reach-v0", "isaaclab:Isaac-Cartpole"


def train(module, environment, **settings):
    common = dict(env=REACH, num_envs=8, num_steps_per_env=60, max_iterations=2, num_mini_batches=2, actor_hidden_dims=(8,))
    common |= dict(critic_hidden_dims=(8,), device="cpu", logger="none", log_root="", save_interval=1)
    return module.train(module.Args(**common | settings), environment)


# ---- Both ----


@needs_any
def test_unknown_task(lab):
    near = "Isaac-Velocity-Flat-Anymal-D-v0" if VERSION.startswith("2.") else "Isaac-Velocity-Flat-AnymalD"
    for ask in (envs.defaults, lambda env_id: envs.make(env_id, num_envs=2, device="cpu")):
        with pytest.raises(ValueError, match=r"^isaaclab:Nope: there is no such task; near it are \S+, \S+, \S+$"):
            ask("isaaclab:Nope")
        with pytest.raises(ValueError, match=f"near it are.* {near}"):
            ask("isaaclab:Isaac-Velocity-Flat-Anymal-D")
        with pytest.raises(ValueError, match="there is no module nowhere"):
            ask("isaaclab:nowhere:My-Task-v0")


def leaves(part, path=()):
    for name, value in part.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        elif value is not None and value != {}:
            yield (*path, name), value


def changed(cfg, path, value):
    new = part = copy.deepcopy(cfg)
    for name in path[:-1]:
        part = part[name]
    kinds = {bool: lambda: not value, str: lambda: f"{value}x", list: lambda: [*value, 1], tuple: lambda: (*value, 1)}
    part[path[-1]] = kinds.get(type(value), lambda: value + 1)()
    return new


@needs_any
def test_every_configuration_translates_and_nothing_is_dropped_in_silence(lab, monkeypatch):
    """A script can be started with it; and another value anywhere in it changes the settings, or what is said."""
    import distill_dagger
    import ppo_cnn
    import ppo_continuous
    import ppo_rnn
    from envs import isaaclab

    isaaclab._task("Isaac-Cartpole-v0" if VERSION.startswith("2.") else "Isaac-Cartpole")
    import gymnasium

    def translate(cfg):
        said = []
        monkeypatch.setattr(envs.settings, "say", said.append)
        return from_rsl_rl(cfg), said

    # A script's own matters; the teacher's network is its checkpoint's; symmetry functions come from the environment; in the
    # layout of rsl_rl 5 a model has fields of the old one beside its distribution.
    silent = {*OWN, "data_augmentation_func", "flatten", "noise_std_type", "state_dependent_std"}
    kinds, count = set(), 0
    for task, spec in gymnasium.registry.items():
        for key in [key for key in spec.kwargs if key.startswith("rsl_rl") and key.endswith("cfg_entry_point")]:
            cfg = isaaclab._runner(task, key).to_dict()
            count += 1
            settings, said = translate(cfg)
            script = {"student_hidden_dims": distill_dagger, "rnn_type": ppo_rnn, "cnn_output_channels": ppo_cnn}
            module = next((module for name, module in script.items() if name in settings), ppo_continuous)
            fields = {name: value for name, value in settings.items() if name in module.Args.__dataclass_fields__}
            module.check_settings(module.Args(**fields))
            assert settings.keys() - fields.keys() <= {"share_cnn_encoders", *envs.settings.SYMMETRY}
            kinds.add(module.__name__)
            networks = "student_hidden_dims" if module is distill_dagger else "actor_hidden_dims"
            assert networks in fields and "activation" in fields and "learning_rate" in fields and "init_std" in fields
            for path, value in leaves(cfg):
                pooled = path[-1] == "global_pool" and "SpatialSoftmax" in cfg["actor"]["class_name"]  # which forces it off
                if path[-1] not in silent and "teacher" not in path[0] + path[-1] and not pooled:
                    assert translate(changed(cfg, path, value)) != (settings, said), (task, key, path)
    assert count > 90 and {"ppo_continuous", "ppo_rnn", "distill_dagger"} <= kinds


@needs_any
def test_every_symmetry_function_works_with_ours(lab):
    """`compute_symmetric_states` of each robot that has one, on random observations of that robot's sizes."""
    import ppo_symmetry
    from envs import isaaclab

    isaaclab._task("Isaac-Cartpole-v0" if VERSION.startswith("2.") else "Isaac-Cartpole")
    import gymnasium

    names = set()
    for task, spec in gymnasium.registry.items():
        if "rsl_rl_with_symmetry_cfg_entry_point" not in spec.kwargs or task.startswith("My-"):
            continue
        size, actions, terms = (4, 1, []) if "Cartpole" in task else (48, 12, [])
        if "Rough" in task:
            size, terms = 235, ["height_scan"]
        manager = SimpleNamespace(active_terms={"policy": terms})
        joints = [f"{leg}_{joint}" for leg in ("LF", "LH", "RF", "RH") for joint in ("HAA", "HFE", "KFE")]
        scene = {"robot": SimpleNamespace(joint_names=joints)}
        env = SimpleNamespace(num_envs=16, num_actions=actions, observation_manager=manager, scene=scene, spec=spec)
        env.unwrapped, env.get_observations = env, lambda: None
        env = isaaclab.IsaacLabEnv(env)
        obs = torch.randn(16, size)
        mirror = ppo_symmetry.make_symmetry(env, ppo_symmetry.TensorDict({"policy": obs}, [16]), ppo_symmetry.Args())
        images, _ = mirror(obs=ppo_symmetry.TensorDict({"policy": obs}, [16]), actions=None)
        assert len(images) in (32, 64) and torch.equal(images["policy"][:16], obs)
        names.add(env.symmetry.__module__)
    assert len(names) == 2  # cartpole's and anymal's


@needs_any
@pytest.mark.parametrize(
    "option, said",
    [
        ({"scene.num_envs": 8}, "say --num-envs"),
        ({"seed": 8}, "say --seed"),
        ({"sim.device": "cuda"}, "say --device"),
        ({"rewards.alve.weight": 1.0}, "rewards.alve.weight: there is no alve; there are .*"),
        ({"episode_length_s": "long"}, "'long' is str; there is .* of "),
    ],
)
def test_options_that_cannot_be(lab, option, said):
    task = REACH if VERSION.startswith("2.") else CARTPOLE
    with pytest.raises(ValueError, match=said) as caught:
        envs.make(task, num_envs=2, device="cpu", cfg=option)
    assert str(caught.value).startswith("--env-cfg ") and "\n" not in str(caught.value)


# ---- Isaac Lab 2 ----


def makes(task, **usual):
    """A fixture that makes environments, and closes them: Isaac Lab has one simulation at a time."""

    @pytest.fixture
    def fixture(lab):
        made = []

        def make(task=task, **options):
            made.append(envs.make(task, **{"num_envs": 8, "device": "cpu", "seed": 3} | options))
            return made[-1]

        yield make
        for env in made:
            env.close()

    return fixture


reach, cartpole = makes(REACH), makes(CARTPOLE)


@needs_2
def test_conforms(reach):
    env = reach()
    assert type(env.env).__module__ == "isaaclab_rl.rsl_rl.vecenv_wrapper" and env.export_metadata() == {}, "no robot"
    (config, early), *more = stand_ins.SimulationApp.started
    assert config["headless"] and early == [] and more == [], "Isaac Sim starts once, before anything of Isaac Lab"
    report = examine(env)
    assert report.errors == [] and len(report.notes) == 1 and "final_obs" in report.notes[0], "which 2.3.2 does not have"
    assert check(env.env) != [], "the wrapper draws noise when it is read, and has one buffer for its rewards"
    assert env.step_dt == 0.02 and env.max_episode_length == 50 and env.num_actions == 2


@needs_2
def test_seed(reach):
    def first(seed):
        env = reach(seed=seed)
        steps = [env.step(torch.ones(8, 2))[0]["policy"] for _ in range(60)]
        env.close()
        return torch.stack(steps)

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


@needs_2
def test_options(reach):
    env = reach(cfg={"rewards.near.weight": 3, "episode_length_s": 2, "terminations.far": None})
    assert env.cfg.rewards.near.weight == 3.0 and env.max_episode_length == 100
    assert env.unwrapped.termination_manager.active_terms == ["time_out"]
    env.close()
    with pytest.raises(ValueError, match="--env-cfg physics: there is no physics; there are"):
        reach(cfg={"physics": "newton_mjwarp"})


@needs_2
def test_play_variant(reach):
    env = reach(play=True, cfg={"episode_length_s": 2.0, "curriculum.steps": None})
    assert env.cfg.curriculum is None, "an option of what only training has"
    assert env.max_episode_length == 100
    assert env.unwrapped.spec.id == "My-Reach-Play-v0"
    obs = env.get_observations()
    assert torch.equal(obs["policy"], obs["critic"]), "no noise"
    with pytest.raises(ValueError, match="--no-terminations"):
        reach(play=True, terminations=False)


@needs_2
def test_trains_and_resumes_with_the_curriculum_where_it_was(reach, monkeypatch):
    import ppo_continuous

    env = reach()
    history = train(ppo_continuous, env, log_root="logs")
    assert env.unwrapped.common_step_counter == 120 and env.state_dict() == {"common_step_counter": 120}
    assert math.isfinite(history[-1]["Train/mean_reward"]) and history[-1]["Curriculum/steps"] > 60
    env.close()
    new = reach()
    assert new.unwrapped.common_step_counter == 0
    train(ppo_continuous, new, log_root="logs", resume=True, max_iterations=3)
    assert new.unwrapped.common_step_counter == 180


@needs_2
def test_trains_with_the_symmetry_of_the_task(reach):
    import ppo_symmetry

    env = reach()
    assert env.symmetry.__name__ == "compute_symmetric_states"
    history = train(ppo_symmetry, env, critic_obs=("policy",), use_mirror_loss=True)
    assert math.isfinite(history[-1]["Loss/symmetry"])


@needs_2
def test_settings_are_the_tasks_own(lab):
    settings = envs.defaults("isaaclab:Isaac-Cartpole-v0")
    assert settings["num_steps_per_env"] == 16 and settings["actor_hidden_dims"] == (32, 32) and settings["init_std"] == 1.0
    students = envs.defaults("isaaclab:Isaac-Velocity-Flat-Anymal-D-v0")["distillation"]
    assert students["student_hidden_dims"] == (128, 128, 128)
    assert envs.defaults("isaaclab:Isaac-Cartpole-RGB-v0") == {}, "it has none for rsl_rl"


# ---- Isaac Lab 3 ----


@pytest.fixture
def local(tmp_path):
    """Newton brings the robot; the wheel would download it, and the ground."""
    folder = pathlib.Path(importlib.util.find_spec("newton").origin).parent / "examples/assets"
    robot = tmp_path / "cartpole.usda"
    text = (folder / "cartpole_single_pendulum.usda").read_text()
    robot.write_text(text.replace('defaultPrim = "cartPole"', 'defaultPrim = "cartpole"'))
    return {"scene.ground": None, "scene.robot.spawn.usd_path": str(robot)}


@needs_3
def test_newton_conforms_without_isaac_sim(cartpole, local):
    env = cartpole(cfg=local)
    assert type(env.env).__module__ == "isaaclab_rl.rsl_rl.vecenv_wrapper"
    assert not any(name.startswith(("omni.kit", "isaacsim")) for name in sys.modules)
    report = examine(env)
    assert report.errors == [] and report.notes == []
    assert check(env.env) != [], "the wrapper has one buffer for its rewards"


@needs_3
def test_final_obs_is_the_true_last_one(cartpole, local):
    """Of two environments that do the same, one times out: its last observation is what the other has now."""
    starts = {
        f"events.reset_{part}_position.params.{x}_range": [0, 0] for part in ("cart", "pole") for x in ("position", "velocity")
    }
    env = cartpole(cfg=local | starts)
    env.episode_length_buf = torch.zeros_like(env.episode_length_buf)
    env.episode_length_buf[3] = env.max_episode_length - 5
    for _ in range(5):
        obs, _, dones, extras = env.step(torch.ones(8, 1))
    assert dones.tolist() == extras["time_outs"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert torch.allclose(extras["final_obs"]["policy"][3], obs["policy"][2], atol=1e-6)
    assert obs["policy"][2].abs().max() > 0.01 and obs["policy"][3].abs().max() == 0.0


@needs_3
def test_newton_trains_and_resumes_with_the_curriculum_where_it_was(cartpole, local):
    import ppo_continuous

    env = cartpole(cfg=local)
    settings = {"env": CARTPOLE, "num_steps_per_env": 16, "log_root": "logs"}
    history = train(ppo_continuous, env, **settings)
    assert env.state_dict() == {"common_step_counter": 32} and math.isfinite(history[-1]["Loss/value"])
    env.close()
    new = cartpole(cfg=local)
    train(ppo_continuous, new, **settings, resume=True, max_iterations=3)
    assert new.unwrapped.common_step_counter == 48


@needs_3
def test_training_with_newton_equals_rsl_rl(lab, local):
    """5.5.1, with the task's own settings: to the last bit."""
    import reference

    import ppo_continuous

    settings = envs.defaults(CARTPOLE, ppo_continuous.Args.__dataclass_fields__)
    settings |= dict(env=CARTPOLE, seed=3, device="cpu", log_root="", num_envs=64, max_iterations=6, timeout_bootstrap="value")
    args = ppo_continuous.Args(**settings)
    reference.assert_equal(ppo_continuous, args, lambda: envs.make(CARTPOLE, num_envs=64, device="cpu", seed=3, cfg=local))


@needs_3
def test_play_mode_and_a_task_of_ones_own(cartpole, local):
    env = cartpole("isaaclab:my_tasks:My-Cartpole", num_envs=60, cfg=local, play=True)
    assert env.num_envs == 60 and env.unwrapped.spec.id == "My-Cartpole", "play_mode() takes 50 at most"
    assert env.render() is None
    assert envs.defaults("isaaclab:my_tasks:My-Cartpole") == {}
    assert envs.defaults(CARTPOLE)["actor_hidden_dims"] == (32, 32)


@needs_3
def test_what_a_robots_runner_has_to_know(cartpole, local):
    cart, pole = "scene.robot.actuators.cart_actuator", "scene.robot.init_state.joint_pos"
    env = cartpole("isaaclab:my_tasks:My-Two-Actions", cfg=local | {f"{cart}.stiffness": 3.0, f"{pole}.cart_to_pole": 0.5})
    gains = env.unwrapped.scene["robot"].actuators["cart_actuator"].stiffness
    gains += 1.0  # as an event that randomises them may have
    assert env.export_metadata() == {
        "joint_names": ["slider_to_cart", "cart_to_pole"], "default_joint_pos": [0.0, 0.5], "joint_stiffness": [3.0, 0.0],
        "joint_damping": [10.0, 0.0], "command_names": [], "observation_names": ["joint_pos_rel", "joint_vel_rel"],
        "action_joint_names": ["cart_to_pole", "slider_to_cart"], "action_scale": [0.25, 100.0], "action_offset": [0.5, 0.0],
    }  # fmt: skip


@needs_3
def test_gains_are_the_configured_ones(lab):
    from envs.isaaclab import _gains

    part = SimpleNamespace(joint_names=["hip", "knee"], stiffness=torch.tensor([[7.0, 8.0]]), cfg=SimpleNamespace())
    for said, gains in (({"k.*": 20, "hip": 10.0}, [10.0, 20.0]), (5, [5.0, 5.0]), (None, [7.0, 8.0])):
        part.cfg.stiffness = said
        assert _gains(part, "stiffness") == dict(zip(part.joint_names, gains))


@needs_3
def test_physics_can_be_chosen(cartpole, local):
    with pytest.raises(SystemExit):  # PhysX needs Isaac Sim, as Isaac Lab says before
        cartpole(cfg=local | {"physics": "isaacsim_physx"})
    with pytest.raises(ValueError, match=r"^--env-cfg physics=nope: Unknown preset\(s\): nope .*newton_mjwarp") as caught:
        cartpole(cfg=local | {"physics": "nope"})
    assert "\n" not in str(caught.value)


@needs_3
def test_newton_from_the_command_line(local, tmp_path):
    """With the task's own settings."""
    script = pathlib.Path(envs.__file__).parents[1] / "ppo_continuous.py"
    options = ["--env", CARTPOLE, "--env-cfg", *(f"{name}={value}".replace("None", "null") for name, value in local.items())]
    run = [sys.executable, script, *options, "--num-envs", "16", "--max-iterations", "2", "--device", "cpu"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "iteration 1/2  512 env steps" in done.stdout, done.stderr


# ---- Settings ----


def test_settings_of_both_layouts():
    model = {"hidden_dims": [32], "activation": "elu", "obs_normalization": False}
    distribution = {"class_name": "HeteroscedasticGaussianDistribution", "init_std": 0.5, "std_type": "log"}
    memory = {"rnn_type": "gru", "rnn_hidden_dim": 64, "rnn_num_layers": 1}
    cfg = {"obs_groups": {"actor": ("a", "b")}, "algorithm": {"gamma": 0.9}, "num_steps_per_env": 8}
    cfg |= {"actor": model | memory | {"distribution_cfg": distribution}, "critic": model | {"hidden_dims": (64, 32)}}
    assert from_rsl_rl(cfg) == {
        "num_steps_per_env": 8, "gamma": 0.9, "actor_obs": ("a", "b"), "activation": "elu", "obs_normalization": False,
        "actor_hidden_dims": (32,), "critic_hidden_dims": (64, 32), "distribution": "heteroscedastic", "init_std": 0.5,
        "std_type": "log", **memory, "rnn_type": {"actor": "gru", "critic": "none"},
    }  # fmt: skip
    assert from_rsl_rl(cfg | {"policy": {}}) == from_rsl_rl(cfg), "Isaac Lab 3 has the field of before, MISSING"
    cfg["actor"]["distribution_cfg"] = {"class_name": "rsl_rl.modules.BetaDistribution", "action_range": [-2.0, 2.0]}
    cfg["actor"]["cnn_cfg"] = {g: {"output_channels": [8, 16], "kernel_size": k} for g, k in {"depth": 3, "rgb": 5}.items()}
    settings = from_rsl_rl(cfg)
    assert settings["distribution"] == "beta" and settings["action_range"] == (-2.0, 2.0)
    assert settings["cnn_output_channels"] == (8, 16) and "cnn_kernel_size" not in settings


def test_nothing_of_a_configuration_is_dropped_in_silence(capsys):
    """What has no counterpart is printed once; Isaac Lab's MISSING, which comes as {}, is nothing that was said."""
    envs.settings.say.cache_clear()
    policy = {"class_name": "ActorCritic", "actor_obs_normalization": {}, "critic_obs_normalization": {}, "activation": "elu"}
    policy |= {"actor_hidden_dims": [32], "critic_hidden_dims": [64], "init_noise_std": 1.0, "state_dependent_std": False}
    cfg = {"policy": policy, "algorithm": {"class_name": "PPO", "gamma": 0.98}, "empirical_normalization": False, "seed": 42}
    assert from_rsl_rl(cfg)["obs_normalization"] is False and capsys.readouterr().out == ""
    cfg["algorithm"] |= {"symmetry_cfg": {"use_mirror_loss": True}, "warm_up": 5}
    cfg["policy"] |= {"actor_obs_normalization": True, "critic_obs_normalization": False, "rnn_type": {}}
    for _ in range(2):
        assert from_rsl_rl(cfg)["obs_normalization"] == {"actor": True, "critic": False}
    left = "algorithm.warm_up 5, algorithm.symmetry_cfg (run ppo_symmetry.py)"
    assert capsys.readouterr().out == f"the task's configuration also says, and no setting here does: {left}\n"

    model = {"class_name": "MLPModel", "hidden_dims": [32], "activation": "elu", "obs_normalization": True}
    normal = {"class_name": "GaussianDistribution", "init_std": 0.5, "std_range": [0.1, 2.0]}
    cfg = {"actor": model | {"distribution_cfg": normal}, "critic": model | {"activation": "relu"}, "algorithm": {}}
    settings = from_rsl_rl(cfg | {"init_at_random_ep_len": False})
    assert settings["init_at_random_ep_len"] is False and settings["activation"] == {"actor": "elu", "critic": "relu"}
    left = "actor.distribution_cfg.std_range [0.1, 2.0]"
    assert capsys.readouterr().out.endswith(f"does: {left}\n")

    normal = {"class_name": "GaussianDistribution", "init_std": 0.5, "std_range": [1e-6, 1e6]}  # rsl_rl's own range, and ours
    sees = model | {"class_name": "my.models:Mine", "cnn_cfg": {"output_channels": [8], "activation": "relu", "flatten": True}}
    cfg = {"actor": sees | {"distribution_cfg": normal}, "critic": model | {"heads": 3}, "algorithm": {}, "check_for_nan": True}
    assert from_rsl_rl(cfg)["cnn_output_channels"] == (8,)
    left = "actor.class_name my.models:Mine, actor.cnn_cfg.activation relu, critic.heads 3"
    assert capsys.readouterr().out.endswith(f"does: {left}\n")


def test_settings_for_distillation():
    policy = {"class_name": "StudentTeacher", "student_hidden_dims": [128], "teacher_hidden_dims": [64], "activation": "elu"}
    policy |= {"student_obs_normalization": False, "teacher_obs_normalization": False, "init_noise_std": 0.1}
    groups = {"policy": ["policy"], "teacher": ["policy", "privileged"]}
    cfg = {"policy": policy, "algorithm": {"class_name": "Distillation", "gradient_length": 15, "loss_type": "mse"}}
    assert from_rsl_rl(cfg | {"obs_groups": groups}) == {
        "student_hidden_dims": (128,), "activation": "elu", "obs_normalization": False, "init_std": 0.1, "gradient_length": 15,
        "loss_type": "mse", "student_obs": ("policy",), "teacher_obs": ("policy", "privileged"),
    }  # fmt: skip
