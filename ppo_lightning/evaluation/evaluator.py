"""Evaluations of a policy on environments of its own, shared among ranks."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from ppo_lightning.envs import EnvProvider
from ppo_lightning.envs.info import Sums, added
from ppo_lightning.envs.streams import streams_of_their_own
from ppo_lightning.evaluation.episodes import evaluate_episodes, said, summarize
from ppo_lightning.policy import Policy, in_eval_mode
from ppo_lightning.spaces import without_mask

if TYPE_CHECKING:
    from ppo_lightning.runs.ranks import Ranks


def evaluate_over_ranks(
    policy: Policy,
    provider: EnvProvider,
    ranks: "Ranks",
    autocast: AbstractContextManager[None],
    *,
    num_episodes: int,
    deterministic: bool,
    run_seed: int,
    seed: int,
    max_steps: int,
) -> dict[str, float]:
    """Statistics of exactly ``num_episodes`` episodes, each rank running its share.

    Args:
        policy: acts, in evaluation mode.
        provider: of the environments.
        ranks: that share the episodes.
        autocast: the precision of updates.
        num_episodes: of all ranks.
        deterministic: take the most probable actions.
        run_seed: of the run, for environments that are random when they are made.
        seed: of this rank's episodes.
        max_steps: of an episode of an environment without a time limit (steps).

    Returns:
        ``eval/…``.
    """
    world_size = ranks.world_size
    shares = [(num_episodes + world_size - 1 - rank) // world_size for rank in range(world_size)]
    share, info = shares[ranks.rank], Sums()
    episodes = torch.zeros(shares[0], 5, dtype=torch.float64)
    if share:
        with streams_of_their_own(run_seed):
            environments = provider.for_evaluation(min(provider.num_envs, share))
        try:
            with in_eval_mode(policy), autocast:
                episodes[:share] = evaluate_episodes(
                    policy,
                    environments,
                    without_mask(provider.observation_space),
                    num_episodes=share,
                    seed=seed,
                    deterministic=deterministic,
                    max_steps=max_steps,
                )
        except BaseException:
            provider.close_evaluation()  # the next evaluation makes new ones
            raise
        info = environments.logged.take_evaluation()
    row = torch.cat([episodes.flatten(), episodes.new_tensor([bool(info)])])
    rows = ranks.gather(row).view(world_size, -1)
    if rows[:, -1].any():
        info = added(ranks.gather_objects(info))
    each = [row[:-1].view(-1, 5)[:own] for row, own in zip(rows, shares, strict=True)]
    return {**summarize(torch.cat(each)), **said(info)}
