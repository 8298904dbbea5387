"""Generalised advantage estimation, and the discounted return that scales rewards."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ppo_lightning.errors import InputError


def gae(rollout: TensorDict, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """The default advantage estimator: :func:`generalized_advantage` of a rollout, and the λ-return.

    Args:
        rollout: [T, N] with ``reward`` after normalisation, ``state_value``, ``next_state_value``, ``terminated`` and
            ``truncated``. Rows that are not ``valid`` are reset steps of NEXT_STEP vectors: their advantages are not used.
        gamma: discount per environment step.
        gae_lambda: 0 gives the one-step TD error, 1 the discounted return minus V.

    Returns:
        Advantages and value targets, each [T, N].
    """
    advantage = generalized_advantage(
        rollout["reward"],
        rollout["state_value"],
        rollout["next_state_value"],
        rollout["terminated"],
        rollout["terminated"] | rollout["truncated"],
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    return advantage, advantage + rollout["state_value"]


def check_estimates(estimates: Any, reward: Tensor) -> tuple[Tensor, Tensor]:
    """What an advantage estimator returned, without gradients.

    Args:
        estimates: return value of the estimator.
        reward: [T, N] of the same rollout.

    Raises:
        InputError: it is not an advantage and a value target of the rollout's shape.
    """
    shapes = [tuple(getattr(one, "shape", ())) for one in estimates] if isinstance(estimates, tuple | list) else []
    if shapes != [tuple(reward.shape)] * 2:
        got = f"shapes {shapes}" if shapes else type(estimates).__name__
        raise InputError(
            f"advantage_estimator must return advantages and value targets of shape {tuple(reward.shape)}, got {got}"
        )
    advantage, target = (one.detach().to(reward) for one in estimates)
    return advantage, target


def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Truncated generalised advantage estimate (Schulman et al. 2017, PPO, eqs. 11-12).

        δₜ = rₜ + γ (1 - terminatedₜ) V(s'ₜ) - V(sₜ)
        Aₜ = δₜ + γλ (1 - doneₜ) Aₜ₊₁,    A_T = 0

    A time limit truncates: it sets ``done`` but not ``terminated``, so the sum stops there and
    V(s'ₜ) still counts.

    Args:
        reward: [T, N], in reward units, as are all values and advantages.
        value: [T, N] critic's V(sₜ).
        next_value: [T, N] V(s'ₜ) of the observation that followed, before any automatic reset.
        terminated: [T, N] bool, s'ₜ is terminal.
        done: [T, N] bool, the episode ended at t, for either reason.
        gamma: discount per environment step, in [0, 1].
        gae_lambda: 0 gives the one-step TD error, 1 the discounted return minus V.

    Returns:
        [T, N]. Adding ``value`` gives the λ-return, the critic's target.
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = gamma * gae_lambda * (~done).to(delta)  # a number times a bool would be of the default dtype
    return _decayed_sum(delta.flip(0), decay.flip(0), torch.zeros_like(delta[0])).flip(0)


def discounted_return(reward: Tensor, done: Tensor, carry: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted sum of past rewards, Gₜ = rₜ + γ (1 - doneₜ₋₁) Gₜ₋₁, whose spread scales rewards.

    (Engstrom et al. 2020, "Implementation matters", and the details 6-9 of Huang et al. 2022 for continuous actions.)

    Args:
        reward: [T, N], in reward units.
        done: [T, N] bool, the episode ended at t.
        carry: [N] what the previous rollout left: γ (1 - done) G of its last step.
        gamma: discount per environment step.

    Returns:
        G [T, N] and the carry [N] for the next rollout.
    """
    decay = gamma * (~done).to(reward)  # what of Gₜ reaches step t + 1
    shifted = torch.cat([torch.ones_like(decay[:1]), decay[:-1]])  # the carry is decayed already
    total = _decayed_sum(reward, shifted, carry)
    return total, total[-1] * decay[-1]


def _decayed_sum(term: Tensor, decay: Tensor, start: Tensor) -> Tensor:
    """Sₜ = termₜ + decayₜ Sₜ₋₁ with S₋₁ = start, over the first dimension of [T, N]."""
    sums, last = term.clone(), start
    for total, weight in zip(sums.unbind(), decay.unbind(), strict=True):
        last = total.addcmul_(weight, last)
    return sums
