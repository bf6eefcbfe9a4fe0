"""ManiSkill 3: `--env maniskill:PickCube-v1`, any task of its registry; `maniskill:my_tasks:Task-v1`, one of my_tasks.

Run here: version 3.0.1 on a CPU, where PhysX holds one environment, so that N are stepped one after the other. NOT RUN: its
simulation on a GPU (`--device cuda`: one environment of N), written to the same calls of its `ManiSkillVectorEnv`.
SAPIEN needs a Vulkan driver, even where nothing is drawn; a software one does: run with SwiftShader, not with Mesa's.

Options are keywords of `gymnasium.make`, `--env-cfg control_mode=pd_ee_delta_pos obs_mode=rgb max_episode_steps=100`.
Observations: the group `policy`; with images `state` and `rgb` (N, C, H, W), `depth` (in metres), all cameras' together.
Actions: [-1, 1] is mapped to the bounds of the control mode and clipped there. Rewards are its `normalized_dense` ones.
"""

from __future__ import annotations

import difflib

import mani_skill.envs  # noqa: F401  fills the registry
import numpy as np
import torch
from gymnasium import make as make_gym
from gymnasium.spaces import Dict
from mani_skill.utils.gym_utils import find_max_episode_steps_value
from mani_skill.utils.registration import REGISTERED_ENVS
from mani_skill.utils.wrappers.flatten import FlattenActionSpaceWrapper, FlattenRGBDObservationWrapper
from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv
from tensordict import TensorDict

from .options import task_of

# ManiSkill's PPO baseline, ppo_fast.py: what all tasks have in common, and (num_envs, num_steps_per_env, gamma, lam, millions
# of env steps, entropy_coef) of those that its baselines.sh and examples.sh train. Its target_kl, 0.1, has no counterpart here.
COMMON = dict(
    num_learning_epochs=8,
    num_mini_batches=32,
    learning_rate=3e-4,
    schedule="fixed",
    use_clipped_value_loss=False,
    value_loss_coef=0.25,  # 0.5 of half the squared error
    max_grad_norm=0.5,
    normalize_advantage_per_mini_batch=True,
    obs_normalization=False,
    actor_hidden_dims=(256, 256, 256),
    critic_hidden_dims=(256, 256, 256),
    activation="tanh",
    std_type="log",
)
TASKS = {
    "PushCube-v1 PickCube-v1 PullCube-v1 PokeCube-v1 LiftPegUpright-v1": (4096, 4, 0.8, 0.9, 50),
    "PickCubeSO100-v1 PickCubeWidowXAI-v1": (4096, 8, 0.8, 0.9, 50),
    "StackCube-v1 PickSingleYCB-v1": (4096, 16, 0.8, 0.9, 50),
    "RollBall-v1": (4096, 16, 0.95, 0.9, 50),
    "PushT-v1": (4096, 16, 0.99, 0.9, 50),
    "AnymalC-Reach-v1": (4096, 16, 0.99, 0.95, 50),
    "PegInsertionSide-v1": (2048, 16, 0.97, 0.95, 75),
    "OpenCabinetDrawer-v1": (1024, 16, 0.8, 0.9, 50),
    "UnitreeG1PlaceAppleInBowl-v1": (1024, 32, 0.8, 0.9, 50),
    "UnitreeG1TransportBox-v1": (1024, 32, 0.8, 0.9, 100),
    "TwoRobotPickCube-v1 TwoRobotStackCube-v1": (1024, 100, 0.8, 0.9, 50),
    "UnitreeH1Stand-v1 UnitreeG1Stand-v1": (1024, 100, 0.99, 0.95, 100),
    "AnymalC-Spin-v1 UnitreeGo2-Reach-v1": (1024, 200, 0.99, 0.95, 50),
    "MS-CartpoleBalance-v1 MS-CartpoleSwingUp-v1": (1024, 250, 0.99, 0.95, 10),
    "MS-AntWalk-v1 MS-AntRun-v1": (2048, 200, 0.97, 0.9, 20, 1e-3),
    "MS-HumanoidStand-v1": (2048, 200, 0.95, 0.9, 40),
    "MS-HumanoidWalk-v1 MS-HumanoidRun-v1": (2048, 200, 0.97, 0.9, 80, 1e-3),
    " ".join(f"TriFingerRotateCubeLevel{i}-v1" for i in range(4)): (128, 250, 0.8, 0.9, 50),
}
OTHERS = (512, 50, 0.8, 0.9, 10)
KEPT = {"num_envs": "--num-envs", "render_mode": "--play"}


class ManiSkillEnv:
    """One `ManiSkillVectorEnv` of N on a GPU, N of one each on a CPU, as a `vec_env.VecEnv`.

    Args:
        vecs: they reset what is done in the same step.
        device: where the tensors go.
        seed: of the first episodes; later ones follow from it and from torch's own stream.
        cfg: what to write to the run folder.
    """

    def __init__(self, vecs, device, seed, cfg):
        base, space = vecs[0].base_env, vecs[0].single_action_space
        self.vecs, self.cfg, self.device = vecs, cfg, torch.device(device)
        self.num_envs, self.num_actions = sum(self._sizes()), int(np.prod(space.shape))
        self.max_episode_length = find_max_episode_steps_value(vecs[0])
        self.step_dt = base.control_timestep  # s
        self._low, self._high = (torch.as_tensor(x, device=base.device) for x in (space.low, space.high))
        if np.isfinite([space.low, space.high]).all():
            self.action_bounds = (-1.0, 1.0)
        seeds = torch.from_numpy(np.random.SeedSequence(seed).generate_state(self.num_envs).astype(np.int64))
        self._obs = self._to_groups([vec.reset(seed=x.tolist())[0] for vec, x in zip(vecs, seeds.split(self._sizes()))])

    @property
    def episode_length_buf(self) -> torch.Tensor:
        """(N,) ManiSkill's own counters, of which the time limit is read; assigning copies into them."""
        return torch.cat([vec.base_env.elapsed_steps for vec in self.vecs]).to(self.device)

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        for vec, part in zip(self.vecs, value.split(self._sizes())):
            vec.base_env.elapsed_steps.copy_(part)

    def get_observations(self) -> TensorDict:
        return self._obs.clone()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        parts = self._to_bounds(actions).split(self._sizes())
        obs, rewards, terminated, truncated, infos = zip(*(vec.step(part) for vec, part in zip(self.vecs, parts)))
        self._obs = self._to_groups(obs)
        final_obs = self._to_groups([info.get("final_observation", x) for x, info in zip(obs, infos)])
        last = [info.get("final_info", info) for info in infos]  # of before the reset
        success = torch.cat([info.get("success", torch.zeros_like(x)) for info, x in zip(last, terminated)])
        rewards, terminated, truncated = (torch.cat(x) for x in (rewards, terminated, truncated))
        dones = terminated | truncated
        # A success ends the episode while rewards flow: without the value of what would have come it would be put off. So does
        # ManiSkill's own PPO (also where an episode fails; here that is an end).
        time_outs = dones & ~(terminated & ~success)
        log = {
            f"Metrics/{name}": torch.cat([info["episode"][name] for info in last])[dones].float()
            for name in ("success_once", "fail_once")
            if name in last[0]["episode"] and dones.any()
        }
        rewards, dones, time_outs = (x.to(self.device) for x in (rewards.float(), dones, time_outs))
        return self._obs.clone(), rewards, dones, {"time_outs": time_outs, "final_obs": final_obs, "log": log}

    def render(self):
        """(H, W, 3) uint8 picture of environment 0; needs `play=True`. None where SAPIEN cannot draw."""
        env = self.vecs[0].base_env
        return env.render()[0].cpu().numpy() if env.render_mode and env.scene.can_render() else None

    def export_metadata(self) -> dict:
        """What [-1, 1] is mapped to, and by which controller: a robot's runner has to do it itself."""
        bounds = {name: getattr(self, f"_{name}").flatten().tolist() for name in ("low", "high")}
        return bounds | {"actions": "[-1, 1] is low, high", "control_mode": str(self.vecs[0].base_env.control_mode)}

    def close(self) -> None:
        for vec in self.vecs:
            vec.close()

    def _sizes(self) -> list[int]:
        return [vec.num_envs for vec in self.vecs]

    def _to_bounds(self, actions: torch.Tensor) -> torch.Tensor:
        """(N, A) in [-1, 1] to the action space; where that is not bounded on both sides, as they are, up to a bound."""
        actions, low, high = actions.to(self._low), self._low, self._high
        scaled = low + (actions.clamp(-1.0, 1.0) + 1.0) / 2.0 * (high - low)
        return torch.where(torch.isfinite(high - low), scaled, actions.clamp(low, high))

    def _to_groups(self, parts) -> TensorDict:
        """Observations of the parts as new tensors."""
        parts = [part if isinstance(part, dict) else {"policy": part} for part in parts]
        groups = {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}
        for name, value in groups.items():
            if name == "depth":
                value = value / 1000.0  # mm
            groups[name] = value.movedim(-1, 1).contiguous() if value.dim() == 4 else value
        return TensorDict(groups, batch_size=[self.num_envs], device=self.device)


def make(name, num_envs, device="cpu", seed=0, cfg=None, play=False, terminations=True) -> ManiSkillEnv:
    """Build a task; `cfg` are keywords of `gymnasium.make`. `play` switches the renderer on."""
    task, options, device = _known(name), dict(cfg or {}), torch.device(device)
    for option in KEPT.keys() & options.keys():
        raise ValueError(f"--env-cfg {option}={options[option]}: say {KEPT[option]}")
    modes = set(str(options.setdefault("obs_mode", "state")).split("+"))
    if not modes <= {"state", "rgb", "depth", "rgbd"}:
        said = f"--env-cfg obs_mode={options['obs_mode']}"
        raise ValueError(f"{said}: no observation groups follow from it; there are state, rgb, depth, rgb+depth")
    gpu = device.index or 0
    options.setdefault("sim_backend", "physx_cpu" if device.type == "cpu" else f"physx_cuda:{gpu}")
    if device.type != "cpu":
        options.setdefault("render_backend", f"sapien_cuda:{gpu}")
    elif not play and modes == {"state"}:
        options.setdefault("render_backend", "none")
    single = options["sim_backend"] in ("cpu", "physx_cpu")

    def build(size):
        env = make_gym(task, num_envs=size, render_mode="rgb_array" if play else None, **options)
        if isinstance(env.unwrapped.single_action_space, Dict):
            env = FlattenActionSpaceWrapper(env)
        if modes != {"state"}:
            env = FlattenRGBDObservationWrapper(env)
        return ManiSkillVectorEnv(env, ignore_terminations=not terminations, record_metrics=True)

    try:
        vecs = [build(size) for size in ([1] * num_envs if single else [num_envs])]
    except EOFError:  # it asks whether to download them, and nobody is there to answer
        command = f"python -m mani_skill.utils.download_asset {task}"
        raise ValueError(f"maniskill:{name}: what it loads is not here; {command}") from None
    except (TypeError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        said = str(error).split(" was raised from")[0].splitlines()[0]
        if isinstance(error, RuntimeError) and ("render" in said or "physical device" in said):
            hint = "; --env-cfg render_backend=none plays without a film" if play else ""
            raise ValueError(f"maniskill:{name}: {said}: SAPIEN needs a Vulkan driver{hint}") from error
        if not cfg:
            raise
        given = " ".join(f"{option}={value}" for option, value in cfg.items())
        raise ValueError(f"--env-cfg {given}: {said}") from error
    return ManiSkillEnv(vecs, device, seed, dict(id=name, num_envs=num_envs, seed=seed, **options))


def defaults(name: str) -> dict:
    """The settings of ManiSkill's own PPO baseline for the task; for others the sizes that its script starts from."""
    task = _known(name)
    num_envs, steps, gamma, lam, millions, *entropy_coef = next(
        (x for tasks, x in TASKS.items() if task in tasks.split()), OTHERS
    )
    iterations = millions * 1_000_000 // (num_envs * steps)
    settings = dict(num_envs=num_envs, num_steps_per_env=steps, gamma=gamma, lam=lam, max_iterations=iterations)
    return COMMON | settings | dict(entropy_coef=entropy_coef[0] if entropy_coef else 0.0)


def _known(name: str) -> str:
    task = task_of(name)
    if task not in REGISTERED_ENVS:
        near = difflib.get_close_matches(task, REGISTERED_ENVS, n=3, cutoff=0.0)
        raise ValueError(f"maniskill:{name}: there is no such task; there are {', '.join(near)}")
    return task
