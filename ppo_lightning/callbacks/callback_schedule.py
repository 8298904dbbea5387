"""Schedules callbacks that monitor a metric, or save by iterations or time."""

import difflib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from typing_extensions import override

from ppo_lightning.callbacks.async_evaluation import AsyncEvaluation
from ppo_lightning.callbacks.checkpoints import RunCheckpoint
from ppo_lightning.callbacks.events import EvaluationCallback, callbacks_of
from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import LATER, may_come_later
from ppo_lightning.module import PPOModule

PACKAGES = ("ppo_lightning", "lightning", "torch", "builtins")
"""Packages whose classes log no unknown metrics."""

INT32_MAX = 2**31 - 1


class CallbackSchedule(EvaluationCallback):
    """Lets :class:`EarlyStopping` and :class:`ModelCheckpoint` act when their metric is logged, at their own intervals.

    Lightning lets them act by the evaluation interval, raises an error where their metric is not logged yet, and ignores
    ``train_time_interval`` in manual optimisation. Here a callback that monitors ``eval/…`` acts after each evaluation, any
    other after each iteration, unless the user set it otherwise. A callback waits for a metric that is logged later
    (``rollout/ep_rew_mean`` needs a finished episode); a metric that is never logged is an error.

    Raises:
        InputError: a callback monitors a metric that the run does not log.
    """

    POSITION = 2

    def __init__(self) -> None:
        self._changed: list[tuple[Callback, str, Any]] = []
        """The user's callbacks, with the attributes that this one has set and their previous values."""
        self._has_evaluated = False
        self._seen: set[str] = set()
        """Monitored metrics that were logged, though the last iteration may lack them."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._has_evaluated, self._seen = False, set()
        if stage != "fit":
            return
        for callback in _monitors(trainer):
            name = _timing_attribute(callback)
            if getattr(callback, name) is None:
                self._set(callback, name, not _monitors_evaluation(callback))
            if isinstance(callback, EarlyStopping) and callback.strict:
                self._set(callback, "strict", False)

    def _set(self, callback: Callback, name: str, value: Any) -> None:
        self._changed.append((callback, name, getattr(callback, name)))
        setattr(callback, name, value)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the user's checkpoints apart from those of the run."""
        own = [path for one in callbacks_of(trainer, RunCheckpoint) for path in one.paths()]
        for callback in callbacks_of(trainer, ModelCheckpoint):
            if isinstance(callback, RunCheckpoint):
                continue
            path = Path(callback.format_checkpoint_name({}))
            if path in own:
                raise InputError(
                    f"ModelCheckpoint(filename={callback.filename!r}) would write {path}, which this run writes itself: give "
                    "another filename or dirpath"
                )
            if callback.save_last and Path(callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)) in own:
                # The name that Lightning takes where the file exists already.
                self._set(callback, "CHECKPOINT_NAME_LAST", f"{callback.CHECKPOINT_NAME_LAST}-v1")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._changed:
            callback, name, value = self._changed.pop()
            setattr(callback, name, value)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the checkpoints that are due by iterations or time; ``{step}`` becomes the current environment step."""
        steps = cast(PPOModule, pl_module).num_env_steps
        if steps <= INT32_MAX:  # Lightning casts it to int32
            trainer.callback_metrics["step"] = torch.tensor(steps)
        else:  # file names then have Lightning's own count of iterations
            trainer.callback_metrics.pop("step", None)
        for callback in _monitors(trainer):
            if not (isinstance(callback, ModelCheckpoint) and _is_due(callback, trainer)):
                continue
            metrics = callback._monitor_candidates(trainer)
            if _monitors_evaluation(callback):  # the last score may be another policy's
                callback._defer_save_until_validation = True
                _skip_save(callback, trainer)
            elif callback.monitor is None or callback.monitor in metrics:
                callback._last_time_checked = time.monotonic()
                callback._save_topk_checkpoint(trainer, metrics)
                callback._save_last_checkpoint(trainer, metrics)
                _skip_save(callback, trainer)  # also where save_top_k is 0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare callbacks that monitor a metric, before they act."""
        first = cast(Any, trainer.fit_loop.epoch_progress.current).processed <= 1
        logs_next = first and _has_hooks(pl_module, "on_train_epoch_end")
        evaluates = trainer.enable_validation and not self._has_evaluated
        evaluates_async = not self._has_evaluated and bool(callbacks_of(trainer, AsyncEvaluation))
        logs_then = any(
            (evaluates and _has_hooks(one, "validation"))
            or ((evaluates or evaluates_async) and _has_hooks(one, "on_evaluation"))
            for one in (pl_module, *callbacks_of(trainer, Callback))
        )
        self._seen |= {one.monitor for one in _monitors(trainer)} & trainer.callback_metrics.keys()
        for callback, name in self._without_metric(trainer):
            of_evaluation = name.startswith("eval/") and (evaluates or evaluates_async)
            if may_come_later(name) or name in self._seen or of_evaluation or logs_next or logs_then:
                _skip_save(callback, trainer)
            else:
                raise _unknown_metric_error(callback, name, trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoints that have waited for the evaluation."""
        for callback in _monitors(trainer):
            if isinstance(callback, ModelCheckpoint) and callback._defer_save_until_validation:
                callback._last_global_step_saved = 0
                callback._last_time_checked = time.monotonic()
        super().on_validation_end(trainer, pl_module)

    @override
    def on_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, step: int, statistics: dict[str, float]
    ) -> None:
        self._has_evaluated = True
        results = trainer._results if trainer.validating else None
        logged = () if results is None else results.metrics(False)["callback"]
        for (
            callback,
            name,
            value,
        ) in self._changed:  # act after evaluations that log their metric under the user's own name
            if name == _timing_attribute(callback) and value is None and cast(Any, callback).monitor in logged:
                setattr(callback, name, False)
        for callback, name in self._without_metric(trainer):
            if not name.startswith("eval/") or may_come_later(name):
                _skip_save(callback, trainer)
            else:
                raise _unknown_metric_error(callback, name, trainer)

    def _without_metric(self, trainer: Trainer) -> list[tuple[Callback, str]]:
        """Callbacks whose required metric is not logged, with its name."""
        metrics, lenient = trainer.callback_metrics, {id(one) for one, name, _ in self._changed if name == "strict"}
        return [
            (callback, callback.monitor)
            for callback in _monitors(trainer)
            if callback.monitor is not None
            and callback.monitor not in metrics
            and callback.monitor not in ("step", "epoch")
            and (isinstance(callback, ModelCheckpoint) or id(callback) in lenient)
        ]


def check_evaluation_monitors(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that monitor evaluations in a run without any."""
    for callback in callbacks:
        strict = isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
        if strict and _monitors_evaluation(callback):
            raise InputError(
                f"{type(callback).__name__} monitors {cast(Any, callback).monitor}, and this run has no evaluations "
                "(limit_val_batches is 0, or the environment is a VectorEnv that cannot be made again): monitor a metric "
                "rollout/…, such as rollout/ep_rew_mean"
            )


def _monitors(trainer: Trainer) -> list[Any]:
    """The user's callbacks that stop or save."""
    kinds = (EarlyStopping, ModelCheckpoint)
    return [
        one for one in callbacks_of(trainer, Callback) if isinstance(one, kinds) and not isinstance(one, RunCheckpoint)
    ]


def _timing_attribute(callback: Callback) -> str:
    """Attribute that sets whether the callback acts after an iteration, or else after an evaluation."""
    return "_check_on_train_epoch_end" if isinstance(callback, EarlyStopping) else "_save_on_train_epoch_end"


def _has_hooks(owner: Any, hook: str) -> bool:
    """Whether a user's module or callback overrides such a hook, in which it may log its own metrics."""
    kinds = [kind for kind in type(owner).__mro__ if kind.__module__.partition(".")[0] not in PACKAGES]
    return any(hook in name for kind in kinds for name in vars(kind))


def _monitors_evaluation(callback: Any) -> bool:
    return (callback.monitor or "").startswith("eval/")


def _is_due(checkpoint: ModelCheckpoint, trainer: Trainer) -> bool:
    """Whether a checkpoint is to be saved by its iterations or its time."""
    if checkpoint._should_skip_saving_checkpoint(trainer):
        return False
    if checkpoint._every_n_train_steps:
        return trainer.global_step % checkpoint._every_n_train_steps == 0
    if checkpoint._every_n_epochs > 1 and _monitors_evaluation(
        checkpoint
    ):  # which Lightning saves after evaluations alone
        return (trainer.current_epoch + 1) % checkpoint._every_n_epochs == 0
    interval, since = checkpoint._train_time_interval, checkpoint._last_time_checked
    if interval is None or since is None:
        return False
    late = time.monotonic() - since >= interval.total_seconds()
    return trainer.strategy.broadcast(late)  # clocks differ, and saving is collective


def _skip_save(callback: Callback, trainer: Trainer) -> None:
    """Save nothing after this iteration."""
    if isinstance(callback, ModelCheckpoint):
        callback._last_global_step_saved = trainer.global_step


def _unknown_metric_error(callback: Callback, name: str, trainer: Trainer) -> InputError:
    metrics = sorted(trainer.callback_metrics.keys() - {"step"})
    near = difflib.get_close_matches(name, {*metrics, *LATER, "eval/mean_reward"}, 1)
    hint = f"did you mean {near[0]}?" if near else "take one of docs/metrics.md, such as rollout/ep_rew_mean"
    return InputError(f"{type(callback).__name__} monitors {name}, which this run does not log: {hint}")
