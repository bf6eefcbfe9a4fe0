"""The conformance check passes good environments and names, in words, every fault that it looks for."""

import pytest
import torch
from tensordict import TensorDict

import envs
from envs.check import check, examine, main

N, A, NUM_OBS, LIMIT = 4, 2, 3, 10


class Toy:
    """The smallest environment without a fault: observations count the steps of an episode from a random start."""

    num_envs, num_actions, max_episode_length, device, cfg, step_dt = N, A, LIMIT, "cpu", {}, 0.02

    def __init__(self):
        self.episode_length_buf, self.state = torch.zeros(N, dtype=torch.long), torch.rand(N, NUM_OBS)

    def get_observations(self):
        return TensorDict({"policy": self.state.clone()}, batch_size=[N])

    def step(self, actions):
        self.episode_length_buf += 1
        self.state += 1.0
        final_obs, dones = self.get_observations(), self.episode_length_buf >= LIMIT
        self.state[dones] = torch.rand(N, NUM_OBS)[dones]
        self.episode_length_buf[dones] = 0
        return self.get_observations(), torch.ones(N), dones, {"time_outs": dones, "final_obs": final_obs, "log": {"a": 1.0}}


def test_toy_conforms():
    report = examine(Toy())
    assert report.errors == [] and report.notes == []


@pytest.mark.parametrize("env_id", envs.BUILT_IN)
def test_built_in_conforms(env_id):
    module = pytest.importorskip(f"envs.{envs.BUILT_IN[env_id][0]}")
    assert module and check(envs.make(env_id, num_envs=8)) == []


# ---- Faults in what is there and in what `step` returns: a phrase of the message, and what is wrong ----

WITHOUT = ["num_envs", "num_actions", "max_episode_length", "episode_length_buf", "device", "get_observations", "step"]


@pytest.mark.parametrize("name", WITHOUT)
def test_missing_attribute(name):
    class Lacking:
        def __init__(self):
            toy = Toy()
            for attribute in (*WITHOUT, "cfg", "step_dt"):
                if attribute != name:
                    setattr(self, attribute, getattr(toy, attribute))

    assert check(Lacking()) == [f"the attribute {name} is missing"]


ATTRIBUTES = {
    "num_envs is '4', not one positive number for all environments": {"num_envs": "4"},
    "num_actions is 0, not one positive number for all environments": {"num_actions": 0},
    "max_episode_length is None, not one positive number for all environments": {"max_episode_length": None},
    "episode_length_buf is a list, not a tensor": {"episode_length_buf": [0] * N},
    "episode_length_buf has shape (4, 1), not (4,)": {"episode_length_buf": torch.zeros(N, 1, dtype=torch.long)},
    "episode_length_buf is float32, not an integer": {"episode_length_buf": torch.zeros(N)},
    "episode_length_buf is on meta, env.device is cpu": {"episode_length_buf": torch.zeros(N, dtype=torch.long, device="meta")},
    "get_observations() raised RuntimeError: no": {"get_observations": lambda: (_ for _ in ()).throw(RuntimeError("no"))},
    "get_observations() returns a tuple of 2 as observations, not a TensorDict": {"get_observations": lambda: (0, {})},
    "get_observations() returns no observation group": {"get_observations": lambda: TensorDict({}, [N])},
    "step(actions (4, 2)) raised": {"step": lambda actions: actions @ torch.ones(7)},
    "step() returns a tuple of 5, not (obs, rewards, dones, extras)": {"step": lambda actions: (0, 0, 0, 0, {})},
}


@pytest.mark.parametrize("phrase", ATTRIBUTES)
def test_attributes(phrase):
    env = Toy()
    vars(env).update(ATTRIBUTES[phrase])
    assert phrase in "\n".join(check(env))


def policy(value):
    return TensorDict({"policy": value}, batch_size=[len(value)])


RETURNS = {  # obs, rewards, dones, extras -> the same with a fault
    "step() returns a Tensor as observations, not a TensorDict": lambda o, r, d, e: (o["policy"], r, d, e),
    'group "policy" is a TensorDict, not a tensor': lambda o, r, d, e: (policy(o), r, d, e),
    'group "policy" has shape (3, 3), not (4, O)': lambda o, r, d, e: (policy(o["policy"][:3]), r, d, e),
    'group "policy" has shape (4,), not (4, O)': lambda o, r, d, e: (policy(o["policy"][:, 0]), r, d, e),
    'group "policy" is float64, not float32': lambda o, r, d, e: (policy(o["policy"].double()), r, d, e),
    'group "policy" is uint8, not float32': lambda o, r, d, e: (policy(o["policy"].byte()), r, d, e),
    'group "policy" contains NaN': lambda o, r, d, e: (policy(o["policy"] / 0.0), r, d, e),
    'group "policy" is on meta': lambda o, r, d, e: (policy(o["policy"].to("meta")), r, d, e),
    "rewards is a list of 4, not a tensor": lambda o, r, d, e: (o, [1.0] * N, d, e),
    "rewards has shape (4, 1), not (4,)": lambda o, r, d, e: (o, r[:, None], d, e),
    "rewards are int64, not float32": lambda o, r, d, e: (o, r.long(), d, e),
    "rewards contain NaN": lambda o, r, d, e: (o, r * torch.nan, d, e),
    "rewards is on meta": lambda o, r, d, e: (o, r.to("meta"), d, e),
    "dones has shape (4, 1), not (4,)": lambda o, r, d, e: (o, r, d[:, None], e),
    "dones contains numbers other than 0 and 1": lambda o, r, d, e: (o, r, 2 * d.long(), e),
    "dones is on meta": lambda o, r, d, e: (o, r, d.to("meta"), e),
    "extras is a list of 0, not a dict": lambda o, r, d, e: (o, r, d, []),
    'extras["time_outs"] is set where dones is not': lambda o, r, d, e: (o, r, d, e | {"time_outs": ~d}),
    'extras["time_outs"] has shape (4, 1)': lambda o, r, d, e: (o, r, d, e | {"time_outs": d[:, None]}),
    'extras["final_obs"] is a ndarray': lambda o, r, d, e: (o, r, d, e | {"final_obs": d.numpy()}),
    'extras["final_obs"] has no group "policy"': lambda o, r, d, e: (o, r, d, e | {"final_obs": {}}),
    'extras["final_obs"]["policy"] has shape (1, 3)': lambda o, r, d, e: (o, r, d, e | {"final_obs": o[:1]}),
    'extras["final_obs"]["policy"] contains NaN': lambda o, r, d, e: (o, r, d, e | {"final_obs": o * torch.nan}),
    "equal to final_obs): it has to be the first": lambda o, r, d, e: (e["final_obs"], r, d, e),
    'extras["log"]["a"] is a str, not a number': lambda o, r, d, e: (o, r, d, e | {"log": {"a": "text"}}),
}


@pytest.mark.parametrize("phrase", RETURNS)
def test_returns(phrase):
    class Faulty(Toy):
        def step(self, actions):
            return RETURNS[phrase](*super().step(actions))

    assert phrase in "\n".join(check(Faulty()))


# ---- Faults that show over time ----

FAULTS = []


def fault(phrase, kind="errors"):
    return lambda cls: FAULTS.append(pytest.param(cls, phrase, kind, id=cls.__name__)) or cls


@fault("other numbers when it is read twice")
class Noisy(Toy):
    def get_observations(self):
        return policy(self.state + torch.rand(N, NUM_OBS))


@fault("get_observations() differs from the observation that step() has just returned")
class ResetsWhenRead(Toy):
    def get_observations(self):
        return policy(torch.zeros(N, NUM_OBS))

    def step(self, actions):
        _, *rest = super().step(actions)
        return policy(self.state.clone()), *rest


@fault("rewards are one buffer that the next step writes to in place")
class RewardBuffer(Toy):
    buffer = torch.zeros(N)

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, self.buffer.copy_(rewards), *rest


@fault("observations are one buffer that the next step writes to in place", "notes")
class ObservationBuffer(Toy):
    def get_observations(self):
        return policy(self.state)

    def step(self, actions):
        _, *rest = super().step(actions)
        rest[-1].pop("final_obs")
        return self.get_observations(), *rest


@fault("step() writes to the actions")
class ClampsInPlace(Toy):
    def step(self, actions):
        return super().step(actions.clamp_(-0.1, 0.1))


@fault("episode_length_buf does not count the steps")
class DoesNotCount(Toy):
    def step(self, actions):
        result = super().step(actions)
        self.episode_length_buf.zero_()
        return result


class Property(Toy):
    """`episode_length_buf` as a property, for what can go wrong when it is set."""

    def __init__(self):
        self.steps = torch.zeros(N, dtype=torch.long)
        self.state = torch.rand(N, NUM_OBS)

    episode_length_buf = property(lambda self: self.steps)


@fault("episode_length_buf cannot be set (AttributeError")
class ReadOnly(Property):
    def step(self, actions):
        self.steps += 1
        self.state += 1.0
        return self.get_observations(), torch.ones(N), torch.zeros(N, dtype=torch.bool), {}


@fault("nothing follows from it: it reads back as other values")
class Deaf(ReadOnly):
    episode_length_buf = property(lambda self: self.steps, lambda self, value: None)


@fault("the next step ended 0 of 4 episodes")
class NoTimeLimit(ReadOnly):
    episode_length_buf = property(lambda self: self.steps, lambda self, value: self.steps.copy_(value))


@fault("episode_length_buf is not 0 where dones is set")
class ResetsLater(Toy):
    def step(self, actions):
        self.episode_length_buf += 1
        self.state += 1.0
        dones = self.episode_length_buf == LIMIT
        return self.get_observations(), torch.ones(N), dones, {"time_outs": dones}


@fault("dones stay set in the step after the reset")
class DonesStaySet(Toy):
    ended = torch.zeros(N, dtype=torch.bool)

    def step(self, actions):
        obs, rewards, dones, _ = super().step(actions)
        self.ended = self.ended | dones
        return obs, rewards, self.ended.clone(), {}


@fault('no extras["time_outs"]', "notes")
class NoTimeOuts(Toy):
    def step(self, actions):
        return *super().step(actions)[:3], {}


@fault('no extras["final_obs"]', "notes")
class NoFinalObs(NoTimeOuts):
    pass


class Bare(Toy):
    def __getattribute__(self, name):
        if name in ("cfg", "step_dt"):
            raise AttributeError(name)
        return super().__getattribute__(name)


fault("no cfg", "notes")(Bare)
fault("no step_dt", "notes")(Bare)


@pytest.mark.parametrize("cls, phrase, kind", FAULTS)
def test_over_time(cls, phrase, kind):
    report = examine(cls())
    assert phrase in "\n".join(getattr(report, kind))
    assert kind == "errors" or report.errors == [], "a note is not an error"


def test_a_state_that_cannot_be_read_back():
    class Stateful(Toy):
        def state_dict(self):
            return {"state": self.state}

    assert check(Stateful()) == ["state_dict() is there, load_state_dict() is missing"]
    Stateful.load_state_dict = lambda env, state: None
    assert check(Stateful()) == []
    Stateful.state_dict = lambda env: {"state": env.state.numpy()}
    (error,) = check(Stateful())
    assert error.startswith("state_dict() must hold tensors, numbers, strings, lists and dicts alone")


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_dones_of_every_kind_conform(dtype):
    class Kind(Toy):
        def step(self, actions):
            obs, rewards, dones, extras = super().step(actions)
            return obs, rewards, dones.to(dtype), extras | {"time_outs": dones.to(dtype)}

    assert check(Kind()) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_conform(dtype):
    class Seeing(Toy):
        def get_observations(self):
            return TensorDict({"policy": self.state.clone(), "camera": self.state[:, :, None, None].to(dtype)}, [N])

    assert check(Seeing()) == []


# ---- The command ----


def test_command(capsys):
    assert main("cartpole", num_envs=8) == 0
    assert "env steps/s\nconforms" in capsys.readouterr().out
    assert main("nope") == 1
    assert capsys.readouterr().out.startswith("--env nope: there is no such environment")
    assert main(f"{__name__}:make_faulty", num_envs=4) == 1
    assert "ERROR  dones contains numbers other than 0 and 1\n" in capsys.readouterr().out


def make_faulty(**_):
    class Faulty(Toy):
        def step(self, actions):
            obs, rewards, dones, extras = super().step(actions)
            return obs, rewards, 2 * dones.long(), extras

    return Faulty()
