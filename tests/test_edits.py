"""What a researcher changes first is a few lines of ppo_continuous.py, and the rest still works: edits/<name>.diff.

Each patch is applied to a copy of the script, which trains, resumes, plays, exports and is loaded. Where a patch does not
apply any more, or an edit shall change, say

    python tests/test_edits.py apply NAME     # writes NAME/ppo_continuous.py, and what was rejected beside it
    python tests/test_edits.py record NAME    # makes edits/NAME.diff of it

in an empty folder; without a name it is all of them.
"""

import contextlib
import difflib
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from unittest import mock

import instruments
import onnxruntime
import pytest
import torch
from torch._dynamo.utils import counters

EDITS = pathlib.Path(__file__).resolve().parent / "edits"
BASE = EDITS.parent.parent / "ppo_continuous.py"
LIMITS = {  # lines, + and - counted
    "layer_norm": 2,
    "adamw_two_groups": 12,
    "entropy_to_zero": 6,
    "transformer_actor": 30,
    "multi_critic": 45,
    "auxiliary_loss": 16,
    "metric": 2,
    "mini_batches_anew": 12,
}
SETTINGS = {
    "adamw_two_groups": dict(optimizer="adamw"),
    "transformer_actor": dict(env="cartpoles:History", actor_obs=("history",)),
    "multi_critic": dict(env="cartpoles:Rewards"),
    "auxiliary_loss": dict(env="cartpoles:Privileged"),
}
TINY = dict(env="cartpoles:Plain", num_envs=16, max_iterations=3, actor_hidden_dims=(16, 8), critic_hidden_dims=(8,))
TINY |= dict(save_interval=1, logger="none", device="cpu")
FAST = ("adamw_two_groups", "entropy_to_zero", "mini_batches_anew")  # these under CUDA graphs and compiled too


def apply(name: str, folder: pathlib.Path, *options: str) -> pathlib.Path:
    """A copy of the script in `folder`, with the patch."""
    script = folder / BASE.name
    script.write_text(BASE.read_text())
    done = subprocess.run(["git", "apply", *options, EDITS / f"{name}.diff"], cwd=folder, capture_output=True, text=True)
    applied = done.returncode == 0 and script.read_text() != BASE.read_text()
    assert applied or options, f"edits/{name}.diff does not apply any more; see the top of this file\n{done.stderr}"
    return script


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location("edited", path)
    module = sys.modules["edited"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cartpoles(monkeypatch):
    monkeypatch.syspath_prepend(str(EDITS))
    return importlib.import_module("cartpoles")


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """The edited script by the name of its edit; it does not export at the end of each training, which takes long."""

    def make(name):
        module = load(apply(name, tmp_path))
        monkeypatch.setattr(module, "export_policy_at_last", module.export_policy, raising=False)
        monkeypatch.setattr(module, "export_policy", lambda *_: None)
        return module

    return make


@contextlib.contextmanager
def one_rate(module):
    """The learning rate in float32, as on CUDA: `instruments.fused_optimizer` would give each group one of its own."""

    def make(*args):
        optimizer = make_optimizer(*args)
        lr = optimizer.param_groups[0]["lr"].float()
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer

    make_optimizer = module.make_optimizer
    with mock.patch.object(module, "make_optimizer", make):
        yield


@contextlib.contextmanager
def on_cuda(module):
    with one_rate(module), instruments.emulated(module, whole=True) as cuda:
        yield cuda


def args_of(module, name, **settings):
    return module.Args(**(TINY | SETTINGS.get(name, {}) | settings))


def numbers(history) -> str:
    """What must be equal: everything but times. As text, in which NaN equals NaN."""
    return str([{tag: x for tag, x in metrics.items() if not tag.startswith("Perf/")} for metrics in history])


@pytest.mark.parametrize("name", LIMITS)
def test_the_patch_is_small(name, tmp_path):
    texts = [path.read_text().splitlines() for path in (BASE, apply(name, tmp_path))]
    changed = [line for line in list(difflib.unified_diff(*texts, n=0))[2:] if line[0] in "+-"]
    assert len(changed) <= LIMITS[name], changed
    assert max(len(line) - 1 for line in changed) <= 110


@pytest.mark.parametrize(
    "name, mode", [*((name, "eager") for name in LIMITS), *((name, mode) for name in FAST for mode in ("graphs", "compiled"))]
)
def test_the_edited_script_trains_resumes_plays_and_exports(name, mode, edited, monkeypatch, capsys):
    """Resumed, it goes on exactly as the run that was not interrupted; what is exported acts as what is loaded."""
    if mode == "compiled" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    module = edited(name)
    iterations = 6 if mode == "graphs" else 3  # a graph is recorded in the fourth call, and replayed
    args = args_of(module, name, max_iterations=iterations, compile=mode == "compiled")
    counters.clear()
    with on_cuda(module) if mode == "graphs" else contextlib.nullcontext() as cuda:
        history = module.train(args)
        resumed = module.train(replace(args, resume=True, checkpoint=f"model_{iterations // 3 - 1}.pt"))
    assert len(history) == iterations and numbers(resumed) == numbers(history[-len(resumed) :]) and len(resumed) > 1
    if mode == "graphs":
        assert [graph.launches for graph in cuda.graphs] == [3, 3, 1, 1]
    if mode == "compiled":  # one graph for both runs: nothing was compiled again, and nothing broke it
        runs = 1 if torch.__version__ >= "2.11" else 2  # torch 2.7 compiles once for each agent
        assert counters["stats"]["unique_graphs"] == runs and not counters["graph_break"]
        eager = module.train(replace(args, compile=False, log_root=""))
        for tag in [tag for tag in eager[0] if tag.startswith("Loss/")]:  # the next ones go where rounding leads them
            assert history[0][tag] == pytest.approx(eager[0][tag], rel=1e-3, abs=1e-6), tag

    monkeypatch.setattr(module, "export_policy", module.export_policy_at_last)
    capsys.readouterr()
    for flag in ("--play", "--export"):
        monkeypatch.setattr(sys, "argv", [str(module.__file__), flag, "--env", args.env, "--device", "cpu", "--play-envs", "2"])
        module.main()
    assert "playing model_" in capsys.readouterr().out
    folder, last = resumed.run_dir, f"model_{iterations - 1}"
    assert (folder / f"play_{last}.gif").stat().st_size > 1000
    policy = module.load_policy(folder / f"{last}.pt", batch_size=4)
    obs = module.make_env(args, num_envs=4).get_observations()
    actions = policy.act(obs).detach()
    inputs = {key: x.numpy() for key, x in policy.actor.inputs(obs).items()}
    onnx = instruments.run_each(onnxruntime.InferenceSession(folder / "exported" / "policy.onnx"), inputs)[0]
    torch.testing.assert_close(torch.from_numpy(onnx), actions)
    script = torch.jit.load(folder / "exported" / "policy.pt")
    torch.testing.assert_close(script(*(x[:1] for x in policy.actor.inputs(obs).values())), actions[:1])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", FAST)
def test_replayed_it_gives_the_same_numbers(name, whole, edited, cartpoles):
    """CUDA graphs, emulated, of the whole rollout or of each policy step, and of the update."""
    module = edited(name)
    args = args_of(module, name, max_iterations=5, log_root="")
    with one_rate(module):
        instruments.check_replay(module, args, lambda: cartpoles.Plain(16), whole)


# What each edit is for


def test_every_hidden_layer_is_normalised(edited):
    module = edited("layer_norm")
    agent = module.train(args_of(module, "layer_norm")).agent
    norms = [[layer for layer in model.mlp if isinstance(layer, torch.nn.LayerNorm)] for model in (agent.actor, agent.critic)]
    assert [[layer.normalized_shape[0] for layer in layers] for layers in norms] == [[16, 8], [8]]
    assert all((layer.weight != 1.0).any() for layers in norms for layer in layers)  # they learn


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_the_adaptive_learning_rate_reaches_both_groups(mode, edited):
    """One number, also after a resume; only matrices decay."""
    module = edited("adamw_two_groups")
    args = args_of(module, "adamw_two_groups", max_iterations=6, weight_decay=0.1)
    with on_cuda(module) if mode == "graphs" else contextlib.nullcontext():
        history = module.train(args)
        resumed = module.train(replace(args, resume=True, checkpoint="model_1.pt"))
    for run in (history, resumed):
        matrices, rest = run.agent.optimizer.param_groups
        assert matrices["lr"].item() == rest["lr"].item() == run[-1]["Loss/learning_rate"] != args.learning_rate
        assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        assert {x.dim() for x in matrices["params"]} == {2} and {x.dim() for x in rest["params"]} == {1}
        parameters = {*run.agent.actor.parameters(), *run.agent.critic.parameters()}
        assert parameters == {*matrices["params"], *rest["params"]}


def test_the_loss_uses_the_falling_entropy_coef(edited, monkeypatch):
    module, seen = edited("entropy_to_zero"), []
    args, loss_of = args_of(module, "entropy_to_zero", entropy_coef=0.3), module.ppo_loss

    def ppo_loss(agent, batch, args):
        loss, metrics = loss_of(agent, batch, args)
        rest = metrics["surrogate"] + args.value_loss_coef * metrics["value"]
        seen.append(((rest - loss) / metrics["entropy"]).item())
        return loss, metrics

    monkeypatch.setattr(module, "ppo_loss", ppo_loss)
    module.train(args)
    assert seen == pytest.approx([0.3] * 20 + [0.2] * 20 + [0.1] * 20, rel=1e-4)


def test_the_transformer_reads_the_whole_history(edited):
    module = edited("transformer_actor")
    agent = module.train(args_of(module, "transformer_actor")).agent
    obs = module.make_env(args_of(module, "transformer_actor")).get_observations()
    policy = module.Policy(agent.actor.eval(), len(obs))
    before = policy.act(obs)
    for step in range(6):
        changed = obs.clone()
        changed["history"][:, step] += 1.0
        assert not torch.allclose(policy.act(changed), before), step
    assert all(p.grad is not None and p.grad.any() for p in agent.actor.encoder.parameters())
    assert agent.actor.obs_normalizer.count == 3 * 24 * 16 * 6  # each observation of each history


def test_each_critic_has_its_own_rewards(edited, cartpoles):
    """The advantages are the weighted sum of those that the unedited script finds for each group of rewards alone."""
    base, module = load(BASE), edited("multi_critic")
    args = args_of(module, "multi_critic", reward_weights=(0.7, 2.0))
    agent, env = module.train(args).agent, cartpoles.Rewards(16)
    assert len(agent.critic) == 2
    obs = module.read_obs(env.get_observations(), module.choose_groups(env.get_observations(), args))
    storage = module.make_storage(agent, obs, 1, args)
    for name in ("values", "reward_groups", "bootstrap"):
        storage[name].normal_()
    storage["dones"].bernoulli_(0.1)
    advantages, returns = module.compute_gae(storage, args)
    expected = 0.0
    for group, weight in enumerate(args.reward_weights):
        alone = storage.clone(recurse=False)
        alone["rewards"] = storage["reward_groups"][..., group]
        for name in ("values", "bootstrap"):
            alone[name] = storage[name][..., group]
        own, own_returns = base.compute_gae(alone, base.Args(num_envs=16))
        torch.testing.assert_close(returns[..., group], own_returns)
        expected += weight * own
    torch.testing.assert_close(advantages, expected)


def test_the_features_learn_from_the_privileged_group(edited):
    """Over ten iterations the prediction gets better, and not without the loss."""
    module = edited("auxiliary_loss")
    args = args_of(module, "auxiliary_loss", max_iterations=10, log_root="")
    with_loss, without = (module.train(replace(args, estimation_coef=coef)) for coef in (1.0, 0.0))
    first, last = with_loss[0]["Loss/estimation"], with_loss[-1]["Loss/estimation"]
    assert last < 0.5 * first and last < 0.5 * without[-1]["Loss/estimation"]
    layers = [run.agent.actor.mlp[0].weight for run in (with_loss, without)]
    assert not torch.equal(*layers)  # the gradient reaches the features


class Writer:
    """A logger: `--logger test_edits:Writer`."""

    made = []

    def __init__(self, run_dir):
        self.scalars = {}
        Writer.made.append(self)

    def add_scalar(self, tag, value, iteration):
        self.scalars[tag, iteration] = value


def test_a_new_metric_is_printed_and_logged(edited, capsys):
    module = edited("metric")
    history = module.train(args_of(module, "metric", logger=f"{__name__}:Writer"))
    lines = capsys.readouterr().out.splitlines()
    for tag in ("Loss/max_ratio", "Policy/action_rms"):
        kind, name = tag.split("/")
        values = [metrics[tag] for metrics in history]
        assert values == [Writer.made[-1].scalars[tag, iteration] for iteration in range(3)] and min(values) > 0.0
        assert all(any(line.startswith(f"  {kind} ") and f"{name} {x:.4g}" in line for line in lines) for x in values)


def test_every_epoch_reads_other_mini_batches(edited, monkeypatch):
    """And each reads every sample once."""
    module, seen = edited("mini_batches_anew"), []
    step = module.mini_batch_step
    spy = lambda agent, batch, args: seen.append(batch["log_prob"].tolist()) or step(agent, batch, args)
    monkeypatch.setattr(module, "mini_batch_step", spy)
    module.train(args_of(module, "mini_batches_anew", max_iterations=1))
    epochs = [seen[start : start + 4] for start in range(0, 20, 4)]
    assert len({str(sorted(sum(batches, []))) for batches in epochs}) == 1
    assert len({str(sorted(batches[0])) for batches in epochs}) == 5


# What goes wrong while one edits says so

ACT = '    write(row, values=agent.critic(row["obs"]).squeeze(-1))\n'
STORAGE = "    start = load(agent, env, storage, args)\n"
PARTS = "    parameters = list(nn.ModuleList([actor, critic]).parameters())  # of a ModuleList: shared ones come once\n"
COLLECT = "    return metrics | episode_metrics(storage[:-1])\n"
LOSS = '    return loss, {**metrics, "clip_fraction": clip_fraction, "mean_std": policy.stddev.mean()}\n'
FIELD = "    desired_kl: float = 0.01\n"
PREDICTED = '    estimated_obs: tuple[str, ...] = ("privilegd",)\n    """Groups to predict."""\n'
# (what is in the script, a line to come before it or what to stand in its place, the error and its message)
SLIPS = {
    "a row's entry is replaced": (ACT, '    row["values"] = agent.critic(row["obs"])\n', RuntimeError, "locked"),
    "a group's entry is replaced": (ACT, '    row["obs"]["policy"] = 0 * row["obs"]["policy"]\n', RuntimeError, "locked"),
    "a name that the storage has not": (ACT, '    write(row, value=row["values"])\n', KeyError, "value"),
    "a column too many": (ACT, '    write(row, values=row["obs"]["policy"])\n', ValueError, "values has the shape"),
    "a setting is assigned": (STORAGE, "    args.gamma = 0.9\n", FrozenInstanceError, "gamma"),
    "a default that is no choice": ('"fixed"] = "adaptive"', '"fixed"] = "adaptve"', ValueError, "--schedule adaptve: choose"),
    "a metric without a kind": (COLLECT, '    metrics["rms"] = storage["actions"].std()\n', ValueError, "metric rms"),
    "a metric that is no number": (COLLECT, '    metrics["Train/x"] = storage["actions"]\n', ValueError, "metric Train/x"),
    "a metric on the host": (COLLECT, '    metrics["Train/x"] = 1.0\n', ValueError, "metric Train/x is 1.0"),
    "a group that nobody reads": (LOSS, '    metrics["x"] = batch["obs"]["privileged"].mean()\n', KeyError, "privileged"),
    "a network that no optimizer has": (
        PARTS,
        "    agent.second = nn.Linear(2, 1)\n",
        ValueError,
        "agent.second.weight is in no",
    ),
    "a group that there is not": (FIELD, PREDICTED, ValueError, r"--estimated-obs \('privilegd',\)"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_an_error(slip, tmp_path):
    old, new, error, message = SLIPS[slip]
    assert BASE.read_text().count(old) == 1, "the line to be changed is another by now"
    (tmp_path / BASE.name).write_text(BASE.read_text().replace(old, new + old if new.endswith("\n") else new))
    module = load(tmp_path / BASE.name)
    with pytest.raises(error, match=message):
        module.train(module.Args(**TINY, log_root=""))


@pytest.mark.parametrize("settings", [dict(schedule="adaptve"), dict(distribution="normal"), dict(timeout_bootstrap="values")])
def test_a_misspelt_choice_is_an_error_from_python_too(settings):
    ((name, value),) = settings.items()
    module = load(BASE)
    with pytest.raises(module.UserError, match=f"--{name.replace('_', '-')} {value}: choose from"):
        module.train(module.Args(**TINY, log_root="", **settings))


if __name__ == "__main__":
    command, *names = sys.argv[1:]
    for name in names or LIMITS:
        folder = pathlib.Path(name)
        folder.mkdir(exist_ok=True)
        if command == "apply":
            apply(name, folder, "--reject")
            continue
        texts = [path.read_text().splitlines(keepends=True) for path in (BASE, folder / BASE.name)]
        diff = difflib.unified_diff(*texts, f"a/{BASE.name}", f"b/{BASE.name}", n=2)
        (EDITS / f"{name}.diff").write_text("".join(diff))
