"""ppo_cnn.py against rsl_rl's CNNModel, and what it promises beyond: frugal storage, shared encoders, exports."""

import dataclasses

import cases
import instruments
import pytest
import torch
from cameras import make
from tensordict import TensorDict

import ppo_cnn

SMALL = cases.SMALL | dict(env="cameras:make", num_envs=16, num_steps_per_env=8, num_learning_epochs=2, num_mini_batches=3)
SMALL |= dict(actor_hidden_dims=(16,), critic_hidden_dims=(16, 8), cnn_output_channels=(3, 5), actor_obs=("policy", "image"))
SMALL |= dict(device="cpu")
BOTH = dict(actor_obs=("policy", "image", "depth"), critic_obs=("depth", "policy", "image"))
PARITY = {
    "critic without images": dict(critic_obs=("policy", "privileged")),
    "two images": BOTH,
    "no 1-D group": dict(actor_obs=("image", "depth"), critic_obs=("image",), obs_normalization=False),
    "shared": BOTH | dict(share_cnn_encoders=True, max_grad_norm=0.1),
    "shared, no 1-D group": dict(actor_obs=("image",), critic_obs=("image",), obs_normalization=False, share_cnn_encoders=True),
    "settings by group": BOTH
    | dict(cnn_output_channels=dict(image=(4, 3, 2), depth=(5,)), cnn_stride=dict(image=(2, 1, 1), depth=1), activation="relu"),
    "layer norm, zeros": BOTH | dict(cnn_norm=("layer", "none"), cnn_padding="zeros", cnn_stride=2, cnn_kernel_size=(4, 3)),
    "batch norm, max pool": BOTH | dict(cnn_norm=("none", "batch"), cnn_max_pool=(True, False), cnn_padding="replicate"),
    "average, dilation": BOTH | dict(cnn_global_pool="avg", cnn_dilation=(2, 1), cnn_padding="reflect"),
    "maximum, shared batch norm": BOTH
    | dict(cnn_global_pool="max", cnn_padding="circular", cnn_norm="batch", share_cnn_encoders=True, distribution="beta"),
}


def arguments(**settings):
    return ppo_cnn.Args(**(SMALL | settings))


def make_env(args):
    return make(args.num_envs, seed=args.seed)


def train(args):
    return cases.run(ppo_cnn, args, make_env(args))


def make_agent(**settings):
    """Settings, environment and an untrained agent for it."""
    args = arguments(**settings)
    ppo_cnn.check_args(args)
    env = make_env(args)
    args = ppo_cnn.choose_groups(env.get_observations(), args)
    return args, env, ppo_cnn.make_agent(env, ppo_cnn.read_obs(env.get_observations(), args), args)


def collected(args, env, agent):
    """The storage after a rollout, and the observations that the environment gave."""
    step, seen = env.step, [env.get_observations()]
    storage = ppo_cnn.make_storage(agent, ppo_cnn.read_obs(env.get_observations(), args), env.num_actions, args)
    env.step = lambda actions: (lambda obs, *rest: (seen.append(obs.clone()) or obs, *rest))(*step(actions))
    ppo_cnn.collect(env, agent, storage, ppo_cnn.act, args)
    return storage, torch.stack(seen)


def numbers(metrics):
    """All that is not a time, as text, so that NaN equals NaN."""
    return str({tag: x for tag, x in metrics.items() if not tag.startswith("Perf/")})


@pytest.mark.parametrize("name", PARITY)
def test_trajectory_is_bit_equal(name):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    import reference

    args = arguments(**PARITY[name])
    expected, runner = reference.run(args, make_env(args))
    history, agent = train(args)
    assert len(history) == len(expected) == 10
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        for tag, value in theirs.items():
            assert ours[tag] == value, f"iteration {iteration}: {tag}"
    for part in ("actor", "critic"):
        theirs = getattr(runner.alg, part).state_dict()
        assert list(agent[part].state_dict()) == list(theirs)
        for key, value in agent[part].state_dict().items():
            assert torch.equal(value, theirs[key]), f"{part} {key}"


# ---- Images ---------------------------------------------------------------------------------------------------------


def test_images_are_stored_as_they_come_and_once():
    """Each row has the environment's own bytes, also after the last step; actor and critic read the same copy of them."""
    args, env, agent = make_agent(**BOTH)
    storage, seen = collected(args, env, agent)
    assert [*storage["obs"].keys()] == [*args.actor_obs]  # `privileged`, which nobody reads, is left out
    for group in args.actor_obs:
        assert storage["obs", group].dtype == seen[group].dtype and torch.equal(storage["obs", group], seen[group])
    ppo_cnn.shuffle(storage, args)
    batches = ppo_cnn.make_batches(storage[:-1], args)
    images = [batch["obs", "image"] for batch in batches]
    assert [(x.dtype, len(x)) for x in images] == [(torch.uint8, 42)] * 3
    assert len({x.untyped_storage().data_ptr() for x in images}) == 1
    for model in (agent.actor, agent.critic):
        assert all(model.inputs(batch["obs"])["image"] is x for batch, x in zip(batches, images))


@pytest.mark.parametrize("dtype, gigabytes", [(torch.uint8, 0.42), (torch.float16, 0.84), (torch.float32, 1.68)])
def test_memory_of_image_storage(dtype, gigabytes):
    """4096 environments, 24 steps and the observation after the last, 64 x 64 pixels. The README states these figures."""
    _, _, agent = make_agent()
    agent.actor.to("meta")
    obs = TensorDict(image=torch.zeros(4096, 1, 64, 64, dtype=dtype, device="meta"), batch_size=[4096], device="meta")
    storage = ppo_cnn.make_storage(agent, obs, 2, arguments(num_envs=4096, num_steps_per_env=24))
    stored = storage["obs", "image"]
    assert stored.shape == (25, 4096, 1, 64, 64)
    assert stored.nbytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_integers_are_read_as_a_part_of_255_and_halves_as_they_are():
    _, env, agent = make_agent()
    cnn, image = agent.actor.cnns["image"], env.get_observations()["image"]
    assert image.max() == 255
    floats = image / 255.0
    assert torch.equal(cnn(image), cnn(floats))
    assert torch.equal(cnn(floats.half()), cnn(floats.half().float())) and cnn(floats.half()).dtype == torch.float32


def test_images_alone_are_enough():
    """Without vectors there is nothing to normalise."""
    history, agent = train(arguments(actor_obs=("image",), critic_obs=("image", "depth"), max_iterations=2))
    assert len(history) == 2 and agent["actor"].mlp[0].in_features == agent["actor"].cnns["image"].size


# ---- Encoders -------------------------------------------------------------------------------------------------------


def test_a_shared_encoder_is_stepped_and_clipped_once():
    """It is among the actor's parameters, whose gradients are clipped together; what is the critic's own is clipped apart."""
    settings = dict(share_cnn_encoders=True, max_grad_norm=1e-3, schedule="fixed", optimizer="sgd", learning_rate=0.1)
    args, env, agent = make_agent(**BOTH, **settings)
    assert agent.actor.cnns is agent.critic.cnns
    own = [*agent.critic.mlp.parameters()]
    everything = [*agent.actor.parameters(), *own]
    assert sorted(map(id, agent.optimizer.param_groups[0]["params"])) == sorted(map(id, everything))
    storage, _ = collected(args, env, agent)
    storage["rewards"].normal_(std=10.0)
    rollout = storage[:-1]
    rollout["advantages"], rollout["returns"] = ppo_cnn.compute_gae(storage, args)
    ppo_cnn.shuffle(storage, args)
    before = [p.detach().clone() for p in everything]
    metrics = ppo_cnn.mini_batch_step(agent, ppo_cnn.make_batches(rollout, args)[0], args)
    norm = lambda parameters: torch.stack([p.grad.norm() for p in parameters]).norm().item()
    assert norm(agent.actor.parameters()) == pytest.approx(1e-3, rel=1e-2)  # a second clipping would have made it smaller
    assert norm(own) == pytest.approx(1e-3, rel=1e-2)
    assert metrics["actor_grad_norm"] > 0.1 and metrics["critic_grad_norm"] > 0.1  # those before
    for p, old in zip(everything, before):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad, rtol=0, atol=1e-7)


SETTINGS_BY_GROUP = {  # of image, of depth
    "output_channels": ((4, 3), (5,)),
    "kernel_size": ((4, 3), 2),
    "stride": ((2, 1), 1),
    "dilation": (2, 1),
    "padding": ("zeros", "none"),
    "norm": (("batch", "none"), "layer"),
    "max_pool": (True, (False, True)),
    "global_pool": ("none", "avg"),
}


@pytest.mark.parametrize("name", SETTINGS_BY_GROUP)
def test_each_setting_may_be_a_dict_by_image_group(name):
    """Then each group has the encoder that it would have if its own setting were all that there is."""
    name, (of_image, of_depth) = f"cnn_{name}", SETTINGS_BY_GROUP[name]
    alone = lambda group, value: str(make_agent(actor_obs=(group,), **{name: value})[2].actor.cnns[group])
    _, _, agent = make_agent(**BOTH, **{name: dict(image=of_image, depth=of_depth)})
    assert [str(cnn) for cnn in agent.actor.cnns.values()] == [alone("image", of_image), alone("depth", of_depth)]
    assert alone("image", of_image) != alone("image", of_depth)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(cnn_stride=0, cnn_padding="zeros"), "cnn_stride': 0.* make no encoder of image"),
        (dict(cnn_kernel_size=25), "cnn_kernel_size': 25.* make no encoder of image"),
        (dict(cnn_kernel_size=(3, 3, 3)), r"cnn_kernel_size': \(3, 3, 3\).* make no encoder of image"),
        (dict(cnn_stride=dict(depth=1)), "cnn_stride.* make no encoder of image"),
        (dict(cnn_norm="group"), "cnn_norm': 'group'.* make no encoder of image"),
        (dict(cnn_padding="same"), "cnn.padding.* same|cnn_padding': 'same'.* make no encoder of image"),
        (dict(cnn_global_pool="sum"), "cnn.global.pool sum|cnn_global_pool': 'sum'.* make no encoder of image"),
        (dict(share_cnn_encoders=True), "--share-cnn-encoders: .*the same images"),
        (dict(actor_obs=("image", "depth"), critic_obs=("image",), share_cnn_encoders=True), "--share-cnn-encoders: "),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(settings, named):
    with pytest.raises(ppo_cnn.UserError, match=named):
        make_agent(**settings)


def test_groups_left_out_are_the_bases_and_every_image(capsys):
    """An environment's own `critic` group takes the place of actor's and privileged ones; the images come along."""
    args, env, agent = make_agent(actor_obs=(), critic_obs=())
    assert agent.actor.groups == ("policy", "image", "depth")
    assert agent.critic.groups == ("policy", "image", "depth", "privileged")
    assert "actor_obs: policy (2,), image (2, 24, 24), depth (1, 9, 7)\n" in capsys.readouterr().out
    obs = env.get_observations()
    obs["critic"] = obs["privileged"]
    args = ppo_cnn.choose_groups(obs, arguments(actor_obs=(), critic_obs=()))
    assert (args.actor_obs, args.critic_obs) == (("policy", "image", "depth"), ("critic", "image", "depth"))


# ---- Film, resume, export -------------------------------------------------------------------------------------------


@pytest.fixture
def without_export(monkeypatch):
    """Exporting takes seconds."""
    monkeypatch.setattr(ppo_cnn, "export_policy", lambda *_: None)


@pytest.mark.parametrize("groups", [("policy", "image", "depth"), ("depth", "image"), ("policy",)], ids="+".join)
def test_exports_have_one_input_for_each_image(groups, tmp_path):
    """By the groups' names and in their types; batch norms say what they have learned."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(1)  # some drawn weights hardly answer to the vector
    _, env, agent = make_agent(actor_obs=groups, cnn_norm="batch", distribution="beta", obs_normalization="policy" in groups)
    obs = env.get_observations()
    for _ in range(3):
        agent.actor(obs)  # gives the batch norms something to remember
    ppo_cnn.export_policy(agent.actor, tmp_path)
    policy = ppo_cnn.Policy(agent.actor.eval())
    images = [group for group in groups if group != "policy"]
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    types = {x.name: x.type for x in session.get_inputs()}
    of_image = {"image": "tensor(uint8)", "depth": "tensor(float)"}
    assert {name: types[name] for name in types if name != "obs"} == {group: of_image[group] for group in images}
    assert [x.name for x in session.get_outputs()] == ["actions"]
    vector = obs["policy"] if "policy" in groups else torch.zeros(16, 0)
    inputs = {"obs": vector} | {group: obs[group] for group in images}
    onnx = instruments.run_each(session, {name: x.numpy() for name, x in inputs.items() if name in types})[0]
    script = torch.jit.load(tmp_path / "policy.pt")(*inputs.values())
    assert policy.act(obs).std() > 1e-3
    assert torch.allclose(torch.as_tensor(onnx), policy.act(obs), atol=1e-5) and torch.equal(script, policy.act(obs))


def test_a_film_does_not_stop_batch_norms_from_learning(tmp_path, without_export):
    settings = dict(cnn_norm="batch", max_iterations=3, logger="none")
    _, plain = train(arguments(**settings))
    history, filmed = train(arguments(**settings, log_root=str(tmp_path), video_interval=1))
    assert all((history.run_dir / f"video_{iteration}.gif").exists() for iteration in range(3))
    for name, x in plain["actor"].state_dict().items():
        assert torch.equal(x, filmed["actor"].state_dict()[name]), name


def test_resumed_run_continues_bit_for_bit(tmp_path, without_export):
    """With shared encoders and batch norms; the last checkpoint's policy acts like the trained one."""
    settings = BOTH | dict(share_cnn_encoders=True, cnn_norm="batch", timeout_bootstrap="final_obs")
    args = arguments(**settings, log_root=str(tmp_path), logger="none", max_iterations=4)
    whole, _ = train(args)
    train(dataclasses.replace(args, max_iterations=2))
    rest, agent = train(dataclasses.replace(args, resume=True))
    assert [*map(numbers, rest)] == [*map(numbers, whole[2:])] and len(rest) == 2
    policy, obs = ppo_cnn.load_policy(rest.run_dir / "model_3.pt"), make(16).get_observations()
    assert {name: x.dtype for name, x in policy.actor.inputs(policy.actor.example).items() if name != "obs"} == {
        "image": torch.uint8,
        "depth": torch.float32,
    }
    assert torch.equal(policy.act(obs), ppo_cnn.Policy(agent["actor"].eval()).act(obs))
    with pytest.raises(ppo_cnn.UserError, match="--cnn-norm none: "):
        path = str(rest.run_dir / "model_3.pt")
        train(dataclasses.replace(args, resume=True, checkpoint=path, cnn_norm="none", max_iterations=5))


# ---- On the device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["whole rollout", "policy step"])
def test_nothing_waits_and_a_captured_run_equals_the_eager_one(whole):
    args = arguments(**BOTH, share_cnn_encoders=True, cnn_norm="batch", cnn_max_pool=True, cnn_padding="zeros")
    args = dataclasses.replace(args, max_iterations=5, timeout_bootstrap="final_obs")
    instruments.check_replay(ppo_cnn, args, lambda: make_env(args), whole)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_spatial_softmax_finds_the_pixel(temperature):
    """A single bright pixel is where the row and the column say, the better the lower the temperature; exported alike."""
    pool = ppo_cnn.SpatialSoftmax(5, 9, temperature)
    image = torch.zeros(3, 2, 5, 9)
    image[:, 0, 1, 6] = image[:, 1, 4, 0] = 2.0
    places = pool(image)
    assert places.shape == (3, 4)
    error = (places[0] - torch.tensor([-0.5, 0.5, 1.0, -1.0])).abs().max()
    assert error < 1e-6 if temperature == 0.05 else 0.1 < error < 1.0


def test_a_network_with_spatial_softmax_learns_and_is_loaded(tmp_path, without_export):
    args = arguments(cnn_global_pool="spatial_softmax", cnn_temperature=0.5, max_iterations=2, log_root=str(tmp_path))
    history, agent = train(args)
    obs = make(16).get_observations()
    policy = ppo_cnn.load_policy(history.run_dir / "model_1.pt")
    assert torch.equal(policy.act(obs), ppo_cnn.Policy(agent["actor"].eval()).act(obs))
    assert agent["actor"].cnns["image"].size == 2 * 5  # two numbers for each of five channels
    with pytest.raises(ppo_cnn.UserError, match="--cnn-temperature -1.0: must be greater than 0"):
        train(arguments(cnn_temperature=-1.0))
