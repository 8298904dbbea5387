"""A network whose gradients are no numbers, now and then, in one of two processes."""

import os

import torch
from torch import nn


class Poison(nn.Module):
    """Spoils its gradient in rank 1, in those of its passes that are told.

    Args:
        observation_space: of CartPole.
        action_space: of CartPole.
        begin: first pass, counted over those that are differentiated.
        end: the pass after the last.
    """

    def __init__(self, observation_space, action_space, begin: int = 5, end: int = 8) -> None:
        super().__init__()
        self.logits, self.value = nn.Linear(4, 2), nn.Linear(4, 1)
        self.spoilt, self.passes = range(begin, end), 0

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = self.value(observation).squeeze(-1)
        if value.requires_grad:
            self.passes += 1
            if self.passes in self.spoilt and os.environ.get("LOCAL_RANK") == "1":
                value = value * torch.nan
        return self.logits(observation), value
