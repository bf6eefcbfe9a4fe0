"""ppo_rnn.py: equal to rsl_rl's split and padded training, with whatever ends where; its memory in play, export and resume."""

import copy
import dataclasses

import cases
import instruments
import pytest
import torch
from tensordict import TensorDict

import ppo_continuous
import ppo_rnn
from envs import make

KINDS = pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
SMALL = dict(env="navigation-cue", num_envs=26, num_steps_per_env=24, num_mini_batches=3, log_root="")  # 2 envs are dropped
SMALL |= dict(actor_obs=("policy",), critic_obs=("policy", "privileged"), actor_hidden_dims=(16,), critic_hidden_dims=(16,))
SMALL |= dict(rnn_hidden_dim=12, rnn_num_layers=2, max_iterations=10, num_learning_epochs=2, timeout_bootstrap="value")
SMALL |= dict(device="cpu")
STATES = ("actor_state", "critic_state")


def small(**settings):
    return ppo_rnn.Args(**(SMALL | settings))


def make_env(args):
    return make(args.env, args.num_envs, seed=args.seed)


def make_agent(args, env):
    torch.manual_seed(args.seed)
    return ppo_rnn.make_agent(env, ppo_rnn.read_obs(env.get_observations(), args), args)


def collected(args):
    """An agent, two rollouts in a row with episode ends inside them, and what `step` returned in the second one."""
    args = dataclasses.replace(args, timeout_bootstrap="final_obs")
    env = make_env(args)
    agent = make_agent(args, env)
    storage = ppo_rnn.make_storage(agent, ppo_rnn.read_obs(env.get_observations(), args), env.num_actions, args)
    env.episode_length_buf = torch.arange(args.num_envs) % 39
    step, steps, rollouts = env.step, [], []
    env.step = lambda actions: steps.append(step(actions)) or steps[-1]
    for _ in range(2):
        ppo_rnn.collect(env, agent, storage, ppo_rnn.act, args)
        rollouts.append(storage.clone())
    assert storage["dones"][:-2].any() and all(storage[name][0].any() for name in STATES)
    return agent, rollouts, steps[args.num_steps_per_env :]


def numbers(metrics):
    """All that is not a time, as text, so that NaN equals NaN."""
    return str({tag: x for tag, x in metrics.items() if not tag.startswith("Perf/")})


# ---- Against rsl_rl -------------------------------------------------------------------------------------------------


@KINDS
def test_trajectory_equals_the_padded_one(rnn_type, double):
    """Ten iterations, two layers, episodes ending inside the rollout: 1e-8 relative in float64, random stream included."""
    pytest.importorskip("rsl_rl")
    import reference

    args = small(rnn_type=rnn_type)
    expected, runner = reference.run(args, make_env(args))
    history, agent = cases.run(ppo_rnn, args, make_env(args))
    assert len(history) == len(expected) == 10
    for ours, theirs in zip(history, expected):
        for tag, value in theirs.items():
            # normalised advantages times ratios: of size 1, while their mean, the surrogate, is close to 0
            assert ours[tag] == pytest.approx(value, rel=1e-8, abs=1e-8 if tag == "Loss/surrogate" else 0.0), tag
    for part in ("actor", "critic"):
        theirs = getattr(runner.alg, part).state_dict()
        assert list(agent[part].state_dict()) == list(theirs) and "rnn.rnn.weight_ih_l1" in theirs
        for key, value in agent[part].state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-10, msg=f"{part} {key}")


@KINDS
def test_one_update_from_the_reference_state(rnn_type):
    """float32: from its weights, optimizer state and rollout the step goes where rsl_rl's goes, to 2e-5 of its length."""
    pytest.importorskip("rsl_rl")
    import reference

    args = small(rnn_type=rnn_type, max_iterations=4)
    seen = {}

    def spy(runner):
        algorithm = runner.alg
        compute_returns, update = algorithm.compute_returns, algorithm.update

        def before(obs):
            seen["obs"], seen["hidden"] = obs.clone(), copy.deepcopy(algorithm.critic.get_hidden_state())
            compute_returns(obs)

        def around():
            seen["before"], seen["storage"] = copy.deepcopy(algorithm.save()), copy.deepcopy(algorithm.storage)
            return update()

        algorithm.compute_returns, algorithm.update = before, around
        return runner

    make_runner = reference.make_runner
    reference.make_runner = lambda *a, **k: spy(make_runner(*a, **k))
    try:
        _, runner = reference.run(args, make_env(args))
    finally:
        reference.make_runner = make_runner

    env, theirs = make_env(args), seen["storage"]
    agent = make_agent(args, env)
    for name, part in ppo_rnn.parts_of(agent).items():
        ppo_rnn.restore(part, seen["before"], name, "rsl_rl's")
    storage = ppo_rnn.make_storage(agent, ppo_rnn.read_obs(env.get_observations(), args), env.num_actions, args)
    storage["obs"][:-1].update_(theirs.observations.select(*storage["obs"].keys()))
    storage["obs"][-1].update_(seen["obs"].select(*storage["obs"].keys()))
    pack = lambda hidden: torch.stack(hidden).permute(2, 0, 1, 3)  # (L, N, H) each -> (N, K, L, H)
    for name, state in (("actor_state", theirs.saved_hidden_state_a), ("critic_state", theirs.saved_hidden_state_c)):
        storage[name][0].copy_(pack([x[0] for x in state]))
    copied = dict(values=theirs.values, rewards=theirs.rewards, dones=theirs.dones, log_prob=theirs.actions_log_prob)
    for name, value in copied.items():  # (T, N, 1); the rewards hold the time-outs' bootstrap already
        storage[name][:-1].copy_(value.squeeze(-1))
    storage["actions"][:-1].copy_(theirs.actions)
    for name, param in zip(("loc", "scale"), theirs.distribution_params):
        storage["policy", name][:-1].copy_(param)
    last = pack(seen["hidden"] if isinstance(seen["hidden"], tuple) else (seen["hidden"],))
    with torch.no_grad():
        storage["values"][-1].copy_(agent.critic(seen["obs"], last)[0].squeeze(-1))
    ppo_rnn.update(agent, storage, args)

    drift = step = 0.0
    for name in ("actor", "critic"):
        for key, parameter in vars(agent)[name].named_parameters():
            after = getattr(runner.alg, name).state_dict()[key]
            drift += (parameter.detach() - after).double().square().sum()
            step += (after - seen["before"][f"{name}_state_dict"][key]).double().square().sum()
    assert step > 0 and (drift / step).sqrt() < 2e-5


@KINDS
def test_plays_a_checkpoint_of_the_reference(rnn_type, tmp_path):
    """Of a file that holds weights only the settings and the environment say the rest; the hidden layers' sizes it says."""
    pytest.importorskip("rsl_rl")
    import reference

    args = small(rnn_type=rnn_type, max_iterations=1)
    _, runner = reference.run(args, make_env(args))
    torch.save(runner.alg.save() | {"iter": 0, "infos": None}, tmp_path / "model_0.pt")
    env = make_env(args)
    given = dataclasses.replace(args, actor_hidden_dims=(512, 256), actor_obs=(), critic_obs=())
    policy = ppo_rnn.load_policy(tmp_path / "model_0.pt", given, env, batch_size=args.num_envs)
    theirs = runner.get_inference_policy()
    runner.alg.actor.reset()
    obs = env.get_observations()
    for _ in range(50):
        actions = policy.act(obs)
        torch.testing.assert_close(actions, theirs(obs).detach(), rtol=0, atol=1e-6)
        obs, _, dones, _ = env.step(torch.randn(args.num_envs, 2))
        policy.reset(dones)
        runner.alg.actor.reset(dones)


# ---- The state ------------------------------------------------------------------------------------------------------


@KINDS
def test_each_row_has_the_state_before_its_action(rnn_type):
    """h and c of each layer as torch's own RNN has them after the row before; zero after an episode's end, and only there."""
    args = small(rnn_type=rnn_type)
    agent, rollouts, _ = collected(args)
    for name, model in (("actor_state", agent.actor), ("critic_state", agent.critic)):
        previous = torch.zeros(args.num_envs, 2 if rnn_type == "lstm" else 1, 2, 12)
        for rollout in rollouts:  # the second one goes on where the first one ended
            assert torch.equal(rollout[name][0], previous)
            for row, next_row in zip(rollout, rollout[1:]):
                x = model.obs_normalizer(torch.cat([row["obs"][group] for group in model.groups], dim=-1))
                hidden = tuple(row[name].permute(1, 2, 0, 3).contiguous())
                with torch.no_grad():
                    _, hidden = model.rnn.rnn(x[None], hidden if rnn_type == "lstm" else hidden[0])
                expected = torch.stack(hidden if rnn_type == "lstm" else (hidden,)).permute(2, 0, 1, 3).clone()
                assert expected.any(-1).all()
                expected[row["dones"]] = 0.0
                torch.testing.assert_close(next_row[name], expected, rtol=0, atol=1e-6)
            previous = rollout[name][-1]


@KINDS
def test_update_sees_what_acted(rnn_type):
    """Unrolled from the stored state over episode ends, the networks say what they said when they acted."""
    args = small(rnn_type=rnn_type)
    agent, (_, storage), _ = collected(args)
    batches = ppo_rnn.make_batches(storage[:-1], args)
    assert [batch.shape for batch in batches] == [(24, 8)] * 3  # 26 // 3 environments each, all of their steps
    for batch in batches:
        with torch.no_grad():
            mean = agent.actor.unroll(batch["obs"], batch["actor_state"][0], batch["dones"])
            values = agent.critic.unroll(batch["obs"], batch["critic_state"][0], batch["dones"])
        torch.testing.assert_close(mean, batch["policy", "loc"], rtol=0, atol=1e-6)
        torch.testing.assert_close(values.squeeze(-1), batch["values"], rtol=0, atol=1e-6)


@KINDS
def test_no_gradient_crosses_an_episode_end(rnn_type):
    """What a step says depends on all the steps of its episode before it, and on no other's."""
    args = small(rnn_type=rnn_type)
    rnn = ppo_rnn.RNN(3, args)
    x, dones = torch.randn(6, 2, 3, requires_grad=True), torch.zeros(6, 2, dtype=torch.bool)
    dones[2, 0] = True
    hidden = ppo_rnn.unpack(torch.randn(2, *ppo_rnn.state_shape(args), requires_grad=True))
    outputs = rnn.unroll(x, hidden, dones)
    gradient, *starts = torch.autograd.grad(outputs[5].sum(), (x, *hidden))
    assert not gradient[:3, 0].any() and gradient[3:, 0].all() and gradient[:, 1].all()
    assert all(not start[:, 0].any() and start[:, 1].all() for start in starts)  # (L, N, H) each


def test_value_of_final_obs_continues_the_episode():
    """V(final_obs) is what the critic says of it as the next observation of the same episode."""
    args = small()
    agent, (_, storage), steps = collected(args)
    for t, (_, _, _, extras) in enumerate(steps):
        final_obs = extras["final_obs"].select(*args.critic_obs)
        obs = torch.cat((storage["obs"][: t + 1], final_obs[None]))
        dones = torch.zeros(t + 2, args.num_envs, dtype=torch.bool)
        dones[:t] = storage["dones"][:t]  # the done at t does not count yet
        with torch.no_grad():
            values = agent.critic.unroll(obs, storage["critic_state"][0], dones)
        expected = torch.where(extras["time_outs"], values[-1].squeeze(-1), 0.0)
        torch.testing.assert_close(storage["bootstrap"][t], expected, rtol=0, atol=1e-6)
    assert storage["bootstrap"].any()


def test_mini_batch_of_one_environment():
    """Its loss is its own: two environments' mean is that of both together (rsl_rl broadcasts to (T, T))."""
    args = small(num_envs=2, num_mini_batches=1)
    agent, (_, storage), _ = collected(args)
    rollout = storage[:-1]
    rollout["advantages"], rollout["returns"] = ppo_rnn.compute_gae(storage, args)
    (both,) = ppo_rnn.make_batches(rollout, args)
    alone = ppo_rnn.make_batches(rollout, dataclasses.replace(args, num_mini_batches=2))
    assert [batch.shape for batch in alone] == [(24, 1)] * 2
    with torch.no_grad():
        agent.actor.mlp[-1].bias += 0.1  # so that ratios differ from 1
        losses = [ppo_rnn.ppo_loss(agent, batch, args)[1] for batch in alone]
        for name, value in ppo_rnn.ppo_loss(agent, both, args)[1].items():
            assert (losses[0][name] + losses[1][name]) / 2 == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert len(ppo_rnn.train(small(num_envs=3, num_mini_batches=3, max_iterations=2))) == 2


def test_a_mini_batch_without_environments_is_refused():
    """Also where the environment that was handed over has fewer of them than the settings say."""
    for args, env in ((small(num_envs=2), None), (small(), make("navigation-cue", 2))):
        with pytest.raises(ppo_rnn.UserError, match="num-mini-batches 3.* of 2"):
            ppo_rnn.train(args, env)


# ---- Resume, play, export -------------------------------------------------------------------------------------------


@pytest.fixture
def without_export(monkeypatch):
    """Exporting takes seconds."""
    for script in (ppo_rnn, ppo_continuous):
        monkeypatch.setattr(script, "export_policy", lambda *_: None)


@KINDS
def test_resumed_run_equals_the_uninterrupted_one(rnn_type, tmp_path, without_export):
    """To the last bit, though it stops in the middle of episodes; another kind or size of memory is refused."""
    args = small(rnn_type=rnn_type, num_steps_per_env=8, max_iterations=5, num_mini_batches=2, timeout_bootstrap="final_obs")
    args = dataclasses.replace(args, log_root=str(tmp_path), logger="none")
    whole = ppo_rnn.train(dataclasses.replace(args, experiment_name="whole"))
    first = ppo_rnn.train(dataclasses.replace(args, max_iterations=2))
    rest = ppo_rnn.train(dataclasses.replace(args, resume=True))
    assert [*map(numbers, rest)] == [*map(numbers, whole[2:])] and len(rest) == 3
    for ours, expected in zip(rest.agent.actor.state_dict().values(), whole.agent.actor.state_dict().values()):
        assert torch.equal(ours, expected)
    checkpoint = str(first.run_dir / "model_1.pt")
    for name, value in (("rnn_type", {"lstm": "gru", "gru": "lstm"}[rnn_type]), ("rnn_hidden_dim", 13), ("rnn_num_layers", 1)):
        with pytest.raises(ppo_rnn.UserError, match=f"--{name.replace('_', '-')} {value}: "):
            ppo_rnn.train(dataclasses.replace(args, checkpoint=checkpoint, **{name: value}))


@KINDS
def test_policy_carries_and_resets_its_state(rnn_type, tmp_path):
    """load_policy and both exports, over 100 steps in which episodes of some and of all end, against the network unrolled."""
    onnxruntime = pytest.importorskip("onnxruntime")
    args = small(rnn_type=rnn_type, max_iterations=1, log_root=str(tmp_path), logger="none")
    history, agent = cases.run(ppo_rnn, args, make_env(args))
    folder = history.run_dir / "exported"
    actor, policy = agent["actor"], ppo_rnn.load_policy(history.run_dir / "model_0.pt", batch_size=4)
    obs, dones = torch.randn(100, 4, 8), torch.zeros(100, 4, dtype=torch.bool)
    dones[10, :2] = dones[24] = dones[31, 3] = dones[70] = True
    zeros = torch.zeros(4, *ppo_rnn.state_shape(args))

    def unrolled(dones):
        with torch.no_grad():
            return actor.unroll(TensorDict(policy=obs, batch_size=[100, 4]), zeros, dones)

    script = torch.jit.load(folder / "policy.pt")  # of one robot
    session = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
    states = ["h_in", "c_in"] if rnn_type == "lstm" else ["h_in"]
    assert [x.name for x in session.get_inputs()] == ["obs", *states]
    assert [x.name for x in session.get_outputs()] == ["actions", *[name.replace("in", "out") for name in states]]
    hidden, expected = [torch.zeros(2, 4, 12).numpy() for _ in states], unrolled(dones)
    for t in range(100):
        actions, *hidden = instruments.run_each(session, {"obs": obs[t].numpy()} | dict(zip(states, hidden)))
        for output in (policy.act(TensorDict(policy=obs[t], batch_size=[4])), torch.as_tensor(actions)):
            torch.testing.assert_close(output, expected[t], rtol=0, atol=1e-5)
        torch.testing.assert_close(script(obs[t, :1]), expected[t, :1], rtol=0, atol=1e-5)
        policy.reset(dones[t])
        script.reset(dones[t, :1])
        for part in hidden:
            part[:, dones[t].numpy()] = 0.0

    policy.reset()  # everywhere
    script.reset()
    with torch.no_grad():
        torch.testing.assert_close(policy(obs[0]), expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(script(obs[0, :1]), expected[0, :1], rtol=0, atol=1e-5)


def test_play(tmp_path, without_export, capsys):
    """A film does not stop the training; --play knows the episodes' ends; a policy without memory is refused."""
    args = small(max_iterations=1, log_root=str(tmp_path), logger="none", play_envs=3)
    history = ppo_rnn.train(dataclasses.replace(args, video_interval=1))
    assert (history.run_dir / "video_0.gif").exists()
    assert all(module.training for module in history.agent.actor.modules())  # what was filmed is still trained
    for agent in ("policy", "zero"):
        assert 0 < ppo_rnn.play(dataclasses.replace(args, play=True, agent=agent))["episode_length"] <= 40
    settings = {name: value for name, value in vars(args).items() if not name.startswith("rnn_")}
    history = ppo_continuous.train(ppo_continuous.Args(**settings))
    with pytest.raises(ppo_rnn.UserError, match="actor differs.*rnn"):
        ppo_rnn.load_policy(history.run_dir / "model_0.pt")


# ---- On the device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rnn_type, whole", [("lstm", True), ("gru", False)], ids=["whole rollout", "policy step"])
def test_nothing_waits_and_a_captured_run_equals_the_eager_one(rnn_type, whole, monkeypatch):
    """The states, too, go from replay to replay through the storage alone."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its LSTM hides what it keeps for the gradient
    args = small(rnn_type=rnn_type, num_envs=8, max_iterations=5, num_steps_per_env=8, timeout_bootstrap="final_obs")
    instruments.check_replay(ppo_rnn, args, lambda: make_env(args), whole)
