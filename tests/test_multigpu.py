"""ppo_multigpu.py: equals rsl_rl's distributed training, keeps all ranks equal, and stops as one when one rank fails."""

import math
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import time

import cases
import pytest
import torch
from rank_worker import SMALL, run_rank, weights_of
from torch.utils._pytree import tree_flatten_with_path

import ppo_continuous
import ppo_multigpu
from envs.cartpole import Cartpole

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_multigpu.py"
TINY = ["--num-envs", "16", "--actor-hidden-dims", "8", "--critic-hidden-dims", "8", "--no-env-defaults", "--device", "cpu"]


STUDENT = ROOT / "distill_dagger.py"
TINY_STUDENT = [
    "--num-envs",
    "16",
    "--student-hidden-dims",
    "8",
    "--gradient-length",
    "6",
    "--no-env-defaults",
    "--device",
    "cpu",
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")  # its server has imported torch, so that a rank starts at once
FORKS.set_forkserver_preload(["rank_worker", "ppo_multigpu", "envs.cartpole", "cases", "rsl_rl.runners"])


def start(world_size, script, argv, environ=None, last_argv=(), folder=".") -> list:
    """Start one process for each rank, as srun would: no agent looks after them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"} | (environ or {})
    folder, processes = pathlib.Path(folder).absolute(), []
    for rank in range(world_size):
        own = [*argv, *last_argv] if rank == world_size - 1 else argv
        processes.append(FORKS.Process(target=run_rank, args=(rank, world_size, folder, script, own, shared)))
        processes[-1].output = [folder / f"{name}.{rank}" for name in ("out", "err")]
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
    return [(process.exitcode, *(file.read_text() for file in process.output)) for process in processes]


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
    """Losses are the mean of what rsl_rl's ranks log, weights are theirs, and the same on all ranks to the last bit."""
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
    for key, value in ranks[0]["theirs"]["weights"].items():
        torch.testing.assert_close(ranks[0]["ours"]["weights"][-1][key], value, rtol=1e-8, atol=1e-10, msg=key)
    for iteration in range(10):
        for rank in ranks[1:]:
            for key, value in rank["ours"]["weights"][iteration].items():
                assert torch.equal(value, ranks[0]["ours"]["weights"][iteration][key]), f"iteration {iteration}: {key}"
    # One for the gradients of each mini-batch, one for its KL where it sets the rate, two for each normaliser; through the
    # host one for the signals and one for the metrics.
    each = 1 if settings.get("schedule") == "fixed" else 2
    expected = {"all_reduce": 5 * settings.get("num_mini_batches", 4) * each + 4, "all_gather_object": 2}
    assert ranks[0]["ours"]["calls"][1:] == [expected] * 9  # the first has those of the start, too


def test_moments_advantages_and_metrics_over_ranks():
    """They are those of all ranks' samples taken together; without being asked advantages are normalised on each rank alone."""
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
    for rank in ranks:  # where only one rank has a number it counts alone, and what is finite must be so on all
        assert math.isnan(rank["metrics"].pop("Train/none"))
        assert rank["metrics"] == {
            "Train/both": 1.5,
            "Train/one": 5.0,
            "Loss/finite": 0.5,
            "Episode/of 0": 7.0,
            "Episode/of 1": 7.0,
        }


def test_one_rank_equals_the_base():
    """Without torchrun it is a world of one: every number is ppo_continuous.py's, and nothing of the group stays behind."""
    settings = SMALL | dict(max_iterations=4)
    history = ppo_multigpu.train(ppo_multigpu.Args(**settings))
    assert not torch.distributed.is_initialized()
    base = ppo_continuous.train(ppo_continuous.Args(**settings))
    for ours, theirs in zip(history, base, strict=True):
        for tag, value in theirs.items():
            assert tag.startswith("Perf/") or ours[tag] == value or value != value, tag
    for key, value in weights_of(base.agent).items():
        assert torch.equal(weights_of(history.agent)[key], value), key


# ---- One run ------------------------------------------------------------------------------------------------------


def train(world_size, *flags, last_argv=(), **environ):
    results = finish(start(world_size, SCRIPT, [*TINY, *flags], {"NO_EXPORT": "1"} | environ, last_argv))
    for code, _, errors in results:
        assert code == 0, errors
    return results


def assert_same(path, other):
    """Two checkpoints are equal to the last bit, but for where and how long the runs were to go."""
    contents = [torch.load(file, weights_only=True) for file in (path, other)]
    for content in contents:
        for name in ("experiment_name", "max_iterations", "resume", "checkpoint"):
            del content["resume"]["args"][name]
        del content["resume"]["started"]
    ours, theirs = (dict(tree_flatten_with_path(content)[0]) for content in contents)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for key, x in ours.items():
        assert torch.equal(x, theirs[key]) if torch.is_tensor(x) else x == theirs[key], key


def test_every_rank_saves_and_a_run_resumes_bit_equal(tmp_path):
    """Rank 0 alone prints, logs and exports; each rank saves what it needs to go on as if it had not stopped."""
    flags = ["--env", "cartpole", "--save-interval", "2", "--max-iterations"]
    whole, rank_1 = train(2, *flags, "4", "--experiment-name", "whole", NO_EXPORT="")
    assert rank_1[1] == "" and "iteration 3/4" in whole[1] and f"{4 * 2 * 16 * 24:,} env steps" in whole[1]
    (run,) = (tmp_path / "logs" / "whole").iterdir()
    assert {file.name for file in (run / "rank_1").iterdir()} == {"model_0.pt", "model_2.pt", "model_3.pt"}
    assert (run / "exported" / "policy.pt").exists() and len(list(run.glob("events.*"))) == 1

    train(2, *flags, "3", "--experiment-name", "parts")
    train(2, *flags, "4", "--experiment-name", "parts", "--resume")
    first, second = sorted((tmp_path / "logs" / "parts").iterdir())
    assert (first / "model_2.pt").exists() and not (first / "model_3.pt").exists()
    for name in ("model_3.pt", "rank_1/model_3.pt"):
        assert_same(run / name, second / name)
    rows = [torch.load(run / name, weights_only=True)["resume"]["row"] for name in ("model_3.pt", "rank_1/model_3.pt")]
    assert not torch.equal(rows[0]["episode_return"], rows[1]["episode_return"])  # each rank lives through something else

    more = train(3, *flags, "5", "--experiment-name", "parts", "--resume")[0]  # the third starts with new environments
    assert f"resuming {second / 'model_3.pt'} after its 4 iterations" in more[1] and "iteration 4/5" in more[1]
    assert_equal_ranks(tmp_path.glob("logs/parts/*/**/model_4.pt"), 3)


def assert_equal_ranks(paths, number):
    first, *others = [torch.load(path, weights_only=True) for path in paths]
    assert len(others) == number - 1
    for other in others:
        for part in ("actor_state_dict", "critic_state_dict"):
            assert all(torch.equal(x, other[part][key]) for key, x in first[part].items())


def test_sigterm_to_one_rank_ends_all_with_a_checkpoint(tmp_path):
    flags = ["--env", "cartpole", "--save-interval", "1000000", "--max-iterations", "1000000"]
    processes = start(2, SCRIPT, [*TINY, *flags], {"NO_EXPORT": "1"})
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

FAULTS = {  # what goes wrong, flags, flags of the last rank, the line that says it
    "kill": ("kill 1 50", [], [], "rank 1 does not answer"),
    "kill of the rank that keeps the store": ("kill 0 50", [], [], "rank 0 does not answer"),
    "raise": ("raise 1 50", [], [], "rank 1 stopped: RuntimeError: the simulator has crashed"),
    "hang": ("hang 2 50", ["--rank-timeout", "3"], [], "rank 2 does not answer"),
    "freeze": ("freeze 1 50", ["--rank-timeout", "3"], [], "rank 1 does not answer"),
    "freeze of the rank that keeps the store": ("freeze 0 50", ["--rank-timeout", "3"], [], "rank 0 does not answer"),
    "student: freeze": ("freeze 1 50", ["--rank-timeout", "3"], [], "rank 1 does not answer"),
    "student: kill": ("kill 0 50", [], [], "rank 0 does not answer"),
    "obs": ("obs 1 50", [], [], "rank 1: iteration 2: obs policy of environment 3, column [0], is nan at step 2"),
    "reward": ("reward 1 50", [], [], "rank 1: iteration 2: rewards of environment 3, column [], is inf at step 1"),
    "other args": ("", [], ["--gamma", "0.9"], "rank 2 differs from rank 0: it has gamma 0.9 (rank 0: 0.99)"),
    "other shapes": ("shape 1 0", [], [], "it has observations {'policy': (16, 6)} (rank 0: {'policy': (16, 5)})"),
    "no checkpoint": ("", ["--resume"], [], "--checkpoint : no such file"),
    "kill while it saves": ("save 1 50", ["--log-root", "logs", "--save-interval", "1"], [], "rank 1 does not answer"),
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """All faults at once, since most of the time their ranks wait for each other."""
    processes, teacher = {}, str(tmp_path_factory.mktemp("teacher") / "model_0.pt")
    cases.write_teacher(teacher, Cartpole(4), ["policy"])
    for name, (fault, argv, last_argv, _) in FAULTS.items():
        argv = ["--env", "rank_worker:make", "--log-root", "", "--max-iterations", "1000", *argv]
        student = [*TINY_STUDENT, "--teacher", teacher] if name.startswith("student") else []
        argv = [*(student or TINY), *argv]
        environ = {"FAULT": fault or "none 0 0"}
        world_size = 5 if name == "kill" else 3  # of five some do not speak with the lost one, and learn of it from others
        script = STUDENT if student else SCRIPT
        processes[name] = start(world_size, script, argv, environ, last_argv, tmp_path_factory.mktemp("fault"))
    yield processes
    for process in sum(processes.values(), []):
        process.kill()


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_ends_and_names_the_one_that_failed(name, failing):
    fault, *_, message = FAULTS[name]
    kind, culprit, _ = (fault or "none 0 0").split()
    for rank, process in enumerate(failing[name]):
        if kind in ("kill", "hang", "freeze", "save") and rank == int(culprit):
            continue
        ((code, _, errors),) = finish([process])
        assert code == 1, errors
        last = errors.splitlines()[-1]  # before it torch may remark on lost connections
        if kind == "raise" and rank == int(culprit):
            assert "Traceback" in errors and last == "RuntimeError: the simulator has crashed", errors
        else:
            assert "Traceback" not in errors and last.startswith("error: ") and message in last, errors


@pytest.mark.parametrize("rank, message", [(1, "timed out"), (0, "1/2 clients joined")])
def test_a_rank_that_never_comes(rank, message, tmp_path):
    """The other one waits for it as long as for an answer, and says so in one line."""
    environ = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, SCRIPT, *TINY, "--env", "cartpole", "--log-root", "", "--rank-timeout", "4"]
    begun = time.monotonic()
    run = subprocess.run(command, env=os.environ | environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and last.startswith("error: ") and message in last, run.stderr
    assert "Traceback" not in run.stderr and time.monotonic() - begun < 40


def test_a_rank_0_that_is_frozen_before_they_meet(tmp_path):
    """Its port is open, and nobody answers there."""
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        environ = dict(
            RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(frozen.getsockname()[1])
        )
        command = [sys.executable, SCRIPT, *TINY, "--env", "cartpole", "--log-root", "", "--rank-timeout", "1"]
        run = subprocess.run(command, env=os.environ | environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert run.stderr.splitlines()[-1] == "error: rank 0 does not answer, whose host keeps the store"


@pytest.mark.parametrize("script", [SCRIPT, STUDENT], ids=["ppo_multigpu", "distill_dagger"])
def test_a_slow_film_is_waited_for(script, tmp_path):
    """Longer than another rank is waited for."""
    flags = ["--env", "cartpole", "--max-iterations", "2", "--video-interval", "5", "--rank-timeout", "2"]
    cases.write_teacher("teacher.pt", Cartpole(4), ["policy"])
    student = [*TINY_STUDENT, "--teacher", str(tmp_path / "teacher.pt")]
    processes = start(2, script, [*(TINY if script == SCRIPT else student), *flags], {"NO_EXPORT": "1", "FILM": "5"})
    for code, _, errors in finish(processes):
        assert code == 0, errors


def test_rank_0_saves_last(failing):
    """Where its checkpoint is, all ranks' are: none of the iteration in which a rank was lost before it had saved."""
    finish(failing["kill while it saves"])
    folder = failing["kill while it saves"][0].output[0].parent
    for run in ("logs/*/*", "logs/*/*/rank_1"):
        assert {path.name for path in folder.glob(f"{run}/model_*.pt")} == {"model_0.pt", "model_1.pt"}


def test_a_nan_on_one_rank_leaves_its_rollout_and_the_last_good_weights(tmp_path):
    flags = [*TINY, "--env", "rank_worker:make", "--max-iterations", "9"]
    for code, _, errors in finish(start(2, SCRIPT, flags, {"FAULT": "obs 1 55"})):
        assert code == 1 and "rank 1" in errors and "rank_1/nan_2.pt\n" in errors
    (dump,) = tmp_path.glob("logs/*/*/rank_1/nan_2.pt")
    assert torch.load(dump, weights_only=True)["obs"]["policy"][7, 3].isnan().all()
    assert_equal_ranks(tmp_path.glob("logs/*/*/**/model_1.pt"), 2)
    (path,) = tmp_path.glob("logs/*/*/model_1.pt")
    assert all(x.isfinite().all() for x in torch.load(path, weights_only=True)["actor_state_dict"].values())


# ---- torchrun -----------------------------------------------------------------------------------------------------


def torchrun(*flags, prefix=(), **environ) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *map(str, flags)]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environ
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)


def test_a_restart_by_torchrun_resumes(tmp_path):
    """Where a rank was lost in iteration 4, the other has saved what was done by then, and all go on from there."""
    flags = ["--nproc-per-node", 2, "--max-restarts", 1, SCRIPT, *TINY, "--env", "rank_worker:make", "--max-iterations", 6]
    process = torchrun(*flags, "--save-interval", 2, FAULT="kill 1 100")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    first, second = sorted(tmp_path.glob("logs/*/*"))
    assert f"resuming {first}/model_3.pt after its 4 iterations" in output and not (first / "rank_1" / "model_3.pt").exists()
    assert_equal_ranks(second.glob("**/model_5.pt"), 2)


def test_a_restart_goes_on_where_the_run_was_whatever_it_started_from(tmp_path):
    """Not from the policy of --checkpoint again; and anew where nothing had been saved."""
    flags, again = ["--env", "cartpole", "--max-iterations"], {"TORCHELASTIC_RESTART_COUNT": "1"}
    output = train(2, *flags, "1", "--experiment-name", "policy", **again)[0][1]
    assert "resuming" not in output and "iteration 0/1" in output
    (policy,) = tmp_path.glob("logs/policy/*/model_0.pt")
    flags += ["3", "--experiment-name", "run", "--checkpoint", str(policy)]
    output = train(2, *flags, **again)[0][1]
    assert f"starting from the policy of {policy}" in output
    (first,) = tmp_path.glob("logs/run/*/model_2.pt")
    output = train(2, *flags, "--max-iterations", "4", **again)[0][1]
    assert f"resuming {first} after its 3 iterations" in output


def test_ranks_start_from_the_same_weights_and_iteration(tmp_path):
    """Where each names, or finds, another checkpoint: a policy is rank 0's, and to resume is refused."""
    flags = ["--env", "cartpole", "--save-interval", "1", "--max-iterations"]
    train(1, *flags, "2", "--experiment-name", "policies")
    first, second = ([f"--checkpoint={path}"] for path in sorted(tmp_path.glob("logs/policies/*/model_*.pt")))
    train(2, *flags, "2", "--experiment-name", "run", *first, last_argv=second)
    assert_equal_ranks(tmp_path.glob("logs/run/*/**/model_1.pt"), 2)
    for code, _, errors in finish(start(2, SCRIPT, [*TINY, *flags, "3", "--resume", *first], last_argv=second)):
        assert code == 1 and "rank 1 differs from rank 0: it has start 2 (rank 0: 1)" in errors, errors


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
    assert "iteration 2/3  2,304 env steps" in outputs[0] and "iteration" not in outputs[1]


def test_a_cut_link_stops_both_hosts(hosts, tmp_path):
    flags = [*TINY, "--rank-timeout", "4", "--env", "cartpole", "--max-iterations", "1000000"]
    environ = {"MASTER_ADDR": HOSTS[0][1], "GLOO_SOCKET_IFNAME": "eth0", "NETNS": " ".join(name for name, _ in HOSTS)}
    ranks = start(2, SCRIPT, flags, environ)
    wait_for(lambda: list(tmp_path.glob("logs/*/*/model_0.pt")))
    hosts("down")
    (code_0, _, errors_0), (code_1, _, errors_1) = finish(ranks)
    assert code_0 == code_1 == 1
    assert "error: rank 1 does not answer" in errors_0, errors_0
    assert "error: rank 0 does not answer, whose host keeps" in errors_1, errors_1
