"""Runs: folders, checkpoints, resuming, signals, kills, logging, export, play; and what other programs make of the files."""

import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import toy
import yaml

import ppo_continuous as module
from envs import make
from envs.cartpole import Cartpole

SCRIPT = str(pathlib.Path(module.__file__))
TINY = dict(env="cartpole", num_envs=16, max_iterations=6, actor_hidden_dims=(8,), critic_hidden_dims=(8,), logger="none")


def args_of(**settings):
    return module.Args(**(TINY | settings))


def numbers(history):
    """What must be equal: everything but times."""
    return [{k: v for k, v in metrics.items() if not k.startswith("Perf/")} for metrics in history]


def only_run(root="logs") -> pathlib.Path:
    (run,) = pathlib.Path(root).glob("*/*")
    return run


def command(*flags, script=SCRIPT):
    tiny = ["--env", "cartpole", "--num-envs", "16", "--actor-hidden-dims", "8", "--critic-hidden-dims", "8", "--device", "cpu"]
    return [sys.executable, script, *tiny, "--no-env-defaults", *flags]


def test_run_folder():
    module.train(args_of(run_name="mine", logger="tensorboard", max_iterations=2), make("cartpole", 16))
    run = only_run()
    assert run.parent.name == "ppo_continuous_cartpole" and run.name.endswith("_mine")
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert args["run_name"] == "mine" and args["actor_hidden_dims"] == [8]
    assert yaml.safe_load((run / "env.yaml").read_text())["episode_length_s"] == 10.0
    assert (run / "ppo_continuous.py").read_text() == pathlib.Path(SCRIPT).read_text()
    assert {"model_0.pt", "model_1.pt", "git.diff", "exported"} <= {file.name for file in run.iterdir()}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    wanted = {
        "Loss/value",
        "Loss/surrogate",
        "Loss/entropy",
        "Loss/learning_rate",
        "Policy/mean_std",
        "Perf/total_fps",
        "Loss/kl",
    }
    assert wanted <= set(events.Tags()["scalars"]) and len(events.Scalars("Loss/kl")) == 2


def test_nothing_is_written_without_a_log_root(tmp_path):
    module.train(args_of(log_root="", max_iterations=1), toy.Toy(16))
    assert not list(tmp_path.iterdir())


def test_users_own_environment_and_factory():
    """A minimal environment, given as an object and named on the command line."""
    history = module.train(args_of(log_root="", num_envs=999), toy.Toy(8))
    assert len(history) == 6 and history[-1]["Train/num_episodes"] > 0
    flags = ["--env", "toy:make", "--log-root", "", "--max-iterations", "1"]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(toy.__file__).parent)}
    done = subprocess.run(command(*flags), capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "iteration 1/1" in done.stdout, done.stderr


@pytest.mark.parametrize("env_id", ["toy", "cartpole", "quadruped-rough", "navigation-pixels"])
def test_an_environment_can_be_used_after_training(env_id):
    """Tensors that were made in torch.inference_mode could not be changed here. The toy binds a new state in every step."""
    env = toy.Toy(16) if env_id == "toy" else make(env_id, 16)
    args = args_of(max_iterations=2, log_root="", actor_obs=("policy",), critic_obs=("policy",))
    module.train(args, env)
    tensors = [x for x in vars(env).values() if torch.is_tensor(x)]
    for tensor in tensors:
        tensor.copy_(tensor.clone())
    obs, *_ = env.step(torch.zeros(16, env.num_actions))
    obs["policy"].add_(1.0)
    env.get_observations()["policy"].add_(1.0)
    assert tensors and len(module.train(args, env)) == 2


def test_buffers_that_the_environment_reuses():
    """An environment that returns the same tensors at every step trains like one that returns new ones."""

    class Reusing(toy.Toy):
        obs = rewards = dones = None

        def step(self, actions):
            obs, rewards, dones, extras = super().step(actions)
            if self.obs is None:
                self.obs, self.rewards, self.dones = obs.clone(), rewards.clone(), dones.clone()
            for buffer, value in ((self.rewards, rewards), (self.dones, dones)):
                buffer.copy_(value)
            return self.obs.update_(obs), self.rewards, self.dones, extras

    histories = [module.train(args_of(log_root=""), env) for env in (toy.Toy(8), Reusing(8))]
    assert str(numbers(histories[0])) == str(numbers(histories[1]))


def test_resumed_run_equals_uninterrupted_run():
    whole = module.train(args_of(log_root="whole"), make("cartpole", 16))
    module.train(args_of(log_root="logs", max_iterations=3), make("cartpole", 16))
    resumed = module.train(args_of(log_root="logs", resume=True), make("cartpole", 16, seed=99))
    assert str(numbers(resumed)) == str(numbers(whole)[3:])  # as text, so that NaN equals NaN


def test_resumed_quadruped_equals_uninterrupted_run():
    settings = dict(env="quadruped", critic_obs=("policy", "privileged"), num_steps_per_env=8, max_iterations=4)
    whole = module.train(args_of(log_root="whole", **settings), make("quadruped", 16))
    module.train(args_of(**(settings | dict(max_iterations=2))), make("quadruped", 16))
    resumed = module.train(args_of(resume=True, **settings), make("quadruped", 16, seed=99))
    assert str(numbers(resumed)) == str(numbers(whole)[2:])


def test_interrupted_save_leaves_the_previous_checkpoint(monkeypatch):
    module.train(args_of(max_iterations=1), make("cartpole", 16))
    path = only_run() / "model_0.pt"
    before = path.read_bytes()

    def killed(state, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        module.save_checkpoint(path, {}, 0, {})
    assert path.read_bytes() == before


def start_training(*flags) -> subprocess.Popen:
    """A training process that has passed its third iteration."""
    process = subprocess.Popen(command("--max-iterations", "100000", *flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("iteration 3/"):
            return process
    raise AssertionError("training did not start")


def test_kill_9_then_resume():
    process = start_training("--save-interval", "1", "--logger", "none")
    time.sleep(0.2)
    process.kill()
    process.communicate()
    saved = max(module.iteration_of(file) for file in only_run().glob("model_*.pt"))
    history = module.train(args_of(resume=True, max_iterations=saved + 3), make("cartpole", 16))
    assert len(history) == 2 and saved >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_finishes_the_iteration_saves_and_exits_0(number):
    process = start_training("--save-interval", "1000", "--logger", "none")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    last = int(output.rsplit("\niteration ", 1)[1].split("/")[0]) if "\niteration " in output else 3
    assert (only_run() / f"model_{last - 1}.pt").exists()
    assert module.load_checkpoint(only_run() / f"model_{last - 1}.pt", torch.device("cpu"))["iter"] == last - 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind, named", [("obs", "observation group policy"), ("reward", "rewards")])
def test_nan_stops_the_run(kind, named, value):
    """Not finite at step 60 (iteration 2, step 11) in environment 3: named, dumped, and the weights are those before."""
    trained = {}
    tensors_of = module.tensors_of

    def spy(agent):
        trained.update(agent)
        return tensors_of(agent)

    module.tensors_of = spy
    try:
        good = args_of(max_iterations=2, log_root="good", init_at_random_ep_len=False)
        module.train(good, toy.Toy(8))
        expected = [x.clone() for x in tensors_of(trained)]
        with pytest.raises(FloatingPointError) as error:
            module.train(args_of(save_interval=1000, init_at_random_ep_len=False), toy.Toy(8, fault=(kind, 60, value)))
    finally:
        module.tensors_of = tensors_of
    step = 12 if kind == "obs" else 11  # the observation that follows action 11 is row 12
    assert f"iteration 2: non-finite {named} from step {step} on, in environments [3]" in str(error.value)
    assert all(torch.equal(x, y) for x, y in zip(expected, tensors_of(trained), strict=True))
    assert {file.name for file in only_run().glob("*.pt")} == {"model_0.pt", "model_1.pt", "nan_2.pt"}
    saved = module.load_checkpoint(only_run() / "model_1.pt", torch.device("cpu"))  # of the last good iteration
    assert saved["iter"] == 1 and torch.equal(saved["actor_state_dict"]["mlp.0.weight"], trained["actor"].mlp[0].weight)
    assert torch.load(only_run() / "nan_2.pt", weights_only=True)["rewards"].shape == (25, 8)


def test_a_group_that_nobody_reads(monkeypatch):
    """It is not stored, and may hold anything: a lidar that says inf where it sees nothing."""
    env, stored, make_storage = toy.Toy(8), [], module.make_storage
    read = env.get_observations
    env.get_observations = lambda: read().set("lidar", torch.full((8, 3), math.inf))
    monkeypatch.setattr(module, "make_storage", lambda *a: stored.append(make_storage(*a)) or stored[0])
    assert len(module.train(args_of(log_root="", max_iterations=2), env)) == 2
    assert list(stored[0]["obs"].keys()) == ["policy"]


def test_an_update_that_spoils_the_statistics_stops_the_run():
    """A number that is finite, and whose square is not: the tanh saturates and the loss is fine, the variance is not."""
    args = args_of(activation="tanh", init_at_random_ep_len=False)
    with pytest.raises(FloatingPointError, match="iteration 1: weights or statistics are not finite after the update"):
        module.train(args, toy.Toy(8, fault=("obs", 30, 1e22)))
    assert {file.name for file in only_run().glob("*.pt")} == {"model_0.pt", "nan_1.pt"}
    assert module.all_finite([torch.ones(3), torch.zeros(0), torch.tensor(1)])
    assert not any(module.all_finite([torch.ones(3), torch.tensor([0.0, value])]) for value in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("change", ["double", "zero_grad", "vector_to_parameters"])
def test_networks_that_have_left_their_optimizer(change, monkeypatch):
    """Their weights would stay as they are, without a word."""
    make_storage = module.make_storage

    def edited(obs, num_actions, actor, args):
        if change == "vector_to_parameters":
            flat = torch.nn.utils.parameters_to_vector(actor.parameters()).detach()
            torch.nn.utils.vector_to_parameters(flat, actor.parameters())
        else:
            getattr(actor, change)()
        return make_storage(obs, num_actions, actor, args)

    monkeypatch.setattr(module, "make_storage", edited)
    with pytest.raises(RuntimeError, match="is not trained: change networks before their FlatOptimizer is made"):
        module.train(args_of(log_root="", env="cartpole"))


class Shaped(Cartpole):
    """A subclass of a built-in task with a state that it binds anew in every step."""

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        self.smooth = 0.9 * getattr(self, "smooth", 0.0) + rewards
        return obs, self.smooth, dones, extras


class Delegating:
    def __init__(self, env):
        self.env, self.last = env, torch.zeros(env.num_envs)

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, actions):
        obs, rewards, dones, extras = self.env.step(actions)
        self.last = self.last + rewards
        extras["log"] = {"success": dones.float().mean() if dones.any() else 0.0}  # now a tensor, now a number
        return obs, rewards, dones, extras


def test_state_that_is_added_to_a_built_in_task():
    """`capturable` is not inherited: what these bind to new tensors can be changed after training."""
    shaped, wrapped = Shaped(16), Delegating(make("cartpole", 16))
    module.train(args_of(log_root="", max_iterations=2), shaped)
    shaped.smooth.zero_()
    history = module.train(args_of(log_root="", max_iterations=20), wrapped)
    wrapped.last.zero_()
    assert not module.is_capturable(shaped) and not module.is_capturable(wrapped) and module.is_capturable(wrapped.env)
    assert all("Episode/success" in metrics for metrics in history)


def test_an_environment_that_is_handed_over_names_the_run():
    module.train(args_of(env="quadruped", max_iterations=1), toy.Toy(8))
    assert [path.name for path in pathlib.Path("logs").iterdir()] == ["ppo_continuous_Toy"]
    module.play(args_of(env="quadruped"), toy.Toy(4))
    with pytest.raises(module.UserError, match="--video-interval: films take a second environment"):
        module.train(args_of(env="quadruped", video_interval=1), toy.Toy(8))


def test_rsl_rl_loads_our_checkpoint_and_we_load_its(tmp_path):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    import reference

    args = args_of(actor_obs=("policy",), critic_obs=("policy",), num_envs=16)
    module.train(args, make("cartpole", 16))
    ours = only_run() / "model_5.pt"
    runner = reference.make_runner(args, make("cartpole", 16), log_dir=None)
    runner.load(str(ours))
    assert runner.current_learning_iteration == 5
    obs = make("cartpole", 16).get_observations()
    assert torch.equal(runner.get_inference_policy()(obs), module.load_policy(ours)(obs))
    runner.learn(1)  # its optimizer takes our state
    # Theirs, with other layer sizes than the defaults: the policy, and a resumed training
    theirs = tmp_path / "theirs" / "model_7.pt"
    theirs.parent.mkdir()
    runner.current_learning_iteration, runner.logger.writer = 7, None
    runner.save(str(theirs))
    assert torch.equal(runner.get_inference_policy()(obs), module.load_policy(theirs)(obs))
    history = module.train(args_of(resume=True, checkpoint=str(theirs), max_iterations=9, log_root=""), make("cartpole", 16))
    assert len(history) == 1
    assert history[0]["Loss/learning_rate"] != 1e-3


def test_export_and_policy_agree(capsys):
    module.train(args_of(max_iterations=2), make("cartpole", 16))
    run = only_run()
    assert "policy.onnx, which differs" in capsys.readouterr().out
    import onnx
    import onnxruntime

    assert onnx.load(run / "exported" / "policy.onnx").opset_import[0].version == 18
    session = onnxruntime.InferenceSession(run / "exported" / "policy.onnx")
    obs = torch.randn(5, 5)
    policy = module.load_policy(run / "model_1.pt")
    np.testing.assert_allclose(session.run(["actions"], {"obs": obs.numpy()})[0], policy(obs).numpy(), atol=1e-5)
    assert torch.equal(torch.jit.load(run / "exported" / "policy.pt")(obs), policy(obs))
    assert not policy(obs).requires_grad and policy.reset(torch.ones(5)) is None


def test_play_writes_film_and_plot(capsys):
    module.train(args_of(max_iterations=1), make("cartpole", 16))
    means = module.play(args_of(play_envs=2))
    assert (only_run() / "play_model_0.gif").read_bytes()[:4] == b"GIF8"
    output = capsys.readouterr().out
    assert output.count("\nepisode ") == 2 and means["episode_length"] > 0
    module.play(args_of(agent="random", play_envs=2, env="toy:make"))


def test_play_plots_commanded_against_actual():
    module.play(args_of(agent="zero", env="quadruped", play_envs=2))
    [plot] = pathlib.Path("logs").glob("*/play_zero.png")
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_an_environment_that_cannot_draw_is_trained_and_played():
    """And one whose observations are float64: training stores them in the networks' type, and so must a policy take them."""
    module.train(args_of(env="toy:make", max_iterations=1, video_interval=1, logger="tensorboard"))
    policy = module.load_policy(only_run() / "model_0.pt")
    obs = toy.Toy(8).get_observations()
    assert torch.equal(policy(obs), policy({group: x.double() for group, x in obs.items()}))


class Drawn(toy.Toy):
    """It draws on a screen of its own; its configuration is a class, and has a lock inside."""

    cfg = {"class": toy.Toy, "lock": threading.Lock(), "dataclass": module.Args}

    def render(self):
        return None


def test_an_environment_that_draws_elsewhere_and_has_an_odd_configuration():
    module.train(args_of(max_iterations=1), Drawn(8))
    module.play(args_of(agent="zero"), Drawn(8))
    assert "lock" in (only_run() / "env.yaml").read_text()


class Delayed(toy.Toy):
    """Its motors are late by more steps than a rollout has: it keeps the actions that it gets, and may write to them."""

    spoils, delay = False, 30

    def step(self, actions):
        if not hasattr(self, "kept"):
            self.kept, self.copies, self.wrong = [], [], 0
        self.kept.append(actions)
        self.copies.append(actions.clone())
        late = self.copies[-self.delay] if len(self.copies) > self.delay else torch.zeros_like(actions)
        self.wrong += len(self.kept) > self.delay and not torch.equal(self.kept[-self.delay], late)
        result = super().step(late)
        if self.spoils:
            actions.zero_()
        return result


class Spoiling(Delayed):
    spoils = True


def test_actions_belong_to_the_environment():
    histories = []
    for kind in (Delayed, Spoiling):
        env = kind(8)
        histories.append(module.train(args_of(max_iterations=4, num_steps_per_env=8, log_root=""), env))
        assert kind.spoils or not env.wrong
    assert numbers(histories[0]) == numbers(histories[1])


class Sparse(toy.Toy):
    """Logs of those that were reset alone, as environments for rsl_rl do: often none; and a plain number now and then."""

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        self.ended, self.buffer = getattr(self, "ended", []), getattr(self, "buffer", torch.zeros(8))
        self.ended.append(torch.rand(int(dones.sum())))
        self.buffer.fill_(self.steps)  # the same memory every time
        level = 2.0 if self.steps % 2 else torch.tensor([4.0, 6.0])
        extras["log"] = {"ended": self.ended[-1], "steps": self.buffer, "level": level}
        return obs, rewards, dones, extras


def test_a_log_is_averaged_over_all_its_entries():
    """As rsl_rl does; where a step has none it does not count."""
    env = Sparse(8)
    history = module.train(args_of(max_iterations=3, num_steps_per_env=20, log_root=""), env)
    for iteration, metrics in enumerate(history):
        entries = torch.cat(env.ended[20 * iteration : 20 * (iteration + 1)])
        assert len(entries) == 8 and metrics["Episode/ended"] == pytest.approx(entries.mean().item())
        assert metrics["Episode/level"] == pytest.approx((10 * 2.0 + 10 * 4.0 + 10 * 6.0) / 30)
        assert metrics["Episode/steps"] == 20 * iteration + 10.5


def test_settings_of_a_run_can_be_read_back():
    module.train(args_of(max_iterations=1, actor_obs=("policy",)), make("cartpole", 16))
    settings = yaml.safe_load((only_run() / "args.yaml").read_text())
    assert isinstance(settings["actor_obs"], list)
    assert module.Args(**settings) == args_of(max_iterations=1, actor_obs=("policy",))
    module.train(module.Args(**settings | {"log_root": ""}), make("cartpole", 16))


class Numpy(toy.Toy):
    def state_dict(self):
        return {"x": self.x.numpy()}

    def load_state_dict(self, state):
        self.x = torch.as_tensor(state["x"])


def test_what_no_checkpoint_can_hold_is_refused():
    """It could be saved but not read again: found out before the training, not when it is to be resumed."""
    with pytest.raises(module.UserError, match=r"^Args: no checkpoint can hold pathlib\S+; use "):
        module.train(args_of(log_root=pathlib.Path("logs")), toy.Toy(8))
    with pytest.raises(module.UserError, match=r"^Args: no checkpoint can hold numpy\S+; use "):
        module.train(args_of(learning_rate=np.float64(1e-3)), toy.Toy(8))
    with pytest.raises(module.UserError, match=r"^env.state_dict\(\): no checkpoint can hold numpy\S+; use "):
        module.train(args_of(), Numpy(8))
    assert not pathlib.Path("logs").exists()


def test_the_command_that_started_from_a_checkpoint_resumes_its_own_run(capsys):
    module.train(args_of(experiment_name="first", max_iterations=3), make("cartpole", 16))
    checkpoint = str(next(pathlib.Path("logs/first").rglob("model_2.pt")))
    settings = dict(experiment_name="second", checkpoint=checkpoint)
    pathlib.Path("logs/second/0").mkdir(parents=True)
    pathlib.Path("logs/second/0/args.yaml").touch()  # of a run that was killed when it wrote this
    assert module.find_checkpoint(args_of(**settings, resume=True)) == pathlib.Path(checkpoint)  # no run has started from it
    assert len(module.train(args_of(**settings, max_iterations=2), make("cartpole", 16))) == 2
    for iterations in (4, 6):  # killed, and killed again
        assert len(module.train(args_of(**settings, max_iterations=iterations, resume=True), make("cartpole", 16))) == 2
    assert "resuming logs/second" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["obs policy", "rewards", "bootstrap"])
def test_each_of_them_must_be_finite(name):
    """By itself: a sample that no mini-batch takes spoils no loss."""
    env, args = toy.Toy(8), args_of(num_envs=8)
    actor, _ = module.make_models(env.get_observations(), 1, args)
    storage = module.make_storage(env.get_observations(), 1, actor, args)
    metrics = {"Loss/surrogate": torch.zeros(4), "Loss/value": torch.zeros(4)}
    assert all(module.finite_flags(storage, metrics).values())
    storage[tuple(name.split())][2, 3] = math.nan
    assert [flag for flag, good in module.finite_flags(storage, metrics).items() if not good] == [f"finite/{name}"]


def test_an_environment_is_closed_by_who_made_it(monkeypatch):
    closed, env = [], toy.Toy(8)
    monkeypatch.setattr(toy.Toy, "close", lambda env: closed.append(env), raising=False)
    module.train(args_of(max_iterations=1), env)
    module.play(args_of(play=True), env)
    assert not closed
    module.train(args_of(env="toy:make", max_iterations=1))
    module.play(args_of(env="toy:make", checkpoint=str(next(pathlib.Path("logs").rglob("model_0.pt"))), play=True))
    assert len(closed) == 2


def test_a_download_is_not_the_newest_run():
    module.train(args_of(max_iterations=1), make("cartpole", 16))
    own = only_run()
    (own.parent / "wandb" / "abc").mkdir(parents=True)
    (own.parent / "wandb" / "abc" / "model_900.pt").touch()
    assert module.find_checkpoint(args_of()) == own / "model_0.pt"


def test_no_terminations():
    means = module.play(args_of(agent="random", play_envs=2, terminations=False))
    assert means["episode_length"] == 500


def test_films_during_training():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = args_of(max_iterations=2, video_interval=1, logger="tensorboard")
    module.train(args, make("cartpole", 16))
    assert {"video_0.gif", "video_1.gif"} <= {file.name for file in only_run().iterdir()}
    assert EventAccumulator(str(only_run())).Reload().Tags()["images"] == ["video"]


def test_wandb_offline():
    module.train(args_of(max_iterations=2, logger="wandb", video_interval=1), make("cartpole", 16))
    records = list(only_run().glob("wandb/offline-run-*/run-*.wandb"))
    assert len(records) == 1
    wanted, end = (b"Loss/surrogate", b"model_1.pt", b"learning_rate"), time.monotonic() + 60.0
    while not all(text in records[0].read_bytes() for text in wanted) and time.monotonic() < end:
        time.sleep(0.5)  # another process writes: on a loaded machine the file was still empty once
    assert all(text in records[0].read_bytes() for text in wanted)


class ListWriter:
    """A writer of one's own: add_scalar, and what it likes of rsl_rl's other methods."""

    made = []

    def __init__(self, log_dir):
        self.scalars, self.models, self.stopped = {}, [], False
        ListWriter.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def save_model(self, path, step):
        self.models.append((pathlib.Path(path).name, step))

    def stop(self):
        self.stopped = True


def test_writer_of_ones_own():
    history = module.train(args_of(logger="test_runs:ListWriter", max_iterations=2), make("cartpole", 16))
    import test_runs

    (writer,) = test_runs.ListWriter.made
    assert writer.scalars["Loss/value"] == [(0, history[0]["Loss/value"]), (1, history[1]["Loss/value"])]
    assert writer.models == [("model_0.pt", 0), ("model_1.pt", 1)] and writer.stopped


def test_wandb_run_path(monkeypatch):
    """Downloads the newest model artifact; W&B's server is replaced, its client's interface is not."""
    import wandb

    module.train(args_of(max_iterations=2), make("cartpole", 16))
    source = only_run() / "model_1.pt"

    class Artifact:
        type = "model"

        def download(self, root):
            pathlib.Path(root).mkdir(parents=True)
            (pathlib.Path(root) / source.name).write_bytes(source.read_bytes())
            return root

    class Run:
        id = "abc"
        logged_artifacts = staticmethod(lambda: [Artifact()])

    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"run": staticmethod(lambda path: Run())}))
    assert module.find_checkpoint(args_of(wandb_run_path="me/walking/abc")).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["ppo_continuous", "ppo_rnn", "ppo_cnn", "ppo_multigpu"])
def test_copied_script_runs_alone(name, tmp_path):
    """Outside the repository, with a five-line environment and nothing else."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_ppo.py").write_text(pathlib.Path(SCRIPT).with_name(f"{name}.py").read_text())
    (folder / "toy.py").write_text(pathlib.Path(toy.__file__).read_text())
    flags = ["--env", "toy:make", "--max-iterations", "1", "--logger", "none"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command(*flags, script="my_ppo.py"), cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "logs" / "my_ppo_toy_make").glob("*/model_0.pt"))) == 1


def test_importing_changes_nothing():
    check = """
import os, random, signal, sys, torch
def state():
    flags = [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()]
    flags += [torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()]
    return repr((flags, torch.get_rng_state().tolist(), random.getstate(), signal.getsignal(signal.SIGTERM), dict(os.environ), sys.path))
before = state()
import ppo_continuous
print(before == state(), "envs" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    "name", ["ppo_continuous", "ppo_rnn", "ppo_cnn", "ppo_rnd", "ppo_symmetry", "ppo_multigpu", "distill_dagger"]
)
def test_the_asked_precision_reaches_cudnn(name):
    """Whose flag for convolutions and RNNs is its own, and on by default: a policy would act in TF32 and learn in float32."""
    script, before = __import__(name), (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    try:
        for precision, allowed in (("highest", False), ("high", True), ("highest", False)):
            script.set_up_torch(script.Args(device="cpu", num_threads=1, float32_matmul_precision=precision))
            assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
