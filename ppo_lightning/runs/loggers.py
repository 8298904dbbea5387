"""Loggers beside those of the run's folder: what they receive, which packages they need, and whose folder counts."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import MetricNames, to_names

PACKAGES = {
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet"),
}
"""Module that a logger of Lightning's imports, and the extra that installs it."""


def check_logger_config(parsed: Any) -> None:
    """Refuse a logger of the configuration that cannot work: ``trainer.logger`` as the command line has parsed it."""
    for entry in parsed if isinstance(parsed, list) else [parsed]:
        if entry in (None, True, False):
            continue
        name = entry.class_path.rpartition(".")[2]
        module, extra = PACKAGES.get(name, (None, None))
        if module is not None and find_spec(module) is None:
            raise InputError(f'trainer.logger {name} needs {module}: pip install "ppo-lightning[{extra}]"')
        allows_files = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
        if (
            name == "MLFlowLogger"
            and not allows_files
            and (entry.init_args.tracking_uri or "file:").startswith("file:")
        ):
            raise InputError(
                "trainer.logger MLFlowLogger would write files below save_dir, which MLflow refuses by now: name a server or "
                "a database by --trainer.logger.tracking_uri (sqlite:///mlflow.db needs pip install sqlalchemy alembic), or "
                "set MLFLOW_ALLOW_FILE_STORE=true"
            )


def with_folder_logger(given: list[Logger], own: Callable[[], list[Logger]]) -> list[Logger]:
    """The loggers that the user gave, with one that has a folder in front: Lightning keeps a run's files in the first's.

    Args:
        given: by the user.
        own: makes the loggers of the run's folder, where none of the given ones has a folder for a run.
    """
    folders = [logger for logger in given if isinstance(logger, TensorBoardLogger | CSVLogger)]
    return [*(folders or own()), *(logger for logger in given if logger not in folders)]


@contextmanager
def finishing_wandb_run() -> Iterator[None]:
    """End the W&B run that begins within, as failed where an exception leaves.

    W&B itself ends it with the process, so that a second command of the same process would continue it.
    """

    def current_run() -> Any:
        wandb = sys.modules.get("wandb")  # its logger has imported it
        return None if wandb is None else wandb.run

    before, exit_code = current_run(), 1
    try:
        yield
        exit_code = 0
    finally:
        run = current_run()
        if run is not None and run is not before:
            run.finish(exit_code=exit_code)


class TolerantLogger:
    """A logger that stops logging where it cannot write, with a warning: a full disk does not end a run."""

    stopped_by: OSError | None = None
    """Why it stopped."""

    def attempt(self, call: Callable[[], Any]) -> None:
        """Call a function that writes, unless writing has failed before."""
        if self.stopped_by is not None:
            return
        try:
            call()
        except (OSError, ValueError) as error:
            # TensorBoard's thread keeps the error for the next call, and Lightning raises a ValueError from it.
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self.stopped_by = cause
            rank_zero_warn(f"{type(self).__name__} stops logging, since it cannot write ({cause}): training continues")

    def save(self) -> None:
        """Write what is logged."""
        self.attempt(super().save)  # pyright: ignore[reportAttributeAccessIssue]

    def finalize(self, status: str) -> None:
        """Write the rest."""
        self.attempt(lambda: super(TolerantLogger, self).finalize(status))  # pyright: ignore[reportAttributeAccessIssue]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log the metrics of an iteration."""
        self.attempt(lambda: super(TolerantLogger, self).log_metrics(metrics, step))  # pyright: ignore[reportAttributeAccessIssue]


class TolerantTensorBoardLogger(TolerantLogger, TensorBoardLogger):
    """Lightning's, which stops logging where it cannot write."""


class TolerantCSVLogger(TolerantLogger, CSVLogger):
    """Lightning's, which stops logging where it cannot write."""


def as_tolerant(logger: Logger) -> Logger:
    """The same logger; one of Lightning's that write files stops logging where it cannot write."""
    kind = {TensorBoardLogger: TolerantTensorBoardLogger, CSVLogger: TolerantCSVLogger}.get(type(logger))
    is_installed = getattr(threading.excepthook, "func", None) is _report_thread_error
    if isinstance(logger, TensorBoardLogger) and not is_installed:
        threading.excepthook = partial(_report_thread_error, threading.excepthook)
    if kind is None:
        return logger
    same = kind.__new__(kind)
    same.__dict__ = logger.__dict__  # both share their state
    return same


def _report_thread_error(report: Callable[[Any], Any], error: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, unless TensorBoard's cannot write: its logger warns of that."""
    if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
        report(error)


FLUSH_INTERVAL_S = 10.0
"""Seconds between flushes of loggers: a killed run loses no more than that."""


class MetricWriter:
    """Passes metrics to loggers, under the names of another system.

    Args:
        names: of that system.
    """

    def __init__(self, names: MetricNames) -> None:
        self.names = names
        self._last_flush = 0.0

    def write(self, loggers: Iterable[Any], metrics: Mapping[str, float], step: int) -> None:
        """Log metrics under our names, except those that are NaN, at ``step`` environment steps."""
        named = to_names({name: value for name, value in metrics.items() if not math.isnan(value)}, self.names)
        flushes = time.monotonic() - self._last_flush >= FLUSH_INTERVAL_S
        for logger in loggers:
            logger.log_metrics(named, step=step)
            if flushes:  # Lightning's CSVLogger would keep all metrics in memory
                logger.save()
        if flushes:
            self._last_flush = time.monotonic()
