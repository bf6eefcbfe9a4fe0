"""The trainings that are compared with rsl_rl 5.5.1: live in float32, and in float64 against stored numbers.

A case is (script, environment, Args). Each sets timeout_bootstrap="value": V(final_obs) is where we differ on purpose.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch

SMALL = dict(num_envs=64, max_iterations=10, actor_hidden_dims=(32, 32), critic_hidden_dims=(32, 32), log_root="")
SMALL |= dict(timeout_bootstrap="value", actor_obs=("policy",), critic_obs=("policy",))
ASYMMETRIC = dict(critic_obs=("policy", "privileged"))
MIRROR_LOSS = dict(num_envs=32, use_mirror_loss=True, mirror_loss_coeff=0.7)
SCHEDULE = dict(rnd_initial_step=40, rnd_final_step=177, rnd_final_value=0.7)
CURIOUS = dict(rnd_weight=3.3, rnd_predictor_hidden_dims=(16, 8), rnd_target_hidden_dims=(24,), rnd_num_outputs=5)
RECURRENT = dict(num_envs=26, num_mini_batches=3, rnn_hidden_dim=12, rnn_num_layers=2)
STUDENT = dict(num_envs=16, max_iterations=10, num_steps_per_env=30, student_hidden_dims=(16,), log_root="")
STUDENT |= dict(teacher=("teacher.pt",), teacher_obs=("policy", "privileged"), student_obs=("policy",), init_std=0.5)
TEACHER = types.SimpleNamespace(  # what rsl_rl has to be told of the teacher that `write_teacher` makes
    **dict(actor_hidden_dims=(16, 8), actor_obs=("policy", "privileged"), obs_normalization=True, activation="elu"),
    **dict(distribution="gaussian", std_type="scalar", init_std=1.0),
)

# Every script once or twice on a device other than the CPU: (script, environment, Args), shortened by SHORT.
SHORT = dict(num_envs=16, num_steps_per_env=5, num_learning_epochs=1, log_root="")
EVERYWHERE: list[tuple[str, str, dict[str, Any]]] = [
    ("ppo_continuous", "quadruped", {}),
    ("ppo_continuous", "cartpole", dict(std_type="log", clip_actions=1.0, optimizer="sgd")),
    ("ppo_rnn", "navigation-cue", dict(rnn_type="gru")),
    ("ppo_rnn", "quadruped", dict(rnn_type="lstm", optimizer="adamw")),
    ("ppo_cnn", "navigation-pixels", {}),
    ("ppo_cnn", "quadruped-rough", dict(actor_obs=("policy", "scan"), share_cnn_encoders=True)),
    ("ppo_rnd", "navigation-maze", dict(rnd_weight_schedule="linear", rnd_final_step=8)),
    ("ppo_symmetry", "quadruped", dict(use_mirror_loss=True)),
    ("ppo_multigpu", "quadruped", dict(distribution="heteroscedastic")),
    (
        "distill_dagger",
        "navigation-cue",
        dict(student_obs=("policy",), teacher_obs=("policy", "privileged"), rnn_type="gru", gradient_length=5),
    ),
]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cartpole": ("ppo_continuous", "cartpole", SMALL),
    "cartpole-log-std": ("ppo_continuous", "cartpole", SMALL | dict(std_type="log", seed=2, activation="tanh")),
    "cartpole-beta": ("ppo_continuous", "cartpole", SMALL | dict(distribution="beta", seed=3)),
    "cartpole-heteroscedastic": (
        "ppo_continuous",
        "cartpole",
        SMALL | dict(distribution="heteroscedastic", schedule="fixed", use_clipped_value_loss=False, gamma=0.97),
    ),
    "cartpole-heteroscedastic-log": (
        "ppo_continuous",
        "cartpole",
        SMALL | dict(distribution="heteroscedastic", std_type="log", optimizer="sgd", learning_rate=0.01),
    ),
    "cartpole-adamw": (
        "ppo_continuous",
        "cartpole",
        SMALL | dict(optimizer="adamw", normalize_advantage_per_mini_batch=True, num_mini_batches=7, obs_normalization=False),
    ),
    "cartpole-fixed-std": ("ppo_continuous", "cartpole", SMALL | dict(learn_std=False, init_std=0.5, max_grad_norm=0.05)),
    "quadruped": ("ppo_continuous", "quadruped", SMALL | ASYMMETRIC | dict(num_envs=32)),
    "quadruped-seed-7": (
        "ppo_continuous",
        "quadruped",
        SMALL | ASYMMETRIC | dict(num_envs=32, seed=7, num_learning_epochs=2, init_at_random_ep_len=False),
    ),
    "cue-lstm": ("ppo_rnn", "navigation-cue", SMALL | ASYMMETRIC | RECURRENT | dict(rnn_type="lstm")),
    "cue-gru": ("ppo_rnn", "navigation-cue", SMALL | ASYMMETRIC | RECURRENT | dict(rnn_type="gru")),
    "symmetry-augmentation": ("ppo_symmetry", "quadruped", SMALL | ASYMMETRIC | dict(num_envs=32, use_data_augmentation=True)),
    "symmetry-mirror": ("ppo_symmetry", "quadruped", SMALL | ASYMMETRIC | MIRROR_LOSS | dict(use_data_augmentation=False)),
    "symmetry-both": ("ppo_symmetry", "quadruped", SMALL | ASYMMETRIC | MIRROR_LOSS | dict(use_data_augmentation=True)),
    "symmetry-logging": ("ppo_symmetry", "quadruped", SMALL | ASYMMETRIC | dict(num_envs=32, use_data_augmentation=False)),
    "rnd-plain": ("ppo_rnd", "navigation-maze", SMALL | CURIOUS | dict(rnd_obs=("rnd",))),
    "rnd-state-step": (
        "ppo_rnd",
        "cartpole",
        SMALL | CURIOUS | SCHEDULE | dict(rnd_obs=("policy",), rnd_state_normalization=True, rnd_weight_schedule="step"),
    ),
    "rnd-both-linear": (
        "ppo_rnd",
        "navigation-maze",
        SMALL
        | CURIOUS
        | SCHEDULE
        | dict(
            rnd_obs=("rnd",), rnd_state_normalization=True, rnd_reward_normalization=True, rnd_weight_schedule="linear", seed=2
        ),
    ),
    "distill-mlp": ("distill_dagger", "navigation-cue", STUDENT),
    "distill-mlp-epochs": (
        "distill_dagger",
        "quadruped",
        STUDENT | dict(num_steps_per_env=24, gradient_length=16, num_learning_epochs=2, loss_type="huber", max_grad_norm=0.05),
    ),
    "distill-gru": ("distill_dagger", "navigation-cue", STUDENT | dict(rnn_type="gru", rnn_hidden_dim=12, seed=2)),
    "distill-lstm": (
        "distill_dagger",
        "navigation-cue",
        STUDENT | dict(rnn_type="lstm", rnn_hidden_dim=12, rnn_num_layers=2, gradient_length=5, num_learning_epochs=2, seed=3),
    ),
}


def build(name: str) -> tuple[Any, Any, Any]:
    """The case's script module, its Args, and a function that makes a fresh copy of its environment."""
    from envs import make

    script, env_id, settings = CASES[name]
    module = importlib.import_module(script)
    args = module.Args(env=env_id, device="cpu", **settings)  # the numbers are a CPU's
    if script == "distill_dagger":
        write_teacher(args.teacher[0], make(env_id, 1))
    return module, args, lambda: make(env_id, args.num_envs, seed=args.seed)


def write_teacher(path: str, env: Any, groups=None) -> None:
    """A checkpoint in rsl_rl's format of an untrained teacher, TEACHER."""
    generator = torch.Generator().manual_seed(0)
    size = sum(env.get_observations()[group].shape[1] for group in groups or TEACHER.actor_obs)
    sizes = [size, *TEACHER.actor_hidden_dims, env.num_actions]
    state = {"distribution.std_param": torch.ones(env.num_actions), "obs_normalizer._mean": torch.full((1, size), 0.1)}
    state |= {"obs_normalizer._var": torch.full((1, size), 0.25), "obs_normalizer._std": torch.full((1, size), 0.5)}
    state |= {"obs_normalizer.count": torch.tensor(1000)}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        state[f"mlp.{2 * layer}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"mlp.{2 * layer}.bias"] = torch.zeros(outputs)
    torch.save({"actor_state_dict": state, "iter": 0, "infos": None}, path)


def run(module: Any, args: Any, env: Any) -> tuple[list[dict[str, float]], dict]:
    """Train with a script; return its history and the parts of its agent by name."""
    history = module.train(args, env)
    return history, vars(history.agent)
