"""What each detail of PPO is worth: one is taken away at a time, on a control task and on the quadruped, several seeds each.

    python tests/benchmarks/details.py                                  # 2 x 15 x 5 trainings: hours on a CPU
    python tests/benchmarks/details.py --tasks cartpole                 # a quarter of an hour on one core
    python tests/benchmarks/details.py --device cuda --workers 8        # eight at once on a GPU

Prints a table for each task, mean and standard deviation over the seeds of the last tenth of the training, and draws
assets/details.png. Finished trainings are kept in --out, and an interrupted run goes on there. What no flag takes away is
taken out of a copy of the script, line by line, as an edit of one's own would.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile

import torch
import tyro

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DETAILS = {  # settings, or (line, what stands there instead)
    "everything": {},
    "time-outs: V(s_t), as rsl_rl": dict(timeout_bootstrap="value"),
    "time-outs: nothing": dict(timeout_bootstrap="none"),
    "no observation normalisation": dict(obs_normalization=False),
    "no advantage normalisation": (
        "        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)\n",
        "        pass\n",
    ),
    "advantages normalised per mini-batch": dict(normalize_advantage_per_mini_batch=True),
    "learning rate fixed at 1e-3": dict(schedule="fixed"),
    "learning rate fixed at 3e-4": dict(schedule="fixed", learning_rate=3e-4),
    "no gradient clipping": dict(max_grad_norm=1e9),
    "no value clipping": dict(use_clipped_value_loss=False),
    "no entropy bonus": dict(entropy_coef=0.0),
    "all episodes start together": dict(init_at_random_ep_len=False),
    "initial std 0.3": dict(init_std=0.3),
    "critic sees what the actor sees": dict(critic_obs=("policy",)),
    "actor's last layer x 0.01": (
        "            nn.init.zeros_(self.mlp[-1].weight[distribution.num_actions :])\n",
        "            nn.init.zeros_(self.mlp[-1].weight[distribution.num_actions :])\n"
        "            self.mlp[-1].weight.data *= 0.01\n",
    ),
}
TAGS = {
    "Train/mean_reward": "return",
    "Metrics/velocity_error": "velocity error [m/s]",
    "Loss/explained_variance": "explained variance",
    "Loss/kl": "KL",
}


@dataclasses.dataclass
class Options:
    tasks: tuple[str, ...] = ("cartpole", "quadruped")
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    details: tuple[str, ...] = tuple(DETAILS)
    device: str = "cpu"
    workers: int = 1
    """Trainings at once."""
    iterations: int = 0
    """Of each training; 0: what the task recommends."""
    out: pathlib.Path = pathlib.Path("logs/benchmark_details")


def script_with(change):
    """ppo_continuous.py as a module; with a line exchanged, wherever it stands, if `change` is one."""
    source = (ROOT / "ppo_continuous.py").read_text()
    if isinstance(change, tuple):
        assert change[0] in source, change[0]
        source = source.replace(*change)
    path = pathlib.Path(tempfile.mkdtemp()) / "ppo_continuous.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("ppo_details", path)
    module = sys.modules["ppo_details"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_settings(task: str, module, seed: int, device: str, iterations: int) -> dict:
    """What the task recommends, for a training that writes nothing."""
    from envs import defaults

    settings = defaults(task, module.Args.__dataclass_fields__)
    settings |= dict(env=task, seed=seed, device=device, log_root="")
    return settings | (dict(max_iterations=iterations) if iterations else {})


def train(task: str, detail: str, seed: int, device: str, iterations: int) -> dict[str, float]:
    """Means over the last tenth of one training."""
    torch.set_num_threads(1)
    change = DETAILS[detail]
    module = script_with(change)
    settings = task_settings(task, module, seed, device, iterations) | (change if isinstance(change, dict) else {})
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        try:
            history = module.train(module.Args(**settings))
        except FloatingPointError:
            return {}
    if len(history) < settings["max_iterations"]:  # Ctrl-C has ended it: half a training is no result
        raise KeyboardInterrupt
    last = history[-max(1, len(history) // 10) :]
    return {
        tag: statistics.mean([m[tag] for m in last if not math.isnan(m[tag])] or [math.nan]) for tag in TAGS if tag in last[0]
    }


def job(options: Options, task: str, detail: str, seed: int) -> None:
    name = "".join(x if x.isalnum() else "_" for x in f"{task} {detail} {seed}")
    file = options.out / f"{name}.json"
    if not file.exists():
        file.write_text(
            json.dumps(
                dict(task=task, detail=detail, seed=seed, **train(task, detail, seed, options.device, options.iterations))
            )
        )


def shown(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{float(f'{statistics.mean(values):.3g}'):g} ± {float(f'{spread:.2g}'):g}" if values else ""


def print_table(task: str, results: list[dict]) -> None:
    tags = [tag for tag in TAGS if any(tag in x for x in results)]
    print(f"\n| {task} | seeds | {' | '.join(TAGS[tag] for tag in tags)} |\n|" + "---|" * (2 + len(tags)))
    for detail in DETAILS:
        runs = [x for x in results if x["detail"] == detail]
        if runs:
            ended = f" ({sum(len(x) == 3 for x in runs)} became NaN)" if any(len(x) == 3 for x in runs) else ""
            columns = [shown([x[tag] for x in runs if not math.isnan(x.get(tag, math.nan))]) for tag in tags]
            print(f"| {detail} | {len(runs)}{ended} | {' | '.join(columns)} |")


def draw(tasks: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Returns, one dot a seed, against the mean of the whole algorithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 4 * len(tasks), 5), layout="tight")
    for axis, (task, results) in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks.items()):
        for row, detail in enumerate(DETAILS):
            values = [x.get("Train/mean_reward", math.nan) for x in results if x["detail"] == detail]
            axis.plot(values, [row] * len(values), "o", color="#1565c0" if row else "#2e7d32", alpha=0.6)
            if not row:
                axis.axvline(statistics.mean(values), color="#2e7d32", linewidth=1.0)
        axis.set_yticks(range(len(DETAILS)), DETAILS)
        axis.set_ylim(len(DETAILS) - 0.5, -0.5)  # the first on top
        axis.set_xlabel(f"{task}: return")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"\nwrote {path}")


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(task, detail, seed) for task in options.tasks for seed in options.seeds for detail in options.details]
    jobs = [x for x in jobs if x[0] != "cartpole" or "critic" not in x[1]]  # it has one group only
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        for future in [pool.submit(job, options, *x) for x in jobs]:
            future.result()
    results = [json.loads(file.read_text()) for file in sorted(options.out.glob("*.json"))]
    tasks = {task: [x for x in results if x["task"] == task] for task in options.tasks}
    for task, its in tasks.items():
        print_table(task, its)
    draw(tasks, ROOT / "assets" / "details.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
