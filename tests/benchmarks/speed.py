"""Speed against rsl_rl 5.5.1, skrl, CleanRL or LeanRL: same environment, networks, batch and threads, in turn A B A B.

    python tests/benchmarks/speed.py                              # 1024 environments, 512-256-128
    python tests/benchmarks/speed.py --script ppo_rnn             # any script, on its own task with that task's settings
    python tests/benchmarks/speed.py --peer skrl                  # pip install skrl
    python tests/benchmarks/speed.py --peer cleanrl --source ~/cleanrl/cleanrl/ppo_continuous_action.py   # or leanrl
    python tests/benchmarks/speed.py --num-envs 8 --hidden-dims 8 8 8 --threads 1     # host overhead alone
    python tests/benchmarks/speed.py --count                      # kernels and waits per mini-batch, on any machine
    python tests/benchmarks/speed.py --table                      # every row of the README, without and with --compile
    python tests/benchmarks/speed.py --table --device cuda --float32-matmul-precision high     # ... of a GPU

Prints the median time of collection, learning and the whole iteration, the ratio of the medians and its spread over the
rounds, and with --json writes them. Machines are noisy: quote the ratio, not the times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import multiprocessing
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Literal

import torch
import tyro

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


# What each script is for. Cartpole costs next to nothing, so that the learner shows.
TASKS = {
    "ppo_continuous": "cartpole",
    "ppo_rnn": "navigation-cue",
    "ppo_cnn": "navigation-pixels",
    "ppo_rnd": "navigation-maze",
    "ppo_symmetry": "quadruped",
    "distill_dagger": "quadruped",
}

# What the files of CleanRL and LeanRL have no flags for.
FIXED = dict(actor_obs=("policy",), critic_obs=("policy",), actor_hidden_dims=(64, 64), critic_hidden_dims=(64, 64))
FIXED |= dict(activation="tanh", std_type="log", obs_normalization=False, schedule="fixed")
FIXED |= dict(normalize_advantage_per_mini_batch=True, init_at_random_ep_len=False)


# The README's rows on a CPU, and a GPU's.
SCRIPTS = [f"--script {script} --rounds 6" for script in TASKS if script not in ("ppo_continuous", "distill_dagger")]
SCRIPTS += ["--script distill_dagger --rounds 4 --iterations 5"]
ROWS = {
    "cpu": [
        "--env quadruped --hidden-dims 128 64 --rounds 9 --iterations 7",
        "--hidden-dims 64 64 --rounds 9 --iterations 8",
        "--rounds 5 --iterations 5",
        "--num-envs 8 --hidden-dims 8 8 8 --threads 1 --rounds 11 --iterations 10",
        *SCRIPTS,
    ],
    "cuda": [
        *(
            f"--env quadruped --num-envs {n} --hidden-dims {d}"
            for n in (256, 1024, 4096, 16384)
            for d in ("64 64", "512 256 128")
        ),
        *SCRIPTS,
    ],
}


@dataclasses.dataclass
class Settings:
    script: Literal["ppo_continuous", "ppo_rnn", "ppo_cnn", "ppo_rnd", "ppo_symmetry", "distill_dagger"] = "ppo_continuous"
    """Which script; the base runs with rsl_rl's defaults, the others with what their task recommends."""
    env: str = ""
    """Built-in task; left out: the script's."""
    num_envs: int = 0
    """0: 1024, or what the task recommends."""
    hidden_dims: tuple[int, ...] = ()
    """Left out: 512 256 128, or what the task recommends."""
    rounds: int = 5
    """Interleaved rounds."""
    iterations: int = 6
    """Iterations per round; the first three warm up (with CUDA graphs they are eager)."""
    threads: int = 2
    device: str = "cpu"
    compile: bool = False
    """Our --compile."""
    compile_peer: bool = False
    """rsl_rl's `torch_compile_mode="default"`."""
    float32_matmul_precision: str = "highest"
    timeout_bootstrap: str = "reference"
    """`reference` does exactly what rsl_rl does; `final_obs` costs one more value estimate per step."""
    peer: Literal["rsl_rl", "skrl", "cleanrl", "leanrl"] = "rsl_rl"
    """With whom to compare; with the last two on their terms: 64-64 tanh, no normalisation, fixed learning rate."""
    source: str = ""
    """The file in your clone of theirs, ppo_continuous_action.py or LeanRL's ..._torchcompile.py (wants tensordict<0.14)."""
    count: bool = False
    """Count kernels and host waits of one update instead of timing."""
    table: bool = False
    """All rows of the README, each in a process of its own."""
    json: str = ""
    """Also write the figures here."""


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


def make_args(settings: Settings):
    """The script's own `Args`; the groups spelt out, as rsl_rl wants them."""
    from envs import make

    script = importlib.import_module(settings.script)
    base = settings.script == "ppo_continuous"
    env = settings.env or TASKS[settings.script]
    chosen = {} if base else script.recommended(env)
    chosen |= {"num_envs": settings.num_envs} if settings.num_envs else {"num_envs": 1024} if base else {}
    networks = ("student",) if settings.script == "distill_dagger" else ("actor", "critic")
    chosen |= {f"{network}_hidden_dims": settings.hidden_dims for network in networks} if settings.hidden_dims else {}
    chosen |= FIXED if settings.peer in ("cleanrl", "leanrl") else {}
    names = ("compile", "device", "float32_matmul_precision", "timeout_bootstrap")
    chosen |= {name: getattr(settings, name) for name in names if hasattr(script.Args, name)}
    args = script.Args(**chosen | dict(env=env, max_iterations=settings.iterations, num_threads=settings.threads, log_root=""))
    obs = make(env, 2).get_observations()
    with quiet():
        if settings.script == "distill_dagger":
            teacher = make_teacher(env, settings)
            return dataclasses.replace(args, student_obs=("policy",), teacher=(teacher,))
        groups = script.resolve_groups(obs, args)
    return dataclasses.replace(args, **{f"{network}_obs": names for network, names in groups.items()})


def make_teacher(env: str, settings: Settings) -> str:
    """The checkpoint of a teacher that was trained for one iteration: what it knows costs no time."""
    import ppo_continuous

    args = dict(num_envs=64, max_iterations=1, actor_obs=("policy", "privileged"), critic_obs=("policy", "privileged"))
    folder = tempfile.mkdtemp()
    ppo_continuous.train(ppo_continuous.Args(env=env, log_root=folder, logger="none", num_threads=settings.threads, **args))
    return str(next(pathlib.Path(folder).rglob("model_0.pt")))


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_reference(args, env, compiled: bool = False) -> dict[str, list[float]]:
    import reference

    if hasattr(args, "teacher"):
        import ppo_continuous

        settings = torch.load(args.teacher[0], weights_only=True)["resume"]["args"]
        runner = reference.make_distillation_runner(args, env, ppo_continuous.Args(**settings), device=args.device)
    else:
        config = reference.configuration(args)
        if compiled:
            config["torch_compile_mode"] = "default"
        runner = reference.make_runner(args, env, config=config, device=args.device)
    marks, update, compute_returns = [now(args.device)], runner.alg.update, runner.alg.compute_returns

    def marked(function):
        def call(*arguments):
            if function is compute_returns:
                marks.append(now(args.device))
            result = function(*arguments)
            if function is update:
                marks.append(now(args.device))
            return result

        return call

    runner.alg.update, runner.alg.compute_returns = marked(update), marked(compute_returns)
    with quiet():
        runner.learn(args.max_iterations, init_at_random_ep_len=True)
    pairs = list(zip(marks, marks[1:]))
    return {"collection": [b - a for a, b in pairs[::2]], "learning": [b - a for a, b in pairs[1::2]]}


def time_ours(args, env) -> dict[str, list[float]]:
    script = sys.modules[type(args).__module__]
    with quiet():
        history = script.train(args, env)
    return {name: [metrics[f"Perf/{name}_time"] for metrics in history] for name in ("collection", "learning")}


def time_skrl(args, env) -> dict[str, list[float]]:
    """skrl's own agent, memory and trainer, with the networks, batch, coefficients and normalisation of `args`."""
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

    import ppo_continuous

    skrl.logger.setLevel("ERROR")
    size = env.get_observations()["policy"].shape[1]
    spaces = dict(
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (size,)),
        action_space=gymnasium.spaces.Box(-np.inf, np.inf, (env.num_actions,)),
    )

    class Wrapped(Wrapper):
        observation_space, action_space = spaces["observation_space"], spaces["action_space"]

        def reset(self):
            return self._env.get_observations()["policy"], {}

        def step(self, actions):
            obs, rewards, dones, extras = self._env.step(actions)
            truncated = extras["time_outs"].unsqueeze(-1)
            return obs["policy"], rewards.unsqueeze(-1), dones.unsqueeze(-1) & ~truncated, truncated, {}

        def state(self):
            return None

        def render(self):
            return None

        def close(self):
            pass

    class Policy(GaussianMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces, device=args.device)
            GaussianMixin.__init__(self)
            self.net = ppo_continuous.make_mlp(size, env.num_actions, args.actor_hidden_dims, args.activation)
            self.log_std = torch.nn.Parameter(torch.zeros(env.num_actions))

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {"log_std": self.log_std}

    class Value(DeterministicMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces, device=args.device)
            DeterministicMixin.__init__(self)
            self.net = ppo_continuous.make_mlp(size, 1, args.critic_hidden_dims, args.activation)

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
    with quiet():
        options = SequentialTrainerCfg(
            timesteps=steps, headless=True, disable_progressbar=True, close_environment_at_exit=False
        )
        SequentialTrainer(cfg=options, env=Wrapped(env), agents=agent).train()
    pairs = list(zip(marks, marks[1:]))
    return {"collection": [b - a for a, b in pairs[::2]], "learning": [b - a for a, b in pairs[1::2]]}


def time_file(source: str, args, env) -> dict[str, list[float]]:
    """CleanRL's or LeanRL's own file, run as it is, as a program; `env` stands in for its gymnasium environment."""
    import os
    import runpy
    from unittest import mock

    import gymnasium
    import numpy as np

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
    argv += [f"--{name}={value}" for name, value in flags.items()]
    torch._dynamo.reset()  # every round compiles anew: Dynamo gives up on a function after eight times
    with (
        quiet(),
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, WANDB_MODE="disabled"),
        mock.patch("torch.utils.tensorboard.SummaryWriter"),  # here nobody writes logs
        mock.patch.object(gymnasium.vector, "SyncVectorEnv", Vector),
        torch._dynamo.config.patch(trace_autograd_ops=False),  # torch's default, which our --compile changes
    ):
        runpy.run_path(source, run_name="__main__")
    # An iteration goes from its first env step to the next one's: the policy's step before that counts as learning.
    starts, ends = starts[::steps], ends[steps - 1 :: steps]
    pairs = {"collection": zip(starts, ends), "learning": zip(ends, starts[1:])}
    return {part: [b - a for a, b in marks] for part, marks in pairs.items()}


def time_round(name: str, args, settings: Settings) -> dict[str, float]:
    """Seconds that an iteration of a new training takes, and its parts: medians."""
    from envs import make

    functions = {
        "ours": time_ours,
        "rsl_rl": functools.partial(time_reference, compiled=settings.compile_peer),
        "skrl": time_skrl,
    }
    function = functions.get(name, functools.partial(time_file, settings.source))
    torch.set_num_threads(settings.threads)
    times = function(args, make(args.env, args.num_envs, device=args.device, seed=1))
    times["iteration"] = [a + b for a, b in zip(times["collection"], times["learning"])]
    return {part: statistics.median(values[3:]) for part, values in times.items()}


def compare(settings: Settings) -> dict:
    if settings.peer in ("cleanrl", "leanrl") and (not settings.source or settings.script != "ppo_continuous"):
        raise SystemExit(f"--peer {settings.peer} compares ppo_continuous with the file that --source names")
    args = make_args(settings)
    print(f"{settings.script} on {args.env}, {args.num_envs} environments, {settings.threads} threads, {settings.device}")
    # Each in a process of its own, as it would run: what one asks of the memory allocator does nothing for the other.
    fresh = multiprocessing.get_context("spawn")
    workers = {name: ProcessPoolExecutor(1, mp_context=fresh) for name in (settings.peer, "ours")}
    rounds = {name: [] for name in workers}
    for _ in range(settings.rounds):
        for name, worker in workers.items():
            rounds[name].append(worker.submit(time_round, name, args, settings).result())
    for worker in workers.values():
        worker.shutdown()
    figures = {}
    for part in ("collection", "learning", "iteration"):
        theirs, ours = ([entry[part] for entry in rounds[name]] for name in rounds)
        ratios = sorted(a / b for a, b in zip(theirs, ours))
        medians = statistics.median(theirs), statistics.median(ours)
        figures[part] = dict(theirs=medians[0], ours=medians[1], ratio=medians[0] / medians[1], low=ratios[0], high=ratios[-1])
    return figures


def floor(args) -> dict[str, float]:
    """The least time that an update of the base can take here: its matrix products at the rate of one large product, or its
    bytes at that of a large copy, whichever takes longer."""
    import ppo_continuous
    from envs import make

    def best(function) -> float:
        times = []
        for _ in range(5):
            start = now(args.device)
            function()
            times.append(now(args.device) - start)
        return min(times)

    env = make(args.env, 2)
    with quiet():
        models = ppo_continuous.make_models(env.get_observations(), env.num_actions, args)
    layers = [[p for p in model.mlp.parameters() if p.dim() == 2] for model in models]
    samples, steps = (
        args.num_envs * args.num_steps_per_env * args.num_learning_epochs,
        args.num_learning_epochs * args.num_mini_batches,
    )
    # Forward, gradient of the weights, gradient of the inputs (which the first layer needs not), 2 operations per weight each.
    flop = samples * sum(6 * sum(p.numel() for p in net) - 2 * net[0].numel() for net in layers)
    # Every input once; every layer's output written and read, and its gradient; seven passes over the weights for Adam.
    row = sum(net[0].shape[1] + 4 * sum(p.shape[0] for p in net) for net in layers) + 3 * env.num_actions + 4
    size = 4 * (samples * row + steps * 7 * sum(p.numel() for net in layers for p in net))
    matrix, block = torch.randn(2048, 2048, device=args.device), torch.randn(2**26, device=args.device)
    target = torch.empty_like(block)
    rate = 2 * 2048**3 / best(lambda: matrix @ matrix)
    bandwidth = 2 * 4 * 2**26 / best(lambda: target.copy_(block))
    return dict(gigaflop=flop / 1e9, gigaflop_per_s=rate / 1e9, gigabyte=size / 1e9, gigabyte_per_s=bandwidth / 1e9,
                seconds=max(flop / rate, size / bandwidth))  # fmt: skip


def count(settings: Settings, compiled: bool = True) -> dict:
    """ATen calls of one update over its mini-batches; views and host reads left out, a foreach call is one (instruments.py).

    And the most memory that all tensors of a training held at once, environment included.
    """
    import instruments
    import reference

    import ppo_continuous
    from envs import make

    full = dataclasses.replace(make_args(settings), max_iterations=2)
    args = dataclasses.replace(full, num_envs=64)
    mini_batches, figures = args.num_learning_epochs * args.num_mini_batches, {}

    def counted(function, name, optimizer=None):
        def call(*arguments):
            operations = instruments.Operations()
            on_host.clear()
            with instruments.host_reads() as reads, operations:
                result = function(*arguments)
            kernels = sum(n for kernel, n in operations.kernels.items() if not kernel.startswith("profiler"))
            waits = sum(reads.values()) - sum(on_host)
            figures[name] = dict(kernels=kernels / mini_batches, waits=waits)
            return result

        def step():  # on a GPU too torch's Adam has its step counters on the host: reading those is no wait
            with instruments.host_reads() as reads:
                take_step()
            on_host.append(sum(reads.values()))

        on_host = []
        if optimizer:
            take_step, optimizer.step = optimizer.step, step
        return call

    def make_runner(args, foreach: bool):
        runner = reference.make_runner(args, make(args.env, args.num_envs))
        runner.alg.optimizer.param_groups[0]["foreach"] = foreach
        return runner

    def megabytes(train) -> float:
        with quiet(), instruments.Memory() as memory:
            train()
        return memory.peak / 1e6

    for foreach in (False, True):
        runner = make_runner(args, foreach)
        name = f"rsl_rl, {'foreach' if foreach else 'looping'} Adam"
        runner.alg.update = counted(runner.alg.update, name, runner.alg.optimizer)
        with quiet():
            runner.learn(args.max_iterations)
        figures[name]["megabytes"] = megabytes(lambda: make_runner(full, foreach).learn(full.max_iterations))
    update, ppo_continuous.update = ppo_continuous.update, counted(ppo_continuous.update, "ours")
    with quiet():
        ppo_continuous.train(args, make(args.env, args.num_envs))
    ppo_continuous.update = update
    figures["ours"]["megabytes"] = megabytes(lambda: ppo_continuous.train(full, make(full.env, full.num_envs)))
    if compiled:
        # The waits are the eager ones: Dynamo's guards read float64 scalars where these are on the host anyway, on a CPU only.
        figures["ours, compiled"] = dict(kernels=count_compiled(args, mini_batches), waits=figures["ours"]["waits"])
    return figures


def count_compiled(args, mini_batches: int) -> float:
    """The same with --compile: what Inductor launches for a gradient step, plus the ATen calls around the steps."""
    import instruments
    import torch._inductor.config as inductor

    import ppo_continuous
    from envs import make

    inductor.cpp.enable_kernel_profile = True  # its kernels show in the profile by name
    around, inside = instruments.Operations(), instruments.Operations()
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    originals = {name: getattr(ppo_continuous, name) for name in ("update", "mini_batch_step")}

    def within(mode, name, when):
        calls = []

        def call(*arguments):
            calls.append(1)
            with mode if when(len(calls)) else contextlib.nullcontext():
                return originals[name](*arguments)

        setattr(ppo_continuous, name, call)

    with quiet():
        within(around, "update", lambda call: call == 2)
        within(inside, "mini_batch_step", lambda call: call > mini_batches)
        ppo_continuous.train(args, make(args.env, args.num_envs))
        ppo_continuous.mini_batch_step = originals["mini_batch_step"]
        within(profile, "update", lambda call: call == 2)
        ppo_continuous.train(dataclasses.replace(args, compile=True), make(args.env, args.num_envs))
        ppo_continuous.update = originals["update"]
    launched = [
        e for e in profile.events() if "cpp_fused" in e.name or e.name in ("aten::mm", "aten::addmm", "aten::_foreach_norm")
    ]
    return (sum(around.kernels.values()) - sum(inside.kernels.values()) + len(launched)) / mini_batches


def table(settings: Settings) -> dict:
    """A line of ratios for each row, without and with --compile."""
    print("| | learning | whole iteration | learning, ours with `--compile` | whole iteration |\n|---|---|---|---|---|")
    figures = {}
    for row in ROWS[settings.device.split(":")[0]]:
        cells = []
        for compiled in ("--no-compile", "--compile"):
            path = pathlib.Path(tempfile.mkdtemp()) / "figures.json"
            flags = ["--device", settings.device, "--float32-matmul-precision", settings.float32_matmul_precision, compiled]
            command = [sys.executable, __file__, *row.split(), *flags, "--json", str(path)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            figures[f"{row} {compiled}"] = parts = json.loads(path.read_text())["figures"]
            cells += ["{ratio:.2f} ({low:.2f} to {high:.2f})".format(**parts[part]) for part in ("learning", "iteration")]
        print(f"| `{row}` | {' | '.join(cells)} |", flush=True)
    return figures


def main(settings: Settings) -> None:
    if settings.table:
        figures = table(settings)
    elif settings.count:
        figures = count(settings)
        for name, entry in figures.items():
            print(f"{name:24s} {entry['kernels']:6.1f} kernels per mini-batch   {entry['waits']:4d} waits per update", end="")
            print(f"   {entry['megabytes']:4.0f} MB at most" if "megabytes" in entry else "")
    else:
        figures = compare(settings)
        for part, entry in figures.items():
            times = f"{settings.peer} {entry['theirs'] * 1e3:8.1f} ms   ours {entry['ours'] * 1e3:8.1f} ms"
            print(f"{part:12s} {times}   ratio {entry['ratio']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})")
        if settings.script == "ppo_continuous":
            torch.set_float32_matmul_precision(settings.float32_matmul_precision)
            least = figures["floor"] = floor(make_args(settings))
            parts = f"{least['gigaflop']:.3g} GFLOP at {least['gigaflop_per_s']:.0f} GFLOP/s, {least['gigabyte']:.3g} GB"
            print(
                f"floor of learning: {least['seconds'] * 1e3:.1f} ms ({parts} at {least['gigabyte_per_s']:.0f} GB/s); ours",
                end=" ",
            )
            print(f"takes {figures['learning']['ours'] / least['seconds']:.1f} times that")
    if settings.json:
        pathlib.Path(settings.json).write_text(json.dumps(dataclasses.asdict(settings) | {"figures": figures}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__.split("\n\n")[0]))
