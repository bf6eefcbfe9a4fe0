"""Bad input is refused in one line that names the flag or field, the value and what would be right, before training starts."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest
import torch
import toy

import ppo_continuous as module
from envs import make

TINY = dict(env="cartpole", num_envs=16, max_iterations=1, actor_hidden_dims=(8,), critic_hidden_dims=(8,), log_root="")

REFUSED = [
    (dict(num_mini_batches=400), "--num-mini-batches 400"),
    (dict(num_envs=0), "--num-envs 0: must be greater than 0"),
    (dict(num_learning_epochs=0), "--num-learning-epochs 0"),
    (dict(clip_actions=-1.0), "--clip-actions -1.0: must be greater than 0"),
    (dict(run_name="a/b"), "--run-name a/b"),
    (dict(log_root="/dev/null"), "--log-root /dev/null: /dev/null is no folder that can be written to"),
    (dict(log_root="/dev/null/runs"), "--log-root /dev/null/runs: /dev/null is no folder"),
    (dict(gamma=1.5), "--gamma 1.5: must lie between 0 and 1"),
    (dict(lam=-0.1), "--lam -0.1"),
    (dict(learning_rate=0.0), "--learning-rate 0.0"),
    (dict(init_std=-1.0), "--init-std -1.0"),
    (dict(actor_hidden_dims=()), "--actor-hidden-dims ()"),
    (dict(critic_hidden_dims=(64, 0)), "--critic-hidden-dims (64, 0)"),
    (dict(activation="swish"), "--activation swish: choose from elu"),
    (dict(distribution="normal"), "--distribution normal: choose from gaussian, heteroscedastic, beta"),
    (dict(std_type="exp"), "--std-type exp"),
    (dict(schedule="linear"), "--schedule linear"),
    (dict(optimizer="lion"), "--optimizer lion"),
    (dict(timeout_bootstrap="none"), "--timeout-bootstrap none"),
    (dict(action_range=(1.0, -1.0)), "--action-range (1.0, -1.0)"),
    (dict(distribution="beta", learn_std=False), "--no-learn-std"),
    (dict(play=True, resume=True), "--resume"),
    (dict(video_interval=5), "--video-interval"),
    (dict(device="cuda:77"), "--device cuda:77: not available here"),
    (dict(device="quantum"), "--device quantum: not available here"),
    (dict(actor_obs=("camera",)), "--actor-obs camera: the environment has no such group; it has policy (5,)"),
    (dict(critic_obs=("policy", "terrain")), "--critic-obs terrain"),
    (dict(env="cartpol"), "--env cartpol: there is no such environment; there are quadruped, quadruped-rough, cartpole"),
    (dict(env="no_such_package.module:make"), "--env no_such_package.module:make: cannot be imported"),
    (dict(env="toy:nothing"), "--env toy:nothing: cannot be imported"),
    (dict(logger="tensorbord", log_root="logs"), "--logger tensorbord: cannot be imported"),
    (dict(resume=True), "no run in logs/ppo_continuous_cartpole has one"),
    (dict(resume=True, checkpoint="nowhere/model_1.pt"), "--checkpoint nowhere/model_1.pt: no such file"),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_refused(settings, message):
    with pytest.raises(module.UserError) as error:
        module.train(module.Args(**(TINY | settings)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_number_of_environments_that_a_factory_made(tmp_path, monkeypatch):
    (tmp_path / "fixed.py").write_text("import toy\ndef one(): return toy.Toy(1)\ndef broken(): return toy.Toy(1).nothing\n")
    with pytest.raises(module.UserError, match="--num-envs 16: fixed:one has made 1"):
        module.train(module.Args(**(TINY | dict(env="fixed:one", num_envs=16))))
    with pytest.raises(AttributeError, match="nothing"):  # a mistake in the user's file keeps its traceback
        module.train(module.Args(**(TINY | dict(env="fixed:broken"))))
    (tmp_path / "mistaken.py").write_text("import torch\nx = torch.zeros(3).itme()\n")
    with pytest.raises(AttributeError, match="itme"):
        module.train(module.Args(**(TINY | dict(env="mistaken:make"))))


def test_a_policy_that_does_not_fit():
    module.train(module.Args(**(TINY | dict(log_root="logs", max_iterations=1, experiment_name="a"))))
    with pytest.raises(module.UserError, match="its policy does not fit quadruped"):
        module.play(module.Args(**(TINY | dict(log_root="logs", env="quadruped", experiment_name="a"))))


def test_groups_by_convention(capsys):
    args = module.Args(**TINY)
    for groups, actor, critic in [
        (("policy", "privileged"), "policy", "policy (1,) + privileged (1,)"),
        (("actor", "critic", "policy"), "actor", "critic (1,)"),
        (("state", "privileged_state"), "state", "state (1,) + privileged_state (1,)"),
    ]:
        module.train(dataclasses.replace(args), toy.Toy(16, groups=groups))
        output = capsys.readouterr().out
        assert f"actor observes {actor} (1,)\n" in output and f"critic observes {critic}\n" in output
    with pytest.raises(module.UserError, match="--actor-obs: the environment has no such group; it has joints"):
        module.train(args, toy.Toy(16, groups=("joints",)))


def test_images_are_refused():
    env = toy.Toy(16)
    env.get_observations = lambda: toy.TensorDict({"policy": torch.zeros(16, 1, 4, 4)}, batch_size=[16])
    with pytest.raises(module.UserError, match=r"--actor-obs policy: must be vectors \(O,\), or images in ppo_cnn.py"):
        module.train(module.Args(**TINY), env)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is no whole checkpoint"),
        (b"not a checkpoint at all", "is no whole checkpoint"),
        ("truncated", "is no whole checkpoint"),
        ({"weights": torch.zeros(3), "iter": 3}, "has no actor_state_dict; it holds weights, iter"),
        ({"actor_state_dict": {"mlp.0.weight": torch.zeros(8, 5)}, "iter": 3}, "actor differs: Error"),
        ("other layers", "size mismatch for mlp.0.weight"),
    ],
    ids=["empty", "text", "truncated", "foreign", "incomplete", "other layers"],
)
def test_bad_checkpoints(content, message):
    path = pathlib.Path("model_3.pt")
    if isinstance(content, str):
        layers = (16,) if content == "other layers" else (8,)
        module.train(
            module.Args(**(TINY | dict(log_root="logs", actor_hidden_dims=layers, logger="none"))), make("cartpole", 16)
        )
        whole = next(pathlib.Path("logs").glob("*/*/model_0.pt")).read_bytes()
        path.write_bytes(whole if content == "other layers" else whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(module.UserError) as error:
        module.train(module.Args(**(TINY | dict(resume=True, checkpoint=str(path), max_iterations=9))), make("cartpole", 16))
    assert f"--checkpoint {path}" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [dict(activation="relu"), dict(std_type="log"), dict(distribution="beta")], ids=str)
def test_a_checkpoint_of_other_settings(setting):
    """Some of which change no shape: it would load, and mean something else."""
    trained = TINY | dict(log_root="logs", logger="none", distribution="heteroscedastic")
    module.train(module.Args(**trained))
    for resume in (False, True):
        with pytest.raises(module.UserError, match=f"--{next(iter(setting))}.* was trained with".replace("_", "-")):
            module.train(module.Args(**(trained | setting | dict(resume=resume, checkpoint="model_0.pt", max_iterations=2))))


@pytest.mark.parametrize("flags", [dict(load_run="*"), dict(checkpoint="model_(.pt")], ids=["run", "checkpoint"])
def test_what_is_no_regular_expression_is_refused(flags):
    pathlib.Path("logs/ppo_continuous_cartpole/2026-01-01").mkdir(parents=True)
    pathlib.Path("logs/ppo_continuous_cartpole/2026-01-01/model_1.pt").touch()
    with pytest.raises(module.UserError, match="is no regular expression"):
        module.find_checkpoint(module.Args(env="cartpole", **flags))


def test_checkpoint_that_would_run_code_is_refused():
    class Payload:
        def __reduce__(self):
            return (pathlib.Path.touch, (pathlib.Path("owned"),))

    torch.save({"actor_state_dict": Payload(), "iter": 1}, "evil.pt")
    with pytest.raises(module.UserError, match="is no whole checkpoint"):
        module.load_policy("evil.pt")
    assert not pathlib.Path("owned").exists()


def test_finished_run_is_not_resumed():
    args = module.Args(**(TINY | dict(log_root="logs", logger="none")))
    module.train(args, make("cartpole", 16))
    with pytest.raises(module.UserError, match="--max-iterations 1: the checkpoint has finished 1"):
        module.train(dataclasses.replace(args, resume=True), make("cartpole", 16))


def test_command_line_errors_are_one_line():
    flags = ["--env", "quadrupled"]
    done = subprocess.run([sys.executable, module.__file__, *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.strip() == ""
    assert (
        done.stderr.strip().startswith("error: --env quadrupled: there is no such environment") and done.stderr.count("\n") == 1
    )
