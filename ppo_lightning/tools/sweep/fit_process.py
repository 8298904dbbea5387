"""A training run of a trial: ``fit`` with one seed in a process of its own, and the callback that reports its metric."""

import difflib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning import LightningModule, Trainer
from typing_extensions import override

from ppo_lightning.callbacks import EvaluationCallback
from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import may_come_later

GRACE_S = 10.0
"""Time that a process gets to shut down after SIGTERM; the end of a long iteration takes five seconds."""
FIT = [sys.executable, "-m", "ppo_lightning", "fit"]


class Measurement(NamedTuple):
    """The metric at one point of a run."""

    steps: int
    """Environment steps."""
    seconds: float
    """Since training began."""
    value: float
    """Of the metric."""


class Progress(EvaluationCallback):
    """Appends every new value of a metric to a file, and stops the run at a threshold.

    It also stops the run when its standard input closes, because the process that started it has ended.

    Args:
        file: gets one :class:`Measurement` per line, as JSON.
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
        threading.Thread(target=exit_with_parent, daemon=True).start()
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
            if may_come_later(self.metric):
                return
            near = difflib.get_close_matches(self.metric, trainer.callback_metrics, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(trainer.callback_metrics)}"
            raise InputError(f"metric {self.metric} is not known: {hint}")
        value = float(trainer.callback_metrics[self.metric])
        if trainer.is_global_zero:
            row = Measurement(step, time.monotonic() - self._began, value)
            with self.file.open("a") as lines:
                lines.write(json.dumps(row._asdict()) + "\n")
        if self.threshold is not None and value >= self.threshold:
            trainer.should_stop = True


def exit_with_parent() -> None:
    """Wait until standard input closes, and stop this process."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class FitProcess:
    """One ``fit`` with one seed.

    Args:
        folder: of the trial, with its ``config.yaml``.
        seed: of the run.
        metric: as of :class:`Progress`, like the rest.
        threshold: value of the metric at which the run stops; None never.
        threads: of torch, at most (count); None leaves torch's number.
    """

    def __init__(
        self, folder: Path, seed: int, metric: str, threshold: float | None = None, threads: int | None = None
    ) -> None:
        self.metric = metric
        self.file, self.log = folder / f"progress_{seed}.jsonl", folder / f"log_{seed}.txt"
        self.file.unlink(missing_ok=True)
        self._measurements: list[Measurement] = []
        self._position = 0
        given = {"file": self.file, "metric": metric, "threshold": threshold, "threads": threads}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *FIT,
                    f"--config={folder / 'config.yaml'}",
                    f"--seed_everything={seed}",
                    f"--trainer.default_root_dir={folder}",
                    f"--trainer.callbacks+={Progress.__module__}.Progress",
                    *[f"--trainer.callbacks.{name}={value}" for name, value in given.items() if value is not None],
                ],
                stdin=subprocess.PIPE,  # closes with this process, however that ends
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal sends Ctrl-C to the sweep only, which stops its runs
            )

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def measurements(self) -> list[Measurement]:
        """All measurements so far; reads only new lines of the file, and no line before it is complete."""
        if self.file.exists():
            with self.file.open("rb") as lines:
                lines.seek(self._position)
                complete = lines.read().rpartition(b"\n")[0]
            if complete:
                self._position += len(complete) + 1
                self._measurements += [Measurement(**json.loads(line)) for line in complete.splitlines()]
        return self._measurements

    def stop(self) -> None:
        """Terminate the process if it is running, kill it if that takes too long, and close its standard input."""
        if self.is_running():
            self.process.terminate()
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def failure(self) -> str | None:
        """The reason why the ended process failed, in one line; None if it succeeded."""
        status = self.process.returncode
        if status == 0:
            rows = self.measurements()
            finite = rows and math.isfinite(rows[-1].value)
            return None if finite else f"the run reported no finite value of {self.metric}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        if status < 0 or not lines:
            return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
        last = errors[-1] if errors else len(lines) - 1
        until = next((index for index in range(last, len(lines)) if not lines[index].endswith(":")), len(lines) - 1)
        return " ".join(lines[last : until + 1]).removeprefix("error: ")
