"""PPO on MuJoCo tasks through EnvPool: this project and rsl_rl 5.5.1, same settings and env steps, several seeds.

    pip install -e ".[envpool]" rsl-rl-lib==5.5.1
    python tests/benchmarks/mujoco_tasks.py                               # 30 trainings, about a minute each on one core

Both sides train with the settings that `--env envpool:<task>` recommends. The return is the mean over all episodes that end in
the last tenth of training, counted outside of both; printed with its standard deviation over the seeds. Finished trainings
are kept in --out, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Published for ppo_continuous_action.py at 1 million steps: docs.cleanrl.dev/rl-algorithms/ppo (none for Ant-v4).
CLEANRL = {"HalfCheetah-v4": "1442.6 +- 46.0", "Hopper-v4": "2382.9 +- 271.7"}


def count_returns(env) -> list[tuple[int, float]]:
    """Note every episode's end, (env steps so far, return), while somebody else steps the environment."""
    step, totals, steps, finished = env.step, torch.zeros(env.num_envs), 0, []

    def counting_step(actions):
        nonlocal steps
        obs, rewards, dones, extras = step(actions)
        steps += env.num_envs
        totals.add_(rewards)
        finished.extend((steps, total) for total in totals[dones.bool()].tolist())
        totals[dones.bool()] = 0.0
        return obs, rewards, dones, extras

    env.step = counting_step
    return finished


def train(arm: str, task: str, seed: int, env_steps: int) -> float:
    import ppo_continuous
    from envs import defaults, make

    env_id = f"envpool:{task}"
    settings = defaults(env_id, ppo_continuous.Args.__dataclass_fields__)
    iterations = env_steps // (settings["num_envs"] * settings["num_steps_per_env"])
    settings |= dict(env=env_id, seed=seed, max_iterations=iterations, log_root="", device="cpu")
    args = ppo_continuous.Args(**settings | dict(actor_obs=("policy",), critic_obs=("policy",)))
    env = make(env_id, args.num_envs, seed=seed)
    finished = count_returns(env)
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        if arm == "ours":
            ppo_continuous.train(args, env)
        else:
            import reference

            reference.make_runner(args, env).learn(iterations, init_at_random_ep_len=True)
    return statistics.mean(total for steps, total in finished if steps > 0.9 * env_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v4", "Hopper-v4", "Ant-v4"])
    parser.add_argument("--env-steps", type=int, default=1_000_000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logs/benchmark_mujoco"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[float]]] = {}
    for task in options.tasks:
        results[task] = {"ours": [], "rsl_rl": []}
        for seed in options.seeds:
            for arm, returns in results[task].items():
                file = options.out / f"{task}_{arm}_{seed}.json"
                if not file.exists():
                    file.write_text(json.dumps(train(arm, task, seed, options.env_steps)))
                    print(f"trained {arm} on {task}, seed {seed}", flush=True)
                returns.append(json.loads(file.read_text()))
    print(
        f"{f'return after {options.env_steps / 1e6:g} M steps':24s}{'ours':>20s}{'rsl_rl 5.5.1':>20s}{'CleanRL, published':>20s}"
    )
    for task, arms in results.items():
        columns = [f"{statistics.mean(x):.1f} +- {statistics.stdev(x):.1f}" for x in arms.values()]
        print(f"{task:24s}" + "".join(f"{column:>20s}" for column in [*columns, CLEANRL.get(task, "-")]))
        for arm, returns in arms.items():
            print(f"  {arm}, by seed: " + " ".join(f"{value:.0f}" for value in returns))


if __name__ == "__main__":
    main()
