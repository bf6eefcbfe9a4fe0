"""Does an environment keep the protocol of `vec_env.py`? Run this first on a new simulator or task:

    python -m envs.check --env mjlab:Mjlab-Cartpole-Balance --num-envs 16

An error is a fault that spoils training or crashes it, a note is something to know. Exit status 1 if there are errors.
"""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass, field

import torch
from tensordict import TensorDictBase

REQUIRED = ("num_envs", "num_actions", "max_episode_length", "episode_length_buf", "device", "get_observations", "step")
NUM_STEPS = 24  # random steps before the time limit is tried, one rollout of the training scripts


@dataclass
class Report:
    """What was found; each finding once, however often it happens."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def error(self, wrong, message: str) -> bool:
        """Record `message` if `wrong` (bool or tensor); return it as a bool."""
        if bool(wrong) and message not in self.errors:
            self.errors.append(message)
        return bool(wrong)

    def note(self, wrong, message: str) -> None:
        if bool(wrong) and message not in self.notes:
            self.notes.append(message)


def check(env) -> list[str]:
    """Return the faults of an environment in plain words; an empty list if it conforms. Steps it and ends its episodes."""
    return examine(env).errors


def examine(env) -> Report:
    """Read, step and time out `env`, and report errors and notes."""
    report = Report()
    try:
        if _check_attributes(env, report) and _check_reading(env, report):
            _check_stepping(env, report)
            _check_time_limit(env, report)
            _check_state(env, report)
    except _Stop:
        pass
    return report


def steps_per_second(env, seconds: float = 2.0) -> float:
    """Env steps per second, all environments together, with random actions."""
    synchronize = torch.cuda.synchronize if torch.device(env.device).type == "cuda" else lambda: None
    synchronize()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        env.step(_random_actions(env))
        synchronize()
        steps += env.num_envs
    return steps / (time.perf_counter() - start)


# ---- The stages of `examine` ----


def _check_attributes(env, report: Report) -> bool:
    """The attributes are there, with the right types and shapes; False if it makes no sense to go on."""
    for name in REQUIRED:
        report.error(not hasattr(env, name), f"the attribute {name} is missing")
    report.note(not hasattr(env, "cfg"), "no cfg: nothing about the environment is written to the run folder")
    report.note(not hasattr(env, "step_dt"), "no step_dt: 1.0 s per env step is assumed")
    if report.errors:
        return False
    for name in ("num_envs", "num_actions", "max_episode_length"):
        value = getattr(env, name)
        number = isinstance(value, int) or (name == "max_episode_length" and isinstance(value, float))
        number = number or (name == "max_episode_length" and isinstance(value, torch.Tensor) and value.numel() == 1)
        report.error(not number or value < 1, f"{name} is {value!r}, not one positive number for all environments")
    if report.errors:
        return False
    length = env.episode_length_buf
    if not isinstance(length, torch.Tensor):
        return not report.error(True, f"episode_length_buf is a {type(length).__name__}, not a tensor (N,)")
    report.error(length.is_floating_point(), f"episode_length_buf is {_name(length)}, not an integer tensor")
    return _check_vector(env, "episode_length_buf", length, report)


def _check_reading(env, report: Report) -> bool:
    """`get_observations` returns valid groups, and the same twice; False if there are none."""
    first = _call(report, "get_observations()", env.get_observations)
    if not _check_groups(env, "get_observations()", first, report):
        return False
    kept, again = first.clone(), _call(report, "get_observations()", env.get_observations)
    report.error(
        not _same(kept, again),
        "get_observations() gives other numbers when it is read twice: it draws noise or resets; return the observation "
        "of the last step or reset",
    )
    return True


def _check_stepping(env, report: Report) -> None:
    """Random steps: shapes, dtypes, devices, numbers, and buffers that are written to again."""
    last_rewards = kept_rewards = last_obs = kept_obs = None
    for _ in range(NUM_STEPS):
        before = env.episode_length_buf.clone()
        obs, rewards, dones, extras = _step(env, report)
        moved = (env.episode_length_buf != before + 1) & (dones == 0)
        report.error(moved.any(), "episode_length_buf does not count the steps of an episode")
        if last_rewards is not None:
            report.error(
                not torch.equal(last_rewards, kept_rewards) or _shared(last_rewards, rewards),
                "rewards are one buffer that the next step writes to in place: return a clone",
            )
            report.note(
                not _same(last_obs, kept_obs) or any(_shared(last_obs[k], obs[k]) for k in obs.keys()),
                "observations are one buffer that the next step writes to in place: harmless here, the scripts copy them "
                "first; rsl_rl stores them after the step",
            )
        last_rewards, kept_rewards, last_obs, kept_obs = rewards, rewards.clone(), obs, obs.clone()
    report.error(
        not _same(kept_obs, _call(report, "get_observations()", env.get_observations)),
        "get_observations() differs from the observation that step() has just returned: it resets the environment, draws "
        "noise or is stale",
    )


def _check_time_limit(env, report: Report) -> None:
    """One step before the limit everywhere, by setting `episode_length_buf`: every episode has to end, and a new one to begin."""
    almost = torch.full_like(env.episode_length_buf, int(env.max_episode_length) - 1)
    try:
        env.episode_length_buf = almost
    except Exception as error:
        report.error(True, f"episode_length_buf cannot be set ({type(error).__name__}: {_line(error)})")
        return
    ignored = "episode_length_buf can be set but nothing follows from it"
    if report.error((env.episode_length_buf != almost).any(), f"{ignored}: it reads back as other values"):
        return
    obs, _, dones, extras = _step(env, report)
    done = dones.bool()
    if report.error(
        not done.all(),
        f"{ignored}: set to max_episode_length - 1, the next step ended {int(done.sum())} of {env.num_envs} episodes",
    ):
        return
    report.error(
        (env.episode_length_buf != 0).any(),
        "episode_length_buf is not 0 where dones is set: the reset has to happen in the same step",
    )
    report.note(
        "time_outs" not in extras,
        'no extras["time_outs"]: the time limit counts as a failure, with no value beyond it',
    )
    final_obs = extras.get("final_obs")
    report.note(final_obs is None, 'no extras["final_obs"]: time-outs are bootstrapped with V(s_t) instead of V(final_obs)')
    if final_obs is not None and not report.errors:
        report.error(
            _same(obs, final_obs),
            "step() returns the last observation of an episode that is done (equal to final_obs): it has to be the first "
            "one of the next",
        )
    _, _, dones, _ = _step(env, report)
    report.error((dones != 0).all(), "dones stay set in the step after the reset")


# ---- One step, with everything that can be seen in it ----


def _check_state(env, report: Report) -> None:
    """A checkpoint is read with torch.load(weights_only=True), so that it cannot run code: what it holds must be plain."""
    if not hasattr(env, "state_dict"):
        return
    report.error(not hasattr(env, "load_state_dict"), "state_dict() is there, load_state_dict() is missing")
    state, buffer = _call(report, "state_dict()", env.state_dict), io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        report.error(True, f"state_dict() must hold tensors, numbers, strings, lists and dicts alone: {_line(error)[:150]}")


def _step(env, report: Report):
    """Step with random actions and check what comes back; `_Stop` if it is not what the next checks can read."""
    actions = _random_actions(env)
    given = actions.clone()
    result = _call(report, f"step(actions {tuple(actions.shape)})", env.step, actions)
    if not isinstance(result, tuple) or len(result) != 4:
        _stop(report, f"step() returns {_describe(result)}, not (obs, rewards, dones, extras)")
    obs, rewards, dones, extras = result
    report.error(not torch.equal(actions, given), "step() writes to the actions that it is given: clone them first")
    if not _check_groups(env, "step()", obs, report):
        raise _Stop
    sound = [_check_vector(env, "rewards", rewards, report), _check_vector(env, "dones", dones, report)]
    if not isinstance(extras, dict):
        _stop(report, f"extras is {_describe(extras)}, not a dict")
    if not all(sound):
        raise _Stop
    report.error(rewards.dtype not in _floats(), f"rewards are {_name(rewards)}, not float32")
    report.error(not rewards.isfinite().all(), "rewards contain NaN or infinity")
    report.error(((dones != 0) & (dones != 1)).any(), "dones contains numbers other than 0 and 1")
    _check_extras(env, obs, dones.bool(), extras, report)
    return obs, rewards, dones, extras


def _check_extras(env, obs, done, extras: dict, report: Report) -> None:
    """`time_outs` within dones, `final_obs` shaped like the observations, `log` made of numbers."""
    time_outs = extras.get("time_outs")
    if time_outs is not None and _check_vector(env, 'extras["time_outs"]', time_outs, report):
        report.error(
            (time_outs.bool() & ~done).any(),
            'extras["time_outs"] is set where dones is not: time-outs are those dones that are only time limits',
        )
    final_obs = extras.get("final_obs")
    if final_obs is not None:
        _check_final_obs(obs, done, final_obs, report)
    for key, value in (extras.get("episode") or extras.get("log") or {}).items():
        number = isinstance(value, (int, float)) or hasattr(value, "dtype")
        report.error(not number, f'extras["log"]["{key}"] is {_describe(value)}, not a number or a tensor')


def _check_final_obs(obs, done, final_obs, report: Report) -> None:
    """`final_obs` has every group of the observations in the same shape, and numbers where an episode ended."""
    if not isinstance(final_obs, (dict, TensorDictBase)):
        report.error(True, f'extras["final_obs"] is {_describe(final_obs)}, not a TensorDict of all groups')
        return
    for name, value in obs.items():
        if report.error(name not in final_obs.keys(), f'extras["final_obs"] has no group "{name}"'):
            continue
        final = final_obs[name]
        if not report.error(
            final.shape != value.shape,
            f'extras["final_obs"]["{name}"] has shape {tuple(final.shape)}, the observation {tuple(value.shape)}: it holds '
            "all N environments, done or not",
        ):
            report.error(
                not final[done].isfinite().all(), f'extras["final_obs"]["{name}"] contains NaN or infinity in done environments'
            )


def _check_groups(env, source: str, obs, report: Report) -> bool:
    """Observation groups: a TensorDict of finite tensors (N, ...) on the right device; False if they cannot be read."""
    if report.error(
        not isinstance(obs, TensorDictBase), f"{source} returns {_describe(obs)} as observations, not a TensorDict of groups"
    ):
        return False
    readable = not report.error(not len(obs.keys()), f"{source} returns no observation group")
    for name, value in obs.items():
        if report.error(not isinstance(value, torch.Tensor), f'observation group "{name}" is {_describe(value)}, not a tensor'):
            return False
        shape = tuple(value.shape)
        if report.error(
            len(shape) not in (2, 4) or shape[0] != env.num_envs,
            f'observation group "{name}" has shape {shape}, not ({env.num_envs}, O) or, for images, ({env.num_envs}, C, H, W)',
        ):
            readable = False
        image = len(shape) == 4 and (value.dtype == torch.uint8 or value.is_floating_point())
        report.error(
            value.dtype not in _floats() and not image,
            f'observation group "{name}" is {_name(value)}, not float32 (images may be uint8)',
        )
        if _check_device(env, f'observation group "{name}"', value, report):
            report.error(not value.isfinite().all(), f'observation group "{name}" contains NaN or infinity')
        else:
            readable = False
    return readable


def _check_vector(env, what: str, value, report: Report) -> bool:
    """One number per environment, (N,), on the environment's device."""
    if report.error(not isinstance(value, torch.Tensor), f"{what} is {_describe(value)}, not a tensor (N,)"):
        return False
    wrong = tuple(value.shape) != (env.num_envs,)
    shaped = not report.error(wrong, f"{what} has shape {tuple(value.shape)}, not ({env.num_envs},)")
    return _check_device(env, what, value, report) and shaped


def _check_device(env, what: str, value: torch.Tensor, report: Report) -> bool:
    """`value` is where `env.device` says; "cuda" without a number stands for any GPU."""
    expected = torch.device(env.device)
    same = value.device.type == expected.type and expected.index in (None, value.device.index)
    return not report.error(not same, f"{what} is on {value.device}, env.device is {expected}")


# ---- Small things ----


class _Stop(Exception):
    """The environment cannot be examined further."""


def _stop(report: Report, message: str) -> None:
    report.error(True, message)
    raise _Stop


def _call(report: Report, what: str, function, *args):
    try:
        return function(*args)
    except Exception as error:
        report.error(True, f"{what} raised {type(error).__name__}: {_line(error)}")
        raise _Stop from error


def _random_actions(env) -> torch.Tensor:
    return 2.0 * torch.rand(env.num_envs, env.num_actions, device=env.device) - 1.0  # (N, A)


def _floats() -> tuple[torch.dtype, ...]:
    return torch.float32, torch.get_default_dtype()


def _same(a, b) -> bool:
    return all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a.keys())  # NaN is an error of its own


def _shared(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _describe(value) -> str:
    inside = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{inside}"


# ---- Command line ----


def main(env: str, num_envs: int = 16, device: str = "cpu", seed: int = 0, play: bool = False) -> int:
    """Check one environment and print a report.

    Args:
        env: id, as for the training scripts.
        num_envs: number of environments.
        device: torch device.
        seed: seed of the environment.
        play: the variant that `--play` uses.
    """
    from . import make

    try:
        built = make(env, num_envs, device, seed, **({"play": True} if play else {}))
    except (ImportError, ValueError) as error:
        print(error)
        return 1
    report = examine(built)
    print(f"{env} on {device}")
    if not report.errors:
        print(f"  {built.num_envs} environments, {built.num_actions} actions, {int(built.max_episode_length)} steps an episode")
        for name, value in built.get_observations().items():
            print(f"  {name}: {tuple(value.shape)} {_name(value)}")
        print(f"  {steps_per_second(built):,.0f} env steps/s")
    for message in report.errors:
        print(f"  ERROR  {message}")
    for message in report.notes:
        print(f"  note   {message}")
    print("does not conform" if report.errors else "conforms")
    getattr(built, "close", lambda: None)()
    return bool(report.errors)


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(main))
