"""The two checkpoints of every run: the best by evaluation, and the last."""

import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import COUNT, Limit, checked
from ppo_lightning.runs.checkpoint import ON_EXCEPTION, PREVIOUS, read_checkpoint, read_verified, resumes_exactly


class RunCheckpoint(ModelCheckpoint):
    """One file per run, under a fixed name in the run's folder; where it cannot be written, training continues without."""

    PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
    _stage = ""
    _resumed = ""
    _written = True

    @property
    @override
    def state_key(self) -> str:
        return type(self).__name__  # whatever its interval: a resumed run may have another

    def paths(self) -> list[Path]:
        """The files that it writes."""
        return [Path(self.format_checkpoint_name({}))]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory")  # a resumed run replaces its own files
            super().setup(trainer, pl_module, stage)
        self._stage, self._resumed = stage, str(trainer.ckpt_path or "")

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":  # a validation has no scores to resume
            return
        here, own = Path(str(self.dirpath)).resolve(), self.format_checkpoint_name({})
        # Its folder may have moved since, or its path have been relative to another one.
        has_moved = Path(self._resumed).resolve().parent == here and Path(own).is_file()
        if Path(str(state_dict["dirpath"])).resolve() != here and not has_moved:
            return  # another run's files: this one has none yet
        # The paths are untrusted: Lightning deletes the file when it saves a better one. It compares paths as strings:
        # under another spelling, it would delete the new file as the old one.
        scores = [score for score in state_dict["best_k_models"].values() if isinstance(score, Tensor)]
        super().load_state_dict(
            {
                **state_dict,
                **{key: own if state_dict[key] else "" for key in self.PATHS},
                "best_k_models": {own: scores[0]} if scores else {},
                "dirpath": self.dirpath,
            }
        )

    @override
    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before = {**self.state_dict(), "best_k_models": dict(self.best_k_models)}
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if not self._written:  # the existing file keeps its score
            vars(self).update(before)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._written = True
        try:
            self._write(trainer, filepath)
        except OSError as error:  # on the writing rank only
            self._written = False
            _warn(filepath, trainer, error)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the other ranks wait there
        self._written = trainer.strategy.broadcast(self._written)
        self._last_global_step_saved = trainer.global_step  # or tried to, on all ranks

    def _write(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)


class BestCheckpoint(RunCheckpoint):
    """``best.ckpt``: the policy with the highest ``eval/mean_reward``."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor="eval/mean_reward",
            mode="max",
            save_on_train_epoch_end=False,  # after each evaluation instead
            enable_version_counter=False,
        )
        self._snapshot: dict[str, Any] | None = None
        self._saves_snapshot = False

    def save_if_best(self, trainer: Trainer, checkpoint: dict[str, Any] | None, scores: dict[str, Tensor]) -> None:
        """Save an earlier state of the run (None on ranks that do not write) if its scores are the best so far; collective."""
        counters = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        self._snapshot, self._saves_snapshot = checkpoint, True
        try:
            self._save_topk_checkpoint(trainer, {**scores, **counters})
        finally:
            self._snapshot, self._saves_snapshot = None, False

    @override
    def _write(self, trainer: Trainer, filepath: str) -> None:
        if not self._saves_snapshot:
            super()._write(trainer, filepath)
            return
        if self._snapshot is not None:
            self._snapshot["callbacks"][self.state_key] = (
                self.state_dict()
            )  # its own score was not known when it was taken
            trainer.strategy.save_checkpoint(self._snapshot, filepath)
        trainer.strategy.barrier("Trainer.save_checkpoint")
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)


class LastCheckpoint(RunCheckpoint):
    """``last.ckpt``: the newest state, at intervals, at the end, and when a single rank fails.

    The previous file is kept as ``previous.ckpt``.

    Args:
        every_n_epochs: iterations between two saves.
        minutes: time after which an iteration is saved in any case (minutes).

    Raises:
        InputError: ``minutes`` is not more than 0.
    """

    POSITION = 6  # it saves the state of all callbacks

    @checked(
        "LastCheckpoint: {}",
        every_n_epochs=COUNT,
        minutes=Limit("be more than 0 (.inf for never)", lambda value: value > 0),
    )
    def __init__(self, every_n_epochs: int = 1, minutes: float = 5.0) -> None:
        super().__init__(
            filename="last",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            save_on_exception=True,
            enable_version_counter=False,
        )
        self.minutes = minutes
        self._saved_at = time.monotonic()
        self._started_at: int | None = None
        """Iterations before this run; None until training starts."""

    @override
    def paths(self) -> list[Path]:
        last = super().paths()[0]
        return [last, last.with_name(PREVIOUS), last.with_name(ON_EXCEPTION)]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._started_at = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._started_at = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # A save is due by rank 0's clock: saving is collective, and clocks differ.
        is_late = time.monotonic() - self._saved_at >= 60 * self.minutes
        if not self._should_skip_saving_checkpoint(trainer) and trainer.strategy.broadcast(is_late):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the end of the last whole iteration, on one rank alone, since other ranks may not answer.

        Where that state is incomplete for a bit-exact resume (the environments within a rollout, the other ranks), and
        ``last.ckpt`` is complete, the state is saved under another name and ``last.ckpt`` stays.
        """
        is_new = self._started_at is not None and trainer.global_step > self._started_at
        if not is_new or not self._should_save_on_exception(trainer):
            return  # the files are up to date
        module = cast(PPOModule, pl_module)
        module.rollback_update()
        if trainer.is_global_zero:
            with module.run_state.local_rank_only():
                contents = trainer._checkpoint_connector.dump_checkpoint()
            last = Path(self.format_checkpoint_name({}))
            failed = isinstance(exception, Exception)  # a forced interrupt replaces last.ckpt in any case
            is_worse = failed and not resumes_exactly(contents, trainer.world_size)
            path = last.with_name(ON_EXCEPTION) if is_worse and _is_exact(last, trainer.world_size) else last
            try:
                with rotate_previous(path) if path is last else nullcontext():
                    trainer.strategy.save_checkpoint(contents, path)
            except OSError as error:  # the error that ended the run must stay visible
                _warn(str(path), trainer, error)

    @override
    def _write(self, trainer: Trainer, filepath: str) -> None:
        self._saved_at = time.monotonic()
        with rotate_previous(Path(filepath)) if trainer.is_global_zero else nullcontext():
            super()._write(trainer, filepath)


def _warn(path: str, trainer: Trainer, error: OSError) -> None:
    rank_zero_warn(
        f"{path} could not be written after iteration {trainer.current_epoch + 1} ({error}): training continues, and the file "
        "before is kept"
    )


def _is_exact(path: Path, world_size: int) -> bool:
    """Whether a run can resume from a file bit-exactly."""
    try:
        return path.is_file() and resumes_exactly(read_checkpoint(path), world_size)
    except InputError:  # damaged
        return False


@contextmanager
def rotate_previous(last: Path) -> Iterator[None]:
    """Keep the file that is replaced within as ``previous.ckpt``."""
    try:  # at the first save, or in a remote folder, which keeps the last file only, there is none
        is_intact = last.is_file() and bool(read_verified(last))
    except InputError:  # a damaged file does not replace the previous one
        is_intact = False
    if not is_intact:
        yield
        return
    kept = last.with_name(f".{PREVIOUS}.unfinished")
    kept.unlink(missing_ok=True)  # a killed process leaves it
    try:
        try:
            os.link(last, kept)
        except OSError:  # a file system without links
            shutil.copy2(last, kept)
        yield
        kept.replace(last.with_name(PREVIOUS))  # only now, so that a failed save does not lose the older file
    finally:
        kept.unlink(missing_ok=True)
