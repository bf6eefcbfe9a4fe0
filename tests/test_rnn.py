"""ppo_rnn.py: equal to rsl_rl's split and padded training, with whatever ends where; its memory in play, export and resume."""

import copy
import dataclasses

import cases
import instruments
import pytest
import torch

import ppo_continuous
import ppo_rnn
from envs import make

KINDS = pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
SMALL = dict(env="navigation-cue", num_envs=26, num_steps_per_env=24, num_mini_batches=3, log_root="")  # 2 envs are dropped
SMALL |= dict(actor_obs=("policy",), critic_obs=("policy", "privileged"), actor_hidden_dims=(16,), critic_hidden_dims=(16,))
SMALL |= dict(rnn_hidden_dim=12, rnn_num_layers=2, max_iterations=10, num_learning_epochs=2, timeout_bootstrap="reference")


def small(**settings):
    return ppo_rnn.Args(**(SMALL | settings))


def make_env(args):
    return make(args.env, args.num_envs, seed=args.seed)


def models(args, env):
    torch.manual_seed(args.seed)
    return ppo_rnn.make_models(env.get_observations(), env.num_actions, args)


def collected(args, steps=None):
    """Models, and a rollout with episode ends inside it that starts in the middle of episodes; notes what step() returned."""
    args = dataclasses.replace(args, timeout_bootstrap="final_obs")
    env = make_env(args)
    actor, critic = models(args, env)
    storage = ppo_rnn.make_storage(env.get_observations(), env.num_actions, actor, args)
    episodes = ppo_rnn.make_episodes(args, torch.device("cpu"))
    env.episode_length_buf = torch.arange(args.num_envs) % 39
    step, steps = env.step, [] if steps is None else steps
    env.step = lambda actions: steps.append(step(actions)) or steps[-1]
    act_rows = [lambda row=row: ppo_rnn.act(actor, critic, row) for row in storage.unbind(0)[:-1]]
    for _ in range(2):
        ppo_rnn.collect(env, critic, storage, episodes, act_rows, args)
    assert storage["dones"][:-2].any() and all(x.any() for x in storage["first_state"].values())
    return actor, critic, storage


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
            seen["lr"] = algorithm.learning_rate
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
    actor, critic = models(args, env)
    optimizer = ppo_rnn.FlatOptimizer([*actor.parameters(), *critic.parameters()], args.learning_rate, args.optimizer)
    ppo_rnn.restore({"actor": actor, "critic": critic, "optimizer": optimizer}, seen["before"], "rsl_rl's")
    storage = ppo_rnn.make_storage(seen["obs"], env.num_actions, actor, args)
    storage["obs"][:-1].update_(theirs.observations)
    storage["obs"][-1].update_(seen["obs"])
    join = lambda hidden: actor.rnn.join(torch.stack(hidden))  # noqa: E731
    for name, state in (("actor", theirs.saved_hidden_state_a), ("critic", theirs.saved_hidden_state_c)):
        storage["first_state"][0][name].copy_(join([x[0] for x in state]))
    copied = dict(values=theirs.values, rewards=theirs.rewards, dones=theirs.dones)
    for name, value in copied.items():  # (T, N, 1); the rewards hold the time-outs' bootstrap already
        storage[name][:-1].copy_(value.squeeze(-1))
    storage["actions"][:-1].copy_(theirs.actions)
    for stored, param in zip(storage["params"].values(), theirs.distribution_params):
        stored[:-1].copy_(param)
    last = join(seen["hidden"] if isinstance(seen["hidden"], tuple) else (seen["hidden"],))
    with torch.no_grad():
        storage["values"][-1].copy_(ppo_rnn.evaluate(critic, seen["obs"], {"critic": last})[0])
    ppo_rnn.update(actor, critic, optimizer, storage, ppo_rnn.mini_batch_step, args)

    drift = step = 0.0
    for name, model in (("actor", actor), ("critic", critic)):
        for key, parameter in model.named_parameters():
            after = getattr(runner.alg, name).state_dict()[key]
            drift += (parameter.detach() - after).double().square().sum()
            step += (after - seen["before"][f"{name}_state_dict"][key]).double().square().sum()
    assert step > 0 and (drift / step).sqrt() < 2e-5


def test_plays_a_checkpoint_of_the_reference(tmp_path):
    pytest.importorskip("rsl_rl")
    import reference

    args = small(rnn_type="gru", max_iterations=1)
    _, runner = reference.run(args, make_env(args))
    torch.save(runner.alg.save() | {"iter": 0, "infos": None}, tmp_path / "model_0.pt")
    policy = ppo_rnn.load_policy(tmp_path / "model_0.pt", args=ppo_rnn.Args(actor_obs=("policy",)))
    theirs = runner.get_inference_policy()
    runner.alg.actor.reset()
    env = make_env(args)
    obs = env.get_observations()
    for _ in range(50):
        actions = policy(obs)
        torch.testing.assert_close(actions, theirs(obs).detach(), rtol=0, atol=1e-6)
        obs, _, dones, _ = env.step(torch.randn(args.num_envs, 2))
        policy.reset(dones)
        runner.alg.actor.reset(dones)


# ---- The state ------------------------------------------------------------------------------------------------------


@KINDS
def test_update_sees_what_acted(rnn_type):
    """Unrolled from the stored state over episode ends, the networks say what they said when they acted."""
    args = small(rnn_type=rnn_type)
    actor, critic, storage = collected(args)
    for batch in ppo_rnn.make_batches(actor, critic, storage, args):
        state, dones = batch["first_state"][0], batch["dones"]
        mean, _ = actor(batch["actor_input"], state["actor"], dones)
        values, _ = critic(batch["critic_input"], state["critic"], dones)
        torch.testing.assert_close(mean, batch["params"]["0"], rtol=0, atol=1e-6)
        torch.testing.assert_close(values.squeeze(-1), batch["values"], rtol=0, atol=1e-6)


@KINDS
def test_no_gradient_crosses_an_episode_end(rnn_type):
    rnn = ppo_rnn.RNN(3, small(rnn_type=rnn_type))
    x, dones = torch.randn(6, 2, 3, requires_grad=True), torch.zeros(6, 2)
    dones[2, 0] = 1
    outputs = rnn.unroll(x, torch.randn(2, rnn.state_size), dones)
    (gradient,) = torch.autograd.grad(outputs[5].sum(), x)
    assert not gradient[:3, 0].any() and gradient[3:, 0].all() and gradient[:, 1].all()


def test_value_of_final_obs_continues_the_episode():
    """V(final_obs) is what the critic says of it as the next observation of the same episode."""
    args, steps = small(), []
    _, critic, storage = collected(args, steps)
    for t, (_, _, _, extras) in enumerate(steps[-args.num_steps_per_env :]):
        obs = torch.cat((storage["obs"][: t + 1], extras["final_obs"][None]))
        dones = torch.cat((storage["dones"][:t], torch.zeros(2, args.num_envs)))  # the done at t does not count yet
        with torch.no_grad():
            values, _ = critic(critic.preprocess(obs), storage["first_state"][0]["critic"], dones)
        expected = torch.where(extras["time_outs"], values[-1].squeeze(-1), 0.0)
        torch.testing.assert_close(storage["bootstrap"][t], expected, rtol=0, atol=1e-6)
    assert storage["bootstrap"].any()


def test_mini_batch_of_one_environment():
    """Its loss is its own: two environments' mean is that of both together (rsl_rl broadcasts to (T, T))."""
    args = small(num_envs=2, num_mini_batches=1)
    args_alone = dataclasses.replace(args, num_mini_batches=2)
    actor, critic, storage = collected(args)
    (both,) = ppo_rnn.make_batches(actor, critic, storage, args)
    alone = ppo_rnn.make_batches(actor, critic, storage, args_alone)
    assert [batch.shape for batch in alone] == [(24, 1)] * 2
    with torch.no_grad():
        actor.mlp[-1].bias += 0.1  # so that ratios differ from 1
        losses = [ppo_rnn.ppo_loss(actor, critic, batch, args)[1] for batch in alone]
        for name, value in ppo_rnn.ppo_loss(actor, critic, both, args)[1].items():
            assert (losses[0][name] + losses[1][name]) / 2 == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert len(ppo_rnn.train(small(num_envs=3, num_mini_batches=3, max_iterations=2))) == 2
    with pytest.raises(ppo_rnn.UserError, match="num-mini-batches 3"):
        ppo_rnn.train(small(num_envs=2, num_mini_batches=3))


# ---- Resume, play, export -------------------------------------------------------------------------------------------


@pytest.fixture
def without_export(monkeypatch):
    """Exporting takes seconds."""
    for script in (ppo_rnn, ppo_continuous):
        monkeypatch.setattr(script, "export_policy", lambda *_: None)


@KINDS
def test_resumed_run_equals_the_uninterrupted_one(rnn_type, tmp_path, without_export):
    args = small(rnn_type=rnn_type, num_steps_per_env=8, max_iterations=5, num_mini_batches=2, timeout_bootstrap="final_obs")
    args = dataclasses.replace(args, log_root=str(tmp_path), logger="none")
    whole = ppo_rnn.train(dataclasses.replace(args, experiment_name="whole"))
    ppo_rnn.train(dataclasses.replace(args, max_iterations=2))
    rest = ppo_rnn.train(dataclasses.replace(args, resume=True))
    assert len(rest) == 3
    for ours, expected in zip(rest, whole[2:]):
        assert all(ours[tag] == expected[tag] for tag in expected if tag.startswith(("Loss/", "Policy/", "Metrics/")))


@KINDS
def test_policy_carries_and_resets_its_state(rnn_type, tmp_path):
    """load_policy and both exports, over 50 steps with a reset in the middle, against the network unrolled in one go."""
    onnxruntime = pytest.importorskip("onnxruntime")
    args = small(rnn_type=rnn_type, max_iterations=1, log_root=str(tmp_path), logger="none")
    _, agent = cases.run(ppo_rnn, args, make_env(args))
    (path,) = tmp_path.glob("*/*/model_0.pt")
    actor, policy = agent["actor"], ppo_rnn.load_policy(path)
    obs, dones = torch.randn(50, 4, 8), torch.zeros(50, 4)
    dones[24] = 1

    def unrolled(dones):
        with torch.no_grad():
            return actor.mlp(actor.rnn.unroll(actor.obs_normalizer(obs), torch.zeros(4, actor.rnn.state_size), dones))

    script = torch.jit.load(path.parent / "exported" / "policy.pt")
    session = onnxruntime.InferenceSession(path.parent / "exported" / "policy.onnx", providers=["CPUExecutionProvider"])
    states = ["h_in", "c_in"] if rnn_type == "lstm" else ["h_in"]
    assert [x.name for x in session.get_inputs()] == ["obs", *states]
    assert [x.name for x in session.get_outputs()] == ["actions", *[name.replace("in", "out") for name in states]]
    hidden = zeros = [torch.zeros(2, 4, 12).numpy()] * len(states)
    for t in range(50):
        expected = unrolled(dones)[t]
        actions, *hidden = session.run(None, {"obs": obs[t].numpy()} | dict(zip(states, hidden)))
        for output in (policy(obs[t]), script(obs[t]), torch.as_tensor(actions)):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        if dones[t].all():
            policy.reset(dones[t])
            script.reset()
            hidden = zeros

    dones[10, :2] = 1  # only some robots start anew
    policy.reset()
    for t in range(50):
        torch.testing.assert_close(policy(obs[t]), unrolled(dones)[t], rtol=0, atol=1e-5)
        policy.reset(dones[t])


def test_play(tmp_path, without_export):
    args = small(max_iterations=1, log_root=str(tmp_path), logger="none", play_envs=3, video_interval=1)
    _, agent = cases.run(ppo_rnn, args, None)
    assert all(module.training for module in agent["actor"].modules())  # what was filmed is still trained
    args.video_interval = 0
    for agent in ("policy", "zero"):
        assert ppo_rnn.play(dataclasses.replace(args, play=True, agent=agent))["episode_length"] <= 40
    with pytest.raises(ppo_rnn.UserError, match="no RNN"):
        fields = {f.name for f in dataclasses.fields(ppo_continuous.Args)}
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k in fields}
        ppo_continuous.train(ppo_continuous.Args(**settings | dict(experiment_name="mlp")))
        ppo_rnn.load_policy(next(tmp_path.glob("mlp/*/model_0.pt")))


# ---- On the device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rnn_type, capturable", [("lstm", True), ("gru", False)], ids=["whole rollout", "policy step"])
def test_captured_run_equals_eager_run(rnn_type, capturable, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its LSTM hides what it keeps for the gradient
    args = small(rnn_type=rnn_type, num_envs=8, max_iterations=5, num_steps_per_env=8, timeout_bootstrap="final_obs")
    eager = ppo_rnn.train(args)

    def graph(fn, *arguments, **_):
        on = fn.__name__ == "update" or (fn.__name__ == "collect") == capturable
        return instruments.EmulatedGraph(fn, *arguments) if on else lambda: fn(*arguments)

    monkeypatch.setattr(ppo_rnn, "CudaGraph", graph)
    for ours, expected in zip(ppo_rnn.train(args), eager, strict=True):
        assert all(ours[tag] == expected[tag] for tag in expected if tag.startswith(("Loss/", "Policy/", "Metrics/")))


def test_no_waiting_inside_the_iteration(monkeypatch):
    waits = []

    def watched(function):
        def call(*args):
            with instruments.host_reads() as counts, instruments.Operations() as operations:
                result = function(*args)
            waits.append((dict(counts), dict(operations.waits)))
            return result

        return call

    for name in ("collect", "update"):
        monkeypatch.setattr(ppo_rnn, name, watched(getattr(ppo_rnn, name)))
    ppo_rnn.train(small(max_iterations=2, timeout_bootstrap="final_obs"))
    assert waits == [({}, {})] * 4
