"""Isaac Lab without Isaac Sim: what its code imports of it (carb, omni, pxr, isaacsim), doing nothing, and a task without physics.

Any module under those names exists, and any name in it is a class that does nothing. Written out is only what Isaac Lab
reads an answer from. All of isaaclab, isaaclab_rl and isaaclab_tasks is the real thing.
"""

import builtins
import importlib.abc
import importlib.machinery
import os
import sys
import types

ROOTS = ("carb", "omni", "pxr", "isaacsim")


class Silent(type):
    """What its classes are asked for is a class like them; they are empty and 0 (`TimelineEventType.STOP`)."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, value := Silent(name, (Nothing,), {"__module__": cls.__module__}))
        return value

    def __bool__(cls):
        return False

    def __int__(cls):
        return 0


class Nothing(metaclass=Silent):
    """Takes every call and has every attribute."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return getattr(type(self), name)

    def __call__(self, *args, **kwargs):
        return Nothing()

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0

    def __int__(self):
        return 0

    def __lt__(self, other):
        return False


class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, value := Silent(name, (Nothing,), {"__module__": self.__name__}))
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ROOTS else None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        vars(module).update({"__file__": __file__} | ANSWERS.get(module.__name__, {}))


# ---- What Isaac Lab reads an answer from ----


class SimulationApp(Nothing):
    started = []  # (its settings, modules of Isaac Lab that had been imported by then)

    def __init__(self, config, experience):
        early = [name for name in sys.modules if name.startswith(("isaaclab_tasks", "isaaclab.envs"))]
        self.started.append((config, early))
        self._start_app()

    def _start_app(self):
        pass


class Settings(Nothing):
    values = {"/rtx/rendermode": ""}

    def get(self, name):
        return self.values.get(name)

    get_as_bool = get

    def set(self, name, value):
        self.values[name] = value

    set_bool = set_int = set_float = set_string = set


class Stage(Nothing):
    def get_stage(self):
        return self


class SimulationContext(Nothing):
    """A simulation that plays."""

    _instance = None

    def __init__(self, **settings):
        SimulationContext._instance, self._settings = self, Settings()

    @classmethod
    def instance(cls):
        return cls._instance

    @classmethod
    def clear_instance(cls):
        SimulationContext._instance = None

    def is_playing(self):
        return True

    def reset(self, soft):
        pass

    def step(self, render):
        pass


class SimulationManager(Nothing):
    @classmethod
    def set_physics_sim_device(cls, device):
        cls.device = device

    @classmethod
    def get_physics_sim_device(cls):
        return cls.device


class GridCloner(Nothing):
    def generate_paths(self, root, number):
        return [f"{root}_{i}" for i in range(number)]


ANSWERS = {
    "carb.settings": {"get_settings": Settings},
    "omni.usd": {"get_context": Stage},
    "pxr": {"Usd": Silent("Usd", (Nothing,), {"Stage": Stage})},
    "isaacsim": {"SimulationApp": SimulationApp},
    "isaacsim.core.api.simulation_context": {"SimulationContext": SimulationContext},
    "isaacsim.core.cloner": {"GridCloner": GridCloner},
    "isaacsim.core.simulation_manager": {"SimulationManager": SimulationManager},
    "isaacsim.core.version": {"get_version": lambda: ("", "", "5", "1", "0")},
}


def install():
    """As `import isaacsim` does: its modules, and what it tells by the environment."""
    sys.meta_path.insert(0, Finder())
    os.environ["EXP_PATH"], builtins.ISAAC_LAUNCHED_FROM_TERMINAL = "", False


# ---- A task ----


def register():
    """`My-Reach-v0` and `My-Reach-Play-v0`: push a point to the origin. What the policy sees is noisy."""
    import gymnasium
    import isaaclab.managers as m
    import torch
    from isaaclab.envs import ManagerBasedRLEnvCfg, mdp
    from isaaclab.scene import InteractiveSceneCfg
    from isaaclab.sim import SimulationCfg
    from isaaclab.utils import configclass
    from isaaclab.utils.noise import UniformNoiseCfg

    class Push(m.ActionTerm):
        action_dim = 2
        raw_actions = processed_actions = None

        def __init__(self, cfg, env):
            super().__init__(cfg, env)
            env.position = torch.zeros(env.num_envs, 2, device=env.device)

        def process_actions(self, actions):
            self.velocity = actions.clone()

        def apply_actions(self):
            self._env.position += self._env.physics_dt * self.velocity

    @configclass
    class PushCfg(m.ActionTermCfg):
        class_type: type = Push
        asset_name: str = "terrain"  # the one asset that every scene has, if only as None

    @configclass
    class Actions:
        push = PushCfg()

    @configclass
    class Policy(m.ObservationGroupCfg):
        position = m.ObservationTermCfg(func=lambda env: env.position, noise=UniformNoiseCfg(n_min=-0.01, n_max=0.01))
        enable_corruption: bool = True

    @configclass
    class Critic(m.ObservationGroupCfg):
        position = m.ObservationTermCfg(func=lambda env: env.position)

    @configclass
    class Observations:
        policy = Policy()
        critic = Critic()

    @configclass
    class Rewards:
        near = m.RewardTermCfg(func=lambda env: -env.position.norm(dim=-1), weight=1.0)

    @configclass
    class Terminations:
        time_out = m.TerminationTermCfg(func=mdp.time_out, time_out=True)
        far = m.TerminationTermCfg(func=lambda env: env.position.abs().amax(dim=-1) > 2.0)

    def scatter(env, env_ids):
        env.position[env_ids] = 2.0 * torch.rand(len(env_ids), 2, device=env.device) - 1.0

    @configclass
    class Events:
        start = m.EventTermCfg(func=scatter, mode="reset")

    @configclass
    class Curriculum:
        steps = m.CurriculumTermCfg(func=lambda env, env_ids: env.common_step_counter)

    @configclass
    class ReachCfg(ManagerBasedRLEnvCfg):
        scene = InteractiveSceneCfg(num_envs=2, env_spacing=1.0)
        sim = SimulationCfg(dt=0.01, render_interval=2, save_logs_to_file=False)
        observations = Observations()
        actions = Actions()
        rewards = Rewards()
        terminations = Terminations()
        events = Events()
        curriculum = Curriculum()
        decimation = 2
        episode_length_s = 1.0

    def quiet():
        cfg = ReachCfg()
        cfg.observations.policy.enable_corruption, cfg.curriculum = False, None
        return cfg

    agents = "isaaclab_tasks.manager_based.classic.cartpole.agents.rsl_rl_ppo_cfg"
    for name, cfg in (("My-Reach-v0", ReachCfg), ("My-Reach-Play-v0", quiet)):
        kwargs = {"env_cfg_entry_point": cfg, "rsl_rl_cfg_entry_point": f"{agents}:CartpolePPORunnerCfg"}
        kwargs["rsl_rl_with_symmetry_cfg_entry_point"] = f"{agents}:CartpolePPORunnerWithSymmetryCfg"
        gymnasium.register(name, "isaaclab.envs:ManagerBasedRLEnv", disable_env_checker=True, kwargs=kwargs)
