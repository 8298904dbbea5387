"""What is logged of an iteration: one row of numbers per process, merged over all of them by one gather."""

import torch
from tensordict import TensorDict
from torch import Tensor

from ppo_lightning.algorithm.update import UpdateResult
from ppo_lightning.diagnostics import explained_variance, target_moments

_SUMMED = 9


def row_of(
    batch: TensorDict,
    update: UpdateResult,
    std: Tensor | None,
    finished: Tensor,
    restarts: int,
    clipped: Tensor | None = None,
) -> Tensor:
    """What this process knows of an iteration, one float64 row for a gather.

    Args:
        batch: the rollout [T, N].
        update: what was done with it.
        std: [N, d] standard deviations of the last step's actions; None where there are none.
        finished: [E, 4] episodes that ended in it.
        restarts: environments that were made anew so far.
        clipped: [T, N] bool, the action has a component outside the bounds; None where the distribution clips nothing.
    """
    table, valid = update.losses, batch["valid"]
    reward = batch["reward"][valid].double()
    # Not all that is terminal for what is learnt ends an episode: a lost life does not.
    truncated = int((batch["truncated"] & ~batch["terminated"]).sum())
    ends = [len(finished) - truncated, truncated, *finished[:, 2:].nansum(0).tolist()]
    outside = reward.new_zeros(()) if clipped is None else clipped[valid].sum().double()
    own = [
        table.mean(0),
        update.column("approx_kl")[-update.minibatches :].mean()[None]
        if "approx_kl" in update.names
        else table.new_zeros(1),
        update.column("loss")[-1:],
        table.new_zeros(1) if std is None else std.mean()[None],
        torch.tensor([reward.numel(), *ends, restarts]),
        torch.stack([reward.sum(), reward.square().sum(), outside]),
        torch.stack([reward.max(), -reward.min()]),
        target_moments(batch["state_value"][valid], batch["value_target"][valid]),
    ]
    return torch.cat([part.double().cpu() for part in own])


def merged(rows: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """The metrics of an iteration, under Stable-Baselines3's names where it has them and with its meanings.

    ``approx_kl`` averages the last pass, ``loss`` is the last minibatch, the others average all minibatches.

    Args:
        rows: [ranks, P] of :func:`row_of`.
        names: of the scalars that the loss returned.
    """
    kinds = rows.split([len(names) + 3, _SUMMED, 2, 5], 1)
    averaged = kinds[0].mean(0).tolist()
    losses, (kl, last_loss, std) = dict(zip(names, averaged, strict=False)), averaged[-3:]
    steps, terminated, truncated, successes, failures, restarts, total, squares, outside = kinds[1].sum(0).tolist()
    highest, lowest = kinds[2].amax(0).tolist()
    count, target, missed = kinds[3][:, 0], kinds[3][:, 1], kinds[3][:, 2]
    reward = total / steps
    return {
        "rollout/episodes": terminated + truncated,
        "rollout/terminated": terminated,
        "rollout/truncated": truncated,
        "rollout/successes": successes,
        "rollout/failures": failures,
        "rollout/reward_mean": reward,
        "rollout/reward_std": max(0.0, squares / steps - reward**2) ** 0.5,
        "rollout/reward_max": highest,
        "rollout/reward_min": -lowest,
        "rollout/value_mean": float((count * (target - missed)).sum() / count.sum()),
        "rollout/clipped_actions": outside / steps,
        "time/env_restarts": restarts,
        "train/explained_variance": explained_variance(kinds[3]).item(),
        **{f"train/{name}": value for name, value in losses.items()},
        **({"train/approx_kl": kl} if "approx_kl" in losses else {}),
        "train/loss": last_loss,
        "train/std": std,
    }


def norms_of(update: UpdateResult) -> dict[str, float]:
    """Mean norms of the gradients whose norm was finite, which are the same in all processes; none without such."""
    finite = update.grad_norms[update.grad_norms[:, 0].isfinite()]
    if not len(finite):
        return {}
    names = ("train/grad_norm", "train/actor_grad_norm", "train/critic_grad_norm")
    return dict(zip(names, finite.mean(0).tolist(), strict=True))
