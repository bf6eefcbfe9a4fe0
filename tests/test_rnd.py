"""ppo_rnd.py: equal to rsl_rl's RND where the two mean the same, and better, measurably, where it errs."""

import dataclasses
import re

import cases
import instruments
import pytest
import reference
import torch
from tensordict import TensorDict

import ppo_rnd as module
from envs import make

SMALL = cases.SMALL | dict(num_envs=32, actor_hidden_dims=(16,), critic_hidden_dims=(16,), rnd_weight=3.3)
SMALL |= dict(rnd_predictor_hidden_dims=(16, 8), rnd_target_hidden_dims=(24,), rnd_num_outputs=5)
BOTH = dict(rnd_state_normalization=True, rnd_reward_normalization=True)
LINEAR = dict(rnd_weight_schedule="linear", rnd_initial_step=40, rnd_final_step=177, rnd_final_value=0.7)
STEP = dict(rnd_weight_schedule="step", rnd_final_step=101, rnd_final_value=0.7, rnd_learning_rate=3e-3)
PARITY = {  # environment, settings
    "no normaliser, a subset": ("navigation-maze", dict(rnd_obs=("rnd",), init_at_random_ep_len=False)),
    "state normaliser, step": ("cartpole", dict(rnd_obs=("policy",), rnd_state_normalization=True, **STEP)),
    "reward normaliser, two groups": ("navigation-maze", dict(rnd_obs=("rnd", "policy"), rnd_reward_normalization=True)),
    "both, linear": ("navigation-maze", dict(rnd_obs=("rnd",), seed=2, **BOTH, **LINEAR)),
}


def args_of(**settings):
    return module.Args(
        **(SMALL | dict(env="navigation-maze", rnd_obs=("rnd",), timeout_bootstrap="final_obs") | BOTH | settings)
    )


def numbers(history):
    """What must be equal, NaN included: everything but times."""
    return str([{k: v for k, v in metrics.items() if not k.startswith("Perf/")} for metrics in history])


def make_rnd(env, **settings):
    args = args_of(num_envs=env.num_envs, **settings)
    return args, module.make_models(env.get_observations(), env, args)[2]


def everything(agent):
    """All that learns or counts, gathered here and not by the script."""
    modules, optimizers = [agent[name] for name in ("actor", "critic", "rnd")], [agent["optimizer"], agent["rnd_optimizer"]]
    tensors = [x for part in modules for x in (*part.parameters(), *part.buffers())]
    return tensors + [x for part in optimizers for x in part.state.values()]


# ---- Parity ----


@pytest.mark.parametrize("name", PARITY)
def test_trajectory_is_bit_equal(name):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    env_id, settings = PARITY[name]
    args = module.Args(env=env_id, **(SMALL | settings))
    expected, runner = reference.run(args, make(env_id, args.num_envs, seed=args.seed))
    history, agent = cases.run(module, args, make(env_id, args.num_envs, seed=args.seed))
    assert len(history) == len(expected) == 10 and "Loss/rnd" in expected[0]
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        for tag, value in theirs.items():
            assert ours[tag] == value, f"iteration {iteration}: {tag}"
    for part in ("actor", "critic", "rnd"):
        theirs = getattr(runner.alg, part).state_dict()
        assert set(agent[part].state_dict()) == set(theirs)
        for key, value in agent[part].state_dict().items():
            assert torch.equal(value, theirs[key]), f"{part} {key}"
    adam = agent["rnd_optimizer"].state_dict()["state"]
    for key, state in runner.alg.rnd.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(adam[key][name], torch.as_tensor(value)), f"Adam {key} {name}"
    rnd = agent["rnd"]
    assert rnd.step == runner.alg.rnd.update_counter == 10 * args.num_steps_per_env
    assert history[-1]["Rnd/weight"] == pytest.approx(runner.alg.rnd.weight, rel=1e-6)
    if args.rnd_reward_normalization:
        assert torch.equal(rnd.reward_normalizer.discounted_sum, runner.alg.rnd.reward_normalizer.disc_avg.avg)


def test_normalisers_freeze_as_the_references_do():
    modules = pytest.importorskip("rsl_rl.modules")
    theirs, ours = modules.EmpiricalNormalization(3, until=40), module.EmpiricalNormalization(3, until=40)
    their_rewards, our_rewards = modules.EmpiricalDiscountedVariationNormalization([], until=40), module.RewardNormalization(16)
    our_rewards.emp_norm.until = 40
    for _ in range(6):
        x, rewards = torch.randn(16, 3), torch.rand(16)
        theirs.update(x), ours.update(x)
        assert torch.equal(ours(x), theirs(x)) and torch.equal(our_rewards(rewards), their_rewards(rewards))
    assert ours.count == our_rewards.emp_norm.count == 48
    assert torch.equal(our_rewards.discounted_sum, their_rewards.disc_avg.avg)  # goes on when the deviation is frozen
    assert module.RandomNetworkDistillation({"x": (2,)}, make("cartpole", 4), args_of()).state_normalizer.until == 1e8


def test_equal_rewards_are_not_divided_by_zero():
    assert torch.equal(module.RewardNormalization(4)(torch.full((4,), 0.3)), torch.full((4,), 0.3))


def test_checkpoints_interchange_with_the_reference(tmp_path):
    pytest.importorskip("rsl_rl")
    args = args_of(max_iterations=2, timeout_bootstrap="reference")
    _, agent = cases.run(module, args, make(args.env, 32))
    module.save_checkpoint(tmp_path / "model_1.pt", agent, 1, {"step": 0})
    env = make(args.env, 32)
    runner = reference.make_runner(args, env)
    runner.load(str(tmp_path / "model_1.pt"))
    for key, value in runner.alg.rnd.state_dict().items():
        assert torch.equal(value, agent["rnd"].state_dict()[key]), key
    _, runner = reference.run(args, env)
    torch.save(runner.alg.save() | {"iter": 1, "infos": None}, tmp_path / "model_2.pt")
    module.restore(agent, module.load_checkpoint(tmp_path / "model_2.pt", torch.device("cpu")), tmp_path)
    for key, value in runner.alg.rnd.state_dict().items():
        assert torch.equal(value, agent["rnd"].state_dict()[key]), key


# ---- Where the reference errs ----


def test_final_value_has_the_unit_of_the_weight():
    """A schedule from 2 to 2 is constant, whatever step_dt is."""
    settings = dict(rnd_weight=2.0, rnd_final_value=2.0, rnd_final_step=10)
    for schedule in ("constant", "step", "linear"):
        _, rnd = make_rnd(make("navigation-maze", 4), rnd_weight_schedule=schedule, **settings)
        for step in range(0, 21, 5):
            rnd.step.fill_(step)
            assert rnd.weight().item() == pytest.approx(2.0 * 0.1)


def test_schedules():
    expected = {"constant": [0.2] * 5, "step": [0.2, 0.2, 0.2, 0.8, 0.8], "linear": [0.2, 0.2, 0.5, 0.8, 0.8]}
    for schedule, values in expected.items():
        settings = dict(rnd_weight=2.0, rnd_final_value=8.0, rnd_initial_step=10, rnd_final_step=20)
        _, rnd = make_rnd(make("navigation-maze", 4), rnd_weight_schedule=schedule, **settings)
        for step, value in zip((1, 10, 15, 20, 21), values):
            rnd.step.fill_(step)
            assert rnd.weight().item() == pytest.approx(value), (schedule, step)


def test_step_dt_of_a_wrapped_environment(capsys):
    """Wrappers for rsl_rl have env.unwrapped.step_dt; where there is none at all a step is 1 s; both are printed."""
    env = make("cartpole", 4)
    wrapped = type("Wrapped", (), dict(num_envs=4, unwrapped=env))
    bare = type("Bare", (), dict(num_envs=4))
    for this, step_dt in ((env, env.step_dt), (wrapped, env.step_dt), (bare, 1.0)):
        rnd = module.RandomNetworkDistillation({"policy": (4,)}, this, args_of())
        assert rnd.initial_weight == pytest.approx(3.3 * step_dt)
        assert f"weight 3.3 x step_dt {step_dt:g} s" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["final_obs", "reference", "not given"])
def test_novelty_of_a_finished_episode_is_that_of_its_last_state(mode):
    """Environment 1 is done: its last state counts, not the next episode's first; a running one's final_obs may be anything."""
    env = make("navigation-maze", 4)
    args, rnd = make_rnd(
        env, timeout_bootstrap="reference" if mode == "reference" else "final_obs", **dict.fromkeys(BOTH, False)
    )
    obs = lambda x: TensorDict({"rnd": x}, batch_size=[4])  # noqa: E731
    following, last = torch.randn(4, 2), torch.full((4, 2), torch.nan)
    last[1] = torch.tensor([7.0, -3.0])
    row = TensorDict({"dones": torch.tensor([False, True, False, False])}, batch_size=[4])
    extras = {} if mode == "not given" else {"final_obs": obs(last.double())}
    rewards = module.intrinsic_reward(rnd, row, TensorDict({"obs": obs(following)}, batch_size=[4]), extras, args)
    reached = following.clone()
    if mode == "final_obs":
        reached[1] = last[1]
    assert torch.allclose(rewards, 0.33 * (rnd.target(reached) - rnd.predictor(reached)).norm(dim=1))


def test_returns_are_logged_apart():
    """The mean reward is the task's alone, as added up here; the intrinsic one, never negative here, stands beside it."""
    env, returns, finished = make("cartpole", 32), torch.zeros(32), []
    step = env.step

    def adding_step(actions):
        obs, rewards, dones, extras = step(actions)
        returns.add_(rewards)
        finished.append(returns[dones].tolist())
        returns[dones] = 0.0
        return obs, rewards, dones, extras

    env.step = adding_step
    args = args_of(env="cartpole", rnd_obs=("policy",), num_learning_epochs=1)
    history = module.train(args, env)
    assert any(finished)
    for iteration, metrics in enumerate(history):
        ended = sum(finished[iteration * args.num_steps_per_env :][: args.num_steps_per_env], start=[])
        assert metrics["Train/num_episodes"] == len(ended)
        if ended:
            assert metrics["Train/mean_reward"] == pytest.approx(sum(ended) / len(ended), rel=1e-4)
            assert metrics["Rnd/mean_extrinsic_reward"] == metrics["Train/mean_reward"]
            assert metrics["Rnd/mean_intrinsic_reward"] > 0.0


def test_both_rewards_make_the_advantages():
    args = args_of(num_steps_per_env=3)
    zeros = {name: torch.zeros(4, 2) for name in ("values", "rewards", "intrinsic_rewards", "bootstrap")}
    storage = TensorDict(zeros | {"dones": torch.zeros(4, 2, dtype=torch.bool)}, batch_size=[4, 2])
    storage["rewards"][2], storage["intrinsic_rewards"][2] = 1.0, 0.5
    assert torch.allclose(module.compute_gae(storage, args)[1][2], torch.tensor(1.5))


def test_resumed_run_equals_uninterrupted_run(monkeypatch):
    """Step count, discounted sum, both normalisers, predictor and its optimizer go on where they stopped."""
    monkeypatch.setattr(module, "export_policy", lambda *_: None)
    settings = args_of(max_iterations=6, rnd_weight_schedule="linear", rnd_final_step=140, logger="none")
    run = lambda **changes: cases.run(module, dataclasses.replace(settings, **changes), make("navigation-maze", 32))  # noqa: E731
    whole, expected = run(log_root="")
    run(log_root="logs", max_iterations=3)
    resumed, agent = run(log_root="logs", resume=True)
    assert numbers(resumed) == numbers(whole[3:])
    weights = [metrics["Rnd/weight"] for metrics in whole]
    assert weights[2] > weights[3] > weights[5] == 0.0
    for ours, theirs in zip(everything(agent), everything(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_with_another_number_of_environments(monkeypatch):
    """The schedule goes on; the discounted sums start afresh."""
    monkeypatch.setattr(module, "export_policy", lambda *_: None)
    module.train(args_of(max_iterations=2, log_root="logs", logger="none"), make("navigation-maze", 32))
    args = args_of(max_iterations=3, log_root="logs", logger="none", resume=True)
    _, agent = cases.run(module, args, make("navigation-maze", 8))
    assert agent["rnd"].step == 3 * args.num_steps_per_env and agent["rnd"].reward_normalizer.discounted_sum.shape == (8,)


@pytest.mark.parametrize("where", ["reward", "final_obs"])
def test_nothing_of_a_bad_rollout_is_kept(where, monkeypatch):
    """After a NaN all of RND is as the last good iteration left it: its reward statistics change during the rollout too."""
    _, good = cases.run(module, args_of(max_iterations=2), make("navigation-maze", 32))
    env = make("navigation-maze", 32)
    step, steps = env.step, []

    def bad_step(actions):
        obs, rewards, dones, extras = step(actions)
        steps.append(1)
        if len(steps) == 2 * 24 + 5:
            dones[3] = True
            (rewards if where == "reward" else extras["final_obs"]["rnd"])[3] = torch.nan
        return obs, rewards, dones, extras

    env.step, agent, tensors_of = bad_step, {}, module.tensors_of
    monkeypatch.setattr(module, "tensors_of", lambda parts: agent.update(parts) or tensors_of(parts))
    message = (
        "non-finite " + {"reward": "rewards", "final_obs": "intrinsic_rewards"}[where] + " from step 4 on, in environments [3"
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        module.train(args_of(max_iterations=3), env)
    for ours, theirs in zip(everything(agent), everything(good), strict=True):
        assert torch.equal(ours, theirs)


def test_a_predictor_that_diverges_is_seen_at_once():
    storage = TensorDict({"obs": {}, "rewards": torch.zeros(2, 4)}, batch_size=[2, 4])
    storage["intrinsic_rewards"], storage["bootstrap"] = storage["rewards"], storage["rewards"]
    metrics = {f"Loss/{name}": torch.zeros(20) for name in ("surrogate", "value", "rnd")}
    assert all(module.finite_flags(storage, metrics).values())
    metrics["Loss/rnd"][19] = torch.inf
    assert not module.finite_flags(storage, metrics)["finite/loss"]


# ---- The device ----


def test_no_waiting_inside_the_iteration(monkeypatch):
    operations, reads, called = instruments.Operations(), [], []

    def watched(function):
        def call(*args):
            called.append(function.__name__)
            with instruments.host_reads() as counts, operations:
                result = function(*args)
            reads.append(sum(counts.values()))
            return result

        return call

    for name in ("collect", "update"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    module.train(args_of(max_iterations=3, **LINEAR), make("navigation-maze", 32))
    assert called == ["collect", "update"] * 3 and not operations.waits and not any(reads), (operations.waits, reads)


@pytest.mark.parametrize("schedule", [LINEAR, STEP], ids=["linear", "step"])
def test_captured_run_equals_eager_run(schedule, monkeypatch):
    """Replaying the recorded kernels counts the steps, moves the weight and sums the rewards as the eager run does."""
    args = args_of(max_iterations=6, num_steps_per_env=20, num_envs=16, **(schedule | dict(rnd_final_step=101)))
    eager, expected = cases.run(module, args, make("navigation-maze", 16))
    graph = lambda fn, *rest, **_: (  # noqa: E731
        instruments.EmulatedGraph(fn, *rest) if fn.__name__ in ("collect", "update") else lambda: fn(*rest)
    )
    monkeypatch.setattr(module, "CudaGraph", graph)
    replayed, agent = cases.run(module, args, make("navigation-maze", 16))
    assert numbers(replayed) == numbers(eager)
    for ours, theirs in zip(everything(agent), everything(expected), strict=True):
        assert torch.equal(ours, theirs)


# ---- Use ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rnd_weight_schedule="linear"), "--rnd-final-step 0: must come after --rnd-initial-step 0"),
        (dict(rnd_weight_schedule="cosine"), "--rnd-weight-schedule cosine: choose from constant, step, linear"),
        (dict(rnd_obs=("pose",)), "--rnd-obs pose: the environment has no such group; it has policy (4,), rnd (2,)"),
        (dict(rnd_target_hidden_dims=()), "--rnd-target-hidden-dims (): name at least one layer"),
        (dict(rnd_num_outputs=0), "--rnd-num-outputs 0: must be greater than 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(module.UserError, match=re.escape(message)):
        module.train(args_of(**settings), make("navigation-maze", 32))


def test_groups_by_convention(capsys):
    """`rnd` where the environment has it, else what the actor sees."""
    for env_id, expected in (("navigation-maze", "rnd observes rnd (2,)"), ("cartpole", "rnd observes policy")):
        module.resolve_groups(make(env_id, 4).get_observations(), module.Args())
        assert expected in capsys.readouterr().out
