"""A live view of a run on one screen of a terminal, laid out by Rich."""

import contextlib
import math
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from ppo_lightning.callbacks.progress import StepProgressBar, handlers_on
from ppo_lightning.module import PPOModule
from ppo_lightning.runs.clock import BURN_IN
from ppo_lightning.tools.diagnosis import Thresholds, healthy_ranges
from ppo_lightning.tools.hardware import Hardware, HardwareMonitor
from ppo_lightning.tools.page import number


@runtime_checkable
class ReportsFindings(Protocol):
    """A callback with findings, such as HealthMonitor."""

    findings: Sequence[Mapping[str, Any]]
    """Each with ``name``, ``since_step``, ``until_step`` (None while it holds) and ``advice``."""


HEALTHY = healthy_ranges(Thresholds())
"""Usual ranges while a policy learns; towards the end of a run a policy changes less."""

EPISODES = {
    "rollout/ep_rew_mean": "return",
    "rollout/ep_len_mean": "length",
    "rollout/success_rate": "success rate",
    "rollout/fail_rate": "fail rate",
    "eval/mean_reward": "eval return",
    "eval/std_reward": "eval std",
    "eval/mean_ep_length": "eval length",
    "eval/success_rate": "eval success",
    "eval/fail_rate": "eval fail",
}
_UPDATE = (
    *("approx_kl", "clip_fraction", "explained_variance", "entropy_loss", "policy_gradient_loss", "value_loss"),
    *("loss", "grad_norm", "std", "learning_rate", "skipped_steps"),
)
UPDATE = {f"train/{name}": name for name in _UPDATE}
"""Metrics of an update, in the order of their display."""

HARDWARE = {
    "hardware/cpu_percent": "CPU {:.0f} %",
    "hardware/ram_percent": "RAM {:.0f} %",
    "hardware/process_ram_mb": "process {:,.0f} MB",
    "hardware/gpu_percent": "GPU {:.0f} %",
    "hardware/gpu_memory_mb": "VRAM {:,.0f} MB",
}

BUILT_IN = (
    *("rollout/", "train/", "time/", "eval/", "hardware/", "health/"),
    *("obs_", "reward_norm/", "popart/", "advantage/", "value/", "returns/"),
)
"""Prefixes of metrics that are not the user's own: they have another place, or are for loggers only."""

MAX_USER_METRICS = 30
MAX_FINDINGS = 3

WIDE = 76
"""Terminal columns from which metrics have two columns."""


@dataclass(frozen=True)
class Frame:
    """The content of the screen at one time."""

    name: str
    status: str
    env_steps: int
    total_steps: int
    iteration: int
    elapsed: float
    """Since this fit began (seconds)."""
    remaining: float | None = None
    """Estimate (seconds); None at the end, and before there is one."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Total seconds of each part of an iteration since the burn-in."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest values, by canonical name."""
    hardware: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[Mapping[str, Any]] | None = None
    """Of HealthMonitor; None without one."""
    returns: Sequence[float] = ()
    """``rollout/ep_rew_mean`` of the run's iterations so far, oldest first."""


class MetricRow(NamedTuple):
    """One displayed metric."""

    label: str
    value: str
    style: str = ""
    mark: str = ""
    note: str = ""


def metric_rows(metrics: Mapping[str, float], labels: Mapping[str, str]) -> list[MetricRow]:
    """The metrics that have a label, with the style and mark of their health."""
    found = []
    for name, label in labels.items():
        if name in metrics:
            value, healthy = metrics[name], HEALTHY.get(name)
            if not math.isfinite(value):
                style, mark = "bold red", "!"
            else:
                style, mark = ("", "") if healthy is None else healthy.judge(value)
            found.append(MetricRow(label, number(value), style, mark, str(healthy or "")))
    return found


def user_rows(metrics: Mapping[str, float]) -> list[MetricRow]:
    """The user's own metrics, by name."""
    own = sorted(name for name in metrics if not name.startswith(BUILT_IN) and name != "step")
    return [MetricRow(name, number(metrics[name])) for name in own]


def phase_rows(phases: Mapping[str, float]) -> list[MetricRow]:
    """Shares of the time."""
    total = sum(phases.values())
    shares = {name: seconds / total for name, seconds in phases.items()} if total else {}
    return [MetricRow(name, f"{100 * share:.0f} %", note="▇" * round(10 * share)) for name, share in shares.items()]


BLOCKS = "▁▂▃▄▅▆▇█"


def curve_line(values: Sequence[float], width: int) -> str:
    """The curve of the return as one line of blocks, between its lowest and highest value.

    Args:
        values: at equal distances.
        width: of the line (columns).

    Returns:
        The line; empty for fewer than two values, or without room.
    """
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    begin, end = f"return {number(low)} ", f" {number(high)}"
    columns = width - len(begin) - len(end)
    if columns < 2:
        return ""
    chosen = [values[round(place * (len(values) - 1) / (columns - 1))] for place in range(columns)]
    span = high - low or 1.0
    return begin + "".join(BLOCKS[round((len(BLOCKS) - 1) * (value - low) / span)] for value in chosen) + end


def status_items(frame: Frame) -> list[str]:
    """Status, progress, speed and times."""
    items = [
        frame.status,
        f"{frame.env_steps:,} of {frame.total_steps:,} steps",
        f"iteration {frame.iteration:,}",
    ]
    if "time/fps" in frame.metrics:
        items.append(f"{frame.metrics['time/fps']:,.0f} steps/s")
    items.append(f"{timedelta(seconds=round(frame.elapsed))} elapsed")
    if frame.remaining is not None:
        items.append(f"{timedelta(seconds=round(frame.remaining))} left")
    return items


def render(frame: Frame, width: int) -> Panel:
    """The screen of a frame; the last lines are the least important ones.

    Args:
        frame: the content.
        width: of the terminal (columns).
    """
    wide, phases, own = width >= WIDE, phase_rows(frame.phases), user_rows(frame.metrics)
    progress = Table.grid(padding=(0, 1), expand=True)
    progress.add_column(ratio=1)
    bar = ProgressBar(total=frame.total_steps, completed=frame.env_steps, complete_style="green")
    progress.add_row(bar, f"{math.floor(100 * min(1.0, frame.env_steps / frame.total_steps)):>3} %")
    parts: list[RenderableType] = [progress, _line(status_items(frame), width)]
    curve = curve_line(frame.returns, width - 4)
    if curve or frame.findings is not None:  # an empty line before findings where there is no curve
        parts.append(Text(curve, "cyan", no_wrap=True))
    shown, more = own[:MAX_USER_METRICS], len(own) - MAX_USER_METRICS
    episodes = _section("Episodes", metric_rows(frame.metrics, EPISODES))
    update = _section("Update", metric_rows(frame.metrics, UPDATE), "healthy" if wide else None)
    if wide:
        half = math.ceil(len(shown) / 2)
        left = _section("Time", phases, "")
        parts += [*_health(frame.findings), _beside(Group(*episodes, *left), Group(*update), (2, 3))]
        parts.append(_beside(Group(*_section("Metrics", shown[:half])), Group(*_section("", shown[half:])), (1, 1)))
    else:
        times = [_line([f"{row.label} {row.value}" for row in phases], width)] if phases else []
        parts += [*times, *_health(frame.findings), *episodes, *update, *_section("Metrics", shown)]
    if more > 0:
        parts.append(Text(f"and {more} more", "dim"))
    machine = [text.format(frame.hardware[name]) for name, text in HARDWARE.items() if name in frame.hardware]
    if machine:
        parts += ["", _line(machine, width)]
    title = Text(f"PPO {frame.name}", "bold")
    title.truncate(width - 6, overflow="ellipsis")  # a longer title would widen the panel
    return Panel(Group(*parts), title=title, title_align="left", width=width)


def _line(items: Iterable[str], width: int) -> Text:
    """Items with dots between them, on several lines if necessary, which break between items only."""
    text = " ".join(f"{item} ·".replace(" ", "\xa0") for item in items).removesuffix("\xa0·")
    return Text(textwrap.fill(text, width - 4, break_on_hyphens=False).replace("\xa0", " "))


def _health(findings: Sequence[Mapping[str, Any]] | None) -> Iterator[Text]:
    if findings is None:
        return
    alerts = [finding for finding in findings if finding["until_step"] is None]
    if not alerts:
        yield Text("✔ health: no alert", "green")
    for finding in alerts[:MAX_FINDINGS]:
        since = f" since step {finding['since_step']:,}: {finding['advice']}"
        yield Text.assemble((f"! {finding['name']}", "bold red"), since)
    if len(alerts) > MAX_FINDINGS:
        yield Text(f"and {len(alerts) - MAX_FINDINGS} more", "bold red")


def _section(title: str, rows: Sequence[MetricRow], notes: str | None = None) -> list[RenderableType]:
    """An empty line and a table of metrics; nothing without metrics.

    Args:
        title: over the labels.
        rows: of the table.
        notes: title over the notes; None leaves them out.
    """
    if not rows:
        return []
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False)
    table.add_column(Text(title, "bold"), ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, min_width=2)
    if notes is not None:
        table.add_column(Text(notes, "dim"), style="dim", no_wrap=True, justify="right" if notes else "left")
    for row in rows:
        cells = [Text(row.label), Text(row.value, row.style), Text(row.mark, row.style), Text(row.note)]
        table.add_row(*cells[: len(table.columns)])
    return ["", table]


def _beside(left: RenderableType, right: RenderableType, ratios: tuple[int, int]) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    for ratio in ratios:
        grid.add_column(ratio=ratio)
    grid.add_row(left, right)
    return grid


class Dashboard(StepProgressBar):
    """A dashboard instead of the progress bar: progress, speed, returns, losses, health, hardware.

    It is redrawn between iterations, at most four times per second and for at most a hundredth of the time. Printed text
    appears above it. Without a terminal that can redraw (a file, a pipe, a notebook, ``TERM=dumb``) it is the plain bar.
    """

    INTERVAL_S = 0.25
    SHARE = 0.01
    """Of the time, at most, for drawing."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Live | None = None
        """The screen, while training in a terminal that can redraw."""
        self.next_draw = 0.0
        """Time before which it is not redrawn (of perf_counter)."""
        self._console: Console | None = None
        self._frame: Frame | None = None
        self._hardware: Hardware | None = None
        self._findings: ReportsFindings | None = None
        self._handlers = contextlib.ExitStack()
        self._iterations = 0
        self._burned_in: tuple[dict[str, float], int] | None = None

    @override
    def init_train_tqdm(self) -> Tqdm:
        return super().init_train_tqdm() if self.live is None else Tqdm(disable=True)

    @override
    def on_train_start(self, *args: Any) -> None:
        console = Console()
        self._console = console if self.is_enabled and can_redraw(console) else None
        if self._console is not None:
            self._start(self._console)
        super().on_train_start(*args)
        if self.live is not None:
            self._show("training")

    def _start(self, console: Console) -> None:
        others = cast(Any, self.trainer).callbacks
        self._findings = next((one for one in others if isinstance(one, ReportsFindings)), None)
        # Two measuring objects would shorten each other's intervals.
        self._hardware = next((one.hardware for one in others if isinstance(one, HardwareMonitor)), None)
        if self._hardware is None and find_spec("psutil") is not None:
            self._hardware = Hardware(self.trainer.lightning_module.device)
        self._began, self._iterations, self._burned_in = time.perf_counter(), 0, None
        out, err = sys.stdout, sys.stderr
        self.live = Live(
            get_renderable=lambda: "" if self._frame is None else render(self._frame, console.width),
            console=console,
            auto_refresh=False,
            redirect_stderr=err.isatty(),
        )
        self.live.start()
        # Handlers hold the former streams; the dashboard would overwrite what they print.
        self._handlers.enter_context(handlers_on({out: sys.stdout, err: sys.stderr}))

    def _stop(self, status: str) -> None:
        """Draw the last frame and restore the terminal."""
        live, self.live = self.live, None
        if live is not None:
            try:
                self._frame = self.frame(status)
            finally:
                live.stop()
                self._handlers.close()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.live is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._iterations += 1
        if self._iterations == BURN_IN:
            module = cast(PPOModule, pl_module)
            self._burned_in = dict(module.records.seconds), module.num_env_steps
        self._show_if_due("training")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._show_if_due("evaluating")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._show_if_due("training")

    @override
    def on_train_end(self, *args: Any) -> None:
        module = cast(PPOModule, self.trainer.lightning_module)
        self._stop("finished" if module.num_env_steps >= module.total_steps else "stopped")
        super().on_train_end(*args)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop("stopped")
        super().on_exception(trainer, pl_module, exception)

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the dashboard; the inherited method prints nothing without a bar."""
        if self._console is None:
            super().print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    @override
    def _draw(self, pl_module: LightningModule) -> None:
        if self.live is None:
            super()._draw(pl_module)

    def _show_if_due(self, status: str) -> None:
        if self.live is not None and time.perf_counter() >= self.next_draw:
            self._show(status)

    def _show(self, status: str) -> None:
        assert self.live is not None
        began = time.perf_counter()
        self._frame = self.frame(status)
        self.live.refresh()
        ended = time.perf_counter()
        self.next_draw = ended + max(self.INTERVAL_S, (ended - began) / self.SHARE)

    def frame(self, status: str) -> Frame:
        """The content of the screen now."""
        module = cast(PPOModule, self.trainer.lightning_module)
        steps, remaining, phases = module.num_env_steps, None, {}
        if self._burned_in is not None and self._burned_in[1] < steps:
            before, first = self._burned_in
            spent = {part: seconds - before[part] for part, seconds in module.records.seconds.items()}
            elapsed = spent.pop("elapsed")
            phases = {**spent, "other": max(0.0, elapsed - sum(spent.values()))}
            if steps < module.total_steps:
                remaining = (module.total_steps - steps) * elapsed / (steps - first)
        return Frame(
            name=module.env_factory.name,
            status=status,
            env_steps=steps,
            total_steps=module.total_steps,
            iteration=module.policy_version,
            elapsed=time.perf_counter() - self._began,
            remaining=remaining,
            phases=phases,
            metrics={name: value.item() for name, value in self.trainer.callback_metrics.items()},
            returns=module.records.train.values("rollout/ep_rew_mean"),
            hardware={} if self._hardware is None else self._hardware.read(),
            findings=None if self._findings is None else self._findings.findings,
        )

    @override
    def __getstate__(self) -> dict[str, Any]:
        mine = {"_console": None, "live": None, "_hardware": None, "_findings": None}  # belong to this process
        return {**super().__getstate__(), **mine, "_handlers": contextlib.ExitStack()}


def can_redraw(console: Console) -> bool:
    """Whether the terminal can move its cursor and show the characters of the dashboard."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and not console.is_jupyter
        and console.encoding.startswith("utf")
    )
