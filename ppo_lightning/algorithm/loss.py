"""The clipped objective of PPO, and the interface of losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.policy import Policy

Batch = Mapping[str, Any]
"""Samples [B], or sequences [B, L] of a recurrent policy, by the rollout's keys."""

Losses = dict[str, Tensor]
"""Scalars of one minibatch by name; ``loss`` is minimised."""


@dataclass(frozen=True)
class LossCoefficients:
    """Coefficients of the loss in one iteration, at the current point of their schedules.

    In a compiled step, those that change over the run are 0-d tensors.
    """

    clip_range: float | Tensor = 0.2
    """Clip range ε of the probability ratio: beyond it the objective is constant (dimensionless)."""
    clip_range_vf: float | None = None
    """Change of a value beyond which the critic's loss is constant, in value units; None does not clip."""
    vf_coef: float = 0.5
    """Weight of the critic's mean squared error, which is not halved (dimensionless)."""
    ent_coef: float | Tensor = 0.0
    """Weight of the entropy bonus (advantage units per nat)."""


class Evaluate:
    """Evaluates stored actions under the current policy, with gradients; all shapes are [B, L] for a recurrent policy.

    Args:
        policy: with the parameters of the current gradient step.
        batch: the minibatch of that step.
    """

    def __init__(self, policy: Policy, batch: Batch) -> None:
        self._policy, self._batch = policy, batch
        self.log_prob: Tensor | None = None
        """[B] of the minibatch's actions, as the loss has evaluated them."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability and entropy (nats) of the batch's actions, and the value in units of ``value_target``, each [B]."""
        log_prob, entropy, value = self._policy.evaluate_actions(batch)
        if batch is self._batch or self.log_prob is None:
            self.log_prob = log_prob
        return log_prob, entropy, value

    def latent(self, batch: Batch) -> Tensor:
        """The last hidden features of the policy's actor, [B, H].

        Raises:
            InputError: the network has no method ``latent``.
        """
        return self._policy.latent(batch)


Loss = Callable[[Any, Any, Any], Mapping[str, Any]]
"""(batch, evaluate, coefficients) -> scalars by name, as :meth:`PPOLoss.forward`."""


class PPOLoss(nn.Module):
    """Clipped surrogate objective, negated for descent (Schulman et al. 2017, eqs. 7 and 9).

    Subclass it to add terms, with parameters of their own, or to replace :meth:`surrogate`.
    """

    @override
    def forward(self, batch: Batch, evaluate: Evaluate, coefficients: LossCoefficients) -> Losses:
        """Losses of a minibatch.

        Args:
            batch: [B], or sequences [B, L] of a recurrent policy. It has every key of the rollout, ``advantage`` (normalised
                where ``normalize_advantage`` is on) and ``value_target``. ``observation`` is what the network sees.
                ``valid`` is there only where some samples do not count; they are False.
            evaluate: log-probability, entropy and value of the stored actions under the current policy.
            coefficients: of this iteration.

        Returns:
            ``loss``, ``policy_gradient_loss``, ``value_loss`` (the plain mean squared error), ``entropy_loss`` (the negative
            mean entropy, nats), and the diagnostics ``approx_kl``, ``clip_fraction`` and ``old_approx_kl``.
        """
        log_prob, entropy, value = evaluate(batch)
        valid = batch.get("valid", None)
        log_ratio = log_prob - batch["action_log_prob"]
        ratio = log_ratio.exp()  # [B]
        policy_loss = -masked_mean(self.surrogate(ratio, batch["advantage"], coefficients), valid)
        if coefficients.clip_range_vf is not None:
            old_value = batch["state_value"]
            value = old_value + (value - old_value).clamp(-coefficients.clip_range_vf, coefficients.clip_range_vf)
        value_loss = masked_mean((batch["value_target"] - value).square(), valid)
        entropy_loss = -masked_mean(entropy, valid)
        return {
            "loss": policy_loss + coefficients.vf_coef * value_loss + coefficients.ent_coef * entropy_loss,
            "policy_gradient_loss": policy_loss,
            "value_loss": value_loss,
            "entropy_loss": entropy_loss,
            **policy_change(log_ratio, ratio, coefficients.clip_range, valid),
        }

    def surrogate(self, ratio: Tensor, advantage: Tensor, coefficients: LossCoefficients) -> Tensor:
        """What the policy maximises, [B].

        Args:
            ratio: [B] π_new(a|s) / π_old(a|s).
            advantage: [B].
            coefficients: of this iteration.
        """
        clip_range = coefficients.clip_range
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return torch.minimum(advantage * ratio, advantage * clipped)


class Objective(nn.Module):
    """Policy and loss as one module: the loss as a function of all parameters that it can depend on.

    Args:
        policy: that learns.
        loss: a module, or a callable of the same signature.
    """

    def __init__(self, policy: Policy, loss: Loss) -> None:
        super().__init__()
        self.policy, self.loss = policy, loss

    @override
    def forward(self, batch: Batch, coefficients: LossCoefficients) -> Losses:
        """Scalars of a minibatch by name, with those of :func:`policy_change` for a loss that evaluates the minibatch.

        Raises:
            InputError: the loss did not return scalars by name.
        """
        evaluate = Evaluate(self.policy, batch)
        losses = self.loss(batch, evaluate, coefficients)
        if not (hasattr(losses, "items") and "loss" in losses.keys()):  # noqa: SIM118  # a TensorDict has no `in`
            kind = type(self.loss).__name__
            raise InputError(
                f"the loss {kind} must return a dictionary of scalars with the key loss, got {type(losses).__name__}"
            )
        scalars = {name: self._scalar(name, value) for name, value in losses.items()}
        if "approx_kl" not in scalars and evaluate.log_prob is not None:
            log_ratio = evaluate.log_prob - batch["action_log_prob"]
            valid = batch.get("valid", None)
            scalars = {**policy_change(log_ratio, log_ratio.exp(), coefficients.clip_range, valid), **scalars}
        return scalars

    def _scalar(self, name: str, value: Any) -> Tensor:
        if isinstance(value, int | float):
            value = torch.tensor(float(value), device=next(self.policy.parameters()).device)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the loss {type(self.loss).__name__} returned {name} as {shape}: each value must be a scalar, take its mean"
            )
        return value.reshape(())


def normalize_advantages(advantage: Tensor, valid: Tensor | None = None) -> Tensor:
    """Advantages with mean 0 and standard deviation 1; a single one, which has no spread, is returned unchanged.

    Args:
        advantage: [B] or [B, L].
        valid: likewise, bool, the samples that count; None is all.
    """
    if valid is None:
        if advantage.numel() == 1:
            return advantage
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    centred = advantage - masked_mean(advantage, valid)
    count = valid.sum()
    std = (masked_mean(centred.square(), valid) * count / (count - 1).clamp_min(1)).sqrt()
    return torch.where(count > 1, centred / (std + 1e-8), advantage)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of values [B] over the samples that are ``valid`` [B] bool; None is all of them."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)


@torch.no_grad()
def policy_change(log_ratio: Tensor, ratio: Tensor, clip_range: float | Tensor, valid: Tensor | None) -> Losses:
    """Diagnostics of how far the policy is from the one that collected the rollout.

    Args:
        log_ratio: [B] log π_new(a|s) - log π_old(a|s).
        ratio: [B] its exponential.
        clip_range: of the objective.
        valid: [B] bool, the samples that count; None is all.

    Returns:
        ``approx_kl`` and ``old_approx_kl``, Schulman's estimators k₃ and k₁ of KL(old ‖ new) (nats), and ``clip_fraction``.
    """
    return {
        "approx_kl": approximate_kl(log_ratio, valid),
        "clip_fraction": clip_fraction(ratio, clip_range, valid),
        "old_approx_kl": -masked_mean(log_ratio, valid),
    }


def approximate_kl(log_ratio: Tensor, valid: Tensor | None = None) -> Tensor:
    """Estimate of KL(old ‖ new), in nats: the mean of (ρ - 1) - log ρ, unbiased and never negative.

    (Schulman 2020, "Approximating KL divergence", the estimator k₃.)

    Args:
        log_ratio: [B] log π_new(a|s) - log π_old(a|s) for actions drawn from π_old.
        valid: [B] bool, the samples that count; None is all.
    """
    return masked_mean(log_ratio.expm1() - log_ratio, valid)


def clip_fraction(ratio: Tensor, clip_range: float | Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of the samples [B] whose probability ratio left [1 - clip_range, 1 + clip_range] (dimensionless)."""
    return masked_mean(((ratio - 1).abs() > clip_range).float(), valid)
