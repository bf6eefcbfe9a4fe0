"""PPO for robots, as rsl_rl trains them, in one file: asymmetric actor-critic, thousands of environments.

    pip install torch tensordict tyro tensorboard                # to export: onnx onnxscript onnxruntime
    # beside it envs/, for the built-in tasks, the simulators and --play (which films with pillow)
    python ppo_continuous.py                                     # a quadruped learns to walk
    python ppo_continuous.py --env my_module:make_env --num-envs 4096
    python ppo_continuous.py --play                              # film the newest checkpoint

Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) with generalised advantage estimation
(Schulman et al. 2016, arXiv:1506.02438) as rsl_rl has them (Schwarke et al. 2025, arXiv:2509.10771; Rudin et
al. 2022, arXiv:2109.11978). On one CPU thread, with --timeout-bootstrap value and the same random numbers
(rsl_rl kept from drawing more), losses and weights equal those of rsl_rl 5.5.1 to the last bit
(tests/test_parity.py).

Shapes: T steps per rollout, N environments, B samples of a mini-batch, O observation size, A actions.

Words: the actor turns an observation into a distribution of actions, the policy. The critic says V(s_t),
from what it sees at step t: the rewards still to come, later ones counting less. A return is a sum of
rewards: of an episode, or what V should have said. A rollout is T steps of all N. An advantage is how much
better it went than V had said. To bootstrap is to put V in the place of rewards that nobody has seen.
tests/walk.py follows one sample through all of this, with its numbers.

What is logged, what is healthy, what a bad value means:
- Train/mean_reward: sum of rewards of the episodes that ended in this rollout (unlike rsl_rl: the last 100);
  rises. NaN: none ended. Train/num_episodes: how many did.
- Train/mean_episode_length: their env steps; rises where falling ends an episode.
- Episode/, Metrics/ and so on: what the environment logs, averaged.
- Loss/surrogate: the actor's loss; about -0.02 to 0; no measure of progress.
- Loss/value: squared error; rises with the square of the returns. Explodes: rewards are too large.
- Loss/explained_variance: share of the returns' variance that the critic foresees; 0.5 to 1. Below 0: it
  does worse than a constant; it sees too little. Time-outs that do not bootstrap lower it.
- Loss/entropy: width of the policy; falls slowly. Fast: it stops trying things. Rises without end:
  entropy_coef is too large.
- Loss/kl: how far the policy has moved since it acted, mean over the mini-batches; near desired_kl. Far
  above for long: num_learning_epochs is too large.
- Loss/clip_fraction: share of samples outside the clip range; 0.05 to 0.3. Near 0: it hardly moves.
- Loss/actor_grad_norm, critic_grad_norm: before clipping. The critic's far above max_grad_norm for long:
  scale the rewards down.
- Loss/learning_rate: 1e-4 to 1e-3 for most of an adaptive training, at first up to its upper end, 1e-2. At
  its lower end, 1e-5: every mini-batch moves the policy too far.
- Policy/mean_std: standard deviation of the actions; falls from init_std. Rises: nothing punishes noise.
- Perf/total_fps: env steps per second of collection_time and learning_time [s].
"""

from __future__ import annotations

import contextlib
import functools
import glob
import inspect
import json
import logging
import math
import os
import pkgutil
import pprint
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import tyro
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal, kl_divergence

if TYPE_CHECKING:
    from envs.vec_env import VecEnv


# ---- Settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Names are rsl_rl's, where it has them. What changes while training is a tensor, not in here.

    From Python actor and critic may differ: activation=dict(actor="elu", critic="tanh").
    """

    env: str = "quadruped"
    """Built-in task, `simulator:task`, or `package.module:factory` of your own."""
    env_cfg: tuple[str, ...] = ()
    """Options of the task, `name=value`: dotted names of its configuration, or keyword arguments."""
    env_defaults: bool = True
    """Start from the settings that the environment recommends, where it has any (command line only)."""
    num_envs: int = 4096
    """N, environments that step in parallel. (A task has defaults of its own: `--help --env ID`.)"""
    num_steps_per_env: int = 24
    """T, env steps per environment and iteration."""
    max_iterations: int = 1500
    """Iterations in total; a resumed run continues to this number, not by it."""
    init_at_random_ep_len: bool = True
    """Start as if somewhere in an episode already, so that not all environments time out together."""
    timeout_bootstrap: Literal["final_obs", "value", "none"] = "final_obs"
    """What stands for rewards after a time-out: V(final_obs) if given, else V(s_t) as rsl_rl; or nothing."""
    clip_actions: float | None = None
    """Clamp the actions sent to the environment to +-this."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is a GPU."""
    seed: int = 1
    """Seed of environment, weights and sampling."""

    actor_obs: tuple[str, ...] = ()
    """Observation groups of the actor; default: `actor`, `policy` or `state`."""
    critic_obs: tuple[str, ...] = ()
    """Observation groups of the critic; default: `critic`, or the actor's and `privileged`."""
    obs_normalization: bool = True
    """Normalise observations by their running mean and standard deviation."""
    actor_hidden_dims: tuple[int, ...] = (512, 256, 128)
    """Hidden layers of the actor."""
    critic_hidden_dims: tuple[int, ...] = (512, 256, 128)
    """Hidden layers of the critic."""
    activation: Literal["elu", "selu", "relu", "leakyrelu", "tanh", "sigmoid", "gelu", "silu", "mish"] = "elu"
    """Of torch.nn, after each hidden layer."""
    distribution: Literal["gaussian", "heteroscedastic", "beta"] = "gaussian"
    """Of the actions: Gaussian; Gaussian whose standard deviation depends on the state; Beta, bounded."""
    std_type: Literal["scalar", "log"] = "scalar"
    """What is learned is the standard deviation, or its logarithm."""
    init_std: float = 1.0
    """Initial standard deviation of the actions."""
    learn_std: bool = True
    """Learn the standard deviation (`gaussian` only)."""
    action_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the actions (`beta` only)."""

    num_learning_epochs: int = 5
    """Passes over each rollout."""
    num_mini_batches: int = 4
    """Mini-batches per pass; samples that do not fill one are dropped."""
    gamma: float = 0.99
    """Discount per env step."""
    lam: float = 0.95
    """lambda: how much later surprises count in an advantage. 0: not at all; 1: as rewards do, by gamma."""
    clip_param: float = 0.2
    """epsilon: how far ratio and V may move before a sample stops pulling."""
    use_clipped_value_loss: bool = True
    """No gradient from samples whose V has moved by clip_param towards the return, in its unit."""
    value_loss_coef: float = 1.0
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the bonus for entropy, the policy's width."""
    normalize_advantage_per_mini_batch: bool = False
    """Normalise advantages over each mini-batch instead of over the rollout."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer of actor and critic together."""
    learning_rate: float = 1e-3
    """Learning rate; with the adaptive schedule the first one. A resumed run goes on with its own."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """`adaptive` steers how far the policy moves (its KL divergence) to desired_kl."""
    desired_kl: float = 0.01
    """KL divergence that the adaptive schedule aims at."""
    max_grad_norm: float = 1.0
    """Gradient norm at which actor and critic are clipped, each on its own."""

    compile: bool = False
    """Compile the loss, and the step of an environment that can be, with torch.compile."""
    cuda_graphs: bool = True
    """On CUDA: replay the rollout (of a simulator: each policy step) and the update as CUDA graphs."""
    use_mixed_precision: bool = False
    """Run the networks of the update in bfloat16; distributions and losses stay in float32."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "high"
    """Of matrix products on a GPU: `high` is TF32, as Isaac Lab and mjlab train; `highest` is float32."""

    experiment_name: str = ""
    """Folder of this experiment's runs; default: script and environment."""
    run_name: str = ""
    """Suffix of the run's folder."""
    log_root: str = "logs"
    """Where runs are written; empty: write nothing."""
    logger: str = "tensorboard"
    """`tensorboard`, `wandb`, `none`, or `package.module:Writer`, made from the run's folder."""
    save_interval: int = 50
    """Iterations between checkpoints."""
    save_best: str = ""
    """Metric, as `Train/mean_reward`, at whose largest value model_best.pt is saved too."""
    video_interval: int = 0
    """Iterations between films of the policy; 0: none."""
    resume: bool = False
    """Continue the newest run, or that of --checkpoint, where it stopped."""
    checkpoint: str = ""
    """Checkpoint (path, folder) to play, export, resume (default: newest); a new run takes its actor only."""
    critic_checkpoint: str = ""
    """A new run starts its critic from this one, which may be that of --checkpoint."""
    wandb_run_path: str = ""
    """Take the checkpoint from this W&B run, `entity/project/run`."""
    play: bool = False
    """Run a policy instead of training: print returns, film it."""
    export: bool = False
    """Write a checkpoint's policy as ONNX and TorchScript instead of training."""
    export_batch: bool = False
    """Exported as ONNX the policy takes any number of robots at once, instead of one."""
    agent: Literal["policy", "zero", "random"] = "policy"
    """Who acts in --play."""
    play_envs: int = 16
    """Environments in --play; each runs one episode."""
    viewer: bool = False
    """In --play: open the simulator's own viewer."""
    film: bool = True
    """In --play: draw film and plots."""
    terminations: bool = True
    """In --play: let the environment end episodes early."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith("_obs") and isinstance(value, str):  # "policy" means ("policy",)
                object.__setattr__(self, name, (value,))


def check_args(args: Args):
    """Refuse what cannot work, before any time is spent on it."""
    check_settings(args)
    if args.num_envs * args.num_steps_per_env < 2 * args.num_mini_batches:
        raise wrong(args, "num_mini_batches", "leaves fewer than 2 samples for each")
    if args.distribution != "gaussian" and not args.learn_std:
        raise wrong(args, "learn_std", f"the std of the {args.distribution} distribution is always learned")


# ---- Networks ----------------------------------------------------------------------------------------------


class EmpiricalNormalization(nn.Module):
    """Normalise by the running mean and standard deviation of everything seen so far.

    Observations come in metres, radians and newtons; without this the largest numbers would drown the rest.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("_mean", torch.zeros(1, *shape))  # rsl_rl's names, so that checkpoints fit
        self.register_buffer("_var", torch.ones(1, *shape))
        self.register_buffer("_std", torch.ones(1, *shape))
        self.register_buffer("count", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self._mean) / (self._std + 1e-2)  # 1e-2: what hardly ever moves is not blown up

    def update(self, x: Tensor):
        """Merge the moments of a batch x (B, O): Chan et al. 1983, in rsl_rl's order of operations."""
        batch_size = torch.full_like(self.count, len(x))
        mean = x.mean(dim=0, keepdim=True)  # (1, O)
        var = x.var(dim=0, unbiased=False, keepdim=True)
        self.count += batch_size
        rate, delta = batch_size / self.count, mean - self._mean
        self._mean += rate * delta
        self._var += rate * (var - self._var + delta * (mean - self._mean))
        self._std.copy_(self._var.sqrt())


class Gaussian(nn.Module):
    """What the actor's MLP puts out -> a normal distribution of the actions (..., A).

    The MLP gives the mean (..., A). The standard deviation is a parameter, the same in every state: it
    tries as widely where it is sure as where it is not. Heteroscedastic: the MLP gives both, (..., 2 A).
    """

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.num_actions, self.log = num_actions, args.std_type == "log"
        self.heteroscedastic = args.distribution == "heteroscedastic"
        self.num_outputs = 2 * num_actions if self.heteroscedastic else num_actions
        self.init_bias = 0.0
        std = args.init_std * torch.ones(num_actions)
        if self.heteroscedastic:  # the extra outputs start at init_std
            self.init_bias = torch.tensor(args.init_std + 1e-7).log().item() if self.log else args.init_std
        else:
            name, value = ("log_std_param", std.log()) if self.log else ("std_param", std)
            self.register_parameter(name, nn.Parameter(value, requires_grad=args.learn_std))

    def forward(self, output: Tensor) -> Normal:
        if self.heteroscedastic:
            mean, std = output.chunk(2, -1)
        else:
            mean, std = output, self.log_std_param if self.log else self.std_param
        # As in rsl_rl a std beyond these bounds has no gradient to bring it back. A flaw, kept to be equal.
        std = std.clamp(math.log(1e-6), math.log(1e6)).exp() if self.log else std.clamp(1e-6, 1e6)
        return self.make(mean, std.expand_as(mean))

    def make(self, loc, scale) -> Normal:
        return Normal(loc, scale, validate_args=False)  # the check would wait for the device


class ScaledBeta(torch.distributions.Beta):
    """Beta distribution of x in (0, 1), and actions low + scale * x: they cannot leave their range."""

    def __init__(self, concentration1, concentration0, low: float, scale: float):
        super().__init__(concentration1, concentration0, validate_args=False)
        self.low, self.scale = low, scale

    def rsample(self):
        return super().rsample() * self.scale + self.low

    def log_prob(self, actions):
        x = ((actions - self.low) / self.scale).clamp(1e-6, 1.0 - 1e-6)  # at 0 and 1 it would be infinite
        return super().log_prob(x) - math.log(self.scale)

    @property
    def mean(self):
        return super().mean * self.scale + self.low

    @property
    def stddev(self):
        return super().stddev * self.scale

    # As in rsl_rl the entropy is that of x; that of the actions is larger by log(scale), a constant.


class Beta(nn.Module):
    """What the actor's MLP puts out, (..., 2 A) -> a Beta distribution of the actions, in their range."""

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.num_actions, self.num_outputs, self.init_bias = num_actions, 2 * num_actions, 0.0
        self.low, self.scale = args.action_range[0], args.action_range[1] - args.action_range[0]

    def forward(self, output: Tensor) -> ScaledBeta:
        alpha, beta = (nn.functional.softplus(x) + 1.0 for x in output.chunk(2, -1))  # above 1: one peak
        return self.make(alpha, beta)

    def make(self, concentration1, concentration0) -> ScaledBeta:
        return ScaledBeta(concentration1, concentration0, self.low, self.scale)


def make_mlp(num_inputs: int, num_outputs: int, hidden_dims, activation: str):
    sizes, layers = [num_inputs, *hidden_dims], []
    for pair in zip(sizes, sizes[1:]):
        layers += [nn.Linear(*pair), by_name(nn, activation)()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_outputs))


class Model(nn.Module):
    """Observation groups -> normalise -> MLP. With a distribution it is an actor, else a critic."""

    def __init__(self, obs: TensorDict, groups, hidden_dims, args: Args, distribution=None):
        super().__init__()
        args = of_network(args, "actor" if distribution else "critic")
        self.groups, self.example = groups, obs.select(*groups)[:1]  # of one environment
        size = sum(obs[group].shape[-1] for group in groups)  # O
        self.obs_normalizer = EmpiricalNormalization(size) if args.obs_normalization else nn.Identity()
        self.distribution = distribution
        num_outputs = distribution.num_outputs if distribution else 1
        self.mlp = make_mlp(size, num_outputs, hidden_dims, args.activation)
        if distribution:  # as in rsl_rl outputs after the first A (std, or beta) start as a constant
            nn.init.zeros_(self.mlp[-1].weight[distribution.num_actions :])
            nn.init.constant_(self.mlp[-1].bias[distribution.num_actions :], distribution.init_bias)

    def inputs(self, obs: TensorDict) -> dict[str, Tensor]:
        """What the network reads, by the names that an exported policy gives it."""
        return {"obs": torch.cat([obs[group] for group in self.groups], dim=-1)}  # (..., O)

    def network(self, obs: Tensor) -> Tensor:
        return self.mlp(self.obs_normalizer(obs))

    def forward(self, obs: TensorDict) -> Tensor:
        return self.network(*self.inputs(obs).values())

    def update_normalization(self, obs: TensorDict):
        if isinstance(self.obs_normalizer, EmpiricalNormalization):
            self.obs_normalizer.update(self.inputs(obs)["obs"].flatten(0, -2))

    def initial_memory(self, batch_size: int) -> Tensor:
        """Of networks with memory: K tensors (L layers, B, size), as an episode starts; here none.

        `deploy` takes and gives them; where an episode ends their rows of B are set to zero.
        """
        return torch.zeros(0, 0, batch_size, 0)

    def deploy(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The policy as exported: inputs, then memory -> mean actions, then next memory."""
        return (self.distribution(self.network(*inputs)).mean,)


def choose_groups(obs: TensorDict, args: Args) -> Args:
    """Observation groups by convention where none are named; refuse what the environment does not have."""
    kinds = {1: "vectors"}  # by their number of dimensions

    def first(*names):
        return tuple(name for name in names if name in obs.keys())[:1]

    actor_obs = args.actor_obs or first("actor", "policy", "state")
    # The critic is not needed on the robot, so it may see what only a simulator knows: arXiv:1710.06542.
    critic_obs = args.critic_obs or first("critic") or actor_obs + first("privileged", "privileged_state")
    args = replace(args, actor_obs=actor_obs, critic_obs=critic_obs)
    check_groups(obs, args, kinds)
    return args


def make_actor(obs: TensorDict, num_actions: int, args: Args):
    distribution = (Beta if args.distribution == "beta" else Gaussian)(num_actions, args)
    return Model(obs, args.actor_obs, args.actor_hidden_dims, args, distribution).to(obs.device)


def make_agent(env: VecEnv, obs: TensorDict, args: Args) -> SimpleNamespace:
    """All that learns. The attributes that have a state are, in order, the parts of a checkpoint."""
    actor = make_actor(obs, env.num_actions, args)  # before the critic, as rsl_rl draws weights
    critic = Model(obs, args.critic_obs, args.critic_hidden_dims, args).to(obs.device)
    agent = SimpleNamespace(actor=actor, critic=critic)
    parameters = list(nn.ModuleList([actor, critic]).parameters())  # of a ModuleList: shared ones come once
    agent.optimizer = make_optimizer(args.optimizer, parameters, args.learning_rate, args.device)
    return agent


# ---- Rollout -----------------------------------------------------------------------------------------------


def make_storage(agent: SimpleNamespace, obs: TensorDict, num_actions: int, args: Args) -> TensorDict:
    """(T + 1, N, ...): rows 0..T-1 hold a rollout, row T holds what follows it, and starts the next.

    A column that you add reaches every mini-batch; its row T goes into checkpoints.
    """
    shape = (args.num_steps_per_env + 1, args.num_envs)

    def zeros(*size, dtype=None):
        return torch.zeros(*shape, *size, dtype=dtype, device=obs.device)

    policy = agent.actor.distribution(zeros(agent.actor.distribution.num_outputs))  # only shapes count
    kl_divergence(policy, policy)  # torch looks up its formula at the first call, which cannot be compiled
    return TensorDict(
        obs=obs.expand(*shape).contiguous(),
        actions=zeros(num_actions),
        policy={name: torch.zeros_like(x) for name, x in params_of(policy).items()},  # what acted
        log_prob=zeros(),
        values=zeros(),
        rewards=zeros(),
        bootstrap=zeros(),  # value of what follows a time-out
        dones=zeros(dtype=torch.bool),  # dones[t] follows actions[t]; at time-outs too
        episode_return=zeros(),  # of the running episode, before actions[t]
        episode_length=zeros(),
        order=zeros(dtype=torch.long),  # in which the update reads the samples
        batch_size=shape,
        device=obs.device,
    )


def params_of(policy: torch.distributions.Distribution) -> dict[str, Tensor]:
    """Mean and standard deviation, or what else torch makes the distribution from."""
    return {name: getattr(policy, name) for name in policy.arg_constraints}


@torch.no_grad()
def act(agent: SimpleNamespace, storage: TensorDict, t: int):
    """Sample actions for the observations of row t, and store what PPO needs to know of them."""
    row = storage[t].lock_()  # locked: row["x"] = ... would miss the storage; so it raises
    policy = agent.actor.distribution(agent.actor(row["obs"]))
    actions = policy.rsample()  # (N, A); sample() would make the host wait for the GPU
    write(row, actions=actions, log_prob=policy.log_prob(actions).sum(-1))
    write(row, values=agent.critic(row["obs"]).squeeze(-1))
    write(row["policy"], **params_of(policy))


@torch.no_grad()
def collect(env: VecEnv, agent: SimpleNamespace, storage: TensorDict, policy_step, args: Args):
    """Fill the storage with T steps of `policy_step`, `act` or its graph; return what there is to log."""
    rows, logs = [row.lock_() for row in storage.unbind(0)], {}
    rows[0].update_(rows[-1])  # what the last rollout ended with, at first the first observations
    for t, (row, next_row) in enumerate(zip(rows, rows[1:])):
        policy_step(agent, storage, t)
        actions = row["actions"].clone()  # the environment may keep it or write to it
        if args.clip_actions is not None:
            # Stored is what was drawn, since log_prob is of that: clamping belongs to the environment.
            actions.clamp_(-args.clip_actions, args.clip_actions)
        obs, rewards, dones, extras = take_step(env, actions)
        copy_groups(next_row["obs"], obs)  # after a done the next episode's first: it starts by itself
        write(row, rewards=rewards, dones=dones)
        write(row, bootstrap=timeout_value(agent, row, next_row, extras, args))
        goes_on = ~row["dones"]
        write(next_row, episode_return=(row["episode_return"] + row["rewards"]) * goes_on)
        write(next_row, episode_length=(row["episode_length"] + 1) * goes_on)
        note_log(logs, extras, row["rewards"])
    write(rows[-1], values=agent.critic(rows[-1]["obs"]).squeeze(-1))
    metrics = {name: torch.cat(values).mean() for name, values in logs.items()}
    return metrics | episode_metrics(storage[:-1])


def timeout_value(
    agent: SimpleNamespace, row: TensorDict, next_row: TensorDict, extras: dict, args: Args
) -> Tensor:
    """Value (N,) of the state in which a time limit cut the episode; 0 elsewhere.

    A time limit is no part of the task: the robot would have walked on and been paid for it. Without this the
    same state is worth less late in an episode, and the critic cannot know why (arXiv:1712.00378).
    V then explains 0.85 of the returns' variance on the quadruped, not 0.92, and 0.76 on cartpole, not 0.96
    (tests/benchmarks/details.py).
    """
    values = row["values"]  # where there is no final_obs: V(s_t), one step early, as rsl_rl
    if args.timeout_bootstrap == "none":
        return torch.zeros_like(values)
    if args.timeout_bootstrap == "final_obs" and extras.get("final_obs") is not None:
        # The critic's estimate at the true last state. It is asked for all N: to find out which have timed
        # out, the host would have to wait for the GPU.
        final_obs = next_row["obs"].clone()
        copy_groups(final_obs, extras["final_obs"])
        values = agent.critic(final_obs).squeeze(-1)
    # No time_outs * values: rows without a time-out may hold anything, and 0 * NaN is NaN.
    return torch.where(extras["time_outs"], values, 0.0)


def compute_gae(storage: TensorDict, args: Args) -> tuple[Tensor, Tensor]:
    """How much better it went than V said, advantages, and what V should have said, returns; (T, N) each."""
    values = storage["values"]
    rewards = storage["rewards"][:-1] + args.gamma * storage["bootstrap"][:-1]
    discount = args.gamma * ~storage["dones"][:-1]  # nothing flows back from the next episode
    # delta_t = r_t + gamma (1 - d_t) V(s_{t+1}) - V(s_t), one step's surprise     arXiv:1506.02438 eq. 10
    # A time-out's d_t is 1: its r_t has gamma * bootstrap in it.
    advantages = rewards + discount * values[1:] - values[:-1]
    # A_t = delta_t + gamma lambda (1 - d_t) A_{t+1}: later surprises count too, fading      (eq. 16)
    decay = args.lam * discount
    for t in reversed(range(args.num_steps_per_env - 1)):  # the last has no A_{t+1}
        advantages[t].add_(decay[t] * advantages[t + 1])
    returns = advantages + values[:-1]
    advantages = returns - values[:-1]  # the same number, rounded as rsl_rl does
    if not args.normalize_advantage_per_mini_batch:
        # About half of all actions become likelier, half rarer, whatever the rewards' scale or an error of V
        # that all states share. Without it the quadruped's return stays at -1, instead of 20,
        # and cartpole's at 39, instead of 248 (tests/benchmarks/details.py).
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return advantages, returns


# ---- Update ------------------------------------------------------------------------------------------------


def shuffle(storage: TensorDict, args: Args):
    """Draw the order of the samples. Not in `update`: its CUDA graph then holds nothing random."""
    size = args.num_envs * args.num_steps_per_env // args.num_mini_batches * args.num_mini_batches
    torch.randperm(size, out=storage["order"].flatten()[:size])


def make_batches(rollout: TensorDict, args: Args) -> list[TensorDict]:
    """The rollout (T, N) in the order drawn, cut into mini-batches (B, ...)."""
    size = args.num_envs * args.num_steps_per_env // args.num_mini_batches  # B
    order = rollout["order"].flatten()[: size * args.num_mini_batches]
    return list(rollout.flatten(0, 1)[order].split(size))


def ppo_loss(agent: SimpleNamespace, batch: TensorDict, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The PPO loss of one mini-batch (B, ...), and what to log of it."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.use_mixed_precision):
        output, values = agent.actor(batch["obs"]), agent.critic(batch["obs"]).squeeze(-1)
    policy = agent.actor.distribution(output.to(batch["actions"].dtype))
    log_prob = policy.log_prob(batch["actions"]).sum(-1)  # (B,)
    entropy = policy.entropy().sum(-1).mean()

    advantages = batch["advantages"]
    if args.normalize_advantage_per_mini_batch:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # L^CLIP = E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)]                   arXiv:1707.06347 eq. 7
    # Past 1 +- eps nothing more is gained: the data are of the old policy, and say little of one far from it.
    # The smaller of both: what has moved the wrong way is still pushed back.
    ratio = torch.exp(log_prob - batch["log_prob"])
    clipped = ratio.clamp(1.0 - args.clip_param, 1.0 + args.clip_param)
    surrogate_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    # The larger of two errors: V's, and that of V moved by eps at most. Where V has gone further towards the
    # return, the second is the larger one, and a constant: this sample pulls no more (others still may).
    # eps is in the returns' unit: where they are large, most samples soon stop pulling.
    value_error = (values - batch["returns"]) ** 2
    if args.use_clipped_value_loss:
        step = (values - batch["values"]).clamp(-args.clip_param, args.clip_param)
        value_error = torch.max(value_error, (batch["values"] + step - batch["returns"]) ** 2)
    value_loss = value_error.mean()

    # To be maximised: L^CLIP - c1 L^VF (value loss) + c2 S (entropy); signs turn   arXiv:1707.06347 eq. 9
    loss = surrogate_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy
    with torch.no_grad():
        old_policy = agent.actor.distribution.make(**batch["policy"].to_dict())
        kl = kl_divergence(old_policy, policy).sum(-1).mean()  # by formula, not from samples
        clip_fraction = (ratio != clipped).mean(dtype=loss.dtype)
    metrics = {"surrogate": surrogate_loss, "value": value_loss, "entropy": entropy, "kl": kl}
    return loss, {**metrics, "clip_fraction": clip_fraction, "mean_std": policy.stddev.mean()}


def backward(loss: Tensor, optimizer: torch.optim.Optimizer):
    optimizer.zero_grad()
    loss.backward()


def adapt_learning_rate(lr: Tensor, kl: Tensor, args: Args):
    """Each mini-batch: / 1.5 (down to 1e-5) if the policy has moved too far, x 1.5 (up to 1e-2) if hardly.

    How far a step moves the policy depends on the task and on the standard deviation, so that no fixed rate
    suits a whole training. As in rsl_rl a KL of exactly 0, mostly the first mini-batch's, changes nothing.
    """
    slower, faster = (lr / 1.5).clamp(min=1e-5), (lr * 1.5).clamp(max=1e-2)
    faster = torch.where((kl < args.desired_kl / 2.0) & (kl > 0.0), faster, lr)
    lr.copy_(torch.where(kl > args.desired_kl * 2.0, slower, faster))


def mini_batch_step(agent: SimpleNamespace, batch: TensorDict, args: Args) -> dict[str, Tensor]:
    """One gradient step of actor and critic together."""
    loss_fn = compiled(ppo_loss) if args.compile else ppo_loss
    loss, metrics = loss_fn(agent, batch, args)
    backward(loss, agent.optimizer)
    if args.schedule == "adaptive":
        adapt_learning_rate(agent.optimizer.param_groups[0]["lr"], metrics["kl"], args)
    # Each on its own: a large error of the critic must not shrink the actor's step.
    metrics["actor_grad_norm"] = nn.utils.clip_grad_norm_(agent.actor.parameters(), args.max_grad_norm)
    metrics["critic_grad_norm"] = nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
    agent.optimizer.step()
    return {name: value.detach() for name, value in metrics.items()}


def update(agent: SimpleNamespace, storage: TensorDict, args: Args) -> dict[str, Tensor]:
    """All epochs over one rollout. As in rsl_rl each of them reads the same mini-batches."""
    rollout, steps = storage[:-1], []
    rollout["advantages"], rollout["returns"] = compute_gae(storage, args)  # the storage does not get them
    batches = make_batches(rollout, args)
    for _ in range(args.num_learning_epochs):
        for batch in batches:
            steps.append(mini_batch_step(agent, batch, args))
    # Mean and deviation are learned after the epochs; else the update would read other numbers than the
    # policy that acted, and the first ratio would not be 1.
    agent.actor.update_normalization(rollout["obs"])
    agent.critic.update_normalization(rollout["obs"])
    stds = [step.pop("mean_std") for step in steps]
    metrics = {f"Loss/{name}": torch.stack([x[name] for x in steps]).double().mean() for name in steps[0]}
    metrics |= {"Loss/finite": all_finite(agent, storage, metrics), "Policy/mean_std": stds[-1]}
    unexplained = (rollout["returns"] - rollout["values"]).var() / rollout["returns"].var()
    metrics["Loss/explained_variance"] = 1.0 - unexplained
    metrics["Loss/learning_rate"] = agent.optimizer.param_groups[0]["lr"].clone()
    return metrics


# ---- Train -------------------------------------------------------------------------------------------------


class History(list):
    """The metrics of each iteration, {tag: number}; `agent` has been trained, `run_dir` keeps it."""


def train(args: Args, env: VecEnv | None = None) -> History:
    """Train from scratch, or from where a checkpoint ends.

    Args:
        args: all settings.
        env: an environment of yours, which stays open; left out, `args.env` is made.

    Raises:
        UserError: a setting, a checkpoint or the environment does not fit.
        FloatingPointError: something is not finite; the run ends with the last good checkpoint.
    """
    check_args(args)
    args = set_up_torch(args)
    own = None if env else make_env(args)
    env = as_vec_env(env or own)
    obs = env.get_observations()
    args = choose_groups(obs, replace(args, num_envs=int(env.num_envs)))
    check_args(args)  # again, with the environment's own size
    obs = read_obs(obs, args)
    agent = make_agent(env, obs, args)
    check_learned(agent)
    if args.init_at_random_ep_len:  # else all environments time out in the same step, again and again
        draw_episode_lengths(env)
    storage = make_storage(agent, read_obs(env.get_observations(), args), env.num_actions, args)
    start = load(agent, env, storage, args)
    run_dir = make_run_dir(args, env)
    writer = make_writer(args, run_dir)
    collect_step, policy_step, update_step = graphed(args, env, collect, act, update)
    samples = args.num_envs * args.num_steps_per_env  # per iteration

    history = History()
    history.agent, history.run_dir = agent, run_dir
    with keep_run(env, storage, run_dir, args, own, writer) as run:
        for iteration in range(start, args.max_iterations):
            run.done, run.state = iteration - 1, deepcopy(state_of(agent))  # kept if this iteration fails
            times = [now(args)]
            metrics = collect_step(env, agent, storage, policy_step, args)
            times.append(now(args))
            shuffle(storage, args)
            metrics |= update_step(agent, storage, args)
            times.append(now(args))
            metrics = to_host(metrics)  # the iteration's only wait for the device
            if metrics.pop("Loss/finite") < 1.0:
                raise FloatingPointError(describe_nan(iteration, storage, run_dir))
            history.append(log_iteration(agent, metrics, times, samples, iteration, args, writer))
            last = bool(run.stop) or iteration == args.max_iterations - 1
            for name in due(history, iteration, last, args):
                save(run_dir / f"model_{name}.pt", state_of(agent), env, storage, iteration, args)
            if run_dir and args.video_interval and (last or iteration % args.video_interval == 0):
                attempt(film, agent, run_dir / f"video_{iteration}", args)
            if last:
                break
    if run_dir:
        attempt(export_checkpoint, run_dir / f"model_{iteration}.pt", args)
    return history


# ==== Below: bookkeeping, the same in every script. Skip it at first reading. ===============================


class UserError(ValueError):
    """What the user can mend: the message names the flag, its value and what would be right."""


def wrong(args, name, why):
    return UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {why}")


def first_line(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextlib.contextmanager
def blaming(fault):
    """Whatever goes wrong in here is this fault, and said in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        shown = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{fault} ({shown})") from error


def check_settings(args):
    """What holds in every script, for the command line and from Python."""
    # Counts, sizes, rates and limits: at 0 nothing would be done, or all be cut off.
    positive = (
        r"(\w+_)?num_|max_|save_|play_|.*_dim|.*_rate$|rank_|gradient_|clip_|desired_|init_std|.*_temperature"
    )
    for name, kind in get_type_hints(Args).items():
        value = getattr(args, name)
        low = 0 if re.match(positive, name) else -math.inf
        for x in value.values() if isinstance(value, dict) else [value]:
            if get_origin(kind) is Literal and x not in get_args(kind):
                raise wrong(args, name, f"choose from {', '.join(get_args(kind))}")
            if kind in (bool, int, float) and type(x) not in ((kind, int) if kind is float else (kind,)):
                raise wrong(args, name, f"must be {kind.__name__}, not {type(x).__name__}")
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if type(x) not in (str, bool, int, float, dict, type(None)):
                raise wrong(args, name, f"a checkpoint cannot hold a {type(x).__name__}")
            if isinstance(x, (int, float)) and not low < x < math.inf:
                raise wrong(args, name, "must be finite" if low else "must be greater than 0, and finite")
            if re.fullmatch("gamma|lam|beta|.*_decay", name) and not 0.0 <= x <= 1.0:
                raise wrong(args, name, "must lie between 0 and 1")
            if re.search("loss_coef|_weight$|^seed", name) and x < 0:
                raise wrong(args, name, "must not be negative")
    if args.action_range[0] >= args.action_range[1]:
        raise wrong(args, "action_range", "the first number must be the smaller one")
    if args.logger not in ("tensorboard", "wandb", "none"):
        find(args, "logger")


def of_network(args, network):
    """The settings of the actor or the critic, where they differ: dict(actor=..., critic=...)."""
    values = {name: x[network] for name, x in vars(args).items() if isinstance(x, dict) and network in x}
    return replace(args, **values)


def check_groups(obs, args, kinds):
    """Refuse groups that are not there, or not of these kinds: names by the number of dimensions."""
    shapes = {group: tuple(x.shape[1:]) for group, x in obs.items()}
    for name, groups in vars(args).items():
        if name.endswith("_obs"):
            if not groups or any(len(shapes.get(group, ())) not in kinds for group in groups):
                raise wrong(args, name, f"must name {' or '.join(kinds.values())}, out of {shapes}")
            print(f"{name}: {', '.join(f'{group} {shapes[group]}' for group in groups)}")


# ---- Device ------------------------------------------------------------------------------------------------


def set_up_torch(args):
    """Device, seed, precision; returns the settings with the device that `auto` means."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise wrong(args, "device", f"not available here ({first_line(error)})") from error
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(args.seed % 2**32)  # numpy's range
    precision = args.float32_matmul_precision if device.startswith("cuda") else "highest"
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # convolutions and RNNs
    return replace(args, device=device)


def by_name(module, name):
    """torch's class of this name, whatever its case: elu in torch.nn, adamw in torch.optim."""
    return {key.lower(): value for key, value in vars(module).items()}[name]


def make_optimizer(name, parameters, learning_rate, device):
    """torch's, its learning rate a tensor: a CUDA graph sees it change. On a CPU it rounds as rsl_rl's."""
    on_gpu = device.startswith("cuda")
    lr = torch.tensor(learning_rate, dtype=torch.float32 if on_gpu else torch.float64, device=device)
    options = {} if name == "sgd" else {"capturable": on_gpu}
    return by_name(torch.optim, name)(parameters, lr=lr, fused=on_gpu, **options)


def models_of(agent):
    return nn.ModuleDict({name: x for name, x in vars(agent).items() if isinstance(x, nn.Module)})


def check_learned(agent):
    """Refuse a parameter that no optimizer has: it would stay as it was drawn, and nobody would notice."""
    groups = [group for part in vars(agent).values() for group in getattr(part, "param_groups", ())]
    learned = {x for group in groups for x in group["params"]}
    for name, x in models_of(agent).named_parameters():
        if x.requires_grad and x not in learned:
            raise UserError(f"agent.{name} is in no optimizer; if so meant, requires_grad_(False)")


@functools.cache
def compiled(fn):
    return torch.compile(fn, dynamic=False)


def graphed(args, env, collect, act, update):
    """On CUDA: graphs of the update and of the policy step, or of the whole rollout where the environment's
    class says that it is `capturable` (not its base: a subclass may keep state that a graph does not see)."""
    if not (args.cuda_graphs and args.device.startswith("cuda")):
        return collect, act, update
    pool = torch.cuda.graph_pool_handle()  # one memory for all, since they run one after the other
    if vars(type(env)).get("capturable"):
        return Graphed(collect, pool), act, Graphed(update, pool)
    return collect, Graphed(act, pool), Graphed(update, pool)


class Graphed:
    """fn; from its fourth call with the same arguments on, all its kernels are one launch. Before, the first
    call makes what stays (moments, cuDNN's plans, what is compiled), and the next two are watched.

    A graph knows memory and numbers as they were at its recording: write in place, and keep what changes in
    tensors. Other objects, settings or numbers are other arguments. The next call overwrites the result.
    """

    def __init__(self, fn, pool):
        self.fn, self.pool, self.calls, self.graphs, self.faults = fn, pool, Counter(), {}, []
        self.numbers = {}

    def __call__(self, *arguments):
        parts = [part for x in arguments if isinstance(x, SimpleNamespace) for part in vars(x).values()]
        objects = [*arguments, *parts]
        # As text, since settings may hold a dict. A tensor counts as the same while it is the same object.
        key = hash(str([x if isinstance(x, (Args, int, float)) else id(x) for x in objects]))
        self.calls[key] += 1
        calls = self.calls[key]
        if calls == 1 or self.faults:
            return self.fn(*arguments)
        if calls < 4:
            return self.rehearse(key, *arguments)
        if calls == 4:
            self.graphs[key] = *self.record(*arguments), objects  # while they live, no other has their id
        graph, result, _ = self.graphs[key]
        graph.replay()
        return result

    def rehearse(self, key, *arguments):
        """Run, and note what a graph would freeze, and what waits for the device: that would make a recording
        fail, after which torch could not go on."""

        def note(message, *_):
            if "called a synchronizing" in str(message):  # [:-2]: without `warnings` and this line
                self.faults.append(f"{place(traceback.extract_stack()[:-2])} waits for the device")

        numbers = Numbers(self.numbers.get(key, ()))
        # What is compiled runs as it is written: torch would take `numbers` for a reason to give up on it.
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), numbers:
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return self.fn(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                self.numbers[key] = numbers.seen
                self.faults += numbers.changed
                if self.faults:
                    print(f"{self.fn.__name__} is no CUDA graph: {self.faults[0]}")

    def record(self, *arguments):
        graph = torch.cuda.CUDAGraph()
        for x in arguments:
            if hasattr(x, "generator"):  # of an environment; torch's own is known
                graph.register_generator_state(x.generator)
        try:
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                return graph, self.fn(*arguments)
        except RuntimeError as error:
            cause = error.__context__ or error  # it fails at its end; what went wrong came before
            where = f"{place(traceback.extract_tb(cause.__traceback__))} ({first_line(cause)})"
            raise UserError(f"--cuda-graphs: stopped by {where}; use --no-cuda-graphs") from cause


class Numbers(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the numbers that each kernel is called with, and where one is not as `before`."""

    host = "cpu"  # a scalar that lives here is passed to the device's kernels by its value

    def __init__(self, before):
        super().__init__()
        self.before, self.seen, self.changed = iter(before), [], []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        scalars = [
            x.item() for x in values if isinstance(x, Tensor) and x.device.type == self.host and not x.dim()
        ]
        self.seen.append(str([x for x in values if isinstance(x, (int, float))] + scalars))
        if next(self.before, self.seen[-1]) != self.seen[-1] and not self.changed:
            line = place(traceback.extract_stack())
            self.changed.append(f"{line} has another number in each call; keep it in a tensor on the device")
        return kernel(*args, **kwargs)


def place(frames):
    """The innermost line that is not in a package."""
    own = [x for x in frames if "site-packages" not in x.filename and x.name != "__torch_dispatch__"]
    return f"{own[-1].filename}:{own[-1].lineno}"


def all_finite(agent, storage, metrics):
    """Whether everything that was read, computed and learned is finite; on the device."""
    columns = storage.values(include_nested=True, leaves_only=True)
    tensors = [*columns, *models_of(agent).state_dict().values(), *metrics.values()]
    return torch.stack([x.sum().double() for x in tensors]).isfinite().all()


def to_host(metrics):
    """All numbers of an iteration at once: its only wait for the device."""
    for name, x in metrics.items():
        shape = getattr(x, "shape", x)
        if "/" not in name or shape != torch.Size():
            raise UserError(f"metric {name} is {shape}: must be a 0-d tensor, and its name like Train/x")
    return dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist()))


def now(args):
    """The time, by the device's own clock: read after `to_host`, so that nothing waits for it."""
    if not args.device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000.0


# ---- Environment -------------------------------------------------------------------------------------------


def make_env(args, **options):
    """Your `package.module:factory`, called with what it has parameters for; else one of envs/."""
    settings = {name: getattr(args, name) for name in ("num_envs", "device", "seed", "compile")} | options
    cfg = env_options(args)
    if factory := own_factory(args):
        signature = inspect.signature(factory)
        wanted = signature.parameters
        unknown = [name for name in cfg if name not in wanted]
        if unknown and "**" not in str(signature):
            raise wrong(args, "env_cfg", f"{args.env} has no parameter {unknown[0]}, but {', '.join(wanted)}")
        return factory(**{name: value for name, value in settings.items() if name in wanted} | cfg)
    with blaming(f"--env {args.env}: is one of envs/, which is not beside this script"):
        from envs import make

    try:
        return make(args.env, cfg=cfg, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def own_factory(args):
    """The function that --env names as package.module:name, or None: then it is one of envs/."""
    module, _, name = args.env.partition(":")
    simulators = ("mjlab", "gym", "envpool", "playground", "genesis", "isaaclab", "maniskill")
    return find(args, "env") if name and module not in simulators else None


def env_options(args):
    """--env-cfg as names and values, which are written as in YAML."""
    if not args.env_cfg:
        return {}
    import yaml

    with blaming(f"--env-cfg {' '.join(args.env_cfg)}: must be name=value, where the value is YAML"):
        return {name: yaml.safe_load(value) for name, value in (x.split("=", 1) for x in args.env_cfg)}


def bounds_of(env, args):
    """Between which the actions that reach the task lie: clip_actions, and what the environment clips to."""
    low, high = getattr(env, "action_bounds", (-math.inf, math.inf))
    limit = args.clip_actions or math.inf
    return max(low, -limit), min(high, limit)


def find(args, name):
    """What a flag's `package.module:name` names, looked for in the working directory too."""
    sys.path.append(os.getcwd())
    try:
        return pkgutil.resolve_name(getattr(args, name))
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        if str(getattr(error, "name", "")) not in getattr(args, name):  # a mistake in the module itself
            raise
        raise wrong(args, name, f"cannot be imported as package.module:name ({error})") from error


def as_vec_env(env):
    """The environment, if it keeps to envs/vec_env.py; that of an older rsl_rl in today's words."""
    for name in ("num_envs", "num_actions", "max_episode_length", "episode_length_buf", "device", "step"):
        if not hasattr(env, name):
            raise UserError(
                f"{type(env).__name__} has no {name}; envs/vec_env.py tells what an environment needs"
            )
    if env.num_actions < 1 or env.episode_length_buf.is_floating_point():
        raise UserError(
            f"{type(env).__name__}: num_actions must be at least 1, episode_length_buf of integers"
        )
    if hasattr(env.get_observations(), "keys"):
        return env
    try:
        from envs.legacy import Legacy
    except ImportError as error:
        raise UserError(f"{type(env).__name__} is of rsl_rl 1 or 2; envs/legacy.py translates it") from error
    return Legacy(env)


def draw_episode_lengths(env):
    """As if each environment were somewhere in its episode already, if episodes have a time limit."""
    if env.max_episode_length < math.inf:
        env.episode_length_buf = torch.randint_like(env.episode_length_buf, int(env.max_episode_length))


def take_step(env, actions):
    """Step the environment. Wrappers return arrays for tensors, and None where they have nothing to tell."""
    result = env.step(actions.to(env.device))
    with blaming("env.step must return observations, rewards, dones, extras: envs/vec_env.py"):
        obs, rewards, dones, extras = result
        rewards, dones, extras = torch.as_tensor(rewards), torch.as_tensor(dones), dict(extras or {})
        if dones.is_floating_point():
            rewards = rewards + 0.0 * dones  # bool(NaN) is True, but NaN is no done: the run ends by it
        time_outs = extras.get("time_outs")
        time_outs = torch.zeros_like(dones) if time_outs is None else torch.as_tensor(time_outs)
        extras["time_outs"] = time_outs.to(actions.device).bool().view(len(actions))
        return obs, rewards, dones, extras


def read_obs(obs, args):
    """The groups that some network reads, `*_obs`: images as they are, the rest in the networks' dtype."""
    groups = [group for name, groups in vars(args).items() if name.endswith("_obs") for group in groups]
    with blaming(f"get_observations() must return groups of {args.num_envs} rows"):
        obs = TensorDict({group: obs[group] for group in groups}, [args.num_envs], device=args.device)
    return obs.apply(lambda x: x if x.dim() == 4 else x.to(torch.get_default_dtype()))


def write(row, **values):
    """In place: a captured graph sees this memory alone, and a simulator may reuse its own.

    Shapes are compared, since copy_ would spread a scalar or a column over all; (N, 1) is taken for (N,).
    """
    for name, x in values.items():
        x, stored = torch.as_tensor(x), row[name]
        if x.shape not in (stored.shape, (*stored.shape, 1)):
            raise UserError(f"{name} has the shape {tuple(x.shape)}, must have {tuple(stored.shape)}")
        stored.copy_(x.view(stored.shape))


def copy_groups(stored, obs):
    with blaming(f"observations must keep the groups {list(stored.keys())}"):
        write(stored, **{group: obs[group] for group in stored.keys()})


def note_log(logs, extras, like):
    """Collect what the environment logs, without waiting for it."""
    for name, value in (extras.get("episode") or extras.get("log") or {}).items():
        if isinstance(value, (int, float)):  # by a kernel: torch.as_tensor would copy it, and wait
            value = like.new_full((1,), value)
        with blaming(f"extras: what is logged as {name} must be a number or a tensor"):
            value = torch.as_tensor(value).to(like, copy=True).flatten()
        logs.setdefault(name if "/" in name else f"Episode/{name}", []).append(value)


def episode_metrics(rollout):
    """Means over ALL episodes that ended in this rollout (T, N); NaN where none did."""
    ended, count = rollout["dones"], rollout["dones"].sum()
    returns = (rollout["episode_return"] + rollout["rewards"]) * ended
    lengths = (rollout["episode_length"] + 1) * ended
    means = {"Train/mean_reward": returns.sum() / count, "Train/mean_episode_length": lengths.sum() / count}
    return means | {"Train/num_episodes": count}


# ---- Runs --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_run(env, storage, run_dir, args, *to_close):
    """Ctrl-C and SIGTERM end the training after its iteration (`stop`); an error saves what is `done`."""
    run, handlers = SimpleNamespace(stop=[], done=-1, state={}), {}

    def stop(number, _):
        if run.stop:
            raise KeyboardInterrupt
        run.stop.append(number)
        print("finishing this iteration, then saving; once more to stop now", file=sys.stderr)

    with contextlib.suppress(ValueError):  # in another thread than the main one signals are not ours
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, stop)
    try:
        yield run
    except BaseException:
        path = run_dir and run_dir / f"model_{run.done}.pt"
        if path and run.done >= 0 and not path.exists():  # without the environment, which is further on
            save(path, run.state, env, storage, run.done, args, whole=False)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        close(*to_close)


def parts_of(agent):
    """What a checkpoint holds of the agent, in this order: tensors, and whatever has a state."""
    return {name: x for name, x in vars(agent).items() if isinstance(x, Tensor) or hasattr(x, "state_dict")}


def state_of(agent):
    parts = parts_of(agent).items()
    state = {f"{name}_state_dict": x if isinstance(x, Tensor) else x.state_dict() for name, x in parts}
    return state | {"env_steps": agent.count["env_steps"]}


def describe_nan(iteration, storage, run_dir):
    """Dump the rollout, and name the first that was not finite: what came later may only follow from it."""
    columns = [(name, x) for name, x in storage.flatten_keys(" ").items() if x.numel()]
    size, name = max((x.double().abs().max().item(), name) for name, x in columns)
    found = [
        (math.inf, f"all that was read is finite, but not what came of it; largest: {size:.3g} in {name}")
    ]
    for name, x in columns:
        for step, index, *column in (~x.isfinite()).nonzero()[:1].tolist():
            value = x[(step, index, *column)]
            found.append((step, f"{name} of environment {index}, column {column}, is {value} at step {step}"))
    message = f"iteration {iteration}: {min(found, key=lambda x: x[0])[1]}"
    if run_dir:
        path = run_dir / f"nan_{iteration}.pt"
        attempt(torch.save, storage.to_dict(), path)
        message += f"; the rollout is in {path}"
    return message


def log_iteration(agent, metrics, times, samples, iteration, args, writer):
    """Everything to the writer and, a line for each kind, to the console."""
    agent.count["env_steps"] += samples
    collection, learning = (seconds_between(*pair) for pair in zip(times, times[1:]))
    metrics |= {"Perf/collection_time": collection, "Perf/learning_time": learning}
    metrics["Perf/total_fps"] = samples / (collection + learning)
    eta = timedelta(seconds=round((args.max_iterations - iteration - 1) * (collection + learning)))
    lines = {}
    print(f"\niteration {iteration}/{args.max_iterations}  {agent.count['env_steps']:,} env steps  ETA {eta}")
    if metrics["Train/mean_episode_length"] == 1.0:
        say("each episode has lasted one step: does env.step start anew where it says done?")
    for tag, value in metrics.items():
        kind, name = tag.split("/", 1)
        lines[kind] = lines.get(kind, f"  {kind:8s}") + f" {name} {value:.4g} "
        if writer and not math.isnan(value):  # no episode ended
            attempt(writer.add_scalar, tag, value, iteration)
    print(*lines.values(), sep="\n", flush=True)
    return metrics


SCRIPT = Path(globals().get("__file__", "notebook"))  # a notebook has no __file__


def experiment_dir(args):
    name = f"{SCRIPT.stem}_{re.sub(r'[^A-Za-z0-9-]+', '_', args.env)}"
    return Path(args.log_root or "logs").absolute() / (args.experiment_name or name)


def make_run_dir(args, env):
    """The run's folder, named by the time (UTC), with all that is needed to repeat it."""
    if not args.log_root:
        return None
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d_%H-%M-%S-%f")
    run_dir = experiment_dir(args) / re.sub(r"[^\w.-]+", "_", f"{stamp}_{args.run_name}")[:200].strip("_")
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        if not run_dir.exists():  # a link that leads nowhere
            raise
        return make_run_dir(args, env)  # another run has started in the same microsecond
    for name, value in (("args", asdict(args)), ("env", getattr(env, "cfg", None))):
        (run_dir / f"{name}.txt").write_text(pprint.pformat(value, sort_dicts=False))
    if SCRIPT.is_file():
        shutil.copy(SCRIPT, run_dir)
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false"]

    def git(*words):
        return subprocess.run([*command, *words], capture_output=True, cwd=SCRIPT.parent, timeout=10).stdout

    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        # Nothing that a repository's configuration names is run.
        for name in git("config", "--name-only", "--get-regexp", "^filter").decode().splitlines():
            command += ["-c", f"{name}="]
        changes = git("diff", "--no-ext-diff", "--no-textconv", "--ignore-submodules", "HEAD")
        (run_dir / "git.diff").write_bytes(git("rev-parse", "HEAD") + changes)
    attempt(write_metadata, run_dir, env)
    print(f"this run is kept in {run_dir}")
    return run_dir


def write_metadata(run_dir, env):
    """What a robot's runner needs to know of the environment: travels with the exported policy."""
    facts = {"step_dt": float(env.step_dt)} if hasattr(env, "step_dt") else {}  # s
    facts |= env.export_metadata() if hasattr(env, "export_metadata") else {}
    (run_dir / "deploy.json").write_text(json.dumps(facts))


def due(history, iteration, last, args):
    """Names of the checkpoints to save now: the iteration's number, `best`."""
    if not args.log_root:
        return []
    names = [iteration] if last or iteration % args.save_interval == 0 else []
    if args.save_best:
        if args.save_best not in history[0]:
            raise wrong(args, "save_best", f"no such metric; there are {', '.join(history[0])}")
        *before, value = (metrics.get(args.save_best, math.nan) for metrics in history)
        if value == value and not any(x > value for x in before):
            names.append("best")
    return names


def make_writer(args, run_dir):
    """An object with add_scalar(tag, value, iteration), or None."""
    if not run_dir or args.logger == "none":
        return None
    if args.logger not in ("tensorboard", "wandb"):
        return find(args, "logger")(str(run_dir))
    if args.logger == "wandb":
        import wandb

        # Not in the run's folder: there W&B would find its own copy of TensorBoard's file, and log it too.
        settings = dict(name=run_dir.name, dir=run_dir.parent, config=asdict(args), sync_tensorboard=True)
        if args.resume:  # goes on as the same run
            settings["id"] = read_checkpoint(find_checkpoint(args))["resume"].get("wandb")
        wandb.init(project=run_dir.parent.name, reinit="finish_previous", resume="allow", **settings)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(run_dir), flush_secs=10)


def close(*things):
    for thing in things:
        if hasattr(thing, "close"):
            attempt(thing.close)


def save(path, state, env, storage, iteration, args, whole=True):
    """Write rsl_rl's format, and under `resume` the rest; atomically, so that a kill leaves no half file."""
    resume = {
        "args": asdict(args),
        "obs": storage["obs"][-1, :1].to_dict(),  # an example, for what the networks are built to read
        "num_actions": env.num_actions,
        "action_bounds": bounds_of(env, args),
        "row": storage.exclude("obs")[-1].to_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if storage.is_cuda else None,
        "started": path.parent.name,  # the folder may be renamed
        "wandb": sys.modules["wandb"].run.id if args.logger == "wandb" else None,
    }
    # mjlab: its runner looks here for how far the curricula have come.
    infos = {"env_state": env.state_dict()} if whole and hasattr(env, "state_dict") else None
    partial = path.with_suffix(".partial")
    try:
        torch.save(state | {"iter": iteration, "infos": infos, "resume": resume}, partial)
        os.replace(partial, path)
        attempt(upload, path, args)
    except (OSError, RuntimeError) as error:  # a full disk costs this checkpoint, not the run
        print(f"not saved: {path} ({first_line(error)})")
    finally:
        partial.unlink(missing_ok=True)


def upload(path, args):
    if args.logger == "wandb":
        import wandb

        wandb.save(str(path), base_path=str(path.parent), policy="now")


def find_checkpoint(args):
    """The file that --checkpoint (path, folder, glob) names, here or in --wandb-run-path; else the newest."""
    folder, pattern = experiment_dir(args), args.checkpoint or "model_*.pt"
    paths = glob.glob(args.checkpoint) or folder.glob(f"*/{pattern}")
    if args.wandb_run_path:
        with blaming(f"--wandb-run-path {args.wandb_run_path}: cannot be read"):
            import wandb

            run = wandb.Api().run(args.wandb_run_path)
            files = [file for file in run.files() if Path(file.name).match(pattern) and "/" not in file.name]
        folder = folder / "wandb" / re.sub(r"\W", "_", run.id)
        last = sorted(files, key=lambda file: int("0" + re.sub(r"\D", "", file.name)))[-1:]
        paths = [file.download(root=str(folder), replace=True).name for file in last]
    files = [file for path in paths for file in checkpoints_in(path)]
    files = files if len(files) == 1 else sorted(files, key=age, reverse=True)
    if not files:
        raise wrong(args, "checkpoint", f"no such file, neither here nor in a run of {folder}")
    if args.resume and not args.checkpoint:  # one's own run: seeds may share a folder
        own = [file for file in files if not differences(file, args)]
        if not own:
            there = differences(files[0], args)
            raise wrong(args, "resume", f"the newest run, {files[0]}, has {there}; --checkpoint takes any")
        return own[0]
    return files[0]


def checkpoints_in(path):
    """The file, or those of a run's or an experiment's folder."""
    path = Path(path)
    files = [*path.glob("model_*.pt"), *path.glob("*/model_*.pt")]
    return [path] if path.is_file() else [file for file in files if "rank_" not in file.parent.name]


def age(path):
    """Sorts checkpoints, by their run's start and iteration as they say: folders are copied and renamed."""
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        say(f"passed over: {error}")
        return "", -1
    return checkpoint["resume"].get("started", path.parent.name), checkpoint["iter"]


def differences(path, args):
    """The first settings in which a run differs from these, of all that change what is learned."""
    # Those of `idle` may differ. () was left to the script, which has filled it in in the checkpoint.
    idle = r"max_iter|device|num_envs|log|run_name|.*_interval|compile|cuda_graphs|env_defaults|rank_"
    idle += r"|resume|(critic_)?checkpoint|save_best|film|wandb|play|export|agent|viewer|terminations"
    try:
        there, here = read_checkpoint(path)["resume"]["args"], vars(args)
    except UserError as error:
        return str(error)
    names = [x for x in {**here, **there} if not re.match(idle, x) and here.get(x) not in (there.get(x), ())]
    return ", ".join(f"{x} {there.get(x)} (here {here.get(x)})" for x in names[:3])


def read_checkpoint(path, device=None):
    """A checkpoint, ours or rsl_rl's, with the policy as `actor`. Weights only: others' could run code.

    Without a device to have it on, its tensors stay in the file.
    """
    with blaming(f"--checkpoint {path}: is no whole checkpoint"):
        where = dict(map_location=device or "cpu", mmap=not device)
        checkpoint = torch.load(path, weights_only=True, **where)
        if "resume" not in checkpoint:  # rsl_rl's; before its version 5 it had other names
            with contextlib.suppress(ImportError):
                from envs.legacy import translate

                checkpoint = translate(checkpoint)
        checkpoint = {"iter": 0, "infos": None, "resume": {"args": {}, "row": {}}} | checkpoint
        _ = checkpoint["iter"] + 1, {**checkpoint["resume"]["args"]}  # fails unless a number and a dict
        policy = checkpoint.get("student_state_dict") or checkpoint["actor_state_dict"]
    return checkpoint | {"actor_state_dict": policy}


def restore(part, checkpoint, name, path):
    with blaming(f"--checkpoint {path}: {name} differs"):
        state = checkpoint[f"{name}_state_dict"]
        if isinstance(part, Tensor):
            return write({name: part}, **{name: state})
        for own, group in zip(getattr(part, "param_groups", ()), state.get("param_groups", ())):
            own["lr"].fill_(float(group["lr"]))  # rsl_rl saves a float
            group.update(own, params=group["params"])  # the rest, `fused` and so on, is this device's
        part.load_state_dict(state)
        moments = getattr(part, "state", {})  # of an optimizer, which does not look
        names = {key for its in moments.values() for key in its}
        for parameter, its in moments.items():
            [its[key].expand_as(parameter) for key in names]


def load(agent, env, storage, args):
    """Continue a run (--resume) or start from a policy (--checkpoint); returns the first iteration to do."""
    agent.count = Counter()  # of all runs that this one continues
    low, high = bounds_of(env, args)
    if args.distribution == "beta" and not low <= args.action_range[0] < args.action_range[1] <= high:
        raise wrong(args, "action_range", f"the environment's actions lie between {low} and {high}")
    critic = getattr(args, "critic_checkpoint", "")
    if critic and not args.resume:
        print(f"starting from the critic of {critic}")
        restore(agent.critic, read_checkpoint(critic, args.device), "critic", critic)
    if not (args.resume or args.checkpoint or args.wandb_run_path):
        return 0
    path = find_checkpoint(args)
    checkpoint = read_checkpoint(path, args.device)
    resume, start = checkpoint["resume"], checkpoint["iter"] + 1
    for name, value in resume["args"].items():  # what does not always show in the tensors
        network = re.match("activation|distribution|std_type|action_range|cnn_|rnn_", name)
        if network and value != getattr(args, name, value):
            raise wrong(args, name, f"{path} was trained with {value}")
    if not args.resume:
        print(f"starting from the policy of {path}")
        policy, *_ = vars(agent).values()  # what acts comes first
        restore(policy, checkpoint, "actor", path)
        return 0
    if start >= args.max_iterations:
        raise wrong(args, "max_iterations", f"{path} has finished {start} already")
    print(f"resuming {path} after its {start} iterations")
    if resume["args"] and (there := differences(path, args)):
        print(f"that run has {there}")
    steps = checkpoint.get("env_steps", start * args.num_envs * args.num_steps_per_env)  # rsl_rl does not say
    with blaming(f"--checkpoint {path}: env_steps {steps} is no number"):
        agent.count["env_steps"] = int(steps)
    for name, part in parts_of(agent).items():
        if resume["args"] or f"{name}_state_dict" in checkpoint:
            restore(part, checkpoint, name, path)
        else:
            print(f"{name} starts afresh: rsl_rl has saved none, or in another order")
    with blaming(f"--checkpoint {path}: its run cannot be continued"):
        same = all(resume["args"].get(name) == getattr(args, name) for name in ("seed", "num_envs"))
        same &= resume["row"].keys() == storage.exclude("obs").keys()  # else a column of yours is new
        if same:
            torch.set_rng_state(resume["rng"].cpu())
            if storage.is_cuda and resume["cuda_rng"] is not None:
                torch.cuda.set_rng_state(resume["cuda_rng"].cpu())
        state = (checkpoint["infos"] or {}).get("env_state") or {}
        # A curriculum, which mjlab and Isaac Lab follow by a counter, goes on whatever else has changed.
        fits = same or not resume["args"] or state.keys() == {"common_step_counter"}
        whole = state and fits and hasattr(env, "load_state_dict") and env.load_state_dict(state) is not False
        if same and whole:
            storage[-1].update_(resume["row"])
            copy_groups(storage["obs"][-1], env.get_observations())
            return start
    print("the environment starts afresh: its state is not in the checkpoint, or not all of it")
    return start


# ---- Deploy ------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """The policy without noise, with its memory, if it has one: it is played, and traced it is policy.pt."""

    def __init__(self, actor, batch_size=1, bounds=(-math.inf, math.inf)):
        super().__init__()
        self.actor, self.bounds = actor, bounds
        self.register_buffer("memory", actor.initial_memory(batch_size).to(actor.example.device))

    def step(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs, then memory -> actions as they would reach the task, then next memory."""
        actions, *memory = self.actor.deploy(*inputs)
        return actions.clamp(*self.bounds) if max(self.bounds) < math.inf else actions, *memory

    def forward(self, *inputs: Tensor) -> Tensor:
        actions, *memory = self.step(*inputs, *self.memory.unbind())
        if memory:
            self.memory.copy_(torch.stack(memory).detach())
        return actions

    @torch.jit.export
    def reset(self, dones: Tensor | None = None):
        """A new episode where dones (B,) is set, or everywhere."""
        if dones is None:
            self.memory.zero_()
        else:
            self.memory.masked_fill_(dones.to(torch.bool).unsqueeze(-1), 0.0)

    @torch.no_grad()
    def act(self, obs: TensorDict) -> Tensor:
        """Observation groups (B, ...) -> actions (B, A)."""
        example, device = self.actor.example, self.memory.device
        obs = {group: torch.as_tensor(obs[group]).to(device, x.dtype) for group, x in example.items()}
        return self(*self.actor.inputs(obs).values())


def load_policy(path, args=None, env=None, batch_size=1):
    """A checkpoint's policy, on the CPU. rsl_rl's hold weights only: give settings and environment too."""
    checkpoint = read_checkpoint(path, "cpu")
    resume, state = checkpoint["resume"], checkpoint["actor_state_dict"]
    if resume["args"]:
        args = Args(**{name: value for name, value in resume["args"].items() if hasattr(Args, name)})
        with blaming(f"--checkpoint {path}: does not tell what its policy reads"):
            obs, num_actions = TensorDict(resume["obs"], [1]), resume["num_actions"]
    elif args is None:
        raise UserError(f"--checkpoint {path}: holds weights only; load_policy(path, args)")
    else:
        env = env or make_env(args)
        layers = tuple(len(x) for name, x in state.items() if re.fullmatch(r"mlp\.\d+\.weight", name))
        hidden_dims = next(name for name in vars(args) if name.endswith("hidden_dims"))
        args = replace(args, device="cpu", num_envs=env.num_envs, **{hidden_dims: layers[:-1]})
        obs, num_actions = env.get_observations(), env.num_actions
        args = choose_groups(obs, args)
        obs = read_obs(obs, args)
    with blaming(f"--checkpoint {path}: its policy cannot be built"):
        actor = make_actor(obs, num_actions, args)
        low, high = map(float, resume.get("action_bounds") or bounds_of(env, args))
    restore(actor, checkpoint, "actor", path)
    return Policy(actor.eval(), batch_size, (low, high))


def export_checkpoint(path, args):
    """Its policy as ONNX and TorchScript, with what a runner has to know of it (policy.yaml has it too)."""
    policy, run_dir = load_policy(path, args), path.parent
    example, facts = policy.actor.example, {"iteration": read_checkpoint(path)["iter"], "script": SCRIPT.name}
    facts["observation_groups"] = list(example.keys())
    facts["observation_shapes"] = ["x".join(map(str, x.shape[1:])) for x in example.values()]
    facts["distribution"] = type(policy.actor.distribution).__name__
    if max(policy.bounds) < math.inf:
        facts["action_bounds"] = list(policy.bounds)
    with contextlib.suppress(OSError):  # a checkpoint that stands alone
        facts["git_commit"] = (run_dir / "git.diff").read_text(errors="replace").partition("\n")[0]
        facts |= json.loads((run_dir / "deploy.json").read_text())
    export_policy(policy, run_dir / "exported", facts, args.export_batch)


def export_policy(policy, folder, facts=None, any_batch=False):
    """Write policy.pt (TorchScript, memory inside) and policy.onnx (memory outside), normaliser in both.

    An actor alone will do. Lists among the facts are written as C++ runners split them, at commas.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    policy = Policy(deepcopy(policy.actor).cpu().eval(), 1, policy.bounds)
    actor, size, shapes, facts = policy.actor, 1, None, facts or {}
    inputs = actor.inputs(actor.example.cpu())
    same = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-4)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(policy, tuple(inputs.values()))
        script.reset()  # tracing has run it
        script.save(folder / "policy.pt")
        same(script(*inputs.values()), policy.step(*inputs.values(), *actor.initial_memory(1))[0])
        if any_batch:
            size, batch = 2, torch.export.Dim("batch")  # torch takes a size of 1 for a constant
            inputs = actor.inputs(actor.example.cpu().expand(size))
            shapes = ((*({0: batch} for _ in inputs), *({1: batch} for _ in policy.memory)),)
        memory = actor.initial_memory(size).unbind()
        before, after = ([f"{name}_{end}" for name in "hc"[: len(memory)]] for end in ("in", "out"))
        policy.forward = policy.step  # what ONNX is to run
        names = dict(input_names=[*inputs, *before], output_names=["actions", *after])
        inputs = (*inputs.values(), *memory)
        onnx = torch.onnx.export(
            policy, inputs, dynamo=True, opset_version=18, verbose=False, dynamic_shapes=shapes, **names
        )
        onnx.model.ir_version = 9  # 10, torch's, is refused by robots' older runtimes
        for name, value in facts.items():
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            onnx.model.metadata_props[name] = shown
        onnx.save(folder / "policy.onnx")
        same(onnx(*inputs)[0], policy.step(*inputs)[0])
    (folder / "policy.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in facts.items()))
    print(f"exported {folder / 'policy.pt'} and policy.onnx, which act like the policy")


# ---- Command line ------------------------------------------------------------------------------------------


def play(args: Args, env: VecEnv | None = None) -> dict[str, float]:
    """One episode in each environment, of the policy or of --agent; returns means (envs/record.py)."""
    with blaming("--play: needs envs/record.py, which is not beside this script"):
        from envs.record import roll_out

    check_args(args)
    args, policy, path = set_up_torch(args), None, experiment_dir(args) / args.agent
    if args.agent == "policy":
        path = find_checkpoint(args)
        saved = read_checkpoint(path)["resume"]["args"]
        args = replace(args, env_cfg=args.env_cfg or tuple(saved.get("env_cfg", ())))
    own = None if env else make_env(args, num_envs=args.play_envs, play=True, terminations=args.terminations)
    env = as_vec_env(env or own)
    if args.agent == "policy":
        policy = load_policy(path, args, env, env.num_envs).to(args.device)
    means = roll_out(env, policy, path.parent / f"play_{path.stem}", args)
    close(own)
    return means


def film(agent, path, args):
    """One episode of the current policy, in an environment of its own."""
    from envs.record import roll_out

    policy, *_ = vars(agent).values()
    env = make_env(args, num_envs=1, play=True)
    roll_out(env, Policy(deepcopy(policy).eval(), 1, bounds_of(env, args)), path, args)
    close(env)
    upload(path.with_suffix(".gif"), args)


def attempt(fn, *arguments):
    """What goes wrong here costs no training."""
    try:
        fn(*arguments)
    except Exception as error:
        say(f"no {fn.__name__}: {first_line(error)}")


say = functools.cache(print)  # once


def recommended():
    """What --env is best trained with: a simulator's settings, or `defaults`, a dict, of your function."""
    args = tyro.cli(Args, args=[x for x in sys.argv[1:] if x not in ("-h", "--help")])
    settings = {}
    if args.env_defaults:
        with contextlib.suppress(ImportError):  # a copied script has no envs/ beside it
            from envs import defaults

            try:
                settings = defaults(args.env, vars(args))
            except ValueError as error:
                raise UserError(str(error)) from error
        settings = getattr(own_factory(args), "defaults", settings)
    with blaming(f"--env {args.env}: its defaults must be settings of {SCRIPT.name}"):
        return Args(env=args.env, **settings)


def main():
    try:
        default = recommended()
        warnings.filterwarnings("ignore", ".*is annotated with type")  # a default may be one for each network
        args = tyro.cli(Args, default=default)
        if args.play:
            play(args)
        elif args.export:
            export_checkpoint(find_checkpoint(args), args)
        else:
            train(args)
    except (UserError, FloatingPointError, ImportError, OSError, torch.distributed.DistError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
