"""Generalised advantage estimation, and the discounted return that scales rewards."""

import torch
from torch import Tensor


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

    A time limit ends the episode, not the world: it sets ``done`` but not ``terminated``, so the sum stops there and
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
    sums, tail = [], start
    for one, weight in zip(term.unbind(), decay.unbind(), strict=True):
        tail = torch.addcmul(one, weight, tail)
        sums.append(tail)
    return torch.stack(sums)
