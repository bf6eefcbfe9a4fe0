"""ppo_rnd.py: equal to rsl_rl's RND where the two mean the same, and better, measurably, where it errs."""

import dataclasses
import re

import cases
import instruments
import pytest
import reference
import torch
from tensordict import TensorDict
from torch.utils._pytree import tree_leaves

import ppo_rnd as module
from envs import make

SMALL = cases.SMALL | dict(num_envs=32, actor_hidden_dims=(16,), critic_hidden_dims=(16,), rnd_weight=3.3, device="cpu")
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


def agent_of(env, **settings):
    """An untrained agent, its rollout, and the settings of both."""
    args = module.choose_groups(env.get_observations(), args_of(num_envs=env.num_envs, **settings))
    obs = module.read_obs(env.get_observations(), args)
    agent = module.make_agent(env, obs, args)
    return agent, module.make_storage(agent, obs, env.num_actions, args), args


def everything(agent):
    """All that learns or counts, gathered here and not by the script."""
    modules, optimizers = [agent[name] for name in ("actor", "critic", "rnd")], [agent["optimizer"], agent["rnd_optimizer"]]
    tensors = [x for part in modules for x in (*part.parameters(), *part.buffers())]
    return tensors + [x for part in optimizers for x in tree_leaves(part.state_dict()) if torch.is_tensor(x)]


def assert_equal(ours, theirs):
    for x, y in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(x, y)


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
    assert runner.alg.rnd.update_counter == 10 * args.num_steps_per_env
    assert history[-1]["Rnd/weight"] == pytest.approx(runner.alg.rnd.weight, rel=1e-6)  # of a float64 in float32


def test_normalisers_freeze_as_the_references_do():
    modules = pytest.importorskip("rsl_rl.modules")
    theirs, ours = modules.EmpiricalNormalization(3, until=40), module.EmpiricalNormalization(3, until=40)
    their_rewards, our_rewards = modules.EmpiricalDiscountedVariationNormalization([], until=40), module.RewardNormalization()
    our_rewards.emp_norm.until, discounted_sum = 40, torch.zeros(16)
    for _ in range(6):
        x, rewards = torch.randn(16, 3), torch.rand(16)
        discounted_sum = 0.99 * discounted_sum + rewards  # goes on when the deviation is frozen
        theirs.update(x), ours.update(x)
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(our_rewards(rewards, discounted_sum), their_rewards(rewards))
    assert ours.count == our_rewards.emp_norm.count == 48
    rnd = agent_of(make("cartpole", 4), rnd_obs=("policy",))[0].rnd
    assert rnd.state_normalizer.until == rnd.reward_normalizer.emp_norm.until == 1e8
    assert module.EmpiricalNormalization(3).until > 1e18  # those of actor and critic never freeze


def test_equal_rewards_are_not_divided_by_zero():
    rewards = torch.full((4,), 0.3)
    assert torch.equal(module.RewardNormalization()(rewards, rewards), rewards)


def test_checkpoints_interchange_with_the_reference(tmp_path, monkeypatch):
    """RND and its optimizer too; rsl_rl resumes ours, and we resume rsl_rl's, whose schedule it does not keep."""
    pytest.importorskip("rsl_rl")
    monkeypatch.setattr(module, "export_policy", lambda *_: None)
    args = args_of(max_iterations=2, timeout_bootstrap="value", log_root=str(tmp_path), logger="none")
    history, agent = cases.run(module, args, make(args.env, 32))
    env = make(args.env, 32)
    runner = reference.make_runner(args, env)
    runner.load(str(history.run_dir / "model_1.pt"))

    def assert_same(ours):
        for key, value in runner.alg.rnd.state_dict().items():
            assert torch.equal(value, ours["rnd"].state_dict()[key]), key
        adam = ours["rnd_optimizer"].state_dict()["state"]
        for key, state in runner.alg.rnd.optimizer.state_dict()["state"].items():
            assert all(torch.equal(adam[key][name], torch.as_tensor(value)) for name, value in state.items()), key

    assert_same(agent)
    _, runner = reference.run(args, env)
    torch.save(runner.alg.save() | {"iter": 1, "infos": None}, tmp_path / "model_7.pt")
    settings = dict(timeout_bootstrap="value", resume=True, checkpoint=str(tmp_path / "model_7.pt"))
    fresh, storage, args = agent_of(env, **settings)
    assert module.load(fresh, env, storage, args) == 2
    assert_same(vars(fresh))


# ---- Where the reference errs ----


def weights(schedule, steps, env=None, **settings):
    args = args_of(rnd_weight_schedule=schedule, **settings)
    return module.rnd_weight(env or make("navigation-maze", 4), torch.tensor(steps, dtype=torch.float32), args).tolist()


def test_final_value_has_the_unit_of_the_weight():
    """A schedule from 2 to 2 is constant, whatever step_dt is; here 0.1 s."""
    for schedule in ("constant", "step", "linear"):
        values = weights(schedule, range(0, 21, 5), rnd_weight=2.0, rnd_final_value=2.0, rnd_final_step=10)
        assert values == pytest.approx([0.2] * 5), schedule


def test_schedules():
    expected = {"constant": [0.2] * 5, "step": [0.2, 0.2, 0.2, 0.8, 0.8], "linear": [0.2, 0.2, 0.5, 0.8, 0.8]}
    settings = dict(rnd_weight=2.0, rnd_final_value=8.0, rnd_initial_step=10, rnd_final_step=20)
    for schedule, values in expected.items():
        assert weights(schedule, (1, 10, 15, 20, 21), **settings) == pytest.approx(values), schedule


def test_step_dt_of_a_wrapped_environment():
    """Wrappers for rsl_rl have env.unwrapped.step_dt; where there is none at all a step is 1 s."""
    env = make("cartpole", 4)
    assert weights("constant", [0], env) == pytest.approx([3.3 * env.step_dt])
    assert weights("constant", [0], type("Wrapped", (), dict(unwrapped=env))()) == pytest.approx([3.3 * env.step_dt])
    assert weights("constant", [0], type("Bare", (), {})()) == pytest.approx([3.3])


@pytest.mark.parametrize("mode", ["final_obs", "value", "not given"])
def test_novelty_of_a_finished_episode_is_that_of_its_last_state(mode):
    """Environment 1 times out: its last state counts, not the next episode's first. Elsewhere final_obs may be anything."""
    env = make("navigation-maze", 4)
    agent, storage, args = agent_of(
        env, timeout_bootstrap="value" if mode == "value" else "final_obs", **dict.fromkeys(BOTH, False)
    )
    row, next_row = storage[0], storage[1]
    reached, last = torch.randn(4, 2), torch.full((4, 2), torch.nan)
    last[1] = torch.tensor([7.0, -3.0])
    row["dones"][1:3] = True
    next_row["obs", "rnd"].copy_(reached)
    extras = {} if mode == "not given" else {"final_obs": TensorDict({"rnd": last.double()}, batch_size=[4])}
    extras["time_outs"] = torch.tensor([False, True, False, False])
    rewards = module.intrinsic_reward(env, agent.rnd, row, next_row, extras, args)
    if mode == "final_obs":
        reached[1] = last[1]
    assert torch.allclose(rewards, 0.33 * (agent.rnd.target(reached) - agent.rnd.predictor(reached)).norm(dim=1))


def test_a_training_survives_nan_in_final_obs_that_no_time_out_uses():
    """And gets the numbers of one without; in rows that have timed out final_obs is read: there NaN ends it (below)."""
    histories = []
    for junk in (False, True):
        env = make("navigation-maze", 32)

        def step(actions, step=env.step, junk=junk):
            obs, rewards, dones, extras = step(actions)
            if junk:
                extras["final_obs"].apply_(lambda x: x.masked_fill_(~extras["time_outs"][:, None], torch.nan))
            return obs, rewards, dones, extras

        env.step = step
        histories.append(module.train(args_of(max_iterations=3), env))
    assert sum(metrics["Train/num_episodes"] for metrics in histories[0]) > 0
    assert numbers(histories[0]) == numbers(histories[1])


def test_returns_are_logged_apart(monkeypatch):
    """The mean reward is the task's alone, as added up here; the intrinsic one, here 0.25 per step, stands beside it."""
    env, returns, finished = make("cartpole", 32), torch.zeros(32), []
    step = env.step

    def adding_step(actions):
        obs, rewards, dones, extras = step(actions)
        returns.add_(rewards)
        finished.append(returns[dones].tolist())
        returns[dones] = 0.0
        return obs, rewards, dones, extras

    env.step = adding_step
    monkeypatch.setattr(module, "intrinsic_reward", lambda env, rnd, row, *_: torch.full_like(row["rewards"], 0.25))
    args = args_of(env="cartpole", rnd_obs=("policy",), num_learning_epochs=1)
    history = module.train(args, env)
    assert any(finished)
    for iteration, metrics in enumerate(history):
        ended = sum(finished[iteration * args.num_steps_per_env :][: args.num_steps_per_env], start=[])
        assert metrics["Train/num_episodes"] == len(ended)
        if ended:
            assert metrics["Train/mean_reward"] == pytest.approx(sum(ended) / len(ended), rel=1e-4)
            assert metrics["Rnd/mean_intrinsic_reward"] == pytest.approx(0.25 * metrics["Train/mean_episode_length"])


def test_both_rewards_make_the_advantages():
    args = args_of(num_steps_per_env=3)
    zeros = {name: torch.zeros(4, 2) for name in ("values", "rewards", "intrinsic_rewards", "bootstrap")}
    storage = TensorDict(zeros | {"dones": torch.zeros(4, 2, dtype=torch.bool)}, batch_size=[4, 2])
    storage["rewards"][2], storage["intrinsic_rewards"][2] = 1.0, 0.5
    assert torch.allclose(module.compute_gae(storage, args)[1][2], torch.tensor(1.5))


# ---- Resuming and failing ----


def test_resumed_run_equals_uninterrupted_run(monkeypatch):
    """Step count, discounted sum, both normalisers, predictor and its optimizer go on where they stopped."""
    monkeypatch.setattr(module, "export_policy", lambda *_: None)
    settings = args_of(max_iterations=6, rnd_weight_schedule="linear", rnd_final_step=140, logger="none")
    run = lambda **changes: cases.run(module, dataclasses.replace(settings, **changes), make("navigation-maze", 32))
    whole, expected = run(log_root="")
    run(log_root="logs", max_iterations=3)
    resumed, agent = run(log_root="logs", resume=True)
    assert numbers(resumed) == numbers(whole[3:])
    schedule = [metrics["Rnd/weight"] for metrics in whole]
    assert schedule[2] > schedule[3] > schedule[5] == 0.0
    assert_equal(agent, expected)


@pytest.mark.parametrize("why", ["another number of environments", "an environment that saves nothing"])
def test_the_schedule_goes_on_where_the_environment_starts_afresh(why, monkeypatch):
    monkeypatch.setattr(module, "export_policy", lambda *_: None)
    settings = dict(rnd_weight_schedule="linear", rnd_final_step=140, log_root="logs", logger="none")
    env, fresh = make("navigation-maze", 32), make("navigation-maze", 32 if "saves" in why else 8)
    if "saves" in why:
        env.state_dict = lambda: None
    first = module.train(args_of(max_iterations=2, **settings), env)
    (resumed,) = module.train(args_of(max_iterations=3, resume=True, **settings), fresh)
    # From 3.3 per second, 0.33 per step, to 0 at step 140: 24 steps an iteration
    found = [metrics["Rnd/weight"] for metrics in (*first, resumed)]
    assert found == pytest.approx([0.33 * (1 - 24 * iterations / 140) for iterations in (1, 2, 3)])


@pytest.mark.parametrize("where", ["reward", "final_obs"])
def test_nothing_of_a_bad_rollout_is_kept(where, tmp_path):
    """After a NaN all of RND is saved as the last good iteration left it: its reward statistics change during the rollout too."""
    _, good = cases.run(module, args_of(max_iterations=2), make("navigation-maze", 32))
    env = make("navigation-maze", 32)
    good_args = module.choose_groups(env.get_observations(), args_of(device="cpu"))
    step, steps = env.step, []

    def bad_step(actions):
        obs, rewards, dones, extras = step(actions)
        steps.append(1)
        if len(steps) == 2 * 24 + 5:
            dones[3] = extras["time_outs"][3] = True
            (rewards if where == "reward" else extras["final_obs"]["rnd"])[3] = torch.nan
        return obs, rewards, dones, extras

    env.step = bad_step
    name = {"reward": "rewards", "final_obs": "intrinsic_rewards"}[where]
    with pytest.raises(FloatingPointError, match=f"iteration 2: {name} of environment 3, .* is nan at step 4"):
        module.train(args_of(max_iterations=3, log_root=str(tmp_path), logger="none"), env)
    (path,) = tmp_path.glob("*/*/model_1.pt")
    agent = module.make_agent(env, module.read_obs(env.get_observations(), good_args), good_args)
    saved = module.read_checkpoint(path, "cpu")
    for name, part in module.parts_of(agent).items():
        module.restore(part, saved, name, path)
    assert_equal(vars(agent), good)


def test_a_predictor_that_diverges_is_seen_at_once():
    with pytest.raises(FloatingPointError, match="iteration 0: .*but not what came of it"):
        module.train(args_of(rnd_learning_rate=1e30), make("navigation-maze", 32))


# ---- The device ----


@pytest.mark.parametrize("schedule", [LINEAR, STEP], ids=["linear", "step"])
def test_captured_run_equals_eager_run(schedule):
    """Replaying the recorded kernels counts the steps, moves the weight and sums the rewards as the eager run does. Nothing
    waits in there, or the recording would fail."""
    args = args_of(max_iterations=6, num_steps_per_env=20, num_envs=16, **(schedule | dict(rnd_final_step=101)))
    instruments.check_replay(module, args, lambda: make("navigation-maze", 16), whole=True)


# ---- Use ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rnd_weight_schedule="linear"), "--rnd-final-step 0: must come after rnd_initial_step, 0"),
        (dict(rnd_weight_schedule="cosine"), "--rnd-weight-schedule cosine: choose from constant, step, linear"),
        (dict(rnd_obs=("pose",)), "--rnd-obs ('pose',): must name vectors"),
        (dict(rnd_target_hidden_dims=(0,)), "--rnd-target-hidden-dims (0,): must be greater than 0"),
        (dict(rnd_num_outputs=0), "--rnd-num-outputs 0: must be greater than 0"),
        (dict(rnd_learning_rate=0.0), "--rnd-learning-rate 0.0: must be greater than 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(module.UserError, match=re.escape(message)):
        module.train(args_of(**settings), make("navigation-maze", 32))


def test_groups_by_convention():
    """`rnd` where the environment has it, else what the actor sees."""
    for env_id, expected in (("navigation-maze", ("rnd",)), ("cartpole", ("policy",))):
        assert module.choose_groups(make(env_id, 4).get_observations(), module.Args()).rnd_obs == expected
