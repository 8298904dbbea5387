"""A curriculum: environments that change while a policy learns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from ppo_lightning.callbacks.async_evaluation import AsyncEvaluation
from ppo_lightning.callbacks.events import EvaluationCallback, callbacks_of
from ppo_lightning.envs import EnvOverrides
from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import may_come_later
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import FINITE, INDEX, ONE_OR_MORE, check_fields, checked


@dataclass(frozen=True)
class Level:
    """Environment overrides of a curriculum level; what it leaves out keeps the previous level's value.

    It begins when all of its conditions hold; the first level has none.
    """

    attributes: dict[str, Any] = field(default_factory=dict)
    """Values of attributes of the environment or its wrappers, or the argument of its methods, by name
    (``cfg.terrain.level`` is an attribute of an attribute; a tensor or array is filled)."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments with which environments are recreated, beside those of the model."""
    from_steps: int | None = None
    """Environment steps of the run after which it begins (steps)."""
    metric: str | None = None
    """It begins when this metric, under its Stable-Baselines3 name, is within its bounds on rank 0."""
    at_least: float | None = None
    """Lower bound of the metric, in its unit."""
    at_most: float | None = None
    """Upper bound of the metric, in its unit."""
    times: int = 1
    """How often in a row the metric must be within its bounds: iterations, or evaluations for ``eval/…`` (count)."""

    def __post_init__(self) -> None:
        """Refuse bounds without a metric, a metric without bounds, and values that cannot be compared or saved."""
        check_fields(
            self, "{} of a Curriculum's Level", from_steps=INDEX, at_least=FINITE, at_most=FINITE, times=ONE_OR_MORE
        )
        for name, value in (*self.attributes.items(), *self.env_kwargs.items()):
            if isinstance(value, np.ndarray | torch.Tensor):
                raise InputError(
                    f"a Level of a Curriculum gives {name} as {type(value).__name__}: give a number or a list, with which an "
                    "attribute that is an array or tensor is filled"
                )
        if (self.metric is None) != (self.at_least is None and self.at_most is None):
            raise InputError(
                f"a Level of a Curriculum has metric {self.metric}, at_least {self.at_least} and at_most {self.at_most}: "
                "give a metric together with one bound or both"
            )
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise InputError(
                f"a Level of a Curriculum waits for {self.metric} of at_least {self.at_least} and at_most {self.at_most}: no "
                "number is both, correct one of them"
            )

    @property
    def is_conditional(self) -> bool:
        """Whether it has a condition."""
        return self.from_steps is not None or self.metric is not None

    def accepts(self, value: float) -> bool:
        """Whether its metric is within its bounds; NaN is not."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


class Curriculum(EvaluationCallback):
    """Changes attributes or arguments of environments, level by level.

    A level begins between two rollouts. It resets the ``rollout/…`` averages, so that they cover this level alone, and the
    count of how often the next level's metric was reached. Levels come in order, and none comes back.
    ``curriculum/stage`` (1 for the first) is logged with each iteration, and kept in checkpoints.

    Args:
        levels: in their order.
        evaluation: evaluate on the current level, too; else on the model's own environments.

    Raises:
        InputError: there are no levels, the first has a condition, or another has none or one that cannot be met.
    """

    @checked("Curriculum: {}")
    def __init__(self, levels: Sequence[Level], evaluation: bool = False) -> None:
        if not levels or levels[0].is_conditional:
            raise InputError(
                "Curriculum takes one level or more, of which the first begins at once: give it no condition"
            )
        for number, level in enumerate(levels[1:], start=2):
            if not level.is_conditional:
                raise InputError(f"level {number} of the Curriculum waits for nothing: give it from_steps, or a metric")
        begins = [level.from_steps for level in levels if level.from_steps is not None]
        if sorted(set(begins)) != begins:
            raise InputError(
                f"levels of the Curriculum begin from_steps {begins}: each must begin after the one before it"
            )
        self.levels, self.evaluation = list(levels), evaluation
        self.stage = 0
        """Number of the current level, from 1; 0 before the first."""
        self.reached = 0
        """How often in a row the next level's metric was within its bounds."""
        self._applied = False
        self._last_value: Any = None
        """Last checked value of the next level's metric."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "reached": self.reached}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["stage"] > len(self.levels):
            raise InputError(
                f"the checkpoint is at level {state_dict['stage']} of its Curriculum, this one has {len(self.levels)}: give "
                "as many"
            )
        self.stage, self.reached = state_dict["stage"], state_dict["reached"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._applied = False
        if stage == "fit" and cast(PPOModule, pl_module).num_env_steps == 0:  # it has seen another run
            self.stage = self.reached = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to wait for evaluations in a run without any."""
        metric = next((level.metric for level in self.levels if (level.metric or "").startswith("eval/")), None)
        if metric is not None and trainer.limit_val_batches == 0 and not callbacks_of(trainer, AsyncEvaluation):
            raise InputError(
                f"a Level of the Curriculum waits for {metric}, and there are no evaluations (limit_val_batches 0, or a "
                "VectorEnv that cannot be made again): take a metric rollout/…"
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the level that is due, before the rollout is collected."""
        module, before = cast(PPOModule, pl_module), self.stage
        while self.stage < len(self.levels) and self._is_due(self.levels[self.stage], module.num_env_steps):
            self.stage, self.reached = self.stage + 1, 0
        if self.stage == before and self._applied:
            return
        changes = self.stage != before
        if not self._applied and before and changes:
            self._apply(module, before, restart=False)  # what the resumed run had last
        self._apply(module, self.stage, restart=changes)
        if changes:
            level = self.levels[self.stage - 1]
            values = ", ".join(f"{name} {value}" for name, value in {**level.attributes, **level.env_kwargs}.items())
            rank_zero_info(
                f"curriculum: level {self.stage} of {len(self.levels)} from {module.num_env_steps:,} environment steps on"
                f"{values and ': ' + values}"
            )
        if changes and before:
            module.rollouts.episodes.ep_info_buffer.clear()
            self._last_value = trainer.callback_metrics.get(self._monitored or "")  # of the level before

    @property
    def _monitored(self) -> str | None:
        """Metric that the next level waits for."""
        return self.levels[self.stage].metric if self.stage < len(self.levels) else None

    def _is_due(self, level: Level, num_env_steps: int) -> bool:
        begun = level.from_steps is None or num_env_steps >= level.from_steps
        return begun and (level.metric is None or self.reached >= level.times)

    def _overrides(self, stage: int) -> EnvOverrides:
        """Overrides of a level, merged with those of the levels before."""
        levels = self.levels[:stage]
        attributes = {name: value for level in levels for name, value in level.attributes.items()}
        return EnvOverrides(attributes, {name: value for level in levels for name, value in level.env_kwargs.items()})

    def _apply(self, module: PPOModule, stage: int, *, restart: bool) -> None:
        overrides = self._overrides(stage)
        module.rollouts.set_env_overrides(overrides, restart=restart)
        if self.evaluation:
            module.env_provider.set_eval_overrides(overrides)
        module.schedule_metrics["curriculum/stage"] = float(self.stage)
        self._applied = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check_metric(trainer, evaluated=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metric = self._monitored
        if metric is not None and metric not in trainer.callback_metrics:
            rank_zero_warn(
                f"level {self.stage + 1} of the Curriculum waits for {metric}, which there never was: take one of "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the level of a checkpoint that is only validated."""
        if self.evaluation and self.stage:
            cast(PPOModule, pl_module).env_provider.set_eval_overrides(self._overrides(self.stage))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    @override
    def on_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, step: int, statistics: dict[str, float]
    ) -> None:
        self._check_metric(trainer, evaluated=True)

    def _check_metric(self, trainer: Trainer, *, evaluated: bool) -> None:
        """Count how often the next level's metric was within its bounds on rank 0."""
        metric, metrics = self._monitored, trainer.callback_metrics
        if metric is None or metric.startswith("eval/") != evaluated:
            return
        before, self._last_value = self._last_value, metrics.get(metric)
        value = None if self._last_value is None else float(self._last_value)
        value, is_new = trainer.strategy.broadcast((value, self._last_value is not before))
        if value is not None:
            if is_new:
                self.reached = self.reached + 1 if self.levels[self.stage].accepts(value) else 0
        elif not (metric.startswith("rollout/") or may_come_later(metric)):
            raise InputError(
                f"level {self.stage + 1} of the Curriculum waits for {metric}, which there is not: take one of "
                f"{', '.join(sorted(metrics))}, or of an evaluation (eval/mean_reward)"
            )
