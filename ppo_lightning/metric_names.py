"""The names under which other systems log the same numbers, with their signs and scales."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

MetricNames = Literal["sb3", "cleanrl", "leanrl", "apexrl", "pufferlib", "embodichain"]

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

TABLES: dict[str, Mapping[str, Any]] = {
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
"""Our name -> theirs, or theirs and what it is multiplied by; names that end in / are beginnings of names. What a system
does not log keeps our name."""

assert set(TABLES) == set(get_args(MetricNames))


def renamed(metrics: Mapping[str, float], system: str) -> dict[str, float]:
    """Metrics under a system's names, with its signs and scales.

    Args:
        metrics: under our names, which are Stable-Baselines3's.
        system: one of :data:`MetricNames`.
    """
    table = TABLES[system]
    if not table:
        return dict(metrics)
    names = {}
    for name, value in metrics.items():
        theirs, factor = _of(table, name)
        names[theirs] = value * factor
    return names


def restored(metrics: Mapping[str, float], system: str) -> dict[str, float]:
    """The opposite of :func:`renamed`."""
    table = {}
    for ours, entry in TABLES[system].items():
        theirs, factor = entry if isinstance(entry, tuple) else (entry, 1.0)
        table[theirs] = (ours, 1 / factor)
    names = {}
    for name, value in metrics.items():
        ours, factor = _of(table, name)
        names[ours] = value * factor
    return names


def _of(table: Mapping[str, Any], name: str) -> tuple[str, float]:
    entry = table.get(name)
    if entry is None:
        begin = max((key for key in table if key.endswith("/") and name.startswith(key)), key=len, default=None)
        if begin is None:
            return name, 1.0
        theirs, factor = table[begin] if isinstance(table[begin], tuple) else (table[begin], 1.0)
        return theirs + name.removeprefix(begin), factor
    return entry if isinstance(entry, tuple) else (entry, 1.0)
