"""Two variants combine by `git merge-file`: each of the others with ppo_multigpu.py gives a script that trains on two ranks."""

import pathlib
import shutil
import subprocess

import pytest
import torch
from test_multigpu import finish, start

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIANTS = {
    "rnn": dict(rnn_hidden_dim=8),
    "cnn": dict(env="navigation-pixels", actor_obs=(), critic_obs=()),
    "rnd": dict(rnd_obs=("policy",), rnd_reward_normalization=True),
    "symmetry": dict(env="quadruped"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_with_multigpu_it_trains(name, tmp_path):
    variant, base, ranks = (ROOT / f"{script}.py" for script in (f"ppo_{name}", "ppo_continuous", "ppo_multigpu"))
    if not variant.exists():
        pytest.skip(f"{variant.name} is not written yet")
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    merge = ["git", "merge-file", "-p"]
    conflicts = subprocess.run([*merge, variant, base, ranks], capture_output=True, text=True)
    # Every script has a title of its own, so the header docstring conflicts, and nothing else may: --ours keeps the variant's.
    assert conflicts.returncode == 1 and conflicts.stdout.startswith("<<<<<<<"), conflicts.stdout
    merged = subprocess.run([*merge, "--ours", variant, base, ranks], capture_output=True, text=True, check=True).stdout
    script = tmp_path / f"ppo_{name}_multigpu.py"
    script.write_text(merged)
    for code, _, errors in finish(start(2, None, ["composed", dict(path=str(script)) | VARIANTS[name]])):
        assert code == 0, errors
    outcomes = [torch.load(f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert len(outcomes[0]["history"]) == 2
    for first, second in zip(*(outcome["weights"] for outcome in outcomes), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
