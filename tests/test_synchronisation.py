"""A steady-state iteration never waits: no host read in rollout, GAE and update, one at its end; and it can be captured."""

import contextlib
import dataclasses
import math
import subprocess
import sys
import types
import warnings

import cases
import instruments
import pytest
import torch
from tensordict import TensorDict

import ppo_continuous as module
from envs import make

ASYMMETRIC = dict(critic_obs=("policy", "privileged"))


def small(env_id="cartpole", **settings):
    settings = dict(num_envs=16, max_iterations=6, timeout_bootstrap="final_obs") | settings
    settings |= ASYMMETRIC if "quadruped" in env_id else {}
    return module.Args(env=env_id, device="cpu", **(cases.SMALL | settings))


def make_env(args):
    return make(args.env, args.num_envs, seed=args.seed)


@pytest.mark.parametrize("env_id", ["cartpole", "quadruped", "quadruped-rough"])
def test_one_wait_per_iteration(env_id, monkeypatch):
    """From one `to_host` to the next, environment, optimizer and log included: all that the host reads is that list."""
    operations, seen, to_host = instruments.Operations(), [], module.to_host
    with instruments.host_reads() as reads, instruments.fused_optimizer(module), operations:

        def watched(metrics):
            numbers = to_host(metrics)
            seen.append((dict(reads), dict(operations.waits)))
            reads.clear(), operations.waits.clear()
            return numbers

        monkeypatch.setattr(module, "to_host", watched)
        module.train(small(env_id, max_iterations=4), make_env(small(env_id)))
    assert seen[1:] == [({"tolist": 1}, {})] * 3, seen


def test_metrics_that_cannot_be_read_at_once_are_refused():
    """Before anything waits: a number, a vector, a name without its kind."""
    for metrics in ({"Loss/x": 1.0}, {"Loss/x": torch.ones(2)}, {"x": torch.ones(())}):
        with pytest.raises(module.UserError, match="metric"):
            module.to_host({"Loss/good": torch.ones(())} | metrics)


def count_calls(env_id, names, monkeypatch, **settings) -> dict[str, instruments.Operations]:
    """Kernels and copied bytes of one call of each of these functions, in the last iteration of a run."""
    counted = {}

    def counting(name, function):
        def call(*args):
            counted[name] = instruments.Operations()
            with counted[name]:
                return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    args = small(env_id, max_iterations=2, **settings)
    with instruments.fused_optimizer(module):
        module.train(args, make_env(args))
    return counted


def test_kernels_of_each_part(monkeypatch):
    """What a machine cannot change: how much is launched, and copied, for an env step, the advantages and a mini-batch."""
    budget = {"act": 37, "timeout_value": 13, "compute_gae": 106, "make_batches": 14, "mini_batch_step": 192}
    counted = count_calls("cartpole", budget, monkeypatch)  # with two hidden layers
    kernels = {name: sum(operations.kernels.values()) for name, operations in counted.items()}
    assert all(kernels[name] <= most for name, most in budget.items()), kernels
    # The samples are copied once per iteration, into their order: mini-batches are slices of that. Of a mini-batch only the
    # groups of observations are, into one tensor for each network; else norms, the learning rate and the step count.
    batch, size = 16 * 24 // 4, make("cartpole", 1).get_observations()["policy"].shape[1]
    assert counted["mini_batch_step"].copied <= 2 * 4 * batch * size + 100, counted["mini_batch_step"].copied


def test_kernels_against_the_reference(monkeypatch):
    """The update launches about what rsl_rl's does with the foreach Adam that it has on a GPU, and waits for none of it; and
    where networks cost nothing a training needs a third more memory: the samples are copied once, into their order."""
    pytest.importorskip("rsl_rl")
    import reference

    networks = dict(actor_hidden_dims=(8, 8, 8), critic_hidden_dims=(8, 8, 8))
    args = small(num_envs=64, max_iterations=2, timeout_bootstrap="value", **networks)
    ours, theirs = instruments.Operations(), instruments.Operations()

    def counted(operations, function):
        def call(*arguments):
            operations.kernels.clear(), operations.waits.clear()  # of the last iteration
            with operations:
                return function(*arguments)

        return call

    def train_reference(operations):
        runner = reference.make_runner(args, make_env(args))
        runner.alg.optimizer.param_groups[0]["foreach"] = True
        runner.alg.update = counted(operations, runner.alg.update)
        step = runner.alg.optimizer.step
        runner.alg.optimizer.step = lambda: outside(operations, step)  # Adam has its step counters on the host: no wait
        runner.learn(2)

    def outside(operations, step):
        waits = operations.waits.copy()
        step()
        operations.waits = waits

    train_reference(theirs)
    with instruments.fused_optimizer(module), monkeypatch.context() as patch:
        patch.setattr(module, "update", counted(ours, module.update))
        module.train(args, make_env(args))
    kernels = [sum(x.kernels.values()) for x in (ours, theirs)]
    assert kernels[0] <= 1.05 * kernels[1], (ours.kernels, theirs.kernels)
    assert not ours.waits and sum(theirs.waits.values()) >= 2 * 20, (ours.waits, theirs.waits)

    def peak(train):
        with instruments.Memory() as memory:
            train()
        return memory.peak

    args = dataclasses.replace(args, num_envs=1024, num_learning_epochs=1)
    theirs = peak(lambda: reference.make_runner(args, make_env(args)).learn(2))
    assert peak(lambda: module.train(args, make_env(args))) <= 1.4 * theirs


FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import ppo_continuous as script

faults, to_host = [], script.to_host

def count(metrics):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return to_host(metrics)

script.to_host = count
settings = dict(actor_hidden_dims=(256, 128), critic_hidden_dims=(256, 128), num_envs=512, max_iterations=8)
script.train(script.Args(env="cartpole", log_root="", device="cpu", **settings))
print(faults[-1] - faults[-5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux")
def test_freed_memory_is_used_again():
    """Four iterations of a usual run fault 15 pages, by glibc's own thresholds 38,000. The limit lies between: the heap may
    still grow by some megabytes then, as it once did by 3,400 pages."""
    command = [sys.executable, "-c", FAULTS, str(instruments.TESTS.parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 8000, run.stdout


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
    any read: `.item()`, `.cpu()`, a mask as an index. What is left to the host is one `to_host` per iteration."""
    module, seen, stepped = __import__(script), [], []
    if script == "distill_dagger":
        cases.write_teacher("teacher.pt", make(env_id, 1))
        settings = settings | dict(teacher=("teacher.pt",))
    monkeypatch.setattr(
        torch, "Generator", lambda device: types.SimpleNamespace(manual_seed=lambda seed: None)
    )  # none for meta
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not for meta
    for check in ("check_images", "check_step"):  # of a symmetry, read once before the training
        monkeypatch.setattr(module, check, lambda *_: None, raising=False)

    make_optimizer = module.make_optimizer

    def make_one(*arguments):  # torch's asks once whether the learning rate is negative
        optimizer = make_optimizer(*arguments[:-1], "cpu")
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].to(arguments[-1])
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", make_one)

    def step(optimizer):  # torch's has nothing for meta
        for group in optimizer.param_groups:
            stepped.extend([group["lr"], *group["params"], *(p.grad for p in group["params"] if p.grad is not None)])

    for optimizer in ("Adam", "AdamW", "SGD"):
        monkeypatch.setattr(getattr(torch.optim, optimizer), "step", step)

    def to_host(metrics):
        seen.append({name: value.device.type for name, value in metrics.items()})
        return {name: 1.0 for name in metrics}

    monkeypatch.setattr(module, "to_host", to_host)
    module.train(module.Args(env=env_id, device="meta", **cases.SHORT, max_iterations=2, **settings))
    assert len(seen) == 2 and all(set(devices.values()) == {"meta"} for devices in seen), seen
    assert {x.device.type for x in stepped} == {"meta"}


@pytest.mark.parametrize("whole", [True, False], ids=["whole rollout captured", "policy step captured"])
@pytest.mark.parametrize("env_id", ["cartpole", "quadruped"])
def test_captured_run_equals_eager_run(env_id, whole):
    """Replaying the recorded kernels on the recorded memory gives the eager run's numbers, to the bit."""
    args = small(env_id, num_mini_batches=2)
    instruments.check_replay(module, args, lambda: make_env(args), whole)


def test_an_emulated_graph_sees_what_a_graph_would_not():
    """A tensor that is bound anew, numbers of a random stream that the graph does not know, a wait; but not a tensor whose
    memory changed hands while it recorded."""
    x, y, stream = torch.zeros(1), types.SimpleNamespace(t=torch.zeros(1)), torch.Generator()

    def rebound():
        y.t = y.t + 1
        return y.t.clone()

    def handed_over():
        z = x.add_(1).clone().detach()
        z.data = 2 * z
        return z + 0

    def results(function):
        x.zero_()
        with instruments.emulated_cuda():
            graph = module.Graphed(function, None)
            return [graph().item() for _ in range(5)]

    assert results(rebound) == [1, 2, 3, 4, 4]
    assert results(lambda: x.add_(1).clone()) == [1, 2, 3, 4, 5] and results(handed_over) == [2, 4, 6, 8, 10]
    for function, reason in [
        (lambda: torch.rand(1, generator=stream), "this generator is not registered"),
        (lambda: torch.randperm(1), "no permutation is drawn in a graph"),
    ]:
        with pytest.raises(module.UserError, match=f"stopped by .*{reason}"):
            results(function)
    with instruments.Forbid():
        for wait in (lambda: x[x > 1], lambda: x.item(), lambda: bool(x), lambda: x.nonzero(), lambda: torch.tensor(1.0)):
            with pytest.raises(RuntimeError, match="would wait"):
                wait()
    assert x.item() == 0.0


# ---- Graphed, with stand-ins for what it asks of torch.cuda; tests/test_cuda.py has the real ones ----


class Thing:
    """An argument of a captured function; `run` counts the calls that are calls and no replays."""

    def __init__(self, value=0.0):
        self.calls, self.x = [], torch.tensor(value)

    def run(self, *numbers, args=None):
        self.calls.append(numbers)
        return self.x.add_(1.0).clone()


def thing_step(thing, *rest):
    return thing.run(*(x for x in rest if isinstance(x, int)))


def test_a_graph_is_called_rehearsed_recorded_and_replayed():
    with instruments.emulated_cuda() as cuda:
        thing, graph = Thing(), module.Graphed(thing_step, None)
        for call, launches in enumerate([[], [], [], [1], [2], [3]], start=1):
            assert graph(thing).item() == call and [x.launches for x in cuda.graphs] == launches
            assert cuda.modes.count("warn") == min(call - 1, 2) and cuda.modes[-1] == "default"
    assert len(thing.calls) == 4


def test_each_number_has_a_graph_of_its_own():
    with instruments.emulated_cuda() as cuda:
        thing, graph = Thing(), module.Graphed(lambda thing, t: thing.x.add_(10.0**t).clone(), None)
        results = [[graph(thing, t).item() for t in range(2)] for _ in range(5)]
    assert results == [[11 * call + 1, 11 * call + 11] for call in range(5)]
    assert [x.launches for x in cuda.graphs] == [2, 2]


def test_a_graph_is_never_stale():
    """Another object, or other settings: it begins anew; equal settings are the same."""
    args = module.Args()
    with instruments.emulated_cuda() as cuda:
        graph, first, second = module.Graphed(thing_step, None), Thing(), Thing(100.0)
        assert [graph(first, dataclasses.replace(args)).item() for _ in range(5)] == [1, 2, 3, 4, 5] and len(cuda.graphs) == 1
        assert [graph(second, args).item() for _ in range(5)] == [101, 102, 103, 104, 105] and len(cuda.graphs) == 2
        assert [graph(second, dataclasses.replace(args, gamma=0.5)).item() for _ in range(5)] == [106, 107, 108, 109, 110]
        assert len(second.calls) == 8 and len(cuda.graphs) == 3


def test_a_graph_knows_objects_that_are_gone():
    """What takes a freed object's place in memory has its id too, and is another object all the same."""
    with instruments.emulated_cuda():
        graph = module.Graphed(lambda thing: thing.x.add_(1.0).clone(), None)
        for _ in range(5):
            thing = Thing()
            assert [graph(thing).item() for _ in range(5)] == [1, 2, 3, 4, 5]
            del thing


def test_what_waits_is_not_captured(capsys):
    """The second call is watched: a function that waits is named with its line, once, and goes on without a graph."""

    def rollout(thing, t):
        if thing.x.item() >= 0:
            return thing.run(t)

    with instruments.emulated_cuda() as cuda:
        thing, graph = Thing(), module.Graphed(rollout, None)
        results = [[graph(thing, t).item() for t in range(2)] for _ in range(4)]
    assert results == [[2 * call + 1, 2 * call + 2] for call in range(4)] and len(thing.calls) == 8
    assert not cuda.graphs and cuda.modes == ["default", "warn", "default"]
    where = f"{__file__}:{rollout.__code__.co_firstlineno + 1}"
    assert capsys.readouterr().out == f"rollout is no CUDA graph: {where} waits for the device\n"


@pytest.mark.parametrize("kind", ["counter", "sum", "keyword"])
def test_a_number_that_changes_is_not_captured(kind, capsys):
    """The graph would go on with the number of its recording: the line is named, and the function goes on without a graph."""
    thing, x, count = Thing(), torch.zeros(1), [0]

    def rollout(thing):
        thing.run()
        count[0] += 1
        if kind == "sum":
            return x + sum(count)
        return torch.add(x, 1.0, alpha=count[0]) if kind == "keyword" else count[0] * torch.ones(1)

    with instruments.emulated_cuda() as cuda:
        graph = module.Graphed(rollout, None)
        assert [graph(thing).item() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    line = rollout.__code__.co_firstlineno + (4 if kind == "sum" else 5)
    said = f"rollout is no CUDA graph: {__file__}:{line} has another number in each call; keep it in a tensor on the device\n"
    assert capsys.readouterr().out == said and not cuda.graphs


def test_a_number_in_a_tensor_of_the_host_is_one():
    """As an environment may keep it, for what lives on a device: a kernel gets its value. One that stays is none's harm."""
    x = torch.zeros(1, device="meta")
    for values, found in (((1.0, 2.0), True), ((1.0, 1.0), False), ((math.nan, math.nan), False)):
        seen = ()
        for value in values:
            with module.Numbers(seen) as numbers:
                x.mul(torch.tensor(value))
            seen = numbers.seen
        assert bool(numbers.changed) == found, values


def test_what_waits_in_a_package_is_named_by_the_line_that_called_it(capsys):
    """And other warnings are no waits."""

    def rollout(thing, rows):
        warnings.warn("this is old")  # noqa: B028
        return rows[rows["done"]]

    thing, rows = Thing(), TensorDict(done=torch.tensor([True, False]), batch_size=[2])
    with instruments.emulated_cuda():
        graph = module.Graphed(rollout, None)
        assert [len(graph(thing, rows)) for _ in range(2)] == [1, 1]
    assert f"{__file__}:{rollout.__code__.co_firstlineno + 2} waits" in capsys.readouterr().out
    with instruments.emulated_cuda():
        graph = module.Graphed(lambda thing: warnings.warn("this is old") or thing.run(), None)  # noqa: B028
        assert [graph(thing).item() for _ in range(5)] == [1, 2, 3, 4, 5] and len(thing.calls) == 4


def test_what_cannot_be_recorded_is_an_error():
    """After a recording that failed torch cannot go on, so the line and the flag are named."""
    with instruments.emulated_cuda() as cuda:

        def rollout(thing):
            if len(thing.calls) == 3:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return thing.run()

        thing, graph = Thing(), module.Graphed(rollout, None)
        graph(thing), graph(thing), graph(thing)
        where = f"{__file__}:{rollout.__code__.co_firstlineno + 2}"
        reason = "RuntimeError: operation not permitted when stream is capturing"
        with pytest.raises(module.UserError) as error:
            graph(thing)
    assert str(error.value) == f"--cuda-graphs: stopped by {where} ({reason}); use --no-cuda-graphs" and cuda.modes[-1] == "default"


def test_another_error_keeps_its_kind_and_leaves_the_debug_mode():
    def broken(thing):
        return {}[thing.run().dim()]  # not what a graph forbids

    with instruments.emulated_cuda() as cuda:
        thing, graph = Thing(), module.Graphed(broken, None)
        for _ in range(4):
            with pytest.raises(KeyError):
                graph(thing)
            assert cuda.modes[-1] == "default"
    assert "warn" in cuda.modes and len(cuda.graphs) == 1


def test_a_graph_knows_the_random_stream_of_its_arguments():
    with instruments.emulated_cuda() as cuda:
        env, graph = types.SimpleNamespace(generator=torch.Generator()), module.Graphed(lambda env: torch.zeros(1), None)
        for _ in range(4):
            graph(env)
    assert [x.generators for x in cuda.graphs] == [[env.generator._cdata]]


def test_what_is_captured_of_a_training():
    """All of the rollout where the environment's own class says so; a subclass and a wrapper have to say it themselves."""

    class Capturable:
        capturable = True

    class Subclass(Capturable):
        pass

    class Simulator:
        pass

    def captured(env, **settings):
        with instruments.emulated_cuda():
            functions = module.graphed(module.Args(**settings), env, module.collect, module.act, module.update)
        assert [getattr(f, "fn", f) for f in functions] == [module.collect, module.act, module.update]
        return [f.fn.__name__ for f in functions if isinstance(f, module.Graphed)]

    for device in ("cuda", "cuda:1"):
        assert captured(Capturable(), device=device) == ["collect", "update"]
        assert captured(Subclass(), device=device) == captured(Simulator(), device=device) == ["act", "update"]
    assert captured(Capturable(), device="cuda", cuda_graphs=False) == captured(Capturable(), device="cpu") == []
