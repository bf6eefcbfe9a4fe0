"""On a GPU: a captured run against an eager one, no host wait, one launch for an update, memory. Skipped where there is none.

A CPU holds the same rules by other means: test_synchronisation.py trains on torch's meta device and replays recorded kernels.
"""

import math
import subprocess
import sys

import cases
import instruments
import pytest
import torch

from envs import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EVERYWHERE = pytest.mark.parametrize("script, env_id, settings", cases.EVERYWHERE)
NUMBERS = ("Loss/", "Policy/", "Rnd/", "Train/")


def train(script, env_id, settings, **more):
    """Two eager iterations, the one that captures, two that replay."""
    module = __import__(script)
    if script == "distill_dagger":
        cases.write_teacher("teacher.pt", make(env_id, 1))
        settings = settings | dict(teacher=("teacher.pt",))
    return module.train(module.Args(env=env_id, device="cuda", **(cases.SHORT | dict(max_iterations=5) | settings | more)))


@EVERYWHERE
def test_captured_run_equals_eager_run(script, env_id, settings):
    """The same kernels on the same random numbers; a thousandth is for what cuBLAS may choose otherwise inside a graph."""
    captured = train(script, env_id, settings)
    eager = train(script, env_id, settings, cuda_graphs=False)
    for ours, expected in zip(captured[:4], eager[:4], strict=True):
        for tag in expected:
            if tag.startswith(NUMBERS) and not math.isnan(expected[tag]):
                assert ours[tag] == pytest.approx(expected[tag], rel=1e-3, abs=1e-5), tag


@EVERYWHERE
def test_nothing_waits(script, env_id, settings, monkeypatch):
    """From where the training starts on: only `to_host` may, once per iteration."""
    module, debug = __import__(script), torch.cuda.set_sync_debug_mode
    graphed, to_host, reads = module.graphed, module.to_host, []

    def watched_from_here(*args):
        debug("error")
        return graphed(*args)

    def reading(metrics):
        debug("default")
        reads.append(1)
        numbers = to_host(metrics)
        debug("error")
        return numbers

    monkeypatch.setattr(module, "graphed", watched_from_here)
    monkeypatch.setattr(module, "to_host", reading)
    try:
        train(script, env_id, settings, cuda_graphs=False)  # recording a graph itself may wait
    finally:
        debug("default")
    assert len(reads) == 5


@pytest.mark.parametrize("part", ["collect", "update"])
def test_one_graph_launch(part, monkeypatch):
    import ppo_continuous as module

    graphed, launches = module.graphed, []

    def watched(*args):
        def profiled(function):
            def call(*arguments):
                with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
                    result = function(*arguments)
                names = [event.name for event in profile.events()]
                launches.append((names.count("cudaGraphLaunch"), sum("LaunchKernel" in name for name in names)))
                return result

            return call

        collect, act, update = graphed(*args)
        return (profiled(collect), act, update) if part == "collect" else (collect, act, profiled(update))

    monkeypatch.setattr(module, "graphed", watched)
    train("ppo_continuous", "quadruped", {})
    # A graph that draws also sets the seed and the offset of each of its two random streams.
    assert launches[0][1] > 100 and launches[-1] in ([(1, 4)] if part == "collect" else [(1, 0)]), launches


def test_a_nan_leaves_the_last_good_weights(monkeypatch, tmp_path):
    """In the checkpoint of the iteration before, also where the one that goes wrong is a replay."""
    import ppo_continuous as module

    settings = cases.SHORT | dict(max_iterations=9, log_root=str(tmp_path), logger="none")
    env, args = make("cartpole", 16, device="cuda"), module.Args(env="cartpole", device="cuda", **settings)
    agents, make_agent, to_host, calls, weights = [], module.make_agent, module.to_host, [], []

    def keep(*arguments):
        agents.append(make_agent(*arguments))
        return agents[-1]

    def spoil(metrics):
        calls.append(1)
        if len(calls) == 4:  # what the next rollout starts from
            weights.extend(p.detach().clone() for p in agents[0].actor.state_dict().values())
            for value in vars(env).values():
                if torch.is_tensor(value) and value.is_floating_point():
                    value.fill_(math.nan)
        return to_host(metrics)

    monkeypatch.setattr(module, "make_agent", keep)
    monkeypatch.setattr(module, "to_host", spoil)
    with pytest.raises(FloatingPointError, match="iteration 4"):
        module.train(args, env)
    saved = torch.load(next(tmp_path.rglob("model_3.pt")), map_location="cuda", weights_only=True)["actor_state_dict"]
    assert all(torch.equal(x, before) for x, before in zip(saved.values(), weights, strict=True))


def test_what_waits_is_not_captured(capsys):
    import ppo_continuous as module

    x, y = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")

    def waits():
        return y.add_(x.item()).clone()

    def never():
        return y.add_(x).clone()

    for function in (waits, never):
        graph = module.Graphed(function, torch.cuda.graph_pool_handle())
        results = [graph() for _ in range(4)]
        assert len(graph.graphs) == (function is never)
    where = f"{__file__}:{waits.__code__.co_firstlineno + 1} waits for the device"
    said = capsys.readouterr().out
    assert (
        results[-1].item() == y.item() == 8.0 and said.startswith(f"waits is no CUDA graph: {where}") and said.count("\n") == 1
    )


FORBIDDEN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import ppo_continuous as script

def rollout(x):
    torch.cuda.synchronize()  # which the debug mode does not see
    return x + 1

graph, x = script.Graphed(rollout, torch.cuda.graph_pool_handle()), torch.ones(1, device="cuda")
try:
    for _ in range(4):
        graph(x)
except script.UserError as error:
    print(error)
"""


def test_what_cannot_be_recorded_is_an_error(tmp_path):
    """In a process of its own, since torch cannot go on."""
    path = tmp_path / "forbidden.py"
    path.write_text(FORBIDDEN)
    run = subprocess.run([sys.executable, path, instruments.TESTS.parent], capture_output=True, text=True)
    said = run.stdout.strip().splitlines()[-1:]
    assert said and said[0].startswith(f"--cuda-graphs: stopped by {path}:8 ("), (run.stdout, run.stderr)
    assert said[0].endswith("; use --no-cuda-graphs")


def test_memory_against_the_reference():
    pytest.importorskip("rsl_rl")
    import reference

    import ppo_continuous as module

    args = module.Args(
        env="quadruped", num_envs=4096, max_iterations=4, device="cuda", log_root="", timeout_bootstrap="value",
        actor_obs=("policy",), critic_obs=("policy", "privileged"),
    )  # fmt: skip

    def peak(function) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()

    theirs = peak(lambda: reference.make_runner(args, make(args.env, 4096, device="cuda"), device="cuda").learn(4))
    assert peak(lambda: module.train(args)) <= 1.3 * theirs
