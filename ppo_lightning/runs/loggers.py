"""Loggers beside those of the run's folder: what they receive, which packages they need, and whose folder counts."""

import inspect
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

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import MetricNames, renamed

PACKAGES = {
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet"),
}
"""Module that a logger of Lightning's imports, and the extra that installs it."""

LIGHTNINGS_OWN = ("_instantiator", "_class_path")
"""Lightning's internal entries among the hyperparameters."""


def described_run(hyperparameters: Mapping[str, Any], optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    """Hyperparameters for loggers, including the optimizer's, and ``more``.

    Args:
        hyperparameters: by name; a value that is not plain data is replaced by :func:`name_of` it.
        optimizer: as it was made.
        more: further entries.
    """
    kind = type(optimizer)
    return {
        **_plain_yaml({name: value for name, value in hyperparameters.items() if name not in LIGHTNINGS_OWN}),
        "optimizer": {
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            "init_args": _plain_yaml(optimizer.defaults),
        },
        **more,
    }


def name_of(value: Any) -> str:
    """Of a class or function its own name; of an object its class's."""
    named = value if inspect.isclass(value) or inspect.isfunction(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _plain_yaml(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists: plain YAML has no other."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def refuse_unusable(parsed: Any) -> None:
    """Refuse a logger of the configuration that cannot work, before it is made.

    Args:
        parsed: ``trainer.logger`` as the command line has parsed it: nothing, a bool, one logger, or a list of them.

    Raises:
        InputError: its package is not installed, or MLflow would refuse its file store.
    """
    for entry in parsed if isinstance(parsed, list) else [parsed]:
        if entry in (None, True, False):
            continue
        name = entry.class_path.rpartition(".")[2]
        module, extra = PACKAGES.get(name, (None, None))
        if module is not None and find_spec(module) is None:
            raise InputError(f'trainer.logger {name} needs {module}: pip install "ppo-lightning[{extra}]"')
        if name == "MLFlowLogger":
            _refuse_file_store(entry.init_args.tracking_uri)


def _refuse_file_store(uri: str | None) -> None:
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    if not allowed and (not uri or uri.startswith("file:")):
        raise InputError(
            "trainer.logger MLFlowLogger would write files below save_dir, which MLflow refuses by now: name a server or a "
            "database by --trainer.logger.tracking_uri (sqlite:///mlflow.db needs pip install sqlalchemy alembic), or set "
            "MLFLOW_ALLOW_FILE_STORE=true"
        )


def beside_the_folder(given: list[Logger], own: Callable[[], list[Logger]]) -> list[Logger]:
    """The loggers that the user gave, with one that has a folder in front: Lightning keeps a run's files in the first's.

    Args:
        given: by the user.
        own: makes the loggers of the run's folder, where none of the given ones has a folder for a run.
    """
    folders = [logger for logger in given if isinstance(logger, TensorBoardLogger | CSVLogger)]
    return [*(folders or own()), *(logger for logger in given if logger not in folders)]


@contextmanager
def wandb_run_ends() -> Iterator[None]:
    """End the W&B run that begins within, as failed where an exception leaves.

    W&B itself ends it with the process, so that a second command of the same process would continue it.
    """
    before = _wandb_run()
    try:
        yield
    except BaseException:
        _finish(before, exit_code=1)
        raise
    _finish(before, exit_code=0)


def _wandb_run() -> Any:
    wandb = sys.modules.get("wandb")  # its logger has imported it
    return None if wandb is None else wandb.run


def _finish(before: Any, exit_code: int) -> None:
    run = _wandb_run()
    if run is not None and run is not before:
        run.finish(exit_code=exit_code)


class Tolerant:
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
            rank_zero_warn(f"{type(self).__name__} stops logging, since it cannot write ({cause}): training goes on")

    def save(self) -> None:
        """Write what is logged."""
        self.attempt(super().save)  # pyright: ignore[reportAttributeAccessIssue]

    def finalize(self, status: str) -> None:
        """Write the rest."""
        self.attempt(lambda: super(Tolerant, self).finalize(status))  # pyright: ignore[reportAttributeAccessIssue]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log the metrics of an iteration."""
        self.attempt(lambda: super(Tolerant, self).log_metrics(metrics, step))  # pyright: ignore[reportAttributeAccessIssue]


class TolerantTensorBoardLogger(Tolerant, TensorBoardLogger):
    """Lightning's, which stops logging where it cannot write."""


class TolerantCSVLogger(Tolerant, CSVLogger):
    """Lightning's, which stops logging where it cannot write."""


def tolerant(logger: Logger) -> Logger:
    """The same logger; one of Lightning's that write files stops logging where it cannot write."""
    kind = {TensorBoardLogger: TolerantTensorBoardLogger, CSVLogger: TolerantCSVLogger}.get(type(logger))
    if isinstance(logger, TensorBoardLogger) and getattr(threading.excepthook, "func", None) is not _report_of_others:
        threading.excepthook = partial(_report_of_others, threading.excepthook)
    if kind is None:
        return logger
    same = kind.__new__(kind)
    same.__dict__ = logger.__dict__  # both share their state
    return same


def _report_of_others(report: Callable[[Any], Any], error: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, unless TensorBoard's cannot write: its logger warns of that."""
    if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
        report(error)


LOGS_SAVED_S = 10.0
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
        """Log metrics, except those that are NaN.

        Args:
            loggers: of the Trainer.
            metrics: under our names.
            step: environment steps that they belong to.
        """
        named = renamed({name: value for name, value in metrics.items() if not math.isnan(value)}, self.names)
        flushes = time.monotonic() - self._last_flush >= LOGS_SAVED_S
        for logger in loggers:
            logger.log_metrics(named, step=step)
            if flushes:  # Lightning's CSVLogger would keep all metrics in memory
                logger.save()
        if flushes:
            self._last_flush = time.monotonic()
