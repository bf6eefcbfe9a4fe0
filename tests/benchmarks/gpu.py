"""The first minutes on a GPU: what works there, what it costs, and how many times faster than rsl_rl 5.5.1 it is.

    python tests/benchmarks/gpu.py --out results               # everything, in at most seven minutes
    python tests/benchmarks/gpu.py --out results --parts speed profile
    python tests/benchmarks/gpu.py --out results --device cpu --tiny    # its logic, on any machine

Parts, each with its own limit: `env` (machine and versions), `equal` (every script eager, with graphs, compiled: the same
numbers) beside `tests` (tests/test_cuda.py), `speed` (whole iteration and learner alone against rsl_rl, in turn A B A B), and
`profile` (kernels, launches, waits and idle share of one iteration). rsl_rl steps the same environment as ours, captured in
one CUDA graph, since most launches of an iteration are the environment's; `still` costs nothing, so that the learners alone
are compared. Every job is a process of its own: what fails or takes too long is a line, and the rest goes on. Results:
`results.jsonl`, a line each, as they come; `summary.md`, tables; `log.txt`, what failed processes said.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from typing import Literal

import torch
import tyro
from tensordict import TensorDict

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMITS = {"env": 30, "equal": 140, "tests": 140, "speed": 190, "profile": 50}  # s; `equal` and `tests` run together
Part = Literal["env", "equal", "tests", "speed", "profile"]


@dataclasses.dataclass
class Options:
    out: str = os.environ.get("OUT", "gpu")
    """Folder of the results."""
    parts: tuple[Part, ...] = ("env", "equal", "tests", "speed", "profile")
    device: str = "cuda"
    budget: float = 410.0
    """Seconds for everything."""
    workers: int = 8
    """Processes of `equal` at once."""
    cases: tuple[int, ...] = ()
    """Of `equal`: places in tests/cases.py, EVERYWHERE; default: all."""
    growth: bool = True
    """`speed` begins with 200 iterations, and how much memory they have cost at their end."""
    tiny: bool = False
    """Sixteen environments, few steps."""
    job: str = ""
    """Of a process that this script starts: what it is to do, as JSON."""


@dataclasses.dataclass(frozen=True)
class Race:
    """Ours against rsl_rl."""

    env: str
    num_envs: int
    hidden_dims: tuple[int, ...]
    precision: str = "fp32"  # or "tf32", "bf16"
    compile: bool = False

    def __str__(self):
        dims = "-".join(map(str, self.hidden_dims))
        return f"{self.env} {self.num_envs} {dims} {self.precision}{' compiled' * self.compile}"


LARGE, SMALL = (512, 256, 128), (128, 64)
RACES = [Race(env, 4096, LARGE, "tf32") for env in ("still", "quadruped")]  # TF32 as Isaac Lab's and mjlab's scripts train
RACES += [Race("still", 4096, LARGE, "bf16"), *(Race(env, 4096, LARGE, "fp32") for env in ("still", "quadruped"))]
RACES += [Race(env, n, dims, "tf32") for n, dims in ((16384, LARGE), (4096, SMALL)) for env in ("still", "quadruped")]
RACES += [Race("still", 4096, LARGE, precision, compile=True) for precision in ("tf32", "bf16")]
RACES += [Race("quadruped", 4096, LARGE, "tf32", compile=True), Race("still", 16384, LARGE, "bf16")]
RACES += [Race(env, 16384, SMALL, "tf32") for env in ("still", "quadruped")]


# ---- Environments ----


class Still:
    """The quadruped's sizes; a step costs nothing. What it hands out is always the same memory, as a simulator's may be."""

    capturable, max_episode_length, step_dt, cfg = True, 1000, 0.02, {}

    def __init__(self, num_envs: int, device: str):
        self.num_envs, self.num_actions, self.device = num_envs, 12, torch.device(device)
        generator = torch.Generator().manual_seed(0)
        groups = {name: torch.randn(num_envs, size, generator=generator) for name, size in (("policy", 48), ("privileged", 64))}
        self.obs = TensorDict(groups, batch_size=[num_envs]).to(device)
        self.rewards = self.obs["policy"][:, 0] * 0.01
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.dones = torch.zeros(num_envs, dtype=torch.bool, device=device)

    def get_observations(self):
        return self.obs

    def step(self, actions):
        return self.obs, self.rewards, self.dones, {"time_outs": self.dones}


class Captured:
    """An environment whose step is one CUDA graph, for rsl_rl: its loop cannot be captured, and so is not slowed by ours."""

    def __init__(self, env):
        self.env, self.calls, self.graph = env, 0, None
        self.actions = torch.zeros(env.num_envs, env.num_actions, device=env.device)

    def __getattr__(self, name):
        return getattr(self.env, name)

    def __setattr__(self, name, value):
        if name == "episode_length_buf":
            self.env.episode_length_buf = value
        else:
            super().__setattr__(name, value)

    def step(self, actions):
        self.actions.copy_(actions)
        self.calls += 1
        if self.calls < 3 or self.actions.device.type == "cpu":
            return self.env.step(self.actions)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.env.generator)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.env.step(self.actions)
        self.graph.replay()
        obs, rewards, dones, extras = self.result  # copies, since the next replay overwrites them
        copies = {k: v.clone() if hasattr(v, "clone") else {n: x.clone() for n, x in v.items()} for k, v in extras.items()}
        return obs.clone(), rewards.clone(), dones.clone(), copies


def make_env(name: str, num_envs: int, device: str, compile: bool = False):
    from envs import make

    return Still(num_envs, device) if name == "still" else make(name, num_envs, device=device, seed=1, compile=compile)


# ---- Jobs: each runs in a process of its own, and reports by `emit` ----


def emit(**result):
    print("RESULT " + json.dumps(result, default=str), flush=True)


def job_env(options: Options):
    facts = dict(python=platform.python_version(), torch=torch.__version__, cpus=os.cpu_count())
    for name in ("tensordict", "triton", "rsl-rl-lib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    if options.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= dict(gpu=gpu.name, memory_gb=round(gpu.total_memory / 1e9, 1), cuda=torch.version.cuda)
        facts |= dict(cudnn=torch.backends.cudnn.version(), nccl=torch.cuda.nccl.version())
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,temperature.gpu,memory.used", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    emit(part="env", name="facts", **facts)


def train(module, environment=None, **settings):
    """History, and what was said of graphs."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        history = module.train(module.Args(log_root="", **settings), environment)
    return history, [line for line in out.getvalue().splitlines() if "graph" in line]


def differences(ours: list[dict], theirs: list[dict]) -> list[tuple[float, str]]:
    """Of each iteration the largest relative difference, and what differs so."""
    return [
        max(
            (abs(mine[tag] - x) / max(abs(x), 1e-2), tag) for tag, x in other.items() if "Perf" not in tag and not math.isnan(x)
        )
        for mine, other in zip(ours, theirs, strict=True)
    ]


def job_reference(options: Options, optimizer: str):
    """Losses and learning rates against rsl_rl's on the same device, in float32: it rounds otherwise, and rounding grows."""
    import reference

    import ppo_continuous as module

    num_envs = 16 if options.tiny else 4096
    settings = ours_of(Race("quadruped", num_envs, LARGE), options, 6) | dict(env="quadruped", optimizer=optimizer)
    args = module.Args(log_root="", **settings)
    module.set_up_torch(args)
    theirs, _ = reference.run(args, make_env("quadruped", num_envs, options.device), device=options.device)
    ours, said = train(module, make_env("quadruped", num_envs, options.device), **settings)
    worst = differences(ours, theirs)
    result = dict(ok=worst[0][0] < 1e-5, differs=[f"{x:.1e}" for x, _ in worst], most=max(worst)[1], said=said)
    emit(part="equal", case=f"ppo_continuous quadruped {num_envs} {optimizer}", name="rsl_rl", **result)


def job_equal(options: Options, index: int, mode: str):
    """A case eager, then eager again (what differs there is noise) and with graphs, or compiled: largest relative difference."""
    import cases

    script, env_id, settings = cases.EVERYWHERE[index]
    module = importlib.import_module(script)
    settings = cases.SHORT | settings | dict(env=env_id, device=options.device, max_iterations=6)
    settings.pop("log_root", None)
    if script == "distill_dagger":
        cases.write_teacher("teacher.pt", make_env(env_id, 1, "cpu"))
        settings["teacher"] = ("teacher.pt",)
    if mode == "compiled" and script != "distill_dagger":
        # What is compiled rounds otherwise: a KL of 0 becomes 1e-9, and the adaptive schedule answers with another rate.
        settings["schedule"] = "fixed"
    eager, _ = train(module, **settings, cuda_graphs=False)
    for name in ("eager again", "graphs") if mode == "graphs" else ("compiled",):
        start = time.time()
        history, said = train(module, **settings, cuda_graphs=name != "eager again", compile=name == "compiled")
        worst = differences(history, eager)
        difference, tag = max(worst)
        result = dict(ok=difference < 1e-3, differs=[f"{x:.1e}" for x, _ in worst], most=tag, said=said)
        emit(part="equal", case=f"{script} {env_id}", name=name, **result, s=round(time.time() - start, 1))


def ours_of(race: Race, options: Options, iterations: int) -> dict:
    settings = dict(device=options.device, num_envs=race.num_envs, max_iterations=iterations, timeout_bootstrap="value")
    settings |= dict(actor_hidden_dims=race.hidden_dims, critic_hidden_dims=race.hidden_dims, compile=race.compile)
    settings |= dict(actor_obs=("policy",), critic_obs=("policy", "privileged"), use_mixed_precision=race.precision == "bf16")
    settings |= dict(float32_matmul_precision="highest" if race.precision == "fp32" else "high")
    return settings | (dict(num_steps_per_env=4, num_learning_epochs=1) if options.tiny else {})


def wait(options: Options):
    if options.device == "cuda":
        torch.cuda.synchronize()


def time_ours(race: Race, options: Options, iterations: int):
    import ppo_continuous as module

    env = make_env(race.env, race.num_envs, options.device, race.compile)
    history, said = train(module, env, **ours_of(race, options, iterations))
    return [(m["Perf/collection_time"], m["Perf/learning_time"]) for m in history], said


def make_rsl_rl(race: Race, options: Options, iterations: int):
    import reference

    import ppo_continuous as module

    args = module.Args(log_root="", **ours_of(race, options, iterations))
    module.set_up_torch(args)
    config = reference.configuration(args)
    config["algorithm"]["use_mixed_precision"] = args.use_mixed_precision
    config["torch_compile_mode"] = "default" if race.compile else None
    env = make_env(race.env, race.num_envs, options.device, race.compile)
    env = Captured(env) if hasattr(env, "generator") else env
    return reference.make_runner(args, env, config=config, device=options.device)


def time_rsl_rl(race: Race, options: Options, iterations: int, after_update=lambda count: None):
    """rsl_rl's own loop; collection ends, and learning begins, where it computes the returns."""
    runner, marks = make_rsl_rl(race, options, iterations), []
    update, compute_returns = runner.alg.update, runner.alg.compute_returns

    def mark():
        wait(options)
        marks.append(time.perf_counter())

    def returns(*arguments):
        mark()
        return compute_returns(*arguments)

    def updated(*arguments):
        losses = update(*arguments)
        mark()
        after_update(len(marks) // 2)
        return losses

    runner.alg.update, runner.alg.compute_returns = updated, returns
    mark()
    with contextlib.redirect_stdout(io.StringIO()):
        runner.learn(iterations, init_at_random_ep_len=True)
    return [(b - a, c - b) for a, b, c in zip(marks[::2], marks[1::2], marks[2::2])], []


def job_speed(options: Options, races: list[dict]):
    for race in races:
        measure(options, Race(**race | dict(hidden_dims=tuple(race["hidden_dims"]))))


def measure(options: Options, race: Race):
    """Ours, rsl_rl, ours, rsl_rl: medians over the iterations that replay, in ms."""
    sides = {"ours": time_ours, "rsl_rl": time_rsl_rl}
    iterations, warm = (6, 4) if options.tiny else (10, 5)
    times, facts = {name: [] for name in sides}, {}
    for _ in range(1 if options.tiny else 2):
        for name, run in sides.items():
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, said = run(race, options, iterations)
            times[name] += seconds[warm:]
            facts |= {"said": said} if said else {}
            if options.device == "cuda":
                facts[f"{name}_reserved_mb"] = round(torch.cuda.max_memory_reserved() / 1e6)
    ms = {name: [1e3 * statistics.median(column) for column in zip(*pairs)] for name, pairs in times.items()}
    for name, (collection, learning) in ms.items():
        facts |= {f"{name}_collection": round(collection, 2), f"{name}_learning": round(learning, 2)}
    facts["learner"] = round(ms["rsl_rl"][1] / ms["ours"][1], 2)
    facts["whole"] = round(sum(ms["rsl_rl"]) / sum(ms["ours"]), 2)
    facts["steps_per_s"] = round(24 * race.num_envs / sum(ms["ours"]) * 1e3)
    emit(part="speed", name=str(race), num_envs=race.num_envs, **facts)


def job_growth(options: Options):
    """Memory after 20 and after 200 iterations."""
    import ppo_continuous as module

    log, reserved = module.log_iteration, []

    def noted(*arguments):
        reserved.append(torch.cuda.memory_reserved() if options.device == "cuda" else 0)
        return log(*arguments)

    module.log_iteration = noted
    race = Race("still", 16 if options.tiny else 1024, SMALL)
    start = time.time()
    train(module, make_env(race.env, race.num_envs, options.device), **ours_of(race, options, 25 if options.tiny else 200))
    growth = (reserved[-1] - reserved[20]) / 1e6
    emit(part="speed", name="memory growth from iteration 20 on", mb=growth, s=round(time.time() - start, 1))


def describe(events, seconds: float) -> dict:
    """Kernels, launches and waits of what a profile saw; idle is the share of `seconds` in which the GPU had nothing to do."""
    host, device = [], []
    for event in events:
        on_device = "CUDA" in str(event.device_type())
        (device if on_device else host).append((event.name(), event.start_ns(), event.start_ns() + event.duration_ns()))
    busy, end = 0, 0
    for _, start, stop in sorted(device, key=lambda x: x[1]):
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    took = Counter()
    for name, start, stop in device:
        took[name] += stop - start
    # CUDA 13 launches by `__cudaLaunchKernel`, which some profilers do not know and call INVALID.
    launches = sum("LaunchKernel" in name or name == "INVALID" for name, *_ in host)
    waits = sum(name.endswith("Synchronize") for name, *_ in host)
    top = [f"{ns / 1e6:.2f} ms {name[:80]}" for name, ns in took.most_common(8)]
    result = dict(
        kernels=len(device), launches=launches, graph_launches=sum(n == "cudaGraphLaunch" for n, *_ in host), waits=waits
    )
    return result | dict(busy_ms=round(busy / 1e6, 2), idle=round(1.0 - busy / 1e9 / seconds, 3), top=top)


def job_profile(options: Options, side: str):
    """One iteration of a run that is warm; `idle` is measured against the iterations before, which no profiler slows down."""
    import ppo_continuous as module

    race, warm = Race("quadruped", 16 if options.tiny else 4096, LARGE), 6
    profile, found = torch.profiler.profile(), []

    def step(count):
        if count == warm:
            wait(options)
            profile.start()
        elif count == warm + 1:
            wait(options)
            profile.stop()
            found.append(profile.profiler.kineto_results.events())

    if side == "rsl_rl":
        times, _ = time_rsl_rl(race, options, warm + 2, after_update=step)
    else:
        log, calls = module.log_iteration, []

        def logged(*arguments):
            calls.append(1)
            metrics = log(*arguments)
            step(len(calls))
            return metrics

        module.log_iteration = logged
        settings = ours_of(race, options, warm + 2) | dict(cuda_graphs=side != "ours eager")
        history, _ = train(module, make_env(race.env, race.num_envs, options.device), **settings)
        times = [(m["Perf/collection_time"], m["Perf/learning_time"]) for m in history]
    seconds = statistics.median(map(sum, times[3:warm]))
    emit(part="profile", name=side, iteration_ms=round(1e3 * seconds, 2), **describe(found[0], seconds))


# ---- The process that starts them ----


class Report:
    def __init__(self, options: Options):
        self.out, self.start, self.results = pathlib.Path(options.out).resolve(), time.time(), []
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, **result):
        self.results.append(result)
        with (self.out / "results.jsonl").open("a") as file:
            print(json.dumps(result), file=file)
        shown = " ".join(f"{name}={x}" for name, x in result.items() if name not in ("part", "top"))
        print(f"[{time.time() - self.start:4.0f} s] {result['part']}: {shown[:300]}", flush=True)

    def note(self, text: str):
        with (self.out / "log.txt").open("a") as file:
            print(text, file=file)


def run_job(options: Options, report: Report, limit: float, part: str, function: str, names=(), **arguments) -> int:
    """In a process of its own, with a limit in seconds; a failure is a result too. Returns the number of results.

    names: of the results that are awaited, in their order; what fails has the name of the first that did not come.
    """
    names = names or [" ".join(map(str, arguments.values()))]
    if limit < 6:
        report.add(part=part, name=names[0], failed="no time left")
        return 1
    job = json.dumps([function, arguments])
    command = [sys.executable, __file__, "--job", job, "--device", options.device, *(["--tiny"] if options.tiny else [])]
    environ = os.environ | dict(WANDB_MODE="disabled", GIT_PYTHON_REFRESH="quiet", PYTHONUNBUFFERED="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=environ, start_new_session=True, **pipes)
    late = threading.Timer(limit, lambda: os.killpg(process.pid, 9))
    late.start()
    said, results = [], 0
    for line in process.stdout:
        if line.startswith("RESULT "):
            report.add(**json.loads(line.removeprefix("RESULT ")))
            results += 1
        else:
            said.append(line.rstrip())
    late.cancel()
    if process.wait():
        why = f"not done in {limit:.0f} s" if process.returncode == -9 else next((x for x in reversed(said) if x), "")
        name = names[min(results, len(names) - 1)]
        report.add(part=part, name=name, failed=why[:300])
        report.note(f"==== {part} {name}: exit status {process.returncode}\n" + "\n".join(said[-60:]))
        results += 1
    return results


def part_env(options: Options, report: Report, end: float):
    run_job(options, report, end - time.time(), "env", "job_env")


def part_equal(options: Options, report: Report, end: float):
    import cases

    chosen = options.cases or range(len(cases.EVERYWHERE))
    jobs = [dict(index=index, mode=mode) for mode in ("graphs", "compiled") for index in chosen]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda job: run_job(options, report, end - time.time(), "equal", "job_equal", **job), jobs))
    for optimizer in ("adam", "sgd") if not options.cases else ():
        run_job(options, report, end - time.time(), "equal", "job_reference", optimizer=optimizer)


def part_tests(options: Options, report: Report, end: float):
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-rfE", "--tb=short", "-o", "addopts="]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=end - time.time())
    except subprocess.TimeoutExpired as error:
        return report.add(part="tests", name="test_cuda.py", failed=f"not done in {error.timeout:.0f} s")
    lines = [line for line in run.stdout.splitlines() if line]
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    report.note(run.stdout[-20000:] + run.stderr[-2000:])
    report.add(part="tests", name="test_cuda.py", ok=run.returncode == 0, summary=lines[-1] if lines else "", failures=failed)


def part_speed(options: Options, report: Report, end: float):
    """The most telling first, in one process until one of them fails; what no time is left for is said."""
    left = [Race("quadruped", 16, (8,)), Race("still", 16, (8,))] if options.tiny else RACES
    if options.growth:
        run_job(options, report, min(40.0, end - time.time()), "speed", "job_growth")
    while left:
        races, names = [dataclasses.asdict(race) for race in left], [str(race) for race in left]
        left = left[max(1, run_job(options, report, end - time.time(), "speed", "job_speed", names, races=races)) :]


def part_profile(options: Options, report: Report, end: float):
    for side in ("ours", "rsl_rl", "ours eager"):
        run_job(options, report, end - time.time(), "profile", "job_profile", side=side)


def table(rows: list[dict], *columns: str) -> list[str]:
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        cells = [" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in cells]
        lines.append("| " + " | ".join([*cells[:-1], f"{cells[-1]} {row.get('failed', '')}".strip()]) + " |")
    return lines


def summary(report: Report) -> str:
    of = {part: [x for x in report.results if x["part"] == part] for part in LIMITS}
    lines = ["# On the GPU", "", *(f"- {name}: {x}" for facts in of["env"] for name, x in facts.items() if name != "part")]
    lines += ["", "## Equal to the eager run: largest relative difference, by iteration"]
    lines += table(sorted(of["equal"], key=lambda x: x.get("case", "")), "case", "name", "ok", "differs", "most", "said")
    lines += ["", "## Tests", *table(of["tests"], "name", "ok", "summary", "failures")]
    lines += ["", "## Speed: ms of ours and of rsl_rl, and how many times faster ours are"]
    sides = [f"{side}_{part}" for part in ("collection", "learning") for side in ("ours", "rsl_rl")]
    lines += table([x for x in of["speed"] if "mb" not in x], "name", *sides, "learner", "whole", "ours_reserved_mb", "said")
    lines += [f"\n{x['name']}: {x['mb']} MB" for x in of["speed"] if "mb" in x]
    lines += ["", "## One iteration of the quadruped, 4096 environments, 512-256-128"]
    lines += table(of["profile"], "name", "kernels", "launches", "graph_launches", "waits", "busy_ms", "iteration_ms", "idle")
    lines += [f"\n{x['name']}: {'; '.join(x['top'])}" for x in of["profile"] if "top" in x]
    return "\n".join(lines) + "\n"


def main(options: Options):
    report = Report(options)

    def work(part: str):
        end = min(time.time() + LIMITS[part], report.start + options.budget) if not options.tiny else time.time() + 300
        try:
            globals()[f"part_{part}"](options, report, end)
        except Exception as error:
            report.note(traceback.format_exc())
            report.add(part=part, name=part, failed=f"{type(error).__name__}: {error}")
        (report.out / "summary.md").write_text(summary(report))

    together = [part for part in options.parts if part in ("equal", "tests")]  # neither is timed
    for part in [x for x in options.parts if x == "env"]:
        work(part)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(work, together))
    for part in [x for x in options.parts if x in ("speed", "profile")]:
        work(part)
    print(f"\n{summary(report)}\ntook {time.time() - report.start:.0f} s")


if __name__ == "__main__":
    given = tyro.cli(Options)
    if not given.job:
        main(given)
    else:
        function, arguments = json.loads(given.job)
        os.chdir(tempfile.mkdtemp())
        try:
            globals()[function](given, **arguments)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(3)  # after a failed capture torch may hang at its end
        sys.stdout.flush()
        os._exit(0)
