"""Fast paths against the eager one: one update from the same weights, optimizer state and rollout.

PPO is chaotic, so trajectories cannot tell rounding from error. Drift is the norm of the difference between the two
results, over the norm of the step that the eager update takes.
"""

import copy
import shutil

import cases
import pytest
import torch

import ppo_continuous as module
from envs import make


def rollout_and_agent():
    """A trained agent and a full storage, caught at the start of the fourth update."""
    args = module.Args(**(cases.SMALL | dict(num_envs=64, max_iterations=4, timeout_bootstrap="final_obs")))
    caught, update = [], module.update

    def spy(actor, critic, optimizer, storage, permutation, step_fn, args):
        caught[:] = [copy.deepcopy((actor, critic, optimizer, storage, permutation))]
        return update(actor, critic, optimizer, storage, permutation, step_fn, args)

    module.update = spy
    try:
        module.train(args, make("cartpole", 64))
    finally:
        module.update = update
    return caught[0], args


def weights_after(state, args, step_fn) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat weights before and after one update from a copy of `state`."""
    actor, critic, optimizer, storage, permutation = copy.deepcopy(state)
    parameters = [*actor.parameters(), *critic.parameters()]
    saved, optimizer = optimizer.state_dict(), module.FlatOptimizer(parameters, args.learning_rate)  # copies are no views
    optimizer.load_state_dict(saved)
    before = torch.cat([p.detach().flatten() for p in parameters])
    module.update(actor, critic, optimizer, storage, permutation, step_fn, args)
    return before, torch.cat([p.detach().flatten() for p in parameters])


def drift(args, step_fn, **settings) -> float:
    state, args = rollout_and_agent() if args is None else args
    before, eager = weights_after(state, args, module.mini_batch_step)
    for name, value in settings.items():
        setattr(args, name, value)
    _, fast = weights_after(state, args, step_fn)
    assert not torch.equal(eager, before)
    return ((fast - eager).norm() / (eager - before).norm()).item()


def test_eager_update_repeats_exactly():
    assert drift(None, module.mini_batch_step) == 0.0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_step(monkeypatch):
    """Loss, gradient, clipping, learning rate and Adam as one graph."""
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    assert 0.0 < drift(None, torch.compile(module.mini_batch_step, fullgraph=True)) <= 2e-5


def test_bfloat16_networks(capsys):
    """Not a float32 path: its drift is stated, and that it learns is held by test_learning.py."""
    value = drift(None, module.mini_batch_step, mixed_precision=True)
    with capsys.disabled():
        print(f" [bf16 drift of one update: {value:.2f}]", end="")
    assert 1e-4 < value < 1.0  # it is rounded indeed, and by less than the step that it takes
