"""What the ablation of learning.py compares with."""

from typing import Any

from gymnasium import Space
from tensordict import TensorDict
from torch import Tensor, nn

from ppo_lightning import ActorCritic, gae


class TorchInitialization(ActorCritic):
    """The default network with torch's own initialisation of linear layers instead of the orthogonal one."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], **options: Any) -> None:
        super().__init__(observation_space, action_space, **options)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def without_bootstrap(rollout: TensorDict, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages that take a time limit for a terminal state, as CleanRL does."""
    ended = rollout["terminated"] | rollout["truncated"]
    return gae(rollout.copy().set("terminated", ended), gamma=gamma, gae_lambda=gae_lambda)
