"""What a run is doing, in a notebook."""

import base64
import html
import io
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.runs.history import History
from ppo_lightning.tools.dashboard import EPISODES, UPDATE, Row, rows, user_rows

Points = Sequence[tuple[float, ...]]
"""Environment steps and mean return; of evaluations also its standard deviation over episodes."""


COLOURS = {"green": "#1a7f37", "yellow": "#9a6700", "bold red": "#cf222e", "": "inherit"}


class NotebookDisplay(Callback):
    """A table of the newest numbers and a plot of the learning curve below a notebook's cell, both live.

    They are drawn between iterations, every three seconds at most and for at most a thirtieth of the time, and at the
    end. The bar stays as it is. Outside of a notebook nothing is shown.

    Raises:
        InputError: matplotlib is not installed, in a notebook.
    """

    INTERVAL_S = 3.0
    SHARE = 1 / 30
    """Of the time, that drawing may take."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._next_draw = 0.0

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
        if self._handle is not None and time.perf_counter() >= self._next_draw:
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
            "Episodes": rows(metrics, EPISODES),
            "Update": rows(metrics, UPDATE),
            "Metrics": user_rows(metrics),
        }
        trained = points(module.records.train, "rollout/ep_rew_mean")
        picture = draw_curve(trained, points(module.records.evaluations, "eval/mean_reward", "eval/std_reward"))
        self._handle.update(HTML(page(sections, picture)))
        ended = time.perf_counter()
        self._next_draw = ended + max(self.INTERVAL_S, (ended - began) / self.SHARE)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}  # of this process


def points(history: History, *names: str) -> Points:
    """Environment steps and values of metrics, of the rows that have them all."""
    return [(row["step"], *(row[name] for name in names)) for row in history.rows() if row.keys() >= set(names)]


def draw_curve(trained: Points, evaluated: Points) -> bytes:
    """Training and evaluation return over environment steps, as PNG."""
    from matplotlib.figure import Figure  # the plot extra

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    if trained:
        steps, means = zip(*trained, strict=True)
        axes.plot(steps, means, label="training, mean of 100 episodes")
    if evaluated:
        steps, means, spreads = zip(*evaluated, strict=True)
        axes.errorbar(
            steps, means, spreads, marker="o", markersize=3, capsize=2, label="evaluation ± standard deviation"
        )
    axes.set(xlabel="environment steps", ylabel="return")
    axes.grid(alpha=0.3)
    if trained or evaluated:
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def page(sections: dict[str, list[Row]], picture: bytes) -> str:
    """A table of titled rows beside a picture, as HTML that needs nothing else."""
    lines = []
    for title, body in sections.items():
        if body or title == next(iter(sections)):
            lines.append(f'<tr><th colspan="3" style="text-align:left">{html.escape(title)}</th></tr>')
        for row in body:
            value = f"{row.value} {row.mark}".strip()
            style = f"text-align:right;color:{COLOURS[row.style]}"
            lines.append(
                f'<tr><td style="text-align:left">{html.escape(row.label)}</td><td style="{style}">{value}</td>'
                f'<td style="opacity:0.6">{row.note}</td></tr>'
            )
    encoded = base64.b64encode(picture).decode()
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
        f'<table>{"".join(lines)}</table><img alt="learning curve" src="data:image/png;base64,{encoded}"></div>'
    )
