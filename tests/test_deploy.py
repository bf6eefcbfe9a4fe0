"""What reaches a robot: exported policies with what their runners must know; and the options of a task, and defaults, of one's own."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy
import yaml

import ppo_cnn
import ppo_continuous as module
import ppo_rnn
from envs import make

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
TINY = dict(env="cartpole", num_envs=16, num_steps_per_env=8, max_iterations=2, actor_hidden_dims=(8,), critic_hidden_dims=(8,))
TINY |= dict(device="cpu", logger="none")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module.say.cache_clear()


@pytest.fixture
def no_export(monkeypatch):
    monkeypatch.setattr(module, "export_policy", lambda *_: None)


def args_of(**settings):
    return module.Args(**(TINY | settings))


def session_of(run_dir):
    return onnxruntime.InferenceSession(run_dir / "exported" / "policy.onnx", providers=["CPUExecutionProvider"])


class Robot(toy.Toy):
    """Clips its actions, and knows something that its runner has to know."""

    action_bounds, step_dt = (-0.4, 0.6), 0.02

    def export_metadata(self):
        return {"joint_names": ["hip", "knee"], "stiffness": [20.0, 40.0]}


def test_what_a_robots_runner_finds():
    """One robot at a time, in shapes without unknowns, by a version of the format that older runtimes read; facts beside it."""
    run_dir = module.train(args_of(env="toy:make"), Robot()).run_dir
    model = onnx.load(run_dir / "exported" / "policy.onnx")
    assert model.ir_version <= 9 and max(x.version for x in model.opset_import) == 18
    session = session_of(run_dir)
    assert [x.shape for x in (*session.get_inputs(), *session.get_outputs())] == [[1, 1], [1, 1]]
    told = session.get_modelmeta().custom_metadata_map
    expected = dict(joint_names="hip,knee", stiffness="20.0,40.0", action_bounds="-0.4,0.6", step_dt="0.02", iteration="1")
    expected |= dict(observation_groups="policy", observation_shapes="1", distribution="Gaussian", script="ppo_continuous.py")
    assert expected.items() <= told.items() and len(told["git_commit"]) in (0, 40)
    written = yaml.safe_load((run_dir / "exported" / "policy.yaml").read_text())
    assert written["joint_names"] == ["hip", "knee"] and written["action_bounds"] == [-0.4, 0.6] and written["step_dt"] == 0.02


@pytest.mark.parametrize("clip, bounds", [(None, (-0.4, 0.6)), (0.5, (-0.4, 0.5)), (0.1, (-0.1, 0.1))])
def test_what_was_trained_is_what_runs(clip, bounds, monkeypatch):
    """A policy that was trained with its actions clipped sends no others: loaded, exported, played."""
    args, env = args_of(env="toy:make", clip_actions=clip), Robot()
    run_dir = module.train(args, env).run_dir
    path = run_dir / "model_1.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["actor_state_dict"]["mlp.2.weight"] *= 1000.0
    torch.save(checkpoint, path)
    module.export_checkpoint(path, module.Args())  # of other settings: the checkpoint has its own
    obs = torch.linspace(-1.0, 1.0, 9)[:, None]
    outputs = [module.load_policy(path).act({"policy": obs})]
    outputs.append(torch.as_tensor(np.concatenate([session_of(run_dir).run(None, {"obs": x[None].numpy()})[0] for x in obs])))
    outputs.append(torch.cat([torch.jit.load(run_dir / "exported" / "policy.pt")(x[None]) for x in obs]))
    for actions in outputs:
        assert (actions.min().item(), actions.max().item()) == pytest.approx(bounds)
    seen, step = [], Robot.step
    monkeypatch.setattr(Robot, "step", lambda self, actions: seen.append(actions.clone()) or step(self, actions))
    module.play(dataclasses.replace(args, clip_actions=None, checkpoint=str(path)), Robot())
    assert seen and all(bounds[0] <= x.min() and x.max() <= bounds[1] for x in seen)


SCRIPTS = {
    "mlp": (module, dict(env="cartpole")),
    "lstm": (ppo_rnn, dict(env="cartpole", rnn_type="lstm", rnn_hidden_dim=8)),
    "cnn": (ppo_cnn, dict(env="navigation-pixels", cnn_output_channels=(2, 2), num_steps_per_env=2, num_envs=4)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_thousand_single_steps(name):
    """Of one robot, which remembers: ONNX, TorchScript and load_policy, with episodes that end now and then."""
    script, settings = SCRIPTS[name]
    args = script.Args(**TINY | dict(num_mini_batches=2, max_iterations=1) | settings)
    env = make(args.env, args.num_envs)
    run_dir = script.train(args, env).run_dir
    session, traced = session_of(run_dir), torch.jit.load(run_dir / "exported" / "policy.pt")
    policy, example = script.load_policy(run_dir / "model_0.pt"), env.get_observations()[:1]
    states = {x.name: np.zeros(x.shape, np.float32) for x in session.get_inputs() if x.name in ("h_in", "c_in")}
    assert len(states) == (2 if name == "lstm" else 0)
    seen = []
    for step in range(1000):
        obs = example.apply(lambda x: torch.randint_like(x, 255) if x.dtype == torch.uint8 else torch.randn_like(x))
        inputs = policy.actor.inputs(obs)
        actions, *after = session.run(None, {key: x.numpy() for key, x in inputs.items()} | states)
        expected = policy.act(obs)
        for other in (torch.as_tensor(actions), traced(*inputs.values())):
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)
        states = dict(zip(states, after))
        if step % 130 == 129:
            policy.reset()
            traced.reset()
            states = {key: np.zeros_like(x) for key, x in states.items()}
        seen.append(expected)
    assert torch.cat(seen).std() > 1e-3


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_number_of_robots(name):
    """--export-batch: three at once as one by one."""
    script, settings = SCRIPTS[name]
    args = script.Args(**TINY | dict(num_mini_batches=2, max_iterations=1, export_batch=True) | settings)
    run_dir = script.train(args, make(args.env, args.num_envs)).run_dir
    session = session_of(run_dir)
    feed = {}
    for x in session.get_inputs():
        shape = [3 if isinstance(size, str) else size for size in x.shape]
        assert shape.count(3) >= 1, x.shape
        feed[x.name] = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8 if "uint8" in x.type else np.float32)
    together = session.run(None, feed)
    axis = {x.name: next(i for i, size in enumerate(x.shape) if isinstance(size, str)) for x in session.get_inputs()}
    for robot in range(3):
        alone = session.run(None, {key: x.take([robot], axis[key]) for key, x in feed.items()})
        for part, of_all, dim in zip(alone, together, [0, 1, 1]):
            np.testing.assert_allclose(part, of_all.take([robot], dim), atol=1e-5)


@pytest.mark.parametrize("bounds", [1, "wide", [0.0], ["a", "b"]], ids=str)
def test_bounds_that_are_none(bounds, no_export):
    path = module.train(args_of(), make("cartpole", 16)).run_dir / "model_1.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["resume"]["action_bounds"] = bounds
    torch.save(checkpoint, path)
    with pytest.raises(module.UserError, match="its policy cannot be built"):
        module.load_policy(path)


def test_an_action_range_outside_of_the_bounds(no_export):
    settings = dict(env="toy:make", distribution="beta", action_range=(-2.0, 2.0))
    with pytest.raises(
        module.UserError, match=r"^--action-range \(-2.0, 2.0\): the environment's actions lie between -0.4 and 0.6"
    ):
        module.train(args_of(**settings), Robot())
    module.train(args_of(**settings | dict(action_range=(-0.4, 0.5))), Robot())


def test_gymnasiums_bounds():
    pytest.importorskip("gymnasium")
    env = make("gym:Pendulum-v1", 2)
    assert env.action_bounds == (-1.0, 1.0) and env.export_metadata()["high"] == [2.0]


# ---- Checkpoints ----


def test_the_best_is_kept(no_export):
    """Of Train/mean_reward: where it was largest so far. What is no metric is said before a second iteration."""
    history = module.train(args_of(env="toy:make", max_iterations=9, save_best="Train/mean_reward"), toy.Toy(16))
    values = [x["Train/mean_reward"] for x in history]
    best = max(range(9), key=lambda i: (not math.isnan(values[i]), values[i]))
    assert torch.load(history.run_dir / "model_best.pt", weights_only=True)["iter"] == best
    with pytest.raises(module.UserError, match="^--save-best reward: no such metric; there are .*Train/mean_reward"):
        module.train(args_of(save_best="reward"), make("cartpole", 16))


def test_a_critic_to_start_from(no_export, capsys):
    """Actor and critic of one checkpoint, or of two; the optimizer is new. A resumed run has its own."""
    first, second = (module.train(args_of(seed=seed), make("cartpole", 16)).run_dir / "model_1.pt" for seed in (1, 2))
    taken, load = [], module.load

    def noted(agent, *rest):
        start = load(agent, *rest)
        taken.append(
            {name: {k: x.clone() for k, x in getattr(agent, name).state_dict().items()} for name in ("actor", "critic")}
        )
        assert start == 0 and not agent.optimizer.state
        return start

    for actor, critic in ((first, first), (first, second)):
        module.load = noted
        try:
            module.train(args_of(checkpoint=str(actor), critic_checkpoint=str(critic)), make("cartpole", 16))
        finally:
            module.load = load
        for name, path in (("actor", actor), ("critic", critic)):
            saved = torch.load(path, weights_only=True)[f"{name}_state_dict"]
            assert all(torch.equal(x, saved[key]) for key, x in taken[-1][name].items())
    more = dict(max_iterations=5, save_best="Loss/kl", film=False)  # nothing that is learned changes by these
    module.train(args_of(resume=True, critic_checkpoint=str(first), **more), make("cartpole", 16))
    assert "starting from the critic" not in capsys.readouterr().out.split("resuming")[1], "it has a critic of its own"


class Curriculum(toy.Toy):
    """As mjlab's and Isaac Lab's: how far it has come is all that it can say of itself."""

    steps_done = 0

    def step(self, actions):
        self.steps_done += 1
        return super().step(actions)

    def state_dict(self):
        return {"common_step_counter": self.steps_done}

    def load_state_dict(self, state):
        self.steps_done = state["common_step_counter"]
        return False


def test_a_curriculum_goes_on(no_export):
    """Where mjlab's runner writes and reads it, in a run of ours and in one of rsl_rl's that is continued here."""
    path = module.train(args_of(env="toy:make"), Curriculum(16)).run_dir / "model_1.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["infos"] == {"env_state": {"common_step_counter": 16}}
    del checkpoint["resume"]
    torch.save(checkpoint, "theirs.pt")
    for source in (str(path), "theirs.pt"):
        env = Curriculum(16)
        module.train(args_of(env="toy:make", max_iterations=3, resume=True, checkpoint=source), env)
        assert env.steps_done == 16 + 8
    env = Curriculum(24)  # with more environments
    module.train(args_of(env="toy:make", max_iterations=3, resume=True, checkpoint=str(path)), env)
    assert env.steps_done == 16 + 8


# ---- Options and defaults ----


def of_my_own(num_envs, device, seed, limit=20, groups=("policy",)):
    env = toy.Toy(num_envs, device, seed, tuple(groups))
    env.max_episode_length = limit
    env.cfg = dict(limit=limit)
    return env


of_my_own.defaults = dict(num_envs=24, gamma=0.9)


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *flags])
    module.main()


SMALL_FLAGS = ["--device", "cpu", "--max-iterations", "1", "--logger", "none", "--actor-hidden-dims", "8"]


def test_a_function_of_ones_own_with_options_and_defaults(no_export, monkeypatch, capsys):
    """They are among the run's settings, and --play repeats them, unless they are given anew."""
    mine = ["--env", "test_deploy:of_my_own", *SMALL_FLAGS]
    run_main(monkeypatch, *mine, "--env-cfg", "limit=7", "groups=[policy, other]", "--gamma", "0.8")
    (path,) = module.experiment_dir(module.Args(env="test_deploy:of_my_own")).glob("*/model_0.pt")
    saved = torch.load(path, weights_only=True)["resume"]["args"]
    assert (saved["num_envs"], saved["gamma"], tuple(saved["env_cfg"])) == (24, 0.8, ("limit=7", "groups=[policy, other]"))
    capsys.readouterr()
    for more, length in (([], "episode_length 7.000"), (["--env-cfg", "limit=5"], "episode_length 5.000")):
        run_main(monkeypatch, *mine, "--play", "--play-envs", "2", "--no-film", *more)
        assert length in capsys.readouterr().out
    assert not list(path.parent.glob("play_*"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--env", "test_deploy:of_my_own", "--env-cfg", "limits=7"],
            "has no parameter limits, but num_envs, device, seed, limit",
        ),
        (
            ["--env", "test_deploy:of_my_own", "--env-cfg", "limit"],
            "--env-cfg limit: must be name=value, where the value is YAML",
        ),
        (["--env", "test_deploy:of_my_own", "--env-cfg", "limit=[1"], "--env-cfg limit=[1: must be name=value"),
        (["--env", "quadruped", "--env-cfg", "terrian=rough"], "--env-cfg terrian: there is no such option; there are terrain"),
        (["--env", "quadruped", "--env-cfg", "terrain=steep"], 'terrain is "steep"; there are "flat" and "rough"'),
    ],
)
def test_wrong_options(flags, said, monkeypatch):
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, *flags, *SMALL_FLAGS)
    assert str(error.value).startswith("error: ") and said in str(error.value) and "\n" not in str(error.value)


def test_wrong_defaults(monkeypatch):
    monkeypatch.setattr(of_my_own, "defaults", dict(gama=0.9))
    with pytest.raises(
        SystemExit, match="^error: --env test_deploy:of_my_own: its defaults must be settings of ppo_continuous.py"
    ):
        run_main(monkeypatch, "--env", "test_deploy:of_my_own", *SMALL_FLAGS)


def test_options_of_a_built_in_task(no_export):
    assert module.make_env(args_of(env="quadruped", env_cfg=("terrain=rough",))).rough


def test_an_environment_that_never_starts_anew(no_export, capsys):
    """It is done in every step from its first time-out on."""
    env = toy.Toy(16)
    env.step = lambda actions, step=env.step: (*step(actions)[:2], torch.ones(16, dtype=torch.bool), {})
    module.train(args_of(env="toy:make"), env)
    assert capsys.readouterr().out.count("each episode has lasted one step: does env.step start anew") == 1


def test_facts_of_a_run_stand_beside_it(no_export):
    run_dir = module.train(args_of(), make("cartpole", 16)).run_dir
    assert json.loads((run_dir / "deploy.json").read_text()) == {"step_dt": 0.02}


def test_a_copied_script_plays_where_its_helper_is(tmp_path):
    """`--play` wants envs/record.py; alone the script says so, and trains and exports all the same."""
    script = tmp_path / "my_ppo.py"
    script.write_text(pathlib.Path(module.__file__).read_text())
    (tmp_path / "toy.py").write_text(pathlib.Path(toy.__file__).read_text())
    flags = ["--env", "toy:make", *SMALL_FLAGS, "--num-envs", "8", "--play"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "--play: needs envs/record.py, which is not beside this script" in run.stderr
