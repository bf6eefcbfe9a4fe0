"""Shared set-up: one thread (so that sums have one order), scripts importable, nothing written into the repository."""

import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path, monkeypatch):
    """Runs land in a fresh folder; one thread also in the processes that a test starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def double():
    """Everything in float64 while the test runs."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
