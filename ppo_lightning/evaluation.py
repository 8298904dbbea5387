"""Evaluation: exactly N episodes, on environments of its own."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from ppo_lightning.envs import Environments, EnvMaker, Supply, Transition
from ppo_lightning.envs.info import Sums, means
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import storing

MAX_EPISODE_STEPS = 100_000
"""An evaluation episode that has not ended by then is counted as it stands, with a warning."""

NOISE_STEPS = 64
"""Steps for which the noise of actions is drawn at once."""


class Evaluates(Protocol):
    """A module with what it takes to evaluate its policy elsewhere."""

    policy: Policy
    env_maker: EnvMaker
    supply: Supply
    observation_space: Space[Any]
    eval_deterministic: bool
    env_timeout_s: float

    @property
    def iterations_between_evaluations(self) -> int:
        """How many."""
        ...

    @property
    def num_env_steps(self) -> int:
        """Environment steps so far, of all processes."""
        ...

    @property
    def policy_version(self) -> int:
        """Iterations so far."""
        ...

    def evaluation_seed(self) -> int:
        """Seed of the episodes of an evaluation now."""
        ...


@torch.no_grad()
def evaluate_episodes(
    policy: Policy,
    environments: Environments,
    observation_space: Space,
    *,
    num_episodes: int,
    seed: int,
    deterministic: bool,
) -> Tensor:
    """Run ``num_episodes`` episodes from fresh resets and return what they gave.

    Which environment runs how many is settled beforehand, as evenly as it goes. Taking the first N that finish instead
    would favour short episodes. Sampling has a generator of its own, so no other stream of random numbers moves.

    Args:
        policy: acts; its normalisers are frozen.
        environments: stepped here and nowhere else.
        observation_space: of one environment, without its action mask.
        num_episodes: how many, exactly.
        seed: of the environments (``seed + i``) and of the actions where they are drawn.
        deterministic: take the most probable action instead of drawing one.

    Returns:
        [num_episodes, 4] float64: undiscounted return (reward units), length (steps), success and failure (1, 0, or NaN
        where the environment does not say), by environment, then time.
    """
    num_envs = environments.num_envs
    device = next(policy.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    quota = (num_episodes + np.arange(num_envs)[::-1]) // num_envs
    totals, lengths = np.zeros(num_envs), np.zeros(num_envs)
    results: list[list[tuple[float, ...]]] = [[] for _ in range(num_envs)]
    observation = environments.reset(seed)
    state = torch.zeros(num_envs, policy.state_size, device=device) if policy.state_size else None
    start = np.ones(num_envs, dtype=bool)
    stored, step, noise = storing(observation_space, device), 0, None
    while any(len(done) < wanted for done, wanted in zip(results, quota, strict=True)):
        if not deterministic and step % NOISE_STEPS == 0:
            noise = policy.distribution.noise(NOISE_STEPS, num_envs, generator=generator).to(device)
        mask = environments.action_mask
        chosen = policy.act(
            stored(observation),
            None if noise is None else noise[step % NOISE_STEPS],
            None if mask is None else torch.from_numpy(mask).to(device),
            state,
            None if state is None else torch.from_numpy(start).to(device),
        )
        after = environments.step(policy.distribution.to_numpy(chosen.action))
        state, step = chosen.state, step + 1
        _check_finite(after, int(lengths.max()))
        totals += after.reward if after.valid is None else np.where(after.valid, after.reward, 0.0)
        lengths += 1 if after.valid is None else after.valid
        cut = np.flatnonzero(lengths >= MAX_EPISODE_STEPS)
        if len(cut):
            warnings.warn(
                f"{environments.name} has not ended an evaluation episode within {MAX_EPISODE_STEPS:,} steps: it is "
                f"counted as it stands; {environments.time_limit_advice}",
                stacklevel=2,
            )
        for index in np.union1d(after.ended, cut).astype(int):
            outcome = (np.nan, np.nan)
            if after.outcome is not None and index in after.ended:
                outcome = after.outcome[np.searchsorted(after.ended, index)]
            if len(results[index]) < quota[index] and not environments.crashed[index]:
                results[index].append((totals[index], lengths[index], *map(float, outcome)))
                if index in after.ended:
                    row = np.searchsorted(after.ended, index)
                    environments.logged.end_episode({name: float(rows[row]) for name, rows in after.metrics.items()})
            totals[index] = lengths[index] = 0
        observation, start = after.observation, after.begun
    return torch.tensor([episode for env in results for episode in env], dtype=torch.float64).view(-1, 4)


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


def said(sums: Sums) -> dict[str, float]:
    """What the environments said in ``info``, under ``eval/``: means over the steps that the evaluation took.

    Of ``info["metrics"]`` they are means over the episodes that count, of the value at their end.
    """
    return {f"eval/{name}": value for name, value in means(sums).items()}


def summarize(episodes: Tensor) -> dict[str, float]:
    """Statistics of episodes [E, 4] under ``eval/``: returns in reward units, lengths in steps, rates in [0, 1]."""
    returns, lengths, successes, failures = episodes.unbind(1)
    statistics = {
        "eval/mean_reward": returns.mean().item(),
        "eval/std_reward": returns.std(correction=0).item(),
        "eval/min_reward": returns.min().item(),
        "eval/max_reward": returns.max().item(),
        "eval/mean_ep_length": lengths.mean().item(),
    }
    if not successes.isnan().all():
        statistics["eval/success_rate"] = successes.nanmean().item()
    if not failures.isnan().all():
        statistics["eval/fail_rate"] = failures.nanmean().item()
    return statistics
