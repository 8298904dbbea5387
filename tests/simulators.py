"""Stand-ins with the interfaces of mjlab 1.6 and Isaac Lab 3.0, where neither is installed."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

from ppo_lightning.envs import third_party

MJLAB_TASKS = ("Mjlab-Cartpole-Balance", "Mjlab-Velocity-Flat-Unitree-Go1")
ISAAC_TASK = "Isaac-Velocity-Flat-Anymal-C-v0"


@dataclass
class OwnBox:
    """mjlab's spaces are no Gymnasium ones."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: Any = -np.inf
    high: Any = np.inf


@dataclass
class OwnDict:
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    spaces: dict[str, Any] = field(default_factory=dict)


class Simulation:
    """Counts its steps; every episode is cut after four. Groups of observations have two numbers each."""

    groups: tuple[str, ...] = ("actor", "critic")
    shows_final = False

    def __init__(self, num_envs: int, device: str) -> None:
        self.num_envs, self.device = num_envs, device
        self.count = torch.zeros(num_envs)
        self.buffer = torch.zeros(num_envs, 2)  # overwritten in each step
        self.extras: dict[str, Any] = {}

    def observe(self):
        self.buffer[:] = self.count[:, None]
        return dict.fromkeys(self.groups, self.buffer)

    def reset(self, *, seed=None, options=None):
        self.count = torch.zeros(self.num_envs)
        return self.observe(), self.extras

    def step(self, action):
        assert action.shape == (self.num_envs, 3)
        self.count += 1
        over = self.count == 4
        if self.shows_final:
            self.extras["final_obs"] = dict.fromkeys(self.groups, self.count[:, None].repeat(1, 2))
        self.count[over] = 0
        self.extras["log"] = {"Metrics/speed": torch.tensor(0.5)}
        return self.observe(), -action.square().sum(-1), torch.zeros_like(over), over, self.extras


class Mjlab(Simulation):
    def __init__(self, cfg, device):
        super().__init__(cfg.scene.num_envs, device)
        self.cfg = cfg
        self.single_observation_space = OwnDict(spaces={name: OwnBox((2,)) for name in self.groups})
        self.single_action_space = OwnBox((3,))

    unwrapped = property(lambda self: self)

    def close(self):
        pass


class IsaacLab(Simulation, gym.Env):
    groups = ("policy",)

    def __init__(self, cfg):
        Simulation.__init__(self, cfg.num_envs, cfg.device)
        self.cfg = cfg
        self.shows_final = cfg.compute_final_obs
        self.single_observation_space = Dict({"policy": Box(-np.inf, np.inf, (2,), np.float32)})
        self.single_action_space = Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = Dict({"policy": Box(-np.inf, np.inf, (cfg.num_envs, 2), np.float32)})
        self.action_space = Box(-np.inf, np.inf, (cfg.num_envs, 3), np.float32)


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make neither importable."""
    third_party._start_isaac_sim.cache_clear()
    for name in ("mjlab", "mjlab.tasks", "isaaclab", "isaaclab.app"):
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make both importable; returns what Isaac Sim was started with, once for each start."""
    started: list[dict[str, Any]] = []
    third_party._start_isaac_sim.cache_clear()

    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    def make_config(task: str, device: str, num_envs: int) -> Any:
        assert started, "Isaac Lab's other modules are imported after its app was started"
        return SimpleNamespace(device=device, num_envs=num_envs, compute_final_obs=False)

    module("mjlab")
    module("mjlab.tasks")
    module(
        "mjlab.tasks.registry",
        list_tasks=lambda: list(MJLAB_TASKS),
        load_env_cfg=lambda task: SimpleNamespace(
            scene=SimpleNamespace(num_envs=1), seed=None, is_finite_horizon=False
        ),
    )
    module("mjlab.envs", ManagerBasedRlEnv=Mjlab)
    module("isaaclab")
    module("isaaclab.app", AppLauncher=lambda **options: started.append(options))
    module("isaaclab_tasks")
    module("isaaclab_tasks.utils", parse_env_cfg=make_config)
    monkeypatch.setitem(
        gym.registry, ISAAC_TASK, gym.envs.registration.EnvSpec(ISAAC_TASK, IsaacLab, disable_env_checker=True)
    )
    return started
