"""Instruments that work on a CPU: what a script would wait for on a GPU, and what a CUDA graph would replay."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
import traceback
import types
import warnings
import weakref
from collections import Counter
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

TESTS = pathlib.Path(__file__).resolve().parent
WAITING = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "item", "equal", "is_nonzero"}
HOST_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
HOST_ONLY = {"_local_scalar_dense", "item", "is_nonzero"}
VIEWS_BY_SCHEMA = {"detach", "lift_fresh", "alias"}


COPIES = {"copy_", "clone", "_to_copy", "index", "cat", "stack", "_foreach_copy_"}


class Operations(TorchDispatchMode):
    """Counts ATen calls ("kernels": views and host reads left out, a foreach call is one), bytes copied, and host waits."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.copied = Counter(), Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        with self:  # a composite operation reaches a mode whole under inference_mode, and in parts without it
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        result = func(*args, **(kwargs or {}))
        if not is_view(func) and name not in HOST_ONLY and not name.startswith("profiler::"):
            self.kernels[name] += 1
        if name in COPIES and torch.is_tensor(result):
            self.copied += result.numel() * result.element_size()
        if waits(func, args):
            self.waits[name] += 1
        return result


class Memory(TorchDispatchMode):
    """Bytes of all tensors alive at once: `peak` is the most that there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0  # by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def waits(func, args) -> bool:
    """Whether a GPU would have to be waited for: a value is read, or the shape of the result depends on one."""
    name = func._schema.name.removeprefix("aten::")
    masks = [x for x in (args[1] if name in ("index", "index_put_", "index_put") else []) if x is not None]
    return name in WAITING or any(x.dtype in (torch.bool, torch.uint8) for x in masks)


def is_view(func) -> bool:
    name = func._schema.name.removeprefix("aten::")
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return aliases or name in VIEWS_BY_SCHEMA or name in ("_unsafe_view", "unbind", "split", "view", "empty", "empty_like")


@contextlib.contextmanager
def host_reads():
    """Count the Tensor methods that bring a value to the host and never reach the dispatcher on a CPU."""
    counts, originals = Counter(), {name: getattr(torch.Tensor, name) for name in HOST_METHODS}

    def counted(name):
        def method(self, *args, **kwargs):
            counts[name] += 1
            return originals[name](self, *args, **kwargs)

        return method

    for name in HOST_METHODS:
        setattr(torch.Tensor, name, counted(name))
    try:
        yield counts
    finally:
        for name, method in originals.items():
            setattr(torch.Tensor, name, method)


class Forbid(TorchDispatchMode):
    """In here whatever would wait for a GPU raises, as in a capture, or (`warn`) as under torch.cuda.set_sync_debug_mode."""

    warn = False

    def found(self, name):
        if not self.warn:
            raise RuntimeError(f"{name} would wait for the device")
        warnings.warn("called a synchronizing CUDA operation")  # noqa: B028  (whoever hears it looks at the stack)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if waits(func, args) or name == "lift_fresh":  # torch.tensor on CUDA copies from the host
            self.found(name)
        result = func(*args, **(kwargs or {}))
        self.launched(func, args, kwargs or {}, result)
        return result

    def launched(self, *call):
        pass

    def __enter__(self):
        originals = {name: getattr(torch.Tensor, name) for name in HOST_METHODS}

        def refuse(x, name, *args, **kwargs):
            self.found(f"Tensor.{name}")
            return originals[name](x, *args, **kwargs)

        self.patches = contextlib.ExitStack()
        for name in HOST_METHODS:
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, functools.partialmethod(refuse, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)


class EmulatedGraph(Forbid):
    """Stands in for torch.cuda.CUDAGraph on a CPU: keeps the kernels that it records, and replays them on the same memory.

    Like a CUDA graph it knows tensors by their memory and numbers by their value at recording: whatever a function keeps in
    Python (a counter, a rebound tensor, a branch on a value) is frozen, and the replayed run departs from the eager one. It
    knows no random stream but torch's own and those that are registered.
    """

    def __init__(self):
        super().__init__()
        self.tape, self.generators, self.launches = [], [], 0

    def register_generator_state(self, generator):
        self.generators.append(generator._cdata)

    def launched(self, func, args, kwargs, result):
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in self.generators:
            raise RuntimeError("this generator is not registered with the graph that is recorded")
        if func._schema.name.startswith("aten::randperm"):
            raise RuntimeError("no permutation is drawn in a graph of ours")
        if not is_view(func):
            # What a tensor is now, whatever Python makes of the object later: `x.data = y` changes no graph.
            self.tape.append(tree_map_only(torch.Tensor, torch.Tensor.detach, (func, args, kwargs, result)))

    @torch.no_grad()
    def replay(self) -> None:
        self.launches += 1
        for func, args, kwargs, result in self.tape if self.launches > 1 else ():  # the first have run while they were recorded
            again = func(*args, **kwargs)
            old = result if isinstance(result, (tuple, list)) else [result]
            new = again if isinstance(again, (tuple, list)) else [again]
            for before, after in zip(old, new):
                if isinstance(before, torch.Tensor) and before.data_ptr() != after.data_ptr():
                    before.data.copy_(after)


@contextlib.contextmanager
def emulated_cuda():
    """What a script's `Graphed` asks of torch.cuda, on a CPU. Yields the graphs that it makes, and the debug modes it sets."""
    made, modes, warn = [], ["default"], Forbid()
    warn.warn, extract_stack = True, traceback.extract_stack

    def new_graph():
        made.append(EmulatedGraph())
        return made[-1]

    @contextlib.contextmanager
    def record(graph, pool=None, capture_error_mode="global"):
        # Composite operations reach a mode whole under inference_mode, and in parts without it. Graphs know no such mode.
        with mock.patch.object(torch, "inference_mode", lambda mode=True: contextlib.nullcontext()):
            try:
                with graph:
                    yield
            except RuntimeError:
                raise RuntimeError("the capture failed")  # noqa: B904  (so it says too; what failed is its __context__)

    def set_sync_debug_mode(mode):
        if modes[-1] == "warn" != mode:
            warn.__exit__(None, None, None)
        if mode == "warn" != modes[-1]:
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations")  # noqa: B028
            warn.__enter__()
        modes.append(mode)

    def stack_without_this_file(*options, **more):
        return [frame for frame in extract_stack(*options, **more) if frame.filename != __file__]

    scripts = [x for x in list(sys.modules.values()) if "Numbers" in vars(x)]
    stand_ins = dict(graph=record, set_sync_debug_mode=set_sync_debug_mode, graph_pool_handle=lambda: None)
    with (
        mock.patch.multiple(torch.cuda, CUDAGraph=new_graph, **stand_ins),
        mock.patch.object(traceback, "extract_stack", stack_without_this_file),
        contextlib.ExitStack() as patches,
    ):
        for script in scripts:  # here every tensor is on the host, as others are on the device
            patches.enter_context(mock.patch.object(script.Numbers, "host", None))
        yield types.SimpleNamespace(graphs=made, modes=modes)


@contextlib.contextmanager
def fused_optimizer(module):
    """The script's optimizer as it is on CUDA: fused and its learning rate in float32. torch's other ones wait on a CPU."""
    make_optimizer = module.make_optimizer

    def make(*args):
        optimizer = make_optimizer(*args)
        lr = optimizer.param_groups[0]["lr"].float()  # one for all groups
        for group in optimizer.param_groups:
            group.update(fused=True, lr=lr)
        return optimizer

    with mock.patch.object(module, "make_optimizer", make):
        yield


@contextlib.contextmanager
def emulated(module, whole: bool):
    """A script trains on a CPU as it does on CUDA, by its own `graphed` and `Graphed`: update and, `whole`, rollout as graphs;
    else each policy step. Yields what `emulated_cuda` does."""
    graphed = module.graphed

    def on_cuda(args, env, *functions):
        env = type("Env", (), {"capturable": whole})()
        return graphed(dataclasses.replace(args, device="cuda", cuda_graphs=True), env, *functions)

    with emulated_cuda() as cuda, fused_optimizer(module), mock.patch.object(module, "graphed", on_cuda):
        yield cuda


def run_each(session, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """An exported policy, which takes one robot at a time: inputs (B, ...), memory (L, B, H); outputs alike."""
    assert all(x.shape[x.name in ("h_in", "c_in")] == 1 for x in session.get_inputs())
    axes = {name: int(name in ("h_in", "c_in")) for name in feed}
    rows = range(len(next(iter(feed.values()))))
    outputs = [session.run(None, {name: x.take([row], axes[name]) for name, x in feed.items()}) for row in rows]
    return [np.concatenate(parts, axis=int(i > 0)) for i, parts in enumerate(zip(*outputs))]


def check_replay(module, args, make_env, whole: bool) -> None:
    """A run that replays the kernels of its fourth iteration gives the eager run's numbers and parts, to the last bit."""
    with fused_optimizer(module):
        eager = module.train(args, make_env())
    with emulated(module, whole) as cuda:
        replayed = module.train(args, make_env())
    # One graph for the update, and one for the rollout or each of its steps; used in every iteration but the first three.
    assert [graph.launches for graph in cuda.graphs] == [len(replayed) - 3] * (2 if whole else args.num_steps_per_env + 1)
    assert len(replayed) > 4 and cuda.modes[-1] == "default"
    for iteration, pair in enumerate(zip(replayed, eager, strict=True)):
        ours, expected = ({tag: x for tag, x in metrics.items() if "Perf" not in tag} for metrics in pair)
        assert str(ours) == str(expected), f"iteration {iteration}"  # as text, so that NaN equals NaN
    for name, part in vars(eager.agent).items():
        if hasattr(part, "state_dict"):
            ours, expected = (tree_flatten(x.state_dict()) for x in (vars(replayed.agent)[name], part))
            assert ours[1] == expected[1], name
            assert all(x == y if not torch.is_tensor(x) else torch.equal(x, y) for x, y in zip(ours[0], expected[0])), name
