"""Weak scaling of ppo_multigpu.py over 1, 2 and 4 ranks on this machine's cores, and a model of 8 and 64 GPUs.

    OMP_NUM_THREADS=1 python tests/benchmarks/scaling.py [--num-envs 1024] [--iterations 8]

Every rank steps as many environments, so the ideal is a constant time per iteration. Measured are the seconds in
collectives (waiting for slower ranks included), their number and bytes; the last two do not depend on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Assumptions of the model: NCCL's ring on NVLink (8 GPUs) or on one 400 Gb/s link per GPU (64), and what one iteration of
# 4096 environments costs a GPU by itself; a ring moves 2 (W - 1) / W of the bytes through every link and takes 2 (W - 1) hops.
LINKS = {8: dict(bandwidth=300e9, hop=1.0e-6, launch=1.0e-5), 64: dict(bandwidth=40e9, hop=3.0e-6, launch=1.0e-5)}  # B/s, s, s
GPU_ITERATION, HOST_EXCHANGE = 0.25, 1.0e-3  # s


def rank(num_envs: int, iterations: int, out: str) -> None:
    """Train, and note what every iteration after the second spends in collectives."""
    import ppo_multigpu

    notes: list[dict] = []

    def counted(function, host):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            kind, size = ("host", len(pickle.dumps(args[1]))) if host else ("device", args[0].numel() * args[0].element_size())
            notes.append({"kind": kind, "bytes": size, "seconds": time.perf_counter() - begin})
            return result

        return call

    dist.all_reduce, dist.all_gather_object = counted(dist.all_reduce, False), counted(dist.all_gather_object, True)
    log, marks = ppo_multigpu.log_iteration, []

    def marked(*args):
        marks.append((len(notes), time.perf_counter()))
        return log(*args)

    ppo_multigpu.log_iteration = marked
    with contextlib.redirect_stdout(None):
        ppo_multigpu.train(
            ppo_multigpu.Args(env="cartpole", num_envs=num_envs, max_iterations=iterations, log_root="", device="cpu")
        )
    measured, count = notes[marks[1][0] : marks[-1][0]], len(marks) - 2
    result = {"iteration": (marks[-1][1] - marks[1][1]) / count}
    for kind in ("device", "host"):
        chosen = [note for note in measured if note["kind"] == kind]
        result |= {f"{kind} {key}": sum(note[key] for note in chosen) / count for key in ("bytes", "seconds")}
        result[f"{kind} calls"] = len(chosen) / count
    torch.save(result, f"{out}/{os.environ.get('RANK', 0)}")


def measure(world_size: int, num_envs: int, iterations: int) -> dict[str, float]:
    """Means over the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        command = [sys.executable, __file__, "--num-envs", str(num_envs), "--iterations", str(iterations), "--out", out]
        ranks = [subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world_size)]
        assert [process.wait() for process in ranks] == [0] * world_size
        results = [torch.load(f"{out}/{r}") for r in range(world_size)]
    return {key: sum(result[key] for result in results) / world_size for key in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-envs", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.out:
        return rank(options.num_envs, options.iterations, options.out)
    print(f"{os.cpu_count()} cores, {options.num_envs} environments per rank, networks 512-256-128")
    print("ranks  s/iteration  in collectives  device collectives, MB  host collectives, kB")
    for world_size in (1, 2, 4):
        m = measure(world_size, options.num_envs, options.iterations)
        lost = m["device seconds"] + m["host seconds"]
        print(f"{world_size:5d}  {m['iteration']:11.3f}  {lost:7.3f} s {100 * lost / m['iteration']:3.0f}%", end="")
        print(
            f"  {m['device calls']:12.0f}, {m['device bytes'] / 1e6:8.2f}  {m['host calls']:11.0f}, {m['host bytes'] / 1e3:7.2f}"
        )
    print(f"\nModel (not measured): a GPU takes {GPU_ITERATION} s per iteration by itself, a host exchange {HOST_EXCHANGE} s")
    for world_size, link in LINKS.items():
        ring = 2 * (world_size - 1) / world_size * m["device bytes"] / link["bandwidth"]
        hops = m["device calls"] * (link["launch"] + 2 * (world_size - 1) * link["hop"])
        lost = ring + hops + m["host calls"] * HOST_EXCHANGE
        print(f"{world_size:3d} GPUs: {1e3 * ring:.2f} ms moving bytes + {1e3 * hops:.2f} ms latency + hosts", end="")
        print(f" = {1e3 * lost:.1f} ms per iteration, efficiency {100 * GPU_ITERATION / (GPU_ITERATION + lost):.1f} %")


if __name__ == "__main__":
    main()
