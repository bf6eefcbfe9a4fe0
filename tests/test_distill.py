"""distill_dagger.py: equal to rsl_rl's Distillation; its memories, teachers, mixing, ranks, files; and what becomes of a student."""

import copy
import dataclasses
import functools
import inspect
import math
import multiprocessing
import operator
import os
import pathlib
import signal
import socket
from unittest import mock

import cameras
import cases
import instruments
import pytest
import torch
import torch.distributed as dist
import toy
from tensordict import TensorDict

import distill_dagger as module
import ppo_cnn
import ppo_continuous
import ppo_rnn
from envs import defaults, make
from envs.navigation import Cue

CUE = dict(env="navigation-cue", num_envs=16, log_root="", logger="none", device="cpu")
TEACHER = CUE | dict(actor_obs=("policy", "privileged"), critic_obs=("policy", "privileged"), actor_hidden_dims=(16, 8))
TEACHER |= dict(critic_hidden_dims=(8,), num_mini_batches=2, max_iterations=2, log_root="teachers")
STUDENT = CUE | dict(
    student_obs=("policy",), student_hidden_dims=(16,), num_steps_per_env=30, gradient_length=15, max_iterations=10
)
STUDENT |= dict(rnn_hidden_dim=12, rnn_num_layers=2)
KINDS = pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
RNN = dict(rnn_hidden_dim=8)


def make_env(args):
    return make(args.env, args.num_envs, seed=args.seed)


@pytest.fixture
def no_export(monkeypatch):
    """Exporting takes seconds."""
    for script in (module, ppo_continuous, ppo_rnn, ppo_cnn):
        monkeypatch.setattr(script, "export_policy", lambda *_: None)


def train_teacher(script=ppo_continuous, world=None, **settings):
    """A few iterations of PPO, enough for weights and moments that are not the initial ones; its checkpoint and Args."""
    args = script.Args(**(TEACHER | settings))
    history = script.train(args, world or make_env(args))
    return str(history.run_dir / f"model_{args.max_iterations - 1}.pt"), args


def student_args(teacher, **settings):
    return module.Args(**(STUDENT | dict(teacher=teacher) | settings))


def rollouts(args, env):
    """A training's agent, and what each of its rollouts has stored."""
    stored, collect = [], module.collect

    def noted(env, agent, storage, *rest):
        metrics = collect(env, agent, storage, *rest)
        stored.append(storage.clone())
        return metrics

    with mock.patch.object(module, "collect", noted):
        return module.train(args, env).agent, stored


def after_load(script, args, env):
    """What a training has, as it is before its first iteration."""
    seen, load = [], script.load

    def noted(agent, *rest):
        start = load(agent, *rest)
        seen.append(copy.deepcopy(agent))
        return start

    with mock.patch.object(script, "load", noted):
        history = script.train(args, env)
    return seen[0], history


def numbers(history):
    """All that is not a time, as text, so that NaN equals NaN."""
    return [str({name: value for name, value in metrics.items() if "Perf" not in name}) for metrics in history]


def assert_equal(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


# ---- Against rsl_rl -------------------------------------------------------------------------------------------------

BIT_EQUAL = {
    "defaults": dict(),
    "carried over two epochs": dict(num_steps_per_env=24, gradient_length=16, num_learning_epochs=2, loss_type="huber"),
    "three epochs, clipped": dict(num_steps_per_env=20, gradient_length=5, num_learning_epochs=3, max_grad_norm=0.05),
    "one step each": dict(num_steps_per_env=8, gradient_length=1, optimizer="sgd", obs_normalization=False),
    "heteroscedastic": dict(distribution="heteroscedastic", std_type="log", optimizer="adamw", activation="tanh"),
    "beta": dict(distribution="beta", seed=4),
    "quadruped": dict(env="quadruped", seed=5),
    "cnn": dict(env="cameras:make", student_obs=("depth", "policy"), cnn_output_channels=(3, 5), cnn_norm="batch", seed=6),
}


@pytest.mark.parametrize("name", BIT_EQUAL)
def test_trajectory_is_bit_equal(name, no_export):
    """float32, ten iterations, episodes ending inside the rollout: every loss and weight, random stream included."""
    pytest.importorskip("rsl_rl")
    import reference

    settings = BIT_EQUAL[name]
    path, teacher = train_teacher(env=settings.get("env", "navigation-cue"))
    args = student_args(path, **settings)
    expected, runner = reference.run_distillation(args, make_env(args), teacher)
    history, agent = cases.run(module, args, make_env(args))
    assert len(history) == len(expected) == 10 and sum(metrics["Train/num_episodes"] for metrics in history) > 0
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        for tag, value in theirs.items():
            # the std's mean is one of means here
            assert ours[tag] == (pytest.approx(value, rel=1e-6) if tag == "Policy/mean_std" else value), f"{iteration}: {tag}"
    for part in ("student", "teacher"):
        assert_equal(agent[part].state_dict(), getattr(runner.alg, part).state_dict())


@KINDS
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(num_steps_per_env=24, gradient_length=16, num_learning_epochs=2, max_grad_norm=0.1)],
    ids=["defaults", "carried over two epochs"],
)
def test_recurrent_trajectory(rnn_type, settings, double, no_export):
    """float64 to 1e-8 over ten iterations, episodes ending inside the rollout."""
    pytest.importorskip("rsl_rl")
    import reference

    path, teacher = train_teacher()
    args = student_args(path, rnn_type=rnn_type, **settings)
    expected, runner = reference.run_distillation(args, make_env(args), teacher)
    history, agent = cases.run(module, args, make_env(args))
    assert len(history) == len(expected) == 10 and sum(metrics["Train/num_episodes"] for metrics in history) > 0
    for ours, theirs in zip(history, expected):
        assert {tag: ours[tag] for tag in theirs} == pytest.approx(theirs, rel=1e-8)
    theirs = runner.alg.student.state_dict()
    assert list(agent["student"].state_dict()) == list(theirs) and "rnn.rnn.weight_ih_l1" in theirs
    for key, value in agent["student"].state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-10, msg=key)


def test_checkpoints_go_both_ways(tmp_path, no_export):
    """rsl_rl continues our run, in the same process; we play its student, and continue its run with all that it knows."""
    pytest.importorskip("rsl_rl")
    import reference

    path, teacher = train_teacher()
    args = student_args(path, max_iterations=2, log_root="runs")
    ours = module.train(args, make_env(args)).run_dir / "model_1.pt"
    _, runner = reference.run_distillation(dataclasses.replace(args, teacher=(str(ours),)), make_env(args), teacher)
    assert runner.current_learning_iteration == 2  # it repeats the last one of ours, and makes another
    theirs = tmp_path / "model_3.pt"
    torch.save(runner.alg.save() | {"iter": 3, "infos": None}, theirs)
    given, env = dataclasses.replace(args, student_hidden_dims=(9, 9)), make_env(args)  # the file says how many there are
    policy, obs = module.load_policy(theirs, given, env, batch_size=16), env.get_observations()
    assert torch.equal(runner.get_inference_policy()(obs), policy.act(obs))
    resumed = dataclasses.replace(args, resume=True, checkpoint=str(theirs), max_iterations=5, log_root="", learning_rate=0.5)
    agent, history = after_load(module, resumed, make_env(args))
    assert len(history) == 1 and history[0]["Loss/learning_rate"] == 1e-3
    assert_equal(agent.student.state_dict(), runner.alg.student.state_dict())
    for ours, theirs in zip(
        agent.optimizer.state_dict()["state"].values(), runner.alg.optimizer.state_dict()["state"].values()
    ):
        assert_equal(ours, theirs)


# ---- Teachers -------------------------------------------------------------------------------------------------------

TEACHERS = {
    "mlp": (ppo_continuous, dict()),
    "tanh, log std": (ppo_continuous, dict(activation="tanh", std_type="log", obs_normalization=False)),
    "heteroscedastic": (ppo_continuous, dict(distribution="heteroscedastic")),
    "beta": (ppo_continuous, dict(distribution="beta", action_range=(-2.0, 1.0))),
    "gru": (ppo_rnn, dict(rnn_type="gru", **RNN)),
    "lstm": (ppo_rnn, dict(rnn_type="lstm", rnn_num_layers=2, **RNN)),
    "cnn": (
        ppo_cnn,
        dict(actor_obs=("policy", "image", "depth"), cnn_output_channels=(3, 5), cnn_stride=(2, 1), cnn_norm="batch"),
    ),
}


def assert_labels(stored, policies, env_index=lambda number: slice(None)):
    """What is stored as the teacher's is what the policies say, whose memory lasts from one rollout to the next."""
    for storage in stored:
        for row in storage[:-1]:
            for number, policy in enumerate(policies):
                index = env_index(number)
                torch.testing.assert_close(row["teacher_actions"][index], policy.act(row["obs"])[index], rtol=0, atol=1e-5)
                policy.reset(row["dones"])
    assert stored[0]["dones"][:-1].any()


@pytest.mark.parametrize("name", TEACHERS)
def test_any_script_teaches(name, no_export):
    """The labels are what the checkpoint's own script plays, with architecture and groups from the checkpoint alone.

    On purpose different from rsl_rl: what it remembers goes on from one iteration to the next.
    """
    script, settings = TEACHERS[name]
    build = cameras.make if script is ppo_cnn else lambda *a, seed: make("navigation-cue", *a, seed=seed)
    path, _ = train_teacher(script, build(16, seed=1), **settings, max_iterations=1)
    agent, stored = rollouts(student_args(path, max_iterations=3), build(16, seed=1))
    assert_labels(stored, [script.load_policy(path, batch_size=16)])
    saved = torch.load(path, weights_only=True)["actor_state_dict"]
    assert_equal(agent.teacher.state_dict(), saved)  # it learns nothing, and its normaliser neither
    assert not torch.equal(agent.student.obs_normalizer._mean, torch.zeros(1, 8))


def test_a_student_teaches_in_turn(no_export):
    """From the newest checkpoint of a folder; what is said of the student's network is not taken for the teacher's."""
    path, _ = train_teacher(max_iterations=1)
    first = module.train(student_args(path, rnn_type="gru", max_iterations=1, log_root="runs"))
    agent, stored = rollouts(
        student_args(str(first.run_dir.parent), student_hidden_dims=(4,), max_iterations=2), make("navigation-cue", 16)
    )
    assert agent.teacher.groups == ("policy",) and agent.teacher.hidden_shape == (1, 2, 12)
    assert agent.student.rnn is None and agent.student.mlp[0].out_features == 4
    assert_labels(stored, [module.load_policy(first.run_dir / "model_0.pt", batch_size=16)])


@pytest.mark.parametrize("teacher_obs", [(), ("policy", "privileged")], ids=["by convention", "said"])
def test_recurrent_teacher_of_the_reference(teacher_obs, tmp_path, no_export):
    """An rsl_rl checkpoint says nothing but tensors; sizes, kind of memory and of standard deviation are read from them."""
    path, _ = train_teacher(ppo_rnn, rnn_type="lstm", rnn_num_layers=2, std_type="log", **RNN)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["resume"]
    torch.save(checkpoint, tmp_path / "model_1.pt")
    args = student_args(str(tmp_path / "model_1.pt"), teacher_obs=teacher_obs, rnn_type="gru", max_iterations=2)
    agent, stored = rollouts(args, make_env(args))
    assert agent.teacher.rnn.is_lstm and agent.teacher.hidden_shape == (2, 2, 8)
    assert not agent.student.rnn.is_lstm and agent.student.hidden_shape == (1, 2, 12)
    assert_labels(stored, [ppo_rnn.load_policy(path, batch_size=16)])


def test_newest_run_of_a_folder():
    """Also where runs keep copies: other ranks' files, and what W&B has to upload."""
    older, newer, newest = (pathlib.Path("logs/teacher") / f"2026-0{month}-01" for month in (1, 2, 3))
    files = [older / "model_900.pt", newer / "model_9.pt", newer / "model_10.pt"]
    files += [older / "rank_1/model_900.pt", older / "wandb/offline-run-1/files/model_900.pt"]
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        iteration = int(path.stem.removeprefix("model_"))
        torch.save({"actor_state_dict": {"number": torch.tensor(number)}, "iter": iteration}, path)
    newest.mkdir()
    (newest / "args.txt").touch()  # of a run that has just begun
    for folder, number in (("logs/teacher", 2), (newer, 2), (files[1], 1)):
        assert module.read_teacher(str(folder), module.Args(device="cpu"))[0]["number"] == number
    assert module.read_teacher(str(older), module.Args(device="cpu"))[0]["number"] in (0, 3)  # of one run all the same


class Skills(Cue):
    """The cue task, with a number that says which expert is right, and the same one-hot."""

    def _observe(self):
        obs = super()._observe()
        skill = torch.arange(self.num_envs) % 2
        one_hot = torch.eye(2)[skill]
        return TensorDict({**obs, "skill": skill[:, None].float(), "one_hot": one_hot}, [self.num_envs])


@pytest.mark.parametrize("index", ["skill", "one_hot"])
def test_experts(index, no_export):
    """Even environments are labelled by the first teacher, odd ones by the second, which remembers; each reads its own groups."""
    first, _ = train_teacher(actor_obs=("privileged", "policy"))
    second, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    agent, stored = rollouts(student_args((first, second), teacher_index=index, max_iterations=2), Skills(16, seed=1))
    policies = [ppo_continuous.load_policy(first, batch_size=16), ppo_rnn.load_policy(second, batch_size=16)]
    assert_labels(stored, policies, env_index=lambda number: slice(number, None, 2))
    assert agent.student.groups == ("policy",)


# ---- Who acts -------------------------------------------------------------------------------------------------------


def shares_of_the_teacher(beta, beta_decay):
    """Per iteration: where the teacher's action was taken, (6 * 20, 64), and where episodes ended."""
    cases.write_teacher("teacher.pt", make("navigation-cue", 1))
    args = student_args("teacher.pt", num_envs=64, beta=beta, beta_decay=beta_decay, num_steps_per_env=20, gradient_length=20)
    _, stored = rollouts(dataclasses.replace(args, max_iterations=6), make_env(args))
    taken = [(storage["actions"] == storage["teacher_actions"])[:-1].all(-1) for storage in stored]
    return torch.cat(taken), torch.cat([storage["dones"][:-1] for storage in stored])


def test_mixing(no_export):
    """Who acts is drawn for each episode, the first ones too, with the beta of its iteration."""
    taken, dones = shares_of_the_teacher(1.0, 1.0)
    assert taken.all() and dones.any()
    taken, _ = shares_of_the_teacher(0.0, 1.0)
    assert not taken.any()
    taken, dones = shares_of_the_teacher(0.5, 1.0)
    assert 0.3 < taken[0].float().mean() < 0.7  # 64 draws: 0.5, give or take three standard deviations of 0.06
    assert 0.35 < taken.float().mean() < 0.65  # some 100 draws: 0.5, give or take three standard deviations of 0.05
    changes = taken[1:] != taken[:-1]
    assert changes.any() and not (changes & ~dones[:-1]).any()  # only from one episode to the next
    taken, dones = shares_of_the_teacher(1.0, 0.0)
    later = dones.cumsum(0)[20:-1] - dones.cumsum(0)[19] > 0  # an episode has ended since the first iteration
    assert taken[:20].all() and later.any() and not taken[21:][later].any()


@pytest.mark.parametrize("num_envs", [16, 8], ids=["exact", "an environment that starts afresh"])
def test_rates_decay_and_survive_a_resume(num_envs, no_export):
    """beta_i = beta_1 decay^(i - 1), and so the learning rate, whatever becomes of the environment's state."""
    path, _ = train_teacher(max_iterations=1)
    rates = dict(learning_rate=8e-3, learning_rate_decay=0.5, beta=0.8, beta_decay=0.25)
    args = student_args(path, log_root="runs", max_iterations=2, **rates)
    first = module.train(args, make_env(args))
    args = dataclasses.replace(args, resume=True, max_iterations=4, num_envs=num_envs)
    metrics = [*first, *module.train(args, make_env(args))]
    assert [x["Loss/learning_rate"] for x in metrics] == [8e-3, 4e-3, 2e-3, 1e-3]
    assert [x["Policy/beta"] for x in metrics] == pytest.approx([0.8, 0.2, 0.05, 0.0125], rel=1e-6)


@pytest.mark.parametrize("task", ["quadruped", "quadruped-rough", "cartpole"])
def test_recommendations_for_distillation_are_its_own(task):
    """Every recommended name is a setting; those meant for distillation reach this script and no other."""
    mine, base = (defaults(task, vars(script.Args())) for script in (module, ppo_continuous))
    module.Args(**mine), ppo_continuous.Args(**base)
    assert ("learning_rate_decay" in mine) == task.startswith("quadruped") and "learning_rate_decay" not in base
    assert mine.get("num_envs") != base.get("num_envs") or task == "cartpole"


# ---- Precision ------------------------------------------------------------------------------------------------------

STUDENTS = {
    "mlp": dict(),
    "lstm": dict(rnn_type="lstm"),
    "cnn": dict(student_obs=("policy", "depth"), cnn_norm="batch", cnn_output_channels=(3,), cnn_stride=1),
    "cnn and gru": dict(student_obs=("image", "policy", "depth"), rnn_type="gru", cnn_stride=2),
}


def build(name, num_envs=16, seed=1):
    return cameras.make(num_envs, seed=seed) if "cnn" in name else make("navigation-cue", num_envs, seed=seed)


@pytest.mark.parametrize("name", STUDENTS)
def test_mixed_precision(name, no_export, monkeypatch):
    """Any student learns in bfloat16: the first loss is rounded indeed, by less than 2 %; distributions stay float32."""
    seen, make_policy = set(), module.Gaussian.make
    monkeypatch.setattr(module.Gaussian, "make", lambda *x: seen.update((x[1].dtype, x[2].dtype)) or make_policy(*x))
    cases.write_teacher("teacher.pt", build(name))
    settings = dict(teacher_obs=("policy", "privileged"), max_iterations=2) | STUDENTS[name]
    plain, mixed = (
        module.train(student_args("teacher.pt", use_mixed_precision=mixed, **settings), build(name)) for mixed in (False, True)
    )
    assert 0.0 < abs(mixed[0]["Loss/behavior"] / plain[0]["Loss/behavior"] - 1.0) < 0.02  # bfloat16 has 8 bits, 0.4 %
    assert len(mixed) == 2 and seen == {torch.float32}


@KINDS
def test_a_memory_is_float32_where_the_rest_is_not(rnn_type):
    """What autocast makes of an RNN on CUDA is float16, whatever it was asked for."""
    obs = TensorDict({"policy": torch.randn(8, 5)}, [8])
    student = module.make_actor(obs, 2, module.Args(rnn_type=rnn_type, student_obs=("policy",)))
    seen = []
    student.rnn.rnn.register_forward_hook(lambda rnn, inputs, outputs: seen.append((inputs[0].dtype, outputs[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = student(obs, torch.zeros(8, student.state_size))
    assert seen == [(torch.float32, torch.float32)] and state.dtype == torch.float32 and output.dtype == torch.bfloat16


# ---- Files ----------------------------------------------------------------------------------------------------------

RESUMED = {
    "mlp": dict(learning_rate_decay=0.5, optimizer="adamw"),
    "gru, mixed": dict(rnn_type="gru", beta=0.6, beta_decay=0.7),
    "cnn and lstm": dict(student_obs=("policy", "depth"), cnn_norm="batch", cnn_stride=(2, 1), rnn_type="lstm"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_equals_the_uninterrupted_one(name, no_export):
    """To the last bit, though it stops in the middle of episodes: what student and teacher remember, and who acts."""
    path, _ = train_teacher(ppo_rnn, build(name), rnn_type="lstm", **RNN)
    settings = dict(max_iterations=5, num_steps_per_env=10, gradient_length=5) | RESUMED[name]
    whole = module.train(student_args(path, log_root="whole", **settings), build(name))
    args = student_args(path, log_root="parts", **settings)
    module.train(dataclasses.replace(args, max_iterations=2), build(name))
    rest = module.train(dataclasses.replace(args, resume=True), build(name, seed=99))
    assert numbers(rest) == numbers(whole[2:]) and len(rest) == 3
    for part in ("student", "teacher"):
        assert_equal(vars(rest.agent)[part].state_dict(), vars(whole.agent)[part].state_dict())


def test_experts_resume(no_export):
    """All of them are in the checkpoint, with what each remembers."""
    first, _ = train_teacher()
    second, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    args = student_args((first, second), teacher_index="skill", max_iterations=4, log_root="whole")
    whole = module.train(args, Skills(16, seed=1))
    args = dataclasses.replace(args, log_root="parts")
    module.train(dataclasses.replace(args, max_iterations=2), Skills(16, seed=1))
    rest = module.train(dataclasses.replace(args, resume=True), Skills(16, seed=9))
    assert numbers(rest) == numbers(whole[2:]) and len(rest) == 2


@pytest.mark.parametrize("name", STUDENTS)
def test_exported_student_acts_the_same(name):
    """load_policy, ONNX Runtime and TorchScript over 50 steps, robots starting anew in between, against the student itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    cases.write_teacher("teacher.pt", build(name))
    settings = dict(teacher_obs=("policy", "privileged"), max_iterations=2, log_root="runs") | STUDENTS[name]
    history = module.train(student_args("teacher.pt", **settings), build(name))
    student, exported = history.agent.student.eval(), history.run_dir / "exported"
    policy = module.load_policy(history.run_dir / "model_1.pt", batch_size=16)
    session = onnxruntime.InferenceSession(exported / "policy.onnx", providers=["CPUExecutionProvider"])
    script = torch.jit.load(exported / "policy.pt")  # of one robot
    states = {"lstm": ["h_in", "c_in"], "cnn and gru": ["h_in"]}.get(name, [])
    assert [x.name for x in session.get_inputs()] == ["obs", *student.images, *states]
    assert [x.name for x in session.get_outputs()] == ["actions", *[state.replace("in", "out") for state in states]]
    zeros = hidden = [torch.zeros(2, 16, 12).numpy()] * len(states)
    state, env = torch.zeros(16, student.state_size), build(name, seed=3)
    obs, ended = env.get_observations(), 0
    for step in range(50):
        with torch.no_grad():
            expected, state = student.decide(obs, state)
        groups = [group for group in student.groups if group not in student.images]
        inputs = {"obs": torch.cat([obs[group] for group in groups], dim=-1)} | {group: obs[group] for group in student.images}
        feed = {group: x.numpy() for group, x in inputs.items()} | dict(zip(states, hidden))
        onnx_actions, *hidden = instruments.run_each(session, feed)
        for actions in (policy.act(obs), torch.as_tensor(onnx_actions)):
            torch.testing.assert_close(actions, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(script(*(x[:1] for x in inputs.values())), expected[:1], rtol=0, atol=1e-5)
        obs, _, dones, _ = env.step(expected)
        if step == 24:
            policy.reset()
            script.reset()
            hidden, state = zeros, torch.zeros_like(state)
        # a robot that starts anew: forgotten in all
        policy.reset(dones)
        script.reset(dones[:1])
        hidden = [h * (1 - dones.float().numpy())[None, :, None] for h in hidden]
        state[dones.bool()] = 0.0
        ended += int(dones[0])
    assert ended


def test_play(no_export):
    """A film does not stop the training: its policy is a copy, since batch norms would stop learning; --play needs no teacher."""
    cases.write_teacher("teacher.pt", build("cnn and lstm"))
    settings = dict(env="cameras:make", teacher_obs=("policy", "privileged"), student_obs=("policy", "depth"), cnn_norm="batch")
    args = student_args("teacher.pt", max_iterations=1, log_root="runs", rnn_type="lstm", play_envs=3, **settings)
    history = module.train(dataclasses.replace(args, video_interval=1))
    assert (history.run_dir / "video_0.gif").exists()
    assert all(part.training for part in history.agent.student.modules())
    pathlib.Path("teacher.pt").unlink()
    limit = cameras.make(1).max_episode_length
    assert 0 < module.play(dataclasses.replace(args, play=True, teacher=()))["episode_length"] <= limit


@pytest.mark.parametrize(
    "script, settings, reads",
    [
        (ppo_continuous, dict(), ("policy",)),
        (ppo_rnn, dict(rnn_type="gru", rnn_hidden_dim=12), ("policy",)),
        (ppo_cnn, dict(cnn_stride=(2, 1), cnn_norm="batch"), ("policy", "depth")),
    ],
    ids=["mlp", "gru", "cnn"],
)
def test_student_is_an_actor_of_ppo(script, settings, reads, no_export):
    """--checkpoint without --resume: its weights load as they are, act as they did, and PPO goes on from them."""
    world = lambda: cameras.make(16, seed=1)
    cases.write_teacher("teacher.pt", world())
    settings = settings | dict(rnn_num_layers=1) if script is ppo_rnn else settings
    args = student_args("teacher.pt", teacher_obs=("policy", "privileged"), max_iterations=2, log_root="runs")
    history = module.train(dataclasses.replace(args, student_obs=reads, **settings), world())
    checkpoint, student = history.run_dir / "model_1.pt", history.agent.student.eval()
    tuning = TEACHER | settings | dict(actor_obs=reads, actor_hidden_dims=(16,), max_iterations=3, log_root="")
    agent, tuned = after_load(script, script.Args(**tuning, checkpoint=str(checkpoint)), world())
    assert_equal(agent.actor.state_dict(), student.state_dict())
    obs = world().get_observations()
    with torch.no_grad():
        expected, _ = student.decide(obs, torch.zeros(16, student.state_size))
    torch.testing.assert_close(script.Policy(agent.actor.eval(), 16).act(obs), expected, rtol=0, atol=1e-6)
    assert len(tuned) == 3 and not torch.equal(tuned.agent.actor.mlp[0].weight, student.mlp[0].weight)


def poison(env, group, at):
    """What its `at`-th step returns of environment 3 is not a number."""
    step, steps = env.step, []

    def poisoned(actions):
        steps.append(step(actions))
        if len(steps) == at:
            steps[-1][0][group][3] = math.nan
        return steps[-1]

    env.step = poisoned
    return env


def test_nan_stops_the_run(no_export):
    """Said is what it was and where it came from first; the last good checkpoint stays, and nothing of the process group."""
    path, _ = train_teacher(max_iterations=1)
    args = student_args(path, max_iterations=4, log_root="runs", save_interval=1)
    with pytest.raises(FloatingPointError) as error:
        module.train(args, poison(make_env(args), "privileged", 35))  # iteration 1, after its fifth action
    assert "iteration 1: obs privileged of environment 3, column [0], is nan at step 5" in str(error.value)
    files = {file.name for file in pathlib.Path("runs").glob("*/*/*.pt")}
    assert files == {"model_0.pt", "nan_1.pt"} and not dist.is_initialized()


# ---- Refusals -------------------------------------------------------------------------------------------------------

BOTH = dict(teacher=("teacher.pt", "teacher.pt"))
REFUSED = {
    "steps that fill no gradient step": (dict(gradient_length=16), "--gradient-length 16: must divide num_steps_per_env x"),
    "nor do those of two epochs": (dict(gradient_length=7, num_learning_epochs=2), "--gradient-length 7: must divide"),
    "no teacher": (dict(teacher=()), "--teacher (): must name a checkpoint"),
    "no teacher to resume": (dict(teacher=(), resume=True), "--teacher (): must name a checkpoint"),
    "a teacher that is not there": (dict(teacher="nowhere"), "--teacher ('nowhere',): is no checkpoint, and no folder"),
    "no checkpoint": (dict(teacher="text.pt"), "text.pt: is no whole checkpoint"),
    "no policy in it": (dict(teacher="empty.pt"), "empty.pt: is no whole checkpoint (KeyError: 'actor_state_dict')"),
    "half a policy": (dict(teacher="half.pt"), "half.pt: teacher differs (RuntimeError: Error(s) in loading state_dict for Model: Missing"),
    "wrong groups": (dict(teacher_obs=("policy",)), "teacher.pt: teacher differs ("),
    "another task": (
        dict(env="quadruped"),
        "torch.Size([1, 12]) from checkpoint, the shape in current model is torch.Size([1, 107])",
    ),
    "teacher's group that is not there": (dict(teacher_obs=("camera",)), "--teacher-obs ('camera',): must name vectors or images"),
    "student's group that is not there": (dict(student_obs=("camera",)), "--student-obs ('camera',): must name vectors or images"),
    "several teachers and no index": (
        BOTH,
        "--teacher-index : chooses among several teachers; there are 2",
    ),
    "an index and one teacher": (dict(teacher_index="skill"), "--teacher-index skill: chooses among several teachers; there are 1"),
    "an index that is not there": (BOTH | dict(teacher_index="nothing"), "--teacher-index nothing: "),
    "an index of another size": (BOTH | dict(teacher_index="policy"), "--teacher-index policy: "),
    "no layers": (dict(student_hidden_dims=(16, 0)), "--student-hidden-dims (16, 0)"),
    "beta": (dict(beta=1.5), "--beta 1.5: must lie between 0 and 1"),
    "its decay": (dict(beta_decay=-0.1), "--beta-decay -0.1: must lie between 0 and 1"),
    "the learning rate's decay": (dict(learning_rate_decay=1.01), "--learning-rate-decay 1.01: must lie between 0 and 1"),
    "the loss": (dict(loss_type="l1"), "--loss-type l1: choose from mse, huber"),
    "the memory": (dict(rnn_type="mamba"), "--rnn-type mamba: choose from none, lstm, gru"),
    "the gradient's norm": (dict(max_grad_norm=0.0), "--max-grad-norm 0.0: must be greater than 0"),
    "an encoder": (dict(cnn_kernel_size=20, student_obs=("policy", "depth")), "make no encoder of depth (1, 9, 7)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """In one line, before anything is written; no process group stays behind."""
    settings, message = REFUSED[name]
    args = student_args(**dict(teacher="teacher.pt", teacher_obs=("policy", "privileged"), log_root="runs") | settings)
    cases.write_teacher("teacher.pt", make("navigation-cue", 1))
    checkpoint = torch.load("teacher.pt", weights_only=True)
    torch.save({"weights": 3}, "empty.pt")
    pathlib.Path("text.pt").write_text("weights")
    del checkpoint["actor_state_dict"]["mlp.2.bias"]
    torch.save(checkpoint, "half.pt")
    env = {"an encoder": cameras.make, "another task": lambda n: make("quadruped", n)}.get(name, Skills)(16)
    with pytest.raises(module.UserError) as error:
        module.train(args, env)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not pathlib.Path("runs").exists() and not dist.is_initialized()


# ---- On the device --------------------------------------------------------------------------------------------------

DEVICE = {
    "gru, mixed": dict(rnn_type="gru", beta=0.7, beta_decay=0.9, learning_rate_decay=0.5),
    "mlp": dict(num_learning_epochs=2, gradient_length=12, max_grad_norm=0.1),
    "experts": dict(teacher_index="one_hot"),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole rollout captured", "policy step captured"])
@pytest.mark.parametrize("name", DEVICE)
def test_nothing_waits_and_a_captured_run_equals_the_eager_one(name, whole, no_export):
    """What student and teachers remember, who acts, and both rates go from replay to replay through tensors alone."""
    path, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    teacher = (path, path) if name == "experts" else (path,)
    settings = dict(num_envs=8, num_steps_per_env=12, max_iterations=5, gradient_length=4) | DEVICE[name]
    instruments.check_replay(module, student_args(teacher, **settings), lambda: Skills(8, seed=1), whole)


# ---- Ranks ----------------------------------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # its server has imported torch, so that a rank starts at once
FORKS.set_forkserver_preload(["distill_dagger", "envs.navigation"])


def live(rank, folder, tasks):
    """The life of one rank's process: as torchrun starts it, through the tasks (name, port, function, arguments)."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.dup2(os.open(f"out.{rank}", os.O_CREAT | os.O_WRONLY), 1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    module.export_policy, results = lambda _, folder, *__: folder.mkdir(), {}
    for name, port, function, *arguments in tasks:
        os.environ["MASTER_PORT"] = port
        results[name] = function(rank, *arguments)
    torch.save(results, f"{rank}.pt")


def on_two_ranks(**tasks):
    """Both ranks' results of the tasks, name=(function, *arguments), one after the other."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in tasks]
    ports = [str(x.getsockname()[1]) for x in sockets]
    for x in sockets:
        x.close()
    tasks = [(name, port, *task) for (name, task), port in zip(tasks.items(), ports)]
    processes = [FORKS.Process(target=live, args=(rank, os.getcwd(), tasks)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [torch.load(f"{rank}.pt", weights_only=False) for rank in range(2)]


def on_toys(rank, args):
    """Without noise, since the ranks' random streams are not those of one rank; and with a part of the 8 environments."""
    torch.set_default_dtype(torch.float64)
    env, size = toy.Toy(8, groups=("policy", "privileged")), args.num_envs
    part = slice(rank * size, (rank + 1) * size)
    env.x, env.episode_length_buf, env.num_envs = env.x[part], 3 * torch.arange(8)[part], size
    with mock.patch.object(torch.distributions.Normal, "rsample", lambda policy: policy.mean):
        history = module.train(args, env)
    losses = [{tag: x for tag, x in metrics.items() if tag.startswith("Loss/")} for metrics in history]
    return losses, history.agent.student.state_dict(), history.run_dir


def test_two_ranks_equal_one_with_all_environments(double, no_export):
    """Equal weights on both ranks, to the bit; equal to those of one process with both ranks' environments, to 1e-9."""
    cases.write_teacher("teacher.pt", toy.Toy(8, groups=("policy", "privileged")))
    settings = dict(env="toy", init_at_random_ep_len=False, max_grad_norm=0.5, rnn_hidden_dim=8, log_root="runs")
    settings |= dict(teacher_obs=("policy", "privileged"))
    tasks = {x: student_args("teacher.pt", **settings, rnn_type=x, num_envs=4) for x in ("none", "gru")}
    first, second = on_two_ranks(**{rnn_type: (on_toys, args) for rnn_type, args in tasks.items()})
    for rnn_type, args in tasks.items():
        (losses, ours, _), (others, theirs, _) = first[rnn_type], second[rnn_type]
        expected, alone, _ = on_toys(0, dataclasses.replace(args, num_envs=8))
        assert_equal(ours, theirs)
        for key, value in ours.items():
            torch.testing.assert_close(value, alone[key], rtol=1e-9, atol=1e-11, msg=f"{rnn_type} {key}")
        for one, other, metrics in zip(losses, others, expected, strict=True):
            assert (one["Loss/behavior"] + other["Loss/behavior"]) / 2 == pytest.approx(metrics["Loss/behavior"], rel=1e-9)
            assert one["Loss/grad_norm"] == pytest.approx(metrics["Loss/grad_norm"], rel=1e-9)


def stop(env, at):
    """At its `at`-th step this process is asked to end."""
    step, steps = env.step, []

    def stopped(actions):
        steps.append(step(actions))
        if len(steps) == at:
            signal.raise_signal(signal.SIGTERM)
        return steps[-1]

    env.step = stopped
    return env


def on_cues(rank, args, fault=lambda env: env):
    """A training of which rank 1 may suffer a fault: its numbers, student and folder, or why it stopped."""
    make_own = module.make_env
    with mock.patch.object(module, "make_env", lambda args: fault(make_own(args)) if rank else make_own(args)):
        try:
            history = module.train(args)
        except FloatingPointError as error:
            return str(error)
    return numbers(history), history.agent.student.state_dict(), history.run_dir


def test_two_ranks_resume_exactly(no_export):
    """A signal to rank 1 ends both; resumed, both go on as if nothing had been, to the last bit. And if one fails, both stop."""
    path, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    settings = dict(rnn_type="lstm", beta=0.6, beta_decay=0.7, max_iterations=5, num_steps_per_env=10, gradient_length=5)
    settings |= dict(logger="tensorboard", experiment_name="parts")
    args = student_args(path, log_root="runs", **settings)
    whole = dataclasses.replace(args, experiment_name="whole")
    ranks = on_two_ranks(whole=(on_cues, whole), parts=(on_cues, args, functools.partial(stop, at=15)))
    resumed = on_two_ranks(
        rest=(on_cues, dataclasses.replace(args, resume=True)),
        nan=(on_cues, dataclasses.replace(whole, log_root=""), functools.partial(poison, group="policy", at=20)),
    )
    for rank, (before, after) in enumerate(zip(ranks, resumed)):
        (whole, student, folder), (parts, _, _), (rest, resumed_student, _) = before["whole"], before["parts"], after["rest"]
        assert len(whole) == 5 and parts == whole[:2] and rest == whole[2:]
        assert_equal(resumed_student, student)
        assert {file.name for file in folder.glob("*.pt")} == {"model_0.pt", "model_4.pt"}
        assert len(list(folder.glob("events.*"))) == (rank == 0) and (folder / "exported").exists() == (rank == 0)
        assert bool(pathlib.Path(f"out.{rank}").read_text()) == (rank == 0)
    assert ranks[0]["whole"][0] != ranks[1]["whole"][0]  # each rank lives through something else
    assert ranks[1]["whole"][2] == ranks[0]["whole"][2] / "rank_1"
    assert_equal(ranks[0]["whole"][1], ranks[1]["whole"][1])
    # After the last step of the second rollout: what rank 0 has seen and learned is finite, and yet both say where it was.
    fault = "rank 1: iteration 1: obs policy of environment 3, column [0], is nan at step 10"
    assert resumed[0]["nan"].startswith(fault) and resumed[1]["nan"].startswith(fault)


# ---- Against the other scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, name", [(ppo_rnn, "RNN.__init__"), (ppo_rnn, "RNN.forward"), (ppo_cnn, "CNN")])
def test_blocks_of_the_other_scripts_are_theirs(script, name):
    ours, theirs = (operator.attrgetter(name)(where) for where in (module, script))
    assert inspect.getsource(ours) == inspect.getsource(theirs)
