"""distill_dagger.py: equal to rsl_rl's Distillation; its memories, teachers, mixing, ranks, files; and what becomes of a student."""

import copy
import dataclasses
import inspect
import os
import pathlib
import subprocess
import sys

import cameras
import cases
import instruments
import pytest
import torch
import torch.nn as nn
from tensordict import TensorDict

import distill_dagger as module
import ppo_cnn
import ppo_continuous
import ppo_rnn
from envs import make

CUE = dict(env="navigation-cue", num_envs=16, log_root="", logger="none")
TEACHER = CUE | dict(actor_obs=("policy", "privileged"), critic_obs=("policy", "privileged"), actor_hidden_dims=(16, 8))
TEACHER |= dict(critic_hidden_dims=(8,), num_mini_batches=2, max_iterations=2, log_root="teachers")
STUDENT = CUE | dict(
    student_obs=("policy",), student_hidden_dims=(16,), num_steps_per_env=30, gradient_length=15, max_iterations=10
)
STUDENT |= dict(rnn_hidden_dim=12, rnn_num_layers=2)
RECURRENT = pytest.mark.parametrize("rnn_type", ["lstm", "gru"])


def make_env(args):
    return make(args.env, args.num_envs, seed=args.seed)


@pytest.fixture
def no_export(monkeypatch):
    for script in (module, ppo_continuous, ppo_rnn, ppo_cnn):
        monkeypatch.setattr(script, "export_policy", lambda *_: None)


def train_teacher(script=ppo_continuous, world=None, **settings):
    """A few iterations of PPO, enough for weights and moments that are not the initial ones; its checkpoint and Args."""
    args = script.Args(**(TEACHER | settings))
    args = dataclasses.replace(args, experiment_name=f"{script.__name__}_{abs(hash(str(args)))}")
    script.train(args, world or make_env(args))
    return str(module.find_teacher(f"teachers/{args.experiment_name}")), args


def student_args(path, **settings):
    return module.Args(**(STUDENT | dict(teacher=(path,) if isinstance(path, str) else path) | settings))


def distil(args, env=None):
    return cases.run(module, args, env or make_env(args))


def numbers(history):
    return str([{name: value for name, value in metrics.items() if "Perf" not in name} for metrics in history])


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
    pytest.importorskip("rsl_rl")
    import reference

    settings = BIT_EQUAL[name]
    path, teacher = train_teacher(env=settings.get("env", "navigation-cue"))
    args = student_args(path, **settings)
    expected, runner = reference.run_distillation(args, make_env(args), teacher)
    history, agent = distil(args)
    assert len(history) == len(expected) == 10 and sum(metrics["Train/num_episodes"] for metrics in history) > 0
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        for tag, value in theirs.items():
            # the std's mean is one of means here
            assert ours[tag] == (pytest.approx(value, rel=1e-6) if tag == "Policy/mean_std" else value), f"{iteration}: {tag}"
    for part in ("student", "teacher"):
        theirs = getattr(runner.alg, part).state_dict()
        assert list(agent[part].state_dict()) == list(theirs)
        for key, value in agent[part].state_dict().items():
            assert torch.equal(value, theirs[key]), f"{part} {key}"


@RECURRENT
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
    history, agent = distil(args)
    assert len(history) == len(expected) == 10 and sum(metrics["Train/num_episodes"] for metrics in history) > 0
    for ours, theirs in zip(history, expected):
        assert {tag: ours[tag] for tag in theirs} == pytest.approx(theirs, rel=1e-8)
    theirs = runner.alg.student.state_dict()
    assert list(agent["student"].state_dict()) == list(theirs) and "rnn.rnn.weight_ih_l1" in theirs
    for key, value in agent["student"].state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-10, msg=key)


def test_checkpoints_go_both_ways(tmp_path, no_export):
    """rsl_rl continues our run and plays our student, and we continue its run, without naming the teacher again."""
    pytest.importorskip("rsl_rl")
    import reference

    path, teacher = train_teacher()
    args = student_args(path, max_iterations=2, log_root="runs")
    module.train(args, make_env(args))
    ours = module.find_teacher("runs")
    _, runner = reference.run_distillation(dataclasses.replace(args, teacher=(str(ours),)), make_env(args), teacher)
    assert runner.current_learning_iteration == 2  # it repeats the last one of ours, and makes another
    theirs = tmp_path / "model_3.pt"
    torch.save(runner.alg.save() | {"iter": 3, "infos": None}, theirs)
    obs = make_env(args).get_observations()
    assert torch.equal(runner.get_inference_policy()(obs), module.load_policy(theirs)(obs))
    resumed = dataclasses.replace(args, teacher=(), resume=True, checkpoint=str(theirs), max_iterations=5)
    resumed = dataclasses.replace(resumed, log_root="", teacher_obs=("policy", "privileged"))
    history, agent = distil(resumed)
    assert len(history) == 1
    for key, value in runner.alg.teacher.state_dict().items():
        assert torch.equal(agent["teacher"].state_dict()[key], value)


# ---- Teachers -------------------------------------------------------------------------------------------------------


def in_place(args, env):
    """What `train` has before its first iteration: student, teacher, storage, episodes and the function that collects."""
    torch.manual_seed(args.seed)
    obs = env.get_observations()
    student = module.make_student(obs, env.num_actions, args)
    teacher = module.make_teacher(module.read_teachers(args, {}, torch.device("cpu")), student, obs, env.num_actions, args)
    storage, episodes = (
        module.make_storage(obs, env.num_actions, student, teacher, args),
        module.make_episodes(args, obs.device),
    )
    act_rows = [lambda row=row: module.act(student, teacher, row) for row in storage.unbind(0)[:-1]]
    return student, teacher, storage, lambda: module.collect(env, storage, episodes, act_rows, args)


RNN = dict(rnn_hidden_dim=8)


@pytest.mark.parametrize(
    "script, settings",
    [
        (ppo_continuous, dict()),
        (ppo_continuous, dict(activation="tanh", std_type="log", obs_normalization=False)),
        (ppo_continuous, dict(distribution="heteroscedastic")),
        (ppo_continuous, dict(distribution="beta", action_range=(-2.0, 1.0))),
        (ppo_rnn, dict(rnn_type="gru", **RNN)),
        (ppo_rnn, dict(rnn_type="lstm", rnn_num_layers=2, **RNN)),
        (
            ppo_cnn,
            dict(actor_obs=("policy", "image", "depth"), cnn_output_channels=(3, 5), cnn_stride=(2, 1), cnn_norm="batch"),
        ),
    ],
    ids=["mlp", "tanh, log std", "heteroscedastic", "beta", "gru", "lstm", "cnn"],
)
def test_any_script_teaches(script, settings, no_export):
    """The labels are what the checkpoint's own script plays, with architecture and groups from the checkpoint alone."""
    images = script is ppo_cnn
    build = cameras.make if images else lambda *a, seed: make("navigation-cue", *a, seed=seed)
    path, _ = train_teacher(script, build(16, seed=1), **settings, max_iterations=1)
    args = student_args(path)
    _, teacher, storage, collect = in_place(args, build(16, seed=1))
    policy = script.load_policy(path)
    for _ in range(3):
        collect()
        for row in storage.unbind(0)[:-1]:
            torch.testing.assert_close(row["teacher_actions"], policy(row["obs"]), rtol=0, atol=1e-5)
            policy.reset(row["dones"])
    assert storage["dones"].any() and not any(p.requires_grad for p in teacher.parameters())


def test_a_student_teaches_in_turn(no_export):
    path, _ = train_teacher(max_iterations=1)
    module.train(student_args(path, rnn_type="gru", max_iterations=1, log_root="runs"))
    args = student_args("runs", student_hidden_dims=(4,))
    student, teacher, storage, collect = in_place(args, make_env(args))
    assert tuple(teacher.shapes) == ("policy",) and teacher.state_size == 24 and student.mlp[0].out_features == 4
    collect()
    policy = module.load_policy(module.find_teacher("runs"))
    for row in storage.unbind(0)[:-1]:
        torch.testing.assert_close(row["teacher_actions"], policy(row["obs"]), rtol=0, atol=1e-6)
        policy.reset(row["dones"])


def test_film_leaves_the_student_in_training(no_export):
    """A film's policy is a copy: an RNN in eval mode has no backward pass in cuDNN, and batch norms would stop learning."""
    path, _ = train_teacher(max_iterations=1)
    args = student_args(path, rnn_type="gru")
    student, *_ = in_place(args, make_env(args))
    module.LoadedPolicy(student, ("policy",))
    assert all(part.training for part in student.modules())


def test_recurrent_teacher_remembers_over_iterations(no_export):
    """In the second rollout it continues where the first ended; with its memory wiped between (rsl_rl) it says otherwise."""
    path, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    args = student_args(path, num_steps_per_env=10, gradient_length=5)
    student, teacher, storage, collect = in_place(args, make_env(args))
    optimizer = module.FlatOptimizer(student.parameters(), args.learning_rate, args.optimizer)
    collect()
    first = storage[:-1].clone()
    module.update(student, optimizer, storage, module.gradient_step, args)
    collect()
    both = torch.cat([first, storage[:-1].clone()])
    goes_on = 1.0 - both["dones"].unsqueeze(-1).float()
    for start, same in ((0, True), (10, False)):
        state, labels = torch.zeros(16, teacher.state_size), []
        for t in range(start, 20):
            label, state = teacher.decide(both["obs"][t], state)
            state = goes_on[t] * state
            labels.append(label)
        difference = (torch.stack(labels)[-10:] - both["teacher_actions"][-10:]).abs().max()
        assert (difference < 1e-6) == same


def test_recurrent_teacher_of_the_reference(tmp_path, no_export):
    """An rsl_rl checkpoint says nothing but tensors; sizes and kind of memory are read from them."""
    path, teacher = train_teacher(ppo_rnn, rnn_type="lstm", rnn_num_layers=2, **RNN)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["resume"]
    torch.save(checkpoint, tmp_path / "model_1.pt")
    for teacher_obs in ((), ("policy", "privileged")):  # by convention, or said
        args = student_args(str(tmp_path), teacher_obs=teacher_obs, rnn_type="gru")
        student, teacher, *_ = in_place(args, make_env(args))
        assert teacher.args.rnn_type == "lstm" and teacher.args.rnn_num_layers == 2 and teacher.state_size == 32
        assert student.args.rnn_type == "gru" and student.state_size == 24


def test_teacher_that_does_not_fit(no_export):
    path, _ = train_teacher()
    with pytest.raises(module.UserError) as error:
        distil(student_args(path, teacher_obs=("policy",)))
    assert "obs_normalizer._mean is (1, 12), but (1, 8) for --teacher-obs policy (8,) and 2 actions" in str(error.value)
    with pytest.raises(module.UserError) as error:
        distil(student_args(path, env="quadruped", obs_normalization=False))
    assert "obs_normalizer._mean is (1, 12), but (1, 107)" in str(error.value) and f"--teacher {path}" in str(error.value)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["actor_state_dict"]["mlp.2.bias"]
    torch.save(checkpoint, "model_7.pt")
    with pytest.raises(module.UserError, match=r"model_7.pt: mlp.2.bias is no such tensor, but \(8,\) for"):
        distil(student_args("model_7.pt"))
    torch.save({"weights": 3}, "model_8.pt")
    with pytest.raises(module.UserError, match="--teacher model_8.pt: has no student or actor; it holds weights"):
        distil(student_args("model_8.pt"))


def test_newest_run_of_a_folder():
    for name in ("2026-01-01/model_900.pt", "2026-02-01/model_9.pt", "2026-02-01/model_10.pt", "2026-03-01/args.yaml"):
        path = pathlib.Path("logs/teacher") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert module.find_teacher("logs/teacher") == pathlib.Path("logs/teacher/2026-02-01/model_10.pt")
    with pytest.raises(module.UserError, match="is no file, and no folder with"):
        module.find_teacher("nowhere")


class Skills(cases.importlib.import_module("envs.navigation").Cue):
    """The cue task, with a number that says which expert is right, and the same one-hot."""

    def _observe(self):
        obs = super()._observe()
        skill = torch.arange(self.num_envs) % 2
        return TensorDict(
            {**obs, "skill": skill[:, None].float(), "one_hot": nn.functional.one_hot(skill).float()}, [self.num_envs]
        )


@pytest.mark.parametrize("index", ["skill", "one_hot"])
def test_experts(index, no_export):
    """Even environments are labelled by the first teacher, odd ones by the second, which remembers."""
    first, _ = train_teacher()
    second, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    args = student_args((first, second), teacher_index=index)
    student, teacher, storage, collect = in_place(args, Skills(16, seed=1))
    policies = [ppo_continuous.load_policy(first), ppo_rnn.load_policy(second)]
    for _ in range(2):
        collect()
        for row in storage.unbind(0)[:-1]:
            for number, policy in enumerate(policies):
                actions = policy(row["obs"])
                torch.testing.assert_close(row["teacher_actions"][number::2], actions[number::2], rtol=0, atol=1e-6)
            policies[1].reset(row["dones"])
    with pytest.raises(module.UserError, match="--teacher-index: say which observation group"):
        distil(student_args((first, second)))
    with pytest.raises(module.UserError, match=r"--teacher-index policy: must be a group of shape \(1,\) or \(2,\)"):
        distil(student_args((first, second), teacher_index="policy"))


# ---- Who acts -------------------------------------------------------------------------------------------------------


def shares_of_the_teacher(beta, beta_decay, iterations=6):
    """Per iteration: where the teacher's action was taken, (T, N), and where episodes ended."""
    path, _ = train_teacher(max_iterations=1)
    args = student_args(path, num_envs=64, beta=beta, beta_decay=beta_decay, num_steps_per_env=20, gradient_length=20)
    env = make_env(args)
    _, _, storage, collect = in_place(args, env)
    storage["beta"][-1].fill_(beta)
    module.draw_who_acts(storage[-1], torch.ones(64, dtype=torch.bool))
    taken, dones = [], []
    for _ in range(iterations):
        collect()
        taken.append((storage["actions"] == storage["teacher_actions"])[:-1].all(-1))
        dones.append(storage["dones"][:-1].clone())
    return torch.cat(taken), torch.cat(dones)


def test_mixing(no_export):
    taken, dones = shares_of_the_teacher(1.0, 1.0)
    assert taken.all() and dones.any()
    taken, _ = shares_of_the_teacher(0.0, 1.0)
    assert not taken.any()
    taken, dones = shares_of_the_teacher(0.5, 1.0)
    assert 0.35 < taken.float().mean() < 0.65  # some 100 draws: 0.5, give or take three standard deviations of 0.05
    changes = taken[1:] != taken[:-1]
    assert changes.any() and not (changes & ~dones[:-1]).any()  # only from one episode to the next
    taken, dones = shares_of_the_teacher(1.0, 0.0)
    later = dones.cumsum(0)[20:-1] - dones.cumsum(0)[19] > 0  # an episode has ended since the first iteration
    assert taken[:20].all() and later.any() and not taken[21:][later].any()


@pytest.mark.parametrize("task", ["quadruped", "quadruped-rough", "cartpole"])
def test_recommendations_for_distillation_are_its_own(task):
    """Every recommended name is a setting; those meant for distillation reach this script and no other."""
    mine, base = module.recommended(task), ppo_continuous.recommended(task)
    module.Args(**mine), ppo_continuous.Args(**base)
    assert ("learning_rate_decay" in mine) == task.startswith("quadruped")
    assert mine.get("num_envs") != base.get("num_envs") or task == "cartpole"


def test_learning_rate_decays(no_export):
    path, _ = train_teacher(max_iterations=1)
    history = distil(student_args(path, max_iterations=3, learning_rate=8e-3, learning_rate_decay=0.5))[0]
    assert [metrics["Loss/learning_rate"] for metrics in history] == [8e-3, 4e-3, 2e-3]


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [dict(learning_rate_decay=0.5), dict(rnn_type="gru", beta=0.6, beta_decay=0.7)], ids=["mlp", "gru, mixed"]
)
def test_resumed_run_equals_the_uninterrupted_one(settings, no_export):
    path, _ = train_teacher(ppo_rnn, rnn_type="lstm", **RNN)
    args = student_args(path, max_iterations=5, num_steps_per_env=10, gradient_length=5, log_root="whole", **settings)
    whole = module.train(args, make_env(args))
    args = dataclasses.replace(args, log_root="parts")
    module.train(dataclasses.replace(args, max_iterations=2), make_env(args))
    rest = dataclasses.replace(args, resume=True, teacher=())  # the checkpoint has the teacher
    assert numbers(module.train(rest, make(args.env, args.num_envs, seed=99))) == numbers(whole[2:])


def test_experts_resume(no_export):
    first, _ = train_teacher()
    second, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    args = student_args((first, second), teacher_index="skill", max_iterations=4, log_root="whole")
    whole = module.train(args, Skills(16, seed=1))
    args = dataclasses.replace(args, log_root="parts")
    module.train(dataclasses.replace(args, max_iterations=2), Skills(16, seed=1))
    rest = module.train(dataclasses.replace(args, resume=True, teacher=()), Skills(16, seed=9))
    assert numbers(rest) == numbers(whole[2:])


STUDENTS = {
    "mlp": dict(),
    "lstm": dict(rnn_type="lstm"),
    "cnn": dict(student_obs=("policy", "depth"), cnn_norm="batch", cnn_output_channels=(3,)),
    "cnn and gru": dict(student_obs=("image", "policy", "depth"), rnn_type="gru", cnn_stride=2),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_exported_student_acts_the_same(name, monkeypatch):
    """load_policy, ONNX Runtime and TorchScript over 50 steps, robots starting anew in between."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ppo_continuous, "export_policy", lambda *_: None)
    build = cameras.make if "cnn" in name else lambda *a, seed: make("navigation-cue", *a, seed=seed)
    path, _ = train_teacher(world=build(16, seed=1), max_iterations=1)
    args = student_args(path, max_iterations=2, log_root="runs", **STUDENTS[name])
    module.train(args, build(16, seed=1))
    checkpoint = module.find_teacher("runs")
    policy = module.load_policy(checkpoint)
    exported = checkpoint.parent / "exported"
    session = onnxruntime.InferenceSession(exported / "policy.onnx", providers=["CPUExecutionProvider"])
    script = torch.jit.load(exported / "policy.pt")
    states = {"lstm": ["h_in", "c_in"], "mlp": [], "cnn": []}.get(name, ["h_in"])
    images = policy.student.images
    assert [x.name for x in session.get_inputs()] == ["obs", *images, *states]
    zeros = hidden = [torch.zeros(2, 16, 12).numpy()] * len(states)
    env = build(16, seed=3)
    obs = env.get_observations()
    for step in range(50):
        actions = policy(obs)
        vector, pictures = policy.student.concatenate(obs), [obs[group] for group in images]
        inputs = {"obs": vector.numpy()} | {group: obs[group].numpy() for group in images} | dict(zip(states, hidden))
        onnx_actions, *hidden = session.run(None, inputs)
        torch.testing.assert_close(torch.as_tensor(onnx_actions), actions, rtol=0, atol=1e-5)
        torch.testing.assert_close(script(vector, pictures) if images else script(vector), actions, rtol=0, atol=1e-5)
        obs, _, dones, _ = env.step(actions)
        if step == 24:
            policy.reset()
            script.reset()
            hidden = zeros
        # a robot that starts anew: forgotten in all three
        policy.reset(dones)
        if states:
            script.reset(dones)
            hidden = [h * (1 - dones.float().numpy())[None, :, None] for h in hidden]


def test_play(no_export):
    path, _ = train_teacher(max_iterations=1)
    args = student_args(path, max_iterations=1, log_root="runs", rnn_type="lstm", play_envs=3)
    module.train(args, make_env(args))
    assert module.play(dataclasses.replace(args, play=True, teacher=()))["episode_length"] <= 40
    assert module.play(module.Args(env=args.env, checkpoint=path, play=True, play_envs=2))["episode_length"] <= 40


@pytest.mark.parametrize("script, settings", [(ppo_continuous, dict()), (ppo_rnn, dict(rnn_type="gru", rnn_hidden_dim=12))])
def test_student_is_an_actor_of_ppo(script, settings, no_export, monkeypatch):
    """Its weights load as they are, act as they did, and PPO goes on from them."""
    path, _ = train_teacher()
    args = student_args(path, max_iterations=2, log_root="runs", **(settings | dict(rnn_num_layers=1)))
    module.train(args, make_env(args))
    checkpoint = module.find_teacher("runs")
    student = torch.load(checkpoint, weights_only=True)["student_state_dict"]
    tuning = script.Args(
        **(TEACHER | settings | dict(actor_obs=("policy",), actor_hidden_dims=(16,), max_iterations=3, log_root="")),
        checkpoint=str(checkpoint),
    )
    obs, seen, start_from = make_env(args).get_observations(), [], script.start_from

    def watched(path, agent, *rest):
        start = start_from(path, agent, *rest)
        policy = script.LoadedPolicy(copy.deepcopy(agent["actor"]), ("policy",))
        torch.testing.assert_close(policy(obs), module.load_policy(checkpoint)(obs), rtol=0, atol=1e-6)
        seen.append(agent["actor"])
        return start

    monkeypatch.setattr(script, "start_from", watched)
    history = script.train(tuning, make_env(args))
    assert len(history) == 3 and len(seen) == 1 and not torch.equal(seen[0].mlp[0].weight, student["mlp.0.weight"])


def test_nan_stops_the_run(no_export):
    path, _ = train_teacher(max_iterations=1)
    args = student_args(path, max_iterations=4, log_root="runs", save_interval=1)
    env = make_env(args)
    step, count = env.step, [0]

    def poisoned(actions):
        obs, rewards, dones, extras = step(actions)
        count[0] += 1
        if count[0] == 35:  # iteration 1, after its fifth action
            obs["privileged"][3] = torch.nan
        return obs, rewards, dones, extras

    env.step = poisoned
    with pytest.raises(FloatingPointError) as error:
        module.train(args, env)
    assert "iteration 1: non-finite observation group privileged from step 5 on, in environments [3]" in str(error.value)
    files = {file.name for file in pathlib.Path("runs").glob("*/*/*.pt")}
    assert files == {"model_0.pt", "nan_1.pt"}


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(gradient_length=16),
            "--gradient-length 16: the last 14 of 30 steps x 1 epochs would not fill it; what fits: 1, 2, 3",
        ),
        (dict(num_learning_epochs=2, gradient_length=7), "what fits: 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60"),
        (dict(teacher=()), "--teacher: name a checkpoint"),
        (dict(teacher=("nowhere",)), "--teacher nowhere: is no file"),
        (dict(student_hidden_dims=()), "--student-hidden-dims ()"),
        (dict(beta=1.5), "--beta 1.5: must lie between 0 and 1"),
        (dict(beta_decay=-0.1), "--beta-decay -0.1"),
        (dict(loss_type="l1"), "--loss-type l1: choose from mse, huber"),
        (dict(rnn_type="mamba"), "--rnn-type mamba: choose from none, lstm, gru"),
        (dict(max_grad_norm=0.0), "--max-grad-norm 0.0"),
        (dict(student_obs=("camera",)), "--student-obs camera: the environment has no such group"),
        (dict(resume=True, teacher=()), "no run in logs/distill_dagger_navigation-cue has one"),
    ],
    ids=lambda x: x.split(":")[0] if isinstance(x, str) else "",
)
def test_refused(settings, message):
    with pytest.raises(module.UserError) as error:
        module.train(student_args("nowhere", **settings))
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- On the device --------------------------------------------------------------------------------------------------

DEVICE = [
    dict(rnn_type="gru", beta=0.7, beta_decay=0.9, learning_rate_decay=0.5),
    dict(num_learning_epochs=2, gradient_length=12, max_grad_norm=0.1),
]


@pytest.mark.parametrize("capturable", [True, False], ids=["whole rollout captured", "policy step captured"])
@pytest.mark.parametrize("settings", DEVICE, ids=["gru, mixed", "mlp"])
def test_captured_run_equals_eager_run(settings, capturable, monkeypatch, no_export):
    path, _ = train_teacher(ppo_rnn, rnn_type="gru", **RNN)
    args = student_args(path, num_envs=8, num_steps_per_env=12, max_iterations=5, **({"gradient_length": 4} | settings))
    eager, expected = distil(args)

    def graph(fn, *arguments, **_):
        on = fn.__name__ == "update" or (fn.__name__ == "collect") == capturable
        return instruments.EmulatedGraph(fn, *arguments) if on else lambda: fn(*arguments)

    monkeypatch.setattr(module, "CudaGraph", graph)
    replayed, agent = distil(args)
    assert numbers(replayed) == numbers(eager)
    for key, value in agent["student"].state_dict().items():
        assert torch.equal(value, expected["student"].state_dict()[key]), key


@pytest.mark.parametrize("settings", DEVICE, ids=["gru, mixed", "mlp"])
def test_no_waiting_inside_the_iteration(settings, monkeypatch, no_export):
    waits = []

    def watched(function):
        def call(*args):
            with instruments.host_reads() as counts, instruments.Operations() as operations:
                result = function(*args)
            waits.append((dict(counts), dict(operations.waits)))
            return result

        return call

    path, _ = train_teacher(max_iterations=1)
    for name in ("collect", "update"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    distil(student_args(path, num_steps_per_env=12, max_iterations=2, **({"gradient_length": 4} | settings)))
    assert waits == [({}, {})] * 4


# ---- Ranks ----------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, torch, cases, distill_dagger as module, toy
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
module.Gaussian.sample = lambda self, params: params[0]  # the ranks' random streams are not those of one rank
module.export_policy = lambda *_: None
teacher, rnn_type, root, out = sys.argv[1:]
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
env = toy.Toy(8, groups=("policy", "privileged"))
part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
env.x, env.episode_length_buf, env.num_envs = env.x[part], 3 * torch.arange(8)[part], 8 // world_size
args = module.Args(teacher=(teacher,), env="toy", num_steps_per_env=30, max_iterations=10, student_hidden_dims=(16,), rnn_type=rnn_type,
                   rnn_hidden_dim=8, log_root=root, logger="none", init_at_random_ep_len=False, max_grad_norm=0.5)
history, agent = cases.run(module, args, env)
torch.save([{k: v for k, v in x.items() if k.startswith("Loss/")} for x in history] + [agent["student"].state_dict()], f"{out}_{rank}.pt")
"""


@pytest.mark.parametrize("rnn_type", ["none", "gru"])
def test_two_ranks_equal_one_with_all_environments(rnn_type, tmp_path, no_export, monkeypatch):
    """Equal weights on both ranks, to the bit; equal to those of one process with both ranks' environments, to 1e-9."""
    import toy

    path, _ = train_teacher(world=toy.Toy(16, groups=("policy", "privileged")), max_iterations=1)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(pathlib.Path(toy.__file__).parent)]))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    for prefix, out in ((launch, "two"), ([], "one")):
        done = subprocess.run([sys.executable, *prefix, "worker.py", path, rnn_type, out, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, second, alone = (torch.load(f"{name}.pt") for name in ("two_0", "two_1", "one_0"))
    for key, value in first[-1].items():
        assert torch.equal(value, second[-1][key]), key
        torch.testing.assert_close(value, alone[-1][key], rtol=1e-9, atol=1e-11, msg=key)
    for ours, other, expected in zip(first[:-1], second[:-1], alone[:-1], strict=True):
        assert (ours["Loss/behavior"] + other["Loss/behavior"]) / 2 == pytest.approx(expected["Loss/behavior"], rel=1e-9)
        assert ours["Loss/grad_norm"] == pytest.approx(expected["Loss/grad_norm"], rel=1e-9)
    assert len(list(pathlib.Path("two").glob("*/*"))) == 1  # rank 0 alone writes


# ---- Against the other scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, script",
    [
        *((name, ppo_rnn) for name in ("RNN", "roll_out")),
        *((name, ppo_cnn) for name in ("CNN", "make_activation", "make_mlp")),
    ],
)
def test_blocks_of_the_other_scripts_are_theirs(name, script):
    assert inspect.getsource(getattr(module, name)) == inspect.getsource(getattr(script, name))


@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_a_memory_is_float32_where_the_rest_is_not(rnn_type):
    """What autocast makes of an RNN on CUDA is float16, whatever it was asked for."""
    obs = TensorDict({"policy": torch.randn(8, 5)}, [8])
    student = module.make_student(obs, 2, module.Args(rnn_type=rnn_type, student_obs=("policy",)))
    seen = []
    student.rnn.rnn.register_forward_hook(lambda rnn, inputs, outputs: seen.append((inputs[0].dtype, outputs[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = student(student.preprocess(obs), torch.zeros(8, student.state_size))
    assert seen == [(torch.float32, torch.float32)] and state.dtype == torch.float32 and output.dtype == torch.bfloat16
