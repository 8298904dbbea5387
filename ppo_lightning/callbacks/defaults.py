"""The callbacks that every run has."""

import inspect
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)

from ppo_lightning.callbacks import default_tools
from ppo_lightning.callbacks.async_evaluation import AsyncEvaluation
from ppo_lightning.callbacks.callback_schedule import CallbackSchedule, check_evaluation_monitors
from ppo_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from ppo_lightning.callbacks.events import callbacks_of
from ppo_lightning.callbacks.processes import RankFailureReporter
from ppo_lightning.callbacks.progress import StepProgressBar
from ppo_lightning.callbacks.run_folder import DeferredLoggers, RunFolder
from ppo_lightning.callbacks.shutdown import CloseEnvironments, FinalEvaluation, GracefulShutdown
from ppo_lightning.callbacks.summary import ParameterSummary, RunSummary


def attach_callbacks(trainer: Any, save_interval: int, *, evaluates: bool) -> None:
    """Replace Lightning's default progress bar, model summary and checkpoint by ours; the user's callbacks stay.

    Args:
        trainer: of the run.
        save_interval: iterations between two saves of the last checkpoint.
        evaluates: the environments can be evaluated, which a best checkpoint needs.
    """
    defaults = [callback for callback in trainer.callbacks if is_default(callback)]
    needed: list[Callback] = [RankFailureReporter()] if trainer.world_size > 1 else []
    needed += [CloseEnvironments(), GracefulShutdown()]  # last, since it may take seconds
    needed += default_tools()  # before the progress bar, and before the callbacks that save their state
    if any(isinstance(callback, RichProgressBar | TQDMProgressBar) for callback in defaults):
        needed.append(StepProgressBar())
    if any(isinstance(callback, ModelSummary) for callback in defaults):
        needed.append(ParameterSummary())
    evaluates = evaluates and bool(callbacks_of(trainer, AsyncEvaluation) or trainer.limit_val_batches != 0)
    if not evaluates and not trainer.fast_dev_run:
        check_evaluation_monitors(trainer.callbacks)
    needed += [FinalEvaluation(), CallbackSchedule()]
    if trainer.checkpoint_callbacks:
        if evaluates:
            needed.append(BestCheckpoint())
        needed.append(LastCheckpoint(save_interval))
    needed += [RunSummary(), DeferredLoggers(), RunFolder()]
    kept = [callback for callback in trainer.callbacks if not any(callback is default for default in defaults)]
    callbacks = kept + [new for new in needed if not any(isinstance(own, type(new)) for own in kept)]
    trainer.callbacks = sorted(callbacks, key=_position)


def _position(callback: Callback) -> float:
    """Sort key of a callback: its ``POSITION``, else by its kind. Callbacks of the same position keep their order."""
    if isinstance(callback, Checkpoint):
        position = 4 if getattr(callback, "monitor", None) is not None else 5  # ckpt_path="best" takes the first one
    else:
        position = 3 if isinstance(callback, EarlyStopping) else 1
    return getattr(callback, "POSITION", position)


def is_default(callback: Callback) -> bool:
    """Whether Lightning presumably added the callback by itself: it equals one made without arguments.

    Only arguments of the constructor are compared. Other attributes change during a run, or between ranks.
    """
    kind = type(callback)
    if kind not in (RichProgressBar, TQDMProgressBar, ModelSummary, RichModelSummary, ModelCheckpoint):
        return False
    parameters, fresh = inspect.signature(kind.__init__).parameters, vars(kind())
    names = [name for name in fresh if name.lstrip("_") in parameters]
    return all(vars(callback)[name] == fresh[name] for name in names)
