"""The summaries of a run: of its model before it, and ``summary.json`` after it."""

import json
import time
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich import box, get_console
from rich.table import Table
from typing_extensions import override

from ppo_lightning.module import PPOModule
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.runs.history import SUMMARY, Records


class RunSummary(Callback):
    """Records evaluations and times for ``model.summary()``, and writes ``summary.json`` into the run's folder.

    Rank 0 writes it however the run ends. A run without a logger has no folder, and no file. Checkpoints hold the records,
    so that those of a resumed run are complete.
    """

    POSITION = 7  # it reports the results of other callbacks

    def __init__(self) -> None:
        self._records = Records()
        self._folder: Path | None = None
        self._since = self._evaluating_since = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._records = cast(PPOModule, pl_module).records

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # all ranks ask: the answer is broadcast
        self._folder = None if not trainer.loggers or folder is None or "://" in folder else Path(folder)
        if self._records.begun_at is None:
            self._records.begun_at = cast(PPOModule, pl_module).num_env_steps
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what callbacks have logged to the iteration's record."""
        found = trainer.callback_metrics
        metrics = {name: found[name].item() for name in found if name[:5] != "eval/" and name != "step"}
        self._records.add_iteration(cast(PPOModule, pl_module).num_env_steps, metrics)
        self._count_time()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluating_since = time.perf_counter()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the evaluation, before any ``on_validation_end`` saves it."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            found = trainer.callback_metrics
            metrics = {name: found[name].item() for name in found if name.startswith("eval/")}
            self._records.evaluations.add(cast(PPOModule, pl_module).num_env_steps, metrics)
            self._records.seconds["evaluate"] += time.perf_counter() - self._evaluating_since
            self._count_time()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._records.state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._records.load_state(state_dict)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interrupted = cast(PPOModule, pl_module).agreed_stop_signal
        self._write(trainer, pl_module, "finished" if interrupted is None else f"stopped by {interrupted.name}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._folder = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        interrupted = cast(PPOModule, pl_module).agreed_stop_signal
        reason = f"{type(exception).__name__}: {exception}" if interrupted is None else interrupted.name
        self._write(trainer, pl_module, f"stopped by {reason}")
        self._folder = None

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._records.seconds["elapsed"] += now - self._since
        self._since = now

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        if self._folder is None:  # it never began
            return
        self._count_time()
        if not trainer.is_global_zero:
            return
        module = cast(PPOModule, pl_module)
        hyperparameters = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
        text = json.dumps(hyperparameters, default=str, skipkeys=True)
        contents = {
            "status": status,
            "seed": module.seed,
            "num_processes": trainer.world_size,
            "hyperparameters": json.loads(text, parse_constant=str),  # JSON has no infinity
            **module.summary(),
        }
        try:
            write_atomically(self._folder / SUMMARY, json.dumps(contents, allow_nan=False).encode())
        except OSError as error:
            rank_zero_warn(f"{self._folder / SUMMARY} could not be written ({error})")


class ParameterSummary(ModelSummary):
    """Lightning's summary of the model as one table of the parts that have parameters, three levels deep.

    Lightning's own counts floating-point operations of an example input, which are 0 without one.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=3)

    @staticmethod
    @override
    def summarize(summary_data: list[tuple[str, list[str]]], total_parameters: int, *args: Any, **kwargs: Any) -> None:
        """Print it: names, types and numbers of parameters."""
        columns = dict(summary_data)
        names = columns["Name"]
        whole = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
        table = Table(box=box.SIMPLE_HEAD, show_footer=True)
        table.add_column("Name", footer="all")
        table.add_column("Type")
        table.add_column("Parameters", justify="right", footer=f"{total_parameters:,}")
        for name, kind, count in zip(names, columns["Type"], columns["Params"], strict=True):
            if name not in whole and count.strip() != "0":
                table.add_row(name, kind, count)
        get_console().print(table)
