"""The update: epochs of shuffled minibatches, each a gradient step of the loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ppo_lightning.algorithm.compiled_step import CompiledStep, NonFiniteError, unsupported_reason
from ppo_lightning.algorithm.loss import LossCoefficients, Objective
from ppo_lightning.algorithm.minibatches import MinibatchPlan, Samples, plan_minibatches, plan_over_ranks
from ppo_lightning.algorithm.optimizer_step import (
    Backend,
    EagerStep,
    NonFiniteGuard,
    UpdateSettings,
    parameters_of,
)
from ppo_lightning.compiler import Compilation, CompilerError
from ppo_lightning.errors import InputError


class UpdateResult(NamedTuple):
    """What an update did."""

    names: tuple[str, ...]
    """K names of scalars that the loss returned."""
    losses: Tensor
    """[M, K] of every minibatch, in order."""
    grad_norms: Tensor
    """[G, 3] norms of the gradient of each step, before clipping: of all parameters, of those that the action depends on,
    and of those that the value depends on."""
    coefficients: LossCoefficients
    epochs: int
    """Epochs that were started (count)."""
    minibatches: int
    """Minibatches of the last epoch."""
    stopped: bool
    """The update ended early, since the divergence was too large."""

    def column(self, name: str) -> Tensor:
        """A scalar of every minibatch, [M]."""
        return self.losses[:, self.names.index(name)]


@dataclass(eq=False)
class Updater:
    """Updates the policy of a module on rollouts, by the module's loss; parameters as of :class:`PPO`."""

    update_epochs: int
    num_minibatches: int
    gradient_accumulation_steps: int
    normalize_advantage: bool | Literal["all_ranks"]
    target_kl: float | None
    max_grad_norm: float | None
    guard: NonFiniteGuard
    """Checks gradients."""
    compilation: Compilation
    """Whether each gradient step is one compiled graph, where that is possible."""
    world_size: int = field(default=1, init=False)
    parameters: list[nn.Parameter] = field(default_factory=list, init=False)
    """Of the optimizer: an update clips and checks them."""
    eager: EagerStep | None = field(default=None, init=False)
    compiled: CompiledStep | None = field(default=None, init=False)
    """The step as one graph, where that is asked for and nothing prevents it."""
    _run: Any = field(default=None, init=False)
    _untrained: set[int] = field(default_factory=set, init=False)
    """Of the parameters that require gradients and that the optimizer does not train."""
    _unreached: list[str] = field(default_factory=list, init=False)
    """Names of trained parameters beside the policy's that no gradient has reached yet."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """That takes the steps; None before :meth:`prepare`."""
        return None if self._run is None else self._run[1]

    def prepare(
        self,
        module: Any,
        optimizer: torch.optim.Optimizer,
        backend: Backend,
        *,
        world_size: int = 1,
        hooks: Sequence[str] = (),
        precision: str = "",
    ) -> None:
        """Prepare the updates of a run; compile the step if asked for and possible.

        Args:
            module: whose parameters are trained, with attributes ``policy`` and ``loss``.
            optimizer: takes the steps.
            backend: of the run.
            world_size: ranks.
            hooks: classes that have hooks around gradients, which a compiled step does not call.
            precision: of the Trainer.
        """
        self.world_size, self._run = world_size, (module, optimizer, backend, hooks, precision)
        self._untrained = {id(one) for one in self._not_trained(module, optimizer)}
        if self._untrained:
            rank_zero_info(f"the optimizer does not train {self._names(self._untrained)}")
        self.compilation.report(next(module.policy.parameters()).device)
        self._make_steps()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "eager": None, "compiled": None, "_run": None, "parameters": []}  # of this process's run

    def refresh(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare again where the optimizer's parameters or the loss have changed.

        Raises:
            InputError: a module was replaced or added during training, and the optimizer does not train it.
        """
        added = {id(one) for one in self._not_trained(self._run[0], optimizer)} - self._untrained
        if added:
            raise InputError(
                f"{self._names(added)} came during training, and the optimizer does not train it: replace modules "
                "between two fits, or give their parameters to trainer.optimizers[0].add_param_group as well"
            )
        assert self.eager is not None
        changed = [*map(id, parameters_of(optimizer))] != [*map(id, self.parameters)]
        if changed or self.eager.objective.loss is not self._run[0].loss:
            if changed and self.world_size > 1:
                raise InputError(
                    "the optimizer's parameters changed during training on several ranks, whose gradients are averaged "
                    "over the parameters of its start: change them between two fits"
                )
            self._make_steps()

    def _not_trained(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        trained = {id(one) for one in parameters_of(optimizer)}
        return [one for one in module.parameters() if one.requires_grad and id(one) not in trained]

    def _names(self, parameters: set[int]) -> str:
        return ", ".join(name for name, one in self._run[0].named_parameters() if id(one) in parameters)

    def _make_steps(self) -> None:
        module, optimizer, backend, hooks, precision = self._run
        policy, objective = module.policy, Objective(module.policy, module.loss)
        policy.check_again()
        self.parameters = parameters_of(optimizer)
        trained, own = {id(one) for one in self.parameters}, {id(one) for one in policy.parameters()}
        self._unreached = [
            name for name, one in module.named_parameters() if id(one) in trained - own and one.requires_grad
        ]
        masks = policy.masks_of(self.parameters)
        self.eager = EagerStep(objective, optimizer, backend, masks, self.max_grad_norm, self.guard)
        self.compiled = None
        if not self.compilation.is_on(self.parameters[0].device):
            return
        reason = unsupported_reason(objective, optimizer, precision)
        if hooks:
            reason = f"{', '.join(hooks)} has hooks around gradients"
        try:
            if reason is not None:
                raise CompilerError(reason)
            self.compiled = CompiledStep(objective, optimizer, backend, self.world_size, self.max_grad_norm)
        except CompilerError as error:
            self.compilation.report_eager("the update", error)

    def update(
        self,
        samples: Samples,
        coefficients: LossCoefficients,
        generator: torch.Generator,
        gather: Callable[[Tensor], Tensor],
        scheduled: frozenset[str] = frozenset(),
        recompute: Callable[[], Samples] | None = None,
    ) -> UpdateResult:
        """Epochs of shuffled minibatches of the objective (Schulman et al. 2017, algorithm 1).

        Args:
            samples: of a rollout, as :meth:`PPO.training_samples` returns them.
            coefficients: of this iteration.
            generator: shuffles.
            gather: a row [P] of this rank -> the rows of all, [ranks, P].
            scheduled: names of the coefficients that change over the run.
            recompute: samples that replace those of their names before each epoch but the first; None keeps them.

        Raises:
            InputError: the loss did not return what it has to, or compiling fails on one of several ranks alone.
            NonFiniteGradient: a gradient or divergence is not finite, and such steps are not skipped.
        """
        assert self.eager is not None
        over_ranks = self.normalize_advantage == "all_ranks" and self.world_size > 1
        plan = plan_minibatches(
            samples,
            epochs=self.update_epochs,
            num_minibatches=self.num_minibatches,
            generator=generator,
            world_size=self.world_size,
            normalizes=over_ranks,
            gather=gather,
        )
        normalizes = bool(self.normalize_advantage) and not over_ranks
        settings = UpdateSettings(coefficients, normalizes, self.gradient_accumulation_steps, self.target_kl, scheduled)

        def recomputed() -> tuple[Samples, MinibatchPlan]:
            again = {**samples, **({} if recompute is None else recompute())}
            return again, plan_over_ranks(plan, again, self.world_size, True, gather) if over_ranks else plan

        between = None if recompute is None else recomputed
        if self.compiled is not None:
            result = self._compiled_epochs(self.compiled, samples, plan, settings, between, gather)
            if result is not None:
                self.guard.consecutive = 0
                return result
        return run_epochs(self.eager, samples, plan, settings, between)

    def _compiled_epochs(
        self,
        step: CompiledStep,
        samples: Samples,
        plan: MinibatchPlan,
        settings: UpdateSettings,
        recompute: Callable[[], tuple[Samples, MinibatchPlan]] | None,
        gather: Callable[[Tensor], Tensor],
    ) -> UpdateResult | None:
        """The update by compiled steps; None, with everything unchanged, where it has to be made eagerly."""
        is_first = step.names is None
        try:
            if is_first and self.world_size > 1 and not self._all_ranks_compile(step, samples, plan, settings, gather):
                return None
            return run_epochs(step, samples, plan, settings, recompute)
        except NonFiniteError:
            pass
        except CompilerError as error:
            if self.world_size > 1:
                raise InputError(f"compiling fails on this rank, since {error}: give compile: false") from error
            self.compilation.report_eager("the update", error)
            self.compiled = None
        step.restore()
        return None

    def _all_ranks_compile(
        self,
        step: CompiledStep,
        samples: Samples,
        plan: MinibatchPlan,
        settings: UpdateSettings,
        gather: Callable[[Tensor], Tensor],
    ) -> bool:
        """Whether every rank can compile the gradient: else all fall back to eager steps."""
        failure: CompilerError | None = None
        try:
            step.begin(samples, plan, settings)
            step.try_gradient()
        except CompilerError as error:
            failure = error
        failed = gather(torch.tensor([float(failure is not None)])).view(-1)
        if failed.any():
            self.compilation.report_eager("the update", failure or "another rank cannot compile it")
            self.compiled = None
        return not failed.any()

    def metrics(self, update: UpdateResult) -> dict[str, float]:
        """Metrics of an update beside its losses, of the options that are in use."""
        coefficients = update.coefficients
        metrics = {
            "train/clip_range": float(coefficients.clip_range),
            "train/ent_coef": float(coefficients.ent_coef),
        }
        if self.guard.skipped:
            metrics["train/skipped_steps"] = self.guard.skipped
        if coefficients.clip_range_vf is not None:
            metrics["train/clip_range_vf"] = coefficients.clip_range_vf
        if self.target_kl is not None:
            metrics["train/early_stopped"] = float(update.stopped)
        return metrics

    def warn_of_unreached(self) -> None:
        """Warn once of trained modules beside the policy that the loss does not use."""
        if not self._unreached or not any(one.grad is not None for one in self.parameters):
            return
        names, self._unreached = set(self._unreached), []
        without = [name for name, one in self._run[0].named_parameters() if name in names and one.grad is None]
        if without:
            rank_zero_warn(
                f"{', '.join(without)} did not receive a gradient in the first update and will not learn: use the module "
                "in the loss, or freeze it by requires_grad_(False)"
            )


def run_epochs(
    step: EagerStep | CompiledStep,
    samples: Samples,
    plan: MinibatchPlan,
    settings: UpdateSettings,
    recompute: Callable[[], tuple[Samples, MinibatchPlan]] | None = None,
) -> UpdateResult:
    """The epochs of an update, by one kind of gradient step.

    Before each epoch but the first, ``recompute`` gives its samples and plan. As in Stable-Baselines3, the update ends before
    the step of the first minibatch whose ``approx_kl`` exceeds 1.5 ``target_kl``.
    """
    step.begin(samples, plan, settings)
    limit = math.inf if settings.target_kl is None else 1.5 * settings.target_kl
    epoch = minibatch = 0
    stopped = False
    for epoch in range(len(plan.permutations)):
        if epoch and recompute is not None:
            step.recompute(recompute)
        samples_of_steps: Iterator[Any] = step.minibatches(epoch)
        for minibatch, of_step in enumerate(samples_of_steps):
            kl = step.gradient(of_step)
            if kl is not None:
                value = kl.item()
                if epoch == minibatch == 0 and not math.isfinite(value):
                    step.non_finite(value)  # no step was taken since the rollout: the policy itself is not finite
                stopped = not value <= limit  # NaN ends the update too
                if stopped:
                    break
            step.apply()
        if stopped:
            break
    return UpdateResult(*step.end(), settings.coefficients, epoch + 1, minibatch + 1, stopped)
