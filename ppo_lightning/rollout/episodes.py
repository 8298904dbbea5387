"""Statistics of finished episodes."""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from ppo_lightning.rollout.collectors import EpisodeEnds


class EpisodeStatistics:
    """Returns, lengths, successes and failures of finished episodes, computed once per rollout.

    The episodes of the current rollout are in :attr:`finished` until they are taken; :attr:`ep_info_buffer` holds the last 100
    of all ranks, and unfinished episodes are carried from rollout to rollout.
    """

    BUFFER_SIZE = 100

    def __init__(self) -> None:
        self.ep_info_buffer: deque[tuple[float, ...]] = deque(maxlen=self.BUFFER_SIZE)
        self.finished = torch.zeros(0, 4, dtype=torch.float64)
        self.steps = torch.zeros(0, dtype=torch.int64)
        """[E] steps of the current rollout at which episodes ended."""
        self.running_totals = torch.zeros(2, 0, dtype=torch.float64)
        """[2, N] return and length so far of the unfinished episodes."""

    def restart(self, num_envs: int) -> None:
        """Reset all episodes."""
        self.running_totals = torch.zeros(2, num_envs, dtype=torch.float64)

    def add(self, reward: Tensor, valid: Tensor, ends: EpisodeEnds) -> None:
        """Account for one rollout.

        Args:
            reward: [T, N] as the environments gave it.
            valid: [T, N] bool, the transition is an environment step.
            ends: the episodes that ended.
        """
        length = valid.double().cpu()
        sums = (
            torch.stack([reward.double().cpu() * length, length]).cumsum(1) + self.running_totals[:, None]
        )  # [2, T, N]
        # Per environment, an episode's sum is the running sum at its end minus that at the previous end.
        order = (ends.env.cpu() * len(length) + ends.step.cpu()).argsort()
        env, step = ends.env.cpu()[order], ends.step.cpu()[order]
        at_end = sums[:, step, env]  # [2, E], by environment, then step
        before = torch.where(env[1:] == env[:-1], at_end[:, :-1], 0.0)
        totals = at_end - torch.cat([torch.zeros(2, min(1, len(env)), dtype=torch.float64), before], 1)
        self.finished = torch.empty(len(env), 4, dtype=torch.float64)
        self.finished[order, :2] = totals.T
        self.finished[:, 2:] = ends.success_failure
        self.steps = ends.step.cpu()
        self.running_totals = sums[:, -1].clone()
        latest = torch.ones(len(env), dtype=torch.bool)
        latest[:-1] = env[1:] != env[:-1]
        self.running_totals[:, env[latest]] -= at_end[:, latest]

    def min_running_length(self) -> int:
        """Length of the shortest unfinished episode; 0 where any episode has ended."""
        return 0 if self.ep_info_buffer or len(self.finished) else int(self.running_totals[1].min())

    def extend(self, episodes: Tensor) -> None:
        """Put finished episodes [E, 4] (return, length, success, failure) into the window."""
        self.ep_info_buffer.extend(tuple(episode) for episode in episodes.tolist())

    def means(self) -> dict[str, float]:
        """Returns, lengths and rates over the window, under Stable-Baselines3's names; none without episodes."""
        if not self.ep_info_buffer:
            return {}
        returns, lengths, successes, failures = (
            np.asarray(column) for column in zip(*self.ep_info_buffer, strict=True)
        )
        means = {
            "rollout/ep_rew_mean": float(returns.mean()),
            "rollout/ep_rew_min": float(returns.min()),
            "rollout/ep_rew_max": float(returns.max()),
            "rollout/ep_len_mean": float(lengths.mean()),
        }
        if not np.isnan(successes).all():
            means["rollout/success_rate"] = float(np.nanmean(successes))
        if not np.isnan(failures).all():
            means["rollout/fail_rate"] = float(np.nanmean(failures))
        return means
