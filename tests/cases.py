"""The trainings that are compared with rsl_rl 5.5.1: live in float32, and in float64 against stored numbers.

A case is (script, environment, Args). Each sets timeout_bootstrap="reference": V(final_obs) is where we differ on purpose.
"""

from __future__ import annotations

import importlib
from typing import Any

SMALL = dict(num_envs=64, max_iterations=10, actor_hidden_dims=(32, 32), critic_hidden_dims=(32, 32), log_root="")
SMALL |= dict(timeout_bootstrap="reference", actor_obs=("policy",), critic_obs=("policy",))
ASYMMETRIC = dict(critic_obs=("policy", "privileged"))
MIRROR_LOSS = dict(num_envs=32, use_mirror_loss=True, mirror_loss_coeff=0.7)
SCHEDULE = dict(rnd_initial_step=40, rnd_final_step=177, rnd_final_value=0.7)
CURIOUS = dict(rnd_weight=3.3, rnd_predictor_hidden_dims=(16, 8), rnd_target_hidden_dims=(24,), rnd_num_outputs=5)
RECURRENT = dict(num_envs=26, num_mini_batches=3, rnn_hidden_dim=12, rnn_num_layers=2)

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
}


def build(name: str) -> tuple[Any, Any, Any]:
    """The case's script module, its Args, and a function that makes a fresh copy of its environment."""
    from envs import make

    script, env_id, settings = CASES[name]
    module = importlib.import_module(script)
    args = module.Args(env=env_id, **settings)
    return module, args, lambda: make(env_id, args.num_envs, seed=args.seed)


def run(module: Any, args: Any, env: Any) -> tuple[list[dict[str, float]], dict]:
    """Train with a script; return its history and its `agent`, caught on the way out."""
    agent: dict = {}
    tensors_of = module.tensors_of

    def spy(parts: dict) -> list:
        agent.update(parts)
        return tensors_of(parts)

    module.tensors_of = spy
    try:
        return module.train(args, env), agent
    finally:
        module.tensors_of = tensors_of
