"""Environments on tensors: N of them step as one, on the policy's device, and can be compiled with it."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor
from typing_extensions import override

from ppo_lightning.errors import InputError


class EnvStep(NamedTuple):
    """Result of one step of N environments."""

    state: Tensor
    """[N, S] after the step: of the new episode where one ended."""
    episode_step: Tensor
    """[N] int32, steps of the episode so far."""
    observation: Tensor
    """[N, …] next policy input."""
    reward: Tensor
    """[N]"""
    terminated: Tensor
    """[N] bool"""
    truncated: Tensor
    """[N] bool"""
    final_observation: Tensor
    """[N, …] observations after the step, before any reset."""


class TensorEnv(VectorEnv[Tensor, Tensor, Tensor], ABC):
    """N environments whose state is one tensor [N, S], and whose dynamics are pure functions of tensors.

    A subclass gives spaces, ``reset_noise_size``, ``max_episode_steps`` and three functions: :meth:`initial_state`,
    :meth:`dynamics` and :meth:`observe`. Resets happen in the same step, and use the vector's own generator.
    PPO steps such a vector on tensors alone; with ``compile: true`` several steps and the policy become one graph.

    Args:
        num_envs: N.
        observation_space: of one environment, a Box or Discrete.
        action_space: of one environment.
        reset_noise_size: U, uniform numbers that one reset takes.
        max_episode_steps: steps after which an episode is truncated; None never does.
        device: where the tensors are.
    """

    def __init__(
        self,
        num_envs: int,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        reset_noise_size: int,
        max_episode_steps: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(action_space, Box | Discrete | MultiDiscrete | MultiBinary) or not isinstance(
            observation_space, Box | Discrete
        ):
            raise InputError(
                f"{type(self).__name__} is a TensorEnv, whose observations and actions are one tensor each, got "
                f"{observation_space} and {action_space}: lay the parts out in one Box"
            )
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.reset_noise_size = reset_noise_size
        self.max_episode_steps = max_episode_steps
        self.device = torch.empty(0, device=device).device  # with its index, as others name it
        self.generator = torch.Generator(self.device)
        self.state = torch.zeros(0)
        self.episode_step = torch.zeros(0)

    @abstractmethod
    def initial_state(self, uniform: Tensor) -> Tensor:
        """States [N, S] in which episodes begin, from uniform numbers [N, U] between 0 and 1."""

    @abstractmethod
    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state [N, S] that follows, the reward [N] and whether the state is terminal [N], for actions [N, …]."""

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """Observations [N, …] of states [N, S]."""

    def functional_step(self, state: Tensor, episode_step: Tensor, action: Tensor, uniform: Tensor) -> EnvStep:
        """One step with resets, as a pure function.

        Args:
            state: [N, S].
            episode_step: [N] int32, steps of the episode before this one.
            action: [N, …].
            uniform: [N, U] random numbers for resets.
        """
        state, reward, terminated = self.dynamics(state, action)
        final, episode_step = self.observe(state), episode_step + 1
        if self.max_episode_steps is None:
            truncated = torch.zeros_like(terminated)
        else:
            truncated = (episode_step >= self.max_episode_steps) & ~terminated
        done = terminated | truncated
        state = torch.where(done.unsqueeze(-1), self.initial_state(uniform), state)
        return EnvStep(
            state, episode_step.masked_fill(done, 0), self.observe(state), reward, terminated, truncated, final
        )

    def reset_noise(self, *shape: int) -> Tensor:
        """Uniform numbers [*shape, N, U] for resets."""
        return torch.rand(*shape, self.num_envs, self.reset_noise_size, generator=self.generator, device=self.device)

    @override
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Begin all episodes; the same seed gives the same ones."""
        if seed is not None:
            self.generator.manual_seed(int(seed))
        self.state = self.initial_state(self.reset_noise())
        self.episode_step = torch.zeros(self.num_envs, dtype=torch.int32, device=self.device)
        return self.observe(self.state), {}

    @override
    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of all environments; ``info["final_obs"]`` [N, …] are the observations before any reset."""
        after = self.functional_step(
            self.state, self.episode_step, torch.as_tensor(actions, device=self.device), self.reset_noise()
        )
        self.state, self.episode_step = after.state, after.episode_step
        info = {"final_obs": after.final_observation}
        return after.observation, after.reward, after.terminated, after.truncated, info

    def get_state(self) -> dict[str, Tensor]:
        """States, episode lengths and random state, for a checkpoint."""
        return {"state": self.state, "episode_step": self.episode_step, "random": self.generator.get_state()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Restore the state of :meth:`get_state`."""
        self.state, self.episode_step = state["state"].to(self.device), state["episode_step"].to(self.device)
        self.generator.set_state(state["random"])

    @override
    def close(self, **kwargs: Any) -> None:
        """Nothing to close."""
