"""The two checkpoints that every run leaves: the best by evaluation, and the last."""

import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class Rewinds(Protocol):
    """A module that can go back to the end of its last iteration."""

    def rewind(self) -> None:
        """Go back."""

    def without_others(self) -> AbstractContextManager[None]:
        """Save without asking other processes."""
        ...


class RunCheckpoint(ModelCheckpoint):
    """One file per run, under a fixed name in the run's folder."""

    PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
    _stage = ""

    @property
    @override
    def state_key(self) -> str:
        return type(self).__name__  # whatever its interval: a resumed run may have another

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory")  # a resumed run replaces its own files
            super().setup(trainer, pl_module, stage)
        self._stage = stage

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":  # a validation has no scores to go on with
            return
        folder = Path(str(self.dirpath))
        if Path(state_dict["dirpath"]).resolve() == folder.resolve():
            # Lightning compares how paths are written: under another spelling, the file just saved would be deleted as
            # the old best one.
            state_dict = {
                **state_dict,
                **{key: _within(folder, state_dict[key]) for key in self.PATHS},
                "best_k_models": {_within(folder, path): score for path, score in state_dict["best_k_models"].items()},
                "dirpath": self.dirpath,
            }
        super().load_state_dict(state_dict)


def _within(folder: Path, path: str) -> str:
    return str(folder / Path(path).name) if path else path


class BestCheckpoint(RunCheckpoint):
    """``best.ckpt``: the policy with the highest ``eval/mean_reward``."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor="eval/mean_reward",
            mode="max",
            save_on_train_epoch_end=False,  # but at the end of each evaluation
            enable_version_counter=False,
        )


class LastCheckpoint(RunCheckpoint):
    """``last.ckpt``: the newest state, every so many iterations, at the end, and when a single process fails.

    Args:
        every_n_epochs: iterations between two saves.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        super().__init__(
            filename="last",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            save_on_exception=True,
            enable_version_counter=False,
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the last whole iteration ended; by one process alone, since others may not answer any more."""
        if trainer.global_step == 0 or not self._should_save_on_exception(trainer):
            return
        module = cast(Rewinds, pl_module)
        module.rewind()
        if trainer.is_global_zero:
            with module.without_others():
                contents = trainer._checkpoint_connector.dump_checkpoint()
            trainer.strategy.save_checkpoint(contents, f"{self.dirpath}/last.ckpt")
