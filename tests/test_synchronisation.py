"""A steady-state iteration never waits: no host read in rollout, GAE and update, one at its end; and it can be captured."""

import contextlib
import subprocess
import sys
import types
import warnings

import cases
import instruments
import pytest
import torch


def small(module, **settings):
    return module.Args(**(cases.SMALL | dict(num_envs=16, max_iterations=6, timeout_bootstrap="final_obs") | settings))


@pytest.mark.parametrize("env_id", ["cartpole", "quadruped", "quadruped-rough"])
def test_no_waiting_inside_the_iteration(env_id, monkeypatch):
    import ppo_continuous as module
    from envs import make

    operations, reads, seen = instruments.Operations(), [], []

    def watched(function):
        def call(*args):
            seen.append(function.__name__)
            with instruments.host_reads() as counts, operations:
                result = function(*args)
            reads.append(counts)
            return result

        return call

    for name in ("collect", "update"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    args = small(module, critic_obs=("policy", "privileged") if "quadruped" in env_id else ("policy",))
    module.train(args, make(env_id, args.num_envs))
    assert seen == ["collect", "update"] * args.max_iterations
    assert not operations.waits and not sum(reads, start=type(reads[0])()), (operations.waits, reads)


def test_one_read_at_the_end_of_an_iteration(monkeypatch):
    import ppo_continuous as module
    from envs import make

    counts_per_iteration = []
    fetch = module.fetch

    def watched(metrics):
        with instruments.host_reads() as counts:
            fetched = fetch(metrics)
        counts_per_iteration.append(dict(counts))
        return fetched

    monkeypatch.setattr(module, "fetch", watched)
    module.train(small(module), make("cartpole", 16))
    assert counts_per_iteration == [{"tolist": 1}] * 6


def count_calls(module, env_id, names, monkeypatch, **settings) -> dict[str, instruments.Operations]:
    """Kernels and copied bytes of one call of each of these functions, in the last iteration of a run."""
    from envs import make

    counted = {}

    def counting(name, function):
        def call(*args):
            counted[name] = instruments.Operations()
            with counted[name]:
                return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    args = small(module, max_iterations=2, **settings)
    module.train(args, make(env_id, args.num_envs))
    return counted


def test_kernels_of_each_part(monkeypatch):
    """What a machine cannot change: how much is launched, and copied, for an env step, the advantages and a mini-batch."""
    import ppo_continuous as module

    counted = count_calls(module, "cartpole", ("act", "compute_gae", "mini_batch_step", "bootstrap_value"), monkeypatch)
    kernels = {name: sum(operations.kernels.values()) for name, operations in counted.items()}
    budget = {"act": 27, "bootstrap_value": 13, "compute_gae": 63, "mini_batch_step": 183}  # with two hidden layers
    assert all(kernels[name] <= most for name, most in budget.items()), kernels
    # No sample is copied: mini-batches are slices. What is copied are norms, the learning rate, the step count, a mask (B,).
    batch = 16 * 24 // 4
    assert counted["mini_batch_step"].copied <= 4 * batch + 200, counted["mini_batch_step"].copied


def test_kernels_against_the_reference():
    """At most two thirds of what rsl_rl launches on a CPU, where its Adam loops over the parameters; a third of what it
    launches with the foreach Adam that it has on a GPU, if the gradient step is compiled."""
    pytest.importorskip("rsl_rl")
    sys.path.append(str(instruments.TESTS / "benchmarks"))
    import speed

    figures = speed.count(speed.Settings(hidden_dims=(8, 8, 8)))
    ours, reference = figures["ours"], figures["rsl_rl, looping Adam"]
    assert ours["kernels"] <= 2 / 3 * reference["kernels"], figures
    assert figures["ours, compiled"]["kernels"] <= 1 / 3 * figures["rsl_rl, foreach Adam"]["kernels"], figures
    assert ours["waits"] == 0 < reference["waits"], figures
    assert ours["megabytes"] <= 1.3 * figures["rsl_rl, foreach Adam"]["megabytes"], figures


FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import ppo_continuous as script

faults, summarize = [], script.summarize

def count(*arguments):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return summarize(*arguments)

script.summarize = count
settings = dict(actor_hidden_dims=(256, 128), critic_hidden_dims=(256, 128), num_envs=512, max_iterations=8, num_threads=1)
script.train(script.Args(env="cartpole", log_root="", device="cpu", **settings))
print(faults[-1] - faults[-5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux")
def test_freed_memory_is_used_again():
    """Four iterations of a usual run fault hardly a page; by glibc's own thresholds they fault tens of thousands."""
    command = [sys.executable, "-c", FAULTS, str(instruments.TESTS.parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 2000, run.stdout


def test_the_instruments_see_a_wait():
    x = torch.arange(4.0)
    for wait in (lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x.sum() > 1), lambda: x.nonzero(), lambda: x.tolist()):
        with instruments.host_reads() as counts, instruments.Operations() as operations:
            wait()
        assert counts or operations.waits
    x[torch.tensor([0, 2])]  # an index by position does not wait


@pytest.mark.parametrize("script, env_id, settings", cases.EVERYWHERE)
def test_on_a_device_other_than_the_cpu(script, env_id, settings, monkeypatch):
    """torch's `meta` device has shapes and no numbers. A tensor left on the CPU meets one of its own and raises, and so does
    any read: `.item()`, `.cpu()`, a mask as an index. What is left to the host is one `fetch` per iteration."""
    from envs import make

    module, seen = __import__(script), []
    if script == "distill_dagger":
        cases.write_teacher("teacher.pt", make(env_id, 1))
        settings = settings | dict(teacher=("teacher.pt",))
    monkeypatch.setattr(
        torch, "Generator", lambda device: types.SimpleNamespace(manual_seed=lambda seed: None)
    )  # none for meta
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not for meta
    for check in ("check_images", "check_step"):  # of a symmetry, read once before the training
        monkeypatch.setattr(module, check, lambda *_: None, raising=False)

    def fetch(metrics):
        seen.append({name: value.device.type for name, value in metrics.items() if torch.is_tensor(value)})
        return {name: 1.0 for name in metrics}

    monkeypatch.setattr(module, "fetch", fetch)
    module.train(module.Args(env=env_id, device="meta", **cases.SHORT, max_iterations=2, **settings))
    assert len(seen) == 2 and all(set(devices.values()) == {"meta"} for devices in seen), seen


@pytest.mark.parametrize("capturable", [True, False], ids=["whole rollout captured", "policy step captured"])
@pytest.mark.parametrize("env_id", ["cartpole", "quadruped"])
def test_captured_run_equals_eager_run(env_id, capturable, monkeypatch):
    """Replaying the recorded kernels on the recorded memory gives the eager run's numbers, to the bit."""
    import ppo_continuous as module
    from envs import make

    args = small(module, critic_obs=("policy", "privileged") if "quadruped" in env_id else ("policy",), num_mini_batches=2)
    eager, agent = cases.run(module, args, make(env_id, args.num_envs))

    def graph(fn, *arguments, **_):
        on = fn.__name__ == "update" or (fn.__name__ == "collect") == capturable
        return instruments.EmulatedGraph(fn, *arguments) if on else lambda: fn(*arguments)

    monkeypatch.setattr(module, "CudaGraph", graph)
    replayed, replayed_agent = cases.run(module, args, make(env_id, args.num_envs))
    for ours, theirs in zip(replayed, eager, strict=True):
        ours, theirs = ({k: v for k, v in history.items() if "Perf" not in k} for history in (ours, theirs))
        assert str(ours) == str(theirs)  # as text, so that NaN equals NaN
    for ours, theirs in zip(replayed_agent["actor"].state_dict().values(), agent["actor"].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("waits", [True, False])
def test_what_waits_is_not_captured(waits, monkeypatch, capsys):
    """The second call is watched: a function that waits is named with its line, and goes on without a graph. torch's debug
    mode knows CUDA only, so here the function itself warns; tests/test_cuda.py has the real one."""
    import ppo_continuous as module

    def record(graph):
        graph.graph, graph.result = types.SimpleNamespace(replay=lambda: None), "replayed"

    def rollout():
        if waits and modes[-1] == "warn":
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:147.)", stacklevel=1
            )
        return "called"

    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(module.CudaGraph, "record", record)
    graph = module.CudaGraph(rollout, enabled=True)
    assert [graph() for _ in range(4)] == ["called", "called"] + ["called" if waits else "replayed"] * 2
    assert modes == ["default", "warn", "default"]
    line = f"rollout runs without a CUDA graph, since {__file__}:{rollout.__code__.co_firstlineno + 2} waits for the device\n"
    assert capsys.readouterr().out == (line if waits else "")
