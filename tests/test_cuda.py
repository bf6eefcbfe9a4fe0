"""On a GPU: a captured run against an eager one, no host wait, one launch for an update, memory. Skipped where there is none.

A CPU holds the same rules by other means: test_synchronisation.py trains on torch's meta device and replays recorded kernels.
"""

import math

import cases
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


def around(function, before, after):
    def call():
        before()
        try:
            return function()
        finally:
            after()

    return call


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
    module = __import__(script)
    capture, debug = module.capture, torch.cuda.set_sync_debug_mode

    def watched(*args):
        return tuple(around(f, lambda: debug("error"), lambda: debug("default")) for f in capture(*args))

    monkeypatch.setattr(module, "capture", watched)
    assert len(train(script, env_id, settings, cuda_graphs=False)) == 5  # recording a graph itself may wait


@pytest.mark.parametrize("part", ["collect", "update"])
def test_one_graph_launch(part, monkeypatch):
    import ppo_continuous as module

    capture, launches = module.capture, []

    def watched(*args):
        def profiled(function):
            def call():
                with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
                    result = function()
                names = [event.name for event in profile.events()]
                launches.append((names.count("cudaGraphLaunch"), names.count("cudaLaunchKernel")))
                return result

            return call

        collect, update = capture(*args)
        return (profiled(collect), update) if part == "collect" else (collect, profiled(update))

    monkeypatch.setattr(module, "capture", watched)
    train("ppo_continuous", "quadruped", {})
    # A graph that draws also sets the seed and the offset of each of its two random streams.
    assert launches[0][1] > 100 and launches[-1] in ([(1, 4)] if part == "collect" else [(1, 0)]), launches


def test_a_nan_leaves_the_weights(monkeypatch):
    """Also where the iteration that goes wrong is a replay."""
    import ppo_continuous as module

    env, args = make("cartpole", 16, device="cuda"), module.Args(env="cartpole", device="cuda", **cases.SHORT, max_iterations=9)
    agent, fetch, calls, weights = {}, module.fetch, [], []
    tensors_of = module.tensors_of
    monkeypatch.setattr(module, "tensors_of", lambda parts: agent.update(parts) or tensors_of(parts))

    def spoil(metrics):
        calls.append(1)
        if len(calls) == 4:  # what the next rollout starts from
            weights.extend(p.detach().clone() for p in agent["actor"].parameters())
            for value in vars(env).values():
                if torch.is_tensor(value) and value.is_floating_point():
                    value.fill_(math.nan)
        return fetch(metrics)

    monkeypatch.setattr(module, "fetch", spoil)
    with pytest.raises(FloatingPointError, match="iteration 4"):
        module.train(args, env)
    assert all(torch.equal(p, before) for p, before in zip(agent["actor"].parameters(), weights, strict=True))


def test_what_waits_is_not_captured(capsys):
    import ppo_continuous as module

    x, y = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")

    def waits():
        return y.add_(x.item()).clone()

    def never():
        return y.add_(x).clone()

    for function in (waits, never):
        graph = module.CudaGraph(function, enabled=True)
        for _ in range(4):
            graph()
        assert (graph.graph is None) == (function is waits)
    line = f"waits runs without a CUDA graph, since {__file__}:{waits.__code__.co_firstlineno + 1} waits for the device\n"
    assert y.item() == 8.0 and capsys.readouterr().out == line


def test_memory_against_the_reference():
    pytest.importorskip("rsl_rl")
    import reference

    import ppo_continuous as module

    args = module.Args(
        env="quadruped", num_envs=4096, max_iterations=4, device="cuda", log_root="", timeout_bootstrap="reference"
    )
    args.actor_obs, args.critic_obs = ("policy",), ("policy", "privileged")

    def peak(function) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()

    theirs = peak(lambda: reference.make_runner(args, make(args.env, 4096, device="cuda"), device="cuda").learn(4))
    assert peak(lambda: module.train(args)) <= 1.3 * theirs
