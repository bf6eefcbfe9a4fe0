"""What a policy does, to be seen: `roll_out` plays an episode in each environment; `Record` films and plots the first one.

Used by the scripts' `--play` and `--video-interval`. Files: `<path>.gif` (where the environment has `render`), `<path>.png`
(`tracking`: commanded against actual values), `<path>_footfalls.png` (`contacts`: which feet are on the ground when). A
picture that cannot be drawn is said once, and costs nothing else.
"""

from __future__ import annotations

import math
import pathlib

import torch

COLOURS = {"actual": "#1565c0", "commanded": "#2e7d32"}  # as the quadruped's film has them


@torch.no_grad()
def roll_out(env, policy, path, args) -> dict[str, float]:
    """One episode in each environment; prints what came of it.

    Args:
        env: with the protocol of `vec_env.VecEnv`.
        policy: a script's `Policy`, or None: then `args.agent`, "zero" or "random", acts.
        path: of film and plots, without ending.
        args: a script's settings, of which `agent`, `clip_actions`, `viewer` and `film` count.

    Returns:
        Means over the episodes: `return`, `episode_length` [env steps], and of what the environment logs for each of its
        copies `Metrics/...` (over the episode) and `Episode/...` (at its end).
    """
    n, limit = env.num_envs, args.clip_actions or math.inf  # the policy has the limit of its training by itself

    def act(obs):
        if policy:
            return policy.act(obs).clamp(-limit, limit).to(env.device)
        return (args.agent == "random") * (2.0 * torch.rand(n, env.num_actions, device=env.device) - 1.0)

    if args.viewer:
        act.reset = policy.reset if policy else lambda dones: None
        if not hasattr(env, "view"):
            raise SystemExit(f"error: --viewer: {type(env).__name__} has no viewer of its own; a film needs no flag")
        return env.view(act) or {}
    print(f"playing {pathlib.Path(path).name.removeprefix('play_')} in {n} environments")
    env, obs, totals = Record(env, path) if args.film else env, env.get_observations(), {}
    running = torch.ones(n, dtype=torch.bool, device=env.device)
    while running.any():
        obs, rewards, dones, extras = env.step(act(obs))
        rewards, dones = (torch.as_tensor(x, device=env.device).view(n) for x in (rewards, dones))
        dones = dones.bool()
        values = {
            name: x for name, x in ((extras or {}).get("log") or {}).items() if getattr(x, "shape", None) == running.shape
        }
        for name, value in (values | {"return": rewards, "episode_length": torch.ones_like(rewards)}).items():
            total = totals.get(name, torch.zeros_like(value))
            if name.startswith("Episode/"):  # what counts is how the episode ended; the rest is summed up
                totals[name] = torch.where(running, value, total)
            elif name.startswith("Metrics/") or name in ("return", "episode_length"):
                totals[name] = total + torch.where(running, value, 0.0)
        if policy:
            policy.reset(dones)
        running &= ~dones
    results = {name: x / totals["episode_length"] if name.startswith("Metrics/") else x for name, x in totals.items()}
    for index in range(n):
        print(f"episode {index + 1:2d}" + "".join(f"  {name.split('/')[-1]} {x[index]:.3f}" for name, x in results.items()))
    means = {name: x.double().mean().item() for name, x in results.items()}
    print("mean      " + "".join(f"  {name.split('/')[-1]} {x:.3f}" for name, x in means.items()))
    if args.film:
        env.write()
    return means


class Record:
    """The environment itself, whose `step` also takes a picture of environment 0, until its first episode ends."""

    def __init__(self, env, path):
        self.env, self.path, self.steps, self.over = env, pathlib.Path(path), 0, False
        self.frames, self.tracked, self.contacts, self.failed = [], [], [], set()
        self.step_dt = getattr(env, "step_dt", 0.06)  # s
        self.interval = max(1, round(0.06 / self.step_dt))  # about 16 pictures per second

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, actions):
        if not self.over:
            self.attempt(self.look)
        result = self.env.step(actions)
        self.over = self.over or bool(torch.as_tensor(result[2]).view(-1)[0])
        return result

    def attempt(self, draw) -> None:
        """A picture that cannot be drawn costs neither the episode nor a training."""
        if draw.__name__ not in self.failed:
            try:
                draw()
            except Exception as error:
                self.failed.add(draw.__name__)
                print(f"no film or plot: {type(error).__name__}: {error}".partition("\n")[0])

    def look(self) -> None:
        if hasattr(self.env, "render") and self.steps % self.interval == 0 and len(self.frames) < 160:
            picture = self.env.render()
            if picture is not None:  # else it draws on a screen of its own
                from PIL import Image

                self.frames.append(Image.fromarray(picture).quantize(64, method=Image.Quantize.FASTOCTREE))
        if hasattr(self.env, "tracking") and self.steps:  # after a step
            self.tracked.append({name: pair[0].tolist() for name, pair in self.env.tracking().items()})
        if hasattr(self.env, "contacts") and self.steps:
            self.contacts.append({foot: bool(x[0]) for foot, x in self.env.contacts().items()})
        self.steps += 1

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for draw, seen in ((self.film, self.frames), (self.plot, self.tracked), (self.footfalls, self.contacts)):
            if seen:
                self.attempt(draw)

    def film(self) -> None:
        duration = round(1000 * self.interval * self.step_dt)  # ms
        first, *others = self.frames
        first.save(f"{self.path}.gif", save_all=True, append_images=others, duration=duration, loop=0)
        print(f"wrote {self.path}.gif")

    def plot(self) -> None:
        """Commanded against actual value of every tracked quantity, over time."""
        from matplotlib.figure import Figure

        names = list(self.tracked[0])
        figure = Figure(figsize=(8, 2 * len(names)), layout="tight")
        axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        times = [self.step_dt * (step + 1) for step in range(len(self.tracked))]
        for axis, name in zip(axes, names):
            for column, label, style in ((1, "actual", "-"), (0, "commanded", "--")):
                values = [pairs[name][column] for pairs in self.tracked]
                axis.plot(times, values, style, color=COLOURS[label], linewidth=1.3, label=label)
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)  # above: it hides nothing
        axes[-1].set_xlabel("time [s]")
        self.finish(figure, f"{self.path}.png")

    def footfalls(self) -> None:
        """When each foot is on the ground, for 5 seconds; the feet come in pairs, left (blue) and right (red)."""
        from matplotlib.figure import Figure

        down = torch.tensor([list(feet.values()) for feet in self.contacts[: round(5.0 / self.step_dt)]]).double().T
        side = torch.tensor([[1.0], [-1.0]]).repeat(len(down) // 2, 1)
        figure = Figure(figsize=(8, 2), layout="tight")
        axis = figure.subplots()
        extent = (0.0, self.step_dt * down.shape[1], len(down), 0)
        axis.imshow((side * down).numpy(), "RdBu", vmin=-1.3, vmax=1.3, aspect="auto", interpolation="none", extent=extent)
        labels = [f"{foot} {x.mean():.0%}" for foot, x in zip(self.contacts[0], down)]
        axis.set_yticks([row + 0.5 for row in range(len(down))], labels)
        axis.set_xlabel("time [s]")
        self.finish(figure, f"{self.path}_footfalls.png")

    def finish(self, figure, path: str) -> None:
        figure.savefig(path, dpi=110)
        print(f"wrote {path}")
