"""Hyperparameters that change during a run: by stages, and the learning rate by the KL divergence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from ppo_lightning.callbacks.events import callbacks_of
from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import (
    FINITE,
    FINITE_NOT_NEGATIVE,
    INDEX,
    ONE_OR_MORE,
    SHARE,
    Linear,
    check_fields,
    checked,
    schedule,
)


@dataclass(frozen=True)
class Stage:
    """Hyperparameters of a training stage; what it leaves out has the model's value."""

    from_steps: int | None = None
    """Environment steps of the run after which it begins (steps)."""
    from_share: float | None = None
    """Share of ``total_steps`` after which it begins (dimensionless, 0 to 1)."""
    learning_rate: float | Linear | None = None
    """Learning rate of the optimiser; a number is constant, {start, end} is a linear schedule over the whole run. With
    several parameter groups it is that of the first, and the other groups keep their ratio to it."""
    ent_coef: float | Linear | None = None
    """Weight of the entropy bonus, as of the model."""
    clip_range: float | Linear | None = None
    """Change of an action's probability ratio beyond which the objective is constant, as of the model."""
    num_steps: int | None = None
    """Steps of each environment per rollout (steps)."""
    freeze: Sequence[str] = ()
    """Parameters that do not learn: parts of their names, in which * matches anything (``critic``,
    ``encoders.*.weight``)."""

    def __post_init__(self) -> None:
        """Refuse two start conditions, and numbers out of their limits."""
        if isinstance(self.freeze, str):
            raise InputError(f"freeze of a Stage is a list of patterns: write [{self.freeze}]")
        rates = dict.fromkeys(("learning_rate", *COEFFICIENTS), FINITE_NOT_NEGATIVE)
        check_fields(self, "{} of a Stage", from_steps=INDEX, from_share=SHARE, num_steps=ONE_OR_MORE, **rates)
        if self.from_steps is not None and self.from_share is not None:
            raise InputError("a Stage begins at from_steps or at from_share, not at both: leave one of them out")
        for name in ("learning_rate", *COEFFICIENTS):
            if (value := getattr(self, name)) is not None:
                schedule(f"{name} of a Stage", value)

    def begins(self, total_steps: int) -> float:
        """Environment steps after which it begins."""
        if self.from_share is not None:
            return self.from_share * total_steps
        return self.from_steps or 0


COEFFICIENTS = ("ent_coef", "clip_range")
"""Fields of a stage that are schedules of the model under the same name."""


class Stages(Callback):
    """Changes learning rate, coefficients, length of rollouts and frozen parameters, stage by stage.

    A stage begins before the first rollout of which all steps lie in it. Where it unfreezes parameters, the optimiser's
    moments are reset. ``train/stage`` (1 for the first) is logged with each iteration.

    Args:
        stages: in their order; the first begins at once.

    Raises:
        InputError: the stages are out of order, set what something else sets, or name unknown parameters.
    """

    @checked("Stages: {}")
    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages or stages[0].from_steps or stages[0].from_share:
            raise InputError(
                "Stages takes one stage or more, of which the first begins at once: leave out where it begins"
            )
        self.stages = list(stages)
        self.stage = 0
        """Number of the current stage, from 1; 0 before the first."""
        self._own: dict[str, Any] | None = None
        """The model's own values, during a stage."""

    @property
    def sets_learning_rate(self) -> bool:
        """Whether any stage sets the learning rate."""
        return any(stage.learning_rate is not None for stage in self.stages)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["stage"] > len(self.stages):
            raise InputError(
                f"the checkpoint is at stage {state_dict['stage']}, there are {len(self.stages)}: give Stages as many"
            )
        self.stage = state_dict["stage"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = cast(PPOModule, pl_module)
        if module.num_env_steps == 0:  # these have seen another run
            self.stage = 0
        if self.sets_learning_rate:
            module.schedules.check_owner("lr", self)
        begins = [one.begins(module.total_steps) for one in self.stages]
        if sorted(set(begins)) != begins:
            raise InputError(f"stages begin at {begins} environment steps: each must begin after the one before it")
        for one in self.stages:
            _frozen(module.policy, one.freeze)
            if one.num_steps is not None:
                module.rollouts.check_num_steps(one.num_steps)
        strategy: Any = trainer.strategy
        finds_unused = getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
        if trainer.world_size > 1 and not finds_unused and any(one.freeze for one in self.stages):
            raise InputError(
                "a Stage freezes parameters, of which DDP waits for gradients: give --trainer.strategy "
                "ddp_find_unused_parameters_true"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the stage of a resumed run, before its update is compiled."""
        module = cast(PPOModule, pl_module)
        self._own = {
            "requires_grad": {name: one.requires_grad for name, one in module.policy.named_parameters()},
            "num_steps": module.num_steps,
        }
        if self.stage:
            self._apply(module, self.stages[self.stage - 1])

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the stage that is due, before the rollout is collected."""
        module = cast(PPOModule, pl_module)
        due = sum(one.begins(module.total_steps) <= module.num_env_steps for one in self.stages)
        module.schedule_metrics["train/stage"] = float(max(due, self.stage))
        if due <= self.stage:
            return
        before = {name for name, one in module.policy.named_parameters() if not one.requires_grad}
        self.stage = due
        self._apply(module, self.stages[due - 1])
        if any(one.requires_grad for name, one in module.policy.named_parameters() if name in before):
            trainer.optimizers[0].state.clear()  # a compiled update counts the steps of all parameters together
        rank_zero_info(f"stage {due} of {len(self.stages)} from {module.num_env_steps:,} environment steps on")

    def _apply(self, module: PPOModule, stage: Stage) -> None:
        assert self._own is not None
        for name in COEFFICIENTS:
            if any(getattr(one, name) is not None for one in self.stages):
                module.schedules.override(name, getattr(stage, name), owner=self)
        if self.sets_learning_rate:
            module.schedules.override("lr", stage.learning_rate, owner=self)
        module.rollouts.set_num_steps(self._own["num_steps"] if stage.num_steps is None else stage.num_steps)
        frozen = _frozen(module.policy, stage.freeze)
        for name, parameter in module.policy.named_parameters():
            parameter.requires_grad_(self._own["requires_grad"][name] and name not in frozen)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the model's own values."""
        if self._own is None:
            return
        module = cast(PPOModule, pl_module)
        module.schedules.release(self)
        self._apply(module, Stage())
        module.schedule_metrics.pop("train/stage", None)
        self._own = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def _frozen(policy: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Names of the parameters that match patterns.

    Raises:
        InputError: a pattern matches none, or all parameters are frozen.
    """
    names, found = [name for name, _ in policy.named_parameters()], set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, f"*{pattern}*")}
        if not matches:
            raise InputError(f"freeze {pattern!r} of a Stage is in no parameter's name: they are {', '.join(names)}")
        found |= matches
    if names and len(found) == len(names):
        raise InputError(f"a Stage freezes all of the policy ({', '.join(patterns)}): leave something to learn")
    return found


class AdaptiveLearningRate(Callback):
    """Lowers the learning rate where an update's KL divergence is too large, and raises it where it is too small.

    The rule of rsl_rl (Schwarke et al. 2025), once per iteration, by ``train/approx_kl`` (the divergence of the update's
    last epoch, over all ranks): more than twice ``desired_kl`` divides the learning rate by ``factor``, less than half of
    it, but more than 0, multiplies it. It starts at the optimiser's learning rate; a resumed run keeps its last one.

    rsl_rl applies it before each gradient step, to the exact divergence between two Gaussians. Here it applies to any
    distribution, by the estimate E[r − 1 − ln r] (Schulman 2020), and compiled updates know their learning rate beforehand.

    Args:
        desired_kl: divergence per update to aim at (nats).
        factor: by which the learning rate changes (dimensionless, more than 1).
        min_lr: lowest learning rate.
        max_lr: highest learning rate.

    Raises:
        InputError: a number cannot be used, or something else sets the learning rate, too.
    """

    @checked("AdaptiveLearningRate: {}", desired_kl=FINITE, factor=FINITE, min_lr=FINITE, max_lr=FINITE)
    def __init__(
        self, desired_kl: float = 0.01, factor: float = 1.5, min_lr: float = 1e-5, max_lr: float = 1e-2
    ) -> None:
        if not (desired_kl > 0 and factor > 1 and 0 < min_lr <= max_lr):
            raise InputError(
                "AdaptiveLearningRate takes desired_kl above 0, factor above 1 and min_lr between 0 and max_lr, got "
                f"desired_kl={desired_kl}, factor={factor}, min_lr={min_lr}, max_lr={max_lr}"
            )
        self.desired_kl, self.factor, self.min_lr, self.max_lr = desired_kl, factor, min_lr, max_lr
        self.rate: float | None = None
        """Learning rate of the next iteration; None before the first."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rate = state_dict["rate"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = cast(PPOModule, pl_module)
        if module.num_env_steps == 0:  # it has seen another run
            self.rate = None
        module.schedules.check_owner("lr", self)
        if any(stages.sets_learning_rate for stages in callbacks_of(trainer, Stages)):
            raise InputError(
                "AdaptiveLearningRate and Stages both set the learning rate: leave AdaptiveLearningRate out, or "
                "learning_rate in all stages"
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rate is None:
            self.rate = float(trainer.optimizers[0].param_groups[0]["initial_lr"])
        cast(PPOModule, pl_module).schedules.override("lr", self.rate, owner=self)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.rate is not None
        if "train/approx_kl" not in trainer.callback_metrics:
            raise InputError(
                "AdaptiveLearningRate needs the divergence: call evaluate(batch) in the loss, or return approx_kl"
            )
        kl = float(trainer.callback_metrics["train/approx_kl"])
        if kl > 2 * self.desired_kl:
            self.rate = max(self.min_lr, self.rate / self.factor)
        elif 0 < kl < self.desired_kl / 2:
            self.rate = min(self.max_lr, self.rate * self.factor)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast(PPOModule, pl_module).schedules.release(self)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
