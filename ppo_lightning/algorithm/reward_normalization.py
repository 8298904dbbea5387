"""Rewards as they are learnt from: scaled by the spread of the discounted return, or their signs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ppo_lightning.algorithm.advantage import discounted_return
from ppo_lightning.policy import CLIP, RunningMoments


class RewardNormalizer(nn.Module):
    """Divides rewards by the standard deviation of the discounted return, and clips them at ±10; or takes their signs.

    (Engstrom et al. 2020; details 6-9 of Huang et al. 2022 for continuous actions.)

    Args:
        normalize: divide.
        sign: take the signs first.
        gamma: discount factor of the return.
    """

    def __init__(self, *, normalize: bool, sign: bool, gamma: float) -> None:
        super().__init__()
        self.sign, self.gamma = sign, gamma
        self.moments = RunningMoments(()) if normalize else None

    @torch.no_grad()
    def update(
        self, reward: Tensor, done: Tensor, valid: Tensor, carry: Tensor, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Merge the returns of a rollout into the moments.

        The moments include this rollout before its rewards are scaled: rewards do not enter the probability ratio, and in
        the first iteration there would be nothing to scale by.

        Args:
            reward: [T, N] of the environments.
            done: [T, N] bool, the episode ended.
            valid: [T, N] bool, the row is an environment step.
            carry: [N] discounted return so far, as the last call returned it.
            gather: a row [P] of this rank -> the rows of all, [ranks, P].

        Returns:
            The carry [N] for the next rollout.
        """
        if self.moments is None:
            return carry
        reward = reward.sign() if self.sign else reward
        total, carry = discounted_return(reward, done, carry.to(reward.device), gamma=self.gamma)
        self.moments.merge(gather(RunningMoments.batch_moments(total[valid])))
        return carry.nan_to_num(0.0, 0.0, 0.0)  # else it would stay non-finite for ever

    def forward(self, reward: Tensor) -> Tensor:
        """Rewards as they are learnt from, by the present moments."""
        if self.sign:
            reward = reward.sign()
        if self.moments is None:
            return reward
        return (reward * (self.moments.variance.float() + 1e-8).rsqrt()).clamp(-CLIP, CLIP)
