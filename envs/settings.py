"""Configs of rsl_rl's runner (mjlab's, Isaac Lab's, MuJoCo Playground's tasks bring one), as settings of the scripts."""

from __future__ import annotations

RUNNER = ("num_steps_per_env", "max_iterations", "save_interval", "experiment_name", "clip_actions")
ALGORITHM = (
    *("num_learning_epochs", "num_mini_batches", "learning_rate", "schedule", "gamma", "lam", "entropy_coef", "desired_kl"),
    *("max_grad_norm", "value_loss_coef", "use_clipped_value_loss", "clip_param", "normalize_advantage_per_mini_batch"),
    *("optimizer", "share_cnn_encoders"),
)
RNN = ("rnn_type", "rnn_hidden_dim", "rnn_num_layers")
CNN = ("output_channels", "kernel_size", "stride", "dilation", "padding", "norm", "max_pool", "global_pool")


def from_rsl_rl(cfg: dict) -> dict:
    """Translate a runner config, as nested dicts, to `Args` field names.

    Both layouts are read: `actor` and `critic` (rsl_rl 4 and later) and one `policy` (before). What a config does not say is
    left out, and so are RND and symmetry (`rnd_cfg`, `symmetry_cfg`): they are asked for by running their script. Of the
    encoders of several image groups what they have in common is taken.
    """
    algorithm, groups = cfg.get("algorithm", {}), cfg.get("obs_groups")
    groups = groups if isinstance(groups, dict) else {}
    actor, critic = cfg.get("actor"), cfg.get("critic")
    if isinstance(actor, dict):
        distribution = actor.get("distribution_cfg") or {}
        wanted = {
            "actor_hidden_dims": actor.get("hidden_dims"),
            "critic_hidden_dims": critic.get("hidden_dims"),
            "obs_normalization": actor.get("obs_normalization"),
            "init_std": distribution.get("init_std"),
            "std_type": distribution.get("std_type"),
            "learn_std": distribution.get("learn_std"),
            "action_range": distribution.get("action_range"),
        }
        name = distribution.get("class_name", "")
        kind = "heteroscedastic" if "Heteroscedastic" in name else "beta" if "Beta" in name else None
    else:
        actor = cfg["policy"]
        wanted = {
            "actor_hidden_dims": actor.get("actor_hidden_dims"),
            "critic_hidden_dims": actor.get("critic_hidden_dims"),
            "obs_normalization": actor.get("actor_obs_normalization", cfg.get("empirical_normalization")),
            "init_std": actor.get("init_noise_std"),
            "std_type": actor.get("noise_std_type"),
        }
        kind = "heteroscedastic" if actor.get("state_dependent_std") else None
    wanted |= {name: cfg.get(name) for name in RUNNER} | {name: algorithm.get(name) for name in ALGORITHM}
    activation = {"lrelu": "leakyrelu", "swish": "silu"}.get(actor.get("activation"), actor.get("activation"))  # torch's names
    wanted |= {"activation": activation, "distribution": kind}
    wanted |= {"actor_obs": groups.get("actor", groups.get("policy")), "critic_obs": groups.get("critic")}
    if actor.get("rnn_type"):
        wanted |= {name: actor.get(name) for name in RNN}
    cnn = actor.get("cnn_cfg") or {}
    if all(isinstance(group, dict) for group in cnn.values()):  # one for each image group: what they have in common
        first, *others = cnn.values() if cnn else [{}]
        cnn = {name: value for name, value in first.items() if all(group.get(name) == value for group in others)}
    wanted |= {f"cnn_{name}": value for name, value in cnn.items() if name in CNN}
    return {name: _plain(value) for name, value in wanted.items() if isinstance(value, (bool, int, float, str, list, tuple))}


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
