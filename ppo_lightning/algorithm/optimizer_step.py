"""The eager gradient step, for any optimizer: backward passes, clipping, and the check that gradients are finite."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ppo_lightning.algorithm.loss import LossCoefficients, Objective, normalize_advantages
from ppo_lightning.algorithm.minibatches import (
    MinibatchPlan,
    Samples,
    index_samples,
    map_samples,
    microbatches,
    minibatches,
)
from ppo_lightning.errors import InputError

MAX_SKIPPED = 10
"""Gradient steps in a row that may be skipped because the gradient was not finite."""


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class UpdateSettings(NamedTuple):
    """Settings of one update."""

    coefficients: LossCoefficients
    normalize_advantage: bool
    """The advantages of each minibatch are normalised by their own moments."""
    gradient_accumulation_steps: int
    """Parts in which the gradient of a minibatch is accumulated (count)."""
    target_kl: float | None
    """The update ends where the divergence exceeds 1.5 times this (nats)."""
    scheduled: frozenset[str]
    """Names of the coefficients that change over the run."""


StepRecord = tuple[tuple[str, ...], Tensor, Tensor]
"""What the gradient steps of an update did: the first fields of :class:`~ppo_lightning.algorithm.update.UpdateResult`."""


class Backend:
    """How gradients are computed and steps are taken: by torch alone, in one process; subclasses go through Lightning.

    Args:
        optimizer: takes the steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; after the last microbatch of a minibatch, average them over ranks."""
        loss.backward()

    def step(self, clip: Callable[[], None]) -> None:
        """Clip, then take a step of the optimizer."""
        clip()
        self.optimizer.step()

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all ranks."""


class EagerStep:
    """Gradient steps of an update, one operation at a time.

    ``run_epochs`` calls :meth:`begin`, then for each minibatch of :meth:`minibatches` :meth:`gradient` and, unless the
    divergence is too large, :meth:`apply`, and :meth:`end`. :class:`CompiledStep` has the same methods.

    Args:
        objective: that is minimised.
        optimizer: takes the steps.
        backend: of the run.
        masks: [2, P] 1 for each of the optimizer's parameters that the action depends on, and that the value depends on.
        max_grad_norm: Euclidean, over all parameters; None does not clip.
        guard: checks norms.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        backend: Backend,
        masks: Tensor,
        max_grad_norm: float | None,
        guard: "NonFiniteGuard",
    ) -> None:
        self.objective, self.optimizer, self.backend, self.masks = objective, optimizer, backend, masks
        self.max_grad_norm, self.guard = max_grad_norm, guard
        self.parameters = parameters_of(optimizer)
        self.names: tuple[str, ...] | None = None
        """Of the scalars that the loss returns; None before its first call."""

    def begin(self, samples: Samples, plan: MinibatchPlan, settings: UpdateSettings) -> None:
        """Prepare an update."""
        self.settings = settings
        self._set_samples(samples, plan)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.norms_of_parameters: list[Tensor] = []

    def _set_samples(self, samples: Samples, plan: MinibatchPlan) -> None:
        valid = samples.get("valid")
        if valid is not None and valid.ndim == 1:
            index = valid.nonzero().flatten()
            samples = {name: leaf for name, leaf in samples.items() if name != "valid"}
            samples = index_samples(samples, index)
        self.samples, self.plan = samples, plan

    def recompute(self, samples: Callable[[], tuple[Samples, MinibatchPlan]]) -> None:
        """Continue, between two epochs, with samples and a plan that the present policy computes."""
        self._set_samples(*samples())

    def minibatches(self, epoch: int) -> Iterator[tuple[Samples, float]]:
        """The minibatches of an epoch, with their weights in the loss."""
        samples, plan = self.samples, self.plan
        if plan.moments is not None:
            samples = {**samples, "advantage": plan.normalized_advantage(samples["advantage"], epoch)}
        parts = minibatches(samples, plan.permutations[epoch].to(samples["advantage"].device), plan.sizes)
        return zip(parts, plan.loss_weights[epoch], strict=True)

    def gradient(self, minibatch: tuple[Samples, float]) -> Tensor | None:
        """Compute the gradient of a minibatch; its divergence where ``target_kl`` is given.

        Raises:
            InputError: the loss did not return what it has to.
        """
        samples, weight = minibatch
        if self.settings.normalize_advantage:
            samples = {**samples, "advantage": normalize_advantages(samples["advantage"], samples.get("valid"))}
        self.minibatch = samples
        parts = microbatches(samples, self.settings.gradient_accumulation_steps)
        self.optimizer.zero_grad()
        rows = []
        for index, (part, share) in enumerate(parts):
            losses = self.objective(part, self.settings.coefficients)
            self._check_names(losses)
            share *= weight
            if share != 1.0:
                losses = {name: share * value for name, value in losses.items()}
            rows.append(torch.stack([value.detach() for value in losses.values()]))
            self.backend.backward(losses["loss"], last=index + 1 == len(parts))
        self.losses.append(rows[0] if len(rows) == 1 else torch.stack(rows).sum(0))
        if self.settings.target_kl is None:
            return None
        kl = self.losses[-1][[self.approx_kl]]
        self.backend.all_reduce(kl)
        return kl

    def apply(self) -> None:
        """Clip and take the step."""
        self.backend.step(self.clip)

    def non_finite(self, value: float) -> None:
        """Skip the update whose first divergence is not finite, or end the run.

        Raises:
            NonFiniteGradient: such steps are not skipped.
        """
        self.guard.accepts(value, self.contents)

    def end(self) -> StepRecord:
        """What the steps of this update did."""
        assert self.names is not None
        norms = torch.zeros(0, 3)
        if self.norms:
            masks = self.masks.to(self.norms[0])
            of_heads = (torch.stack(self.norms_of_parameters).square() @ masks.T).sqrt()
            norms = torch.cat([torch.stack(self.norms)[:, None], of_heads], 1)
        return self.names, torch.stack(self.losses), norms

    @property
    def approx_kl(self) -> int:
        """Position of the divergence among the scalars."""
        assert self.names is not None
        if "approx_kl" not in self.names:
            raise InputError("target_kl needs the divergence: call evaluate(batch) in the loss, or return approx_kl")
        return self.names.index("approx_kl")

    def _check_names(self, losses: dict[str, Tensor]) -> None:
        self.names = self.names or tuple(losses)
        if self.names != tuple(losses):
            raise InputError(
                f"the loss returned {', '.join(losses)}, and in its first call {', '.join(self.names)}: return the same names "
                "in the same order, 0 where there is no value"
            )

    def clip(self, scaler: Any = None) -> None:
        """Scale all gradients together down to ``max_grad_norm``, and keep the norm that they had.

        Args:
            scaler: of gradients, which skips the steps whose gradients it has scaled beyond the range of their dtype.

        Raises:
            NonFiniteGradient: the norm is not finite, and such steps are not skipped; no step was taken.
        """
        norm, of_parameters = clip_by_norm(self.parameters, self.max_grad_norm)
        value = norm.item()
        overflows = scaler is not None and not math.isfinite(value) and scaler.get_scale() >= 1.0
        if not overflows and not self.guard.accepts(value, self.contents):
            for parameter in self.parameters:
                parameter.grad = None  # which optimizers leave out
        self.norms.append(norm)
        self.norms_of_parameters.append(of_parameters)

    def contents(self) -> dict[str, Any]:
        """What the last gradient was computed from, as plain tensors."""
        loss = self.objective.loss
        return {
            "samples": map_samples(lambda leaf: leaf, self.minibatch),
            "policy": self.objective.policy.state_dict(),
            "loss": loss.state_dict() if isinstance(loss, nn.Module) else {},
            "coefficients": asdict(self.settings.coefficients),
        }


def clip_by_norm(parameters: Sequence[nn.Parameter], max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale all gradients together down to a norm, as :func:`torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: P of them, some without a gradient maybe.
        max_norm: Euclidean, over all parameters; None does not clip.

    Returns:
        The norm that they had, and that of each parameter [P], 0 without a gradient.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    norm = norms.norm()
    nn.utils.clip_grads_with_norm_(parameters, max_norm or torch.inf, norm)
    if len(norms) < len(parameters):
        have = torch.tensor([one.grad is not None for one in parameters], device=norms.device)
        norms = norms.new_zeros(len(have)).masked_scatter(have, norms)
    return norm, norms


class NonFiniteGradient(Exception):  # noqa: N818
    """A gradient's norm, or the first divergence of an update, is not finite; no step was taken by it.

    Args:
        norm: of the gradient.
        consecutive: gradients in a row that were not finite.
        contents: what it was computed from, as plain data.
    """

    def __init__(self, norm: float, consecutive: int, contents: dict[str, Any]) -> None:
        super().__init__(norm)
        self.norm, self.consecutive, self.contents = norm, consecutive, contents


class NonFiniteGuard:
    """Decides whether a step may be taken, and counts those that were skipped.

    All ranks decide alike: their gradients are the same by then.

    Args:
        non_finite: ``raise`` ends the run at the first gradient whose norm is not finite, ``skip`` at the eleventh in a row.
    """

    def __init__(self, non_finite: Literal["raise", "skip"]) -> None:
        self.non_finite = non_finite
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.skipped = self.consecutive = 0

    def accepts(self, norm: float, contents: Callable[[], dict[str, Any]]) -> bool:
        """Whether a step may be taken; else it is skipped.

        Args:
            norm: of the gradient.
            contents: what the gradient was computed from.

        Raises:
            NonFiniteGradient: the norm is not finite, and such steps are not skipped.
        """
        if math.isfinite(norm):
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        if self.non_finite == "skip" and self.consecutive <= MAX_SKIPPED:
            return False
        raise NonFiniteGradient(norm, self.consecutive if self.non_finite == "skip" else 1, contents())


def write_dump(error: NonFiniteGradient, folder: Path, iteration: int, rank: int) -> str:
    """Write what a gradient was computed from, as plain tensors.

    Args:
        error: with that.
        folder: for the file.
        iteration: number of the current one, from 1.
        rank: of this process.

    Returns:
        The message of the error that ends the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("non_finite.pt" if rank == 0 else f"non_finite_rank_{rank}.pt")
    torch.save({"norm": error.norm, "iteration": iteration, **error.contents}, file)
    times = f" {error.consecutive} times in a row" if error.consecutive > 1 else ""
    return (
        f"the gradient's norm is {error.norm}{times} in iteration {iteration}, the step was not taken: lower the learning "
        "rate, or look for observations or rewards of extreme size (normalize_observation, normalize_reward); "
        f"{file} holds what it was computed from"
    )
