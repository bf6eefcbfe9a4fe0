"""ppo_symmetry.py: equal to rsl_rl's symmetry extension, and suspicious of wrong mirror functions before it trains."""

import dataclasses
import importlib.util
import pathlib
import shutil
import subprocess
import sys

import cases
import instruments
import pytest
import reference
import torch
from tensordict import TensorDict

import ppo_continuous
import ppo_symmetry as module
from envs import make
from envs.torch_env import TorchEnv

SMALL = cases.SMALL | dict(num_envs=32, actor_hidden_dims=(16, 16), critic_hidden_dims=(16,), mirror_loss_coeff=0.7)
SMALL |= dict(device="cpu")
ROOT = pathlib.Path(__file__).resolve().parent.parent
USES = {  # name: what is used for learning
    "augmentation": dict(use_data_augmentation=True, use_mirror_loss=False),
    "mirror loss": dict(use_data_augmentation=False, use_mirror_loss=True),
    "both": dict(use_data_augmentation=True, use_mirror_loss=True),
    "logging only": dict(use_data_augmentation=False, use_mirror_loss=False),
}


class Plane(TorchEnv):
    """Push a point to the origin of a plane. It may be mirrored left-right, front-back, or both: M = 4."""

    def __init__(self, num_envs=32, seed=1):
        super().__init__(num_envs, 2, 1.0, 0.05, "cpu", seed)
        self.pos, self.vel = torch.zeros(2, num_envs, 2, dtype=self.dtype)
        self.reset_all()

    def _advance(self, actions):
        self.vel.copy_(0.9 * self.vel + 0.1 * actions)
        self.pos += 0.1 * self.vel
        return -self.pos.square().sum(1), self.pos.abs().amax(1) > 1.5, {}

    def _reset(self, mask):
        self._assign(mask, pos=self._uniform(-1.0, 1.0, 2), vel=0.0)

    def _observe(self):
        wall = torch.cat((1.5 - self.pos, 1.5 + self.pos), 1)  # distance to the walls at +x, +y, -x, -y
        x, y = (torch.exp(-((x.unsqueeze(1) - torch.linspace(-1.5, 1.5, 4)) ** 2)) for x in self.pos.unbind(1))
        picture = (y.unsqueeze(2) * x.unsqueeze(1)).unsqueeze(1)  # (N, 1, 4, 4) rows y, columns x
        groups = {"policy": torch.cat((self.pos, self.vel), 1), "privileged": wall, "picture": picture}
        return TensorDict(groups, batch_size=[self.num_envs])

    def mirror_state(self):
        for state in (self.pos, self.vel):
            state[:, 0] *= -1.0
        self._obs.update_(self._observe())

    def symmetry(self, env, obs, actions):
        i = torch.arange(4)  # made on the device: torch.tensor would copy from the host, which a CUDA graph cannot
        signs = 1.0 - 2.0 * torch.stack((i % 2, i // 2), 1).to(self.dtype)  # (1, 1), (-1, 1), (1, -1), (-1, -1)
        walls, flips = ([0, 1, 2, 3], [2, 1, 0, 3], [0, 3, 2, 1], [2, 3, 0, 1]), ([], [3], [2], [2, 3])
        images = {
            "policy": lambda x: [x * sign.repeat(2) for sign in signs],
            "privileged": lambda x: [torch.stack([x[:, j] for j in index], 1) for index in walls],
            "picture": lambda x: [x.flip(dims) for dims in flips],
        }
        if obs is not None:
            groups = {name: torch.cat(images[name](x)) for name, x in obs.items()}
            obs = TensorDict(groups, batch_size=[4 * len(obs)])
        return obs, None if actions is None else torch.cat([actions * sign for sign in signs])


def make_env(name, num_envs=32, seed=1):
    return Plane(num_envs, seed) if name == "plane" else make(name, num_envs, seed=seed)


def args_of(name="plane", **settings):
    return module.Args(**(SMALL | cases.ASYMMETRIC | dict(env=name) | settings))


def state_of(agent, parts=("actor", "critic")):
    return {part: agent[part].state_dict() for part in parts}


def one_rollout(env, **settings):
    """An untrained agent, what it has collected, cut into mini-batches, and the settings."""
    args = module.choose_groups(env.get_observations(), args_of(num_envs=env.num_envs, **settings))
    obs = module.read_obs(env.get_observations(), args)
    agent = module.make_agent(env, obs, args)
    storage = module.make_storage(agent, obs, env.num_actions, args)
    module.collect(env, agent, storage, module.act, args)
    module.shuffle(storage, args)
    rollout = storage[:-1]
    rollout["advantages"], rollout["returns"] = module.compute_gae(storage, args)
    return agent, module.make_batches(rollout, args), args


# ---- Parity ----


def compare(args, name, tolerance, module=module, parts=("actor", "critic")):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    expected, runner = reference.run(args, make_env(name, args.num_envs, args.seed))
    history, agent = cases.run(module, args, make_env(name, args.num_envs, args.seed))
    assert len(history) == len(expected) == 10
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        assert theirs["Loss/symmetry"] > 0
        for tag, value in theirs.items():
            scale = 0.8 if tag == "Loss/surrogate" else abs(value)
            assert abs(ours[tag] - value) <= tolerance * scale, f"iteration {iteration}: {tag} {ours[tag]} is not {value}"
    for part, state in state_of(agent, parts).items():
        for key, theirs in getattr(runner.alg, part).state_dict().items():
            assert (state[key] - theirs).abs().max() <= tolerance * theirs.abs().max(), f"{part} {key}"
    return history, runner


BIT_EQUAL = {
    "plane-augmentation": ("plane", USES["augmentation"]),
    "plane-logging": ("plane", USES["logging only"]),
    "quadruped-augmentation": ("quadruped", USES["augmentation"]),
    "quadruped-logging": ("quadruped", USES["logging only"] | dict(num_mini_batches=7)),
    "per-mini-batch-advantages": (
        "plane",
        USES["augmentation"] | dict(normalize_advantage_per_mini_batch=True, std_type="log"),
    ),
    "heteroscedastic": ("plane", USES["augmentation"] | dict(distribution="heteroscedastic", num_mini_batches=5, seed=2)),
}


@pytest.mark.parametrize("name", BIT_EQUAL)
def test_trajectory_is_bit_equal(name):
    env, settings = BIT_EQUAL[name]
    compare(args_of(env, **settings), env, 0.0)


@pytest.mark.parametrize("name", ["plane", "quadruped"])
@pytest.mark.parametrize("use", ["mirror loss", "both"])
def test_trajectory_is_equal_in_float64(name, use, double):
    """rsl_rl runs the actor a second time for the mirror loss, over all rows: only the order of the gradient's sums differs."""
    compare(args_of(name, **USES[use]), name, 1e-8)


def test_beta_in_float64(double):
    compare(args_of(distribution="beta", **USES["both"]), "plane", 1e-8)


def test_logging_only_trains_as_the_base_does():
    """The mirror loss is logged where it is no part of the loss, and costs nothing but time."""
    args = args_of("quadruped", **USES["logging only"])
    history, agent = cases.run(module, args, make_env("quadruped"))
    fields = {field.name for field in dataclasses.fields(ppo_continuous.Args)}
    plain = ppo_continuous.Args(**{k: v for k, v in dataclasses.asdict(args).items() if k in fields})
    _, base = cases.run(ppo_continuous, plain, make_env("quadruped"))
    assert all(metrics["Loss/symmetry"] > 0.0 for metrics in history)
    for part, state in state_of(agent).items():
        assert all(torch.equal(value, base[part].state_dict()[key]) for key, value in state.items())


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """ppo_rnd.py and ppo_symmetry.py in one script: what both change of the base, by `git merge-file`."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    rnd, base, symmetry = (ROOT / f"ppo_{name}.py" for name in ("rnd", "continuous", "symmetry"))
    merge = [rnd, base, symmetry]
    conflicts = subprocess.run(["git", "merge-file", "-p", *merge], capture_output=True, text=True)
    # Every script has a title of its own, so the header docstring conflicts, and nothing else may: --ours keeps RND's.
    assert conflicts.returncode == 1 and conflicts.stdout.startswith("<<<<<<<"), conflicts.stdout
    script, command = tmp_path / "ppo_rnd_symmetry.py", ["git", "merge-file", "-p", "--ours", *merge]
    script.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    merged = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script.stem, merged)
    spec.loader.exec_module(merged)
    return merged


RND = dict(rnd_obs=("velocity",), rnd_state_normalization=True, rnd_reward_normalization=True, rnd_weight=3.3)
RND |= dict(rnd_weight_schedule="linear", rnd_final_step=177, rnd_final_value=0.7, rnd_predictor_hidden_dims=(16,))


def compare_merged(merged, use, tolerance):
    args = args_of("quadruped", **USES[use])
    both = merged.Args(**vars(args) | RND)
    history, runner = compare(both, "quadruped", tolerance, merged, ("actor", "critic", "rnd"))
    assert runner.alg.rnd and runner.alg.symmetry and "Loss/rnd" in history[0]


def test_with_rnd_it_is_bit_equal_to_rsl_rl_that_has_both_on(merged):
    """The predictor learns from the originals only."""
    compare_merged(merged, "augmentation", 0.0)


def test_with_rnd_it_is_equal_to_rsl_rl_that_has_both_on_in_float64(merged, double):
    compare_merged(merged, "both", 1e-8)


# ---- Refusals ----


def altered(obs=lambda x: x, actions=lambda x: x):
    """Plane's symmetry, with something done to what it returns."""

    def function(env, obs_, actions_):
        obs_, actions_ = env.symmetry(env=env, obs=obs_, actions=actions_)
        return None if obs_ is None else obs(obs_), None if actions_ is None else actions(actions_)

    return lambda env, obs, actions: function(env, obs, actions)


def one_row_less(obs):
    return TensorDict({name: x[:-1] if name == "policy" else x for name, x in obs.items()}, batch_size=[])


def images_first(actions):
    return actions.roll(len(actions) // 4, 0)


def changed_in_place(env, obs, actions):
    if obs is not None:
        obs["policy"] *= -1.0
    return env.symmetry(env=env, obs=obs, actions=actions)


def walls_turned_by_90_degrees(obs):
    n = len(obs) // 4
    obs["privileged"][n : 2 * n] = obs["privileged"][:n].roll(1, 1)
    return obs


def flipped_velocity(obs):  # wrong in two images of three, so that they are closed all the same
    n = len(obs) // 4
    obs["policy"][n : 3 * n, 3] *= -1.0
    return obs


def flipped_action(actions):
    return actions * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).repeat_interleave(len(actions) // 4, 0)


NOT_THE_ORIGINALS = "of B rows must make M * B, M > 1, and the first B must be the originals"
WRONG = {
    "one row less of a group": (altered(obs=one_row_less), NOT_THE_ORIGINALS),
    "one row less of the actions": (altered(actions=lambda actions: actions[:-1]), NOT_THE_ORIGINALS),
    "a group is missing": (altered(obs=lambda obs: obs.exclude("privileged")), NOT_THE_ORIGINALS),
    "no images": (lambda env, obs, actions: (obs, actions), NOT_THE_ORIGINALS),
    "images first": (altered(actions=images_first), NOT_THE_ORIGINALS),
    "originals changed in place": (changed_in_place, NOT_THE_ORIGINALS),
    "images of images are new": (altered(obs=walls_turned_by_90_degrees), "some are neither"),
    "a sign of an observation": (altered(obs=flipped_velocity), "policy differs in [[3]]"),
    "a sign of an action": (altered(actions=flipped_action), "differs in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_functions_are_refused_before_training(name, tmp_path, monkeypatch):
    function, message = WRONG[name]
    monkeypatch.setattr(sys.modules[__name__], "chosen", function, raising=False)
    with pytest.raises(module.UserError) as error:
        module.train(args_of(symmetry=f"{__name__}:chosen", log_root=str(tmp_path)), Plane())
    assert message in str(error.value) and "--symmetry" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_right_functions_are_taken_whatever_the_order_of_their_groups(monkeypatch):
    """One that is named wins over the environment's own, also where the environment gives images as bytes."""
    calls = []

    class Bytes(Plane):
        symmetry = None

        def _observe(self):
            obs = super()._observe()
            return obs.update({"picture": (obs["picture"] * 255.0).round().to(torch.uint8)})

    def mirror(env, obs, actions):
        calls.append(1)
        obs, actions = Plane.symmetry(env, env=env, obs=obs, actions=actions)
        if obs is not None:
            obs = TensorDict(dict(reversed(list(obs.items()))), batch_size=obs.batch_size)
        return obs, actions

    monkeypatch.setattr(sys.modules[__name__], "chosen", mirror, raising=False)
    env = Bytes()
    obs = env.get_observations()
    agent = module.make_agent(env, obs, args_of(symmetry=f"{__name__}:chosen"))
    count = len(calls)
    agent.mirror(obs=obs, actions=None)
    assert len(calls) == count + 1 > 1


@pytest.mark.parametrize("name", ["quadruped", "quadruped-rough"])
def test_every_kind_of_flipped_sign_of_the_quadruped_is_caught(name):
    """Flipped alone, or together with the entry it is exchanged with: then images of images are as they should be."""
    env = make(name, 32, seed=1)
    module.make_symmetry(env, env.get_observations(), module.Args())
    some = {"policy": (1, 7, 12, 25, 35, 46), "velocity": (1,), "privileged": (1, 10, 35, 58), "joints": (0, 4)}
    for kind, entry in [(kind, entry) for kind, entries in some.items() for entry in entries]:
        index, sign = env.mirrors[kind]
        right = sign.clone()
        for flipped, message in (([entry], "differs in|some are neither"), ([entry, int(index[entry])], "differs in")):
            sign[flipped] = -right[flipped]
            with pytest.raises(module.UserError, match=message):
                module.make_symmetry(env, env.get_observations(), module.Args())
            sign.copy_(right)


def test_checks_leave_the_environment_and_the_random_stream_alone():
    env, untouched = make("quadruped", 8), make("quadruped", 8)
    before = torch.get_rng_state()
    module.make_symmetry(env, env.get_observations(), module.Args())
    assert torch.equal(torch.get_rng_state(), before)
    actions = torch.ones(8, 12)
    assert (env.step(actions)[0] == untouched.step(actions)[0]).all()


def test_an_environment_without_symmetry_says_so():
    with pytest.raises(module.UserError, match="--symmetry : the environment has none; name yours"):
        module.train(args_of("cartpole", critic_obs=("policy",)), make("cartpole", 32))


def rotations(env, obs, actions, turns=4):
    """A picture and an arrow, turned by 90 degrees, again and again."""
    if obs is not None:
        obs = TensorDict({"picture": torch.cat([obs["picture"].rot90(k, (2, 3)) for k in range(turns)])}, [turns * len(obs)])
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    if actions is not None:
        actions = torch.cat([actions @ torch.linalg.matrix_power(quarter, k) for k in range(turns)])
    return obs, actions


def test_pictures_may_be_turned_as_well_as_mirrored():
    obs = TensorDict({"picture": torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)}, [16])
    module.check_images(lambda obs, actions: rotations(None, obs, actions), obs, 2)
    for turns in (2, 3):
        with pytest.raises(module.UserError, match="some are neither"):
            module.check_images(lambda obs, actions, turns=turns: rotations(None, obs, actions, turns), obs, 2)


# ---- What it does ----


def test_images_follow_the_originals_and_keep_their_numbers():
    env = Plane()
    agent, batches, _ = one_rollout(env)
    assert len(batches) == 4
    for batch in batches:
        untouched, images = batch.clone(), module.add_images(batch, agent.mirror)
        assert len(images) == 4 * 192 and (batch == untouched).all()
        obs, actions = env.symmetry(env=env, obs=batch["obs"], actions=batch["actions"])
        assert torch.equal(images["actions"], actions) and (images["obs"] == obs).all()
        rest, mirrored = images.exclude("obs", "actions"), batch.exclude("obs", "actions")
        assert {"log_prob", "advantages", "returns", "values", "policy"} <= set(rest.keys())
        for rows in rest.split(192):  # what is not mirrored is the original's, the log-probability too
            assert (rows == mirrored).all()


@pytest.mark.parametrize("use", ["augmentation", "logging only"])
def test_kl_and_entropy_are_of_the_originals_only(use):
    """Also after a step that has moved the policy, and where each state has an entropy of its own."""
    agent, (batch, *_), args = one_rollout(Plane(), distribution="heteroscedastic", **USES[use])
    torch.nn.init.normal_(agent.actor.mlp[-1].weight, std=0.1)
    _, metrics = module.ppo_loss(agent, batch, args)

    def means(batch):
        policy = agent.actor.distribution(agent.actor(batch["obs"]))
        old = torch.distributions.Normal(*batch["policy"].values())
        kl = torch.distributions.kl_divergence(old, policy).sum(-1).mean()
        return {"kl": kl.item(), "entropy": policy.entropy().sum(-1).mean().item()}

    expected, wrong = means(batch), means(module.add_images(batch, agent.mirror))
    for name in ("kl", "entropy"):
        # A hundredth of what the images would change is far above the rounding of kernels for other numbers of rows.
        assert metrics[name].item() == pytest.approx(expected[name], abs=0.01 * abs(wrong[name] - expected[name]), rel=0.0)


def test_augmentation_makes_the_policy_symmetric():
    error = {}
    for use in USES:
        history, _ = cases.run(module, args_of(max_iterations=20, num_steps_per_env=12, **USES[use]), Plane())
        error[use] = history[-1]["Loss/symmetry"]
    # A fifth: well below what learning a symmetric task brings by itself, and above what 20 iterations leave.
    assert max(error["augmentation"], error["mirror loss"], error["both"]) < 0.2 * error["logging only"], error


@pytest.mark.parametrize("name", ["plane", "quadruped"])
@pytest.mark.parametrize("use", ["both", "mirror loss"])
def test_captured_run_equals_eager_run(name, use):
    """Nothing waits in there, or the recording would fail."""
    args = args_of(name, max_iterations=5, num_envs=16, num_steps_per_env=8, **USES[use])
    instruments.check_replay(module, args, lambda: make_env(name, 16), whole=True)


def test_a_resumed_run_continues_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "export_policy", lambda *_: None)
    args = args_of(max_iterations=6, log_root=str(tmp_path), save_interval=3, logger="none", **USES["both"])
    history, expected = cases.run(module, args, Plane())
    (checkpoint,) = tmp_path.glob("*/*/model_3.pt")
    args = dataclasses.replace(args, resume=True, checkpoint=str(checkpoint))
    resumed, agent = cases.run(module, args, Plane(seed=9))
    for ours, theirs in zip(resumed, history[4:], strict=True):
        assert {k: v for k, v in ours.items() if "Loss/" in k} == {k: v for k, v in theirs.items() if "Loss/" in k}
    for part, state in state_of(agent).items():
        assert all(torch.equal(value, expected[part].state_dict()[key]) for key, value in state.items())


def test_play_draws_the_footfalls(tmp_path, monkeypatch):
    """In every script, where the environment says which feet are on the ground."""
    monkeypatch.setattr(module, "export_policy", lambda *_: None)

    class Feet(Plane):
        def contacts(self):
            return {name: self.pos[:, 0] > bound for name, bound in (("left", 0.0), ("right", 0.1))}

    args = args_of(max_iterations=1, log_root=str(tmp_path), logger="none", experiment_name="feet")
    module.train(args, Feet())
    module.play(dataclasses.replace(args, play=True, play_envs=4), Feet(4))
    assert len(list(tmp_path.glob("feet/*/play_model_0_footfalls.png"))) == 1
