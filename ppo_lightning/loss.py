"""The clipped objective of PPO."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from ppo_lightning.diagnostics import approximate_kl, clip_fraction, mean_of

Batch = TensorDict | Mapping[str, Any]
"""Samples [B] by name: a TensorDict, or inside a compiled graph a plain dictionary."""

Evaluate = Callable[[Any], tuple[Tensor, Tensor, Tensor]]
"""batch [B] -> log-probability, entropy and value, each [B]: what :meth:`Policy.evaluate` does."""


class LossTerms(NamedTuple):
    """Scalars of one minibatch. Only ``loss`` carries a gradient that is used."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    old_approx_kl: Tensor


KL = LossTerms._fields.index("approx_kl")
CLIPPED = LossTerms._fields.index("clip_fraction")


@dataclass(frozen=True)
class PPOLoss:
    """Clipped surrogate objective, negated for descent (Schulman et al. 2017, eqs. 7 and 9)."""

    clip_range: float
    """Change of an action's probability ratio beyond which the surrogate pays no more (dimensionless)."""
    clip_range_vf: float | None
    """Change of a value beyond which the critic is no longer pulled, in value units; None does not clip."""
    normalize_advantage: bool
    """Give the advantages of each minibatch mean 0 and standard deviation 1."""
    vf_coef: float
    """Weight of the critic's mean squared error."""
    ent_coef: float
    """Weight of the entropy bonus, in advantage units per nat."""

    def __call__(self, batch: Batch, evaluate: Evaluate) -> LossTerms:
        """Score a policy on ``batch`` [B], or on sequences [B, L].

        Reads ``action_log_prob`` and ``state_value`` (from when the action was sampled), ``advantage`` and
        ``value_target``, and where there is one ``valid``, the rows that count. ``value_loss`` is the plain mean squared
        error.
        """
        log_prob, entropy, value = evaluate(batch)
        valid = batch.get("valid", None)
        log_ratio = log_prob - batch["action_log_prob"]
        ratio = log_ratio.exp()  # [B]
        advantage = batch["advantage"]
        if self.normalize_advantage:
            advantage = normalized(advantage, valid)
        gain = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - self.clip_range, 1 + self.clip_range))
        policy_loss = -mean_of(gain, valid)
        if self.clip_range_vf is not None:
            old_value = batch["state_value"]
            value = old_value + (value - old_value).clamp(-self.clip_range_vf, self.clip_range_vf)
        value_loss = mean_of((batch["value_target"] - value).square(), valid)
        entropy = mean_of(entropy, valid)
        loss = policy_loss + self.vf_coef * value_loss - self.ent_coef * entropy
        with torch.no_grad():
            kl, clipped = approximate_kl(log_ratio, valid), clip_fraction(ratio, self.clip_range, valid)
            old_kl = -mean_of(log_ratio, valid)  # the estimator k₁
        return LossTerms(loss, policy_loss.detach(), value_loss.detach(), entropy.detach(), kl, clipped, old_kl)


def normalized(advantage: Tensor, valid: Tensor | None = None) -> Tensor:
    """Advantages with mean 0 and standard deviation 1; a single one, which has no spread, stays as it is."""
    if valid is None:
        if advantage.numel() == 1:
            return advantage
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    centred = advantage - mean_of(advantage, valid)
    rows = valid.sum()
    std = (mean_of(centred.square(), valid) * rows / (rows - 1).clamp_min(1)).sqrt()
    return torch.where(rows > 1, centred / (std + 1e-8), advantage)
