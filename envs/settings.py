"""Configs of rsl_rl's runner (mjlab's, Isaac Lab's, MuJoCo Playground's tasks bring one), as settings of the scripts."""

from __future__ import annotations

import functools

RUNNER = ("num_steps_per_env", "max_iterations", "save_interval", "experiment_name", "clip_actions", "init_at_random_ep_len")
ALGORITHM = (
    *("num_learning_epochs", "num_mini_batches", "learning_rate", "schedule", "gamma", "lam", "entropy_coef", "desired_kl"),
    *("max_grad_norm", "value_loss_coef", "use_clipped_value_loss", "clip_param", "normalize_advantage_per_mini_batch"),
    *("optimizer", "share_cnn_encoders", "gradient_length", "loss_type", "use_mixed_precision"),
)
RNN = ("rnn_type", "rnn_hidden_dim", "rnn_num_layers")
CNN = ("output_channels", "kernel_size", "stride", "dilation", "padding", "norm", "max_pool", "global_pool", "temperature")
SYMMETRY = ("use_data_augmentation", "use_mirror_loss", "mirror_loss_coeff")
DISTRIBUTION = ("init_std", "std_type", "learn_std", "action_range", "class_name")
# What the scripts decide by themselves, by their name or their flags.
OWN = ("seed", "device", "logger", "run_name", "wandb_project", "neptune_project", "resume", "load_run", "load_checkpoint")
OWN += ("store_code_state", "upload_model", "class_name", "torch_compile_mode", "obs_groups", "empirical_normalization")
OWN += ("check_for_nan",)

say = functools.cache(print)  # once


def from_rsl_rl(cfg: dict) -> dict:
    """Translate a runner config, as nested dicts, to `Args` field names.

    Both layouts are read: `actor` and `critic`, or `student` (rsl_rl 4 and later), and one `policy` (before). What a config
    does not say is left out, also what Isaac Lab calls MISSING, which comes as {}. RND and symmetry (`rnd_cfg`,
    `symmetry_cfg`) are asked for by running their script. Of the encoders of several image groups what they have in common
    is taken. What is said and has no counterpart here is printed, once.
    """
    algorithm = cfg.get("algorithm", {})
    groups = cfg["obs_groups"] if isinstance(cfg.get("obs_groups"), dict) else {}
    old = bool(cfg.get("policy"))  # Isaac Lab 3 has both, `policy` MISSING
    actor = cfg["policy"] if old else cfg.get("actor") or cfg.get("student") or {}
    critic = {} if old else cfg.get("critic") or cfg.get("teacher") or {}
    distribution = actor.get("distribution_cfg") or {}
    students = "student_hidden_dims" in actor or (not old and "student" in cfg)

    def told(*values):
        """The first value that is one."""
        return next((x for x in values if isinstance(x, (bool, int, float, str, list, tuple))), None)

    wanted = {name: cfg.get(name) for name in RUNNER} | {name: algorithm.get(name) for name in ALGORITHM}
    wanted |= {
        "activation": _activation(actor),
        "init_std": told(distribution.get("init_std"), actor.get("init_noise_std")),
        "std_type": told(distribution.get("std_type"), actor.get("noise_std_type")),
        "learn_std": distribution.get("learn_std"),
        "action_range": distribution.get("action_range"),
        "obs_normalization": told(
            *(actor.get(name) for name in ("obs_normalization", "actor_obs_normalization", "student_obs_normalization")),
            cfg.get("empirical_normalization"),
        ),
    }
    if students:
        wanted["student_hidden_dims"] = told(actor.get("student_hidden_dims"), actor.get("hidden_dims"))
        wanted |= {"student_obs": told(groups.get("student"), groups.get("policy")), "teacher_obs": groups.get("teacher")}
    else:
        wanted["actor_hidden_dims"] = told(actor.get("actor_hidden_dims"), actor.get("hidden_dims"))
        wanted["critic_hidden_dims"] = told(actor.get("critic_hidden_dims"), critic.get("hidden_dims"))
        wanted |= {"actor_obs": told(groups.get("actor"), groups.get("policy")), "critic_obs": groups.get("critic")}
    name = distribution.get("class_name", "")
    if "Heteroscedastic" in name or actor.get("state_dependent_std") is True:
        wanted["distribution"] = "heteroscedastic"
    elif "Beta" in name:
        wanted["distribution"] = "beta"
    wanted |= {name: (algorithm.get("symmetry_cfg") or {}).get(name) for name in SYMMETRY}
    if told(actor.get("rnn_type")):
        wanted |= {name: actor.get(name) for name in RNN}
    if not students:  # what the critic has otherwise
        normalization = told(actor.get("critic_obs_normalization"), critic.get("obs_normalization"))
        others = {"activation": _activation(critic), "obs_normalization": normalization}
        if wanted.get("rnn_type") and critic and not told(critic.get("rnn_type")):
            others["rnn_type"] = "none"
        for name, other in others.items():
            if told(wanted[name]) is not None and told(other) not in (None, wanted[name]):
                wanted[name] = {"actor": wanted[name], "critic": other}
    cnn = actor.get("cnn_cfg") or {}
    if all(isinstance(group, dict) for group in cnn.values()):  # one for each image group: what they have in common
        first, *others = cnn.values() if cnn else [{}]
        cnn = {name: value for name, value in first.items() if all(group.get(name) == value for group in others)}
    cnn = {"stride": 1} | cnn if cnn else cnn  # rsl_rl's, where it is not said
    if "SpatialSoftmax" in actor.get("class_name", ""):  # mjlab's: it takes the place of a pooling
        cnn = cnn | {"global_pool": "spatial_softmax", "temperature": cnn.get("spatial_softmax_temperature")}
    wanted |= {f"cnn_{name}": value for name, value in cnn.items() if name in CNN}
    settings = {name: _plain(value) for name, value in wanted.items() if told(value) is not None or _by_network(value)}
    left = _left(cfg, actor, critic, old, settings)
    if left:
        say(f"the task's configuration also says, and no setting here does: {', '.join(left)}")
    return settings


def _left(cfg, actor, critic, old, settings) -> list[str]:
    """What a config says and `settings` do not, as `path value`."""
    left = []

    def look(path, part, known):
        for name, value in part.items():
            foreign = name == "class_name" and ":" in str(value) and not str(value).startswith("rsl_rl")
            if (name not in known or foreign) and value not in (None, {}, [], (), "", False):
                left.append(f"{path}{name} {value}")

    models = ("policy", "actor", "critic", "student", "teacher")
    scripts = {"rnd_cfg": "ppo_rnd.py", "symmetry_cfg": "ppo_symmetry.py"}
    look("", cfg, (*RUNNER, *OWN, *models, "algorithm"))
    look("algorithm.", cfg.get("algorithm", {}), (*ALGORITHM, *OWN, *scripts))
    left += [f"algorithm.{name} (run {script})" for name, script in scripts.items() if cfg.get("algorithm", {}).get(name)]
    name = "policy" if old else "actor" if "actor" in cfg else "student"
    known = ("activation", "hidden_dims", "obs_normalization", "distribution_cfg", "cnn_cfg", "class_name", *RNN)
    known += ("init_noise_std", "noise_std_type", "state_dependent_std", "stochastic")
    known += tuple(f"{part}_{x}" for part in ("actor", "critic", "student", "teacher") for x in known[1:3])
    look(f"{name}.", actor, known)
    distribution, cnn = actor.get("distribution_cfg") or {}, actor.get("cnn_cfg") or {}
    usual = tuple(distribution.get("std_range") or ()) == (1e-6, 1e6)  # rsl_rl's, and ours
    look(f"{name}.distribution_cfg.", distribution, (*DISTRIBUTION, "std_range") if usual else DISTRIBUTION)
    for path, group in cnn.items() if all(isinstance(group, dict) for group in cnn.values()) else [("", cnn)]:
        same = ("activation",) if group.get("activation") == actor.get("activation") else ()  # one for all layers here
        look(f"{name}.cnn_cfg.{path}{path and '.'}", group, (*CNN, *same, "flatten"))
    other, its = ("critic", critic) if "teacher" not in cfg else ("teacher", {})  # a teacher's network is its checkpoint's
    look(f"{other}.", its, known)
    if its and its.get("rnn_type") != actor.get("rnn_type") and not _by_network(settings.get("rnn_type")):
        left.append(f"{other}.rnn_type {its.get('rnn_type')}")
    for setting in ("rnn_hidden_dim", "rnn_num_layers", "cnn_cfg"):
        if its.get(setting) and its.get(setting) != actor.get(setting):
            left.append(f"{other}.{setting} {its.get(setting)}")
    return left


def _activation(model: dict):
    """In torch's name."""
    return {"lrelu": "leakyrelu", "swish": "silu"}.get(model.get("activation"), model.get("activation"))


def _by_network(value) -> bool:
    return isinstance(value, dict) and value.keys() == {"actor", "critic"}


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
