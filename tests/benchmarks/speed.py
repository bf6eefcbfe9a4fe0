"""Time of whole iterations: against rsl_rl 5.5.1, another checkout, skrl, CleanRL or LeanRL, on equal terms, in turn A B A B.

    python tests/benchmarks/speed.py --table                      # every row against rsl_rl, without and with --compile
    python tests/benchmarks/speed.py --against ../older           # every row against the scripts of another checkout
    python tests/benchmarks/speed.py --count --rows quickstart    # kernels, host waits and memory of an iteration
    python tests/benchmarks/speed.py --peer skrl --rows cartpole-64-64                                  # pip install skrl
    python tests/benchmarks/speed.py --peer cleanrl --source ~/cleanrl/cleanrl/ppo_continuous_action.py # or leanrl
    python tests/benchmarks/speed.py --table --device cuda --float32-matmul-precision high

In each round every side trains anew, in a process of its own; its first three iterations warm up. Printed are medians over
the rounds, and by what factor ours are faster: the ratio of the medians (its range over the rounds). Times are those that
ours and rsl_rl log; both count episodes, neither's writing is in them. Machines are noisy: quote ratios, not times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import multiprocessing
import os
import pathlib
import runpy
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Literal
from unittest import mock

import torch
import tyro

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def dims(*sizes: int) -> dict:
    return {"actor_hidden_dims": sizes, "critic_hidden_dims": sizes}


# Script and settings, where they are not those that the task recommends.
ROWS = {
    "quickstart": ("ppo_continuous", dict(env="quadruped")),  # 128-64
    "quadruped-512-256-128": ("ppo_continuous", dict(env="quadruped", **dims(512, 256, 128))),
    "cartpole-64-64": ("ppo_continuous", dict(env="cartpole", num_envs=1024, **dims(64, 64))),
    "cartpole-8-envs": ("ppo_continuous", dict(env="cartpole", num_envs=8, **dims(8, 8, 8))),  # host overhead alone
    "rnn": ("ppo_rnn", dict(env="navigation-cue")),
    "rnn-256": ("ppo_rnn", dict(env="navigation-cue", num_envs=1024, rnn_hidden_dim=256)),
    "cnn": ("ppo_cnn", dict(env="navigation-pixels")),
    "rnd": ("ppo_rnd", dict(env="navigation-maze")),
    "symmetry": ("ppo_symmetry", dict(env="quadruped")),
    "distill": ("distill_dagger", dict(env="quadruped", teacher=("teacher.pt",), student_obs=("policy",))),
}
ON_GPU = {
    f"quadruped-{n}-{'-'.join(map(str, sizes))}": ("ppo_continuous", dict(env="quadruped", num_envs=n, **dims(*sizes)))
    for n in (256, 1024, 4096, 16384)
    for sizes in ((64, 64), (512, 256, 128))
}
# What the files of CleanRL and LeanRL have no flags for.
FIXED = dict(actor_obs=("policy",), critic_obs=("policy",), activation="tanh", std_type="log", obs_normalization=False)
FIXED |= dict(schedule="fixed", normalize_advantage_per_mini_batch=True, init_at_random_ep_len=False, **dims(64, 64))


@dataclasses.dataclass
class Options:
    table: bool = False
    """All rows against rsl_rl."""
    against: str = ""
    """All rows against the scripts of the checkout at this path."""
    count: bool = False
    """Count kernels, host waits and memory instead of timing, against rsl_rl or --against."""
    peer: Literal["rsl_rl", "skrl", "cleanrl", "leanrl"] = "rsl_rl"
    """The other side; the last two on their terms: 64-64 tanh, no normalisation, fixed learning rate."""
    source: str = ""
    """The file in your clone of theirs, ppo_continuous_action.py or LeanRL's ..._torchcompile.py (wants tensordict<0.14)."""
    rows: tuple[str, ...] = ()
    """Only these rows; default: all with --table and --against, else the quick start (cartpole-64-64 with --peer)."""
    num_envs: int = 0
    """In all rows; 0: the row's own."""
    rounds: int = 5
    iterations: int = 8
    """In each round; the first three do not count."""
    threads: int = 0
    """Of each side; 0: as our scripts choose."""
    device: str = "cpu"
    float32_matmul_precision: str = "highest"


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


def make_settings(row: str, options: Options) -> tuple[str, dict]:
    """The script, and what its Args are to be told: what the task recommends, and the row's own."""
    from envs import defaults

    script, own = (ROWS | ON_GPU)[row]
    settings = defaults(own["env"], importlib.import_module(script).Args.__dataclass_fields__) | own
    settings |= {"num_envs": options.num_envs} if options.num_envs else {}
    settings |= FIXED if options.peer in ("cleanrl", "leanrl") else {}
    names = ("device", "float32_matmul_precision")
    return script, settings | {name: getattr(options, name) for name in names} | dict(max_iterations=options.iterations)


def in_new_process(root: pathlib.Path, function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, root, function, *arguments).result()


def work(root: pathlib.Path, function, *arguments):
    """The scripts and environments of this checkout are those that are imported."""
    sys.path.insert(0, str(root))
    with tempfile.TemporaryDirectory() as folder, quiet():
        os.chdir(folder)
        return function(*arguments)


def fields(script: str) -> set[str]:
    return set(importlib.import_module(script).Args.__dataclass_fields__)


def prepare(script: str, settings: dict):
    """The script, its Args, an environment, and for distillation a teacher."""
    import cases

    from envs import make

    module = importlib.import_module(script)
    if "teacher" in settings:
        cases.write_teacher(settings["teacher"][0], make(settings["env"], 1))
    args = module.Args(**settings | dict(log_root=""))
    return module, args, make(args.env, args.num_envs, device=args.device, seed=1)


# Each side: script and settings -> seconds of collection and of learning, for every iteration.


def time_ours(script: str, settings: dict) -> list[tuple[float, float]]:
    module, args, env = prepare(script, settings)
    return [(m["Perf/collection_time"], m["Perf/learning_time"]) for m in module.train(args, env)]


def make_reference(script: str, settings: dict):
    """rsl_rl's runner; it writes a log, for which it counts episodes, as ours do."""
    import cases
    import reference

    module, args, env = prepare(script, settings)
    args = module.choose_groups(env.get_observations(), module.set_up_torch(args))
    if "teacher" in settings:
        runner = reference.make_distillation_runner(args, env, cases.TEACHER, device=args.device)
    else:
        runner = reference.make_runner(args, env, device=args.device)
    runner.logger.log_dir, runner.save = ".", lambda *_: None
    return runner


def time_rsl_rl(script: str, settings: dict) -> list[tuple[float, float]]:
    runner, times = make_reference(script, settings), []
    runner.logger.log = lambda collect_time, learn_time, **_: times.append((collect_time, learn_time))
    runner.learn(settings["max_iterations"], init_at_random_ep_len=True)
    return times


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_skrl(script: str, settings: dict) -> list[tuple[float, float]]:
    """skrl's own agent, memory and trainer, with the networks, batch, coefficients and normalisation of the row."""
    import gymnasium
    import numpy as np
    import skrl
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import Wrapper
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.resources.schedulers.torch import KLAdaptiveLR
    from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg

    skrl.logger.setLevel("ERROR")
    module, args, env = prepare(script, settings)
    module.set_up_torch(args)
    size = env.get_observations()["policy"].shape[1]
    spaces = dict(
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (size,)),
        action_space=gymnasium.spaces.Box(-np.inf, np.inf, (env.num_actions,)),
    )

    class Wrapped(Wrapper):
        observation_space, action_space = spaces.values()
        state = render = close = lambda self: None

        def reset(self):
            return self._env.get_observations()["policy"], {}

        def step(self, actions):
            obs, rewards, dones, extras = self._env.step(actions)
            truncated = extras["time_outs"].unsqueeze(-1)
            return obs["policy"], rewards.unsqueeze(-1), dones.unsqueeze(-1) & ~truncated, truncated, {}

    class Policy(GaussianMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces, device=args.device)
            GaussianMixin.__init__(self)
            self.net = module.make_mlp(size, env.num_actions, args.actor_hidden_dims, args.activation)
            self.log_std = torch.nn.Parameter(torch.zeros(env.num_actions))

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {"log_std": self.log_std}

    class Value(DeterministicMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces, device=args.device)
            DeterministicMixin.__init__(self)
            self.net = module.make_mlp(size, 1, args.critic_hidden_dims, args.activation)

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {}

    cfg = PPO_CFG(
        rollouts=args.num_steps_per_env,
        learning_epochs=args.num_learning_epochs,
        mini_batches=args.num_mini_batches,
        learning_rate=args.learning_rate,
        learning_rate_scheduler=KLAdaptiveLR,
        learning_rate_scheduler_kwargs=dict(kl_threshold=args.desired_kl),
        observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs=dict(size=spaces["observation_space"], device=args.device),
        grad_norm_clip=args.max_grad_norm,
        entropy_loss_scale=args.entropy_coef,
        value_loss_scale=args.value_loss_coef,
        time_limit_bootstrap=True,
    )
    cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0
    memory = RandomMemory(memory_size=args.num_steps_per_env, num_envs=args.num_envs, device=args.device)
    models = {"policy": Policy().to(args.device), "value": Value().to(args.device)}
    agent = PPO(models=models, memory=memory, cfg=cfg, device=args.device, **spaces)
    marks, update = [now(args.device)], agent.update

    def marked(**arguments):
        marks.append(now(args.device))
        update(**arguments)
        marks.append(now(args.device))

    agent.update = marked
    steps = args.max_iterations * args.num_steps_per_env
    trainer = dict(timesteps=steps, headless=True, disable_progressbar=True, close_environment_at_exit=False)
    SequentialTrainer(cfg=SequentialTrainerCfg(**trainer), env=Wrapped(env), agents=agent).train()
    return [(b - a, c - b) for a, b, c in zip(marks[::2], marks[1::2], marks[2::2])]


def time_file(source: str, script: str, settings: dict) -> list[tuple[float, float]]:
    """CleanRL's or LeanRL's own file, run as it is, as a program; our environment stands in for its gymnasium one."""
    import gymnasium
    import numpy as np

    module, args, env = prepare(script, settings)
    module.set_up_torch(args)
    size, starts, ends = env.get_observations()["policy"].shape[1], [], []

    class Vector:
        single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,))
        single_action_space = gymnasium.spaces.Box(-np.inf, np.inf, (env.num_actions,))

        def __init__(self, env_fns):
            pass

        def reset(self, seed=None):
            return env.get_observations()["policy"].cpu().numpy(), {}

        def step(self, actions):
            starts.append(now(args.device))
            obs, rewards, dones, extras = env.step(torch.from_numpy(actions).to(args.device))
            results = obs["policy"], rewards, dones & ~extras["time_outs"], extras["time_outs"]
            results = [value.cpu().numpy() for value in results]
            ends.append(now(args.device))
            return *results, {}

        def close(self):
            starts.append(now(args.device))

    steps = args.num_steps_per_env
    flags = dict(num_envs=args.num_envs, num_steps=steps, total_timesteps=args.max_iterations * steps * args.num_envs)
    flags |= dict(num_minibatches=args.num_mini_batches, update_epochs=args.num_learning_epochs, clip_coef=args.clip_param)
    flags |= dict(learning_rate=args.learning_rate, gamma=args.gamma, gae_lambda=args.lam, ent_coef=args.entropy_coef)
    flags |= dict(vf_coef=2.0 * args.value_loss_coef, max_grad_norm=args.max_grad_norm)  # theirs halves the squared error
    argv = [source, "--no-anneal-lr", "--no-cuda" if args.device == "cpu" else "--cuda"] + ["--compile"] * args.compile
    with (
        mock.patch.object(sys, "argv", argv + [f"--{name}={value}" for name, value in flags.items()]),
        mock.patch.dict(os.environ, WANDB_MODE="disabled"),
        mock.patch("torch.utils.tensorboard.SummaryWriter"),  # here nobody writes logs
        mock.patch.object(gymnasium.vector, "SyncVectorEnv", Vector),
    ):
        runpy.run_path(source, run_name="__main__")
    # An iteration goes from its first env step to the next one's: the policy's step before that counts as learning.
    starts, ends = starts[::steps], ends[steps - 1 :: steps]
    return [(b - a, c - b) for a, b, c in zip(starts, ends, starts[1:])]


def make_sides(script: str, settings: dict, options: Options) -> dict:
    """Name: checkout, function and settings. The first is whom ours are compared with."""
    if options.against:
        root = pathlib.Path(options.against).resolve()
        known = in_new_process(ROOT, fields, script) & in_new_process(root, fields, script)
        settings = {name: value for name, value in settings.items() if name in known}
        return {options.against: (root, time_ours, settings), "ours": (ROOT, time_ours, settings)}
    if options.peer != "rsl_rl":
        time_peer = time_skrl if options.peer == "skrl" else functools.partial(time_file, os.path.abspath(options.source))
        settings = settings | {"compile": options.peer == "leanrl"}
        return {options.peer: (ROOT, time_peer, settings), "ours": (ROOT, time_ours, settings)}
    if script != "distill_dagger":
        settings = settings | {"timeout_bootstrap": "value"}  # as in rsl_rl
    ours = {name: (ROOT, time_ours, settings | {"compile": name == "compiled"}) for name in ("ours", "compiled")}
    return {"rsl_rl": (ROOT, time_rsl_rl, settings)} | ours


def compare(row: str, options: Options) -> None:
    """Print the row's medians, and the ratios."""
    script, settings = make_settings(row, options)
    sides = make_sides(script, settings, options)
    rounds = {name: [] for name in sides}  # collection, learning, both; medians over a round's iterations
    for _ in range(options.rounds):
        for name, (root, function, chosen) in sides.items():
            times = in_new_process(root, function, script, chosen)[3:]
            rounds[name].append([statistics.median(column) for column in zip(*((*pair, sum(pair)) for pair in times))])
    first, *others = rounds
    medians = {name: [statistics.median(column) for column in zip(*values)] for name, values in rounds.items()}
    print(f"\n{row}: {script}.py, {settings['env']}, {settings['num_envs']} environments, {options.rounds} rounds")
    for name, (collection, learning, whole) in medians.items():
        print(f"  {name:10s} {1e3 * collection:9.1f} ms collection {1e3 * learning:9.1f} ms learning {1e3 * whole:9.1f} ms")
    for name in others:
        print(f"  {first} / {name}:", end="", flush=True)
        for i, part in enumerate(("collection", "learning", "whole iteration")):
            ratios = [a[i] / b[i] for a, b in zip(rounds[first], rounds[name])]
            whole = medians[first][i] / medians[name][i]
            print(f"  {part} {whole:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", end="", flush=True)
        print()


def count(peer: bool, script: str, settings: dict) -> dict[str, float]:
    """Kernels (ATen calls without views and host reads, a foreach call is one; of --compile also what Inductor makes) and host
    waits of an iteration, without those of the environment; waits also without the optimizer's, which on a GPU has none."""
    import instruments

    from envs.torch_env import TorchEnv

    class Kernels(instruments.Operations):
        ignore_compile_internals = classmethod(lambda cls: True)  # what is compiled stays so while it is counted

    torch._inductor.config.cpp.enable_kernel_profile = True
    settings = settings | dict(num_envs=64, max_iterations=3)
    operations, totals, marks = Kernels(), Counter(), []

    def so_far() -> Counter:
        waits = sum(n for name, n in operations.waits.items() if name not in instruments.HOST_ONLY)
        return Counter({"kernels": operations.kernels.total(), "waits": waits + reads.total()})

    def noting(owner, name: str, part: str) -> None:
        function = getattr(owner, name)

        def call(*arguments, **options):
            before = so_far()
            result = function(*arguments, **options)
            totals.update({f"{part} {key}": n - before[key] for key, n in so_far().items()})
            if name == "update":
                marks.append(totals | {key: n for key, n in so_far().items()})
            return result

        setattr(owner, name, call)

    noting(TorchEnv, "step", "environment")
    noting(torch.optim.Adam, "step", "optimizer")
    profile = torch.profiler.profile() if settings.get("compile") else contextlib.nullcontext()
    with instruments.host_reads() as reads, operations, profile:
        if peer:
            runner = make_reference(script, settings)
            noting(runner.alg, "compute_returns", "learning")
            noting(runner.alg, "update", "learning")
            runner.learn(3, init_at_random_ep_len=True)
        else:
            module, args, env = prepare(script, settings)
            noting(module, "update", "learning")
            if hasattr(module, "shuffle"):
                noting(module, "shuffle", "learning")
            module.train(args, env)
    fused = sum("cpp_fused" in event.name for event in profile.events()) / 3 if settings.get("compile") else 0
    n = Counter({key: (x - marks[0][key]) / 2 for key, x in marks[-1].items()})  # the first makes the optimizer's state
    waits = n["waits"] - n["environment waits"] - n["optimizer waits"]
    collection = n["kernels"] - n["environment kernels"] - n["learning kernels"]
    return dict(collection=collection, learning=n["learning kernels"] + fused, optimizer=n["optimizer kernels"], waits=waits)


def memory(peer: bool, script: str, settings: dict) -> float:
    """The most that all tensors of a training held at once, environment included [MB]."""
    import instruments

    with instruments.Memory() as watched:
        if peer:
            make_reference(script, settings | dict(max_iterations=2)).learn(2, init_at_random_ep_len=True)
        else:
            module, args, env = prepare(script, settings | dict(max_iterations=2))
            module.train(args, env)
    return watched.peak / 1e6


def print_counts(row: str, options: Options) -> None:
    script, settings = make_settings(row, options)
    print(f"\n{row}: {script}.py, {settings['env']}, {settings['num_envs']} environments; of one iteration")
    for name, (root, _, chosen) in make_sides(script, settings, options).items():
        n = in_new_process(root, count, name == "rsl_rl", script, chosen)
        print(f"  {name:10s} collection {n['collection']:7.0f}  learning {n['learning']:7.0f}", end="")
        print(f"  without the optimizer's {n['learning'] - n['optimizer']:7.0f}  waits {n['waits']:5.0f}", end="", flush=True)
        if name != "compiled":
            print(f"  {in_new_process(root, memory, name == 'rsl_rl', script, chosen):6.0f} MB at most", end="")
        print(flush=True)


def main(options: Options) -> None:
    if options.peer in ("cleanrl", "leanrl") and not options.source:
        sys.exit(f"--peer {options.peer} runs the file that --source names")
    if options.count and options.peer != "rsl_rl":
        sys.exit("--count counts rsl_rl's kernels and ours")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    everything = [*(ON_GPU if options.device != "cpu" else ()), *ROWS]
    first = "quickstart" if options.peer == "rsl_rl" else "cartpole-64-64"
    for row in options.rows or (everything if options.table or options.against else [first]):
        (print_counts if options.count else compare)(row, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
