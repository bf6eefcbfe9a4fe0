"""What one rank does in tests/test_multigpu.py and tests/test_compose.py.

Also an environment that goes wrong on one rank: `--env rank_worker:make` with FAULT="<kind> <rank> <step>".
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(pathlib.Path(__file__).resolve().parent)]
from envs.cartpole import Cartpole  # noqa: E402

SMALL = dict(
    env="cartpole", num_envs=32, max_iterations=10, actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16), log_root=""
)
SMALL |= dict(actor_obs=("policy",), critic_obs=("policy",))


class Faulty(Cartpole):
    """At the given step of the given rank it kills the process, raises, hangs or returns NaN; not again after a restart."""

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
            elif self.kind == "obs":
                obs["policy"][3] = torch.nan
            elif self.kind == "reward":
                rewards[3] = torch.inf
        return obs, rewards, dones, extras


def make(num_envs, device, seed):
    return Faulty(num_envs, device, seed)


def train_and_watch(module: Any, args: Any) -> dict:
    """History, the weights after every iteration, and the number of collectives of every iteration."""
    agent, weights, calls = {}, [], []
    originals = {name: getattr(module, name) for name in ("tensors_of", "log_iteration")}
    collectives = ("all_reduce", "all_gather_object", "broadcast", "gather_object")
    functions = {name: getattr(dist, name) for name in collectives}

    def tensors_of(parts):
        agent.update(parts)
        return originals["tensors_of"](parts)

    def log_iteration(*args):
        weights.append(
            {f"{name} {key}": x.clone() for name in ("actor", "critic") for key, x in agent[name].state_dict().items()}
        )
        calls.append(dict.fromkeys(collectives, 0))

    def counted(name):
        def function(*args, **kwargs):
            if calls:
                calls[-1][name] += 1
            return functions[name](*args, **kwargs)

        return function

    module.tensors_of, module.log_iteration = tensors_of, log_iteration
    for name in collectives:
        setattr(dist, name, counted(name))
    try:
        with contextlib.redirect_stdout(None):
            history = module.train(args)
    finally:
        for name, function in originals.items():
            setattr(module, name, function)
        for name, function in functions.items():
            setattr(dist, name, function)
    return {"history": history, "weights": weights, "calls": calls[:-1]}


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
    weights = {f"{name} {k}": x for name in ("actor", "critic") for k, x in getattr(runner.alg, name).state_dict().items()}
    dist.destroy_process_group()
    return {"history": history, "weights": weights}


def parity(**settings) -> dict:
    """Ours and rsl_rl's, in float64, one after the other in the same processes."""
    import ppo_multigpu

    torch.set_default_dtype(torch.float64)
    args = ppo_multigpu.Args(**SMALL | dict(timeout_bootstrap="reference") | settings)
    theirs = reference_run(dataclasses.replace(args, seed=args.seed + 10_000 * int(os.environ["RANK"])))
    return {"ours": train_and_watch(ppo_multigpu, args), "theirs": theirs}


def pieces() -> dict:
    """Normaliser, normalised advantages and gradients of this rank, and what they are made of."""
    import ppo_multigpu as module

    torch.set_default_dtype(torch.float64)
    result = {}

    @module.distributed
    def in_group(args, env=None):
        torch.manual_seed(args.seed)
        normalizer = module.EmpiricalNormalization(3)
        result["x"] = [torch.randn(20, 3) * (1 + dist.get_rank()) + i for i in range(2)]
        for x in result["x"]:
            normalizer.update(x)
        result["normalizer"] = normalizer.state_dict()
        env = Cartpole(4, seed=args.seed)
        actor, _ = module.make_models(env.get_observations(), 1, args)
        storage = module.make_storage(env.get_observations(), 1, actor, args)
        storage["rewards"].normal_(mean=float(dist.get_rank()))
        result["local"] = module.compute_gae(storage, args)[0]
        result["global"] = module.compute_gae(storage, dataclasses.replace(args, normalize_advantage_over_ranks=True))[0]

    in_group(module.Args(**SMALL | dict(num_envs=4)), None)
    return result


def composed(path: str, **settings) -> dict:
    """Train with a script that was merged from two variants."""
    sys.path.insert(0, str(pathlib.Path(path).parent))
    module = importlib.import_module(pathlib.Path(path).stem)
    return train_and_watch(module, module.Args(**SMALL | dict(max_iterations=2, num_envs=16) | settings))


def run_rank(rank: int, world_size: int, folder: str, script, argv: list, environ: dict[str, str]) -> None:
    """The life of one rank's process: a script's command line, or a task of this file with its result in <rank>.pt."""
    os.environ |= environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    if script:
        sys.argv = [str(script), *argv]
        spec = importlib.util.spec_from_file_location(pathlib.Path(script).stem, script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.main()
    else:
        torch.save(globals()[argv[0]](**argv[1]), f"{rank}.pt")
