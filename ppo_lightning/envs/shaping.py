"""Reward shaping that does not change the best policy."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
from typing_extensions import override

from ppo_lightning.errors import InputError


class PotentialShaping(gym.Wrapper[Any, Any, Any, Any]):
    """Adds the gain in potential of each step to its reward (Ng, Harada & Russell 1999).

        r′ₜ = rₜ + γ Φ(sₜ₊₁) − Φ(sₜ),    Φ = 0 after a terminal state

    Over an episode the discounted additions sum to −Φ(s₀), whatever the actions, so that every policy keeps its rank; where a
    time limit cuts the episode they sum to γᵀ Φ(s_T) − Φ(s₀), and the critic's value of s_T compensates for it.

    ``rollout/…`` returns are those with the additions; evaluations leave this wrapper out. ``info["reward_components"]``
    has both parts of each reward: ``environment`` and ``shaping``.

    Args:
        env: the environment.
        potential: callable observation -> Φ, as a function by its path or an object by class_path (reward units).
        gamma: the model's discount; another one would prefer other policies.
    """

    training_only = True

    def __init__(self, env: gym.Env[Any, Any], potential: Callable[[Any], float], gamma: float) -> None:
        super().__init__(env)
        if not 0 <= gamma <= 1:
            raise InputError(f"gamma of PotentialShaping must lie between 0 and 1, as the model's does, got {gamma}")
        self.potential, self.gamma = potential, gamma
        self._before = 0.0

    @override
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._before = float(self.potential(observation))
        return observation, info

    @override
    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated else float(self.potential(observation))
        shaping = self.gamma * after - self._before
        self._before = after
        parts = {"environment": float(reward), "shaping": 0.0, **info.get("reward_components", {})}
        parts["shaping"] += shaping  # of potentials around one another together
        info = {**info, "reward_components": parts}
        return observation, float(reward) + shaping, terminated, truncated, info

    def get_state(self) -> float:
        """Φ of the current state, for a checkpoint."""
        return self._before

    def set_state(self, state: float) -> None:
        """Restore Φ from :meth:`get_state`."""
        self._before = state
