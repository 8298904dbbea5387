"""Everything between an observation as the environment gives it and an action as the rollout keeps it."""

from collections.abc import Callable
from typing import Any

import torch
from gymnasium import Space
from gymnasium.spaces import Box
from torch import Tensor, nn

from ppo_lightning.errors import InputError
from ppo_lightning.policy.distributions import action_distribution
from ppo_lightning.policy.moments import RunningMoments
from ppo_lightning.spaces import describe, encoder, feature_shape, storage

Network = Callable[[Space[Any], Space[Any]], nn.Module]
"""(observation_space, action_space) -> module whose forward maps features [B, …] to (parameters [B, P], values [B])."""

CLIP = 10.0  # normalised observations and rewards are clipped at ±10 (Huang et al. 2022, continuous details 7 and 9)


class Policy(nn.Module):
    """Observation encoding, running normalisation, the network, and the distribution over actions.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        network: makes the network. Its ``forward`` returns distribution parameters [B, P] and values [B]. Where it also
            has methods ``actor`` (parameters alone) and ``critic`` (values alone), acting and bootstrapping use those.
        normalize_observation: subtract the running mean of observations and divide by their standard deviation.

    Raises:
        InputError: a space is not supported, or the network's output does not fit it.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        network: Network,
        normalize_observation: bool,
    ) -> None:
        super().__init__()
        for space in (observation_space, action_space):
            describe(space)  # refuses unsupported ones before anything is built
        if normalize_observation and not isinstance(observation_space, Box):
            raise InputError(
                f"normalize_observation needs a Box observation, this environment's is {observation_space!r}: turn it off"
            )
        self.encode = encoder(observation_space)
        self.distribution = action_distribution(action_space)
        self.moments = RunningMoments(feature_shape(observation_space)) if normalize_observation else None
        self.network = network(observation_space, action_space)
        self._check(observation_space, action_space)

    def _check(self, observation_space: Space[Any], action_space: Space[Any]) -> None:
        shape, dtype = storage(observation_space)
        start = getattr(observation_space, "start", 0)
        with torch.no_grad():
            parameters, value = self(self.features(torch.full((2, *shape), start, dtype=dtype)))
        expected = (2, self.distribution.num_parameters)
        if tuple(parameters.shape) != expected or tuple(value.shape) != (2,):
            raise InputError(
                f"the network {type(self.network).__name__} returned parameters {tuple(parameters.shape)} and values "
                f"{tuple(value.shape)} for 2 observations, {describe(action_space)} needs {expected} and (2,): "
                "change its output layers"
            )

    def features(self, observation: Tensor) -> Tensor:
        """What the network sees of stored observations [B, …]: float32, normalised where that is on, at ±10 at most."""
        features = self.encode(observation)
        if self.moments is None:
            return features
        mean, variance = self.moments.mean.float(), self.moments.variance.float()
        return ((features - mean) * (variance + 1e-8).rsqrt()).clamp_(-CLIP, CLIP)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution parameters [B, P] and values [B], float32 under autocast too."""
        parameters, value = self.network(features)
        return parameters.float(), value.float()

    def actor(self, features: Tensor) -> Tensor:
        """Distribution parameters [B, P]."""
        actor = getattr(self.network, "actor", None)
        return (actor(features) if actor else self.network(features)[0]).float()

    def critic(self, features: Tensor) -> Tensor:
        """Values [B], in (normalised) reward units."""
        critic = getattr(self.network, "critic", None)
        return (critic(features) if critic else self.network(features)[1]).float()

    def evaluate(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of stored actions, entropy and value, each [B]: what the loss needs."""
        parameters, value = self(features)
        return *self.distribution.log_prob_and_entropy(parameters, action), value

    def act(self, observation: Tensor, noise: Tensor | None) -> Tensor:
        """Actions [B, …] for stored observations: drawn with ``noise``, or without it the most probable ones."""
        parameters = self.actor(self.features(observation))
        if noise is None:
            return self.distribution.mode(parameters)
        return self.distribution.sample(parameters, noise)
