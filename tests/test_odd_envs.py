"""Environments as people's wrappers are: what means the same trains, what cannot be right is one line before any training."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch
import toy
from tensordict import TensorDict

import ppo_continuous as module
from envs.legacy import Legacy

TINY = dict(num_envs=8, num_steps_per_env=8, max_iterations=3, actor_hidden_dims=(8,), critic_hidden_dims=(8,), device="cpu")
TINY |= dict(log_root="", logger="none")


class Whole(toy.Toy):
    """Everything that the protocol has, and a `bend` that changes what `step` returns."""

    def __init__(self, num_envs=8, bend=lambda *result: result, read=lambda obs: obs):
        super().__init__(num_envs)
        self.bend, self.read, self.x = bend, read, self.x + 0.0

    def get_observations(self):
        return self.read(super().get_observations())

    def step(self, actions):
        obs, rewards, dones, _ = super().step(actions)
        dones, final_obs = dones.bool(), obs.clone()
        obs["policy"][dones] = 0.0
        return self.bend(obs, rewards, dones, {"time_outs": dones.clone(), "final_obs": final_obs, "log": {"x": rewards}})


def extras(**changes):
    """Bends the extras: each change is a function of the old ones."""
    return lambda obs, rewards, dones, old: (obs, rewards, dones, old | {name: change(old) for name, change in changes.items()})


def of(obs, change):
    return TensorDict({name: change(x) for name, x in obs.items()}, batch_size=obs.batch_size)


SAME = {  # the same numbers in other clothes
    "rewards (N, 1)": lambda o, r, d, e: (o, r[:, None], d, e),
    "rewards an array": lambda o, r, d, e: (o, r.numpy(), d, e),
    "rewards a list": lambda o, r, d, e: (o, r.tolist(), d, e),
    "rewards in float64": lambda o, r, d, e: (o, r.double(), d, e),
    "dones in float32": lambda o, r, d, e: (o, r, d.float(), e),
    "dones (N, 1)": lambda o, r, d, e: (o, r, d[:, None].long(), e),
    "dones an array": lambda o, r, d, e: (o, r, d.numpy(), e),
    "observations a dict": lambda o, r, d, e: (dict(o.items()), r, d, e),
    "observations a dict of arrays": lambda o, r, d, e: ({name: x.numpy() for name, x in o.items()}, r, d, e),
    "observations without a batch size": lambda o, r, d, e: (TensorDict(dict(o.items())), r, d, e),
    "observations in float64": lambda o, r, d, e: (of(o, torch.Tensor.double), r, d, e),
    "observations with a gradient": lambda o, r, d, e: (of(o, lambda x: x * torch.ones((), requires_grad=True)), r, d, e),
    "an empty group": lambda o, r, d, e: (TensorDict({**o, "none": torch.zeros(8, 0)}, batch_size=[8]), r, d, e),
    "time-outs (N, 1)": extras(time_outs=lambda e: e["time_outs"][:, None]),
    "time-outs an array": extras(time_outs=lambda e: e["time_outs"].numpy()),
    "time-outs in integers": extras(time_outs=lambda e: e["time_outs"].long()),
    "the last observations a dict": extras(final_obs=lambda e: dict(e["final_obs"].items())),
    "NaN where nothing timed out": extras(final_obs=lambda e: of(e["final_obs"], lambda x: x.where(e["time_outs"][:, None], math.nan))),
    "no log": extras(log=lambda e: None),
    "a log of arrays": extras(log=lambda e: {"x": np.ones(8), "y": np.float64(3.0), "z": [1.0, 2.0], "flag": True}),
    "a log that comes and goes": extras(log=lambda e: {"x": 1.0} if e["time_outs"].any() else {}),
}  # fmt: skip


def train(env, script=module, **settings):
    return script.train(script.Args(**(TINY | settings)), env)


def losses(history):
    return [{name: x for name, x in metrics.items() if name.startswith(("Loss", "Train"))} for metrics in history]


@pytest.fixture(autouse=True)
def from_one_state():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def plain():
    return str(losses(train(Whole())))


@pytest.mark.parametrize("name", SAME)
def test_what_means_the_same_gives_the_same_numbers(name, plain):
    """To the last bit."""
    assert str(losses(train(Whole(bend=SAME[name])))) == plain


@pytest.mark.parametrize("kind", ["dict", "arrays"])
def test_first_observations_in_a_dict(kind, plain):
    env = Whole()
    inner, env.inside = env.get_observations, False

    def read():
        obs = inner()
        return obs if env.inside else {name: x if kind == "dict" else x.numpy() for name, x in obs.items()}

    def step(actions):
        env.inside = True
        result = Whole.step(env, actions)
        env.inside = False
        return result

    env.get_observations, env.step = read, step
    assert str(losses(train(env))) == plain


@pytest.mark.parametrize("limit", [math.inf, torch.tensor(20), 20.0])
def test_episode_limits(limit):
    env = Whole()
    env.max_episode_length = limit
    assert len(train(env)) == 3


def test_extras_of_none():
    assert len(train(Whole(bend=lambda o, r, d, e: (o, r, d, None)))) == 3


WRONG = {  # what is returned, and the line
    "rewards of no dimension": (lambda o, r, d, e: (o, r.mean(), d, e), r"^rewards has the shape \(\), must have \(8,\)$"),
    "rewards of some": (lambda o, r, d, e: (o, r[:3], d, e), r"^rewards has the shape \(3,\), must have \(8,\)$"),
    "two rewards": (lambda o, r, d, e: (o, torch.stack((r, r), 1), d, e), r"^rewards has the shape \(8, 2\), must have"),
    "no rewards": (lambda o, r, d, e: (o, None, d, e), "^env.step must return observations, rewards, dones, extras"),
    "dones in words": (lambda o, r, d, e: (o, r, "no", e), "^env.step must return"),
    "five values": (lambda o, r, d, e: (o, r, d, d, e), r"^env.step must return .*\(expected 4"),
    "three values": (lambda o, r, d, e: (o, r, d), r"^env.step must return .*\(expected 4"),
    "another order": (lambda o, r, d, e: (o, r, e, d), "^env.step must return"),
    "extras in a list": (lambda o, r, d, e: (o, r, d, [1]), "^env.step must return"),
    "time-outs of some": (extras(time_outs=lambda e: e["time_outs"][:3]), "^env.step must return"),
    "another group": (lambda o, r, d, e: ({"obs": o["policy"]}, r, d, e), r"keep the groups \['policy'\] .*KeyError"),
    "a tensor": (lambda o, r, d, e: (o["policy"], r, d, e), r"^observations must keep the groups \['policy'\]"),
    "nothing": (lambda o, r, d, e: (None, r, d, e), r"^observations must keep the groups \['policy'\]"),
    "another width": (lambda o, r, d, e: ({"policy": torch.ones(8, 3)}, r, d, e), r"^policy has the shape \(8, 3\), must have"),
    "last observations of some": (extras(final_obs=lambda e: {"policy": torch.ones(3, 1)}), r"^policy has the shape \(3, 1\)"),
    "last observations of none": (extras(final_obs=lambda e: {}), "^observations must keep the groups") ,
    "a log in words": (extras(log=lambda e: {"phase": "walk"}), "^extras: what is logged as phase must be a number or a tensor"),
    "a log in a log": (extras(log=lambda e: {"x": {"y": 1.0}}), "^extras: what is logged as x must be a number or a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_step_returns_is_refused_in_one_line(name, capsys):
    bend, message = WRONG[name]
    with pytest.raises(module.UserError, match=message) as error:
        train(Whole(bend=bend))
    assert "\n" not in str(error.value) and "iteration" not in capsys.readouterr().out


def lacking(**attributes):
    env = Whole()
    for name, value in attributes.items():
        setattr(env, name, value)
    return env


UNFIT = {
    "nothing": (None, "^NoneType has no num_envs; envs/vec_env.py tells"),
    "an object": (object(), "^object has no num_envs"),
    "no action": (lacking(num_actions=0), "^Whole: num_actions must be at least 1"),
    "a buffer of floats": (lacking(episode_length_buf=torch.zeros(8)), "episode_length_buf of integers"),
    "no observations": (Whole(read=lambda obs: TensorDict({}, [8])), "must name vectors, out of {}"),
    "observations of some": (Whole(read=lambda obs: obs[:3]), r"^get_observations\(\) must return groups of 8 rows"),
    "a history": (
        Whole(read=lambda obs: of(obs, lambda x: x[:, None].repeat(1, 4, 1))),
        r"must name vectors, out of .*\(4, 1\)",
    ),
    "groups of groups": (Whole(read=lambda obs: TensorDict({"policy": obs}, [8])), "must name vectors"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_environment_that_is_none_is_refused_in_one_line(name, monkeypatch):
    env, message = UNFIT[name]
    monkeypatch.setattr(module, "make_env", lambda *_: env)
    with pytest.raises(module.UserError, match=message) as error:
        module.train(module.Args(**TINY))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script, settings", [("ppo_rnd", {}), ("ppo_cnn", dict(cnn_norm="batch", cnn_output_channels=(2,)))])
def test_nan_where_nothing_timed_out_in_the_others(script, settings):
    """RND pays for the last states of falls, too; batch norm mixes the rows of a batch."""

    class Ending(Whole):
        def __init__(self, hole):
            super().__init__(bend=self.spoil)
            self.hole = hole

        def get_observations(self):
            image = self.x.sin().view(-1, 1, 1, 1).repeat(1, 1, 6, 6)
            return TensorDict({"policy": self.x.clone(), "image": image}, batch_size=[self.num_envs])

        def spoil(self, obs, rewards, dones, old):
            falls = torch.arange(8) % 2 == 0
            time_outs = dones & ~falls
            final = of(old["final_obs"], lambda x: x.where(time_outs.view(-1, *[1] * (x.dim() - 1)), self.hole))
            return obs, rewards, dones, old | {"time_outs": time_outs, "final_obs": final}

    groups = dict(actor_obs=("policy", "image"), critic_obs=("policy", "image")) if script == "ppo_cnn" else {}
    history = train(Ending(math.nan), importlib.import_module(script), **settings, **groups, num_steps_per_env=24)
    assert len(history) == 3 and history[-1]["Train/num_episodes"] > 0


# ---- Protocols of older rsl_rl ----


class One:
    """rsl_rl 1, as legged_gym has it: tensors, five values, `episode` in the infos; and maybe what only the critic sees."""

    num_envs, num_actions, max_episode_length, device = 8, 1, toy.Toy.max_episode_length, "cpu"

    def __init__(self, privileged=True):
        self.toy, self.privileged = Whole(), privileged
        self.episode_length_buf = self.toy.episode_length_buf

    def get_observations(self):
        return self.toy.x.clone()

    def get_privileged_observations(self):
        return 2.0 * self.toy.x if self.privileged else None

    def step(self, actions):
        self.toy.episode_length_buf = self.episode_length_buf
        obs, rewards, dones, old = self.toy.step(actions)
        self.episode_length_buf = self.toy.episode_length_buf
        privileged = 2.0 * obs["policy"] if self.privileged else None
        return (
            obs["policy"],
            privileged,
            rewards,
            dones.long(),
            {"time_outs": old["time_outs"], "episode": {"x": rewards.mean()}},
        )


class Two(One):
    """rsl_rl 2: a tensor, and the other groups in the extras."""

    def get_observations(self):
        return self.toy.x.clone(), {"observations": {"critic": 2.0 * self.toy.x} if self.privileged else {}}

    def step(self, actions):
        obs, privileged, rewards, dones, infos = super().step(actions)
        return obs, rewards, dones, infos | {"observations": {"critic": privileged} if self.privileged else {}}


class Today(Whole):
    """The same in today's protocol."""

    def __init__(self, privileged):
        self.privileged = privileged
        super().__init__(bend=self.add)

    def both(self, obs):
        return obs.set("critic", 2.0 * obs["policy"]) if self.privileged else obs

    def get_observations(self):
        return self.both(super().get_observations())

    def add(self, obs, rewards, dones, old):
        return self.both(obs), rewards, dones, {"time_outs": old["time_outs"], "episode": {"x": rewards.mean()}}


@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize("old", [One, Two])
def test_an_environment_for_an_older_rsl_rl(old, privileged, capsys):
    """It trains as one in today's protocol does, to the last bit, and what is set on it reaches it."""
    env = old(privileged)
    history = train(env)
    told = f"critic_obs: {'critic' if privileged else 'policy'} (1,)"
    assert told in capsys.readouterr().out and env.toy.steps == 24
    torch.manual_seed(0)
    assert str(losses(history)) == str(losses(train(Today(privileged))))
    assert module.play(module.Args(agent="zero", **TINY), old())["episode_length"] > 0


def test_without_the_translation_it_is_refused_in_one_line(monkeypatch):
    """As where a script was copied alone."""
    monkeypatch.setitem(sys.modules, "envs.legacy", None)
    for old in (One, Two):
        with pytest.raises(module.UserError, match=f"^{old.__name__} is of rsl_rl 1 or 2; envs/legacy.py translates it$"):
            train(old())


def test_what_is_set_on_the_translation_reaches_the_environment():
    env = One()
    translated = Legacy(env)
    translated.episode_length_buf = torch.arange(8)
    assert env.episode_length_buf[7] == 7 and translated.num_actions == 1
    assert translated.get_observations().keys() == {"policy", "critic"}
