"""tests/benchmarks/details.py takes away what it says, and nothing else; its table is of what it has trained."""

import dataclasses
import importlib.util
import math
import pathlib
import sys
import types

import pytest
import torch

import ppo_continuous
from envs import make

PATH = pathlib.Path(__file__).parent / "benchmarks" / "details.py"
spec = importlib.util.spec_from_file_location("details", PATH)
details = sys.modules["details"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(details)


@pytest.mark.parametrize("name", details.DETAILS)
def test_what_is_taken_away_is_there(name):
    change = details.DETAILS[name]
    module = details.script_with(change)  # fails if the line is not there
    module.check_args(module.Args(**change if isinstance(change, dict) else {}))


def test_lines_do_what_they_say():
    def first(name):
        module = details.script_with(details.DETAILS[name])
        torch.manual_seed(1)
        env = make("cartpole", 4)
        args = module.Args(
            env="cartpole", num_envs=4, num_steps_per_env=3, device="cpu", actor_obs=("policy",), critic_obs=("policy",)
        )
        obs = env.get_observations()
        agent = module.make_agent(env, obs, args)
        storage = module.make_storage(agent, obs, env.num_actions, args)
        storage["rewards"].uniform_(0.0, 10.0)
        return agent.actor.mlp[-1].weight, module.compute_gae(storage, args)[0]

    weight, advantages = first("everything")
    torch.testing.assert_close(first("actor's last layer x 0.01")[0], 0.01 * weight)
    raw = first("no advantage normalisation")[1]
    assert raw.std() > 2.0 and advantages.std() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close((raw - raw.mean()) / raw.std(), advantages)


def test_the_table(tmp_path, capsys, monkeypatch):
    """Of two details and two seeds, trained for a moment; called again it trains nothing."""
    monkeypatch.setattr(details, "draw", lambda *_: None)
    chosen = ("everything", "no entropy bonus")
    options = details.Options(tasks=("cartpole",), seeds=(1, 2), details=chosen, iterations=2, out=tmp_path)
    details.main(options)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [(name, "2") for name in chosen]
    for (name, _, *columns), change in zip(rows, ({}, {"entropy_coef": 0.0})):
        kl = []
        for seed in (1, 2):
            settings = details.task_settings("cartpole", ppo_continuous, seed, "cpu", 2) | change
            history = ppo_continuous.train(ppo_continuous.Args(**settings))
            kl.append(history[-1]["Loss/kl"])
        mean, spread = sum(kl) / 2, abs(kl[0] - kl[1]) / math.sqrt(2.0)
        capsys.readouterr()
        shown = [float(x) for x in columns[-1].split("±")]
        assert shown == [pytest.approx(mean, rel=6e-3), pytest.approx(spread, rel=6e-2)], name
    (tmp_path / "cartpole_everything_1.json").write_text('{"task": "cartpole", "detail": "everything", "seed": 1}')
    details.main(options)
    assert "| everything | 2 (1 became NaN) |" in capsys.readouterr().out


def test_half_a_training_is_no_result(tmp_path, monkeypatch):
    def stopped(args, env=None):
        return ppo_continuous.train(dataclasses.replace(args, max_iterations=1))

    module = types.SimpleNamespace(Args=ppo_continuous.Args, train=stopped)
    monkeypatch.setattr(details, "script_with", lambda _: module)
    with pytest.raises(KeyboardInterrupt):
        details.job(details.Options(iterations=2, out=tmp_path), "cartpole", "everything", 1)
    assert not list(tmp_path.glob("*.json"))
