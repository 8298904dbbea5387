"""Environments that are stepped one after another in this process."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import concatenate, iterate
from typing_extensions import override

from ppo_lightning.envs.info import FINAL_INFO, FINAL_OBSERVATION


def step_and_reset(env: gym.Env[Any, Any], action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """A step of one environment, and the reset where its episode ends: its last observation and info are in ``info`` then."""
    observation, reward, terminated, truncated, info = env.step(action)
    if terminated or truncated:
        last = {FINAL_OBSERVATION: observation, FINAL_INFO: info}
        observation, info = env.reset()
        info = {**last, **info}
    return observation, reward, terminated, truncated, info


class SerialVectorEnv(SyncVectorEnv):
    """Gymnasium's vector in the mode ``SAME_STEP`` without copies, with a faster ``step`` of the same results.

    With small environments Gymnasium's own takes a third of their time on top: it stacks what it could write in place, and
    asks for the mode at every environment.
    """

    @override
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments, and reset those whose episode ends; observations are valid until the next call."""
        stored, observations = self._observations, self._env_obs
        rewards, terminations, truncations = [], [], []
        infos: dict[str, Any] = {}
        for index, (env, action) in enumerate(zip(self.envs, iterate(self.action_space, actions), strict=True)):
            observations[index], reward, terminated, truncated, info = step_and_reset(env, action)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
            if info:
                infos = self._add_info(infos, info, index)
        if isinstance(stored, np.ndarray):
            for index, observation in enumerate(observations):
                stored[index] = observation
        else:
            stored = self._observations = concatenate(self.single_observation_space, observations, stored)
        return (
            stored,
            np.array(rewards, dtype=np.float64),
            np.array(terminations, dtype=np.bool_),
            np.array(truncations, dtype=np.bool_),
            infos,
        )
