"""The callbacks that every run has."""

import inspect
from typing import Any, cast

from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar

from ppo_lightning.callbacks import (
    AsyncEvaluation,
    BestCheckpoint,
    CallbackSchedule,
    CloseEnvironments,
    DeferredLoggers,
    FinalEvaluation,
    Interrupts,
    LastCheckpoint,
    RunFolder,
    RunSummary,
    StepProgressBar,
    WatchProcesses,
    default_tools,
    refuse_evaluation_monitors,
)


def attach_callbacks(trainer: Any, save_interval: int, *, evaluates: bool) -> None:
    """Replace Lightning's default progress bar and checkpoint by ours; the user's callbacks stay.

    Args:
        trainer: of the run.
        save_interval: iterations between two saves of the last checkpoint.
        evaluates: the environments can be evaluated, which a best checkpoint needs.

    Raises:
        InputError: a callback monitors evaluations in a run without any.
    """
    defaults = [callback for callback in trainer.callbacks if is_default(callback)]
    needed: list[Callback] = [WatchProcesses()] if trainer.world_size > 1 else []
    needed += [CloseEnvironments(), Interrupts()]  # last, since it may take seconds
    needed += default_tools()  # before the progress bar, and before the callbacks that save their state
    if any(isinstance(callback, RichProgressBar | TQDMProgressBar) for callback in defaults):
        needed.append(StepProgressBar())
    beside = any(isinstance(callback, AsyncEvaluation) for callback in trainer.callbacks)
    evaluates = evaluates and (beside or trainer.limit_val_batches != 0)
    if not evaluates and not trainer.fast_dev_run:
        refuse_evaluation_monitors(trainer.callbacks)
    needed += [FinalEvaluation(), CallbackSchedule()]
    if any(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks):
        if evaluates:
            needed.append(BestCheckpoint())
        needed.append(LastCheckpoint(save_interval))
    needed += [RunSummary(), DeferredLoggers(), RunFolder()]
    kept = [callback for callback in trainer.callbacks if not any(callback is default for default in defaults)]
    callbacks = kept + [new for new in needed if not any(isinstance(own, type(new)) for own in kept)]
    trainer.callbacks = sorted(callbacks, key=_position)


def _position(callback: Callback) -> int:
    """Sort key of a callback; callbacks of the same position keep their order."""
    if hasattr(callback, "POSITION"):
        return cast(Any, callback).POSITION
    if isinstance(callback, DeferredLoggers):
        return -1  # before any other setup looks for the loggers
    if isinstance(callback, RunFolder):
        return 8  # it is unlocked once all callbacks have written
    if isinstance(callback, FinalEvaluation):
        return 0  # other callbacks can use the evaluation at the end of training
    if isinstance(callback, RunSummary):
        return 7  # it reports the results of other callbacks
    if isinstance(callback, LastCheckpoint):
        return 6  # it saves the state of all callbacks
    if isinstance(callback, Checkpoint):
        return 4 if getattr(callback, "monitor", None) is not None else 5  # ckpt_path="best" takes the first one
    if isinstance(callback, EarlyStopping):
        return 3
    return 2 if isinstance(callback, CallbackSchedule) else 1


def is_default(callback: Callback) -> bool:
    """Whether Lightning presumably added the callback by itself: it equals one made without arguments.

    Only arguments of the constructor are compared. Other attributes change during a run, or between ranks.
    """
    kind = type(callback)
    if kind not in (RichProgressBar, TQDMProgressBar, ModelCheckpoint):
        return False
    parameters, fresh = inspect.signature(kind.__init__).parameters, vars(kind())
    names = [name for name in fresh if name.lstrip("_") in parameters]
    return all(vars(callback)[name] == fresh[name] for name in names)
