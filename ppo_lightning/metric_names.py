"""The names under which other systems log the same numbers, with their signs and scales."""

from collections.abc import Mapping
from functools import cache
from typing import Literal, get_args

MetricNames = Literal["sb3", "cleanrl", "leanrl", "apexrl", "pufferlib", "embodichain"]

LATER = (
    *(f"rollout/ep_{name}" for name in ("rew_mean", "rew_min", "rew_max", "len_mean")),
    *(f"rollout/{name}" for name in ("success_rate", "fail_rate", "successes", "failures")),
    *(f"eval/{name}" for name in ("success_rate", "fail_rate", "cut_episodes")),
    *(f"train/{name}" for name in ("grad_norm", "actor_grad_norm", "critic_grad_norm", "skipped_steps")),
    "time/fps",
    "time/env_restarts",
)
"""Metrics that a run may log without having done so in its first iterations: before an episode ends, for instance."""

OF_ENVIRONMENTS = tuple(f"{place}{kind}/" for place in ("", "eval/") for kind in ("env", "reward", "reward_components"))
"""Prefixes of the names of what environments put into ``info``, when and if they do."""


def may_come_later(name: str) -> bool:
    """Whether a run may log a metric though it has not done so in its first iterations or evaluations."""
    return name in LATER or name.startswith(OF_ENVIRONMENTS)


_LOSSES = {
    "train/policy_gradient_loss": "losses/policy_loss",
    "train/value_loss": ("losses/value_loss", 0.5),
    "train/entropy_loss": ("losses/entropy", -1.0),
    "train/approx_kl": "losses/approx_kl",
    "train/old_approx_kl": "losses/old_approx_kl",
    "train/clip_fraction": "losses/clipfrac",
    "train/explained_variance": "losses/explained_variance",
}

_CLEANRL = {
    **_LOSSES,
    "train/grad_norm": "losses/grad_norm",
    "train/learning_rate": "charts/learning_rate",
    "time/fps": "charts/SPS",
    "time/total_timesteps": "global_step",
}

TABLES: dict[str, Mapping[str, str | tuple[str, float]]] = {
    "sb3": {},
    "cleanrl": {
        **_CLEANRL,
        "rollout/ep_rew_mean": "charts/episodic_return",
        "rollout/ep_len_mean": "charts/episodic_length",
    },
    "leanrl": {
        **_CLEANRL,
        "rollout/ep_rew_mean": "rollout/ep_return_mean",
        "rollout/ep_len_mean": "rollout/episode_len",
        "rollout/terminated": "charts/terminated_count",
        "rollout/truncated": "charts/truncated_count",
        "rollout/reward_mean": "rollout/rewards_mean",
        "rollout/reward_max": "rollout/rewards_max",
        "rollout/successes": "reward/success_count",
        "rollout/failures": "reward/fail_count",
        "time/evaluate": "charts/eval_time",
        "eval/mean_reward": "eval/return",
        "eval/mean_ep_length": "eval/episode_len",
        "eval/reward/": "eval_reward/",
    },
    "apexrl": {
        "rollout/ep_rew_mean": "episode/mean_reward",
        "rollout/ep_len_mean": "episode/mean_length",
        "rollout/episodes": "rollout/completed_episodes",
        "rollout/reward_mean": "rollout/mean_reward",
        "rollout/value_mean": "rollout/mean_value",
        "train/policy_gradient_loss": "train/policy_loss",
        "train/value_loss": ("train/value_loss", 0.5),
        "train/grad_norm": "train/total_grad_norm",
        "time/total_timesteps": "total_timesteps",
    },
    "pufferlib": {
        **_LOSSES,
        "rollout/ep_rew_mean": "environment/episode_return",
        "rollout/ep_len_mean": "environment/episode_length",
        "rollout/success_rate": "environment/success_rate",
        "train/learning_rate": "learning_rate",
        "time/fps": "SPS",
        "time/total_timesteps": "agent_steps",
        "time/time_elapsed": "uptime",
        "time/iterations": "epoch",
        "time/collect": "performance/eval",
        "time/update": "performance/train",
        "env/": "environment/",
        "reward/": "environment/reward/",
    },
    "embodichain": {
        "rollout/ep_rew_mean": "charts/episode_reward_avg_100",
        "rollout/ep_len_mean": "charts/episode_length_avg_100",
        "train/policy_gradient_loss": "train/actor_loss",
        "train/entropy_loss": ("train/entropy", -1.0),
        "time/fps": "charts/SPS",
        "time/total_timesteps": "global_step",
        "eval/mean_reward": "eval/avg_reward",
        "eval/mean_ep_length": "eval/avg_length",
        "eval/env/": "eval/metrics/",
        "env/": "metrics/",
        "reward/": "rewards/",
    },
}
"""Our name -> theirs, or theirs and what it is multiplied by; names that end in / are prefixes. What a system
does not log keeps our name."""

assert set(TABLES) == set(get_args(MetricNames))

Names = Mapping[str, tuple[str, float]]
"""A name -> another and what the number is multiplied by."""

_THEIRS: dict[str, Names] = {
    system: {ours: entry if isinstance(entry, tuple) else (entry, 1.0) for ours, entry in table.items()}
    for system, table in TABLES.items()
}
_OURS: dict[str, Names] = {
    system: {theirs: (ours, 1 / factor) for ours, (theirs, factor) in names.items()}
    for system, names in _THEIRS.items()
}


def to_names(metrics: Mapping[str, float], system: str) -> dict[str, float]:
    """Metrics under a system's names, with its signs and scales.

    An environment's own number that would take the place of another (``env/episode_return`` among PufferLib's) keeps our
    name.

    Args:
        metrics: under our names, which are Stable-Baselines3's.
        system: one of :data:`MetricNames`.
    """
    entries = ((*_theirs(system, ours), value) for ours, value in metrics.items())
    return {
        theirs: value if factor == 1.0 else value * factor for theirs, factor, value in entries
    }  # counts stay whole


def from_names(metrics: Mapping[str, float], system: str) -> dict[str, float]:
    """The opposite of :func:`to_names`."""
    entries = ((*_of(_OURS[system], theirs), value) for theirs, value in metrics.items())
    return {ours: value if factor == 1.0 else value * factor for ours, factor, value in entries}


@cache
def _theirs(system: str, ours: str) -> tuple[str, float]:
    theirs, factor = _of(_THEIRS[system], ours)
    return (theirs, factor) if _of(_OURS[system], theirs)[0] == ours else (ours, 1.0)


def _of(names: Names, name: str) -> tuple[str, float]:
    if name in names:
        return names[name]
    prefix = max((key for key in names if key.endswith("/") and name.startswith(key)), key=len, default="")
    if not prefix:
        return name, 1.0
    other, factor = names[prefix]
    return other + name.removeprefix(prefix), factor
