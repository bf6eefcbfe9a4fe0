"""The mathematics on numbers that were worked out by hand (the arithmetic stands in the comments)."""

import copy
import math
from types import SimpleNamespace

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
    args = module.Args(
        actor_obs=("policy",), critic_obs=("policy",), actor_hidden_dims=(1,), critic_hidden_dims=(1,), **settings
    )
    obs = TensorDict(policy=torch.zeros(1, 1), batch_size=[1], device="cpu")
    agent = SimpleNamespace(actor=module.make_actor(obs, 1, args), critic=module.Model(obs, args.critic_obs, (1,), args))
    for model, bias in ((agent.actor, 0.0), (agent.critic, value)):
        torch.nn.init.zeros_(model.mlp[-1].weight)
        torch.nn.init.constant_(model.mlp[-1].bias, bias)
    log_prob = -0.5 * math.log(2 * math.pi)  # of the action 0 under N(0, 1)
    batch = TensorDict(
        obs=obs, actions=torch.zeros(1, 1), log_prob=torch.tensor([log_prob - log_prob_shift]),
        advantages=torch.tensor([advantage]), values=torch.tensor([1.0]), returns=torch.tensor([3.0]),
        policy={"loc": torch.ones(1, 1), "scale": 2 * torch.ones(1, 1)}, batch_size=[1], device="cpu",
    )  # fmt: skip
    loss, metrics = module.ppo_loss(agent, batch, args)
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


def test_beta_is_that_of_a_rescaled_uniform():
    """alpha = beta = 1 is uniform on action_range (-3, 1): density 1/4, mean -1, variance 4^2 / 12."""
    beta = module.Beta(2, module.Args(action_range=(-3.0, 1.0)))
    uniform = beta.make(torch.ones(2), torch.ones(2))
    assert uniform.log_prob(torch.tensor([-2.0, 0.5])).tolist() == pytest.approx([math.log(0.25)] * 2)
    assert uniform.mean.tolist() == [-1.0, -1.0]
    assert uniform.stddev.tolist() == pytest.approx([math.sqrt(16 / 12)] * 2)
    # An MLP that says log(e^2 - 1) gives softplus + 1 = 2 + 1 = 3; Beta(3, 3) has the variance 1 / 28, times 4^2
    policy = beta(torch.full((1, 4), math.log(math.expm1(2.0))))
    assert policy.stddev[0].tolist() == pytest.approx([math.sqrt(16 / 28)] * 2)
    torch.manual_seed(0)
    samples = torch.stack([uniform.rsample() for _ in range(1000)])
    assert -3.0 <= samples.min() < -2.9 and 0.9 < samples.max() <= 1.0
    assert policy.log_prob(torch.tensor([[-3.0, 1.0]])).isfinite().all()  # at the ends of its range too


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
        lr = torch.tensor(before)
        module.adapt_learning_rate(lr, torch.tensor(kl), args)
        assert lr.item() == pytest.approx(after), kl


class Script:
    """An environment that says what it was told to; of each observation it counts the steps."""

    num_actions, max_episode_length, device, steps = 1, 100, "cpu", 0

    def __init__(self, rewards, dones, **extras):
        self.rewards, self.dones, self.extras, self.num_envs = rewards, dones, extras, len(rewards[0])

    def get_observations(self):
        return TensorDict(policy=torch.full((self.num_envs, 1), float(self.steps)), batch_size=[self.num_envs])

    def step(self, actions):
        t, self.steps, self.actions = self.steps, self.steps + 1, actions
        extras = {name: values[t] for name, values in self.extras.items()}
        return self.get_observations(), torch.tensor(self.rewards[t]), torch.tensor(self.dones[t]), extras


def rollouts(env, count: int, **settings) -> list:
    """The metrics and the storage of each of `count` rollouts, of an untrained agent."""
    args = module.Args(num_envs=env.num_envs, actor_hidden_dims=(4,), critic_hidden_dims=(4,), device="cpu", **settings)
    args = module.choose_groups(env.get_observations(), args)
    obs, results = module.read_obs(env.get_observations(), args), []
    agent = module.make_agent(env, obs, args)
    storage = module.make_storage(agent, obs, env.num_actions, args)
    for _ in range(count):
        metrics = module.collect(env, agent, storage, module.act, args)
        results.append(({name: x.item() for name, x in metrics.items()}, storage.clone()))
    return results


def test_statistics_count_every_finished_episode():
    """One environment, rewards 1, 2, 4 | 8, 16, 32 | 1, 1, 1; episodes end at the second step, and twice in the next rollout."""
    rewards, dones = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 1.0, 1.0, 1.0), (0, 1, 0, 1, 0, 1, 0, 0, 0)
    env = Script([[x] for x in rewards], [[bool(x)] for x in dones])
    numbers = [list(metrics.values()) for metrics, _ in rollouts(env, 3, num_steps_per_env=3)]
    assert numbers[0] == [3.0, 2.0, 1]  # return, length, episodes
    assert numbers[1] == [(4 + 8 + 16 + 32) / 2, 2.0, 2]
    assert math.isnan(numbers[2][0]) and math.isnan(numbers[2][1]) and numbers[2][2] == 0


def test_what_the_environment_logs_is_averaged_over_the_rollout():
    """Numbers, tensors of any shape, also where only some steps log them; `episode` wins over `log`."""
    log = [{"log": {"a": 1.0, "Task/b": torch.tensor([1.0, 3.0])}}, {"log": {"a": torch.tensor(4.0)}}]
    env = Script([[0.0], [0.0]], [[False], [False]], log=[x["log"] for x in log])
    ((metrics, _),) = rollouts(env, 1, num_steps_per_env=2)
    assert metrics["Episode/a"] == 2.5 and metrics["Task/b"] == 2.0
    env = Script([[0.0]] * 2, [[False]] * 2, log=[{"a": 1.0}] * 2, episode=[{"a": 7.0}, {"a": 9.0}])
    ((metrics, _),) = rollouts(env, 1, num_steps_per_env=2)
    assert metrics["Episode/a"] == 8.0


def test_a_rollout_goes_on_where_the_last_one_ended():
    """Row 0 has the observation that the last rollout ended with; row T the one that follows, and its value."""
    env = Script([[0.0]] * 4, [[False]] * 4)
    (_, first), (_, second) = rollouts(env, 2, num_steps_per_env=2)
    assert [first["obs", "policy"].flatten().tolist(), second["obs", "policy"].flatten().tolist()] == [[0, 1, 2], [2, 3, 4]]
    assert torch.equal(second["values"][0], first["values"][-1]) and second["values"].unique().numel() == 3


def test_actions_are_clamped_for_the_environment_only():
    env = Script([[0.0] * 50], [[False] * 50])
    ((_, storage),) = rollouts(env, 1, num_steps_per_env=1, clip_actions=0.3)
    sampled = storage["actions"][0]
    assert sampled.abs().max() > 0.3 and torch.equal(env.actions, sampled.clamp(-0.3, 0.3))


def test_time_out_bootstraps_from_the_true_last_observation():
    """Of three environments the first times out, the second ends, the third goes on."""
    # An environment may compute in float64, and give groups that nobody asked for.
    last = TensorDict({"policy": torch.tensor([[9.0], [math.nan], [math.nan]]).double(), "unused": torch.ones(3, 1)}, [3])
    time_outs = torch.tensor([True, False, False])

    def bootstrap(timeout_bootstrap, **extras):
        torch.manual_seed(0)
        env = Script([[0.0] * 3], [[True, True, False]], **{name: [x] for name, x in extras.items()})
        args = module.Args(num_envs=3, critic_hidden_dims=(4,), device="cpu", timeout_bootstrap=timeout_bootstrap)
        args = module.choose_groups(env.get_observations(), args)
        obs = module.read_obs(env.get_observations(), args)
        agent = module.make_agent(env, obs, args)
        rows = module.make_storage(agent, obs, 1, args)
        rows["values"][0] = 5.0
        expected = agent.critic(obs.apply(lambda x: torch.full_like(x, 9.0)))[0].item()
        *_, extras = module.take_step(env, torch.zeros(3, 1))
        return module.timeout_value(agent, rows[0], rows[1], extras, args).tolist(), expected

    value, expected = bootstrap("final_obs", time_outs=time_outs, final_obs=last)
    assert value == [expected, 0.0, 0.0] and expected != 0.0
    assert bootstrap("final_obs", time_outs=time_outs)[0] == [5.0, 0.0, 0.0]  # none given: as rsl_rl
    assert bootstrap("value", time_outs=time_outs.float(), final_obs=last)[0] == [5.0, 0.0, 0.0]
    assert bootstrap("none", time_outs=time_outs, final_obs=last)[0] == [0.0, 0.0, 0.0]
    assert bootstrap("final_obs", final_obs=last)[0] == [0.0, 0.0, 0.0]  # an end that is not said to be a time-out is one
    assert bootstrap("final_obs", final_obs=last)[0] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_every_sample_is_read_once_in_each_epoch(dropped):
    """Mini-batches of equal size, in an order drawn anew each time; what does not fill one is dropped."""
    args = module.Args(num_envs=3, num_steps_per_env=4 + dropped, num_mini_batches=4)
    rows = TensorDict(order=torch.zeros(5 + dropped, 3, dtype=torch.long), batch_size=[5 + dropped, 3])
    rows["sample"] = torch.arange(rows.numel()).view(rows.shape)
    orders = []
    for _ in range(2):
        module.shuffle(rows, args)
        batches = module.make_batches(rows[:-1], args)
        assert [len(batch) for batch in batches] == [3 * (4 + dropped) // 4] * 4
        orders.append(torch.cat([batch["sample"] for batch in batches]).tolist())
    size = 4 * (3 * (4 + dropped) // 4)
    assert orders[0] != orders[1] and [sorted(order) for order in orders] == [list(range(size))] * 2


@pytest.mark.parametrize("name, torchs", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_goes_on_from_rsl_rls(name, torchs):
    """A learning rate that is a tensor steps as rsl_rl's float, to the bit, also from the state that rsl_rl saved. What
    does not learn stays as it is."""
    torch.manual_seed(0)
    shapes = [(3,), (16, 13), (16,), (1, 16), (1,), (7, 9), (64, 48)]
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs[0].requires_grad_(False)
    ours = [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in theirs]
    reference, optimizer = torchs(theirs, lr=3e-3), module.make_optimizer(name, ours, 1.0, "cpu")
    for step in range(30):
        for p, q in zip(theirs[1:], ours[1:]):
            p.grad = torch.randn_like(p) * 10.0 ** -(step % 5)
            q.grad = p.grad.clone()
        if step == 10:
            saved = copy.deepcopy(reference.state_dict())
            module.restore(optimizer, {"optimizer_state_dict": saved}, "optimizer", "x.pt")
            [q.data.copy_(p) for p, q in zip(theirs, ours)]
            assert torch.is_tensor(optimizer.param_groups[0]["lr"])  # which `adapt_learning_rate` writes to
        reference.step()
        if step >= 10:
            optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(theirs, ours)), step
    saved = copy.deepcopy(reference.state_dict())
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(module.UserError, match="x.pt: optimizer differs"):
        module.restore(optimizer, {"optimizer_state_dict": saved}, "optimizer", "x.pt")
