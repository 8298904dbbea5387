"""The default network: two multilayer perceptrons, one that acts and one that values."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from gymnasium import Space
from gymnasium.spaces import Box
from torch import Tensor, nn

from ppo_lightning.spaces import feature_shape, num_action_parameters


class ActorCritic(nn.Module):
    """Separate perceptrons for policy and value, with orthogonal initialisation.

    Weights are orthogonal with gain √2 in hidden layers, 0.01 at the policy's output and 1 at the value's, biases 0
    (Huang et al. 2022, detail 2). For Box actions the log standard deviation is a parameter of its own, the same in
    every state (detail 2 of the continuous ones).

    Args:
        observation_space: what the environment shows; any shape is flattened.
        action_space: what it takes.
        hidden_sizes: units of each hidden layer, in both perceptrons.
        activation: class of the layers between them.
        log_std_init: initial log standard deviation of Box actions, in log action units.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        hidden_sizes: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        log_std_init: float = 0.0,
    ) -> None:
        super().__init__()
        inputs = math.prod(feature_shape(observation_space))
        outputs = num_action_parameters(action_space)
        self.log_std: nn.Parameter | None = None
        if isinstance(action_space, Box):
            outputs //= 2
            self.log_std = nn.Parameter(torch.full((outputs,), float(log_std_init)))
        self.policy_layers = perceptron([inputs, *hidden_sizes, outputs], activation, output_gain=0.01)
        self.value_layers = perceptron([inputs, *hidden_sizes, 1], activation, output_gain=1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution parameters [B, P] and values [B] for observations [B, …]."""
        return self.actor(observation), self.critic(observation)

    def actor(self, observation: Tensor) -> Tensor:
        """Distribution parameters [B, P] alone: all that acting needs."""
        output = self.policy_layers(observation.flatten(1))
        if self.log_std is None:
            return output
        return torch.cat([output, self.log_std.expand_as(output)], -1)

    def critic(self, observation: Tensor) -> Tensor:
        """Values [B] alone: all that bootstrapping needs."""
        return self.value_layers(observation.flatten(1)).squeeze(-1)


def perceptron(sizes: Sequence[int], activation: type[nn.Module], output_gain: float) -> nn.Sequential:
    """Linear layers of ``sizes`` units with activations between them, orthogonal, biases 0."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        linear = nn.Linear(inputs, outputs)
        is_output = index == len(sizes) - 2
        nn.init.orthogonal_(linear.weight, output_gain if is_output else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_output else [linear, activation()]
    return nn.Sequential(*layers)
