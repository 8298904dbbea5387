"""Networks that the ablation of learning.py compares with."""

from typing import Any

from gymnasium import Space
from torch import nn

from ppo_lightning import ActorCritic


class TorchInitialization(ActorCritic):
    """The default network with torch's own initialisation of linear layers instead of the orthogonal one."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], **options: Any) -> None:
        super().__init__(observation_space, action_space, **options)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
