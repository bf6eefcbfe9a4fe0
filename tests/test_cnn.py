"""ppo_cnn.py against rsl_rl's CNNModel, and what it promises beyond: frugal storage, shared encoders, exports."""

import cases
import pytest
import torch
from cameras import make

import ppo_cnn

SMALL = cases.SMALL | dict(env="cameras:make", num_envs=16, num_steps_per_env=8, num_learning_epochs=2, num_mini_batches=3)
SMALL |= dict(actor_hidden_dims=(16,), critic_hidden_dims=(16, 8), cnn_output_channels=(3, 5), actor_obs=("policy", "image"))
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


def train(args):
    return cases.run(ppo_cnn, args, make(args.num_envs, seed=args.seed))


@pytest.mark.parametrize("name", PARITY)
def test_trajectory_is_bit_equal(name):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    import reference

    args = arguments(**PARITY[name])
    expected, runner = reference.run(args, make(args.num_envs, seed=args.seed))
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


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("Perf/")}


def models(**settings):
    args = arguments(**settings)
    env = make(args.num_envs)
    obs = env.get_observations()
    return args, obs, *ppo_cnn.make_models(obs, env.num_actions, args)


def test_images_are_stored_as_they_come_and_once():
    args, obs, actor, critic = models(**BOTH)
    storage = ppo_cnn.make_storage(obs, 2, actor, args)
    assert storage["obs", "image"].dtype == torch.uint8
    batches = ppo_cnn.make_batches(actor, critic, storage, torch.randperm(126), args)
    for batch in batches:
        ours, theirs = (batch[name, "images", "image"] for name in ("actor_input", "critic_input"))
        assert ours.dtype == torch.uint8 and ours.data_ptr() == theirs.data_ptr()
    assert len({batch["actor_input", "images", "image"].untyped_storage().data_ptr() for batch in batches}) == 1


@pytest.mark.parametrize("dtype, gigabytes", [(torch.uint8, 0.42), (torch.float16, 0.84), (torch.float32, 1.68)])
def test_memory_of_image_storage(dtype, gigabytes):
    """4096 environments, 24 steps and the observation after the last, 64 x 64 pixels. The README states these figures."""
    args, obs, actor, _ = models()
    args = arguments(num_envs=4096, num_steps_per_env=24)
    image = torch.zeros(4096, 1, 64, 64, dtype=dtype, device="meta")
    storage = ppo_cnn.make_storage(ppo_cnn.TensorDict(image=image, batch_size=[4096], device="meta"), 2, actor, args)
    stored = storage["obs", "image"]
    assert stored.shape == (25, 4096, 1, 64, 64)
    assert stored.nbytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_integers_are_read_as_a_part_of_255_and_halves_as_they_are():
    args, obs, actor, _ = models(actor_obs=("image",), obs_normalization=False)
    floats = obs["image"] / 255.0
    assert torch.equal(actor.cnns["image"](obs["image"]), actor.cnns["image"](floats))
    assert torch.equal(actor.cnns["image"](floats.half()), actor.cnns["image"](floats.half().float()))


def test_a_shared_encoder_is_stepped_and_clipped_once():
    args, obs, actor, critic = models(**BOTH, share_cnn_encoders=True, max_grad_norm=1e-3, schedule="fixed", optimizer="sgd")
    optimizer = ppo_cnn.FlatOptimizer([*actor.parameters(), *critic.parameters()], args.learning_rate, args.optimizer)
    assert len(optimizer.params) == len({*actor.parameters(), *critic.parameters()})
    storage = ppo_cnn.make_storage(obs, 2, actor, args)
    storage["rewards"].normal_(std=10.0)
    for row in storage.unbind(0):
        row["obs"].update_(obs)
        ppo_cnn.act(actor, critic, row)
    batch = ppo_cnn.make_batches(actor, critic, storage, torch.randperm(126), args)[0]
    ppo_cnn.mini_batch_step(actor, critic, optimizer, batch, args)
    norm = lambda parameters: torch.stack([p.grad.norm() for p in parameters]).norm().item()  # noqa: E731
    assert norm(actor.parameters()) == pytest.approx(1e-3, rel=1e-2)  # a second clipping would have made it smaller
    assert norm([*critic.mlp.parameters()]) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("groups", [("policy", "image", "depth"), ("depth", "image"), ("policy",)], ids="+".join)
def test_exports_have_one_input_for_each_image(groups, tmp_path):
    import onnxruntime

    _, obs, actor, _ = models(actor_obs=groups, cnn_norm="batch", distribution="beta")
    actor(actor.preprocess(obs))  # gives the batch norms something to remember
    policy = ppo_cnn.LoadedPolicy(actor.eval(), groups)
    ppo_cnn.export_policy(policy.module, tmp_path)
    images = [group for group in groups if group != "policy"]
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    types = {x.name: x.type for x in session.get_inputs()}
    assert {name: types[name] for name in images} == {
        g: {"image": "tensor(uint8)", "depth": "tensor(float)"}[g] for g in images
    }
    vector = obs["policy"] if "policy" in groups else torch.zeros(16, 0)
    inputs = {"obs": vector} | {group: obs[group] for group in images}
    onnx = session.run(["actions"], {name: x.numpy() for name, x in inputs.items() if name in types})[0]
    script = torch.jit.load(tmp_path / "policy.pt")(vector, [obs[group] for group in images])
    assert torch.allclose(torch.as_tensor(onnx), policy(obs), atol=1e-5) and torch.equal(script, policy(obs))


def test_a_film_does_not_stop_batch_norms_from_learning(tmp_path):
    settings = dict(cnn_norm="batch", env="cameras:make", max_iterations=3, logger="none")
    _, plain = train(arguments(**settings))
    _, filmed = train(arguments(**settings, log_root=str(tmp_path), video_interval=1))
    for name, x in plain["actor"].state_dict().items():
        assert torch.equal(x, filmed["actor"].state_dict()[name]), name


@pytest.mark.parametrize(
    "settings", [dict(cnn_stride=0, cnn_padding="zeros"), dict(cnn_kernel_size=99)], ids=["stride", "kernel"]
)
def test_impossible_encoders_are_refused(settings):
    with pytest.raises(ppo_cnn.UserError, match="make no encoder of image group"):
        models(**settings)


def test_resumed_run_continues_bit_for_bit(tmp_path):
    settings = BOTH | dict(
        share_cnn_encoders=True, cnn_norm="batch", log_root=str(tmp_path), logger="none", experiment_name="x"
    )
    whole, _ = train(arguments(**settings, max_iterations=4))
    train(arguments(**settings, max_iterations=2))
    rest, _ = train(arguments(**settings, max_iterations=4, resume=True))
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert without_times(ours) == pytest.approx(without_times(theirs), rel=0, abs=0, nan_ok=True)
    path = sorted(tmp_path.glob("x/*/model_3.pt"))[-1]
    policy = ppo_cnn.load_policy(path)
    assert policy(make(16).get_observations()).shape == (16, 2)
    assert policy.module.dtypes == {"image": torch.uint8, "depth": torch.float32}


def test_groups_left_out_are_the_bases_and_every_image(capsys):
    _, _, actor, critic = models(actor_obs=(), critic_obs=())
    assert list(actor.shapes) == ["policy", "image", "depth"]
    assert list(critic.shapes) == ["policy", "image", "depth", "privileged"]
    assert "actor observes policy (2,) + image (2, 24, 24) + depth (1, 9, 7)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        dict(cnn_kernel_size=(3, 3, 3)),
        dict(cnn_kernel_size=25),
        dict(cnn_norm="group"),
        dict(cnn_padding="same"),
        dict(cnn_global_pool="sum"),
        dict(cnn_stride=dict(depth=1)),
        dict(share_cnn_encoders=True),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(settings):
    with pytest.raises(ppo_cnn.UserError, match="image"):
        models(**settings)


def test_nothing_waits_and_a_captured_run_equals_the_eager_one(monkeypatch):
    import instruments

    args = arguments(**BOTH, share_cnn_encoders=True, cnn_norm="batch", cnn_max_pool=True, cnn_padding="zeros")
    args = ppo_cnn.dataclasses.replace(args, max_iterations=5, timeout_bootstrap="final_obs")
    eager, _ = train(args)

    def graph(fn, *rest, **_):  # an EmulatedGraph raises where a recorded function reads a number on the host
        return instruments.EmulatedGraph(fn, *rest) if fn.__name__ in ("collect", "update") else lambda: fn(*rest)

    monkeypatch.setattr(ppo_cnn, "CudaGraph", graph)
    replayed, _ = train(args)
    for ours, theirs in zip(replayed, eager, strict=True):
        assert without_times(ours) == pytest.approx(without_times(theirs), rel=0, abs=0, nan_ok=True)
