"""What knowing left from right buys the quadruped: PPO without and with mirrored samples, same environment steps, several seeds.

    python tests/benchmarks/symmetry.py                             # 10 trainings, 2 to 3 minutes each on one core

Prints one table: mean and 95 % interval over the seeds (Student's t) at fixed numbers of env steps, and of the difference
between the arms, paired by seed. Every training is `python ppo_symmetry.py --seed <seed>`, without symmetry with
--no-use-data-augmentation, which trains exactly as ppo_continuous.py does and only logs the mirror error. Finished trainings
are kept in --out, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ARMS = {"PPO": dict(use_data_augmentation=False), "PPO + mirrored samples": dict(use_data_augmentation=True)}
TAGS = {
    "Metrics/velocity_error": "velocity error [m/s]",
    "Train/mean_reward": "return of an episode",
    "Loss/symmetry": "mirror error of the policy",
}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, n - 1 degrees, 97.5 %


def train(arm: str, seed: int, iterations: int) -> dict[str, list[float]]:
    """One training with the settings that the command line would take; what the table needs of every iteration."""
    import ppo_symmetry
    from envs import defaults

    settings = defaults("quadruped", ppo_symmetry.Args.__dataclass_fields__) | ARMS[arm]
    args = ppo_symmetry.Args(**settings | dict(env="quadruped", seed=seed, max_iterations=iterations, log_root=""))
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        history = ppo_symmetry.train(args)
    steps = args.num_envs * args.num_steps_per_env
    return {"steps": [steps * (i + 1) for i in range(iterations)]} | {tag: [m[tag] for m in history] for tag in TAGS}


def interval(values: list[float]) -> str:
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):9.4f} +- {half:.4f}"


def print_table(results: dict[str, dict[int, dict]], budgets: list[float]) -> None:
    """Each number is the mean of the 5 iterations that end at the budget."""
    for tag, label in TAGS.items():
        print(f"\n{label:36s}" + "".join(f"{arm:>26s}" for arm in ARMS) + f"{'difference':>26s}")
        for budget in budgets:
            values = {arm: [] for arm in ARMS}
            for arm, runs in results.items():
                for run in runs.values():
                    end = sum(steps <= 1.001e6 * budget for steps in run["steps"])
                    values[arm].append(statistics.mean(run[tag][end - 5 : end]))
            differences = [b - a for a, b in zip(*values.values())]
            columns = "".join(f"{interval(x):>26s}" for x in (*values.values(), differences))
            print(f"  after {budget:4.1f} million env steps        {columns}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="million env steps")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/benchmark_symmetry"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict]] = {arm: {} for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            file = options.out / f"{arm.replace(' ', '_')}_{seed}.json"
            if not file.exists():
                iterations = math.ceil(1e6 * max(options.budgets) / (1024 * 24))
                file.write_text(json.dumps(train(arm, seed, iterations)))
                print(f"trained {arm}, seed {seed}", flush=True)
            results[arm][seed] = json.loads(file.read_text())
    print_table(results, options.budgets)


if __name__ == "__main__":
    main()
