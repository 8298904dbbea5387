"""Environments that can be made harder: what is seen says how hard they are."""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from ppo_lightning.envs import TensorEnv

SEEN = Box(-np.inf, np.inf, (2,), np.float32)


class Hill(gym.Env):
    """Episodes of ``length`` steps, one for each step in reward; seen are the difficulty and the steps so far."""

    def __init__(self, difficulty: float = 0.0, length: int = 4, wide: bool = False) -> None:
        self.observation_space = Box(-np.inf, np.inf, (3 if wide else 2,), np.float32)
        self.action_space = Discrete(2)
        self.difficulty, self.length, self.steps, self.calls = difficulty, length, 0, 0
        self.table = np.zeros(2, np.float32)

    def set_difficulty(self, difficulty: float) -> None:
        self.calls += 1
        self.difficulty = 10 * difficulty

    def see(self):
        seen = np.zeros(self.observation_space.shape, np.float32)
        seen[:2] = self.difficulty, self.steps
        return seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps >= self.length
        success = {"is_success": self.difficulty < 0.5} if over else {}
        return self.see(), 1.0 + 0.1 * self.np_random.random(), over, False, success

    def get_state(self):
        return {"steps": self.steps}

    def set_state(self, state):
        self.steps = state["steps"]


class Fragile(Hill):
    """Raises once, in the third step of the second episode."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        type(self).episodes += 1
        return super().reset(seed=seed)

    def step(self, action):
        if type(self).episodes == 2 and self.steps == 2:
            raise ZeroDivisionError("once")
        return super().step(action)


def vector(num_envs: int) -> VectorEnv:
    return SyncVectorEnv([Hill] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


class Hills(TensorEnv):
    """The same as tensors."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs, SEEN, Discrete(2), reset_noise_size=1, max_episode_steps=4)
        self.difficulty = 0.0

    def initial_state(self, uniform):
        return uniform

    def dynamics(self, state, action):
        return state, torch.ones(len(state)) * self.difficulty, torch.zeros(len(state), dtype=torch.bool)

    def observe(self, state):
        return torch.cat([torch.full_like(state, 1.0) * self.difficulty, state], 1)


class Simulation:
    """A VecEnv of rsl_rl with a configuration."""

    num_actions, device, max_episode_length = 2, "cpu", 5

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.count = num_envs, torch.zeros(num_envs)
        self.cfg = type("Config", (), {"difficulty": torch.zeros(num_envs)})()

    def get_observations(self):
        return torch.stack([self.cfg.difficulty, self.count], 1)

    def reset(self):
        self.count[:] = 0
        return self.get_observations(), {}

    def step(self, actions):
        self.count += 1
        done = self.count >= 4
        self.count[done] = 0
        return self.get_observations(), torch.ones(self.num_envs), done.long(), {"time_outs": done}


class Line(gym.Env):
    """A line of five places: right is action 1; its end is worth 1 and ends the episode, twenty steps do, too."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = Box(0.0, 4.0, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return np.array([0], np.float32), {}

    def step(self, action):
        self.place, self.steps = max(0, self.place + (1 if action == 1 else -1)), self.steps + 1
        end = self.place == 4
        return np.array([self.place], np.float32), float(end), end, self.steps == 20 and not end, {}

    def get_state(self):
        return [self.place, self.steps]

    def set_state(self, state):
        self.place, self.steps = state


def nearness(observation: np.ndarray) -> float:
    """Potential of :class:`Line`."""
    return float(observation[0]) / 4


def tenfold(reward: float) -> float:
    return 10 * reward
