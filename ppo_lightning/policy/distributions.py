"""Distributions over actions, as plain tensor maths on what a network returns.

One class per kind of space, chosen by :func:`action_distribution`. They hold no tensors: sampling takes noise that was
drawn for a whole rollout at once, so that choosing an action costs a few kernels and no generator.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from typing_extensions import override

from ppo_lightning.spaces import num_action_parameters

LOG_2PI = math.log(2 * math.pi)


class ActionDistribution(ABC):
    """A family of distributions over one action space, described by ``parameters`` [B, P]."""

    num_parameters: int
    """P: what the network must return per sample."""

    @abstractmethod
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Draw the noise that :meth:`sample` turns into actions, for samples of any leading ``shape``."""

    @abstractmethod
    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, …] drawn from the distributions; the same noise gives the same actions."""

    @abstractmethod
    def mode(self, parameters: Tensor) -> Tensor:
        """The most probable actions [B, …]."""

    @abstractmethod
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (or log-density) of the actions, and entropy, each [B], in nats."""

    def std(self, parameters: Tensor) -> Tensor | None:
        """Standard deviations [B, d] where the family has them, else None."""
        return None


@dataclass(frozen=True)
class Categorical(ActionDistribution):
    """Probabilities softmax(logits) of n actions; ``parameters`` are the logits [B, n]."""

    num_parameters: int

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise: the argmax of logits + noise is distributed as softmax(logits) (Gumbel 1954)."""
        return torch.empty(*shape, self.num_parameters).exponential_(generator=generator).log_().neg_()

    @override
    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        return (parameters + noise).argmax(-1)

    @override
    def mode(self, parameters: Tensor) -> Tensor:
        return parameters.argmax(-1)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = parameters.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


@dataclass(frozen=True)
class DiagonalGaussian(ActionDistribution):
    """Independent normals over a Box of ``shape``; ``parameters`` are means and log standard deviations [B, 2d].

    The action is not clipped here: what is stored is what was drawn, and only the environment is given its clipping.
    """

    shape: tuple[int, ...]
    num_parameters: int

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, self.num_parameters // 2, generator=generator)

    @override
    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = parameters.chunk(2, -1)
        return torch.addcmul(mean, log_std.exp(), noise).view(-1, *self.shape)

    @override
    def mode(self, parameters: Tensor) -> Tensor:
        return parameters.chunk(2, -1)[0].reshape(-1, *self.shape)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = parameters.chunk(2, -1)
        standardized = (action.reshape(mean.shape) - mean) * (-log_std).exp()
        total_log_std, dims = log_std.sum(-1), mean.shape[-1]
        log_prob = -0.5 * (standardized.square().sum(-1) + dims * LOG_2PI) - total_log_std
        return log_prob, total_log_std + 0.5 * dims * (1 + LOG_2PI)

    @override
    def std(self, parameters: Tensor) -> Tensor:
        return parameters.chunk(2, -1)[1].exp()


@singledispatch
def action_distribution(space: Space[Any]) -> ActionDistribution:
    """The family of distributions that suits an action space."""
    raise NotImplementedError(f"no action distribution for {space!r}")


@action_distribution.register
def _(space: Discrete) -> ActionDistribution:
    return Categorical(num_action_parameters(space))


@action_distribution.register
def _(space: Box) -> ActionDistribution:
    return DiagonalGaussian(space.shape, num_action_parameters(space))
