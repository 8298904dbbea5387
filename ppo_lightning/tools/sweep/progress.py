"""The callback by which a run reports its metric to the sweep."""

import difflib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from typing_extensions import override

from ppo_lightning.callbacks import EvaluationCallback
from ppo_lightning.errors import InputError


class Progress(EvaluationCallback):
    """Appends every new value of a metric to a file, and stops the run at a threshold.

    It also stops the run when its standard input closes, because the process that started it has ended.

    Args:
        file: gets one JSON object per line: ``steps`` (environment steps), ``seconds`` (since training began) and
            ``value``.
        metric: its name, such as eval/mean_reward (written at each evaluation) or rollout/ep_rew_mean (at each iteration).
        threshold: value at which the run stops, in the metric's units; null never.
        threads: of torch, at most (count); null leaves torch's number.

    Raises:
        InputError: the metric is unknown.
    """

    def __init__(self, file: str, metric: str, threshold: float | None = None, threads: int | None = None) -> None:
        self.file, self.metric, self.threshold, self.threads = Path(file), metric, threshold, threads
        self._began = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
        if self.threads is not None:
            torch.set_num_threads(min(torch.get_num_threads(), self.threads))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.metric.startswith("eval/"):
            self._write(trainer, cast(Any, pl_module).num_env_steps)

    @override
    def on_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, step: int, statistics: dict[str, float]
    ) -> None:
        if self.metric.startswith("eval/"):
            self._write(trainer, step)

    def _write(self, trainer: Trainer, step: int) -> None:
        if self.metric not in trainer.callback_metrics:
            if self.metric.startswith("rollout/"):  # until an episode has ended
                return
            near = difflib.get_close_matches(self.metric, trainer.callback_metrics, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(trainer.callback_metrics)}"
            raise InputError(f"metric {self.metric} is not known: {hint}")
        value = float(trainer.callback_metrics[self.metric])
        if trainer.is_global_zero:
            row = {
                "steps": step,
                "seconds": time.monotonic() - self._began,
                "value": value,
            }
            with self.file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        if self.threshold is not None and value >= self.threshold:
            trainer.should_stop = True


def _stop_with_the_sweep() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
