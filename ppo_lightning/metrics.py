"""What one iteration reports, reduced over all ranks by one gather."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from ppo_lightning.algorithm.update import UpdateResult
from ppo_lightning.policy import Policy

Gather = Callable[[Tensor], Tensor]
"""A row [P] of this rank -> the rows of all ranks, [ranks, P]."""


class Episodes(Protocol):
    """Statistics of episodes."""

    finished: Tensor
    """[E, 4] of the rollout: return, length, success, failure (NaN where unknown)."""

    def means(self) -> dict[str, float]:
        """Averages over the last ones, by metric."""
        ...


def iteration_metrics(
    rollout: TensorDict, update: UpdateResult, policy: Policy, episodes: Episodes, restarts: int, gather: Gather
) -> dict[str, float]:
    """Metrics of a rollout and its update, under Stable-Baselines3's names and with its meanings (docs/metrics.md).

    ``approx_kl`` averages the last epoch and ``loss`` is that of the last minibatch; all else that the loss returned averages
    all minibatches.

    Args:
        rollout: [T, N] with value targets.
        update: result of the update on it.
        policy: after the update.
        episodes: those of this rank that ended in the rollout, and averages over the last ones.
        restarts: environments of this rank that were restarted so far.
        gather: over ranks.
    """
    averages = episodes.means()
    moments = target_moments(rollout["state_value"][rollout["valid"]], rollout["value_target"][rollout["valid"]])
    own_sums, own_maxima = _rollout_statistics(rollout, policy, episodes)
    own_sums["time/env_restarts"] = restarts
    own_means = _update_means(update, policy.std(rollout[-1]) if policy.distribution.has_std else None)
    sums, means, maxima, moments = reduce_over_ranks(own_sums, own_means, own_maxima, moments, gather)

    steps, total, squares = sums.pop("steps"), sums.pop("reward"), sums.pop("reward²")
    mean = total / steps
    count, target, error = moments[:, 0], moments[:, 1], moments[:, 2]
    metrics = {
        **averages,
        "rollout/episodes": sums["rollout/terminated"] + sums["rollout/truncated"],
        **sums,
        "rollout/reward_mean": mean,
        "rollout/reward_std": max(0.0, squares / steps - mean**2) ** 0.5,
        "rollout/reward_max": maxima["rollout/reward_max"],
        "rollout/reward_min": -maxima["-rollout/reward_min"],
        "rollout/value_mean": float((count * (target - error)).sum() / count.sum()),
        "train/explained_variance": explained_variance(moments).item(),
        **{f"train/{name}": value for name, value in means.items()},
        **_grad_norms(update.grad_norms),
    }
    if "rollout/clipped_actions" in metrics:
        metrics["rollout/clipped_actions"] /= steps
    for count, rate in (("successes", "success_rate"), ("failures", "fail_rate")):
        if f"rollout/{rate}" not in averages:
            del metrics[f"rollout/{count}"]
    if not metrics["time/env_restarts"]:
        del metrics["time/env_restarts"]
    return metrics


def _rollout_statistics(
    rollout: TensorDict, policy: Policy, episodes: Episodes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sums and maxima of this rank's rollout, by metric."""
    valid, finished = rollout["valid"], episodes.finished
    reward = rollout["reward"][valid].double()
    # A lost life is terminal for learning, but does not end the episode.
    truncated = int((rollout["truncated"] & ~rollout["terminated"]).sum())
    successes, failures = finished[:, 2:].nansum(0)
    sums: dict[str, Any] = {
        "steps": reward.numel(),
        "rollout/terminated": len(finished) - truncated,
        "rollout/truncated": truncated,
        "rollout/successes": successes,
        "rollout/failures": failures,
        "reward": reward.sum(),
        "reward²": reward.square().sum(),
    }
    clipped = policy.distribution.clipped(rollout["action"])
    if clipped is not None:
        sums["rollout/clipped_actions"] = clipped[valid].sum()
    return sums, {"rollout/reward_max": reward.max(), "-rollout/reward_min": -reward.min()}


def _update_means(update: UpdateResult, std: Tensor | None) -> dict[str, Any]:
    """Averages of what the loss returned on this rank, and of standard deviations, by name."""
    means: dict[str, Any] = dict(zip(update.names, update.losses.mean(0).unbind(), strict=True))
    if "approx_kl" in means:
        means["approx_kl"] = update.column("approx_kl")[-update.minibatches :].mean()
    means["loss"] = update.column("loss")[-1]
    if std is not None:
        means["std"] = std.mean()
    return means


def reduce_over_ranks(
    sums: Mapping[str, Any], means: Mapping[str, Any], maxima: Mapping[str, Any], rest: Tensor, gather: Gather
) -> tuple[dict[str, float], dict[str, float], dict[str, float], Tensor]:
    """Sums, means and maxima over all ranks by name, and the rows [ranks, R] of ``rest`` [R], by one gather in float64."""
    kinds = sums, means, maxima
    values = [value for kind in kinds for value in kind.values()]
    packed = torch.stack([torch.as_tensor(value).detach().double().cpu() for value in values])
    rows = gather(torch.cat([packed, rest.double().cpu()])).view(-1, len(packed) + len(rest))
    *parts, rest = rows.split([*map(len, kinds), len(rest)], 1)
    reduced = parts[0].sum(0), parts[1].mean(0), parts[2].amax(0)
    of_sums, of_means, of_maxima = (
        dict(zip(kind, value.tolist(), strict=True)) for kind, value in zip(kinds, reduced, strict=True)
    )
    return of_sums, of_means, of_maxima, rest


def _grad_norms(norms: Tensor) -> dict[str, float]:
    """Mean norms [3] of the gradients whose norm was finite, of [G, 3], which are equal on all ranks; none without such."""
    finite = norms[norms[:, 0].isfinite()]
    if not len(finite):
        return {}
    names = ("train/grad_norm", "train/actor_grad_norm", "train/critic_grad_norm")
    return dict(zip(names, finite.mean(0).tolist(), strict=True))


def target_moments(value: Tensor, target: Tensor) -> Tensor:
    """What :func:`explained_variance` needs of values and targets [B]: one float64 row [5] for a gather.

    The number of samples, then means, then summed squared deviations, of the target and of the critic's error.
    """
    both = torch.stack([target, target - value]).double()
    means = both.mean(1)
    squares = (both - means[:, None]).square().sum(1)
    return torch.cat([means.new_tensor([target.numel()]), means, squares])


def explained_variance(moments: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 one no better than a constant.

    Of a constant target it is 0, since no critic is better than a constant there; Stable-Baselines3 has NaN. A target
    that varies by no more than the rounding of float32 counts as constant: with ``gamma=0`` and constant rewards all of
    its variance is rounding, and the quotient is arbitrary.

    Args:
        moments: [5] or [ranks, 5] of :func:`target_moments`, whose samples are taken together.
    """
    count, means, squares = moments.view(-1, 5).split([1, 2, 2], 1)
    mean = (count * means).sum(0) / count.sum()
    variance, unexplained = (squares + count * (means - mean).square()).sum(0) / count.sum()
    rounding = torch.finfo(torch.float32).eps ** 2 * (mean.square().sum() + variance + unexplained)
    return torch.where(variance <= rounding, 0.0, 1 - unexplained / variance)
