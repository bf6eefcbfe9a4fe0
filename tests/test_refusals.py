"""Bad input is refused in one line that names the flag or field, the value and what would be right, before training starts."""

import dataclasses
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy

import ppo_continuous as module
from envs import make

TINY = dict(env="cartpole", num_envs=16, max_iterations=1, actor_hidden_dims=(8,), critic_hidden_dims=(8,), log_root="")
TINY |= dict(device="cpu")

REFUSED = [
    (dict(num_mini_batches=400), "--num-mini-batches 400: leaves fewer than 2 samples for each"),
    (dict(num_envs=0), "--num-envs 0: must be greater than 0"),
    (dict(num_steps_per_env=0), "--num-steps-per-env 0: must be greater than 0"),
    (dict(max_iterations=0), "--max-iterations 0: must be greater than 0"),
    (dict(save_interval=0), "--save-interval 0: must be greater than 0"),
    (dict(play_envs=0), "--play-envs 0: must be greater than 0"),
    (dict(num_learning_epochs=0), "--num-learning-epochs 0: must be greater than 0"),
    (dict(clip_actions=-1.0), "--clip-actions -1.0: must be greater than 0"),
    (dict(clip_param=0.0), "--clip-param 0.0: must be greater than 0"),
    (dict(desired_kl=0.0), "--desired-kl 0.0: must be greater than 0"),
    (dict(max_grad_norm=0.0), "--max-grad-norm 0.0: must be greater than 0"),
    (dict(learning_rate=0.0), "--learning-rate 0.0: must be greater than 0"),
    (dict(init_std=-1.0), "--init-std -1.0: must be greater than 0"),
    (dict(actor_hidden_dims=[0, 64]), "--actor-hidden-dims [0, 64]: must be greater than 0"),
    (dict(critic_hidden_dims=(64, 0)), "--critic-hidden-dims (64, 0): must be greater than 0"),
    (dict(learning_rate=math.nan), "--learning-rate nan: must be greater than 0, and finite"),
    (dict(clip_actions=math.inf), "--clip-actions inf: must be greater than 0, and finite"),
    (dict(entropy_coef=-math.inf), "--entropy-coef -inf: must be finite"),
    (dict(seed=-1), "--seed -1: must not be negative"),
    (dict(value_loss_coef=-1.0), "--value-loss-coef -1.0: must not be negative"),
    (dict(action_range=(-1.0, math.nan)), "--action-range (-1.0, nan): must be finite"),
    (dict(gamma=1.5), "--gamma 1.5: must lie between 0 and 1"),
    (dict(lam=-0.1), "--lam -0.1: must lie between 0 and 1"),
    (dict(activation="swish"), "--activation swish: choose from elu, selu, relu, leakyrelu, tanh, sigmoid"),
    (dict(distribution="normal"), "--distribution normal: choose from gaussian, heteroscedastic, beta"),
    (dict(std_type="exp"), "--std-type exp: choose from scalar, log"),
    (dict(schedule="linear"), "--schedule linear: choose from adaptive, fixed"),
    (dict(optimizer="lion"), "--optimizer lion: choose from adam, adamw, sgd"),
    (dict(timeout_bootstrap="reference"), "--timeout-bootstrap reference: choose from final_obs, value, none"),
    (dict(action_range=(1.0, -1.0)), "--action-range (1.0, -1.0): the first number must be the smaller one"),
    (dict(distribution="beta", learn_std=False), "--learn-std False: the std of the beta distribution is always learned"),
    (dict(gamma="0.9"), "--gamma 0.9: must be float, not str"),
    (dict(max_iterations=1.5), "--max-iterations 1.5: must be int, not float"),
    (dict(resume="no"), "--resume no: must be bool, not str"),
    (dict(device="cuda:77"), "--device cuda:77: not available here"),
    (dict(device="quantum"), "--device quantum: not available here"),
    (dict(actor_obs=("camera",)), "--actor-obs ('camera',): must name vectors, out of {'policy': (5,)}"),
    (dict(critic_obs=("policy", "terrain")), "--critic-obs ('policy', 'terrain'): must name vectors"),
    (dict(env="cartpol"), "--env cartpol: there is no such environment; there are quadruped, quadruped-rough, cartpole"),
    (dict(env="no_such_package.module:make"), "--env no_such_package.module:make: cannot be imported as package.module:name"),
    (dict(env="toy:nothing"), "--env toy:nothing: cannot be imported as package.module:name"),
    (dict(logger="tensorbord"), "--logger tensorbord: cannot be imported as package.module:name"),
    (dict(resume=True, wandb_run_path="none"), "--wandb-run-path none: cannot be read"),
    (dict(resume=True), "--checkpoint : no such file, neither here nor in a run of "),
    (dict(resume=True, checkpoint="nowhere/model_1.pt"), "--checkpoint nowhere/model_1.pt: no such file, neither here nor in"),
]


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    """It takes longer than a short training."""
    monkeypatch.setattr(module, "export_policy", lambda *a: None)


def args_of(**settings):
    return module.Args(**(TINY | settings))


@pytest.mark.parametrize("settings, message", REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_refused(settings, message):
    with pytest.raises(module.UserError) as error:
        module.train(args_of(**settings))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_environment_that_is_smaller_than_the_settings_say():
    with pytest.raises(module.UserError, match="^--num-mini-batches 4: leaves fewer than 2 samples for each"):
        module.train(args_of(num_steps_per_env=1), toy.Toy(2))


ACCEPTED = [dict(clip_actions=None), dict(lam=0.0, gamma=1.0), dict(entropy_coef=0.0), dict(timeout_bootstrap="none")]
ACCEPTED += [dict(actor_hidden_dims=[8, 8]), dict(actor_hidden_dims=(), critic_hidden_dims=())]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_accepted(settings):
    """What lies at the edge of what is refused."""
    assert len(module.train(args_of(**settings))) == 1


def test_settings_are_frozen():
    """A captured graph knows them as they were; a group alone may be named without a comma."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.Args().learning_rate = 1.0
    assert module.Args(actor_obs="policy") == module.Args(actor_obs=("policy",))


@pytest.mark.parametrize(
    "setting",
    [dict(log_root=pathlib.Path("logs")), dict(learning_rate=np.float64(1e-3))],
    ids=["path", "numpy"],
)
def test_what_no_checkpoint_can_hold_is_refused(setting):
    """It could be saved but not read again: found out before the training, not when it is to be resumed."""
    ((name, value),) = setting.items()
    with pytest.raises(module.UserError, match=f"^--{name.replace('_', '-')} .*{type(value).__name__}"):
        module.train(args_of(**(dict(log_root="logs") | setting)), toy.Toy(8))
    assert not pathlib.Path("logs").exists()


@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/runs"])
def test_a_log_root_that_cannot_be_written_to(root):
    with pytest.raises(OSError, match="/dev/null"):
        module.train(args_of(log_root=root))


def test_mistakes_in_the_users_file_keep_their_traceback(tmp_path):
    (tmp_path / "fixed.py").write_text("import toy\ndef broken(): return toy.Toy(1).nothing\n")
    with pytest.raises(AttributeError, match="nothing"):
        module.train(args_of(env="fixed:broken"))
    (tmp_path / "mistaken.py").write_text("import torch\nx = torch.zeros(3).itme()\n")
    with pytest.raises(AttributeError, match="itme"):
        module.train(args_of(env="mistaken:make"))
    (tmp_path / "raising.py").write_text("raise AttributeError('of its own')\n")
    with pytest.raises(AttributeError, match="of its own"):
        module.train(args_of(env="raising:make"))
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        module.train(args_of(env="lacking:make"))


METRICS = {"speed": torch.tensor(1.0), "Train/speed": 1.0, "Train/speeds": torch.zeros(3)}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_cannot_be_logged(name, monkeypatch):
    """As one may write it into a copy of the script: it is named, instead of shifting all others by one."""
    update = module.update
    monkeypatch.setattr(module, "update", lambda *a: update(*a) | {name: METRICS[name]})
    with pytest.raises(module.UserError) as error:
        module.train(args_of(), toy.Toy(16))
    shown = {"speed": "torch.Size([])", "Train/speed": "1.0", "Train/speeds": "torch.Size([3])"}[name]
    assert str(error.value) == f"metric {name} is {shown}: must be a 0-d tensor, and its name like Train/x"


def test_groups_by_convention(capsys):
    args = args_of()
    for groups, actor, critic in [
        (("policy", "privileged"), "policy", "policy (1,), privileged (1,)"),
        (("actor", "critic", "policy"), "actor", "critic (1,)"),
        (("state", "privileged_state"), "state", "state (1,), privileged_state (1,)"),
    ]:
        module.train(args, toy.Toy(16, groups=groups))
        output = capsys.readouterr().out
        assert f"actor_obs: {actor} (1,)\n" in output and f"critic_obs: {critic}\n" in output
    with pytest.raises(module.UserError, match=r"^--actor-obs \(\): must name vectors, out of {'joints': \(1,\)}"):
        module.train(args, toy.Toy(16, groups=("joints",)))


def test_images_are_refused():
    env = toy.Toy(16)
    env.get_observations = lambda: toy.TensorDict({"policy": torch.zeros(16, 1, 4, 4)}, batch_size=[16])
    with pytest.raises(module.UserError, match=r"--actor-obs \('policy',\): must name vectors, out of {'policy': \(1, 4, 4\)}"):
        module.train(args_of(), env)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is no whole checkpoint"),
        (b"not a checkpoint at all", "is no whole checkpoint"),
        ("truncated", "is no whole checkpoint"),
        ({"weights": torch.zeros(3), "iter": 3}, "is no whole checkpoint (KeyError: 'actor_state_dict')"),
        ({"actor_state_dict": {"mlp.0.weight": torch.zeros(8, 5)}, "iter": 3}, "actor differs (RuntimeError: Error"),
        ("other layers", "size mismatch for mlp.0.weight"),
        ("no optimizer", "optimizer differs (KeyError: 'optimizer_state_dict')"),
        ("other optimizer", "optimizer differs (ValueError: loaded state dict contains a parameter group"),
    ],
    ids=["empty", "text", "truncated", "foreign", "incomplete", "other layers", "no optimizer", "other optimizer"],
)
def test_bad_checkpoints(content, message):
    path = pathlib.Path("model_3.pt")
    if isinstance(content, str):
        layers = (16,) if content == "other layers" else (8,)
        run = module.train(args_of(log_root="logs", actor_hidden_dims=layers, logger="none"), make("cartpole", 16)).run_dir
        whole = (run / "model_0.pt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else whole)
        if "optimizer" in content:
            state = torch.load(path, weights_only=True)
            optimizer = state.pop("optimizer_state_dict")
            optimizer["param_groups"][0]["params"].pop()
            torch.save(state | ({"optimizer_state_dict": optimizer} if content == "other optimizer" else {}), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(module.UserError) as error:
        module.train(args_of(resume=True, checkpoint=str(path), max_iterations=9), make("cartpole", 16))
    assert str(error.value).startswith(f"--checkpoint {path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [dict(activation="relu"), dict(std_type="log"), dict(distribution="beta")], ids=str)
def test_a_checkpoint_of_other_settings(setting):
    """Some of which change no shape: it would load, and mean something else."""
    trained = dict(log_root="logs", logger="none", distribution="heteroscedastic")
    module.train(args_of(**trained))
    for resume in (False, True):
        with pytest.raises(module.UserError, match=f"--{next(iter(setting))}.* was trained with".replace("_", "-")):
            module.train(args_of(**(trained | setting | dict(resume=resume, checkpoint="model_0.pt", max_iterations=2))))


def test_checkpoint_that_would_run_code_is_refused():
    class Payload:
        def __reduce__(self):
            return (pathlib.Path.touch, (pathlib.Path("owned"),))

    torch.save({"actor_state_dict": Payload(), "iter": 1}, "evil.pt")
    with pytest.raises(module.UserError, match="is no whole checkpoint"):
        module.load_policy("evil.pt")
    assert not pathlib.Path("owned").exists()


def test_finished_run_is_not_resumed():
    args = args_of(log_root="logs", logger="none")
    module.train(args, make("cartpole", 16))
    with pytest.raises(module.UserError, match="^--max-iterations 1: .*model_0.pt has finished 1 already"):
        module.train(dataclasses.replace(args, resume=True), make("cartpole", 16))


def test_playing_takes_the_file_beside_the_script(monkeypatch):
    """A copied script trains without it, and says what is missing when it is to play."""
    monkeypatch.setitem(sys.modules, "envs.record", None)
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", "--play", "--env", "cartpole"])
    with pytest.raises(SystemExit, match="^error: --play: needs envs/record.py, which is not beside this script"):
        module.main()


def test_a_viewer_that_is_not_there():
    with pytest.raises(SystemExit, match="^error: --viewer: Toy has no viewer of its own; a film needs no flag"):
        module.play(args_of(agent="zero", viewer=True), toy.Toy(8))


ERRORS = [
    (["--env", "quadrupled"], "--env quadrupled: there is no such environment"),
    (["--env", "cartpole", "--log-root", "/dev/null"], "[Errno 20] Not a directory: '/dev/null/"),
    (["--env", "mjlab:walk"], "mjlab:<task> needs envs.mjlab, which is not installed"),
    (["--env", "test_refusals:make_faulty", "--log-root", ""], "iteration 0: rewards of environment 3"),
]


def make_faulty(num_envs):
    return toy.Toy(num_envs, fault=("reward", 5, math.nan))


@pytest.mark.parametrize("flags, message", ERRORS, ids=[flags[1] for flags, _ in ERRORS])
def test_command_line_errors_are_one_line(flags, message, monkeypatch):
    """And exit status 1."""
    monkeypatch.setitem(sys.modules, "envs.mjlab", None)  # as where mjlab is not installed
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", "--device", "cpu", "--num-envs", "8", *flags])
    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code.startswith(f"error: {message}") and "\n" not in error.value.code


def test_a_refused_command_prints_nothing_else():
    done = subprocess.run([sys.executable, module.__file__, "--env", "quadrupled"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.strip() == ""
    assert done.stderr.startswith("error: --env quadrupled: there is no such environment") and done.stderr.count("\n") == 1
