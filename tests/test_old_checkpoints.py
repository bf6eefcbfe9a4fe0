"""Checkpoints of rsl_rl 2, 3 and 4 (tests/record_old_checkpoints.py): they play, export, teach, and go on being trained."""

import dataclasses
import importlib
import pathlib

import pytest
import torch
from tensordict import TensorDict

OLD = sorted((pathlib.Path(__file__).parent / "goldens" / "old").glob("*.pt"))
SETTINGS = dict(actor_obs=("policy",), critic_obs=("critic",), num_envs=5, num_steps_per_env=8, max_iterations=10, device="cpu")
SETTINGS |= dict(env="test_old_checkpoints:Task", log_root="", logger="none", actor_hidden_dims=(6, 4), critic_hidden_dims=(5,))


class Task:
    """Groups of the sizes that were recorded."""

    num_actions, max_episode_length, device = 2, 10, "cpu"

    def __init__(self, num_envs=5):
        self.num_envs, self.episode_length_buf = num_envs, torch.zeros(num_envs, dtype=torch.long)

    def get_observations(self):
        n = self.num_envs
        generator = torch.Generator().manual_seed(int(self.episode_length_buf.sum()))
        groups = {"policy": torch.randn(n, 3, generator=generator), "critic": torch.randn(n, 4, generator=generator)}
        return TensorDict(groups, batch_size=[n])

    def step(self, actions):
        self.episode_length_buf = (self.episode_length_buf + 1) % 10
        return self.get_observations(), -actions.square().sum(1), self.episode_length_buf == 0, {}


def script_of(path):
    """The script that has such a network, and its settings."""
    kind = path.stem.split("_", 1)[1]
    name = {"lstm": "ppo_rnn", "gru": "ppo_rnn", "student": "distill_dagger"}.get(kind, "ppo_continuous")
    script, settings = importlib.import_module(name), dict(SETTINGS)
    if kind in ("lstm", "gru"):
        settings |= dict(rnn_type=kind, rnn_hidden_dim=4)
    if kind == "log" or kind == "heteroscedastic":
        settings |= dict(std_type="log") if kind == "log" else dict(distribution="heteroscedastic")
    if kind == "student":
        settings = {key: x for key, x in settings.items() if not key.startswith(("actor_", "critic_"))}
        settings |= dict(student_obs=("policy",), teacher_obs=("critic",), student_hidden_dims=(6,))
    return script, script.Args(**settings)


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_the_policy_acts_as_it_did(path):
    """Its actions equal those of the version that made it, also one with memory from the start of an episode."""
    script, args = script_of(path)
    infos = torch.load(path, weights_only=True)["infos"]
    obs = TensorDict(infos["obs"], batch_size=[5])
    policy = script.load_policy(path, args, Task(), batch_size=5)
    torch.testing.assert_close(policy.act(obs).detach(), infos["actions"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [path for path in OLD if "student" not in path.stem], ids=lambda path: path.stem)
def test_training_goes_on(path, capsys):
    """With its networks, and its optimizer where the parameters are in the same order."""
    script, args = script_of(path)
    args = dataclasses.replace(args, resume=True, checkpoint=str(path), learning_rate=1e-5, schedule="fixed", max_iterations=9)
    history = script.train(args, Task())
    afresh = "lstm" in path.stem
    assert ("optimizer starts afresh" in capsys.readouterr().out) == afresh
    assert [x["Loss/learning_rate"] for x in history] == pytest.approx([1e-5 if afresh else 3e-4])


@pytest.mark.parametrize("path", [path for path in OLD if "student" not in path.stem], ids=lambda path: path.stem)
def test_it_teaches(path):
    import distill_dagger

    settings = dict(student_obs=("policy",), teacher_obs=("policy",), teacher=(str(path),), num_envs=5, num_steps_per_env=15)
    settings |= dict(distribution="heteroscedastic") if "heteroscedastic" in path.stem else {}
    args = distill_dagger.Args(env="x", max_iterations=1, device="cpu", log_root="", student_hidden_dims=(4,), **settings)
    history = distill_dagger.train(args, Task())
    infos = torch.load(path, weights_only=True)["infos"]
    obs, teacher = TensorDict(infos["obs"], batch_size=[5]), history.agent.teacher
    actions, _ = teacher.decide(obs, torch.zeros(5, teacher.state_size))
    torch.testing.assert_close(actions, infos["actions"], rtol=1e-5, atol=1e-6)
