"""A progress bar that counts environment steps."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm.contrib import DummyTqdmFile
from typing_extensions import override

from ppo_lightning.module import PPOModule


class AboveBar(DummyTqdmFile):
    """A standard stream whose lines are written above the bar; tqdm compares streams to find bars on the same terminal."""

    def __eq__(self, other: object) -> bool:
        return self.wrapped is getattr(other, "_wrapped", other)

    __hash__ = object.__hash__

    @property
    def wrapped(self) -> TextIO:
        """The stream itself."""
        return cast(Any, self)._wrapped


@contextlib.contextmanager
def handlers_on(streams: Mapping[Any, Any]) -> Iterator[None]:
    """Let log handlers that write to a stream write to another one.

    Args:
        streams: the other stream by the first.
    """
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    with contextlib.ExitStack() as restored:
        for handler in (handler for logger in (logging.root, *loggers) for handler in logger.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                restored.callback(handler.setStream, handler.stream)
                handler.setStream(streams[handler.stream])
        yield


@contextlib.contextmanager
def lines_above_bar() -> Iterator[None]:
    """Write all output within above the bar, line by line."""
    out, err = AboveBar(sys.stdout), AboveBar(sys.stderr)
    with (
        handlers_on({sys.stdout: out, sys.stderr: err}),
        contextlib.redirect_stdout(cast(TextIO, out)),
        contextlib.redirect_stderr(cast(TextIO, err)),
    ):
        yield


class StepProgressBar(TQDMProgressBar):
    """One bar for the whole run: environment steps, steps per second, time left, mean return."""

    INTERVAL_S = 0.2  # seconds between redraws: drawing costs more than a short iteration

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lines_above = contextlib.ExitStack()

    @override
    def init_train_tqdm(self) -> Tqdm:
        module = cast(PPOModule, self.trainer.lightning_module)
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
        bar = self.train_progress_bar
        if not (bar.disable or hasattr(bar, "container")):  # which is a notebook's widget
            self._lines_above.enter_context(lines_above_bar())

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
        self._lines_above.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the bar, and end its line."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()
        self._lines_above.close()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lines_above": contextlib.ExitStack()}

    def _draw(self, pl_module: LightningModule) -> None:
        self._drawn = time.monotonic()
        module, bar = cast(PPOModule, pl_module), self.train_progress_bar
        bar.total = max(module.total_steps, module.num_env_steps)
        bar.n = module.num_env_steps
        fps, mean_return = module.clock.fps, module.rollouts.episodes.means().get("rollout/ep_rew_mean")
        shown = {} if fps is None else {"fps": f"{fps:,.0f}"}
        bar.set_postfix(shown if mean_return is None else {**shown, "return": f"{mean_return:.4g}"}, refresh=False)
        bar.refresh()
