"""The folder of a run: opened after every check has passed, for one run at a time, and never another run's."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.callbacks.checkpoints import RunCheckpoint
from ppo_lightning.callbacks.events import callbacks_of
from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.runs.checkpoint import BEST, LAST, PREVIOUS
from ppo_lightning.runs.history import SUMMARY

LOCK = ".lock"
"""Locked while a run writes to its folder; the operating system unlocks it when the process ends, however it ends."""


class DeferredLoggers(Callback):
    """Hides the loggers from the Trainer until after Lightning would open their files.

    Lightning opens them before any ``setup``, so that a refused run would already have written. Only for a TensorBoardLogger
    or CSVLogger in front: other loggers must be open before their folder is known.
    """

    POSITION = -1  # before any other setup looks for the loggers

    def __init__(self) -> None:
        self._loggers: list[Logger] = []
        self._redirects_profiler = False

    def detach(self, trainer: Trainer) -> None:
        """Detach the loggers, before the Trainer sets itself up."""
        if _has_folder(trainer):
            self._loggers, trainer.loggers = trainer.loggers, []
            # A profiler without a folder follows the loggers.
            self._redirects_profiler = getattr(cast(Any, trainer).profiler, "dirpath", "") is None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._attach(trainer)
        if self._redirects_profiler:
            cast(Any, trainer).profiler.dirpath = trainer.log_dir

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._attach(trainer)

    def _attach(self, trainer: Trainer) -> None:
        if self._loggers:
            trainer.loggers, self._loggers = self._loggers, []


class RunFolder(Callback):
    """Holds a run's folder for one process at a time, and refuses a folder that holds another run.

    Rank 0 locks a file in it; a killed process leaves no lock. A model that is fitted again, or that
    resumes a checkpoint of the folder, replaces its own files. Without a logger, a run whose ``default_root_dir`` holds
    another run gets ``version_N`` in it.
    """

    POSITION = 8  # it is unlocked once all callbacks have written

    def __init__(self) -> None:
        self._root: str | None = None
        self._lock: FileLock | None = None

    def choose(self, trainer: Trainer, module: PPOModule) -> None:
        """Choose the folder of a run without a logger, before callbacks look for it."""
        given = self._root or str(trainer.default_root_dir)
        if trainer.loggers or not _writers(trainer) or "://" in given:
            return
        self._root, root = given, Path(given).resolve()
        cast(Any, trainer)._default_root_dir = str(_free_folder(root, _resumed(trainer), module.run_folder))

    @contextmanager
    def root_of_jobs(self, trainer: Trainer) -> Iterator[None]:
        """Let Lightning save a job that SLURM starts again where it then looks: in the folder that the user gave."""
        before = str(trainer.default_root_dir)
        cast(Any, trainer)._default_root_dir = self._root or before
        try:
            yield
        finally:
            cast(Any, trainer)._default_root_dir = before

    def open(self, trainer: Trainer, module: PPOModule) -> None:
        """Lock the folder, then let the loggers open their files; collective.

        Raises:
            InputError: another process trains in the folder, or it holds another run.
        """
        place = self._run_folder(trainer)
        if place is not None:
            folder = Path(place).resolve()
            if not folder.exists():  # a CSVLogger warns of a folder that holds a lock
                _open_loggers(trainer)
            own = module.run_folder
            if _continues_by_itself(trainer, folder):
                own = folder
            refusal = self._lock_folder(folder, _resumed(trainer), own) if trainer.is_global_zero else None
            refusal = trainer.strategy.broadcast(refusal)
            if refusal is not None:
                raise InputError(refusal)
            module.run_folder = folder
        _open_loggers(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            Path(lock.lock_file).unlink(missing_ok=True)  # while locked: a waiting process notices
            lock.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _run_folder(self, trainer: Trainer) -> str | None:
        """The run's folder; None without files, or on another file system."""
        writers = _writers(trainer)
        if _has_folder(trainer) or (writers and not trainer.loggers):
            place = trainer.log_dir  # all ranks ask: the answer is broadcast
        else:
            place = next((str(one.dirpath) for one in writers if isinstance(one, RunCheckpoint)), None)
            place = None if place is None else place.removesuffix("/checkpoints")
        return None if place is None or "://" in place else place

    def _lock_folder(self, folder: Path, resumed: Path | None, own: Path | None) -> str | None:
        """Lock a folder; returns the reason why it cannot be used, or None."""
        if folder not in (resumed, own) and _holds_a_run(folder):
            return (
                f"{folder} holds another run, whose files this one would replace: give a new Trainer, another version or "
                "folder, or resume that run with ckpt_path"
            )
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            return f"another process trains in {folder}: wait until it ends, or stop it first"
        except OSError as error:
            rank_zero_warn(f"{folder} cannot be locked ({error}): make sure that no other process trains there")
        else:
            self._lock = lock
        return None


def defer_writing(trainer: Trainer, module: PPOModule) -> None:
    """Write nothing to the run's folder until :func:`begin_writing`."""
    for folder in callbacks_of(trainer, RunFolder) if trainer.training else []:
        folder.choose(trainer, module)
    for loggers in callbacks_of(trainer, DeferredLoggers):
        loggers.detach(trainer)


def begin_writing(trainer: Trainer, module: PPOModule) -> None:
    """Open the run's folder: every check has passed (:meth:`RunFolder.open`)."""
    for folder in callbacks_of(trainer, RunFolder):
        folder.open(trainer, module)


def _open_loggers(trainer: Trainer) -> None:
    for logger in sorted(trainer.loggers, key=lambda logger: not isinstance(logger, WandbLogger)):  # as Lightning does
        getattr(logger, "experiment", None)


def _has_folder(trainer: Trainer) -> bool:
    return bool(trainer.loggers) and isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger)


def _continues_by_itself(trainer: Trainer, folder: Path) -> bool:
    """Whether the folder is named after the run: by the logger's service, or by a job that SLURM has started again."""
    requeued = Path(str(trainer.ckpt_path)).name.startswith("hpc_ckpt_")
    is_jobs = requeued and folder.name == f"version_{os.environ.get('SLURM_JOB_ID')}"
    return is_jobs or (
        bool(trainer.loggers) and isinstance(trainer.loggers[0], WandbLogger | MLFlowLogger | CometLogger)
    )


def _writers(trainer: Trainer) -> list[Callback]:
    """Callbacks that write to the run's folder."""
    return [*callbacks_of(trainer, RunCheckpoint), *callbacks_of(trainer, SaveConfigCallback)]


def _resumed(trainer: Trainer) -> Path | None:
    """Folder of the run whose checkpoint is resumed, if any."""
    path = Path(str(trainer.ckpt_path)).resolve()
    return path.parent.parent if trainer.ckpt_path and path.is_file() and path.parent.name == "checkpoints" else None


def _holds_a_run(folder: Path) -> bool:
    """Whether a folder holds checkpoints or a summary, which only the run that wrote them may replace."""
    summary = folder / SUMMARY
    if any((folder / "checkpoints" / name).is_file() for name in (LAST, BEST, PREVIOUS)):
        return True
    try:
        return summary.is_file() and json.loads(summary.read_text())["global_step"] > 0
    except (ValueError, KeyError, TypeError):  # another program's file
        return True


def _free_folder(root: Path, resumed: Path | None, own: Path | None) -> Path:
    """Folder of a run without a logger: its previous one, else an unused one."""
    for folder in (resumed, own):
        if folder is not None and (
            folder == root or (folder.name.startswith("version_") and folder.is_relative_to(root))
        ):
            return folder
    folder, number = root, 0
    while _holds_a_run(folder) or (folder / "config.yaml").exists():  # the command line writes it there, too
        number += 1
        folder = root / f"version_{number}"
    return folder
