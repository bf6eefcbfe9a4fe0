"""PPO for robots, as rsl_rl trains them, in one file: asymmetric actor-critic MLPs, thousands of parallel environments.

    python ppo_continuous.py                                        # a quadruped learns to walk
    python ppo_continuous.py --env my_package.my_module:make_env --num-envs 4096
    python ppo_continuous.py --play                                 # film the newest checkpoint

Implements Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347) with generalised advantage estimation
(Schulman et al. 2016, arXiv:1506.02438) in the variant of rsl_rl (Schwarke et al. 2025, arXiv:2509.10771; Rudin et al.
2022, arXiv:2109.11978): adaptive learning rate, time-out bootstrapping, empirical observation normalisation.
With `--timeout-bootstrap reference`, on one CPU thread, losses and weights equal those of rsl_rl 5.5.1 bit for bit
(tests/test_parity.py).

Shapes: T steps per rollout, N environments, B samples in a mini-batch, O observation size, A actions. Read `train` first:
every iteration is `collect`, then `update`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import datetime
import importlib
import inspect
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import tyro
import yaml
from PIL import Image
from tensordict import TensorDict

if TYPE_CHECKING:
    from envs.vec_env import VecEnv


class UserError(ValueError):
    """Something the user can mend; its one-line message names the flag or field, the value and what would be right."""


# ---- Config ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    """Names are rsl_rl's, defaults its PPO's and Isaac Lab's; built-in tasks bring tuned ones (`--help --env <id>` shows them)."""

    env: str = "quadruped"
    """Built-in task, `simulator:task`, or `package.module:factory` for a function that returns your environment."""
    env_defaults: bool = True
    """Start from the settings that the environment recommends, where it has any (command line only)."""
    num_envs: int = 4096
    """N, environments that step in parallel."""
    num_steps_per_env: int = 24
    """T, env steps per environment and iteration."""
    max_iterations: int = 1500
    """Iterations in total; a resumed run continues to this number."""
    init_at_random_ep_len: bool = True
    """Start at random episode lengths, so that the environments do not all time out together."""
    timeout_bootstrap: Literal["final_obs", "reference"] = "final_obs"
    """At a time-out bootstrap from V(final_obs), where the environment gives it, or from V(s_t), as rsl_rl does."""
    clip_actions: float | None = None
    """Clamp the actions sent to the environment to +-this; not stored with the policy: give it again in --play."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is a GPU."""
    num_threads: int = 0
    """CPU threads; 0 decides by the size of the networks, unless OMP_NUM_THREADS is set."""
    seed: int = 1
    """Seed of the environment, the weights and the sampling."""

    actor_obs: tuple[str, ...] = ()
    """Observation groups of the actor; left out: `actor`, `policy` or `state`, whichever the environment has."""
    critic_obs: tuple[str, ...] = ()
    """Observation groups of the critic; left out: `critic`, or the actor's and `privileged` or `privileged_state`."""
    obs_normalization: bool = True
    """Normalise observations by their running mean and standard deviation."""
    actor_hidden_dims: tuple[int, ...] = (512, 256, 128)
    """Hidden layers of the actor."""
    critic_hidden_dims: tuple[int, ...] = (512, 256, 128)
    """Hidden layers of the critic."""
    activation: Literal["elu", "relu", "selu", "gelu", "silu", "mish", "lrelu", "tanh", "softplus", "sigmoid"] = "elu"
    """Activation of both networks."""
    distribution: Literal["gaussian", "heteroscedastic", "beta"] = "gaussian"
    """Action distribution: Gaussian, Gaussian with a state-dependent standard deviation, or Beta (bounded actions)."""
    std_type: Literal["scalar", "log"] = "scalar"
    """The network's parameter is the standard deviation, or its logarithm."""
    init_std: float = 1.0
    """Initial standard deviation of the actions."""
    learn_std: bool = True
    """Learn the standard deviation (`gaussian` only)."""
    action_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the actions (`beta` only)."""

    num_learning_epochs: int = 5
    """Passes over each rollout."""
    num_mini_batches: int = 4
    """Mini-batches per pass; the last samples, where they do not fill one, are dropped."""
    gamma: float = 0.99
    """Discount per env step."""
    lam: float = 0.95
    """lambda of the generalised advantage estimate."""
    clip_param: float = 0.2
    """epsilon of the clipped surrogate, and range of the value clipping."""
    use_clipped_value_loss: bool = True
    """Clip the value update to +-clip_param, in return units."""
    value_loss_coef: float = 1.0
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    normalize_advantage_per_mini_batch: bool = False
    """Normalise advantages over each mini-batch instead of over the rollout."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer of actor and critic together."""
    learning_rate: float = 1e-3
    """Learning rate; with the adaptive schedule the first one. A resumed run goes on with its own."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """`adaptive` steers the learning rate so that the KL divergence of a mini-batch stays near desired_kl."""
    desired_kl: float = 0.01
    """KL divergence that the adaptive schedule aims at."""
    max_grad_norm: float = 1.0
    """Gradient norm at which actor and critic are clipped, each for itself."""

    compile: bool = False
    """Compile the gradient step with torch.compile, which takes ten seconds to a minute at first."""
    cuda_graphs: bool = True
    """On CUDA: capture rollout and update as CUDA graphs."""
    mixed_precision: bool = False
    """Run the networks of the update in bfloat16; distributions and losses stay in float32."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """`high` lets CUDA multiply in TF32."""

    experiment_name: str = ""
    """Folder of this experiment's runs; left out: script and environment."""
    run_name: str = ""
    """Suffix of the run's folder."""
    log_root: str = "logs"
    """Where runs are written, `<log_root>/<experiment_name>/<time>_<run_name>`; empty: write nothing at all."""
    logger: str = "tensorboard"
    """`tensorboard`, `wandb`, `none`, or `package.module:Writer` for an object with add_scalar(tag, value, step)."""
    upload_model: bool = True
    """Upload checkpoints to W&B as artifacts."""
    save_interval: int = 50
    """Iterations between checkpoints."""
    video_interval: int = 0
    """Iterations between films of the current policy; 0: none."""

    resume: bool = False
    """Continue a run with its weights, optimizer, random streams and environment state."""
    load_run: str = ".*"
    """Which run to load: a regular expression of its folder's name; of several the newest."""
    checkpoint: str = ""
    """Checkpoint to play, export, resume, or (without --resume) start a new run's actor from: a path, or a regular expression
    of a file in the run; left out: the newest."""
    wandb_run_path: str = ""
    """Load the checkpoint from this W&B run, `entity/project/run`."""
    play: bool = False
    """Run a policy instead of training: print returns, write a film and a plot."""
    export: bool = False
    """Write a checkpoint's policy as ONNX and TorchScript instead of training."""
    agent: Literal["policy", "zero", "random"] = "policy"
    """Who acts in --play."""
    play_envs: int = 16
    """Environments in --play; each runs one episode."""
    viewer: bool = False
    """In --play: open the simulator's own viewer, where it has one."""
    terminations: bool = True
    """In --play: let the environment end episodes early, where it can be told not to."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # from YAML
                setattr(self, name, tuple(value))


def check_args(args: Args) -> None:
    """Refuse what cannot work, before any time is spent on it."""
    for name, kind in get_type_hints(Args).items():
        if get_origin(kind) is Literal and getattr(args, name) not in get_args(kind):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: choose from {', '.join(get_args(kind))}")
    positive = ["num_envs", "num_steps_per_env", "max_iterations", "num_learning_epochs", "num_mini_batches", "save_interval"]
    positive += ["init_std", "learning_rate", "desired_kl", "max_grad_norm", "clip_param", "play_envs"]
    positive += ["clip_actions"] if args.clip_actions is not None else []
    for name in positive:
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    for name in ("gamma", "lam"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            raise UserError(f"--{name} {getattr(args, name)}: must lie between 0 and 1")
    for name in ("actor_hidden_dims", "critic_hidden_dims"):
        if not getattr(args, name) or min(getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: name at least one layer, each of 1 or more")
    if args.num_envs * args.num_steps_per_env < 2 * args.num_mini_batches:
        samples = f"{args.num_envs} envs x {args.num_steps_per_env} steps"
        raise UserError(f"--num-mini-batches {args.num_mini_batches}: {samples} give each fewer than 2 samples")
    if args.action_range[0] >= args.action_range[1]:
        raise UserError(f"--action-range {args.action_range}: the first number must be the smaller one")
    if args.distribution != "gaussian" and not args.learn_std:
        raise UserError(f"--no-learn-std: only the gaussian distribution has a fixed std, not {args.distribution}")
    if (args.play or args.export) and args.resume:
        raise UserError("--resume: continues training; --play and --export take --load-run and --checkpoint without it")
    if "/" in args.run_name:
        raise UserError(f"--run-name {args.run_name}: is a part of one folder's name, so without /")
    root = pathlib.Path(args.log_root).absolute()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if args.log_root and not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--log-root {args.log_root}: {there} is no folder that can be written to")
    if args.video_interval and not args.log_root:
        raise UserError("--video-interval: films go to the run's folder; set --log-root")


# ---- Networks -------------------------------------------------------------------------------------------------------


class EmpiricalNormalization(nn.Module):
    """Normalise by the running mean and standard deviation of everything seen so far.

    Buffer names are rsl_rl's; all updates are in place and stay on the device.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("_mean", torch.zeros(1, *shape))
        self.register_buffer("_var", torch.ones(1, *shape))
        self.register_buffer("_std", torch.ones(1, *shape))
        self.register_buffer("count", torch.tensor(0, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self._mean) / (self._std + 1e-2)  # rsl_rl's epsilon: what hardly ever moves is not blown up

    def update(self, x: torch.Tensor) -> None:
        """Merge the moments of a batch x (B, O): Chan et al. 1983, parallel variance, in rsl_rl's order."""
        count = torch.full_like(self.count, x.shape[0])  # a tensor: a Python number would round otherwise
        var, mean = torch.var(x, dim=0, unbiased=False, keepdim=True), x.mean(dim=0, keepdim=True)  # (1, O)
        self.count += count
        rate, delta = count / self.count, mean - self._mean
        self._mean += rate * delta
        self._var += rate * (var - self._var + delta * (mean - self._mean))  # _mean is the merged one already
        self._std.copy_(self._var.sqrt())


class Gaussian(nn.Module):
    """Diagonal Gaussian with one standard deviation per action; params = (mean, std), (..., A) each.

    What a distribution has: `num_actions`, `num_outputs` (of the MLP), `init_bias`; `params(output)`, a tuple of tensors
    (..., A, *), which the rollout keeps; of such params `sample` and `std`, (..., A), `log_prob(params, actions)`, `entropy`
    and `kl(old, new)`, (...); and `deterministic(output)`, (..., A), the policy's action, which TorchScript compiles.
    """

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.num_actions, self.num_outputs, self.std_type = num_actions, num_actions, args.std_type
        self.init_bias = 0.0  # of outputs beyond one per action, which it has not
        std = args.init_std * torch.ones(num_actions)
        name, value = ("std_param", std) if args.std_type == "scalar" else ("log_std_param", std.log())
        self.register_parameter(name, nn.Parameter(value, requires_grad=args.learn_std))

    def mean_and_std_param(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (..., A) and standard deviation parameter, (A,) or (..., A)."""
        return output, self.std_param if self.std_type == "scalar" else self.log_std_param

    def params(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A std clamped at 1e-6 has zero gradient for ever (as in rsl_rl); --std-type log does not get there.
        mean, std = self.mean_and_std_param(output)
        if self.std_type == "scalar":
            std = std.clamp(1e-6, 1e6)
        else:
            std = std.clamp(math.log(1e-6), math.log(1e6)).exp()
        return mean, std.expand_as(mean)

    @torch.jit.export
    def deterministic(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def std(self, params):
        return params[1]

    def sample(self, params):
        mean, std = params
        return torch.randn_like(mean) * std + mean  # torch.normal(mean, std) would read std on the host

    def log_prob(self, params, actions):  # (..., A) -> (...)
        # log N(a; mu, sigma) = -(a - mu)^2 / (2 sigma^2) - log sigma - log sqrt(2 pi), summed over the actions
        mean, std = params
        return (-((actions - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))).sum(-1)

    def entropy(self, params):
        # H = 1/2 + 1/2 log(2 pi) + log sigma
        return (0.5 + 0.5 * math.log(2 * math.pi) + params[1].log()).sum(-1)

    def kl(self, old, new):
        # KL(old || new) = 1/2 (r + (mu_o - mu_n)^2 / sigma_n^2 - 1 - log r),  r = sigma_o^2 / sigma_n^2
        ratio, shift = (old[1] / new[1]) ** 2, ((old[0] - new[0]) / new[1]) ** 2
        return (0.5 * (ratio + shift - 1 - ratio.log())).sum(-1)


class HeteroscedasticGaussian(Gaussian):
    """Gaussian whose standard deviation is a network output too: the MLP gives (..., 2 A)."""

    def __init__(self, num_actions: int, args: Args):
        nn.Module.__init__(self)  # no parameter of its own
        self.num_actions, self.num_outputs, self.std_type = num_actions, 2 * num_actions, args.std_type
        # The logarithm by torch, which rounds as rsl_rl's.
        self.init_bias = args.init_std if args.std_type == "scalar" else torch.tensor(args.init_std + 1e-7).log().item()

    def mean_and_std_param(self, output):
        return output.chunk(2, -1)

    @torch.jit.export
    def deterministic(self, output: torch.Tensor) -> torch.Tensor:
        return output.chunk(2, -1)[0]


class Beta(nn.Module):
    """Beta distribution rescaled to action_range; params = (concentration,), (..., A, 2): alpha and beta, both > 1: one mode.

    A Beta is the Dirichlet distribution of two components; kept as one tensor, its gradients add up in rsl_rl's order.
    """

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.num_actions, self.num_outputs, self.init_bias = num_actions, 2 * num_actions, 0.0
        self.low, self.scale = args.action_range[0], args.action_range[1] - args.action_range[0]

    def params(self, output):
        return (torch.stack([nn.functional.softplus(x) + 1.0 for x in output.chunk(2, -1)], -1),)

    @torch.jit.export
    def deterministic(self, output: torch.Tensor) -> torch.Tensor:
        alpha, beta = [nn.functional.softplus(x) + 1.0 for x in output.chunk(2, -1)]
        return alpha / (alpha + beta) * self.scale + self.low

    def dirichlet(self, params):
        return torch.distributions.Dirichlet(params[0], validate_args=False)

    def std(self, params):
        # Var x = alpha beta / ((alpha + beta)^2 (alpha + beta + 1))
        (alpha, beta), total = params[0].unbind(-1), params[0].sum(-1)
        return (alpha * beta / (total**2 * (total + 1))).sqrt() * self.scale

    def sample(self, params):
        return self.dirichlet(params).sample()[..., 0] * self.scale + self.low

    def log_prob(self, params, actions):
        # y = low + scale x, hence log p(y) = log p(x) - log scale
        x = ((actions - self.low) / self.scale).clamp(1e-6, 1.0 - 1e-6)
        return (self.dirichlet(params).log_prob(torch.stack((x, 1.0 - x), -1)) - math.log(self.scale)).sum(-1)

    def entropy(self, params):
        # of x, not of y: rsl_rl leaves the constant log scale out here
        return self.dirichlet(params).entropy().sum(-1)

    def kl(self, old, new):
        old, new = (torch.distributions.Beta(*params[0].unbind(-1), validate_args=False) for params in (old, new))
        return torch.distributions.kl_divergence(old, new).sum(-1)


class Model(nn.Module):
    """Observation groups -> concatenate -> normalise -> MLP; the actor's output parametrises its distribution.

    Args:
        shapes: shape of one sample of each observation group that this model reads, in order.
        hidden_dims: sizes of the hidden layers.
        args: for the activation and the normalisation.
        distribution: the actor's action distribution; None makes a critic with one output.
    """

    def __init__(self, shapes: dict, hidden_dims, args: Args, distribution: nn.Module | None = None):
        super().__init__()
        self.shapes = shapes
        size = sum(shape[0] for shape in shapes.values())  # O
        self.obs_normalizer = EmpiricalNormalization(size) if args.obs_normalization else nn.Identity()
        self.distribution = distribution
        self.mlp = make_mlp(size, distribution.num_outputs if distribution else 1, hidden_dims, args.activation)
        if distribution:
            # The outputs beyond one per action, where it has any (std, beta), start as a constant, as in rsl_rl.
            nn.init.zeros_(self.mlp[-1].weight[distribution.num_actions :])
            nn.init.constant_(self.mlp[-1].bias[distribution.num_actions :], distribution.init_bias)

    def concatenate(self, obs: TensorDict) -> torch.Tensor:
        return torch.cat([obs[group] for group in self.shapes], dim=-1)  # (..., O)

    def preprocess(self, obs: TensorDict):
        """What `forward` reads. A step of its own, so that the update does it once for all its epochs."""
        return self.obs_normalizer(self.concatenate(obs))  # (..., O)

    def forward(self, x) -> torch.Tensor:
        return self.mlp(x)

    def update_normalization(self, obs: TensorDict) -> None:
        """Learn the moments of a whole rollout of observations, (T, N, ...) each."""
        if isinstance(self.obs_normalizer, EmpiricalNormalization):
            self.obs_normalizer.update(self.concatenate(obs).flatten(0, 1))


def make_mlp(num_inputs: int, num_outputs: int, hidden_dims, activation: str) -> nn.Sequential:
    """Linear layers with an activation between, in torch's default initialisation; layer names are rsl_rl's."""
    sizes = [num_inputs, *hidden_dims]
    layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), make_activation(activation))]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_outputs))


def make_activation(name: str) -> nn.Module:
    classes = dict(elu=nn.ELU, relu=nn.ReLU, selu=nn.SELU, gelu=nn.GELU, silu=nn.SiLU, mish=nn.Mish, lrelu=nn.LeakyReLU)
    classes |= dict(tanh=nn.Tanh, softplus=nn.Softplus, sigmoid=nn.Sigmoid)
    return classes[name]()


def make_distribution(num_actions: int, args: Args) -> nn.Module:
    classes = {"gaussian": Gaussian, "heteroscedastic": HeteroscedasticGaussian, "beta": Beta}
    return classes[args.distribution](num_actions, args)


def make_actor(shapes: dict[str, tuple[int, ...]], num_actions: int, args: Args) -> Model:
    return Model(shapes, args.actor_hidden_dims, args, make_distribution(num_actions, args))


def make_models(obs: TensorDict, num_actions: int, args: Args) -> tuple[Model, Model]:
    """Actor, then critic: the order in which rsl_rl draws their initial weights."""
    shapes = {name: {g: tuple(obs[g].shape[1:]) for g in groups} for name, groups in resolve_groups(obs, args).items()}
    actor = make_actor(shapes["actor"], num_actions, args)
    critic = Model(shapes["critic"], args.critic_hidden_dims, args)
    return actor.to(obs.device), critic.to(obs.device)


def resolve_groups(obs: TensorDict, args: Args) -> dict[str, tuple[str, ...]]:
    """Observation groups of each network: as asked for, or by convention; printed either way."""
    actor = args.actor_obs or first_group(obs, "actor", "policy", "state")
    critic = args.critic_obs or first_group(obs, "critic") or actor + first_group(obs, "privileged", "privileged_state")
    available = ", ".join(f"{group} {tuple(x.shape[1:])}" for group, x in obs.items())
    chosen = {"actor": actor, "critic": critic}
    for name, groups in chosen.items():
        missing = [group for group in groups if group not in obs.keys()]
        if missing or not groups:
            raise UserError(f"{' '.join([f'--{name}-obs', *missing])}: the environment has no such group; it has {available}")
        for group in groups:
            if obs[group].dim() != 2:
                raise UserError(f"--{name}-obs {group}: must be vectors (O,), or images in ppo_cnn.py; there are {available}")
        print(f"{name} observes {' + '.join(f'{group} {tuple(obs[group].shape[1:])}' for group in groups)}")
    return chosen


def first_group(obs: TensorDict, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in obs.keys())[:1]


# ---- Rollout storage ------------------------------------------------------------------------------------------------


def make_storage(obs: TensorDict, num_actions: int, actor: Model, args: Args) -> TensorDict:
    """Rows 0..T-1 hold a rollout, all (T + 1, N, ...); row T only the observation and the value after its last step."""
    rows, n, device = args.num_steps_per_env + 1, args.num_envs, obs.device

    def zeros(*shape):
        return torch.zeros(rows, n, *shape, device=device)

    params = actor.distribution.params(zeros(actor.distribution.num_outputs))  # of zeros: only their shapes count
    # Vectors become the networks' dtype here, whatever the environment returns; images are stored as they come.
    groups = {g: x.to(torch.get_default_dtype()) if x.dim() == 2 else x for g, x in obs.items()}
    return TensorDict(
        obs=TensorDict(groups, batch_size=[n]).expand(rows, n).contiguous(),  # row T starts the first rollout
        actions=zeros(num_actions),
        params={str(i): torch.zeros_like(x) for i, x in enumerate(params)},  # of the distribution that acted
        values=zeros(),
        rewards=zeros(),
        bootstrap=zeros(),  # value of what follows a time-out
        dones=zeros().bool(),  # dones[t] follows actions[t]
        batch_size=[rows, n],
        device=device,
    )


@torch.no_grad()
def act(actor: Model, critic: Model, row: TensorDict) -> None:
    """Sample an action for the observation in this row (N, ...) of the storage, and write down what PPO needs.

    By copy_, always: the row is a view of the storage, and a CUDA graph knows its memory alone.
    """
    params = actor.distribution.params(actor(actor.preprocess(row["obs"])))
    row["actions"].copy_(actor.distribution.sample(params))
    for stored, param in zip(row["params"].values(), params):
        stored.copy_(param)
    row["values"].copy_(evaluate(critic, row["obs"]))


def evaluate(critic: Model, obs: TensorDict) -> torch.Tensor:
    return critic(critic.preprocess(obs)).squeeze(-1)  # (N,)


@torch.no_grad()
def collect(env: VecEnv, critic: Model, storage: TensorDict, episodes: TensorDict, act_rows, args: Args) -> dict:
    """Fill the storage with T steps; return the finished episodes' totals and the means of the environment's log.

    act_rows: for each of the T rows a function without arguments that runs `act` on it.
    """
    rows, logs = storage.unbind(0), {}
    rows[0]["obs"].update_(rows[-1]["obs"])  # goes on where the last rollout has ended
    for row, next_row, act_row in zip(rows, rows[1:], act_rows):
        act_row()
        # Stored unclamped: so the log-probability is that of what was drawn.
        actions = row["actions"].clone()  # which the environment may keep, or write to
        actions = actions if args.clip_actions is None else actions.clamp_(-args.clip_actions, args.clip_actions)
        # Inference mode makes small operations cheaper, but what is made in it cannot be changed outside of it: so only for
        # environments that keep their state in place.
        with torch.inference_mode(is_capturable(env)):
            obs, rewards, dones, extras = env.step(actions.to(env.device))
        # Copied, since simulators reuse these buffers. After a done it is the next episode's first observation.
        next_row["obs"].update_(obs.select(*next_row["obs"].keys()))
        row["rewards"].copy_(rewards)
        row["dones"].copy_(dones)
        row["bootstrap"].copy_(bootstrap_value(critic, row, extras, args))
        for key, value in (extras.get("episode") or extras.get("log") or {}).items():
            value = value if torch.is_tensor(value) else torch.full((1,), float(value), device=row.device)
            value = value.to(row.device, torch.get_default_dtype(), copy=True).flatten()  # none, one or (N,)
            logs.setdefault(key if "/" in key else f"Episode/{key}", []).append(value)
    rows[-1]["values"].copy_(evaluate(critic, rows[-1]["obs"]))
    logs = {key: torch.cat(values).mean() for key, values in logs.items()}
    return finish_episodes(episodes, {"reward": storage["rewards"][:-1]}, storage["dones"][:-1]) | logs


def bootstrap_value(critic: Model, row: TensorDict, extras: dict, args: Args) -> torch.Tensor:
    """Value of the state in which a time limit cut the episode; zero elsewhere, (N,).

    The returned observation is already the next episode's. rsl_rl takes V(s_t) instead; V(final_obs) is the true value.
    """
    values = row["values"]
    if extras.get("time_outs") is None:
        return torch.zeros_like(values)
    if args.timeout_bootstrap == "final_obs" and extras.get("final_obs") is not None:
        # Of all N, though few time out: asking which would wait for the device.
        values = evaluate(critic, row["obs"].clone().update_(extras["final_obs"].select(*row["obs"].keys())))
    # Not a product: rows without a time-out may hold anything.
    return torch.where(extras["time_outs"].to(row.device).bool(), values, 0.0)


def is_capturable(env: VecEnv) -> bool:
    """Declared by the environment's own class: state that a subclass or a wrapper adds need not be kept in place."""
    return vars(type(env)).get("capturable", False)


def make_episodes(args: Args, device: torch.device) -> TensorDict:
    """Return and length so far of every environment's running episode, (N,) each."""
    totals = {name: torch.zeros(args.num_envs, device=device) for name in ("reward", "episode_length")}
    return TensorDict(totals, batch_size=[args.num_envs])


def finish_episodes(episodes: TensorDict, series: dict[str, torch.Tensor], dones: torch.Tensor) -> dict[str, torch.Tensor]:
    """Add a rollout's series, (T, N) each, to the running totals; return those of ALL episodes that ended in it, summed."""
    series = series | {"episode_length": torch.ones_like(series["reward"])}
    still_running = dones.flip(0).cumsum(0).flip(0) == 0  # (T, N): no done from here to the end of the rollout
    finished = {"num_episodes": dones.sum()}
    # No loop over steps, no read: what follows an environment's last done belongs to its running episode, the rest to others.
    for name, total in episodes.items():
        seen = total + series[name].sum(0)
        total.copy_(torch.where(still_running[0], total, 0.0) + torch.where(still_running, series[name], 0.0).sum(0))
        finished[name] = (seen - total).sum()
    return finished


# ---- Advantages -----------------------------------------------------------------------------------------------------


def compute_gae(storage: TensorDict, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimate: advantages and returns, (T, N) each."""
    values = storage["values"]
    # A time-out is no end of the task: r_t + gamma V(s'_t), s'_t being the state in which it was cut (bootstrap_value).
    rewards = storage["rewards"][:-1] + args.gamma * storage["bootstrap"][:-1]
    discount = args.gamma * ~storage["dones"][:-1]
    # delta_t = r_t + gamma (1 - d_t) V(s_{t+1}) - V(s_t), d_t: done              arXiv:1506.02438 eq. 10
    advantages = rewards + discount * values[1:] - values[:-1]
    # A_t = delta_t + gamma lambda (1 - d_t) A_{t+1}, in place                    arXiv:1506.02438 eq. 16
    decay = discount * args.lam
    for t in reversed(range(args.num_steps_per_env - 1)):
        advantages[t].add_(decay[t] * advantages[t + 1])
    returns = advantages + values[:-1]
    advantages = returns - values[:-1]  # rounds as rsl_rl does
    if not args.normalize_advantage_per_mini_batch:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return advantages, returns


# ---- Loss -----------------------------------------------------------------------------------------------------------


def ppo_loss(actor: Model, critic: Model, batch: TensorDict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The PPO loss of one mini-batch (B, ...), and what to log of it.

    It holds what the networks read (actor_input, critic_input), what the policy that acted did (actions, log_prob, params,
    values), and advantages and returns.
    """
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.mixed_precision):
        output, values = actor(batch["actor_input"]), critic(batch["critic_input"]).squeeze(-1)
    params = actor.distribution.params(output.to(batch["returns"].dtype))
    values = values.to(batch["returns"].dtype)
    log_prob = actor.distribution.log_prob(params, batch["actions"])  # (B,)
    entropy = actor.distribution.entropy(params).mean()

    advantages = batch["advantages"]
    if args.normalize_advantage_per_mini_batch:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # L^CLIP = E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)]                  arXiv:1707.06347 eq. 7
    ratio = torch.exp(log_prob - batch["log_prob"])
    clipped = ratio.detach().clamp(1.0 - args.clip_param, 1.0 + args.clip_param)
    gain, clipped_gain = advantages * ratio, advantages * clipped
    # Inside the range the two are equal, and `where` leaves all the gradient to the first. torch.min would halve it.
    surrogate_loss = -torch.where(gain <= clipped_gain, gain, clipped_gain).mean()
    # Value loss: the larger of the plain error and that of a prediction at most eps from the old one. No 1/2, as in rsl_rl.
    value_error = (values - batch["returns"]) ** 2
    if args.use_clipped_value_loss:
        step = (values - batch["values"]).clamp(-args.clip_param, args.clip_param)
        clipped_error = (batch["values"] + step - batch["returns"]) ** 2
        value_error = torch.where(value_error >= clipped_error, value_error, clipped_error)
    value_loss = value_error.mean()

    loss = surrogate_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy
    with torch.no_grad():
        kl = actor.distribution.kl(tuple(batch["params"].values()), params).mean()  # KL(old || new), exact
        clip_fraction = (ratio != clipped).mean(dtype=loss.dtype)
        mean_std = actor.distribution.std(params).mean()
    metrics = {"surrogate": surrogate_loss, "value": value_loss, "entropy": entropy, "kl": kl}
    return loss, metrics | {"clip_fraction": clip_fraction, "mean_std": mean_std}


# ---- Update ---------------------------------------------------------------------------------------------------------


class FlatOptimizer:
    """Adam, AdamW or SGD over one vector that holds all weights: a dozen kernels a step, however many layers there are.

    The parameters become views of `weights`, their gradients views of `gradient`. Learning rate and step count are tensors
    on the device, so that nothing waits and a CUDA graph sees them change: set the rate with `lr.fill_(x)`. `differentiate`
    replaces zero_grad and backward: it overwrites `gradient`. On a CPU the steps equal torch.optim's to the bit, where every
    parameter has a gradient. Change networks before it is made: what comes later is not trained (`check_agent` refuses it).

    Args:
        params: the parameters of all networks, in rsl_rl's order.
        lr: the first learning rate.
        kind: "adam", "adamw" or "sgd".
    """

    def __init__(self, params, lr: float, kind: str = "adam"):
        self.kind = kind
        self.params = list(dict.fromkeys(params))  # one that two networks share counts once
        self.trained = [p for p in self.params if p.requires_grad]
        self.sizes = [math.ceil(p.numel() / 16) * 16 for p in self.trained]  # matrix products want aligned memory
        self.weights = self.trained[0].data.new_zeros(sum(self.sizes))
        self.gradient = torch.zeros_like(self.weights)
        for p, weights, gradient in zip(self.trained, self.split(self.weights), self.split(self.gradient)):
            weights.copy_(p.data)
            p.data, p.grad = weights, gradient
        # float64 rounds as rsl_rl's Python float does; (1,), since on a CPU torch.compile loses what is written into a ().
        self.lr = torch.tensor([lr], dtype=torch.float64, device=self.weights.device)
        step, moment = torch.zeros((), device=self.weights.device), torch.zeros_like(self.weights)
        self.state = {} if kind == "sgd" else {"step": step, "exp_avg": moment, "exp_avg_sq": moment.clone()}

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The part of each trained parameter, in its shape; a single number (Adam's step count) is everybody's."""
        if not vector.dim():
            return [vector] * len(self.trained)
        return [part[: p.numel()].view_as(p) for part, p in zip(vector.split(self.sizes), self.trained)]

    def differentiate(self, loss: torch.Tensor) -> None:
        """Write the gradient of the loss into `gradient`."""
        gradients = torch.autograd.grad(loss, self.trained, materialize_grads=True)
        torch._foreach_copy_([p.grad for p in self.trained], gradients)

    @torch.no_grad()
    def step(self, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2) -> None:
        lr = self.lr[0]
        if self.kind == "sgd":  # theta -= lr g, rounded once, as torch's multiply-add does
            self.weights.sub_(lr.to(self.weights.dtype).double() * self.gradient.double())
            return
        if self.kind == "adamw":
            self.weights.mul_(1.0 - lr * weight_decay)
        # theta -= lr m_hat / (sqrt(v_hat) + eps)                                 arXiv:1412.6980 algorithm 1
        step, mean, square = self.state.values()
        step = step.add_(1.0).double()
        mean.lerp_(self.gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1.0 - beta2)
        denominator = (square.sqrt() / (1.0 - beta2**step).sqrt()).add_(eps)
        self.weights.add_((mean * (-lr / (1.0 - beta1**step))).div_(denominator))

    def state_dict(self) -> dict:
        """That of torch's optimizer over the single parameters, which rsl_rl loads."""
        optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        optimizer = optimizers[self.kind](self.params, lr=float(self.lr))
        for name, vector in self.state.items():
            for p, part in zip(self.trained, self.split(vector)):
                optimizer.state[p][name] = part.clone()
        return optimizer.state_dict()

    def load_state_dict(self, saved: dict) -> None:
        """Copy such a state in place, so that a captured graph stays valid."""
        group = saved["param_groups"][0]
        if len(group["params"]) != len(self.params):
            raise RuntimeError(f"{len(group['params'])} parameters, but {len(self.params)} here")
        self.lr.fill_(group["lr"])
        entries = [saved["state"].get(index, {}) for index, p in enumerate(self.params) if p.requires_grad]
        for name, vector in self.state.items():
            for part, entry in zip(self.split(vector), entries):
                if name in entry:
                    part.copy_(entry[name])


def make_batches(actor: Model, critic: Model, storage: TensorDict, permutation: torch.Tensor, args: Args) -> list[TensorDict]:
    """GAE, then the rollout shuffled and normalised once: as in rsl_rl, every epoch reads the same mini-batches (B, ...)."""
    rollout = storage.select("obs", "actions", "params", "values")[:-1]
    # Of the policy that acted, by what was stored of it: one call, not one in each step of the rollout.
    rollout["log_prob"] = actor.distribution.log_prob(tuple(rollout["params"].values()), rollout["actions"])
    rollout["advantages"], rollout["returns"] = compute_gae(storage, args)
    batch = rollout.flatten(0, 1)[permutation]
    batch["actor_input"], batch["critic_input"] = actor.preprocess(batch["obs"]), critic.preprocess(batch["obs"])
    return list(batch.exclude("obs").chunk(args.num_mini_batches))


def mini_batch_step(actor: Model, critic: Model, optimizer, batch: TensorDict, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of actor and critic together."""
    loss, metrics = ppo_loss(actor, critic, batch, args)
    backward(loss, optimizer, metrics)
    if args.schedule == "adaptive":
        adapt_learning_rate(optimizer, metrics["kl"], args)
    metrics["actor_grad_norm"] = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
    metrics["critic_grad_norm"] = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
    optimizer.step()
    return {name: value.detach() for name, value in metrics.items()}


def backward(loss: torch.Tensor, optimizer, metrics: dict[str, torch.Tensor]) -> None:
    """Gradients of the loss. (ppo_multigpu.py averages them over the ranks here, and the KL in `metrics`.)"""
    optimizer.differentiate(loss)


def adapt_learning_rate(optimizer, kl: torch.Tensor, args: Args) -> None:
    """Learning rate / 1.5 (at least 1e-5) if the policy, before this step, has moved too far; x 1.5 (at most 1e-2) if hardly,
    but not at a KL of 0, where it has not moved yet. On the device, in place."""
    lr = optimizer.lr
    slower, faster = (lr / 1.5).clamp(min=1e-5), (lr * 1.5).clamp(max=1e-2)
    faster = torch.where((kl < args.desired_kl / 2.0) & (kl > 0.0), faster, lr)
    lr.copy_(torch.where(kl > args.desired_kl * 2.0, slower, faster))


def update(actor: Model, critic: Model, optimizer, storage: TensorDict, permutation: torch.Tensor, step_fn, args: Args) -> dict:
    """All epochs over one rollout, in steps of `step_fn`, which is mini_batch_step, compiled or not.

    Returns what to log, on the device: one number, or one for each mini-batch of each epoch.
    """
    batches = make_batches(actor, critic, storage, permutation, args)
    steps = [step_fn(actor, critic, optimizer, batch, args) for batch in batches * args.num_learning_epochs]
    metrics = {f"Loss/{name}": torch.stack([step[name] for step in steps]) for name in steps[0]}
    metrics["Policy/mean_std"] = metrics.pop("Loss/mean_std")[-1]
    metrics["Loss/learning_rate"] = optimizer.lr.clone()
    # The moments are learned here, after the epochs, so that the update normalises as the rollout did.
    actor.update_normalization(storage["obs"][:-1])
    critic.update_normalization(storage["obs"][:-1])
    returns, values = (torch.cat([batch[name] for batch in batches]) for name in ("returns", "values"))
    metrics["Loss/explained_variance"] = 1.0 - (returns - values).var() / returns.var()
    return metrics | finite_flags(storage, metrics)


class CudaGraph:
    """`fn(*args)` as one CUDA graph launch; where not `enabled`, just the call.

    Two ordinary calls come first (real iterations): one warms up, the other shows whether `fn` waits for the device, which
    no graph can; if so it is never captured. If not, the third is recorded, and from then on every call replays the same
    kernels on the same memory: `fn` may only touch tensors that stay where they are and are changed in place. Python numbers
    (those of `args`, a counter) and branches freeze in the recording: what changes must be a tensor, like `optimizer.lr`.
    What `fn` returns is overwritten by the next call.
    """

    def __init__(self, fn, *args, enabled: bool, generators=(), pool=None):
        self.fn, self.args, self.enabled, self.generators, self.pool = fn, args, enabled, generators, pool
        self.calls, self.graph, self.result = 0, None, None

    def __call__(self):
        self.calls += 1
        if not self.enabled or self.calls == 1:
            return self.fn(*self.args)
        if self.calls == 2:
            return self.rehearse()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.result

    def rehearse(self):
        with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
            warnings.simplefilter("always")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("warn")
            result = self.fn(*self.args)
        waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
        if waits:
            self.enabled = False
            print(f"{self.fn.__name__} runs without a CUDA graph, since {waits[0]} waits for the device")
        return result

    def record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):  # other threads may use CUDA
                self.result = self.fn(*self.args)
        except RuntimeError as error:  # after which torch's allocator and stream are of no use any more
            cause = str(error.__context__ or error).splitlines()[0]
            raise UserError(f"--cuda-graphs: {self.fn.__name__} cannot be captured ({cause}); use --no-cuda-graphs") from error


def capture(env: VecEnv, agent: dict, storage: TensorDict, episodes: TensorDict, permutation: torch.Tensor, args: Args):
    """`collect` and `update`, ready to be called again and again without arguments.

    On CUDA the whole update is one graph, and so is the whole rollout where the environment declares itself `capturable`.
    With any other environment every policy step is a graph of its own and env.step runs between them.
    """
    actor, critic, optimizer = agent["actor"], agent["critic"], agent["optimizer"]
    graphs = args.cuda_graphs and storage.device.type == "cuda"
    whole = graphs and is_capturable(env) and torch.device(env.device).type == "cuda"
    each = dict(enabled=graphs and not whole, pool=torch.cuda.graph_pool_handle() if graphs else None)  # one memory for all
    act_rows = [CudaGraph(act, actor, critic, row, **each) for row in storage.unbind(0)[:-1]]
    generators = [env.generator] if hasattr(env, "generator") else []
    run_collect = CudaGraph(collect, env, critic, storage, episodes, act_rows, args, enabled=whole, generators=generators)
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # loss, gradient and optimizer's step in one compiled graph
    step_fn = torch.compile(mini_batch_step, dynamic=False) if args.compile else mini_batch_step
    run_update = CudaGraph(update, actor, critic, optimizer, storage, permutation, step_fn, args, enabled=graphs)
    return run_collect, run_update


# ---- NaN guard ------------------------------------------------------------------------------------------------------


def finite_flags(storage: TensorDict, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One device flag for each thing that must be finite; the host reads them once per iteration, with the metrics."""
    losses = torch.stack([metrics["Loss/surrogate"], metrics["Loss/value"]])
    watched = storage.select("obs", "rewards", "bootstrap").flatten_keys(" ")
    everything = {name: x for name, x in watched.items() if x.is_floating_point()} | {"loss": losses}
    # The smallest and the largest number are finite where all are, and are found in a tenth of the time.
    return {f"finite/{name}": torch.stack(x.aminmax()).isfinite().all() for name, x in everything.items()}


def all_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether an update has left weights, statistics and optimizer state finite: a device flag too."""
    numbers = [x for x in tensors if x.is_floating_point() and x.numel()]
    return torch.stack(torch._foreach_norm(numbers, math.inf)).isfinite().all()


def describe_nan(metrics: dict[str, float], iteration: int, storage: TensorDict, run_dir: pathlib.Path | None) -> str:
    """Dump the rollout and say what was not finite first, where and when."""
    message = "weights or statistics are not finite after the update" if metrics["finite/loss"] else "loss is not finite"
    for name, x in storage.flatten_keys(" ").items():  # obs <group>, actions, ..., rewards, bootstrap
        bad = ~x.isfinite().unsqueeze(-1).flatten(2).all(-1)  # (T + 1, N)
        if bad.any():
            step = int(bad.any(1).nonzero()[0])
            name = name.replace("obs ", "observation group ")
            message = f"non-finite {name} from step {step} on, in environments {bad[step].nonzero().flatten()[:8].tolist()}"
            break
    message = f"iteration {iteration}: {message}; weights, optimizer and normalisers are as they were before it"
    if run_dir:
        torch.save(storage.to_dict(), run_dir / f"nan_{iteration}.pt")
        message += f"; the rollout is in {run_dir / f'nan_{iteration}.pt'}"
    return message


# ---- Logging, checkpoints, export -----------------------------------------------------------------------------------


def fetch(metrics: dict) -> dict[str, float]:
    """Bring an iteration's metrics to the host: its one device synchronisation. Values per mini-batch are averaged."""
    tensors = {name: value.reshape(-1) for name, value in metrics.items() if torch.is_tensor(value)}
    numbers = iter(torch.cat([value.double() for value in tensors.values()]).tolist())
    means = {name: sum(next(numbers) for _ in range(len(value))) / len(value) for name, value in tensors.items()}
    return metrics | means


def timestamp(device: torch.device):
    """A point in time: on CUDA one between two kernels, since the host runs ahead of them."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def summarize(metrics: dict[str, float], times: list, args: Args) -> dict[str, float]:
    """What is logged: episode totals become means (NaN where no episode ended), times become throughput."""
    metrics = {name: value for name, value in metrics.items() if not name.startswith("finite/")}
    episodes = metrics.pop("num_episodes")
    for name in ("reward", "episode_length"):
        metrics[f"Train/mean_{name}"] = metrics.pop(name) / (episodes or math.nan)
    metrics["Train/num_episodes"] = episodes
    metrics["Perf/collection_time"] = seconds_between(times[0], times[1])  # s
    metrics["Perf/learning_time"] = seconds_between(times[1], times[2])  # s
    metrics["Perf/total_fps"] = args.num_envs * args.num_steps_per_env / seconds_between(times[0], times[2])  # env steps / s
    if torch.cuda.is_available():
        metrics["Perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


def log_iteration(metrics: dict[str, float], iteration: int, args: Args, writer=None) -> None:
    """Everything to the writer, the essential in three lines to the console."""
    for tag, value in metrics.items() if writer else ():
        if not math.isnan(value):
            writer.add_scalar(tag, value, iteration)
    collection, learning, speed = (metrics[f"Perf/{name}"] for name in ("collection_time", "learning_time", "total_fps"))
    steps = (iteration + 1) * args.num_envs * args.num_steps_per_env
    eta = datetime.timedelta(seconds=round((args.max_iterations - iteration - 1) * (collection + learning)))
    print(f"\niteration {iteration + 1}/{args.max_iterations}  {steps:,} steps  {speed:,.0f} steps/s", end="  ")
    print(f"collect {collection:.3f} s  learn {learning:.3f} s  ETA {eta}")
    for line in (("Train/", "Episode/", "Metrics/", "Curriculum/"), ("Loss/", "Policy/")):
        tags = [tag for prefix in line for tag in metrics if tag.startswith(prefix)]
        print("  " + "  ".join(f"{tag.split('/', 1)[1].removeprefix('mean_')} {metrics[tag]:.4g}" for tag in tags), flush=True)


def experiment_dir(args: Args) -> pathlib.Path:
    name = args.experiment_name or f"{pathlib.Path(__file__).stem}_{re.sub(r'[^A-Za-z0-9-]+', '_', args.env)}"
    return pathlib.Path(args.log_root or "logs") / name


def make_run_dir(args: Args, env: VecEnv) -> pathlib.Path | None:
    """Create the run's folder with all that repeating it takes: arguments, environment, this script, the state of git."""
    if not args.log_root:
        return None
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    run_dir = experiment_dir(args) / (f"{stamp}_{args.run_name}" if args.run_name else stamp)
    run_dir.mkdir(parents=True)
    (run_dir / "args.yaml").write_text(to_yaml(args))
    (run_dir / "env.yaml").write_text(to_yaml(getattr(env, "cfg", None)))
    shutil.copy(__file__, run_dir)
    git = subprocess.run("git rev-parse HEAD && git diff HEAD", shell=True, cwd=pathlib.Path(__file__).resolve().parent,
                         capture_output=True, text=True, errors="replace")  # fmt: skip
    (run_dir / "git.diff").write_text(git.stdout)
    return run_dir


def to_yaml(value: Any) -> str:
    def simple(x):
        return x.to_dict() if hasattr(x, "to_dict") else dataclasses.asdict(x) if dataclasses.is_dataclass(x) else repr(x)

    try:
        value = json.loads(json.dumps(value, default=simple, skipkeys=True))
    except Exception:  # an environment's cfg may be anything: a class, a cycle, something with a lock inside
        value = repr(value)
    return yaml.safe_dump(value, sort_keys=False)


def make_writer(args: Args, env: VecEnv, run_dir: pathlib.Path | None):
    """The logger's writer, or None. add_scalar is all that a writer of your own needs; it may have rsl_rl's other methods."""
    if run_dir is None or args.logger == "none":
        return None
    if args.logger in ("tensorboard", "wandb"):
        from torch.utils.tensorboard import SummaryWriter

        if args.logger == "wandb":
            import wandb

            config = dataclasses.asdict(args)
            wandb.init(project=experiment_dir(args).name, name=run_dir.name, dir=run_dir, config=config, sync_tensorboard=True)
        return SummaryWriter(log_dir=str(run_dir))
    writer_class = resolve(args.logger, "--logger")
    options = {"log_dir": str(run_dir), "project_name": experiment_dir(args).name}
    writer = writer_class(**{k: v for k, v in options.items() if k in inspect.signature(writer_class).parameters})
    if hasattr(writer, "store_config"):
        cfg = getattr(env, "cfg", None) or {}
        if isinstance(cfg, dict):  # rsl_rl's writers take a dataclass, or what has to_dict()
            cfg = dataclasses.make_dataclass("Config", cfg)(**cfg)
        writer.store_config(cfg, dataclasses.asdict(args))
    return writer


def upload(path: pathlib.Path, iteration: int, args: Args, writer) -> None:
    """Hand a checkpoint or a film to the logger, where it has a place for it."""
    kind = "model" if path.suffix == ".pt" else "video"
    if writer is None or not path.exists():  # no film: an environment that cannot draw
        return
    if hasattr(writer, f"save_{kind}"):  # rsl_rl's writers
        getattr(writer, f"save_{kind}")(path if kind == "video" else str(path), iteration)
    elif args.logger == "wandb":
        import wandb

        if kind == "video":
            wandb.log({"video": wandb.Video(str(path), format="gif")})
        elif args.upload_model:
            wandb.log_artifact(str(path), name=f"model-{wandb.run.id}", type="model")
    elif args.logger == "tensorboard" and kind == "video":
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=path.read_bytes())  # it plays a GIF
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="video", image=image)]), iteration)


def resolve(spec: str, flag: str):
    """The object that `package.module:name` names, looked for in the working directory too."""
    module, _, name = spec.partition(":")
    sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module or spec)
    except ModuleNotFoundError as error:
        raise UserError(f"{flag} {spec}: cannot be imported as package.module:name ({error})") from error
    if not hasattr(found, name):
        raise UserError(f"{flag} {spec}: cannot be imported as package.module:name (no {name!r} in {found.__name__})")
    return getattr(found, name)


def save_checkpoint(path: pathlib.Path, agent: dict, iteration: int, resume: dict) -> None:
    """Write rsl_rl's format, atomically: a kill at any instant leaves the previous file whole.

    Args:
        path: `model_<iteration>.pt`.
        agent: modules and optimizers by name; each is saved as `<name>_state_dict`.
        iteration: the iteration that has just been finished.
        resume: all else that continuing takes, under one key of its own, which rsl_rl ignores.
    """
    state = {f"{name}_state_dict": part.state_dict() for name, part in agent.items()}
    with open(path.with_suffix(".partial"), "wb") as file:
        torch.save(state | {"iter": iteration, "infos": None, "resume": resume}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load_checkpoint(path: pathlib.Path, device: torch.device) -> dict:
    """Read a checkpoint, ours or rsl_rl's, without running code from it."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"--checkpoint {path}: is no whole checkpoint ({' '.join(str(error).split())[:150]})") from error


def restore(agent: dict, checkpoint: dict, path: pathlib.Path) -> None:
    """Copy a checkpoint into modules and optimizers, in place, so that a captured graph stays valid."""
    for name, part in agent.items():
        if f"{name}_state_dict" not in checkpoint:
            raise UserError(f"--checkpoint {path}: has no {name}_state_dict; it holds {', '.join(map(str, checkpoint))}")
        try:
            part.load_state_dict(checkpoint[f"{name}_state_dict"])
        except RuntimeError as error:
            raise UserError(f"--checkpoint {path}: {name} differs: {' '.join(str(error).split())}") from error


def find_checkpoint(args: Args) -> pathlib.Path:
    """The checkpoint that --checkpoint, --load-run and --wandb-run-path name; left out: the newest of the experiment."""
    if args.wandb_run_path:
        return download_checkpoint(args)
    folder = experiment_dir(args)
    # The command that has started a run from a checkpoint, repeated with --resume, continues that run.
    runs = [yaml.safe_load(file.read_text()) for file in folder.glob("*/args.yaml")] if args.resume else []
    started = any(run and run["checkpoint"] == args.checkpoint and not run["resume"] for run in runs)  # a killed one's is empty
    if pathlib.Path(args.checkpoint).is_file() and not started:
        return pathlib.Path(args.checkpoint)
    wanted = r"model_\d+\.pt" if started or not args.checkpoint else args.checkpoint
    searched = f"--load-run {args.load_run} --checkpoint {wanted}"
    try:
        files = [file for file in folder.glob("*/model_*.pt") if re.fullmatch(args.load_run, file.parent.name)]
        files = [file for file in files if re.fullmatch(wanted, file.name)]
    except re.error as error:
        raise UserError(f"{searched}: is no regular expression ({error})") from error
    if not files:
        raise UserError(f"{searched}: no such file, and no run in {folder} has one; train first, or give a path")
    return max(files, key=lambda file: (file.parent.name, iteration_of(file)))


def iteration_of(file) -> int:
    return int((re.findall(r"\d+", file.name) or [-1])[-1])


def download_checkpoint(args: Args) -> pathlib.Path:
    """The newest checkpoint of a W&B run: an artifact of ours, or a file that rsl_rl uploaded."""
    import wandb

    try:
        run = wandb.Api().run(args.wandb_run_path)
    except Exception as error:
        raise UserError(f"--wandb-run-path {args.wandb_run_path}: cannot be opened as entity/project/run ({error})") from error
    folder = experiment_dir(args) / "wandb" / run.id  # one level deeper than our own runs
    models = [artifact for artifact in run.logged_artifacts() if artifact.type == "model"]
    if models:
        return max(pathlib.Path(models[-1].download(root=str(folder))).glob("model_*.pt"), key=iteration_of)
    files = [file for file in run.files() if re.fullmatch(r"model_\d+\.pt", file.name)]
    if not files:
        raise UserError(f"--wandb-run-path {args.wandb_run_path}: this run has no checkpoint")
    return pathlib.Path(max(files, key=iteration_of).download(root=str(folder), replace=True).name)


class Policy(nn.Module):
    """The deterministic policy, from observations to actions (B, A): what is played, exported and deployed."""

    def __init__(self, actor: Model):
        super().__init__()
        self.obs_normalizer, self.mlp, self.distribution = actor.obs_normalizer, actor.mlp, actor.distribution

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.distribution.deterministic(self.mlp(self.obs_normalizer(obs)))

    @torch.jit.export
    def reset(self, dones: torch.Tensor | None = None) -> None:
        """Nothing to do without memory; there for a uniform interface."""


class LoadedPolicy:
    """A policy for use in any program: from observations to actions (B, A), without gradients."""

    def __init__(self, actor: Model, groups: tuple[str, ...]):
        self.module, self.groups = Policy(actor), groups

    @torch.no_grad()
    def __call__(self, obs: TensorDict | torch.Tensor) -> torch.Tensor:
        """obs: a TensorDict (or dict) of groups, (B, ...) each, or the actor's groups concatenated, (B, O)."""
        if not torch.is_tensor(obs):
            groups = self.groups or first_group(obs, "actor", "policy", "state")
            obs = torch.cat([obs[group] for group in groups], dim=-1)
        return self.module(obs.to(self.module.mlp[0].weight.dtype))

    def reset(self, dones: torch.Tensor | None = None) -> None:
        """Tell the policy which environments (B,) start a new episode; None: all."""
        self.module.reset(dones)


def load_policy(path: str | pathlib.Path, device: str | torch.device = "cpu", args: Args | None = None) -> LoadedPolicy:
    """Load a checkpoint's policy, of this script or of rsl_rl, with the layer sizes that its tensors have.

    Args:
        path: the checkpoint.
        device: where to run it.
        args: the settings it was trained with. A checkpoint of ours brings them along; a foreign one needs them where
            activation, distribution or observation groups are not the defaults.
    """
    checkpoint = load_checkpoint(pathlib.Path(path), torch.device(device))
    if "actor_state_dict" not in checkpoint:
        raise UserError(f"--checkpoint {path}: has no actor_state_dict; it holds {', '.join(map(str, checkpoint))}")
    state, resume = checkpoint["actor_state_dict"], checkpoint.get("resume", {})
    layers = [value for key, value in state.items() if re.fullmatch(r"mlp\.\d+\.weight", key)]
    settings = {name: value for name, value in resume.get("args", {}).items() if name in Args.__dataclass_fields__}
    settings["actor_hidden_dims"] = tuple(layer.shape[0] for layer in layers[:-1])
    settings["obs_normalization"] = "obs_normalizer._mean" in state
    if "distribution.log_std_param" in state:
        settings["std_type"] = "log"
    args = dataclasses.replace(args or Args(), **settings)
    shapes = resume.get("actor_shapes", {"obs": (layers[0].shape[1],)})
    actor = make_actor(shapes, layers[-1].shape[0] // make_distribution(1, args).num_outputs, args)
    restore({"actor": actor.to(device)}, checkpoint, pathlib.Path(path))
    return LoadedPolicy(actor.eval(), tuple(shapes) if resume else args.actor_obs)


def export_policy(policy: Policy, folder: pathlib.Path) -> None:
    """Write policy.onnx (opset 18, normaliser inside) and policy.pt (TorchScript); check both against the model."""
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    policy = copy.deepcopy(policy).to("cpu", torch.float32).eval()
    batch = {0: torch.export.Dim("batch")}
    tensors = {"obs": torch.randn(16, policy.mlp[0].in_features)}
    inputs, shapes = (tensors["obs"],), (batch,)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which no policy here needs
        names = dict(input_names=[*tensors], output_names=["actions"], dynamic_shapes=shapes)
        torch.onnx.export(policy, inputs, folder / "policy.onnx", opset_version=18, dynamo=True, external_data=False, **names)
        torch.jit.script(policy).save(str(folder / "policy.pt"))
    session = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
    outputs = {"policy.onnx": torch.as_tensor(session.run(["actions"], {name: x.numpy() for name, x in tensors.items()})[0])}
    outputs["policy.pt"] = torch.jit.load(folder / "policy.pt")(*inputs)
    for name, actions in outputs.items():
        difference = (actions - policy(*inputs)).abs().max().item()
        print(f"exported {folder / name}, which differs from the model by at most {difference:.1e}")
        if difference > 1e-4:
            raise RuntimeError(f"{folder / name} differs from the model by {difference:.1e}")


# ---- Play -----------------------------------------------------------------------------------------------------------


def play(args: Args, env: VecEnv | None = None) -> dict[str, float]:
    """Run a policy for one episode per environment; print its returns and errors, write a film and a tracking plot.

    Returns:
        Means over the episodes: `return`, `episode_length` [env steps], what the environment logs for each of its copies as
        `Metrics/...` (over the episode) and as `Episode/...` (at its end).
    """
    args = adopt(env, args) if env else args
    check_args(args)
    device = set_up_torch(args)
    path = find_checkpoint(args) if args.agent == "policy" else experiment_dir(args) / f"{args.agent}.pt"
    settings = dataclasses.replace(args, num_envs=args.play_envs)
    own = None if env else make_env(settings, device, play=True, terminations=args.terminations)
    env = env or own
    if args.agent == "policy":
        policy = load_policy(path, device, args)
        try:
            policy(env.get_observations().to(device))
        except (RuntimeError, KeyError) as error:
            raise UserError(f"--checkpoint {path}: its policy does not fit {args.env} ({error})") from error
        policy.reset()
    else:
        size, scale = (env.num_envs, env.num_actions), float(args.agent == "random")
        policy = lambda obs: scale * (2.0 * torch.rand(size, device=device) - 1.0)  # noqa: E731
    if args.viewer:
        if not hasattr(env, "view"):
            raise UserError(f"--viewer: {args.env} has no viewer of its own; without the flag a film is written")
        return env.view(policy)
    print(f"playing {path.stem} on {args.env}")
    results = roll_out(env, policy, device, args, film=path.parent / f"play_{path.stem}")
    close(own, None, args)
    for index in range(env.num_envs):
        print(f"episode {index + 1:2d}" + "".join(f"  {name.split('/')[-1]} {x[index]:.3f}" for name, x in results.items()))
    means = {name: sum(x) / len(x) for name, x in results.items()}
    print("mean      " + "".join(f"  {name.split('/')[-1]} {x:.3f}" for name, x in means.items()))
    return means


@torch.no_grad()
def roll_out(env: VecEnv, policy, device: torch.device, args: Args, film: pathlib.Path) -> dict[str, list[float]]:
    """One episode in every environment: return, length, mean `Metrics/...`, last `Episode/...`; writes `<film>.gif`, `.png`."""
    obs, frames, tracked, totals = env.get_observations().to(device), [], [], {}
    running = torch.ones(env.num_envs, dtype=torch.bool, device=device)
    frame_interval = max(1, round(0.06 / getattr(env, "step_dt", 0.06)))  # about 16 pictures per second
    for step in range(int(env.max_episode_length)):
        if hasattr(env, "render") and step % frame_interval == 0 and len(frames) < 160 and running[0]:
            picture = env.render()
            if picture is not None:  # it draws on a screen of its own
                frames.append(Image.fromarray(picture).quantize(64, method=Image.Quantize.FASTOCTREE))
        actions = policy(obs) if args.clip_actions is None else policy(obs).clamp(-args.clip_actions, args.clip_actions)
        obs, rewards, dones, extras = env.step(actions.to(env.device))
        obs = obs.to(device)
        values = {name: x for name, x in (extras.get("log") or {}).items() if getattr(x, "shape", None) == running.shape}
        for name, value in (values | {"return": rewards, "episode_length": torch.ones_like(rewards)}).items():
            value = value.to(device)
            if name.startswith("Episode/"):  # what counts is how the episode ended; the rest is summed up
                totals[name] = torch.where(running, value, totals.get(name, value))
            elif name.startswith("Metrics/") or name in ("return", "episode_length"):
                totals[name] = totals.get(name, 0.0) + torch.where(running, value, 0.0)
        if hasattr(policy, "reset"):  # the zero and random agents have nothing to forget
            policy.reset(dones.to(device))
        running &= ~dones.to(device).bool()
        if hasattr(env, "tracking") and running[0]:
            tracked.append({name: pair[0].tolist() for name, pair in env.tracking().items()})
        if not running.any():
            break
    film.parent.mkdir(parents=True, exist_ok=True)
    if frames:
        duration = round(1000 * frame_interval * getattr(env, "step_dt", 0.06))  # ms
        frames[0].save(f"{film}.gif", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        print(f"wrote {film}.gif")
    if tracked:
        plot_tracking(tracked, getattr(env, "step_dt", 1.0), f"{film}.png")
    lengths = totals["episode_length"]
    return {name: (x / lengths if name.startswith("Metrics/") else x).tolist() for name, x in totals.items()}


def film_policy(actor: Model, device: torch.device, args: Args, path: pathlib.Path) -> None:
    """One episode of the current policy as `<path>.gif`, in an environment of its own."""
    env = make_env(dataclasses.replace(args, num_envs=1), device, play=True)
    roll_out(env, LoadedPolicy(copy.deepcopy(actor).eval(), tuple(actor.shapes)), device, args, path)
    close(env, None, args)


def plot_tracking(tracked: list[dict[str, list[float]]], step_dt: float, path: str) -> None:
    """Commanded against actual value of every tracked quantity of environment 0, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2 * len(tracked[0])), layout="tight")
    axes = figure.subplots(len(tracked[0]), 1, sharex=True, squeeze=False)[:, 0]
    times = [step_dt * (step + 1) for step in range(len(tracked))]
    for axis, name in zip(axes, tracked[0]):
        axis.plot(times, [pairs[name][1] for pairs in tracked], color="#d9480f", linewidth=1.2, label="actual")
        axis.plot(times, [pairs[name][0] for pairs in tracked], color="#1864ab", linestyle="--", label="commanded")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper right", ncols=2, frameon=False)
    axes[-1].set_xlabel("time [s]")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# ---- Training -------------------------------------------------------------------------------------------------------


def set_up_torch(args: Args) -> torch.device:
    """The device that --device names, and seed, precision, threads and memory."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and random states are those of the current device
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision(args.float32_matmul_precision)
    torch.backends.cudnn.allow_tf32 = args.float32_matmul_precision != "highest"  # of convolutions and RNNs, in the variants
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and max(args.actor_hidden_dims) < 256:
        torch.set_num_threads(1)  # threads that wait for each other after every small operation cost more than they bring
    if device.type == "cpu" and sys.platform == "linux":
        # The next mini-batch uses what one has freed; glibc would return it to the kernel, which clears every page anew.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest there is: blocks below it come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the heap's end stays
    return device


def make_env(args: Args, device: torch.device, **options) -> VecEnv:
    """The environment that --env names: a user's own `package.module:factory`, else one of this project's."""
    settings = dict(num_envs=args.num_envs, device=str(device), seed=args.seed) | options
    prefix, _, name = args.env.partition(":")
    # The list is envs.SIMULATORS', since a copied script has no envs.
    if name and prefix not in ("mjlab", "gym", "envpool", "playground", "genesis", "isaaclab"):
        factory = resolve(args.env, "--env")
        return factory(**{k: v for k, v in settings.items() if k in inspect.signature(factory).parameters})
    try:
        from envs import make

        return make(args.env, **settings)
    except (ImportError, ValueError) as error:
        alone = getattr(error, "name", None) == "envs"  # a script that was copied without it
        hint = f"--env {args.env}: is no package.module:factory, and a built-in task needs the folder envs/ beside this script"
        raise UserError(hint if alone else str(error)) from error


def adopt(env: VecEnv, args: Args) -> Args:
    """Settings for an environment that was handed over: it has its own size, and gives the run its name if --env does not."""
    own = args.env == Args.env and not type(env).__module__.startswith("envs.")
    if own and args.video_interval:
        raise UserError("--video-interval: films take a second environment; let --env package.module:factory make them")
    return dataclasses.replace(args, num_envs=env.num_envs, env=type(env).__name__ if own else args.env)


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C, and the SIGTERM that announces a cluster's pre-emption: training ends after the running iteration."""
    received = []
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread, so the caller handles signals
                previous = signal.signal(number, lambda number, _: received.append(number))
                stack.callback(signal.signal, number, previous)
        yield received


def tensors_of(agent: dict) -> list[torch.Tensor]:
    """Every tensor that an update changes: weights, statistics, optimizer state, learning rate."""
    tensors = []
    for part in agent.values():
        tensors += [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else [part.lr, *part.state.values()]
    return [tensor.detach() for tensor in tensors]


def check_agent(agent: dict) -> None:
    """Refuse parameters that have left their optimizer's vector, as those of a network changed later: they would not move."""
    optimizers = [part for part in agent.values() if isinstance(part, FlatOptimizer)]
    homes = {x.untyped_storage().data_ptr() for optimizer in optimizers for x in (optimizer.weights, optimizer.gradient)}
    for module in (part for part in agent.values() if isinstance(part, nn.Module)):
        for name, p in module.named_parameters():
            for x in (p, p.grad) if p.requires_grad and p.numel() else ():
                if x is None or x.untyped_storage().data_ptr() not in homes:
                    raise RuntimeError(f"parameter {name} is not trained: change networks before their FlatOptimizer is made")


def resume_state(args: Args, env: VecEnv, agent: dict, storage: TensorDict, episodes: TensorDict) -> dict:
    """What rsl_rl's format has no place for: settings, random streams, the environment and its running episodes."""
    return {
        "args": dataclasses.asdict(args),
        "actor_shapes": agent["actor"].shapes,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if storage.device.type == "cuda" else None,
        "env": env.state_dict() if hasattr(env, "state_dict") else None,
        "episodes": episodes.clone().to_dict(),
    }


def check_resumable(state: dict) -> None:
    """Refuse what could be saved but not read again: torch.load(weights_only=True) takes tensors and plain values alone."""
    for name, part in state.items():
        buffer = io.BytesIO()
        try:
            torch.save(part, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:
            kind = (re.findall(r"GLOBAL (\S+)", str(error)) or [error])[0]
            source = {"args": "Args", "env": "env.state_dict()"}.get(name, name)
            raise UserError(f"{source}: no checkpoint can hold {kind}; use tensors, numbers, strings, lists, dicts") from error


def load_resume_state(resume: dict, env: VecEnv, storage: TensorDict, episodes: TensorDict) -> None:
    if not resume:
        return print("this checkpoint holds no random streams and no environment state (rsl_rl's do not): they start afresh")
    torch.set_rng_state(resume["rng"].cpu())
    if resume["cuda_rng"] is not None and storage.device.type == "cuda":
        torch.cuda.set_rng_state(resume["cuda_rng"].cpu())
    fits = resume["env"] is not None and resume["args"]["num_envs"] == env.num_envs
    if not fits or env.load_state_dict(resume["env"]) is False:
        return print("the environment starts afresh: it cannot restore its whole state, or has another number of environments")
    storage["obs"][-1].update_(env.get_observations().to(storage.device).select(*storage["obs"].keys()))
    episodes.update_(TensorDict(resume["episodes"]))


def start_from(path: pathlib.Path, agent: dict, env: VecEnv, storage: TensorDict, episodes: TensorDict, args: Args) -> int:
    """Go on from a checkpoint; returns how many iterations are finished: with --resume its own, in a new run none."""
    checkpoint = load_checkpoint(path, storage.device)
    saved = checkpoint.get("resume", {}).get("args", {})
    for name in ("activation", "distribution", "std_type", "action_range"):  # which the tensors do not always show
        if saved.get(name, getattr(args, name)) != getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {path} was trained with {saved[name]}")
    if not args.resume:
        name = "student" if "student_state_dict" in checkpoint else "actor"  # PPO fine-tunes what distillation has taught
        restore({name: agent["actor"]}, checkpoint, path)
        print(f"starting from the policy of {path}")
        return 0
    restore(agent, checkpoint, path)
    load_resume_state(checkpoint.get("resume", {}), env, storage, episodes)
    start = checkpoint["iter"] + 1
    print(f"resuming {path} after its {start} iterations, with its learning rate {float(agent['optimizer'].lr):.3g}")
    if start >= args.max_iterations:
        raise UserError(f"--max-iterations {args.max_iterations}: the checkpoint has finished {start} already")
    return start


def train(args: Args, env: VecEnv | None = None) -> list[dict[str, float]]:
    """Train from scratch, or from where a checkpoint ends.

    Args:
        args: all settings.
        env: an environment with the protocol's attributes, which stays open; left out, `args.env` is built.

    Returns:
        One dict of metrics per iteration, keyed by log tags (`Loss/surrogate`, `Train/mean_reward`, ...).
    """
    args = adopt(env, args) if env else args
    check_args(args)
    device = set_up_torch(args)
    path = find_checkpoint(args) if args.resume or args.checkpoint or args.wandb_run_path else None
    own = None if env else make_env(args, device)
    env = env or own
    if env.num_envs != args.num_envs:
        raise UserError(f"--num-envs {args.num_envs}: {args.env} has made {env.num_envs}")
    obs = env.get_observations().to(device)
    actor, critic = make_models(obs, env.num_actions, args)
    optimizer = FlatOptimizer([*actor.parameters(), *critic.parameters()], args.learning_rate, args.optimizer)
    agent = {"actor": actor, "critic": critic, "optimizer": optimizer}
    if args.init_at_random_ep_len:
        env.episode_length_buf = torch.randint_like(env.episode_length_buf, high=int(env.max_episode_length))
    storage = make_storage(obs.select(*actor.shapes, *critic.shapes), env.num_actions, actor, args)  # what is read
    episodes = make_episodes(args, device)
    start = start_from(path, agent, env, storage, episodes, args) if path else 0
    if args.log_root:
        check_resumable(resume_state(args, env, agent, storage, episodes))
    run_dir = make_run_dir(args, env)
    writer = make_writer(args, env, run_dir)

    samples = args.num_envs * args.num_steps_per_env // args.num_mini_batches * args.num_mini_batches
    permutation = torch.zeros(samples, dtype=torch.long, device=device)
    backup = [tensor.clone() for tensor in tensors_of(agent)]  # for the NaN guard
    run_collect, run_update = capture(env, agent, storage, episodes, permutation, args)

    history = []
    with stop_signals() as stop:
        for iteration in range(start, args.max_iterations):
            check_agent(agent)
            torch._foreach_copy_(backup, tensors_of(agent))
            times = [timestamp(device)]
            metrics = run_collect()
            times.append(timestamp(device))
            torch.randperm(samples, out=permutation)  # outside the graph: torch draws short ones on the host
            metrics = metrics | run_update() | {"finite/weights": all_finite(tensors_of(agent))}
            times.append(timestamp(device))
            last = bool(stop) or iteration == args.max_iterations - 1
            metrics = fetch(metrics)
            if not all(value for name, value in metrics.items() if name.startswith("finite/")):
                torch._foreach_copy_(tensors_of(agent), backup)
                if run_dir and iteration > start and not (run_dir / f"model_{iteration - 1}.pt").exists():
                    state = resume_state(args, env, agent, storage, episodes) | {"env": None}
                    save_checkpoint(run_dir / f"model_{iteration - 1}.pt", agent, iteration - 1, state)
                raise FloatingPointError(describe_nan(metrics, iteration, storage, run_dir))
            history.append(summarize(metrics, times, args))
            log_iteration(history[-1], iteration, args, writer)
            if run_dir and (last or iteration % args.save_interval == 0):
                state = resume_state(args, env, agent, storage, episodes)
                save_checkpoint(run_dir / f"model_{iteration}.pt", agent, iteration, state)
                upload(run_dir / f"model_{iteration}.pt", iteration, args, writer)
            if run_dir and args.video_interval and (last or iteration % args.video_interval == 0):
                film_policy(actor, device, args, run_dir / f"video_{iteration}")
                upload(run_dir / f"video_{iteration}.gif", iteration, args, writer)
            if last:
                break
    if run_dir:
        try:
            export_policy(Policy(actor), run_dir / "exported")
        except Exception as error:  # TorchScript, for one, fails where this file was edited meanwhile; nothing is lost
            print(f"not exported ({error}); --export --checkpoint {run_dir / f'model_{iteration}.pt'} does it")
    close(own, writer, args)
    return history


def close(env: VecEnv | None, writer, args: Args) -> None:
    for end in (getattr(env, "close", None), getattr(writer, "stop", None) or getattr(writer, "close", None)):
        if end:
            end()
    if args.logger == "wandb" and writer:
        import wandb

        wandb.finish()


def parse_args() -> Args:
    """The command line, over the settings that the environment recommends; those that apply are printed."""
    first = tyro.cli(Args, args=[x for x in sys.argv[1:] if x not in ("-h", "--help")])
    tuned = recommended(first.env) if first.env_defaults else {}
    args = tyro.cli(Args, default=Args(env=first.env, **tuned), description=__doc__.split("\n\n")[0])
    kept = [f"{name}={value}" for name, value in tuned.items() if getattr(args, name) == value]
    if kept:
        print(f"settings that {args.env} recommends (--no-env-defaults: none): {' '.join(kept)}")
    return args


def recommended(env: str) -> dict[str, Any]:
    try:
        from envs import defaults
    except ImportError:  # a copied script has no `envs` beside it
        return {}
    try:
        settings = defaults(env)
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    return {name: value for name, value in settings.items() if name in Args.__dataclass_fields__}


def main() -> None:
    try:
        args = parse_args()
        if args.play:
            play(args)
        elif args.export:
            path = find_checkpoint(args)
            export_policy(load_policy(path, args=args).module, path.parent / "exported")
        else:
            train(args)
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
