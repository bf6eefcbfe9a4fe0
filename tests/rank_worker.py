"""What one rank does in tests/test_multigpu.py and tests/test_compose.py.

Also an environment that goes wrong on one rank: `--env rank_worker:make` with FAULT="<kind> <rank> <step>".
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import os
import pathlib
import signal
import sys
import time
import types
from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(pathlib.Path(__file__).resolve().parent)]
from envs.cartpole import Cartpole  # noqa: E402

SMALL = dict(env="cartpole", num_envs=32, max_iterations=10, actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16))
SMALL |= dict(actor_obs=("policy",), critic_obs=("policy",), log_root="", device="cpu")


class Faulty(Cartpole):
    """At a step of a rank it kills the process, there or when it saves, raises, hangs or returns NaN; not after a restart."""

    def __init__(self, num_envs, device, seed):
        self.kind, rank, step = os.environ.get("FAULT", "none 0 0").split()
        self.faulty = rank == os.environ.get("RANK", "0") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.fault_step, self.steps = int(step), 0
        super().__init__(num_envs, device, seed)

    def _observe(self):
        obs = super()._observe()
        if self.kind == "shape" and self.faulty:
            obs["policy"] = torch.cat((obs["policy"], obs["policy"][:, :1]), 1)
        return obs

    def state_dict(self):
        if self.kind == "save" and self.faulty and self.steps >= self.fault_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().state_dict()

    def step(self, actions):
        self.steps += 1
        obs, rewards, dones, extras = super().step(actions)
        if self.faulty and self.steps == self.fault_step:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.kind == "raise":
                raise RuntimeError("the simulator has crashed")
            elif self.kind == "hang":
                time.sleep(60)
            elif self.kind == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self.kind == "obs":
                obs["policy"][3] = torch.nan
            elif self.kind == "reward":
                rewards[3] = torch.inf
        return obs, rewards, dones, extras


def make(num_envs, device, seed):
    return Faulty(num_envs, device, seed)


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "gather_object", "barrier")


def weights_of(agent: Any) -> dict[str, torch.Tensor]:
    models = {name: part for name, part in vars(agent).items() if isinstance(part, torch.nn.Module)}
    return {f"{name} {key}": x.clone() for name, part in models.items() for key, x in part.state_dict().items()}


def train_and_watch(module: Any, args: Any) -> dict:
    """The metrics, the weights after every iteration, and the number of collectives of every iteration."""
    agents, weights, calls, counts = [], [], [], Counter()
    make_agent, log_iteration = module.make_agent, module.log_iteration

    def noted(*arguments):
        agents.append(make_agent(*arguments))
        return agents[-1]

    def after_iteration(*arguments):
        weights.append(weights_of(agents[0]))
        calls.append(dict(counts))
        counts.clear()
        return log_iteration(*arguments)

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    collectives = {name: counted(name, getattr(dist, name)) for name in COLLECTIVES}
    watched = mock.patch.multiple(module, make_agent=noted, log_iteration=after_iteration)
    with watched, mock.patch.multiple(dist, **collectives), contextlib.redirect_stdout(None):
        history = module.train(args)
    return {"history": list(history), "weights": weights, "calls": calls}


def reference_run(args: Any) -> dict:
    """rsl_rl's own distributed training; overridden are its device check and its choice of NCCL, nothing else."""
    import reference
    from rsl_rl.runners import OnPolicyRunner

    from envs import make as make_env

    def configure(self):
        self.gpu_world_size, self.gpu_global_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        self.gpu_local_rank, self.is_distributed = self.gpu_global_rank, self.gpu_world_size > 1
        self.cfg["multi_gpu"] = {"global_rank": self.gpu_global_rank, "local_rank": self.gpu_local_rank}
        self.cfg["multi_gpu"]["world_size"] = self.gpu_world_size
        store = dist.PrefixStore("reference", next(dist.rendezvous("env://"))[0])
        dist.init_process_group("gloo", store=store, rank=self.gpu_global_rank, world_size=self.gpu_world_size)

    OnPolicyRunner._configure_multi_gpu = configure
    history, runner = reference.run(args, make_env(args.env, args.num_envs, seed=args.seed))
    weights = weights_of(types.SimpleNamespace(actor=runner.alg.actor, critic=runner.alg.critic))
    dist.destroy_process_group()
    return {"history": history, "weights": weights}


def parity(**settings) -> dict:
    """Ours and rsl_rl's, in float64, one after the other in the same processes."""
    import ppo_multigpu

    torch.set_default_dtype(torch.float64)
    args = ppo_multigpu.Args(**SMALL | dict(timeout_bootstrap="value") | settings)
    theirs = reference_run(dataclasses.replace(args, seed=args.seed + 10_000 * int(os.environ["RANK"])))
    return {"ours": train_and_watch(ppo_multigpu, args), "theirs": theirs}


def pieces() -> dict:
    """Normaliser, normalised advantages and metrics of this rank, and what they are made of."""
    import ppo_multigpu as module

    torch.set_default_dtype(torch.float64)
    result = {}

    @module.on_all_ranks
    def in_group(args, env=None):
        torch.manual_seed(args.seed)
        rank = dist.get_rank()
        normalizer = module.EmpiricalNormalization(3)
        result["x"] = [torch.randn(20, 3) * (1 + rank) + i for i in range(2)]
        for x in result["x"]:
            normalizer.update(x)
        result["normalizer"] = normalizer.state_dict()
        env = Cartpole(4, seed=args.seed)
        obs = env.get_observations()
        storage = module.make_storage(module.make_agent(env, obs, args), obs, 1, args)
        storage["rewards"].normal_(mean=float(rank))
        result["local"] = module.compute_gae(storage, args)[0]
        result["global"] = module.compute_gae(storage, dataclasses.replace(args, normalize_advantage_over_ranks=True))[0]
        metrics = {"Train/both": 1.0 + rank, "Train/one": math.nan if rank else 5.0, "Loss/finite": 1.0 - rank}
        result["metrics"] = module.average_metrics(metrics | {f"Episode/of {rank}": 7.0, "Train/none": math.nan})

    in_group(module.Args(**SMALL | dict(num_envs=4)))
    return result


def composed(path: str, settings: dict) -> dict:
    """Train with a script that was merged from two variants."""
    module = load(path)
    return train_and_watch(module, module.Args(**settings))


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_rank(rank: int, world_size: int, folder: pathlib.Path, script, argv: list, environ: dict[str, str]) -> None:
    """The life of one rank's process: a script's command line, or a task of this file with its result in <rank>.pt."""
    os.environ |= environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.chdir(folder)
    if "NETNS" in os.environ:  # each rank on a host of its own
        name = os.environ["NETNS"].split()[rank]
        assert ctypes.CDLL(None).setns(os.open(f"/var/run/netns/{name}", os.O_RDONLY), 0) == 0
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    if script:
        sys.argv = [str(script), *argv]
        module = load(script)
        if os.environ.get("NO_EXPORT"):  # which takes torch longer than all else here
            module.export_policy = lambda *_: None
        if seconds := os.environ.get("FILM"):
            module.film = lambda *_: time.sleep(float(seconds))
        module.main()
    else:
        torch.save(globals()[argv[0]](**argv[1]), f"{rank}.pt")
