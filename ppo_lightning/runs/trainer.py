"""Checks of Lightning's Trainer, and replacements of its defaults."""

import difflib
import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.compile import to_uncompiled
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import CHOICES, newest_checkpoint, verified_io
from ppo_lightning.runs.loggers import as_tolerant

# A Trainer advertises Lightning's cloud when it is made.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "💡 Tip:" not in record.getMessage()
)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals upon which a run stops after its iteration."""

GRADIENT_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")

DDP_TIMEOUT = timedelta(minutes=3)
"""For one rank to wait for another; torch's half an hour is long for a rank that died."""

SHARDING = ("fsdp", "deepspeed", "model_parallel")
"""Beginnings of the names of strategies that shard parameters."""

RANKS_PER_CORE = 4
"""More ranks on the CPU are taken for a mistake."""


def shorten_timeout(trainer: Any) -> None:
    """Let ranks wait for each other for minutes, unless the user has set a timeout."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy._timeout == default_pg_timeout:
        strategy._timeout = DDP_TIMEOUT


def check_trainer_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a Trainer that this machine or PPO cannot use, before the Trainer is made.

    Args:
        settings: arguments of the Trainer by name.
    """
    strategy, accelerator, devices = (settings[name] for name in ("strategy", "accelerator", "devices"))
    strategies = StrategyRegistry.available_strategies()
    if isinstance(strategy, str) and strategy.startswith(SHARDING):
        raise _sharding_error(strategy)
    if isinstance(strategy, str) and strategy != "auto" and strategy not in strategies:
        raise InputError(
            f"trainer.strategy {strategy} does not exist: {_nearest(strategy, ['auto', *strategies], 'take ddp or auto')}"
        )
    accelerators = AcceleratorRegistry.available_accelerators()
    if isinstance(accelerator, str) and accelerator not in (*accelerators, "auto", "gpu"):
        near = _nearest(accelerator, ["auto", "gpu", *accelerators], "take cpu, gpu or auto")
        raise InputError(f"trainer.accelerator {accelerator} does not exist: {near}")
    names = ("cuda", "mps") if accelerator == "gpu" else (accelerator,)
    if isinstance(accelerator, str) and accelerator != "auto":
        if not any(AcceleratorRegistry[name]["accelerator"].is_available() for name in names):
            raise InputError(f"trainer.accelerator {accelerator}: this machine has none: take cpu or auto")
        limit = max(8, RANKS_PER_CORE * (os.cpu_count() or 1))
        if accelerator == "cpu" and str(devices).isdecimal() and int(devices) > limit:
            raise InputError(
                f"trainer.devices {devices} are more ranks than {os.cpu_count()} cores can run: take {limit} or fewer"
            )
    clusters = (SLURMEnvironment, LSFEnvironment, TorchElasticEnvironment)
    alone = "MASTER_ADDR" not in os.environ and not any(cluster.detect() for cluster in clusters)
    if settings["num_nodes"] > 1 and not settings["plugins"] and alone:
        raise InputError(
            f"trainer.num_nodes {settings['num_nodes']} waits for other machines, which need the address of the first: set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each of them; on one machine leave num_nodes out"
        )
    _check_eval_intervals(settings["val_check_interval"], settings["check_val_every_n_epoch"])
    if settings["barebones"]:
        raise InputError(
            "trainer.barebones switches off the log and the checkpoints, which each run of the command line writes: leave it "
            "out"
        )


def _check_eval_intervals(val_check_interval: float | None, check_val_every_n_epoch: int | None) -> None:
    """Refuse intervals of evaluation that an epoch of one batch cannot have."""
    if val_check_interval not in (None, 1.0):
        raise InputError(
            f"val_check_interval={val_check_interval} would count the batches of an epoch, which has one: set the model's "
            "eval_interval, in iterations"
        )
    if check_val_every_n_epoch is not None and check_val_every_n_epoch < 1:
        raise InputError(
            f"check_val_every_n_epoch must be 1 or more, got {check_val_every_n_epoch}: set the model's eval_interval"
        )


def _nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    known = sorted(known, key=len)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.8) or [one for one in known if name.startswith(one)]
    near = near or difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else otherwise


def _sharding_error(name: str) -> InputError:
    return InputError(
        f"strategy {name} shards parameters, which PPO's policies are too small for and its several backward passes per "
        "batch do not allow: use ddp"
    )


def check_writable(key: str, folder: str | Path) -> None:
    """Refuse a folder that cannot be written to; leaves no file there.

    Args:
        key: that names the folder.
        folder: which need not exist; those of other file systems (s3://…) are not checked.
    """
    path = Path(folder).absolute()
    if "://" in str(folder):
        return
    there = next(place for place in [path, *path.parents] if place.exists())
    if not there.is_dir():
        raise InputError(f"{key} {folder}: {there} is a file: give a folder")
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{key} {folder} cannot be written to ({error.strerror}): give another folder") from error


def validate_trainer(trainer: Any, *, running_moments: bool) -> None:
    """Refuse settings that would silently change the algorithm."""
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError(
                "StochasticWeightAveraging sets the learning rate by a scheduler that manual optimisation does not step: "
                "use lightning.pytorch.callbacks.WeightAveraging, and lr_scheduler for the rate"
            )
        if isinstance(callback, LearningRateFinder):
            raise InputError(
                "LearningRateFinder needs automatic optimisation, PPO optimises by itself: search by ppo-lightning sweep, "
                "or let AdaptiveLearningRate follow the divergence"
            )
    if trainer.max_steps not in (None, -1) and not trainer.fast_dev_run:
        raise InputError(
            f"max_steps={trainer.max_steps} would count optimiser steps, and stop the schedules short: set total_steps, in "
            "environment steps (max_epochs ends a run after so many iterations)"
        )
    for name in ("limit_train_batches", "limit_val_batches"):
        limit = getattr(trainer, name)
        if (limit not in (0, 1) and isinstance(limit, float)) or (name == "limit_train_batches" and limit == 0):
            what = "a rollout is" if name == "limit_train_batches" else "an evaluation is"
            raise InputError(
                f"{name}={limit} would cut what has one batch: {what} whole; leave it out (max_epochs ends a run early, "
                "limit_val_batches=0 switches evaluations off)"
            )
    if trainer.overfit_batches:
        raise InputError(
            f"overfit_batches={trainer.overfit_batches} repeats batches of fixed data, and PPO collects each rollout by its "
            "present policy: leave it out"
        )
    if str(trainer.precision) not in ("32-true", "16-mixed", "bf16-mixed"):
        raise InputError(
            f"precision={trainer.precision} would round the running statistics and counters: use 32-true, bf16-mixed or "
            "16-mixed"
        )
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise _sharding_error(type(trainer.strategy).__name__)
    _check_eval_intervals(trainer.val_check_interval, trainer.check_val_every_n_epoch)
    if trainer.strategy.root_device.type == "mps" and running_moments:
        raise InputError("running statistics are float64, which this device has not: use --trainer.accelerator cpu")


def check_supported_features(trainer: Any, module: LightningModule) -> None:
    """Refuse features of Lightning that PPO replaces, before Lightning checks them."""
    if module._compiler_ctx is not None or module._compiled_call_impl is not None:
        if module._compiler_ctx is not None:
            to_uncompiled(module)  # so that the same model can be trained
        module._compiled_call_impl = None
        raise InputError(
            "torch.compile of the whole module does not speed up PPO and compiles Lightning's hooks: give PPO(…, "
            "compile=True), and the Trainer the module itself"
        )
    if trainer.state.fn != TrainerFn.FITTING:
        return
    for callback in trainer.callbacks:
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            if callback._early_exit:  # a Tuner attached it, and would not remove it
                trainer.callbacks.remove(callback)
            raise InputError(
                f"{type(callback).__name__} (Tuner.lr_find, Tuner.scale_batch_size) tries values on batches of fixed data, "
                "which PPO does not have: search with `ppo-lightning sweep` (docs/sweeps.md)"
            )
        if isinstance(callback, BackboneFinetuning) and not hasattr(module, "backbone"):
            raise InputError(
                f"{type(callback).__name__} freezes module.backbone, which PPO does not have: freeze parameters by "
                "ppo_lightning.callbacks.Stages (docs/curricula.md)"
            )
        if isinstance(callback, GradientAccumulationScheduler):
            raise InputError(
                "GradientAccumulationScheduler has no effect on PPO's own updates: set gradient_accumulation_steps of PPO"
            )
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} of the Trainer has no effect on PPO's own updates: "
            f"set gradient_accumulation_steps={trainer.accumulate_grad_batches} of PPO"
        )
    if trainer.gradient_clip_val:
        raise InputError(
            f"gradient_clip_val={trainer.gradient_clip_val} of the Trainer has no effect on PPO's own updates: set "
            "max_grad_norm of PPO"
        )


def prepare_trainer(trainer: Any) -> None:
    """Let a Trainer write verified checkpoints, continue where loggers cannot write, and log over environment steps."""
    # Lightning's warning counts the batches of an epoch, which is one here, against iterations.
    warnings.filterwarnings("ignore", r"The number of training batches \(1\) is smaller than the logging interval")
    trainer.strategy.checkpoint_io = verified_io(trainer.strategy.checkpoint_io)
    trainer.loggers = [as_tolerant(logger) for logger in trainer.loggers]
    trainer.fit_loop.epoch_loop.__class__ = _StepLoop
    trainer._logger_connector.__class__ = _StepLogger


def check_trainer(trainer: Any, iterations: int, *, running_moments: bool) -> None:
    """Refuse misleading settings, and replace Lightning's defaults by those that suit PPO.

    Args:
        trainer: of a fit.
        iterations: that ``total_steps`` leaves to train.
        running_moments: the model has running statistics.
    """
    validate_trainer(trainer, running_moments=running_moments)
    budget = trainer.current_epoch + max(0, iterations)
    for name, least in (("min_epochs", trainer.min_epochs), ("min_steps", trainer.min_steps)):
        if least is not None and least > budget and not trainer.fast_dev_run:
            raise InputError(
                f"{name}={least} would train beyond total_steps, which is reached after {budget} iterations: raise "
                f"total_steps, or leave {name} out"
            )
    if trainer.max_epochs in (None, 1000):
        trainer.fit_loop.max_epochs = -1
    trainer.num_sanity_val_steps = 0
    if trainer.log_every_n_steps == 50:
        trainer.log_every_n_steps = 1


def is_last_iteration(trainer: Any) -> bool:
    """Whether the run ends after this iteration: ``should_stop`` has no effect before ``min_epochs`` and ``min_steps``."""
    done = trainer.current_epoch + 1
    enough = done >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return (trainer.should_stop and enough) or done == trainer.max_epochs


class _StepLoop(_TrainingEpochLoop):
    """Lightning's loop over batches, which evaluates by the model's ``eval_interval``, and counts environment steps.

    Lightning's callbacks (LearningRateMonitor, DeviceStatsMonitor) give this counter to loggers.
    """

    @override
    def _should_check_val_epoch(self) -> bool:
        trainer, module = cast(Any, self.trainer), cast(Any, self.trainer.lightning_module)
        if not hasattr(module, "iterations_between_evaluations"):  # the Trainer now trains another module
            return super()._should_check_val_epoch()
        if not trainer.enable_validation or module.agreed_stop_signal in STOP_SIGNALS:
            return False  # a signal leaves no time for an evaluation
        if trainer.check_val_every_n_epoch == 1:  # not set by the user
            due = module.policy_version % module.iterations_between_evaluations == 0
        else:
            due = super()._should_check_val_epoch()
        return due or is_last_iteration(trainer)

    @property
    def _batches_that_stepped(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        steps = _env_steps(self.trainer)
        return vars(self)["_batches_that_stepped"] if steps is None else steps

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, value: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        vars(self)["_batches_that_stepped"] = value


class _StepLogger(_LoggerConnector):
    """Passes ``self.log`` to loggers with environment steps as x, from any hook."""

    @property
    @override
    def should_update_logs(self) -> bool:
        """Whether ``log_every_n_steps``, which counts iterations, includes this iteration."""
        trainer = cast(Any, self.trainer)
        loop, every = trainer._active_loop, trainer.log_every_n_steps
        if isinstance(loop, _FitLoop) and every:
            return loop.epoch_loop.batch_progress.total.ready % every == 0 or trainer.should_stop
        return super().should_update_logs

    @override
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if step is None and "step" not in metrics:
            step = _env_steps(self.trainer)
        super().log_metrics(metrics, step)

    @override
    def update_eval_step_metrics(self, step: int) -> None:
        steps = _env_steps(self.trainer)
        super().update_eval_step_metrics(step if steps is None else steps)


def _env_steps(trainer: Any) -> int | None:
    """Environment steps so far; None where the Trainer now trains another module."""
    return cast("int | None", getattr(trainer.lightning_module, "num_env_steps", None))


class _CheckpointFinder(_CheckpointConnector):
    """Takes ``last`` and ``best`` as the command line does, in a Trainer that has not trained.

    Lightning looks in the Trainer's own, new folder, finds no file, and starts from scratch. This sets ``trainer.ckpt_path``
    before setup.
    """

    @override
    def _select_ckpt_path(self, state_fn: TrainerFn, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        if ckpt_path in CHOICES and not trainer.global_step and not any(one.best_model_path for one in savers):
            ckpt_path = str(newest_checkpoint(trainer.default_root_dir, ckpt_path))
        self._ckpt_path = super()._select_ckpt_path(state_fn, ckpt_path, *args, **kwargs)
        return self._ckpt_path


def find_checkpoints(trainer: Any) -> None:
    """Let a Trainer find checkpoints by :class:`_CheckpointFinder`."""
    if type(trainer._checkpoint_connector) is _CheckpointConnector:
        trainer._checkpoint_connector.__class__ = _CheckpointFinder


def restart_epoch(trainer: Any, iterations: int) -> None:
    """Let a run that resumes from within an iteration (after a crash, or from ``best.ckpt``) begin another one.

    Lightning would continue within it, without the ``on_train_epoch_start`` in which callbacks prepare a rollout. Old
    checkpoints counted more than their ``iterations`` where an update was aborted.
    """
    progress = trainer.fit_loop.epoch_progress
    # An error after an iteration leaves Lightning's count of epochs one behind that of iterations.
    epochs = trainer.global_step if trainer.global_step <= iterations else progress.current.processed
    set_global_step(trainer, min(trainer.global_step, iterations))
    for count in (progress.total, progress.current):
        count.ready = count.started = count.processed = count.completed = epochs
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
        loop.reset_restart_stage()
    trainer.fit_loop.restarting = False


def restore_modes(trainer: Any) -> None:
    """Restore the modes of submodules after an interrupted evaluation."""
    if trainer.evaluating:
        trainer._evaluation_loop._module_mode.restore(trainer.lightning_module)


def restore_training_weights(trainer: Any) -> None:
    """Let ``WeightAveraging`` restore the training weights after an interrupted evaluation."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging) and trainer.validating:
            callback.on_validation_epoch_end(trainer, trainer.lightning_module)


def set_global_step(trainer: Any, count: int) -> None:
    """Set ``trainer.global_step``, in which Lightning would count the calls of its optimizer's ``step``."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for one in (progress.total, progress.current):
        one.ready = one.completed = count


def gradient_hooks(trainer: Any, module: object, base: type) -> list[str]:
    """Names of callbacks, and of a subclass of ``base``, that override hooks around gradients."""
    owners = [(type(callback), Callback) for callback in trainer.callbacks] + [(type(module), base)]
    return [
        kind.__name__
        for kind, parent in owners
        if any(getattr(kind, hook) is not getattr(parent, hook) for hook in GRADIENT_HOOKS)
    ]
