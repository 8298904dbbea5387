"""A progress bar that counts environment steps."""

import sys
import time
from typing import Any, Protocol, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override


class Progresses(Protocol):
    """A module that counts environment steps."""

    total_steps: int

    @property
    def num_env_steps(self) -> int:
        """Steps so far, of all processes."""
        ...

    def progress(self) -> dict[str, str]:
        """What to show beside them."""
        ...


class StepProgressBar(TQDMProgressBar):
    """One bar for the whole run: environment steps, steps per second, time left, mean return."""

    INTERVAL_S = 0.2  # seconds between redraws: drawing costs more than a short iteration

    @override
    def init_train_tqdm(self) -> Tqdm:
        module = cast(Progresses, self.trainer.lightning_module)
        return Tqdm(
            desc="PPO",
            total=module.total_steps,
            initial=module.num_env_steps,
            unit=" steps",
            unit_scale=True,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0.1,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    @override
    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)  # an evaluation is one batch: there is nothing to count

    @override
    def init_test_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    @override
    def on_train_start(self, *_: Any) -> None:
        super().on_train_start()
        self._drawn = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """The bar spans all epochs."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar spans all epochs."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._drawn >= self.INTERVAL_S:
            self._draw(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reset_dataloader_idx_tracker()

    @override
    def on_train_end(self, *args: Any) -> None:
        self._draw(self.trainer.lightning_module)
        super().on_train_end(*args)

    def _draw(self, pl_module: LightningModule) -> None:
        self._drawn = time.monotonic()
        module, bar = cast(Progresses, pl_module), self.train_progress_bar
        bar.total = max(module.total_steps, module.num_env_steps)
        bar.n = module.num_env_steps
        bar.set_postfix(module.progress(), refresh=False)
        bar.refresh()
