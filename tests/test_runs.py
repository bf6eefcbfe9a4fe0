"""Runs: folders, checkpoints, resuming, signals, kills, logging, export, play; and what other programs make of the files."""

import ast
import dataclasses
import datetime
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types

import instruments
import numpy as np
import pytest
import torch
import toy
from tensordict import TensorDict

import ppo_continuous as module
from envs import make, record
from envs.cartpole import Cartpole

SCRIPT = str(pathlib.Path(module.__file__))
TINY = dict(env="cartpole", num_envs=16, max_iterations=6, actor_hidden_dims=(8,), critic_hidden_dims=(8,), logger="none")
TINY |= dict(device="cpu")


def args_of(**settings):
    return module.Args(**(TINY | settings))


def numbers(history):
    """What must be equal: everything but times."""
    return [{k: v for k, v in metrics.items() if not k.startswith("Perf/")} for metrics in history]


def only_run(root="logs") -> pathlib.Path:
    (run,) = pathlib.Path(root).glob("*/*")
    return run


def saved_in(run) -> set[str]:
    return {file.name for file in run.glob("*.pt")}


def is_same(state, other) -> bool:
    """Equality of nested states, to the last bit."""
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(is_same(state[key], other[key]) for key in state)
    if isinstance(state, list):
        return len(state) == len(other) and all(map(is_same, state, other))
    return torch.equal(state, other) if torch.is_tensor(state) else state == other


def command(*flags, script=SCRIPT):
    tiny = ["--env", "cartpole", "--num-envs", "16", "--actor-hidden-dims", "8", "--critic-hidden-dims", "8", "--device", "cpu"]
    return [sys.executable, script, *tiny, "--no-env-defaults", *flags]


export_policy = module.export_policy


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    """It takes longer than a short training. And what is said once is said once in each test."""
    monkeypatch.setattr(module, "export_policy", lambda *a: None)
    module.say.cache_clear()


@pytest.fixture
def exports(no_export, monkeypatch):
    monkeypatch.setattr(module, "export_policy", export_policy)


def test_run_folder(exports, monkeypatch):
    """All that repeating a run takes; its name is the time in UTC, so that the newest run is last wherever it was made."""
    args = args_of(run_name="mine", logger="tensorboard", max_iterations=2, critic_obs=("policy",))
    with monkeypatch.context() as context:
        context.setenv("TZ", "Pacific/Auckland")
        time.tzset()
        history = module.train(args, make("cartpole", 16))
    time.tzset()
    run = only_run()
    assert history.run_dir == run.absolute()
    assert run.parent.name == "ppo_continuous_cartpole" and run.name.endswith("_mine")
    now, named = datetime.datetime.now(datetime.timezone.utc), datetime.datetime.strptime(run.name[:19], "%Y-%m-%d_%H-%M-%S")
    assert abs(now.replace(tzinfo=None) - named) < datetime.timedelta(minutes=10)
    settings = ast.literal_eval((run / "args.txt").read_text())
    assert module.Args(**settings) == dataclasses.replace(args, actor_obs=("policy",))  # as chosen
    assert ast.literal_eval((run / "env.txt").read_text())["episode_length_s"] == 10.0
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
    assert events.Scalars("Loss/kl")[1].value == pytest.approx(history[1]["Loss/kl"])


def test_nothing_is_written_without_a_log_root(tmp_path):
    history = module.train(args_of(log_root="", max_iterations=1), toy.Toy(16))
    assert history.run_dir is None and not list(tmp_path.iterdir())


def test_users_own_environment_and_factory():
    """A minimal environment, given as an object, which says how many it holds, and named on the command line."""
    history = module.train(args_of(num_envs=999), toy.Toy(8))
    assert len(history) == 6 and history[-1]["Train/num_episodes"] > 0
    assert torch.load(only_run() / "model_5.pt", weights_only=True)["resume"]["args"]["num_envs"] == 8
    flags = ["--env", "toy:make", "--log-root", "", "--max-iterations", "1"]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(toy.__file__).parent)}
    done = subprocess.run(command(*flags), capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "iteration 0/1" in done.stdout, done.stderr


@pytest.mark.parametrize("env_id", ["toy", "cartpole", "quadruped-rough", "navigation-pixels"])
def test_an_environment_can_be_used_after_training(env_id):
    """Tensors that were made in torch.inference_mode could not be changed here. The toy binds a new state in every step."""
    env = toy.Toy(16) if env_id == "toy" else make(env_id, 16)
    args = args_of(max_iterations=2, log_root="", actor_obs=("policy",), critic_obs=("policy",))
    module.train(args, env)
    tensors = [x for x in vars(env).values() if torch.is_tensor(x)]
    for tensor in tensors:
        tensor.copy_(tensor.clone())
    obs, rewards, dones, extras = env.step(torch.zeros(16, env.num_actions))
    for tensor in (obs["policy"], env.get_observations()["policy"], rewards, *extras.get("log", {}).values()):
        tensor.add_(1.0)
    dones.zero_()
    assert tensors and len(module.train(args, env)) == 2


class Shaped(Cartpole):
    """A subclass of a built-in task with a state that it binds anew in every step."""

    def _advance(self, actions):
        rewards, terminated, log = super()._advance(actions)
        self.smooth = 0.9 * getattr(self, "smooth", 0.0) + rewards
        return self.smooth, terminated, log


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


def test_state_that_is_added_to_a_built_in_task(monkeypatch):
    """`capturable` is not inherited: what these bind to new tensors can be changed after training, and is in no CUDA graph."""
    shaped, wrapped = Shaped(16), Delegating(make("cartpole", 16))
    module.train(args_of(log_root="", max_iterations=2), shaped)
    shaped.smooth.zero_()
    history = module.train(args_of(log_root="", max_iterations=20), wrapped)
    wrapped.last.zero_()
    assert all("Episode/success" in metrics for metrics in history)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    functions, args = (module.collect, module.act, module.update), args_of(device="cuda")
    for env, whole in ((shaped, False), (wrapped, False), (wrapped.env, True)):
        collect, act, update = module.graphed(args, env, *functions)
        assert (collect is not module.collect, act is not module.act, update is not module.update) == (whole, not whole, True)


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


def test_resumed_run_equals_uninterrupted_run(capsys):
    whole = module.train(args_of(log_root="whole"), make("cartpole", 16))
    module.train(args_of(log_root="logs", max_iterations=3), make("cartpole", 16))
    resumed = module.train(args_of(log_root="logs", resume=True), make("cartpole", 16, seed=99))
    assert str(numbers(resumed)) == str(numbers(whole)[3:])  # as text, so that NaN equals NaN
    assert is_same(module.state_of(resumed.agent), module.state_of(whole.agent))
    assert "starts afresh" not in capsys.readouterr().out


def test_a_run_is_resumed_with_other_environments(capsys):
    """With more of them, or from another seed: they start afresh, and with the seed the random numbers."""
    first = module.train(args_of(max_iterations=2), make("cartpole", 16))
    settings = dict(resume=True, log_root="", checkpoint=str(first.run_dir / "model_1.pt"), max_iterations=4)
    whole = module.train(args_of(**settings), make("cartpole", 16))
    assert "the environment starts afresh" not in capsys.readouterr().out
    for change, count in ((dict(seed=2), 16), ({}, 24)):
        resumed = module.train(args_of(**settings, **change), make("cartpole", count))
        said, length = capsys.readouterr().out, args_of().num_steps_per_env
        assert "the environment starts afresh" in said
        assert f"iteration 3/4  {2 * length * 16 + 2 * length * count:,} env steps" in said
        assert len(resumed) == 2 and str(numbers(resumed)) != str(numbers(whole))


def test_resuming_continues_ones_own_run(capsys):
    """Three seeds in one folder, stopped; each one's own command goes on with its own run, whatever else has been tried since."""
    runs = {seed: module.train(args_of(seed=seed, max_iterations=2), make("cartpole", 16)).run_dir for seed in (1, 2, 3)}
    module.train(args_of(gamma=0.9, max_iterations=2), make("cartpole", 16))
    path = runs[1] / "model_1.pt"
    (runs[3].parent / "9999-later").mkdir()
    (runs[3].parent / "9999-later" / "model_7.pt").write_bytes(b"not a checkpoint")  # hinders nobody, and is named
    module.say.cache_clear()
    for seed in (1, 2):
        capsys.readouterr()
        args = args_of(seed=seed, max_iterations=3, resume=True, save_interval=7, run_name="again", compile=False)
        assert len(module.train(args, make("cartpole", 16))) == 1
        output = capsys.readouterr().out
        assert f"resuming {(runs[seed] / 'model_1.pt').absolute()} after" in output and "that run has" not in output
        assert ("9999-later/model_7.pt: is no whole checkpoint" in output) == (seed == 1)
    with pytest.raises(module.UserError, match=r"^--resume True: the newest run, .*; --checkpoint takes any$"):
        module.train(args_of(seed=4, resume=True), make("cartpole", 16))
    (runs[3].parent / "9999-later" / "model_7.pt").unlink()
    with pytest.raises(
        module.UserError, match=r"model_2.pt, has seed 2 \(here 4\), clip_param 0.2 \(here 0.3\); --checkpoint takes"
    ):
        module.train(args_of(seed=4, clip_param=0.3, resume=True), make("cartpole", 16))
    taken = module.train(
        args_of(seed=4, clip_param=0.3, resume=True, checkpoint=str(path), max_iterations=3), make("cartpole", 16)
    )
    assert len(taken) == 1 and "that run has seed 1 (here 4), clip_param 0.2 (here 0.3)\n" in capsys.readouterr().out


def test_the_newest_is_what_the_checkpoints_say(capsys):
    """Whatever their folders are called by now, and whenever they were copied."""
    older, newer = (module.train(args_of(max_iterations=2, save_interval=1), make("cartpole", 16)).run_dir for _ in range(2))
    shutil.copytree(older, older.parent / "zz-the-best-one")
    newer.rename(newer.parent / "0-renamed")
    assert module.find_checkpoint(args_of()) == newer.parent / "0-renamed" / "model_1.pt"
    (newer.parent / "0-renamed" / "model_1.pt").write_bytes(b"cut off")
    assert module.find_checkpoint(args_of()) == newer.parent / "0-renamed" / "model_0.pt"
    assert "passed over: --checkpoint " in capsys.readouterr().out


def test_two_runs_of_one_microsecond(monkeypatch):
    moment = datetime.datetime(2026, 10, 25, 1, 30, tzinfo=datetime.timezone.utc)
    moments = iter([moment, moment, moment + datetime.timedelta(microseconds=1)])
    monkeypatch.setattr(module, "datetime", types.SimpleNamespace(now=lambda zone: next(moments)))
    folders = [module.make_run_dir(args_of(), toy.Toy(8)) for _ in range(2)]
    assert [folder.name for folder in folders] == ["2026-10-25_01-30-00-000000", "2026-10-25_01-30-00-000001"]


def test_a_tensor_of_the_agents_own_is_resumed(monkeypatch):
    """As of a schedule that somebody adds: how far it has come. It is restored in place, and another shape is refused."""
    make_agent, update = module.make_agent, module.update

    def with_progress(env, obs, args):
        agent = make_agent(env, obs, args)
        agent.progress = torch.zeros(())
        return agent

    def count(agent, storage, args):
        agent.progress += 1.0
        return update(agent, storage, args)

    monkeypatch.setattr(module, "make_agent", with_progress)
    monkeypatch.setattr(module, "update", count)
    first = module.train(args_of(max_iterations=3), make("cartpole", 16))
    resumed = module.train(args_of(max_iterations=5, resume=True), make("cartpole", 16))
    assert first.agent.progress == 3 and resumed.agent.progress == 5
    path = resumed.run_dir / "model_4.pt"
    torch.save(torch.load(path, weights_only=True) | {"progress_state_dict": torch.zeros(2)}, path)
    with pytest.raises(module.UserError, match=r"progress has the shape \(2,\), must have \(\)"):
        module.train(args_of(max_iterations=6, resume=True), make("cartpole", 16))


def test_a_folder_that_is_a_link_to_nowhere():
    pathlib.Path("logs").symlink_to("gone")
    with pytest.raises(OSError, match="logs"):
        module.make_run_dir(args_of(), toy.Toy(8))


MUTATED = {  # where in the checkpoint, what stands there instead, and what is said
    "no policy": (("actor_state_dict",), None, "actor differs"),
    "an iteration in words": (("iter",), "two", "is no whole checkpoint"),
    "settings that are none": (("resume", "args"), [1, 2], "is no whole checkpoint"),
    "weights cut off": (("actor_state_dict", "mlp.0.weight"), torch.zeros(3, 5), "actor differs .*size mismatch"),
    "weights in words": (("critic_state_dict", "mlp.0.bias"), "zeros", "critic differs"),
    "an optimizer of another kind": (("optimizer_state_dict", "param_groups"), [], "optimizer differs"),
    "moments of another shape": (("optimizer_state_dict", "state", 2, "exp_avg"), torch.zeros(3), "optimizer differs"),
    "a moment that is missing": (("optimizer_state_dict", "state", 2), {"step": torch.zeros(())}, "optimizer differs"),
    "moments in words": (("optimizer_state_dict", "state", 2, "exp_avg_sq"), "zeros", "optimizer differs"),
    "a random state that is none": (("resume", "rng"), torch.zeros(3), "its run cannot be continued"),
    "an environment of another shape": (
        ("infos", "env_state", "tensors"),
        {"state": torch.zeros(2, 2)},
        "its run cannot be continued",
    ),
}


@pytest.mark.parametrize("name", MUTATED)
def test_a_checkpoint_that_was_tampered_with_is_refused_in_one_line(name):
    path = module.train(args_of(max_iterations=2), make("cartpole", 16)).run_dir / "model_1.pt"
    (*keys, last), value, message = MUTATED[name]
    part = checkpoint = torch.load(path, weights_only=True)
    for key in keys:
        part = part[key]
    part[last] = value
    torch.save(checkpoint, path)
    with pytest.raises(module.UserError, match=f"^--checkpoint .*model_1.pt: {message}") as error:
        module.train(args_of(resume=True, checkpoint=str(path)), make("cartpole", 16))
    assert "\n" not in str(error.value)


def test_a_column_that_the_checkpoint_has_not(capsys):
    """As where the script was edited in between: zeros in it would be taken for what was stored."""
    path = module.train(args_of(max_iterations=2), make("cartpole", 16)).run_dir / "model_1.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["resume"]["row"]["episode_return"]
    torch.save(checkpoint, path)
    assert len(module.train(args_of(resume=True, max_iterations=3), make("cartpole", 16))) == 1
    assert "the environment starts afresh" in capsys.readouterr().out


def test_resumed_quadruped_equals_uninterrupted_run():
    settings = dict(env="quadruped", critic_obs=("policy", "privileged"), num_steps_per_env=8, max_iterations=4)
    whole = module.train(args_of(log_root="whole", **settings), make("quadruped", 16))
    module.train(args_of(**(settings | dict(max_iterations=2))), make("quadruped", 16))
    resumed = module.train(args_of(resume=True, **settings), make("quadruped", 16, seed=99))
    assert str(numbers(resumed)) == str(numbers(whole)[2:])


def test_interrupted_save_leaves_the_previous_checkpoint(monkeypatch):
    env, args = make("cartpole", 16), args_of(max_iterations=1, actor_obs=("policy",), critic_obs=("policy",))
    agent = module.train(args, env).agent
    storage = module.make_storage(agent, env.get_observations(), 1, args)
    path = only_run() / "model_0.pt"
    before = path.read_bytes()

    def killed(state, file):
        pathlib.Path(file).write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(torch, "save", killed)
        module.save(path, module.state_of(agent), env, storage, 0, args)
    assert path.read_bytes() == before and module.find_checkpoint(args) == path.absolute()
    module.save(path, module.state_of(agent), env, storage, 0, args)
    assert path.read_bytes() != before  # it is written there, when nothing comes between


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files stands in for a full disk")
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(monkeypatch, capsys):
    """What was saved stays, nothing half-written does, and each attempt is told of."""
    import resource

    module.train(args_of(max_iterations=1), make("cartpole", 16))
    limits, sizes = resource.getrlimit(resource.RLIMIT_FSIZE), {path: path.stat().st_size for path in only_run().glob("*.pt")}
    full = (min(sizes.values()) // 2, limits[1])
    monkeypatch.setattr(module, "make_writer", lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, full))
    try:
        history = module.train(args_of(max_iterations=3, resume=True, save_interval=1), make("cartpole", 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(history) == 2 and capsys.readouterr().out.count("not saved: ") == 2
    assert not list(history.run_dir.glob("*.pt")) and not list(history.run_dir.glob("*.partial"))
    assert {path: path.stat().st_size for path in pathlib.Path().glob("logs/*/*/*.pt")} == {
        pathlib.Path(path): size for path, size in sizes.items()
    }


def start_training(*flags) -> subprocess.Popen:
    """A training process that has passed its third iteration."""
    process = subprocess.Popen(command("--max-iterations", "100000", *flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("iteration 2/"):
            return process
    raise AssertionError("training did not start")


def test_kill_9_then_resume():
    process = start_training("--save-interval", "1", "--logger", "none")
    time.sleep(0.2)
    process.kill()
    process.communicate()
    saved = max(int(file.stem.removeprefix("model_")) for file in only_run().glob("model_*.pt"))
    history = module.train(args_of(resume=True, max_iterations=saved + 3), make("cartpole", 16))
    assert len(history) == 2 and saved >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_finishes_the_iteration_saves_and_exits_0(number):
    process = start_training("--save-interval", "1000", "--logger", "none")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    last = int(output.rsplit("\niteration ", 1)[1].split("/")[0]) if "\niteration " in output else 2
    saved = torch.load(only_run() / f"model_{last}.pt", weights_only=True)
    assert saved["iter"] == last and saved["infos"]["env_state"] is not None
    assert (only_run() / "exported" / "policy.onnx").exists()


HANGS = """
import sys, time
import {script} as script, toy

class Hanging(toy.Toy):
    def step(self, actions):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 60:
            print("hangs", flush=True)
            time.sleep(1000)
        return super().step(actions)

args = script.Args(env="toy", num_envs=8, max_iterations=9, save_interval=1000, device="cpu", logger="none")
script.train(args, Hanging(8))
"""


def test_ctrl_c_answers_and_the_second_one_stops_now():
    """Also a simulator that hangs; the last iteration that was finished is saved."""
    paths = f"{pathlib.Path(SCRIPT).parent}{os.pathsep}{instruments.TESTS}"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})
    process = subprocess.Popen([sys.executable, "-c", HANGS.format(script="ppo_continuous")], **options)
    assert any(line == "hangs\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert "finishing this iteration, then saving; once more to stop now" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode != 0 and error.endswith("KeyboardInterrupt\n")
    assert saved_in(only_run()) == {"model_0.pt", "model_1.pt"}


def test_ctrl_c_in_main(monkeypatch):
    """In play, in an export: one word and no traceback."""
    monkeypatch.setattr(module, "play", lambda args: os.kill(os.getpid(), signal.SIGINT) or time.sleep(9))
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", "--play"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        with pytest.raises(SystemExit, match="^stopped$"):
            module.main()
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread(capsys):
    """Where signals cannot be caught: they are the caller's then."""
    thread = threading.Thread(target=lambda: module.train(args_of(log_root="", max_iterations=2), toy.Toy(8)))
    thread.start()
    thread.join()
    assert "iteration 1/2" in capsys.readouterr().out


class Dying(Cartpole):
    """A simulator that fails in step 60, in the third iteration."""

    steps = 0

    def step(self, actions):
        self.steps += 1
        if self.steps == 60:
            raise MemoryError("the simulator has died")
        return super().step(actions)


@pytest.mark.parametrize("save_interval", [1, 1000])
def test_an_error_keeps_the_last_finished_iteration(save_interval, capsys):
    """It goes on to the caller; what was half learned is left out, and what is saved can be resumed."""
    good = module.train(args_of(max_iterations=2, log_root=""), make("cartpole", 16))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(MemoryError, match="the simulator has died"):
        module.train(args_of(save_interval=save_interval), Dying(16))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert saved_in(only_run()) == {"model_0.pt", "model_1.pt"}
    saved = torch.load(only_run() / "model_1.pt", weights_only=True)
    assert saved["iter"] == 1 and all(is_same(saved[name], part) for name, part in module.state_of(good.agent).items())
    whole = save_interval == 1  # then it was there already, with the environment's state
    assert (saved["infos"] is not None) == whole
    assert len(module.train(args_of(resume=True), make("cartpole", 16))) == 4
    assert ("the environment starts afresh" in capsys.readouterr().out) != whole


def test_an_error_in_the_first_iteration_saves_nothing():
    with pytest.raises(FloatingPointError, match="iteration 0"):
        module.train(args_of(init_at_random_ep_len=False), toy.Toy(8, fault=("reward", 5, math.nan)))
    assert saved_in(only_run()) == {"nan_0.pt"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["obs", "reward"])
def test_nan_stops_the_run(kind, value):
    """Not finite at step 60 (iteration 2, step 11) in environment 3: named, dumped, and what is saved is from before."""
    good = module.train(args_of(max_iterations=2, log_root="", init_at_random_ep_len=False), toy.Toy(8))
    with pytest.raises(FloatingPointError) as error:
        module.train(args_of(save_interval=1000, init_at_random_ep_len=False), toy.Toy(8, fault=(kind, 60, value)))
    # The observation that follows action 11 is row 12
    place = "obs policy of environment 3, column [0], is {} at step 12" if kind == "obs" else "rewards of environment 3, "
    place += "" if kind == "obs" else "column [], is {} at step 11"
    assert str(error.value) == f"iteration 2: {place.format(value)}; the rollout is in {(only_run() / 'nan_2.pt').absolute()}"
    assert saved_in(only_run()) == {"model_0.pt", "model_1.pt", "nan_2.pt"}
    saved = torch.load(only_run() / "model_1.pt", weights_only=True)  # of the last good iteration
    assert saved["iter"] == 1 and all(is_same(saved[name], part) for name, part in module.state_of(good.agent).items())
    assert torch.load(only_run() / "nan_2.pt", weights_only=True)["rewards"].shape == (25, 8)


@pytest.mark.parametrize("fault", [("obs", 30, 1e22), ("reward", 30, 1e30)], ids=["statistics", "loss"])
def test_a_finite_number_whose_square_is_not_stops_the_run(fault):
    """The tanh saturates and the loss is fine, the variance of the observations is not; or the squared error is not."""
    args = args_of(activation="tanh", init_at_random_ep_len=False)
    with pytest.raises(FloatingPointError, match="^iteration 1: all that was read is finite, but not") as error:
        module.train(args, toy.Toy(8, fault=fault))
    assert {"obs": "largest: 1e+22 in obs policy", "reward": "largest: 1e+30 in rewards"}[fault[0]] in str(error.value)
    assert saved_in(only_run()) == {"model_0.pt", "nan_1.pt"}


def test_a_nan_is_no_done():
    """bool(nan) is True: an episode would end where nobody knows whether it has."""
    env = toy.Toy(8)
    step = env.step

    def spoiled(actions):
        obs, rewards, dones, extras = step(actions)
        dones = dones.float()
        if env.steps == 30:
            dones[5] = math.nan
        return obs, rewards, dones, extras

    env.step = spoiled
    with pytest.raises(FloatingPointError, match="rewards of environment 5, column .*, is nan at step 5"):
        module.train(args_of(), env)


@pytest.fixture
def rollout():
    """An agent, and a storage of finite numbers."""
    args, obs = args_of(num_envs=8, actor_obs=("policy",), critic_obs=("policy",)), toy.Toy(8).get_observations()
    agent = module.make_agent(toy.Toy(8), obs, args)
    return agent, module.make_storage(agent, obs, 1, args)


PARTS = ["obs policy", "actions", "log_prob", "values", "rewards", "bootstrap", "weights", "statistics", "losses"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PARTS)
def test_each_of_them_must_be_finite(name, value, rollout):
    """By itself: a sample that no mini-batch takes spoils no loss."""
    agent, storage = rollout
    losses = {"Loss/kl": torch.zeros(()), "Loss/value": torch.zeros(())}
    assert module.all_finite(agent, storage, losses)
    parts = {"weights": agent.critic.mlp[2].bias.data, "statistics": agent.actor.obs_normalizer._var}
    parts["losses"] = losses["Loss/value"]
    part = parts[name] if name in parts else storage[tuple(name.split())][2]
    part.view(-1)[-1] = value
    assert not module.all_finite(agent, storage, losses)


def test_the_earliest_is_named(rollout):
    """What follows from it is not: the policy puts out NaN from then on."""
    _, storage = rollout
    storage["obs", "policy"][7, 1] = math.inf
    storage["rewards"][5, 6] = storage["rewards"][5, 7] = math.nan
    storage["policy", "loc"][6:] = math.nan
    assert module.describe_nan(9, storage, None) == "iteration 9: rewards of environment 6, column [], is nan at step 5"


def test_a_group_that_nobody_reads(monkeypatch):
    """It is not stored, and may hold anything: a lidar that says inf where it sees nothing."""
    env, stored, make_storage = toy.Toy(8), [], module.make_storage
    read = env.get_observations
    env.get_observations = lambda: read().set("lidar", torch.full((8, 3), math.inf))
    monkeypatch.setattr(module, "make_storage", lambda *a: stored.append(make_storage(*a)) or stored[0])
    assert len(module.train(args_of(log_root="", max_iterations=2), env)) == 2
    assert list(stored[0]["obs"].keys()) == ["policy"]


def test_a_new_run_starts_from_a_policy(capsys):
    """With --checkpoint and without --resume: the actor is that of the checkpoint, all else is new."""
    first = module.train(args_of(max_iterations=3), make("cartpole", 16))
    settings = dict(max_iterations=1, schedule="fixed", learning_rate=1e-30, log_root="")
    second = module.train(args_of(checkpoint="model_2.pt", seed=5, **settings), make("cartpole", 16))
    assert "starting from the policy of" in capsys.readouterr().out and len(second) == 1
    assert is_same(dict(second.agent.actor.mlp.state_dict()), dict(first.agent.actor.mlp.state_dict()))
    assert not is_same(dict(second.agent.critic.mlp.state_dict()), dict(first.agent.critic.mlp.state_dict()))
    assert second.agent.optimizer.state_dict()["state"][0]["step"] == 20  # of one iteration


def test_which_checkpoint():
    """A path, a folder, a glob, or a name in a run of the experiment; of several the newest run's last, by number; never a
    download, and of a folder no other rank's than the first."""
    root = pathlib.Path("logs/ppo_continuous_cartpole").absolute()
    for name in (
        "1/model_0",
        "1/model_50",
        "1/model_100",
        "2_mine/model_0",
        "2_mine/model_9",
        "wandb/abc/model_900",
        "1/rank_1/model_100",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {"actor_state_dict": {"x": torch.zeros(1)}, "iter": int(name.split("_")[-1])}  # rsl_rl's tell no more
        torch.save(checkpoint, root / f"{name}.pt")
    (root / "3").mkdir()  # a run that was killed before its first checkpoint
    for wanted, found in {
        "": "2_mine/model_9.pt",
        "model_0.pt": "2_mine/model_0.pt",
        "model_50.pt": "1/model_50.pt",
        "model_*0.pt": "2_mine/model_0.pt",
        f"{root}/1/model_*.pt": "1/model_100.pt",
        "logs/*/*mine/model_*.pt": "2_mine/model_9.pt",
        "logs/ppo_continuous_cartpole/1/model_0.pt": "1/model_0.pt",
        "logs/ppo_continuous_cartpole/1": "1/model_100.pt",
        "logs/ppo_continuous_cartpole": "2_mine/model_9.pt",
    }.items():
        assert module.find_checkpoint(args_of(checkpoint=wanted)).absolute() == root / found, wanted


def test_a_run_name_of_any_kind():
    """Its run is found again."""
    history = module.train(args_of(run_name="walk/fast [1]", max_iterations=1), make("cartpole", 16))
    assert module.find_checkpoint(args_of()) == history.run_dir / "model_0.pt"


def test_rsl_rl_loads_our_checkpoint_and_we_load_its(tmp_path):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    import reference

    args, env = args_of(actor_obs=("policy",), critic_obs=("policy",)), make("cartpole", 16)
    module.train(args, env)
    ours = only_run() / "model_5.pt"
    runner = reference.make_runner(args, make("cartpole", 16), log_dir=None)
    runner.load(str(ours))
    assert runner.current_learning_iteration == 5
    obs = make("cartpole", 16).get_observations()
    assert torch.equal(runner.get_inference_policy()(obs), module.load_policy(ours).act(obs))
    runner.learn(1)  # its optimizer takes our state
    # Theirs, with other layer sizes than the defaults: the policy, and a resumed training
    theirs = tmp_path / "theirs" / "model_7.pt"
    theirs.parent.mkdir()
    runner.current_learning_iteration, runner.logger.writer = 7, None
    runner.save(str(theirs))
    with pytest.raises(module.UserError, match=r"holds weights only; load_policy\(path, args\)"):
        module.load_policy(theirs)
    settings = module.Args(env="cartpole", num_envs=2, device="cpu")  # of layers it knows nothing
    for policy in (module.load_policy(theirs, settings), module.load_policy(theirs, settings, env)):
        assert torch.equal(runner.get_inference_policy()(obs), policy.act(obs))
    assert module.play(dataclasses.replace(settings, checkpoint=str(theirs)), make("cartpole", 2))["episode_length"] > 0
    history = module.train(args_of(resume=True, checkpoint=str(theirs), max_iterations=9, log_root=""), make("cartpole", 16))
    assert len(history) == 1
    assert history[0]["Loss/learning_rate"] != 1e-3


def run_main(monkeypatch, *flags) -> None:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", command(*flags)[1:])
    module.main()


@pytest.mark.parametrize("distribution", ["gaussian", "heteroscedastic", "beta"])
def test_export_and_policy_agree(distribution, exports, monkeypatch, capsys):
    """Exported after training and by --export alike, with the normaliser inside."""
    import onnx
    import onnxruntime

    actor = module.train(args_of(max_iterations=2, distribution=distribution), make("cartpole", 16)).agent.actor
    run, obs = only_run(), torch.randn(5, 5)
    policy = module.load_policy(run / "model_1.pt")
    for again in (False, True):
        if again:
            for file in (run / "exported").iterdir():
                file.unlink()
            run_main(monkeypatch, "--export", "--checkpoint", "model_1.pt")
        assert capsys.readouterr().out.count("policy.onnx, which act like the policy") == 1
        assert onnx.load(run / "exported" / "policy.onnx").opset_import[0].version == 18
        session = onnxruntime.InferenceSession(run / "exported" / "policy.onnx")
        actions = policy.act(TensorDict({"policy": obs, "more": obs}, batch_size=[5]))
        np.testing.assert_allclose(instruments.run_each(session, {"obs": obs.numpy()})[0], actions.numpy(), atol=1e-5)
        script = torch.jit.load(run / "exported" / "policy.pt")
        assert torch.allclose(script(obs), actions, rtol=0.0, atol=1e-6) and torch.equal(policy(obs), actions)
        assert script.reset(torch.ones(1)) is None and script.reset(None) is None
    expected = actor.distribution(actor(TensorDict({"policy": obs}, batch_size=[5]))).mean
    assert torch.equal(actions, expected) and actions.std() > 0.0
    assert not actions.requires_grad and policy.reset(torch.ones(1)) is None


def test_a_loaded_policy_is_on_the_cpu_and_goes_elsewhere():
    """Wherever it was trained; also what it remembers. It takes observations from anywhere, in any precision."""
    run_dir = module.train(args_of(max_iterations=1), make("cartpole", 16)).run_dir
    policy, obs = module.load_policy(run_dir / "model_0.pt"), make("cartpole", 2).get_observations()
    actions = policy.act(obs.double())
    assert actions.device.type == policy.memory.device.type == "cpu"
    device = "cuda" if torch.cuda.is_available() else "meta"
    assert policy.to(device).act(obs).device.type == policy.memory.device.type == device
    policy.reset(torch.ones(1, dtype=torch.bool, device=device))


def test_a_checkpoint_with_settings_that_are_not_known_here():
    """As of another script, whose policy may well be the same."""
    path = module.train(args_of(max_iterations=1), make("cartpole", 16)).run_dir / "model_0.pt"
    obs, checkpoint = make("cartpole", 2).get_observations(), torch.load(path, weights_only=True)
    checkpoint["resume"]["args"]["use_mirror_loss"] = True
    torch.save(checkpoint, "other.pt")
    assert torch.equal(module.load_policy("other.pt").act(obs), module.load_policy(path).act(obs))


def test_play_writes_a_film(capsys, monkeypatch):
    module.train(args_of(max_iterations=1), make("cartpole", 16))
    means = module.play(args_of(play_envs=2))
    assert (only_run() / "play_model_0.gif").read_bytes()[:4] == b"GIF8"
    output = capsys.readouterr().out
    assert output.count("\nepisode ") == 2 and means["episode_length"] > 0
    run_main(monkeypatch, "--play", "--agent", "random", "--play-envs", "3", "--env", "toy:make")
    assert capsys.readouterr().out.count("\nepisode ") == 3


def test_play_clips_the_actions_and_tells_the_policy_of_new_episodes():
    """As in training; a policy with memory would go on with that of the last episode."""
    env, seen = toy.Toy(4), []

    class Wild:
        act = staticmethod(lambda obs: torch.full((4, 1), 5.0))
        reset = staticmethod(lambda dones: seen.append(dones.clone()))

    step, given = env.step, []
    env.step = lambda actions: given.append(actions.clone()) or step(actions)
    env.episode_length_buf = torch.tensor([0, 5, 10, 15])
    means = record.roll_out(env, Wild, "film", args_of(clip_actions=0.5))
    assert torch.equal(torch.stack(given), torch.full((20, 4, 1), 0.5))
    assert torch.stack(seen).sum(0).tolist() == [1, 1, 1, 1] and means["episode_length"] == (20 + 15 + 10 + 5) / 4


def test_play_plots_what_the_quadruped_tracks_and_its_feet():
    """`<path>.png` and `<path>_footfalls.png`, of the first episode."""
    env = make("quadruped", 2, play=True)
    env.max_episode_length = 30
    module.play(args_of(agent="zero", env="quadruped"), env)
    (folder,) = pathlib.Path("logs").iterdir()
    assert {file.name for file in folder.iterdir()} == {"play_zero.gif", "play_zero.png", "play_zero_footfalls.png"}
    assert (folder / "play_zero.png").read_bytes()[:4] == b"\x89PNG"


class Wide(toy.Toy):
    """Its observations are float64."""

    def get_observations(self):
        return super().get_observations().double()


def make_wide(num_envs):
    return Wide(num_envs)


def test_observations_in_float64(capsys):
    """Training stores them in the networks' type, and so must a policy take them, also one that is filmed."""
    module.train(args_of(env="test_runs:make_wide", max_iterations=1, video_interval=1))
    output = capsys.readouterr().out
    assert "playing video_0" in output and "no film" not in output
    policy, obs = module.load_policy(only_run() / "model_0.pt"), toy.Toy(8).get_observations()
    assert torch.equal(policy.act(obs), policy.act(obs.double()))


def test_pictures_that_cannot_be_drawn_cost_nothing_else(monkeypatch, capsys):
    """It is said once."""
    monkeypatch.setattr(Cartpole, "render", lambda env: 1 / 0)
    means = module.play(args_of(agent="zero", play_envs=2))
    assert means["episode_length"] == 500 and capsys.readouterr().out.count("no film or plot: ZeroDivisionError") == 1


def test_a_viewer_of_the_simulators_own():
    """It is given the policy, from observations to actions, and takes over."""
    module.train(args_of(max_iterations=1), make("cartpole", 16))
    env, acted = make("cartpole", 2), []

    def view(act):
        acted.append(act(env.get_observations()))
        act.reset(torch.ones(2, dtype=torch.bool))

    env.view = view
    assert module.play(args_of(viewer=True), env) == {}
    assert torch.equal(acted[0], module.load_policy(only_run() / "model_0.pt").act(env.get_observations()))


class Drawn(toy.Toy):
    """It draws on a screen of its own; its configuration is a class, and has a lock inside."""

    cfg = {"class": toy.Toy, "lock": threading.Lock(), "dataclass": module.Args}

    def render(self):
        return None


def test_an_environment_that_draws_elsewhere_and_has_an_odd_configuration():
    module.train(args_of(max_iterations=1), Drawn(8))
    module.play(args_of(agent="zero"), Drawn(8))
    assert "lock" in (only_run() / "env.txt").read_text()


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
        extras["log"] = {"ended": self.ended[-1], "steps": self.buffer, "level": level, "Metrics/own": 1}
        return obs, rewards, dones, extras


def test_a_log_is_averaged_over_all_its_entries():
    """As rsl_rl does; where a step has none it does not count."""
    env = Sparse(8)
    history = module.train(args_of(max_iterations=3, num_steps_per_env=20, log_root=""), env)
    for iteration, metrics in enumerate(history):
        entries = torch.cat(env.ended[20 * iteration : 20 * (iteration + 1)])
        assert len(entries) == 8 and metrics["Episode/ended"] == pytest.approx(entries.mean().item())
        assert metrics["Episode/level"] == pytest.approx((10 * 2.0 + 10 * 4.0 + 10 * 6.0) / 30)
        assert metrics["Episode/steps"] == 20 * iteration + 10.5 and metrics["Metrics/own"] == 1.0


def test_an_environment_is_closed_by_who_made_it(monkeypatch):
    closed, env = [], toy.Toy(8)
    monkeypatch.setattr(toy.Toy, "close", lambda env: closed.append(env), raising=False)
    module.train(args_of(max_iterations=1), env)
    module.play(args_of(play=True), env)
    assert not closed
    module.train(args_of(env="toy:make", max_iterations=1, video_interval=1))
    assert len(closed) == 2  # what was trained in, and what was filmed in
    module.play(args_of(env="toy:make", play=True))
    assert len(closed) == 3


def test_no_terminations():
    means = module.play(args_of(agent="random", play_envs=2, terminations=False))
    assert means["episode_length"] == 500


def test_films_during_training(capsys):
    """They change nothing, and where none can be made, as of an environment that was handed over, the training goes on."""
    history = module.train(args_of(max_iterations=2, video_interval=1), make("cartpole", 16))
    assert {"video_0.gif", "video_1.gif"} <= {file.name for file in only_run().iterdir()}
    plain = module.train(args_of(max_iterations=2, log_root=""), make("cartpole", 16))
    assert str(numbers(history)) == str(numbers(plain)) and "no film" not in capsys.readouterr().out
    assert len(module.train(args_of(env="cartpole", max_iterations=2, video_interval=1, log_root="other"), toy.Toy(8))) == 2
    assert capsys.readouterr().out.count("no film") == 1  # it says so once


def wandb_records(path):
    """W&B's file: a header of 7 bytes, then LevelDB's log, blocks of 32 KiB with records of (checksum, length, kind) and body."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_offline():
    """A row for each iteration; a run that is resumed goes on as the same one, another is another; films and checkpoints are there."""
    import wandb

    settings = dict(logger="wandb", video_interval=1)
    module.train(args_of(max_iterations=3, **settings), make("cartpole", 16))
    module.train(args_of(max_iterations=5, resume=True, **settings), make("cartpole", 16))
    module.train(args_of(max_iterations=2, seed=2, **settings), make("cartpole", 16))
    wandb.finish()
    wanted, end = [[0, 1, 2], [3, 4], [0, 1]], time.monotonic() + 60.0
    while True:  # another process writes, on a loaded machine late
        files = sorted(pathlib.Path("logs").glob("*/wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
        kinds = [{kind: [] for kind in ("run", "history")} for _ in files]
        for file, found in zip(files, kinds):
            for entry in wandb_records(file):
                found.setdefault(entry.WhichOneof("record_type"), []).append(entry)
        rows = [
            [{(x.key or x.nested_key[0]): x.value_json for x in entry.history.item} for entry in found["history"]]
            for found in kinds
        ]
        steps = [[int(row["global_step"]) for row in of_run] for of_run in rows]
        if steps == wanted or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert steps == wanted and all("Loss/surrogate" in row for of_run in rows for row in of_run)
    first, resumed, other = [found["run"][0].run.run_id for found in kinds]
    assert first == resumed != other
    uploaded = [{path.name for path in file.parent.joinpath("files").iterdir()} for file in files]
    assert {"model_0.pt", "model_2.pt", "video_0.gif", "video_2.gif"} <= uploaded[0] and "model_4.pt" in uploaded[1]


class ListWriter:
    """A writer of one's own: made from the run's folder, with add_scalar; what else it has may be close."""

    made = []

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, {}, False
        ListWriter.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def close(self):
        self.closed = True


class Bare:
    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, tag, value, step):
        assert not math.isnan(value)  # of an iteration in which no episode ended


class Breaking(Bare):
    def add_scalar(self, tag, value, step):
        raise ConnectionError("the server is gone")

    def close(self):
        raise ConnectionError("the server is gone for good")


def test_a_writer_that_breaks_costs_no_training(capsys):
    """It says so once."""
    history = module.train(args_of(logger="test_runs:Breaking", max_iterations=3), make("cartpole", 16))
    output = capsys.readouterr().out
    assert len(history) == 3 and saved_in(history.run_dir) == {"model_0.pt", "model_2.pt"}
    assert output.count("no add_scalar: ConnectionError: the server is gone\n") == 1 and output.count("gone for good") == 1


def test_writer_of_ones_own():
    history = module.train(args_of(logger="test_runs:ListWriter", max_iterations=2), make("cartpole", 16))
    import test_runs

    (writer,) = test_runs.ListWriter.made
    assert writer.scalars["Loss/value"] == [(0, history[0]["Loss/value"]), (1, history[1]["Loss/value"])]
    assert set(writer.scalars) == set(history[1])
    assert writer.folder == str(history.run_dir) and writer.closed
    history = module.train(args_of(logger="test_runs:Bare", max_iterations=1, log_root="other"), make("cartpole", 16))
    assert math.isnan(history[0]["Train/mean_reward"])


def test_wandb_run_path(monkeypatch):
    """Downloads the newest checkpoint; W&B's server is replaced, its client's interface is not."""
    import wandb

    class File:
        def __init__(self, name):
            self.name = name

        def download(self, root, replace):
            path = pathlib.Path(root) / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self.name} of abc")
            return open(path)

    class Run:
        id = "../abc"
        names = ("model_9", "model_10", "model_2", "nan_99", "../../../model_99", "/model_98")  # it is anybody's
        files = staticmethod(lambda: [File(f"{name}.pt") for name in Run.names])

    asked = []
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"run": staticmethod(lambda path: asked.append(path) or Run())}))
    path = module.find_checkpoint(args_of(wandb_run_path="me/walking/abc"))
    assert path.read_text() == "model_10.pt of abc" and asked == ["me/walking/abc"]
    assert path.parent == pathlib.Path("logs/ppo_continuous_cartpole/wandb/___abc").absolute()
    Run.names = ("nan_99",)
    with pytest.raises(module.UserError, match="no such file"):
        module.find_checkpoint(args_of(wandb_run_path="me/walking/abc"))


def test_the_record_of_git_runs_nothing_of_the_repositorys(monkeypatch, tmp_path):
    """What its configuration names, and its hooks, would run with every training in a clone of somebody else's."""
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\necho caught\n")
    trap.chmod(0o755)

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    script = tmp_path / "ppo_continuous.py"
    script.write_text("before\n")
    (tmp_path / ".gitattributes").write_text("*.py diff=trap filter=trap\n")
    git("add", "ppo_continuous.py", ".gitattributes")
    git("commit", "-m", "first")
    named = ("diff.external", "diff.trap.command", "diff.trap.textconv", "core.fsmonitor", "core.pager", "core.editor")
    for name in (*named, "filter.trap.clean", "filter.trap.smudge", "filter.trap.process"):
        git("config", name, str(trap))
    git("config", "filter.trap.required", "true")
    shutil.copy(trap, tmp_path / ".git/hooks/post-index-change")
    script.write_text("after \xe9\n", encoding="latin-1")
    (tmp_path / "password.txt").write_text("secret")
    monkeypatch.setattr(module, "SCRIPT", script)
    record = (module.make_run_dir(args_of(), toy.Toy(8)) / "git.diff").read_bytes()
    assert b"-before\n+after \xe9" in record and b"secret" not in record and not (tmp_path / "sprung").exists()


def test_without_a_file():
    """As pasted into a notebook."""
    flags = ["--env", "cartpole", "--num-envs", "16", "--max-iterations", "1", "--device", "cpu", "--logger", "none"]
    source = f"exec(open({SCRIPT!r}).read())"
    run = subprocess.run(
        [sys.executable, "-c", source, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(SCRIPT).parent)},
    )
    assert run.returncode == 0, run.stderr
    assert {file.name for file in only_run().iterdir()} >= {"model_0.pt", "args.txt", "exported"}


@pytest.mark.parametrize("name", ["ppo_continuous", "ppo_rnn", "ppo_cnn", "ppo_multigpu"])
def test_copied_script_runs_alone(name, tmp_path):
    """Outside the repository, with a five-line environment and what the script's first lines tell to install."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_ppo.py").write_text(pathlib.Path(SCRIPT).with_name(f"{name}.py").read_text())
    (folder / "toy.py").write_text(pathlib.Path(toy.__file__).read_text())
    for absent in ("onnx", "onnxscript", "onnxruntime", "wandb", "yaml", "matplotlib"):
        (folder / f"{absent}.py").write_text(f"raise ModuleNotFoundError('no {absent}', name='{absent}')")
    flags = ["--env", "toy:make", "--max-iterations", "1", "--logger", "none"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command(*flags, script="my_ppo.py"), cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "logs" / "my_ppo_toy_make").glob("*/model_0.pt"))) == 1


def test_importing_changes_nothing():
    check = """
import os, random, signal, sys, tensordict, torch  # some of which add to sys.path
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
def test_the_asked_precision_is_the_gpus(name, monkeypatch):
    """cuDNN's, for convolutions and RNNs, is a flag of its own: a policy would act in TF32 and learn in float32.

    On a CPU, some of which can multiply like that too, the losses stay the reference's.
    """
    script, before = __import__(name), (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    expected = {("cuda", "highest"): "highest", ("cuda", "high"): "high", ("cpu", "high"): "highest"}
    try:
        for (device, asked), precision in expected.items():
            script.set_up_torch(script.Args(device=device, float32_matmul_precision=asked))
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.allow_tf32 == (precision == "high")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_a_setting_may_differ_between_the_networks(exports):
    """From Python; also what an exported or loaded policy is built of, and what a resumed run must have."""
    differing = dict(activation=dict(actor="elu", critic="tanh"), obs_normalization=dict(actor=False, critic=True))
    args = args_of(**differing, max_iterations=2)
    history = module.train(args, make("cartpole", 16))
    actor, critic = history.agent.actor, history.agent.critic
    assert isinstance(actor.mlp[1], torch.nn.ELU) and isinstance(critic.mlp[1], torch.nn.Tanh)
    assert isinstance(actor.obs_normalizer, torch.nn.Identity) and critic.obs_normalizer.count > 0
    obs = make("cartpole", 2).get_observations()
    path = history.run_dir / "model_1.pt"
    assert torch.equal(module.load_policy(path).act(obs), module.Policy(actor).act(obs))
    assert (history.run_dir / "exported" / "policy.onnx").exists()
    assert len(module.train(args_of(**differing, max_iterations=3, resume=True), make("cartpole", 16))) == 1
    with pytest.raises(module.UserError, match="--activation .*: choose from elu, selu"):
        module.train(args_of(activation=dict(actor="elu", critic="tan")), make("cartpole", 16))


@pytest.mark.parametrize("remembers", ["actor", "critic"])
def test_one_of_two_networks_may_have_a_memory(remembers, monkeypatch):
    """A recurrent actor with an MLP as critic, or the other way round: trained and resumed as one run."""
    import ppo_rnn

    monkeypatch.setattr(ppo_rnn, "export_policy", lambda *_: None)
    kinds = dict(actor="none", critic="none") | {remembers: "gru"}
    settings = dict(TINY_RNN, rnn_type=kinds)
    whole = ppo_rnn.train(ppo_rnn.Args(**settings, max_iterations=3, log_root="whole"), make("cartpole", 16))
    has = {name: any("rnn" in key for key in getattr(whole.agent, name).state_dict()) for name in ("actor", "critic")}
    assert has == {"actor": remembers == "actor", "critic": remembers == "critic"}
    ppo_rnn.train(ppo_rnn.Args(**settings, max_iterations=2, log_root="logs"), make("cartpole", 16))
    rest = ppo_rnn.train(ppo_rnn.Args(**settings, max_iterations=3, log_root="logs", resume=True), make("cartpole", 16))
    assert str(numbers(rest)) == str(numbers(whole)[2:])
    assert len(ppo_rnn.load_policy(rest.run_dir / "model_2.pt").act(make("cartpole", 1).get_observations())) == 1


TINY_RNN = dict(env="cartpole", num_envs=16, num_steps_per_env=8, rnn_hidden_dim=8, device="cpu", logger="none")
TINY_RNN |= dict(actor_hidden_dims=(8,), critic_hidden_dims=(8,))
