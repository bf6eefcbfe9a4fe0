"""ppo_multigpu.py: equals rsl_rl's distributed training, keeps all ranks equal, and stops as one when one rank fails."""

import multiprocessing
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import cases
import pytest
import torch
import yaml
from rank_worker import SMALL, run_rank

import ppo_continuous
import ppo_multigpu

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_multigpu.py"
TINY = ["--num-envs", "16", "--actor-hidden-dims", "8", "--critic-hidden-dims", "8", "--no-env-defaults", "--logger", "none"]
FAULTY = ["--env", "rank_worker:make", "--log-root", ""]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")  # its server has imported torch, so that a rank starts at once
FORKS.set_forkserver_preload(["rank_worker", "ppo_multigpu", "envs.cartpole", "cases", "rsl_rl.runners"])


def start(world_size, script, argv, environ=None, last_script=None, last_argv=()) -> list:
    """Start one process for each rank, as srun would: no agent looks after them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"} | (environ or {})
    processes = []
    for rank in range(world_size):
        last = rank == world_size - 1
        own = [last_script or script, [*argv, *last_argv]] if last else [script, argv]
        processes.append(FORKS.Process(target=run_rank, args=(rank, world_size, os.getcwd(), *own, shared), name=str(rank)))
        processes[-1].start()
    return processes


def finish(processes, timeout=60) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every process."""
    deadline = time.time() + timeout
    for process in processes:
        process.join(max(0.1, deadline - time.time()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [(p.exitcode, *(pathlib.Path(f"{name}.{p.name}").read_text() for name in ("out", "err"))) for p in processes]


def work(world_size, task, settings=None) -> list[dict]:
    """Run a task of rank_worker.py on every rank and return what each has noted."""
    for code, _, errors in finish(start(world_size, None, [task, settings or {}])):
        assert code == 0, errors
    return [torch.load(f"{rank}.pt", weights_only=False) for rank in range(world_size)]


# ---- The same learning --------------------------------------------------------------------------------------------


PARITY = {
    "two ranks": (2, {}),
    "four ranks": (4, dict(seed=3, std_type="log", num_mini_batches=3)),
    "fixed schedule, per mini-batch": (2, dict(schedule="fixed", normalize_advantage_per_mini_batch=True, seed=5)),
}


@pytest.mark.parametrize("name", PARITY)
def test_trajectory_equals_the_reference(name):
    pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
    world_size, settings = PARITY[name]
    ranks = work(world_size, "parity", settings)
    assert len(ranks[0]["ours"]["history"]) == len(ranks[0]["theirs"]["history"]) == 10
    for iteration in range(10):
        for tag in ranks[0]["theirs"]["history"][0]:
            theirs = sum(rank["theirs"]["history"][iteration][tag] for rank in ranks) / world_size
            tolerance = 1e-8 * (1.0 if tag == "Loss/surrogate" else abs(theirs))  # a mean of terms of size 1, near 0
            for rank in ranks:
                assert abs(rank["ours"]["history"][iteration][tag] - theirs) <= tolerance, f"iteration {iteration}: {tag}"
    for key, value in ranks[0]["ours"]["weights"][-1].items():
        torch.testing.assert_close(value, ranks[0]["theirs"]["weights"][key], rtol=1e-8, atol=1e-10, msg=key)
    for iteration in range(10):
        for rank in ranks[1:]:
            for key, value in rank["ours"]["weights"][iteration].items():
                assert torch.equal(value, ranks[0]["ours"]["weights"][iteration][key]), f"iteration {iteration}: {key}"
    updates = 5 * settings.get("num_mini_batches", 4)
    for calls in ranks[0]["ours"]["calls"]:  # one for each mini-batch, two for each normaliser
        assert calls == {"all_reduce": updates + 4, "all_gather_object": 2, "broadcast": 0, "gather_object": 1} or (
            calls == {"all_reduce": updates + 4, "all_gather_object": 2, "broadcast": 0, "gather_object": 0}
        )


def test_moments_and_advantages_over_ranks():
    ranks = work(2, "pieces")
    alone = ppo_continuous.EmpiricalNormalization(3).double()
    for i in range(2):
        alone.update(torch.cat([rank["x"][i] for rank in ranks]))
    for rank in ranks:
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(rank["normalizer"][key], value, rtol=1e-12, atol=1e-12)
        assert abs(rank["local"].mean()) < 1e-12 and abs(rank["local"].std() - 1) < 1e-6
    everything = torch.stack([rank["global"] for rank in ranks])
    assert abs(everything.mean()) < 1e-12 and abs(everything.std(unbiased=False) - 1) < 1e-6
    assert all(abs(rank["global"].mean()) > 0.1 for rank in ranks)


def test_one_rank_equals_the_base():
    settings = SMALL | dict(max_iterations=4)
    history, agent = cases.run(ppo_multigpu, ppo_multigpu.Args(**settings), None)
    expected, base = cases.run(ppo_continuous, ppo_continuous.Args(**settings), None)
    for ours, theirs in zip(history, expected, strict=True):
        for tag, value in theirs.items():
            assert tag.startswith("Perf/") or ours[tag] == value or value != value, tag
    for ours, theirs in zip(ppo_multigpu.tensors_of(agent), ppo_continuous.tensors_of(base), strict=True):
        assert torch.equal(ours, theirs)


# ---- One run ------------------------------------------------------------------------------------------------------


def train(world_size, *flags):
    results = finish(start(world_size, SCRIPT, [*TINY, *flags]))
    for code, _, errors in results:
        assert code == 0, errors
    return results


def losses(output: str) -> list[str]:
    """The lines of the console that show the losses, by iteration."""
    return re.findall(r"^  surrogate .*$", output, re.M)


def test_rank_0_alone_writes_and_a_run_resumes_bit_equal(tmp_path):
    flags = ["--env", "cartpole", "--save-interval", "2", "--max-iterations"]
    whole, rank_1 = train(2, *flags, "4", "--experiment-name", "whole")
    assert rank_1[1] == "" and "exported" in whole[1]
    assert f"{4 * 2 * 16 * 24:,} steps" in whole[1]
    (run,) = (tmp_path / "logs" / "whole").iterdir()
    train(2, *flags, "3", "--experiment-name", "parts")
    resumed = train(2, *flags, "4", "--experiment-name", "parts", "--resume", "--checkpoint", "model_2.pt")[0]
    assert losses(whole[1])[3:] == losses(resumed[1])
    more = train(3, *flags, "5", "--experiment-name", "parts", "--resume")[0]
    assert "this checkpoint is of 2 ranks, not 3" in more[1] and "iteration 5/5" in more[1]
    checkpoint = torch.load(run / "model_3.pt", weights_only=True)
    assert checkpoint["resume"]["args"]["seed"] == 1 and len(checkpoint["resume"]["ranks"]) == 2
    policy = ppo_multigpu.load_policy(run / "model_3.pt")
    assert policy(torch.zeros(2, 5)).shape == (2, 1)


def test_sigterm_to_one_rank_ends_all_with_a_checkpoint(tmp_path):
    processes = start(2, SCRIPT, [*TINY, "--env", "cartpole", "--save-interval", "1000000", "--max-iterations", "1000000"])
    wait_for(lambda: list(tmp_path.glob("logs/*/*/model_0.pt")))
    time.sleep(0.5)
    processes[1].terminate()
    for code, _, errors in finish(processes, 60):
        assert code == 0, errors
    assert len(list(tmp_path.glob("logs/*/*/model_*.pt"))) == 2


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


# ---- One rank fails -----------------------------------------------------------------------------------------------

FAULTS = {
    "kill": ("kill 1 50", "rank 1 does not answer"),
    "kill of the rank that keeps the store": ("kill 0 50", "rank 0 does not answer"),
    "raise": ("raise 1 50", "rank 1 stopped: RuntimeError: the simulator has crashed"),
    "hang": ("hang 2 50", "rank 2 does not answer"),
    "obs": ("obs 1 50", "rank 1: non-finite observation group policy from step 2 on, in environments [3]"),
    "reward": ("reward 1 50", "rank 1: non-finite rewards from step 1 on, in environments [3]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_names_the_one_that_failed(name, tmp_path):
    fault, message = FAULTS[name]
    flags = [*TINY, *FAULTY, "--max-iterations", "1000"] + (["--rank-timeout", "3"] if name == "hang" else [])
    processes = start(3, SCRIPT, flags, {"FAULT": fault})
    begin, survivors = time.time(), [rank for rank in range(3) if str(rank) != fault.split()[1] or name in ("obs", "reward")]
    results = finish([processes[rank] for rank in survivors], 60)
    for process in processes:
        process.kill()
    for code, _, errors in results:
        assert code == 1 and re.search(f"error: (iteration 2: )?{re.escape(message)}", errors), errors
    assert time.time() - begin < 60


def test_the_rank_with_the_nan_dumps_its_rollout(tmp_path):
    results = finish(start(2, SCRIPT, [*TINY, "--env", "rank_worker:make", "--max-iterations", "9"], {"FAULT": "obs 1 30"}))
    (dump,) = tmp_path.glob("logs/*/*/nan_1.pt")
    assert f"the rollout is in {dump.relative_to(tmp_path)}" in results[1][2]
    assert torch.load(dump, weights_only=True)["obs"]["policy"][6, 3].isnan().all()


MISMATCHES = {
    "args": (["--gamma", "0.9"], {}, "rank 1 differs from rank 0: it has gamma 0.9 (rank 0: 0.99)"),
    "shapes": ([], {"FAULT": "shape 1 0"}, "it has observations {'policy': (16, 6)} (rank 0: {'policy': (16, 5)})"),
    "code": ([], {}, "it has source code (crc32)"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_unequal_ranks_are_refused(name, tmp_path):
    argv, environ, message = MISMATCHES[name]
    script = tmp_path / "ppo_multigpu.py"
    script.write_text(SCRIPT.read_text() + ("# a later version\n" if name == "code" else ""))
    for code, _, errors in finish(start(2, SCRIPT, [*TINY, *FAULTY], environ, script, argv)):
        assert code == 1 and message in errors and "rank 1" in errors, errors


# ---- torchrun -----------------------------------------------------------------------------------------------------


def torchrun(*flags, prefix=(), **environ) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *map(str, flags)]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environ
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)


def test_a_restart_by_torchrun_resumes(tmp_path):
    flags = ["--nproc-per-node", 2, "--max-restarts", 1, SCRIPT, *TINY, "--env", "rank_worker:make", "--max-iterations", 6]
    process = torchrun(*flags, "--save-interval", 2, FAULT="kill 1 100")  # in iteration 4; saved were 0, 2 and 4
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    first, second = sorted(tmp_path.glob("logs/*/*"))
    assert f"resuming {first.relative_to(tmp_path)}/model_2.pt after its 3 iterations" in output
    assert yaml.safe_load((second / "args.yaml").read_text())["load_run"] == re.escape(first.name)
    assert (second / "model_5.pt").exists()


# ---- Two hosts ----------------------------------------------------------------------------------------------------

HOSTS = (("ppo_a", "10.77.0.1"), ("ppo_b", "10.77.0.2"))


@pytest.fixture
def hosts():
    """Two network namespaces joined by one link: two hosts with an address each."""
    names, run = [name for name, _ in HOSTS], lambda command: subprocess.run(command.split(), check=True, capture_output=True)
    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for name, address in HOSTS:
            run(f"ip -n {name} addr add {address}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {name} link set lo up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', None) or error}")
    else:
        yield lambda state: run(f"ip -n {names[0]} link set eth0 {state}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_train_together(hosts, tmp_path):
    flags = ["--nnodes", 2, "--rdzv-id", 7, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0][1]}:29555", "--local-addr"]
    command = [SCRIPT, *TINY, "--env", "cartpole", "--max-iterations", 3, "--log-root", ""]
    nodes = []
    for (name, address), is_host in zip(HOSTS, ("true", "false")):
        conf = ["--rdzv-conf", f"is_host={is_host}", "--nproc-per-node", 1]
        nodes.append(
            torchrun(*flags, address, *conf, *command, prefix=["ip", "netns", "exec", name], GLOO_SOCKET_IFNAME="eth0")
        )
    outputs = [node.communicate(timeout=90)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "iteration 3/3  2,304 steps" in outputs[0] and "iteration" not in outputs[1]


def test_a_cut_link_stops_both_hosts(hosts, tmp_path):
    command = [sys.executable, SCRIPT, *TINY, "--rank-timeout", "4", "--env", "cartpole", "--max-iterations", "1000000"]
    environ = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": HOSTS[0][1], "MASTER_PORT": "29556", "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = []
    for rank, (name, _) in enumerate(HOSTS):
        pipe = dict(
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ | {"RANK": str(rank), "LOCAL_RANK": "0"}
        )
        ranks.append(subprocess.Popen(["ip", "netns", "exec", name, *map(str, command)], **pipe))
    wait_for(lambda: list(tmp_path.glob("logs/*/*/model_0.pt")))
    hosts("down")
    begin = time.time()
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert time.time() - begin < 60 and all(rank.returncode == 1 for rank in ranks)
    assert "error: rank 1 does not answer" in errors[0] and "error: rank 0 does not answer, whose host keeps" in errors[1], (
        errors
    )
