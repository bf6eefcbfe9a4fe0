"""What curiosity buys in the maze: PPO without and with RND, same environment steps, several seeds.

    python tests/benchmarks/maze.py                                 # 10 trainings, about 3 minutes each on one core

Prints one table, and draws where the robots of the first seed have been during each quarter of training:
assets/maze_occupancy.png. Every training is `python <script>.py --env navigation-maze --seed <seed>`. Finished trainings
are kept in --out, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SCRIPTS = {"ppo_continuous": "PPO", "ppo_rnd": "PPO + RND"}
QUARTERS = 4


def train(script: str, seed: int, iterations: int | None) -> dict:
    """One training with the settings that the command line would take; success by iteration, visits by quarter."""
    from envs import defaults, make

    module = importlib.import_module(script)
    settings = defaults("navigation-maze", module.Args.__dataclass_fields__)
    settings |= dict(env="navigation-maze", seed=seed, log_root="", device="cpu")  # in a CUDA graph no step would be counted
    args = module.Args(**settings | ({"max_iterations": iterations} if iterations else {}))
    env = make(args.env, args.num_envs, seed=seed)
    step, counts = env.step, []
    quarter = args.max_iterations * args.num_steps_per_env // QUARTERS  # env steps per environment

    def counting_step(actions):
        counts.append(env.visits.clone() if len(counts) % quarter == 0 else None)
        return step(actions)

    env.step = counting_step
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        history = module.train(args, env)
    visits = [*(count for count in counts if count is not None), env.visits][: QUARTERS + 1]
    return {
        "steps_per_iteration": args.num_envs * args.num_steps_per_env,
        "success": [metrics["Episode/success"] for metrics in history],
        "visited": history[-1]["Metrics/visited"],
        "seconds": sum(metrics["Perf/collection_time"] + metrics["Perf/learning_time"] for metrics in history),
        "visits": [(after - before).tolist() for before, after in zip(visits, visits[1:])],
    }


def print_table(results: dict[str, dict[int, dict]]) -> None:
    """Success at the end, and the env steps after which it stays above 95 % for good."""
    for script, runs in results.items():
        print(f"{SCRIPTS[script]:10s} seed   success  squares visited  million steps to 95 %  seconds")
        for seed, run in runs.items():
            below = max((i for i, success in enumerate(run["success"]) if success < 0.95), default=-1) + 1
            steps = f"{below * run['steps_per_iteration'] / 1e6:.2f}" if below < len(run["success"]) else "-"
            share = f"{run['success'][-1]:9.1%}  {run['visited']:15.1%}"
            print(f"{'':10s} {seed:4d} {share}  {steps:>21s}  {run['seconds']:7.0f}")


def draw(results: dict[str, dict[int, dict]], path: pathlib.Path) -> None:
    """One row for each script, one column for each quarter of training."""
    from PIL import Image, ImageDraw

    from envs.navigation import draw_occupancy

    first = {script: next(iter(runs.values())) for script, runs in results.items()}
    width, height, margin = 300, 240, 22
    picture = Image.new("RGB", (QUARTERS * width, len(first) * (height + margin)), "white")
    canvas = ImageDraw.Draw(picture)
    for row, (script, run) in enumerate(first.items()):
        quarter = len(run["success"]) * run["steps_per_iteration"] / QUARTERS / 1e6
        for column, visits in enumerate(run["visits"]):
            x, y = column * width, row * (height + margin)
            label = f"{SCRIPTS[script]}, {column * quarter:.1f} to {(column + 1) * quarter:.1f} million steps"
            canvas.text((x + 6, y + 5), label, "black")
            tile = Image.fromarray(draw_occupancy(torch.tensor(visits)))
            picture.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (x, y + margin))
    path.parent.mkdir(exist_ok=True)
    picture.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--iterations", type=int, help="default: what the task recommends")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/benchmark_maze"))
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "assets" / "maze_occupancy.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict]] = {script: {} for script in options.scripts}
    for seed in options.seeds:
        for script in options.scripts:
            file = options.out / f"{script}_{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(train(script, seed, options.iterations)))
                print(f"trained {script}, seed {seed}", flush=True)
            results[script][seed] = json.loads(file.read_text())
    print_table(results)
    draw(results, options.picture)


if __name__ == "__main__":
    main()
