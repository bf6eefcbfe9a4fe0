"""Run the reference, rsl_rl 5.5.1, on a script's own `Args`, and note what it does. Used by the parity tests and the recorder."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

DISTRIBUTIONS = {
    "gaussian": "rsl_rl.modules.distribution:GaussianDistribution",
    "heteroscedastic": "rsl_rl.modules.distribution:HeteroscedasticGaussianDistribution",
    "beta": "rsl_rl.modules.distribution:BetaDistribution",
}


def configuration(args: Any) -> dict:
    """rsl_rl's configuration that says the same as `args`."""
    distribution = {"class_name": DISTRIBUTIONS[args.distribution]}
    if args.distribution == "beta":
        distribution["action_range"] = args.action_range
    else:
        distribution |= {"init_std": args.init_std, "std_type": args.std_type}
    if args.distribution == "gaussian":
        distribution["learn_std"] = args.learn_std
    model = {"class_name": "MLPModel", "activation": args.activation, "obs_normalization": args.obs_normalization}
    if hasattr(args, "rnn_type"):
        memory = ("rnn_type", "rnn_hidden_dim", "rnn_num_layers")
        model |= {"class_name": "RNNModel"} | {name: getattr(args, name) for name in memory}
    copied = ["num_learning_epochs", "num_mini_batches", "clip_param", "gamma", "lam", "value_loss_coef", "entropy_coef"]
    copied += ["learning_rate", "max_grad_norm", "optimizer", "use_clipped_value_loss", "schedule", "desired_kl"]
    copied += ["normalize_advantage_per_mini_batch"]
    return {
        "num_steps_per_env": args.num_steps_per_env,
        "save_interval": 10**9,
        "obs_groups": {"actor": list(args.actor_obs), "critic": list(args.critic_obs)},
        "actor": model | {"hidden_dims": list(args.actor_hidden_dims), "distribution_cfg": distribution},
        "critic": model | {"hidden_dims": list(args.critic_hidden_dims)},
        "algorithm": {"class_name": "PPO"} | {name: getattr(args, name) for name in copied},
    }


def add_cnns(config: dict, args: Any, env: Any) -> None:
    """Make a model that reads images, groups (N, C, H, W), a CNNModel; and let the environment give them as floats."""
    images = {group for group, x in env.get_observations().items() if x.dim() == 4}
    names = ("output_channels", "kernel_size", "stride", "dilation", "norm", "max_pool", "padding", "global_pool")
    settings = {name: getattr(args, f"cnn_{name}") for name in names}
    for model in ("actor", "critic"):
        groups = [group for group in config["obs_groups"][model] if group in images]
        cnn_cfg = {
            group: {name: value[group] if isinstance(value, dict) else value for name, value in settings.items()}
            | {"activation": args.activation}
            for group in groups
        }
        config[model] |= {"class_name": "CNNModel", "cnn_cfg": cnn_cfg} if groups else {}
    config["algorithm"]["share_cnn_encoders"] = args.share_cnn_encoders

    def as_float(obs):
        return obs.apply(lambda x: x / 255.0 if x.dtype == torch.uint8 else x)

    step, get_observations = env.step, env.get_observations
    env.get_observations = lambda: as_float(get_observations())
    env.step = lambda actions: (lambda obs, *rest: (as_float(obs), *rest))(*step(actions))


def list_shared_encoder_once(algorithm: Any) -> None:
    """rsl_rl has the parameters of a shared encoder in its optimizer, and clips their gradients, twice; here once."""
    everything = list(dict.fromkeys([*algorithm.actor.parameters(), *algorithm.critic.parameters()]))
    algorithm.optimizer = type(algorithm.optimizer)(everything, lr=algorithm.learning_rate)
    actors = set(algorithm.actor.parameters())
    critics = [parameter for parameter in algorithm.critic.parameters() if parameter not in actors]
    algorithm.critic.parameters = lambda: iter(critics)


def add_rnd(config: dict, args: Any, env: Any) -> None:
    """RND as ppo_rnd.py has it; rnd_final_value is scaled by step_dt here, since rsl_rl scales only the other weight."""
    rnd = {
        "predictor_hidden_dims": list(args.rnd_predictor_hidden_dims),
        "target_hidden_dims": list(args.rnd_target_hidden_dims),
    }
    for name in ("weight", "num_outputs", "learning_rate", "state_normalization", "reward_normalization"):
        rnd[name] = getattr(args, f"rnd_{name}")
    schedule = {"mode": args.rnd_weight_schedule, "initial_step": args.rnd_initial_step, "final_step": args.rnd_final_step}
    rnd["weight_schedule"] = schedule | {"final_value": args.rnd_final_value * env.step_dt}
    config["obs_groups"]["rnd_state"] = list(args.rnd_obs)
    config["algorithm"]["rnd_cfg"] = rnd
    env.unwrapped = env  # where rsl_rl looks for step_dt


def add_symmetry(config: dict, args: Any, env: Any) -> None:
    names = ("use_data_augmentation", "use_mirror_loss", "mirror_loss_coeff")
    config["algorithm"]["symmetry_cfg"] = {name: getattr(args, name) for name in names} | {
        "data_augmentation_func": env.symmetry
    }


def make_runner(args: Any, env: Any, log_dir: str | None = None, config: dict | None = None, device: str = "cpu"):
    """rsl_rl's OnPolicyRunner, seeded like the scripts."""
    from rsl_rl.runners import OnPolicyRunner

    config = config or configuration(args)
    if hasattr(args, "share_cnn_encoders"):
        add_cnns(config, args, env)
    if hasattr(args, "rnd_obs"):
        add_rnd(config, args, env)
    if hasattr(args, "use_mirror_loss"):
        add_symmetry(config, args, env)
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        runner = OnPolicyRunner(env, config, log_dir=log_dir, device=device)
    if getattr(args, "share_cnn_encoders", False):
        list_shared_encoder_once(runner.alg)
    return runner


def run(args: Any, env: Any, config: dict | None = None, device: str = "cpu") -> tuple[list[dict[str, float]], Any]:
    """Train `args.max_iterations` iterations; return each one's losses, learning rate and mean std, and the runner.

    Two things are changed. rsl_rl draws and discards an action sample in every mini-batch's forward pass, which only moves
    the random stream on: during the update that draw is left out here, since no script draws it. And its GAE rounds gamma
    to float32 (`dones.float() * gamma`), which in a float64 run would be the only float32 number: there `.float()` means
    the default dtype.
    """
    runner = make_runner(args, env, config=config, device=device)
    history, algorithm = [], runner.alg
    update = algorithm.update

    def update_without_draws() -> dict[str, float]:
        distribution = algorithm.get_policy().distribution
        distribution.sample = lambda: distribution.mean
        losses = update()
        del distribution.sample
        numbers = {f"Loss/{name}": value for name, value in losses.items()}
        numbers["Loss/learning_rate"] = algorithm.learning_rate
        numbers["Policy/mean_std"] = algorithm.get_policy().output_std.mean().item()
        history.append(numbers)
        return losses

    algorithm.update = update_without_draws
    to_float, torch.Tensor.float = torch.Tensor.float, lambda self: self.to(torch.get_default_dtype())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(args.max_iterations, init_at_random_ep_len=args.init_at_random_ep_len)
    finally:
        torch.Tensor.float = to_float
    return history, runner


def assert_equal(module: Any, args: Any, make_env: Any) -> None:
    """The script's training equals rsl_rl's to the last bit: what each iteration logs, and the last weights.

    Args:
        make_env: makes one environment after the other (a simulator may have one at a time); they are closed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else sums are taken in other orders
    try:
        env = make_env()
        args = module.choose_groups(env.get_observations(), args)
        expected, runner = run(args, env)
        env.close()
        env = make_env()
        history = module.train(args, env)
        env.close()
    finally:
        torch.set_num_threads(threads)
    assert len(history) == len(expected) == args.max_iterations
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        assert {tag: ours[tag] for tag in theirs} == theirs, f"iteration {iteration}"
    for part in ("actor", "critic"):
        for key, x in getattr(history.agent, part).state_dict().items():
            assert torch.equal(x, getattr(runner.alg, part).state_dict()[key]), f"{part} {key}"


def distillation_configuration(args: Any, teacher: Any, shapes: dict[str, tuple[int, ...]]) -> dict:
    """rsl_rl's configuration of distill_dagger.py's student, and of a teacher that a PPO script trained with `teacher`'s Args."""
    models = {"student": (args, args.student_hidden_dims, args.student_obs)}
    models["teacher"] = (teacher, teacher.actor_hidden_dims, teacher.actor_obs)
    config = {"num_steps_per_env": args.num_steps_per_env, "save_interval": 10**9, "obs_groups": {}}
    for name, (settings, hidden_dims, groups) in models.items():
        config["obs_groups"][name] = list(groups)
        distribution = {"class_name": DISTRIBUTIONS[settings.distribution]}
        if settings.distribution == "beta":
            distribution["action_range"] = settings.action_range
        else:
            distribution |= {"init_std": settings.init_std, "std_type": settings.std_type}
        model = {"class_name": "MLPModel", "activation": settings.activation, "obs_normalization": settings.obs_normalization}
        if getattr(settings, "rnn_type", "none") != "none":
            memory = ("rnn_type", "rnn_hidden_dim", "rnn_num_layers")
            model |= {"class_name": "RNNModel"} | {key: getattr(settings, key) for key in memory}
        images = [group for group in groups if len(shapes[group]) == 3]
        if images:
            names = ("output_channels", "kernel_size", "stride", "dilation", "norm", "max_pool", "padding", "global_pool")
            cnn = {key: getattr(settings, f"cnn_{key}") for key in names} | {"activation": settings.activation}
            model |= {"class_name": "CNNModel", "cnn_cfg": {group: cnn for group in images}}
        config[name] = model | {"hidden_dims": list(hidden_dims), "distribution_cfg": distribution}
    copied = ("num_learning_epochs", "gradient_length", "learning_rate", "max_grad_norm", "loss_type", "optimizer")
    config["algorithm"] = {"class_name": "Distillation"} | {name: getattr(args, name) for name in copied}
    return config


def make_distillation_runner(args: Any, env: Any, teacher: Any, device: str = "cpu"):
    """rsl_rl's DistillationRunner, seeded like the script, its teacher loaded."""
    from rsl_rl.runners import DistillationRunner

    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        shapes = {group: tuple(x.shape[1:]) for group, x in env.get_observations().items()}
        runner = DistillationRunner(env, distillation_configuration(args, teacher, shapes), log_dir=None, device=device)
        runner.load(args.teacher[0])
    return runner


def run_distillation(args: Any, env: Any, teacher: Any) -> tuple[list[dict[str, float]], Any]:
    """Distil `args.max_iterations` iterations from `args.teacher`; return what each one logs, and the runner."""
    runner, history = make_distillation_runner(args, env, teacher), []
    algorithm, update = runner.alg, runner.alg.update

    def noted() -> dict[str, float]:
        losses = update()
        numbers = {f"Loss/{name}": value for name, value in losses.items()}
        numbers["Loss/learning_rate"] = algorithm.learning_rate
        numbers["Policy/mean_std"] = algorithm.get_policy().output_std.mean().item()
        history.append(numbers)
        return losses

    algorithm.update = noted
    with contextlib.redirect_stdout(io.StringIO()):
        runner.learn(args.max_iterations, init_at_random_ep_len=args.init_at_random_ep_len)
    return history, runner
