"""benchmarks/gpu.py has minutes on a GPU: its logic is tried on a CPU before, and a job that fails costs no other."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
SCRIPT = pathlib.Path(__file__).resolve().parent / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_part_gives_its_numbers(tmp_path):
    """Two small tasks instead of all; the tests on CUDA, which are skipped here, are left out."""
    flags = ["--device", "cpu", "--tiny", "--workers", "1", "--cases", "1", "--out", "results"]
    flags += ["--parts", "env", "equal", "speed", "profile"]
    run = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    found = results(tmp_path / "results")
    assert run.returncode == 0 and not [x for x in found if "failed" in x], run.stdout + run.stderr
    named = {x["name"]: x for x in found}
    assert named["facts"]["torch"] == torch.__version__
    assert [x["ok"] for x in found if x["part"] == "equal"] == [True] * 3 and named["eager again"]["differs"] == ["0.0e+00"] * 6
    for race in ("quadruped 16 8 fp32", "still 16 8 fp32"):
        assert named[race]["learner"] > 0 and named[race]["rsl_rl_learning"] > 0 and named[race]["ours_learning"] > 0
    assert named["ours eager"]["iteration_ms"] > 0
    summary = (tmp_path / "results" / "summary.md").read_text()
    assert all(f"| {name} |" in summary for name in ("ppo_continuous cartpole", "still 16 8 fp32", "rsl_rl"))


def test_a_job_that_fails_or_takes_too_long_is_a_line(tmp_path):
    options = gpu.Options(out=str(tmp_path), device="cpu", tiny=True)
    report, start = gpu.Report(options), time.time()
    gpu.run_job(options, report, 60.0, "speed", "job_nothing", side="x")
    gpu.run_job(options, report, 60.0, "profile", "job_profile", side="ours", more="no such argument")
    gpu.run_job(options, report, 1.0, "profile", "job_profile", side="ours")
    found = {(x["part"], x["name"]): x.get("failed") for x in results(tmp_path)}
    assert found["speed", "x"] == "KeyError: 'job_nothing'" and found["profile", "ours"] == "no time left"
    assert "unexpected keyword argument" in found["profile", "ours no such argument"]
    assert "KeyError" in (tmp_path / "log.txt").read_text() and time.time() - start < 120


def test_a_limit_ends_the_whole_process(tmp_path, monkeypatch):
    options = gpu.Options(out=str(tmp_path), device="cpu", tiny=True)
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text('import time\nprint(\'RESULT {"part": "env", "name": "first"}\', flush=True)\ntime.sleep(60)\n')
    monkeypatch.setattr(gpu, "__file__", str(sleeper))
    report, start = gpu.Report(options), time.time()
    gpu.run_job(options, report, 6.5, "env", "job_env")
    assert [x.get("failed") for x in results(tmp_path)] == [None, "not done in 6 s"] and time.time() - start < 20
    assert "first" in gpu.summary(report)


def test_a_captured_environment_hands_out_copies():
    """On a CPU it only passes on; what it hands out must not change when it steps again."""
    env = gpu.Captured(gpu.make_env("quadruped", 4, "cpu"))
    env.episode_length_buf = torch.arange(4)
    assert torch.equal(env.env.episode_length_buf, torch.arange(4)) and env.num_actions == 12
    obs, rewards, dones, extras = env.step(torch.zeros(4, 12))
    assert rewards.shape == dones.shape == (4,) and "time_outs" in extras and obs["policy"].shape[0] == 4
