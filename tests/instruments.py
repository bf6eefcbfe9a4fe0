"""Instruments that work on a CPU: what a script would wait for on a GPU, and what a CUDA graph would replay."""

from __future__ import annotations

import contextlib
import pathlib
import weakref
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TESTS = pathlib.Path(__file__).resolve().parent
WAITING = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "item", "equal", "is_nonzero"}
HOST_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
HOST_ONLY = {"_local_scalar_dense", "item", "is_nonzero", "_record_function_enter_new", "_record_function_exit"}
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
        if not is_view(func) and name not in HOST_ONLY:
            self.kernels[name] += 1
        if name in COPIES and torch.is_tensor(result):
            self.copied += result.numel() * result.element_size()
        masks = [x for x in (args[1] if name in ("index", "index_put_", "index_put") else []) if x is not None]
        if name in WAITING or any(x.dtype in (torch.bool, torch.uint8) for x in masks):
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


class EmulatedGraph(TorchDispatchMode):
    """Stands in for a script's CudaGraph on a CPU: records the third call's kernels and replays them on the same memory.

    Like a CUDA graph it knows tensors by their memory and numbers by their value at recording: whatever a function keeps
    in Python (a counter, a rebound tensor, a branch on a value) is frozen, and the replayed run departs from the eager one.
    """

    enabled_everywhere = True

    def __init__(self, fn, *args, enabled: bool = True, generators=()):
        super().__init__()
        self.fn, self.args, self.calls, self.tape, self.result = fn, args, 0, None, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            raise RuntimeError(f"{name} inside a captured function: a CUDA graph cannot wait for the host")
        if name == "lift_fresh":
            raise RuntimeError("torch.tensor inside a captured function: on CUDA that copies from the host, and waits")
        result = func(*args, **kwargs)
        if not is_view(func):
            self.tape.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.tape:
            again = func(*args, **kwargs)
            old = result if isinstance(result, (tuple, list)) else [result]
            new = again if isinstance(again, (tuple, list)) else [again]
            for before, after in zip(old, new):
                if isinstance(before, torch.Tensor) and before.data_ptr() != after.data_ptr():
                    before.data.copy_(after)

    def __call__(self):
        self.calls += 1
        if self.calls <= 2:
            return self.fn(*self.args)
        if self.tape is None:
            self.tape = []
            # Composite operations reach a mode whole under inference_mode, and in parts without it. Graphs know no such mode.
            with mock.patch.object(torch, "inference_mode", lambda mode: contextlib.nullcontext()), self:
                self.result = self.fn(*self.args)
        else:
            self.replay()
        return self.result
