"""What memory, eyes and a teacher are worth on rough terrain: eight ways to a walking robot, several seeds.

    python tests/benchmarks/rough.py                                # 40 trainings, 2 to 6 minutes each on one core

Runs the command lines of `ARMS`, plays every policy on 256 fresh robots spread over all terrain levels, without noise and pushes,
and prints one table: mean and 95 % interval over the seeds (Student's t). Finished trainings are kept in --out, so an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from symmetry import interval  # noqa: E402

PPO = "--env quadruped-rough --max-iterations 250"
STUDENT = "--env quadruped-rough"  # with what the task recommends
GRU, CNN = "--rnn-type gru --rnn-hidden-dim 64", "--cnn-output-channels 8 16 --cnn-stride 2"
ARMS = {  # name: script and settings
    "PPO, blind": f"ppo_continuous.py {PPO} --actor-obs policy",
    "PPO, blind, GRU": f"ppo_rnn.py {PPO} --actor-obs policy {GRU}",
    "PPO, height scan, CNN": f"ppo_cnn.py {PPO} --actor-obs policy scan {CNN}",
    "PPO, privileged: the teacher": f"ppo_continuous.py {PPO} --actor-obs policy privileged",
    "student, blind": f"distill_dagger.py {STUDENT} --student-obs policy --rnn-type none",
    "student, blind, GRU": f"distill_dagger.py {STUDENT} --student-obs policy",
    "student, height scan, CNN": f"distill_dagger.py {STUDENT} --student-obs policy scan --rnn-type none {CNN}",
    "behaviour cloning, blind, GRU": f"distill_dagger.py {STUDENT} --student-obs policy --beta 1",
}
TEACHER = "PPO, privileged: the teacher"
MEASURES = {"velocity_error": "velocity error [m/s]", "return": "return", "episode_length": "episode length [env steps]"}


def name_of(arm: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z]+', '_', arm)}_{seed}"


def run(command: list[str]) -> str:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
    return result.stdout


def train_and_play(arm: str, seed: int, out: pathlib.Path) -> dict[str, float]:
    """Train one arm as its command line does, then play its policy; means over the 256 episodes."""
    script, *settings = ARMS[arm].split()
    where = ["--log-root", str(out.resolve()), "--experiment-name", name_of(arm, seed)]
    if script == "distill_dagger.py":
        settings += ["--teacher", str(out.resolve() / name_of(TEACHER, seed))]
    print_out = run([str(ROOT / script), *settings, *where, "--seed", str(seed), "--save-interval", "1000"])
    times = re.findall(r"collect ([\d.]+) s  learn ([\d.]+) s", print_out)
    played = run([str(ROOT / script), *settings[:2], *where, "--play", "--play-envs", "256", "--seed", "77"])
    mean = re.findall(r"^mean +(.*)$", played, re.MULTILINE)[0].split()
    return dict(zip(mean[::2], map(float, mean[1::2]))) | {"seconds": sum(float(x) for pair in times for x in pair)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/benchmark_rough"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict]] = {arm: {} for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            file = options.out / f"{name_of(arm, seed)}.json"
            if not file.exists():
                file.write_text(json.dumps(train_and_play(arm, seed, options.out)))
                print(f"trained {arm}, seed {seed}", flush=True)
            results[arm][seed] = json.loads(file.read_text())
    print(f"{'':32s}" + "".join(f"{label:>28s}" for label in MEASURES.values()) + "   training [s]")
    for arm, runs in results.items():
        columns = [interval([run[name] for run in runs.values()]) for name in MEASURES]
        seconds = sum(run["seconds"] for run in runs.values()) / len(runs)
        print(f"{arm:32s}" + "".join(f"{column:>28s}" for column in columns) + f"{seconds:15.0f}")
    for arm in (arm for arm in ARMS if arm.startswith("student")):
        ratios = (run["velocity_error"] / results[TEACHER][seed]["velocity_error"] for seed, run in results[arm].items())
        print(f"velocity error, {arm} / its teacher, by seed: " + " ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
