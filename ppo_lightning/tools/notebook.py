"""The live display of a run in a notebook."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.runs.history import Records, summarize_records
from ppo_lightning.tools.charts import RETURN, Curve, draw, to_png
from ppo_lightning.tools.dashboard import EPISODES, UPDATE, MetricRow, metric_rows, user_rows
from ppo_lightning.tools.page import render
from ppo_lightning.tools.saved_runs import SavedRun

COLOURS = {"green": "#1a7f37", "yellow": "#9a6700", "bold red": "#cf222e", "": "inherit"}


class NotebookDisplay(Callback):
    """A live table of the newest metrics and a plot of the learning curve below a notebook's cell.

    It is updated between iterations, at most every three seconds and for at most a thirtieth of the time, and at the end.
    The progress bar does not change. Outside of a notebook the callback does nothing.

    Raises:
        InputError: matplotlib is not installed, in a notebook.
    """

    INTERVAL_S = 3.0
    SHARE = 1 / 30
    """Of the time, at most, for drawing."""

    def __init__(self) -> None:
        self._handle: Any = None
        self.next_draw = 0.0
        """Time before which the page is not updated (of perf_counter)."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handle = None
        if not (trainer.is_global_zero and Console().is_jupyter):
            return
        if find_spec("matplotlib") is None:
            raise InputError(
                'NotebookDisplay draws with matplotlib, which is not installed: pip install "ppo-lightning[plot]"'
            )
        from IPython.display import HTML, display  # which every notebook has

        self._handle = display(HTML(""), display_id=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._handle is not None and time.perf_counter() >= self.next_draw:
            self._show(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._handle is not None:
            self._show(trainer)
            self._handle = None

    def _show(self, trainer: Trainer) -> None:
        from IPython.display import HTML

        began = time.perf_counter()
        module = cast(PPOModule, trainer.lightning_module)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        sections = {
            f"{module.env_factory.name}: {module.num_env_steps:,} of {module.total_steps:,} steps": [],
            "Episodes": metric_rows(metrics, EPISODES),
            "Update": metric_rows(metrics, UPDATE),
            "Metrics": user_rows(metrics),
        }
        figure = draw(RETURN, learning_curves(module.records), (6, 3.4))
        self._handle.update(HTML(page(sections, to_png(figure, 110))))
        ended = time.perf_counter()
        self.next_draw = ended + max(self.INTERVAL_S, (ended - began) / self.SHARE)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}  # of this process


def learning_curves(records: Records) -> list[Curve]:
    """Training and evaluation return of a run, with one standard deviation over evaluation episodes."""
    summary = summarize_records(
        records, env_steps=0, iterations=0, episodes=[], latest_checkpoint=None, best_checkpoint=None
    )
    return RETURN.curves(SavedRun(Path(), summary, {}, {}, []))


def page(sections: dict[str, list[MetricRow]], png: bytes) -> str:
    """A table of titled rows beside a PNG, as self-contained HTML."""
    return render("notebook.html", sections=sections, png=png, styles=COLOURS)
