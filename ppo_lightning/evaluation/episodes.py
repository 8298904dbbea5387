"""Evaluation: exactly N episodes, on environments of its own, shared among ranks."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from ppo_lightning.envs import EnvProvider, Transition, VectorEnvAdapter
from ppo_lightning.envs.info import SumsAndCounts, means, merge_sums
from ppo_lightning.envs.streams import temporarily_seeded
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.policy import Policy, in_eval_mode
from ppo_lightning.spaces import Tree, flat_specs, to_tensor, tree_map, without_mask

if TYPE_CHECKING:
    from ppo_lightning.runs.ranks import Ranks

MAX_EPISODE_STEPS = 100_000
"""An evaluation episode that has not ended by then is truncated, with a warning."""

MIN_EPISODE_STEPS = 100
"""Steps that an evaluation episode may take in any case."""

NOISE_STEPS = 64
"""Steps for which the noise of actions is drawn at once, or more where it is kept for several."""

MAX_NOISE_STEPS = 1024
"""At most, since noise takes memory: what is kept for longer is drawn again after so many steps."""


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
    """Statistics ``eval/…`` of exactly ``num_episodes`` episodes, each rank running its share.

    Arguments are as of :func:`evaluate_episodes`; ``seed`` is this rank's, ``run_seed`` the run's, for environments that are
    random when they are made, and ``autocast`` the precision of updates.
    """
    world_size = ranks.world_size
    shares = [(num_episodes + world_size - 1 - rank) // world_size for rank in range(world_size)]
    share, info = shares[ranks.rank], SumsAndCounts()
    episodes = torch.zeros(shares[0], 5, dtype=torch.float64)
    if share:
        with temporarily_seeded(run_seed):
            environments = provider.eval_envs(min(provider.num_envs, share))
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
            provider.close_eval_envs()  # the next evaluation makes new ones
            raise
        info = environments.info_accumulator.pop(evaluation=True)
    row = torch.cat([episodes.flatten(), episodes.new_tensor([bool(info)])])
    rows = ranks.gather(row).view(world_size, -1)
    if rows[:, -1].any():
        info = merge_sums(ranks.gather_objects(info))
    each = [row[:-1].view(-1, 5)[:own] for row, own in zip(rows, shares, strict=True)]
    return {**summarize(torch.cat(each)), **info_metrics(info)}


@torch.no_grad()
def evaluate_episodes(
    policy: Policy,
    environments: VectorEnvAdapter,
    observation_space: Space,
    *,
    num_episodes: int,
    seed: int,
    deterministic: bool,
    max_steps: int,
) -> Tensor:
    """Run ``num_episodes`` episodes from fresh resets and return their results.

    Episodes are distributed evenly over environments beforehand, since taking the first N that finish would favour short
    ones. Actions are sampled by a generator for each environment. The process's shared generators (``random``,
    ``numpy.random``, torch's defaults) are seeded by ``seed`` for the environments, and restored afterwards.

    Args:
        policy: acts; its normalisers are frozen.
        environments: stepped here and nowhere else.
        observation_space: of one environment, without its action mask.
        num_episodes: how many, exactly.
        seed: of the environments (``seed + i``) and of sampled actions.
        deterministic: take the most probable action instead of drawing one.
        max_steps: an episode is cut after so many steps, or after :data:`MIN_EPISODE_STEPS` where these are more; environments
            that have a time limit are cut after :data:`MAX_EPISODE_STEPS` only (steps).

    Returns:
        [num_episodes, 5] float64: undiscounted return (reward units), length (steps), success and failure (1, 0, or NaN
        where the environment does not report it), and 1 where the episode was cut, by environment, then time.
    """
    with temporarily_seeded(seed):
        observation = environments.reset(seed)
        limit = min(MAX_EPISODE_STEPS, max(MIN_EPISODE_STEPS, max_steps))
        if (environments.time_limit() or np.inf) < 2 * MAX_EPISODE_STEPS:
            limit = MAX_EPISODE_STEPS
        episodes = _episodes(
            policy, environments, observation_space, observation, num_episodes, seed, deterministic, limit
        )
    if episodes[:, -1].any() and not environments.has_cut_episodes:
        environments.has_cut_episodes = True
        warnings.warn(
            f"{environments.name} has not ended an evaluation episode within {limit:,} steps: it is counted as it stands, and "
            f"eval/cut_episodes says how many there are; {environments.time_limit_advice}",
            stacklevel=2,
        )
    return episodes


def _episodes(
    policy: Policy,
    environments: VectorEnvAdapter,
    observation_space: Space,
    observation: Tree,
    num_episodes: int,
    seed: int,
    deterministic: bool,
    limit: int,
) -> Tensor:
    num_envs = environments.num_envs
    device = next(policy.parameters()).device
    generators = [torch.Generator().manual_seed(seed + index) for index in range(num_envs)]
    quota = (num_episodes + np.arange(num_envs)[::-1]) // num_envs
    totals, lengths, done = np.zeros(num_envs), np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
    results: list[list[tuple[float, ...]]] = [[] for _ in range(num_envs)]
    state = torch.zeros(num_envs, policy.state_size, device=device) if policy.state_size else None
    start = np.ones(num_envs, dtype=bool)
    specs, step, noise = flat_specs(observation_space), 0, None
    specs = specs.get("", specs)
    period = policy.distribution.noise_period
    steps_of_noise = min(-(-NOISE_STEPS // period) * period, MAX_NOISE_STEPS)
    while (done < quota).any():
        environments.info_accumulator.counted = done < quota
        if not deterministic and step % steps_of_noise == 0:
            each = [policy.distribution.noise(steps_of_noise, 1, generator=own) for own in generators]
            noise = torch.cat(each, 1).to(device)
        mask = environments.action_mask
        chosen = policy.act(
            tree_map(lambda leaf, spec: to_tensor(leaf, spec.dtype).to(device), observation, specs),
            None if noise is None else noise[step % steps_of_noise],
            None if mask is None else torch.from_numpy(mask).to(device),
            state,
            None if state is None else torch.from_numpy(start).to(device),
        )
        after = environments.step(policy.distribution.to_numpy(chosen.action))
        state, step = chosen.state, step + 1
        _check_finite(after, step - 1)
        totals += after.reward if after.valid is None else np.where(after.valid, after.reward, 0.0)
        lengths += 1 if after.valid is None else after.valid
        observation, start = after.observation, after.is_first
        cut = (lengths >= limit) & (done < quota)
        cut[after.done_indices] = False
        rows = {int(index): row for row, index in enumerate(after.done_indices)}
        for index in sorted({*rows, *np.flatnonzero(cut).tolist()}):
            row = rows.get(index)
            if done[index] < quota[index] and not environments.crashed[index]:
                known = after.success_failure
                outcome = (np.nan, np.nan) if row is None or known is None else known[row]
                results[index].append((totals[index], lengths[index], *map(float, outcome), float(cut[index])))
                done[index] += 1
                if row is not None:
                    metrics = {name: float(values[row]) for name, values in after.metrics.items()}
                    environments.info_accumulator.end_episode(metrics)
            totals[index] = lengths[index] = 0
        cut &= done < quota
        if cut.any():
            observation, start = environments.reset_envs(cut, observation), start | cut
    return torch.tensor([episode for env in results for episode in env], dtype=torch.float64).view(-1, 5)


def _check_finite(after: Transition, step: int) -> None:
    named = after.observation if isinstance(after.observation, Mapping) else {"": after.observation}
    for key, rows in [
        *((f"observation {name}".strip(), leaf) for name, leaf in named.items()),
        ("reward", after.reward),
    ]:
        finite = np.isfinite(rows)
        if not finite.all():
            index = int(np.argwhere(~finite)[0][0])
            raise EnvironmentFault(
                f"environment {index} returned a {key} that is not finite at step {step} of an evaluation: {rows[index]}; "
                "correct the environment"
            )


def info_metrics(sums: SumsAndCounts) -> dict[str, float]:
    """Metrics from the environments' ``info`` under ``eval/``: means over the steps of the evaluation.

    Those of ``info["metrics"]`` are means over the evaluated episodes, of the value at their end.
    """
    return {f"eval/{name}": value for name, value in means(sums).items()}


def summarize(episodes: Tensor) -> dict[str, float]:
    """Statistics of episodes [E, 4 or 5] under ``eval/``: returns in reward units, lengths in steps, rates in [0, 1].

    A cut episode is neither a success nor a failure, where the environment reports either.
    """
    returns, lengths, *outcomes = episodes[:, :4].unbind(1)
    cut = episodes[:, 4:].any(1)
    statistics = {
        "eval/mean_reward": returns.mean().item(),
        "eval/std_reward": returns.std(correction=0).item(),
        "eval/min_reward": returns.min().item(),
        "eval/max_reward": returns.max().item(),
        "eval/mean_ep_length": lengths.mean().item(),
    }
    for name, outcome in zip(("eval/success_rate", "eval/fail_rate"), outcomes, strict=True):
        if not outcome.isnan().all():
            statistics[name] = outcome.masked_fill(cut, 0.0).nanmean().item()
    if cut.any():
        statistics["eval/cut_episodes"] = float(cut.sum())
    return statistics
