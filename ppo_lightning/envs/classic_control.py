"""CartPole and Pendulum as tensors: Gymnasium's dynamics, and examples of a :class:`TensorEnv`."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from typing_extensions import override

from ppo_lightning.envs.tensor import TensorEnv


class CartPole(TensorEnv):
    """CartPole-v1: keep a pole upright on a cart (Barto, Sutton & Anderson 1983), 500 steps at most.

    The state is the observation: place and speed of the cart (m, m/s), angle and angular speed of the pole (rad, rad/s).
    """

    GRAVITY, FORCE, TIME = 9.8, 10.0, 0.02
    POLE_MASS, TOTAL_MASS, HALF_LENGTH = 0.1, 1.1, 0.5
    MAX_PLACE, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360

    def __init__(self, num_envs: int, max_episode_steps: int = 500, device: str | torch.device = "cpu") -> None:
        high = np.array([2 * self.MAX_PLACE, np.inf, 2 * self.MAX_ANGLE, np.inf], dtype=np.float32)
        super().__init__(
            num_envs,
            Box(-high, high, dtype=np.float32),
            Discrete(2),
            reset_noise_size=4,
            max_episode_steps=max_episode_steps,
            device=device,
        )

    @override
    def initial_state(self, uniform: Tensor) -> Tensor:
        return 0.1 * uniform - 0.05

    @override
    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place, speed, angle, turn = state.unbind(-1)
        force = self.FORCE * (2 * action - 1)
        sine, cosine = angle.sin(), angle.cos()
        pole = self.POLE_MASS * self.HALF_LENGTH
        pull = (force + pole * turn.square() * sine) / self.TOTAL_MASS
        turning = (self.GRAVITY * sine - cosine * pull) / (
            self.HALF_LENGTH * (4 / 3 - self.POLE_MASS * cosine.square() / self.TOTAL_MASS)
        )
        pushing = pull - pole * turning * cosine / self.TOTAL_MASS
        step = torch.stack([speed, pushing, turn, turning], -1)
        state = torch.add(state, step, alpha=self.TIME)  # Euler, as in Gymnasium
        terminated = (state[..., 0].abs() > self.MAX_PLACE) | (state[..., 2].abs() > self.MAX_ANGLE)
        return state, torch.ones_like(place), terminated

    @override
    def observe(self, state: Tensor) -> Tensor:
        return state


class Pendulum(TensorEnv):
    """Pendulum-v1: swing a pendulum up and hold it there, 200 steps. The state is its angle and speed (rad, rad/s)."""

    MAX_SPEED, MAX_TORQUE, TIME = 8.0, 2.0, 0.05
    GRAVITY, MASS, LENGTH = 10.0, 1.0, 1.0

    def __init__(self, num_envs: int, max_episode_steps: int = 200, device: str | torch.device = "cpu") -> None:
        high = np.array([1.0, 1.0, self.MAX_SPEED], dtype=np.float32)
        super().__init__(
            num_envs,
            Box(-high, high, dtype=np.float32),
            Box(-self.MAX_TORQUE, self.MAX_TORQUE, (1,), dtype=np.float32),
            reset_noise_size=2,
            max_episode_steps=max_episode_steps,
            device=device,
        )

    @override
    def initial_state(self, uniform: Tensor) -> Tensor:
        angle, speed = (2 * uniform - 1).unbind(-1)
        return torch.stack([math.pi * angle, speed], -1)

    @override
    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle, speed = state.unbind(-1)
        torque = action.squeeze(-1).clamp(-self.MAX_TORQUE, self.MAX_TORQUE)
        upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = upright.square() + 0.1 * speed.square() + 0.001 * torque.square()
        pull = 3 * self.GRAVITY / (2 * self.LENGTH) * angle.sin() + 3 / (self.MASS * self.LENGTH**2) * torque
        speed = (speed + pull * self.TIME).clamp(-self.MAX_SPEED, self.MAX_SPEED)
        state = torch.stack([angle + speed * self.TIME, speed], -1)
        return state, -cost, torch.zeros_like(angle, dtype=torch.bool)

    @override
    def observe(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed], -1)
