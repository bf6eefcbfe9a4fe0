"""The numbers that tests/walk.py prints are those of a training that nobody looks at, worked out here in another way."""

import contextlib
import io
import pathlib
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import walk

NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?"


def observed(module, name, note):
    """The script's function, and `note` of its arguments and result after each call."""
    fn = getattr(module, name)

    def call(*arguments):
        result = fn(*arguments)
        note(result, *arguments)
        return result

    return mock.patch.object(module, name, call)


class Reference:
    """The same training, with what the page tells computed from the networks and the storage."""

    def __init__(self, script):
        self.module, self.args = walk.settings(script, walk.TASKS[script][1])
        module, self.script, self.steps, self.remembered, self.errors, self.rnd_losses = self.module, script, [], [], [], []
        loss = module.ppo_loss
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            self.plain = module.train(self.args)  # nobody looks
            stack.enter_context(mock.patch.object(module, "ppo_loss", lambda *x: self.loss(loss, *x)))
            stack.enter_context(observed(module, "mini_batch_step", self.note_rate))
            stack.enter_context(observed(module, "update", self.note_update))
            if script == "ppo_rnn":
                stack.enter_context(observed(module, "act", self.note_memory))
            if script == "ppo_rnd":
                stack.enter_context(observed(module, "intrinsic_reward", self.note_error))
                stack.enter_context(observed(module, "distillation_step", lambda x, *_: self.rnd_losses.append(x["rnd"])))
            self.history = module.train(self.args)

    @torch.no_grad()
    def samples(self, agent, batch):
        """What the surrogate and the value loss are means of."""
        if self.script == "ppo_rnn":
            output = agent.actor.unroll(batch["obs"], batch["actor_state"][0], batch["dones"])
            values = agent.critic.unroll(batch["obs"], batch["critic_state"][0], batch["dones"])[..., 0]
        else:
            output, values = agent.actor(batch["obs"]), agent.critic(batch["obs"])[..., 0]
        ratio = (agent.actor.distribution(output).log_prob(batch["actions"]).sum(-1) - batch["log_prob"]).exp()
        plain, clipped = (x * batch["advantages"] for x in (ratio, ratio.clip(0.8, 1.2)))
        near = batch["values"] + (values - batch["values"]).clip(-0.2, 0.2)
        error = torch.maximum((values - batch["returns"]).square(), (near - batch["returns"]).square())
        return dict(ratio=ratio, plain=plain, clipped=clipped, values=values, error=error)

    def loss(self, fn, agent, batch, args):
        samples = self.samples(agent, batch)
        result = fn(agent, batch, args)
        terms = torch.minimum(samples["plain"], samples["clipped"])
        torch.testing.assert_close(-terms.mean(), result[1]["surrogate"].detach())
        torch.testing.assert_close(samples["error"].mean(), result[1]["value"].detach())
        self.steps.append(samples | dict(batch=batch, kl=result[1]["kl"].item()))
        return result

    def note_rate(self, _, agent, *__):
        self.steps[-1]["lr"] = agent.optimizer.param_groups[0]["lr"].item()

    def note_update(self, _, agent, storage, args):
        self.storage, self.args = storage, args

    def note_memory(self, _, agent, storage, t):
        self.remembered.append(storage["actor_state"][t + 1].clone())

    @torch.no_grad()
    def note_error(self, _, env, rnd, row, next_row, extras, args):
        states = rnd.state_normalizer(next_row["obs", "rnd"])
        error = (rnd.predictor(states) - rnd.target(states)).square().sum(-1).sqrt()
        self.errors.append((error, error / rnd.reward_normalizer.emp_norm._std[0]))

    def advantages(self, **settings):
        return self.module.compute_gae(self.storage, replace(self.args, **settings))[0]


@pytest.fixture(scope="module", params=walk.TASKS)
def both(request):
    """The page, what it is made from, and the reference."""
    watched = walk.train_watched(request.param, walk.TASKS[request.param][1])
    return walk.tell(request.param, *watched), watched, Reference(request.param)


def printed(page):
    """The numbers behind each name, line by line."""
    found = {}
    for name, numbers in re.findall(rf"^  (.{{17}}) ((?: *{NUMBER})+)  ", "\n".join(page), re.MULTILINE):
        found.setdefault(name.strip(), []).append([float(x) for x in numbers.split()])
    return found


def in_words(page, name):
    """The numbers of the sum that a line explains."""
    (text,) = re.findall(rf"^  {re.escape(name)} +\S+  (.*?)[:,]", "\n".join(page), re.MULTILINE)
    return [float(x) for x in re.findall(NUMBER, text)]


def near(x):
    """To 4 digits; what cancels may be rounded in another order."""
    return pytest.approx(torch.as_tensor(x, dtype=torch.float64).flatten().tolist(), rel=6e-4, abs=1e-7)


def sample(page):
    return map(int, re.search(r"n = (\d+), step t = (\d+)", page[0]).groups())


def test_looking_changes_nothing(both):
    _, (_, watched, _), reference = both
    for history in (watched, reference.history):
        for theirs, plain in zip(history, reference.plain, strict=True):
            numbers = [[x for name, x in its.items() if not name.startswith("Perf/")] for its in (theirs, plain)]
            torch.testing.assert_close(*numbers, rtol=0.0, atol=0.0, equal_nan=True)
        for ours, theirs in zip(history.agent.actor.parameters(), reference.plain.agent.actor.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_sample(both):
    """What is drawn, answered and made of it."""
    page, (_, _, calls), reference = both
    (n, t), storage, found = sample(page), reference.storage, printed(page)
    row = storage[t, n]
    (rollout, _), _ = calls["make_batches"][0]
    for name in ("actions", "log_prob", "values", "rewards", "dones", "bootstrap"):
        assert torch.equal(rollout[name], storage[name][:-1])
        assert found[name] == [near(row[name])], name
    assert torch.equal(rollout["advantages"], reference.advantages())
    assert found["obs"] == [near(row["obs", "policy"])]
    assert (found["policy loc"], found["policy scale"]) == ([near(row["policy", "loc"])], [near(row["policy", "scale"])])
    raw = reference.advantages(normalize_advantage_per_mini_batch=True)[t, n]
    delta = reference.advantages(normalize_advantage_per_mini_batch=True, lam=0.0)[t, n]
    assert (found["delta"], found["advantage"]) == ([near(delta)], [near(raw)])
    assert found["from step t + 1"] == [near(raw - delta)]
    follows = row["bootstrap"] if row["dones"] else storage["values"][t + 1, n]
    reward = row["rewards"] + row.get("intrinsic_rewards", 0.0)
    assert in_words(page, "delta") == near([reward, reference.args.gamma, follows, row["values"]])
    if not row["dones"]:
        later = reference.advantages(normalize_advantage_per_mini_batch=True)[t + 1, n]
        assert in_words(page, "  from step t + 1") == near([reference.args.gamma, reference.args.lam, later])
    assert found["returns"] == [near(raw + row["values"])]
    assert found["advantages"] == [near(reference.advantages()[t, n])]
    if reference.script == "ppo_continuous":  # a time-out
        assert row["bootstrap"] != 0.0 and row["dones"] and "the time limit ends the episode" in "\n".join(page)
        assert (found["wrong"], found["rsl_rl's"]) == ([near(storage["values"][t + 1, n])], [near(row["values"])])
    else:
        assert row["bootstrap"] == 0.0 and "wrong" not in found


def test_its_epochs(both):
    page, _, reference = both
    n, t = sample(page)
    row, names = reference.storage[t, n], ("ratio", "plain", "clipped", "values", "error")
    last = reference.steps[-20:]  # 5 epochs of 4 mini-batches
    expected = []
    for index, step in enumerate(last):
        batch = step["batch"]
        same = (batch["actions"] == row["actions"]).all(-1) & (batch["log_prob"] == row["log_prob"])
        assert same.sum() <= 1
        if same.any():
            plain, clipped = step["plain"][same].item(), step["clipped"][same].item()
            wins = "equal" if plain == clipped else ["clip*A", "ratio*A"][plain < clipped]
            numbers = [step[name][same].item() for name in names] + [step["kl"], step["lr"]]
            expected.append((index, wins, numbers, same.nonzero()[0].tolist(), len(batch)))
    lines = [x.split() for x in page if re.match(r"  +\d +[\d.]+ +", x)]
    assert [line[0] for line in lines] == list("12345") and len(expected) == 5
    assert {line[4] for line in lines} > {"equal"}, "the default sample is one that is clipped"
    found = printed(page)
    for line, (index, wins, numbers, place, size) in zip(lines, expected):
        assert line[4] == wins
        assert [float(x) for x in line[1:4] + line[5:]] == near(numbers)
        assert found["mini-batch"] == [[index % 4 + 1]]
        if reference.script == "ppo_rnn":
            first = index % 4 * 16
            assert f"environments {first} to {first + 15}, their {size} steps in order" in "\n".join(page)
            assert place == [t, n - first]
        else:
            assert found["row"] == [place] and f"of its {size}:" in "\n".join(page)
    means = [float(x) for x in re.findall(NUMBER, page[-2].partition(":")[2])]
    assert means == near([reference.plain[-1][f"Loss/{name}"] for name in ("surrogate", "value", "kl")])


@pytest.mark.parametrize("both", ["ppo_rnn"], indirect=True)
def test_the_memory(both):
    page, _, reference = both
    (n, t), state = sample(page), reference.storage["actor_state"]
    after = reference.remembered[-reference.args.num_steps_per_env :][t][n]
    found = printed(page)
    assert found["with this obs"] == [near(after.norm())] and after.norm() > 0.0
    assert found["|actor_state|"] == [near(state[t, n].norm()), near(0.0), near(state[0, n].norm())]
    assert [x[0] for x in found["dones after step"]] == [t] and reference.storage["dones"][:-1, n].sum() == 1


@pytest.mark.parametrize("both", ["ppo_rnd"], indirect=True)
def test_the_bonus(both):
    page, _, reference = both
    (n, t), found = sample(page), printed(page)
    row = reference.storage[t, n]
    error, normalised = (x[n] for x in reference.errors[-reference.args.num_steps_per_env :][t])
    assert (found["norm"], found["normalised"], found["weight"]) == ([near(error)], [near(normalised)], [[1.0]])
    assert found["intrinsic_rewards"] == [near(row["intrinsic_rewards"])]
    assert found["sum"] == [near(row["rewards"] + row["intrinsic_rewards"])]
    index = int(found["mini-batch"][0][0]) - 1
    losses = reference.rnd_losses[-20:][index::4]
    assert (found["first epoch"], found["last epoch"]) == ([near(losses[0])], [near(losses[-1])])


def test_it_is_a_page(both):
    assert len(both[0]) <= 60 and max(map(len, both[0])) <= 110


def test_the_readme_shows_it(both):
    """Word by word, and its numbers as far as another machine's rounding lets them be the same."""
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    shown = readme.partition("```text\nppo_continuous.py")[2].partition("```")[0].splitlines()
    page = [re.sub("^ppo_continuous.py", "", line) for line in both[0]]
    if page[0] != both[0][0]:
        assert len(shown) > 20
        for ours, theirs in zip(shown, page):
            (words, numbers), (same, others) = ([re.split(NUMBER, x), re.findall(NUMBER, x)] for x in (ours, theirs))
            assert "".join(words).split() == "".join(same).split()
            assert [float(x) for x in numbers] == pytest.approx([float(x) for x in others], rel=0.05, abs=1e-3)


def test_any_sample_can_be_asked_for(capsys):
    walk.walk("ppo_continuous", env_index=5, step=23, iteration=0)
    page = capsys.readouterr().out
    assert "iteration 0: environment n = 5, step t = 23" in page and "that is in the next rollout" in page
    with pytest.raises(SystemExit, match="--step must be below 24, --env-index below 128"):
        walk.walk("ppo_continuous", step=24, iteration=0)
