"""Two variants combine by `git merge-file` into a script that trains with both: all pairs of the five but two."""

import itertools
import math
import pathlib
import re
import shutil
import subprocess

import pytest
import torch
from rank_worker import composed
from test_multigpu import finish, start

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = {
    "cnn": dict(env="navigation-pixels", cnn_output_channels=(4, 4)),
    "rnn": dict(rnn_hidden_dim=8),
    "symmetry": dict(env="quadruped"),
    "rnd": dict(rnd_obs=("policy",), rnd_state_normalization=True, rnd_reward_normalization=True),
    "multigpu": dict(normalize_advantage_over_ranks=True),
}
SMALL = dict(env="cartpole", num_envs=16, max_iterations=2, actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16))
BOTH = {("cnn", "symmetry"): dict(env="quadruped-rough", actor_obs=("policy", "scan"), critic_obs=("policy", "privileged"))}
SIGNS = {"cnn": "actor cnns.", "rnn": "actor rnn.", "symmetry": "Loss/symmetry", "rnd": "Loss/rnd"}  # a weight or metric
# Of the two left out one writes the same lines of the networks, one those of the loss: whoever wants them joins them by hand.
PAIRS = sorted({*itertools.combinations(SETTINGS, 2)} - {("cnn", "rnn"), ("rnn", "symmetry")})


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_merged_they_train(pair, tmp_path):
    """Nothing conflicts but the headers, and the result learns with what both bring; with multigpu on two ranks, as one."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    first, second = (ROOT / f"ppo_{name}.py" for name in pair)
    merge = ["git", "merge-file", "-p", first, ROOT / "ppo_continuous.py", second]
    conflicts = subprocess.run(merge, capture_output=True, text=True).stdout
    header, *others = re.findall(r"^<<<<<<< .*?^>>>>>>> ", conflicts, re.M | re.S)
    assert conflicts.startswith(header) and "import" not in header and not others, "\n".join(others)
    merged = subprocess.run([*merge, "--ours"], capture_output=True, text=True, check=True).stdout
    script = tmp_path / f"ppo_{'_'.join(pair)}.py"
    script.write_text(merged)

    settings = SMALL | SETTINGS[pair[0]] | SETTINGS[pair[1]] | BOTH.get(pair, {}) | dict(log_root="", device="cpu")
    work = dict(path=str(script), settings=settings)
    if "multigpu" in pair:
        for exit_code, _, errors in finish(start(2, None, ["composed", work])):
            assert exit_code == 0, errors
        outcome, other = (torch.load(f"{rank}.pt", weights_only=False) for rank in range(2))
        for ours, theirs in zip(outcome["weights"], other["weights"], strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert outcome["calls"][1]["all_reduce"] > 40
    else:
        outcome = composed(**work)
    assert len(outcome["history"]) == 2
    for metrics in outcome["history"]:
        assert metrics["Loss/kl"] > 0 and math.isfinite(metrics["Loss/value"])
    names = [*outcome["weights"][1], *outcome["history"][1]]
    for sign in (SIGNS[name] for name in pair if name in SIGNS):
        assert any(name.startswith(sign) for name in names), sign
