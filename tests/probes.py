"""Small environments that isolate one thing each."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from ppo_lightning.envs.small import Dials as Dials
from ppo_lightning.envs.small import Lock as Lock
from ppo_lightning.envs.small import Recall as Recall
from ppo_lightning.spaces import action_dims

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
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float32)
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
            case "exit":
                raise SystemExit(3)
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


class Spaces(gym.Env):
    """Any spaces: random observations, a reward that says whether a mask was kept, episodes of a few steps.

    Args:
        observation: name in ``OBSERVATIONS``.
        action: name in ``ACTIONS``.
        masked: give a random mask over the discrete choices, which then must be kept.
    """

    def __init__(self, observation: str = "flat", action: str = "discrete", masked: bool = False) -> None:
        self.masked = masked
        self.observation_space = OBSERVATIONS[observation]
        self.action_space = ACTIONS[action]
        self.sizes = action_dims(self.action_space)

    def _see(self) -> tuple[Any, dict[str, Any]]:
        if not self.masked:
            return self.observation_space.sample(), {}
        parts = []
        for size in self.sizes:
            part = self.np_random.random(size) < 0.5
            part[self.np_random.integers(size)] = True
            parts.append(part)
        self.mask = np.concatenate(parts)
        return self.observation_space.sample(), {"action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps, self.length = 0, int(self.np_random.integers(3, 9))
        return self._see()

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = 1.0
        if self.masked:
            begin = 0
            for size, chosen in zip(self.sizes, chosen_of(self.action_space, action), strict=True):
                assert self.mask[begin + chosen], "a masked action was taken"
                begin += size
        self.steps += 1
        observation, info = self._see()
        end = self.steps == self.length
        return observation, reward, end and self.length % 2 == 0, end and self.length % 2 == 1, info


def chosen_of(space: gym.Space, action: Any) -> list[int]:
    """What was chosen of each discrete choice of a space, in the order of its mask."""
    if isinstance(space, Discrete):
        return [int(action) - int(space.start)]
    if isinstance(space, MultiDiscrete):
        return (np.asarray(action) - space.start).flatten().tolist()
    if isinstance(space, MultiBinary):
        return np.asarray(action).flatten().tolist()
    if isinstance(space, Dict):
        return [one for key, child in space.spaces.items() for one in chosen_of(child, action[key])]
    if isinstance(space, Tuple):
        return [one for child, part in zip(space.spaces, action, strict=True) for one in chosen_of(child, part)]
    return []


IMAGE = Box(0, 255, (3, 12, 12), np.uint8)
OBSERVATIONS = {
    "flat": Box(-1.0, 1.0, (3,), np.float32),
    "image": IMAGE,
    "both": Dict({"camera": IMAGE, "state": Box(-1.0, 1.0, (3,), np.float32), "mode": Discrete(3)}),
}
ACTIONS = {
    "discrete": Discrete(4, start=2),
    "box": Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32)),
    "multi_discrete": MultiDiscrete([3, 2, 4]),
    "multi_binary": MultiBinary(3),
    "dict": Dict({"move": Box(-1.0, 1.0, (2,), np.float32), "tool": Discrete(3), "bits": MultiBinary(2)}),
    "tuple": Tuple((MultiDiscrete([2, 3]), Tuple((Discrete(2), Box(0.0, 1.0, (1,), np.float32))))),
}


def learnt_rewards(model, reward, done, valid):
    """Rewards [T, N] as the model learns from them, after its moments have taken in this rollout."""
    rollouts = model.rollouts
    rollouts.running_return = model.reward_normalizer.update(
        reward, done, valid, rollouts.running_return, model.ranks.gather
    )
    return model.reward_normalizer(reward)
