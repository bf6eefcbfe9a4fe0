"""What memory, eyes and a teacher are worth on rough terrain: eight ways to a walking robot, several seeds.

    python tests/benchmarks/rough.py                                # 40 trainings, 2 to 6 minutes each on one core

Trains each arm of `ARMS` with what the task recommends else, plays every policy on 256 fresh robots spread over all terrain
levels, without noise and pushes, and prints one table: mean and 95 % interval over the seeds (Student's t). Finished trainings
are kept in --out, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
from symmetry import interval  # noqa: E402

BLIND, SCAN, ALL = ("policy",), ("policy", "scan"), ("policy", "privileged")
GRU, CNN = dict(rnn_type="gru", rnn_hidden_dim=64), dict(cnn_output_channels=(8, 16), cnn_stride=2)
ARMS = {  # name: script and settings
    "PPO, blind": ("ppo_continuous", dict(actor_obs=BLIND)),
    "PPO, blind, GRU": ("ppo_rnn", dict(actor_obs=BLIND, **GRU)),
    "PPO, height scan, CNN": ("ppo_cnn", dict(actor_obs=SCAN, **CNN)),
    "PPO, privileged: the teacher": ("ppo_continuous", dict(actor_obs=ALL)),
    "student, blind": ("distill_dagger", dict(student_obs=BLIND, rnn_type="none")),
    "student, blind, GRU": ("distill_dagger", dict(student_obs=BLIND)),
    "student, height scan, CNN": ("distill_dagger", dict(student_obs=SCAN, rnn_type="none", **CNN)),
    "behaviour cloning, blind, GRU": ("distill_dagger", dict(student_obs=BLIND, beta=1.0)),
}
TEACHER = "PPO, privileged: the teacher"
MEASURES = {
    "Metrics/velocity_error": "velocity error [m/s]",
    "return": "return",
    "episode_length": "episode length [env steps]",
}


def name_of(arm: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z]+', '_', arm)}_{seed}"


def train_and_play(arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one arm, then play its policy; means over the episodes."""
    from envs import defaults

    script, own = ARMS[arm]
    module = importlib.import_module(script)
    settings = defaults("quadruped-rough", module.Args.__dataclass_fields__) | own
    settings |= dict(env="quadruped-rough", seed=seed, device="cpu", save_interval=1000)
    settings |= dict(log_root=str(options.out.resolve()), experiment_name=name_of(arm, seed))
    if script == "distill_dagger":
        settings |= dict(teacher=(str(options.out.resolve() / name_of(TEACHER, seed)),))
    else:
        settings |= dict(max_iterations=250)
    args = module.Args(**settings | ({"max_iterations": options.iterations} if options.iterations else {}))
    with contextlib.redirect_stdout(None):
        history = module.train(args)
        checkpoint = str(history.run_dir / f"model_{args.max_iterations - 1}.pt")
        means = module.play(dataclasses.replace(args, checkpoint=checkpoint, play_envs=options.play_envs, seed=77))
    return means | {"seconds": sum(m["Perf/collection_time"] + m["Perf/learning_time"] for m in history)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--iterations", type=int, help="default: 250, of students what the task recommends")
    parser.add_argument("--play-envs", type=int, default=256)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/benchmark_rough"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict]] = {arm: {} for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            file = options.out / f"{name_of(arm, seed)}.json"
            if not file.exists():
                file.write_text(json.dumps(train_and_play(arm, seed, options)))
                print(f"trained {arm}, seed {seed}", flush=True)
            results[arm][seed] = json.loads(file.read_text())
    print(f"{'':32s}" + "".join(f"{label:>28s}" for label in MEASURES.values()) + "   training [s]")
    for arm, runs in results.items():
        columns = [interval([run[name] for run in runs.values()]) for name in MEASURES]
        seconds = sum(run["seconds"] for run in runs.values()) / len(runs)
        print(f"{arm:32s}" + "".join(f"{column:>28s}" for column in columns) + f"{seconds:15.0f}")
    for arm in (arm for arm in ARMS if arm.startswith("student")):
        error = "Metrics/velocity_error"
        ratios = (run[error] / results[TEACHER][seed][error] for seed, run in results[arm].items())
        print(f"velocity error, {arm} / its teacher, by seed: " + " ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
