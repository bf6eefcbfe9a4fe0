"""The mathematics on numbers that were worked out by hand (the arithmetic stands in the comments)."""

import math

import pytest
import torch
from tensordict import TensorDict

import ppo_continuous as module


def test_gae_with_a_termination_and_a_time_out():
    """gamma 0.5, lambda 0.5, four steps of one environment; step 1 terminates, step 2 is cut by the time limit."""
    args = module.Args(num_envs=1, num_steps_per_env=4, gamma=0.5, lam=0.5, normalize_advantage_per_mini_batch=True)
    column = lambda *x: torch.tensor(x)[:, None]  # noqa: E731
    storage = TensorDict(
        values=column(1.0, 2.0, 3.0, 4.0, 6.0),
        rewards=column(1.0, 1.0, 1.0, 1.0, 0.0),
        bootstrap=column(0.0, 0.0, 8.0, 0.0, 0.0),
        dones=column(False, True, True, False, False),
        batch_size=[5, 1],
    )
    advantages, returns = module.compute_gae(storage, args)
    # t=3: delta = 1 + 0.5 * 6 - 4 = 0                                   A = 0
    # t=2: the time limit cut: r = 1 + 0.5 * 8 = 5, delta = 5 - 3 = 2    A = 2, nothing from t=3
    # t=1: terminated: delta = 1 - 2 = -1                                A = -1
    # t=0: delta = 1 + 0.5 * 2 - 1 = 1                                   A = 1 + 0.25 * (-1) = 0.75
    assert advantages.flatten().tolist() == [0.75, -1.0, 2.0, 0.0]
    assert returns.flatten().tolist() == [1.75, 1.0, 5.0, 4.0]


def loss_of(log_prob_shift: float, advantage: float, value: float, **settings) -> dict:
    """PPO's loss on one sample: an actor that always says 0, an action whose log-probability was shift lower."""
    args = module.Args(actor_hidden_dims=(1,), critic_hidden_dims=(1,), obs_normalization=False, **settings)
    actor, critic = module.make_actor({"policy": (1,)}, 1, args), module.Model({"policy": (1,)}, (1,), args)
    for model, bias in ((actor, 0.0), (critic, value)):
        torch.nn.init.zeros_(model.mlp[-1].weight)
        torch.nn.init.constant_(model.mlp[-1].bias, bias)
    log_prob = -0.5 * math.log(2 * math.pi)  # of the action 0 under N(0, 1)
    batch = TensorDict(
        actor_input=torch.zeros(1, 1), critic_input=torch.zeros(1, 1), actions=torch.zeros(1, 1),
        log_prob=torch.tensor([log_prob - log_prob_shift]), advantages=torch.tensor([advantage]),
        values=torch.tensor([1.0]), returns=torch.tensor([3.0]),
        params=TensorDict({"0": torch.ones(1, 1), "1": 2 * torch.ones(1, 1)}, batch_size=[1]), batch_size=[1], device="cpu",
    )  # fmt: skip
    loss, metrics = module.ppo_loss(actor, critic, batch, args)
    return {"loss": loss.item()} | {name: x.item() for name, x in metrics.items()}


@pytest.mark.parametrize(
    "ratio, advantage, surrogate, clipped",
    [
        (1.1, 2.0, -2.2, 0.0),  # inside the clip range: -ratio A
        (1.5, 2.0, -2.4, 1.0),  # good action already much likelier: -1.2 A
        (1.5, -2.0, 3.0, 1.0),  # bad action much likelier: the unclipped, larger loss
        (0.5, -2.0, 1.6, 1.0),  # bad action already much rarer: 0.8 * 2
    ],
)
def test_surrogate(ratio, advantage, surrogate, clipped):
    metrics = loss_of(math.log(ratio), advantage, value=1.0)
    assert metrics["surrogate"] == pytest.approx(surrogate, rel=1e-6)
    assert metrics["clip_fraction"] == clipped


def test_value_loss_and_total():
    # old value 1, return 3, new value 2: plain error 1; clipped to 1.2 the error is 1.8^2 = 3.24, the larger
    assert loss_of(0.0, 1.0, value=2.0)["value"] == pytest.approx(3.24)
    assert loss_of(0.0, 1.0, value=2.0, use_clipped_value_loss=False)["value"] == pytest.approx(1.0)
    # entropy of N(0, 1) = 1.4189; loss = -1 + 0.5 * 3.24 - 0.01 * 1.4189
    metrics = loss_of(0.0, 1.0, value=2.0, value_loss_coef=0.5)
    assert metrics["entropy"] == pytest.approx(1.4189385)
    assert metrics["loss"] == pytest.approx(-1.0 + 1.62 - 0.014189385)


def test_kl():
    # KL(N(1, 2) || N(0, 1)) = 1/2 (4 + 1 - 1 - log 4) = 1.3068528
    assert loss_of(0.0, 1.0, value=1.0)["kl"] == pytest.approx(1.3068528)


def test_beta_density_is_that_of_a_rescaled_uniform():
    # alpha = beta = 1 is uniform on action_range (-3, 1): density 1/4 for each of two actions
    beta = module.Beta(2, module.Args(action_range=(-3.0, 1.0)))
    params = (torch.ones(1, 2, 2),)
    assert beta.log_prob(params, torch.tensor([[-2.0, 0.5]])).item() == pytest.approx(2 * math.log(0.25))
    # Var of a uniform of width 4 is 16 / 12
    assert beta.std(params)[0, 0].item() == pytest.approx(math.sqrt(16 / 12))


def test_normaliser_update():
    normalizer = module.EmpiricalNormalization(1)
    normalizer.update(torch.tensor([[1.0], [3.0]]))  # mean 2, biased variance 1
    assert (normalizer._mean.item(), normalizer._var.item(), normalizer.count.item()) == (2.0, 1.0, 2)
    normalizer.update(torch.tensor([[5.0], [7.0]]))  # of 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert (normalizer._mean.item(), normalizer._var.item(), normalizer.count.item()) == (4.0, 5.0, 4)
    assert normalizer(torch.tensor([[4.0 + math.sqrt(5) + 0.01]])).item() == pytest.approx(1.0)


def test_adaptive_learning_rate():
    args = module.Args()
    for kl, before, after in [
        (0.03, 3e-4, 2e-4),
        (0.004, 2e-4, 3e-4),
        (0.01, 2e-4, 2e-4),
        (0.0, 2e-4, 2e-4),
        (0.1, 1e-5, 1e-5),
        (1e-4, 9e-3, 1e-2),
    ]:
        optimizer = module.FlatOptimizer([torch.nn.Parameter(torch.zeros(1))], before)
        module.adapt_learning_rate(optimizer, torch.tensor(kl), args)
        assert optimizer.lr.item() == pytest.approx(after), kl


def test_statistics_count_every_finished_episode():
    """One environment, three steps, rewards 1, 2, 4; an episode that stood at 10 after 5 steps ends at the second."""
    episodes = TensorDict({"reward": torch.tensor([10.0]), "episode_length": torch.tensor([5.0])}, batch_size=[1])
    rewards, dones = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[False], [True], [False]])
    finished = module.finish_episodes(episodes, {"reward": rewards}, dones)
    assert {name: x.item() for name, x in finished.items()} == {"num_episodes": 1, "reward": 13.0, "episode_length": 7.0}
    assert (episodes["reward"].item(), episodes["episode_length"].item()) == (4.0, 1.0)
    finished = module.finish_episodes(episodes, {"reward": rewards}, torch.tensor([[True], [False], [True]]))
    assert {name: x.item() for name, x in finished.items()} == {"num_episodes": 2, "reward": 11.0, "episode_length": 4.0}


def test_time_out_bootstraps_from_the_true_last_observation():
    args = module.Args(critic_hidden_dims=(4,))
    critic = module.Model({"policy": (1,)}, (4,), args)
    obs = TensorDict({"policy": torch.zeros(2, 1)}, batch_size=[2])
    row = TensorDict(obs=obs, values=torch.tensor([5.0, 5.0]), batch_size=[2], device="cpu")
    # Only the first is a time-out; an environment may compute in float64, and give groups that nobody asked for.
    final = TensorDict({"policy": torch.tensor([[1.0], [math.nan]]).double(), "unused": torch.ones(2, 1)}, batch_size=[2])
    extras = {"time_outs": torch.tensor([True, False]), "final_obs": final}
    with torch.no_grad():
        value = module.evaluate(critic, final.float())[0].item()
        assert module.bootstrap_value(critic, row, extras, args).tolist() == [value, 0.0]
        del extras["final_obs"]
        assert module.bootstrap_value(critic, row, extras, args).tolist() == [5.0, 0.0]
        assert module.bootstrap_value(critic, row, {}, args).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind, torchs", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_flat_optimizer_steps_as_torchs_over_single_parameters(kind, torchs):
    """To the bit, also from the middle of a run that torch's began, and a parameter without gradient stays as it is."""
    torch.manual_seed(0)
    shapes = [(3,), (16, 13), (16,), (1, 16), (1,), (7, 9), (64, 48)]
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs[0].requires_grad_(False)
    ours = [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in theirs]
    reference, optimizer = torchs(theirs, lr=3e-3), module.FlatOptimizer(ours, 1.0, kind)
    for step in range(30):
        for p, q in zip(theirs[1:], ours[1:]):
            p.grad = torch.randn_like(p) * 10.0 ** -(step % 5)
            q.grad.copy_(p.grad)
        if step == 10:
            optimizer.load_state_dict(reference.state_dict())
            [q.data.copy_(p) for p, q in zip(theirs, ours)]
        norms = [torch.nn.utils.clip_grad_norm_(parameters, 1.0) for parameters in (theirs, ours)]
        reference.step()
        if step >= 10:
            optimizer.step()
            assert norms[0] == norms[1] and all(torch.equal(p, q) for p, q in zip(theirs, ours)), step
    saved, expected = optimizer.state_dict(), reference.state_dict()
    assert saved["param_groups"] == expected["param_groups"] and saved["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert all(torch.equal(saved["state"][index][name], value) for name, value in entry.items() if value is not None)
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(RuntimeError, match="6 parameters, but 7 here"):
        optimizer.load_state_dict(saved)
