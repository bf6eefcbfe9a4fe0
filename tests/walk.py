"""One sample through one iteration, with numbers: what becomes of step t of environment n, in the order of the script.

    python tests/walk.py                               # ppo_continuous.py on cartpole: the time limit ends an episode
    python tests/walk.py ppo_rnn                       # navigation-cue: what is remembered, and where it is forgotten
    python tests/walk.py ppo_rnd                       # navigation-maze: the bonus for a place that is new
    python tests/walk.py --iteration 3 --env-index 5 --step 7

The script trains as it is, on the CPU and with few environments. Its functions are looked at, not replaced, and the numbers
are theirs. Worked out here is only what they do not keep: delta and what is added to it. tests/test_walk.py compares all of
them with a training that nobody looks at.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import operator
import pathlib
import sys
from typing import Literal
from unittest import mock

import torch
import tyro
from tensordict import TensorDict
from torch.utils._pytree import tree_map

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from envs import defaults  # noqa: E402

# By script: its task, and an iteration in which there is something to see.
TASKS = {
    "ppo_continuous": (dict(env="cartpole", num_envs=128, seed=9), 3),
    "ppo_rnn": (dict(env="navigation-cue", num_envs=64, seed=1), 3),
    "ppo_rnd": (dict(env="navigation-maze", num_envs=64, seed=7), 3),
}
WATCHED = ["collect", "take_step", "compute_gae", "make_batches", "ppo_loss", "adapt_learning_rate", "Model.forward"]
WATCHED += ["torch.exp", "torch.min", "torch.max"]  # in ppo_loss, each once: the ratio, the surrogate's terms, the value error
OWN = {  # of one script alone
    "ppo_rnn": ["Model.unroll"],
    "ppo_rnd": ["torch.linalg.norm", "RewardNormalization.forward", "rnd_weight", "distillation_step"],
}


# ---- Look on -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(module, names):
    """Yields the calls of these functions in the iteration under way: name -> [(arguments, result)]."""
    calls = {name: [] for name in names}

    def watch(name, fn):
        def look_on(*arguments, **options):
            if name == "collect":  # an iteration begins
                [its.clear() for its in calls.values()]
            result = fn(*arguments, **options)
            # Copies, since some are written to later: the arguments as the function leaves them.
            calls[name].append(tree_map(lambda x: x.detach().clone() if torch.is_tensor(x) else x, (arguments, result)))
            return result

        return look_on

    with contextlib.ExitStack() as stack:
        for name in names:
            fn = operator.attrgetter(name)(module)
            stack.enter_context(mock.patch(f"{module.__name__}.{name}", watch(name, fn)))
        yield calls


def settings(script: str, iteration: int):
    """The script's module, and its Args for a training that ends with this iteration."""
    module, task = importlib.import_module(script), TASKS[script][0]
    recommended = defaults(task["env"], vars(module.Args()))
    return module, module.Args(**recommended | task | dict(max_iterations=iteration + 1, device="cpu", log_root=""))


def train_watched(script: str, iteration: int):
    """The script's module, the history of its training, and the calls of the last iteration."""
    module, args = settings(script, iteration)
    with watched(module, WATCHED + OWN.get(script, [])) as calls, contextlib.redirect_stdout(io.StringIO()):
        history = module.train(args)
    return module, history, calls


def choose(script: str, rollout: TensorDict, step: int | None, env_index: int | None) -> tuple[int, int]:
    """Step and environment; those that are not given: where a script has something to show."""
    score = {
        "ppo_continuous": lambda: rollout["bootstrap"].abs(),  # the time-out that cuts off most
        "ppo_rnn": lambda: rollout["dones"] * rollout["advantages"].abs(),
        "ppo_rnd": lambda: rollout["intrinsic_rewards"],
    }[script]()
    asked = torch.zeros_like(score)
    try:
        asked[slice(None) if step is None else step, slice(None) if env_index is None else env_index] = 1.0
    except IndexError:
        sys.exit(f"error: --step must be below {len(score)}, --env-index below {len(score[0])}")
    return divmod(int(((score + 1.0) * asked).argmax()), len(score[0]))


# ---- Tell --------------------------------------------------------------------------------------------------


def number(x) -> str:
    """4 significant digits; a count as it is."""
    x = x.squeeze().tolist() if torch.is_tensor(x) else x
    if isinstance(x, list):
        return " ".join(f"{number(value):>8s}" for value in x)
    return f"{x:#.4g}" if isinstance(x, float) else str(x)


class Page(list):
    """Lines of text."""

    def __init__(self, *lines: str, width: int):
        super().__init__(lines)
        self.width = width  # of the numbers

    def stage(self, functions: str, text: str):
        self.extend(["", f"{functions:36s}{text}"])

    def say(self, name: str, x, text: str):
        self.append(f"  {name:17s} {number(x):>{self.width}s}  {text}")


def where_trained(module, rollout: TensorDict, args, t: int, n: int):
    """Which mini-batch, which row of it, and who else is in it: the script cuts numbered samples as it has cut the rollout."""
    numbers = rollout.select("order", strict=False)
    numbers["sample"] = torch.arange(rollout.numel()).view(rollout.shape)
    for index, batch in enumerate(module.make_batches(numbers, args)):
        for row in (batch["sample"] == numbers["sample"][t, n]).nonzero().tolist():
            return index, tuple(row), batch["sample"]
    sys.exit("error: no mini-batch has this sample; the script drops those that do not fill one")


def tell(script: str, module, history, calls: dict, step: int | None = None, env_index: int | None = None) -> Page:
    (storage, args), _ = calls["compute_gae"][0]
    (rollout, _), _ = calls["make_batches"][0]
    (_, agent, *_), _ = calls["collect"][0]
    t, n = choose(script, rollout, step, env_index)
    row, next_row = rollout[t, n], storage[t + 1, n]
    _, (_, _, _, extras) = calls["take_step"][t]
    done, time_out = bool(row["dones"]), bool(extras["time_outs"][n])
    end = "the time limit ends the episode" if time_out else "the episode ends by itself" if done else "the episode goes on"
    page = Page(
        f"{script}.py --env {args.env} --num-envs {args.num_envs} --seed {args.seed}, iteration {len(history) - 1}:"
        f" environment n = {n}, step t = {t}.",
        width=max(10, 9 * row["actions"].numel()),
    )
    stage, say = page.stage, page.say

    stage("collect() > act()", "the actor draws an action, the critic says what it expects")
    say("obs", row["obs", args.actor_obs[0]], "what it sees")
    if script == "ppo_rnn":
        after = [result[1] for (model, *_), result in calls["Model.forward"] if model is agent.actor][t]
        say("|actor_state|", row["actor_state"].norm(), "how much it remembers: length of the hidden state h")
        say("  with this obs", after[n].norm(), "the step has written into it")
    say("policy loc", row["policy", "loc"], "where it aims: the middle of a bell curve")
    say("policy scale", row["policy", "scale"], "how widely it scatters around that: the standard deviation")
    say("actions", row["actions"], "drawn from the curve")
    say("log_prob", row["log_prob"], "logarithm of how likely this draw was; kept for the ratio below")
    say("values", row["values"], "V(s_t): the rewards that the critic expects, later ones counting less")

    stage("collect() > take_step()", "the environment answers")
    say("rewards", row["rewards"], "for this step")
    say("dones", int(done), end)
    if script == "ppo_rnn":
        text = "zeroed: the next episode knows nothing of this one" if done else "kept, as the episode goes on"
        say("|actor_state|", next_row["actor_state"].norm(), f"before step t + 1: {text}")

    stage("collect() > timeout_value()", "if the clock stops it: how much more would have come?")
    if time_out:
        say("bootstrap", row["bootstrap"], "V(final_obs): what the critic expects from the true last state on")
        say("  wrong", next_row["values"], "V(s_{t+1}): that is already the start of the next episode")
        say("  rsl_rl's", row["values"], "V(s_t): one step early, since it knows no final_obs")
    else:
        say("bootstrap", row["bootstrap"], "no clock has stopped it")
    if script == "ppo_rnd":
        tell_bonus(page, calls, row, t, n)
    tell_advantage(page, storage, rollout, args, t, n)

    index, place, samples = where_trained(module, rollout, args, t, n)
    if script == "ppo_rnn":
        first, last = (int(samples[0, i]) for i in (0, -1))
        stage("update() > make_batches()", "whole sequences: what was worth remembering shows only later")
        say(
            "mini-batch",
            index + 1,
            f"of {args.num_mini_batches}: environments {first} to {last}, their {len(samples)} steps in order",
        )
        say("|actor_state|", rollout["actor_state"][0, n].norm(), "at step 0: from here all steps are run again")
        ends = rollout["dones"][:, n].nonzero().flatten().tolist()
        say(
            "dones after step",
            ", ".join(map(str, ends)) or "-",
            "what comes after knows, and teaches, nothing of what came before",
        )
    else:
        stage("shuffle(), make_batches()", "drawn once, the same in every epoch")
        say("mini-batch", index + 1, f"of {args.num_mini_batches}")
        say("row", place[0], f"of its {len(samples)}: samples of any step and environment")
    tell_epochs(page, calls, agent, args, index, place)
    if script == "ppo_rnd":
        losses = [metrics["rnd"] for _, metrics in calls["distillation_step"]][index :: args.num_mini_batches]
        stage("update() > distillation_step()", "what has been seen is less new from now on")
        say("first epoch", losses[0], "how wrong the predictor is, squared, over this mini-batch")
        say("last epoch", losses[-1], "the same in the last epoch")
    means = ", ".join(f"{name} {number(history[-1][f'Loss/{name}'])}" for name in ("surrogate", "value", "kl"))
    page += [
        "",
        f"Means over all {len(calls['ppo_loss'])} mini-batches, which the training prints: {means}.",
        "Numbers are rounded to four digits.",
    ]
    return page


def tell_bonus(page: Page, calls: dict, row: TensorDict, t: int, n: int):
    page.stage("collect() > intrinsic_reward()", "a second reward: can one network predict another, random one?")
    page.say(
        "norm",
        calls["torch.linalg.norm"][t][1][n],
        "how wrong the predictor is about where this step led",
    )
    normalised = calls["RewardNormalization.forward"][t][1][n]
    deviation = number(calls["torch.linalg.norm"][t][1][n] / normalised)
    page.say("normalised", normalised, f"/ {deviation}, the standard deviation of its discounted sums so far")
    page.say("weight", calls["rnd_weight"][t][1][n], "rnd_weight, of one step")
    page.say("intrinsic_rewards", row["intrinsic_rewards"], "their product: the bonus")
    page.say("sum", row["rewards"] + row["intrinsic_rewards"], "rewards + bonus: the reward from here on")


def tell_advantage(page: Page, storage: TensorDict, rollout: TensorDict, args, t: int, n: int):
    row, later = storage[t, n], 0.0
    reward = row["rewards"] + row.get("intrinsic_rewards", torch.tensor(0.0))
    follows = row["bootstrap"] if row["dones"] else storage["values"][t + 1, n]
    delta = reward + args.gamma * follows - row["values"]
    if row["dones"]:
        text = "that belongs to the next episode"
    elif t == len(rollout) - 1:
        text = "that is in the next rollout; V(s_{t+1}) stands for it"
    else:
        after = rollout["returns"][t + 1, n] - storage["values"][t + 1, n]
        later, text = args.gamma * args.lam * after, f"{args.gamma} * {args.lam} * {number(after)}, the advantage there"
    page.stage("update() > compute_gae()", "did it go better than the critic had expected?")
    sum_of = f"{number(reward)} + {args.gamma} * {number(follows)} - {number(row['values'])}"
    page.say("delta", delta, f"{sum_of}: reward + gamma * next V - V(s_t)")
    page.say("  from step t + 1", later, text)
    page.say("advantage", rollout["returns"][t, n] - row["values"], "their sum; above 0: better than expected")
    page.say("returns", rollout["returns"][t, n], "advantage + V(s_t): what the critic is taught to say")
    page.say(
        "advantages",
        rollout["advantages"][t, n],
        "from the rollout's mean, in standard deviations: the A that trains",
    )


def tell_epochs(page: Page, calls: dict, agent, args, index: int, place: tuple):
    """A line for each time that the sample is trained on."""
    name = "Model.unroll" if "Model.unroll" in calls else "Model.forward"
    values = [result for (model, *_), result in calls[name] if model is agent.critic][-len(calls["ppo_loss"]) :]
    page.stage("mini_batch_step() > ppo_loss()", "both networks learn from it, once in each epoch")
    page.append("  epoch      ratio    ratio*A     clip*A  wins        V(s_t)      error         KL  learning rate")
    for epoch in range(args.num_learning_epochs):
        i = epoch * args.num_mini_batches + index
        ratio, error = calls["torch.exp"][i][1][place], calls["torch.max"][i][1][place]
        plain, clipped = (x[place] for x in calls["torch.min"][i][0])
        wins = "equal" if plain == clipped else "ratio*A" if plain < clipped else "clip*A"
        kl, lr = calls["ppo_loss"][i][1][1]["kl"], calls["adapt_learning_rate"][i][0][0]
        left = " ".join(f"{number(x):>10s}" for x in (ratio, plain, clipped))
        right = " ".join(f"{number(x):>10s}" for x in (values[i][place], error, kl))
        page.append(f"  {epoch + 1:5d} {left}  {wins:7s} {right}  {number(lr):>13s}")
    low, high, kl = 1.0 - args.clip_param, 1.0 + args.clip_param, args.desired_kl
    page += [
        "  ratio           how likely the action is by now, over how likely when drawn; earlier mini-batches moved it",
        "  ratio*A         what PPO makes larger: likelier where A is above 0, rarer where it is below",
        f"  clip*A          the same, but the ratio held to {low:g} .. {high:g}",
        "  wins            the smaller one counts; where it is clip*A, this sample pushes the policy no further",
        f"  V(s_t), error   V, which other samples move too; (V - returns)^2, or if larger with V within {args.clip_param:g} of values",
        f"  KL              how far the policy has moved since it acted, mean of this mini-batch; wanted: {kl:g}",
        f"  learning rate   in each mini-batch / 1.5 if KL > {2 * kl:g}, * 1.5 if 0 < KL < {kl / 2:g}, up to 0.01;"
        f" 1 of {args.num_mini_batches} is shown",
    ]


def walk(
    script: tyro.conf.Positional[Literal["ppo_continuous", "ppo_rnn", "ppo_rnd"]] = "ppo_continuous",
    env_index: int | None = None,
    step: int | None = None,
    iteration: int | None = None,
):
    """One sample through one iteration of a script.

    Args:
        script: Which one.
        env_index: n, environment; default: one where there is something to see.
        step: t, step of the rollout; default: the same.
        iteration: Iteration to look at, the first is 0; default: an early one.
    """
    torch.set_num_threads(1)  # so that the numbers do not depend on the cores
    iteration = TASKS[script][1] if iteration is None else iteration
    print(*tell(script, *train_watched(script, iteration), step, env_index), sep="\n")


if __name__ == "__main__":
    tyro.cli(walk)
