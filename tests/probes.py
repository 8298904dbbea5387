"""Small environments that isolate one thing each."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

OBSERVATION = Box(-10.0, 10.0, (1,), np.float32)


class Probe(gym.Env):
    """Base: one number to see, two actions, episodes of one step."""

    def __init__(self) -> None:
        self.observation_space = OBSERVATION
        self.action_space = Discrete(2)

    def see(self, value: float) -> np.ndarray:
        return np.array([value], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return self.see(0.0), {}


class ConstantReward(Probe):
    """The value of everything is 1: only the critic's bias is needed."""

    def step(self, action):
        return self.see(0.0), 1.0, True, False, {}


class RewardIsObservation(Probe):
    """The value is what is seen: the critic must read observations."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        return self.see(self.sign), {}

    def step(self, action):
        return self.see(self.sign), self.sign, True, False, {}


class DelayedReward(Probe):
    """Two steps, the reward at the second: V(first) = γ V(second) = γ."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(-1.0), {}

    def step(self, action):
        self.steps += 1
        return self.see(1.0), float(self.steps == 2), self.steps == 2, False, {}


class ActionMatters(Probe):
    """Action 1 is right."""

    def step(self, action):
        return self.see(0.0), 1.0 if action == 1 else -1.0, True, False, {}


class ActionMustMatch(Probe):
    """The right action is what is seen."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        return self.see(self.sign), {}

    def step(self, action):
        right = (action == 1) == (self.sign > 0)
        return self.see(self.sign), float(right), True, False, {"is_success": bool(right)}


class Target(Probe):
    """A continuous action must hit 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.see(0.0), -float((action[0] - 0.5) ** 2), True, False, {}


class Endless(Probe):
    """Reward 1 for ever, cut every ``limit`` steps: the value is 1 / (1 - γ) if, and only if, truncation bootstraps."""

    def __init__(self, limit: int = 20) -> None:
        super().__init__()
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(0.0), {}

    def step(self, action):
        self.steps += 1
        return self.see(0.0), 1.0, False, self.steps >= self.limit, {}


class Scripted(Probe):
    """Episodes of given lengths and ends, whatever the actions; what is seen says which episode and step it is.

    Args:
        script: (length, "terminated" or "truncated") of each episode, repeated.
    """

    def __init__(
        self, script: Sequence[tuple[int, str]] = ((3, "terminated"), (2, "truncated"), (5, "terminated"))
    ) -> None:
        super().__init__()
        self.script = script
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        return self.see(self.episode), {}

    def step(self, action):
        self.steps += 1
        length, end = self.script[self.episode % len(self.script)]
        over = self.steps == length
        reward = self.episode + 0.1 * self.steps
        return (
            self.see(self.episode + 0.01 * self.steps),
            reward,
            over and end == "terminated",
            over and end == "truncated",
            {},
        )


class Faulty(Probe):
    """Does one thing wrong at one call: ``step`` number ``at`` of every episode, or ``reset``."""

    def __init__(self, fault: str, at: int = 3, where: str = "step", spare_first_reset: bool = False) -> None:
        super().__init__()
        self.fault, self.at, self.where, self.resets = fault, at, where, 0
        self.spare = spare_first_reset

    def _spoil(self, reward: float):
        match self.fault:
            case "raise":
                raise ZeroDivisionError("the pole is at infinity")
            case "nan observation":
                return self.see(np.nan), reward
            case "inf observation":
                return self.see(np.inf), reward
            case "nan reward":
                return self.see(0.0), np.nan
            case "inf reward":
                return self.see(0.0), -np.inf
            case "none reward":
                return self.see(0.0), None
            case "shape":
                return np.zeros(3, np.float32), reward
            case "scalar":
                return np.float32(0.0), reward
            case "dtype":
                return np.zeros(1, np.float64), reward
            case "hang":
                import time

                time.sleep(60)
            case "die":
                import os

                os.kill(os.getpid(), 9)
        raise AssertionError(self.fault)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.resets += 1
        if self.where == "reset" and not (self.spare and self.resets == 1):
            return self._spoil(0.0)[0], {}
        return self.see(0.0), {}

    def step(self, action):
        self.steps += 1
        observation, reward = self.see(0.0), 1.0
        if self.where == "step" and self.steps == self.at:
            observation, reward = self._spoil(reward)
        return observation, reward, False, self.steps >= 5, {}


class DiscreteWorld(gym.Env):
    """A corridor of five cells, numbered from 3, in which action 8 walks right and 7 left; the end is worth 1."""

    def __init__(self) -> None:
        self.observation_space = Discrete(5, start=3)
        self.action_space = Discrete(2, start=7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 3
        return self.cell, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.cell = max(3, self.cell + (1 if action == 8 else -1))
        return self.cell, float(self.cell == 7), self.cell == 7, False, {"is_success": self.cell == 7}


class Uneven(Probe):
    """Episodes whose length is their return, long and short ones drawn at random: 1 or 50 steps."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.choice([1, 50]))
        return self.see(0.0), {}

    def step(self, action):
        self.steps += 1
        return self.see(0.0), 1.0, self.steps == self.length, False, {}
