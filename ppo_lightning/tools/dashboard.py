"""What a run is doing, on one screen of a terminal."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from typing_extensions import override

from ppo_lightning.callbacks.progress import Progresses, StepProgressBar
from ppo_lightning.clock import BURN_IN
from ppo_lightning.tools.diagnosis import Thresholds
from ppo_lightning.tools.hardware import Hardware, HardwareMonitor
from ppo_lightning.tools.page import number


class Described(Progresses, Protocol):
    """A module that counts its steps and iterations, and whose environment has a name."""

    env_maker: Any

    @property
    def policy_version(self) -> int:
        """Iterations so far."""
        ...


@runtime_checkable
class Diagnoses(Protocol):
    """A callback that says what is wrong with a run."""

    findings: Sequence[Mapping[str, Any]]
    """Of each its ``name``, ``since_step``, ``until_step`` (None while it holds) and ``advice``."""


class Range(NamedTuple):
    """Where a metric is healthy, and beyond which value it alerts."""

    low: float
    high: float
    alert: float

    def judge(self, value: float) -> tuple[str, str]:
        """Style and mark of a value: inside, outside, or beyond the alert, where it is above or below."""
        if self.low <= value <= self.high:
            return "green", ""
        mark = "▲" if value > self.high else "▼"
        alerts = value > self.alert if self.alert > self.high else value < self.alert
        return ("bold red", f"!{mark}") if alerts else ("yellow", mark)

    def __str__(self) -> str:
        return f"{self.low:g}–{self.high:g}"


_thresholds = Thresholds()
HEALTHY = {
    "train/approx_kl": Range(*_thresholds.approx_kl, alert=_thresholds.approx_kl_alert),
    "train/clip_fraction": Range(*_thresholds.clip_fraction, alert=_thresholds.clip_fraction_alert),
    "train/explained_variance": Range(_thresholds.explained_variance, 1.0, alert=_thresholds.explained_variance_alert),
}
"""Ranges that are usual while a policy learns; toward the end of a run a policy changes less."""

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
UPDATE = {
    f"train/{name}": name
    for name in (
        "approx_kl",
        "clip_fraction",
        "explained_variance",
        "entropy_loss",
        "policy_gradient_loss",
        "value_loss",
        "loss",
        "grad_norm",
        "std",
        "learning_rate",
        "skipped_steps",
    )
}
"""What is shown of an update, in this order."""

PHASES: tuple[str, ...] = ("collect", "update", "evaluate", "other")
"""Parts of an iteration's time."""

OURS = (
    *("rollout/", "train/", "time/", "eval/", "hardware/", "health/"),
    *("obs_", "reward_norm/", "popart/", "advantage/", "value/", "returns/"),
)
"""How names begin that are not the user's own: they have a place above, or are details for loggers."""

MAX_USER_METRICS = 30
MAX_FINDINGS = 3

WIDE = 76
"""Columns, borders included, from which numbers stand in two."""
VALUE, MARK, GAP = 9, 3, 2
"""Columns of a value, of its mark, and between two sections."""


@dataclass(frozen=True)
class Frame:
    """What one picture of a run shows."""

    name: str
    status: str
    env_steps: int
    total_steps: int
    iteration: int
    elapsed: float
    """Since this fit began (seconds)."""
    remaining: float | None = None
    """Seconds; None at the end, and before there is something to tell it from."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each part of an iteration took in all, since the burn-in."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest values, by canonical name."""
    hardware: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[Mapping[str, Any]] | None = None
    """What was found to be wrong; None where nobody looks."""


class Row(NamedTuple):
    """One number of a picture."""

    label: str
    value: str
    style: str = ""
    mark: str = ""
    note: str = ""


def rows(metrics: Mapping[str, float], labels: Mapping[str, str]) -> list[Row]:
    """Those of the metrics that have a label, judged where it is known what is healthy."""
    found = []
    for name, label in labels.items():
        if name in metrics:
            value, healthy = metrics[name], HEALTHY.get(name)
            if not math.isfinite(value):
                style, mark = "bold red", "!"
            else:
                style, mark = ("", "") if healthy is None else healthy.judge(value)
            found.append(Row(label, number(value), style, mark, str(healthy or "")))
    return found


def user_rows(metrics: Mapping[str, float]) -> list[Row]:
    """The user's own metrics, by name."""
    own = sorted(name for name in metrics if not name.startswith(OURS) and name != "step")
    return [Row(name, number(metrics[name])) for name in own]


def phase_rows(phases: Mapping[str, float]) -> list[Row]:
    """Shares of the time."""
    total = sum(phases.values())
    shares = {name: seconds / total for name, seconds in phases.items()} if total else {}
    return [Row(name, f"{100 * share:.0f} %", note="▇" * round(10 * share)) for name, share in shares.items()]


def facts(frame: Frame) -> list[str]:
    """Where the run is, in words."""
    told = [
        frame.status,
        f"{frame.env_steps:,} of {frame.total_steps:,} steps",
        f"iteration {frame.iteration:,}",
    ]
    if "time/fps" in frame.metrics:
        told.append(f"{frame.metrics['time/fps']:,.0f} steps/s")
    told.append(f"{_clock(frame.elapsed)} elapsed")
    if frame.remaining is not None:
        told.append(f"{_clock(frame.remaining)} left")
    return told


def hardware_facts(hardware: Mapping[str, float]) -> list[str]:
    """Use of the machine, in words."""
    texts = {
        "hardware/cpu_percent": "CPU {:.0f} %",
        "hardware/ram_percent": "RAM {:.0f} %",
        "hardware/process_ram_mb": "process {:,.0f} MB",
        "hardware/gpu_percent": "GPU {:.0f} %",
        "hardware/gpu_memory_mb": "VRAM {:,.0f} MB",
    }
    return [text.format(hardware[name]) for name, text in texts.items() if name in hardware]


def draw(frame: Frame, width: int) -> RenderableType:
    """The picture of a frame, at most ``width`` columns wide; the last lines are those that matter least.

    Args:
        frame: what to show.
        width: columns of the terminal.
    """
    inner = width - 4
    share = min(1.0, frame.env_steps / frame.total_steps)
    filled = int(share * (inner - 6))
    lines = [
        Text.assemble(("█" * filled, "green"), ("░" * (inner - 6 - filled), "dim"), f" {math.floor(100 * share):>3} %"),
        *_packed(facts(frame), inner),
    ]
    episodes, update, phases = rows(frame.metrics, EPISODES), rows(frame.metrics, UPDATE), phase_rows(frame.phases)
    own = user_rows(frame.metrics)
    shown, more = own[:MAX_USER_METRICS], len(own) - MAX_USER_METRICS
    if width >= WIDE:
        lines += _health(frame.findings)
        right = inner // 2 + 4  # what an update tells needs more room
        left = inner - right - GAP
        half = math.ceil(len(shown) / 2)
        lines += _side_by_side(
            _section("Episodes", episodes, left) + _section("Time", phases, left),
            _section("Update", update, right, "healthy"),
            left,
        )
        left = (inner - GAP) // 2
        right = inner - left - GAP
        lines += _side_by_side(_section("Metrics", shown[:half], left), _section("", shown[half:], right), left)
    else:
        lines += _packed([f"{row.label} {row.value}" for row in phases], inner)
        lines += _health(frame.findings)
        for title, body in {"Episodes": episodes, "Update": update, "Metrics": shown}.items():
            lines += _section(title, body, inner, "healthy")
    if more > 0:
        lines.append(Text(f"and {more} more", "dim"))
    machine = hardware_facts(frame.hardware)
    if machine:
        lines += [Text(), *_packed(machine, inner)]
    title = Text(f"PPO {frame.name}", "bold")
    title.truncate(inner - 2, overflow="ellipsis")  # else the panel grows with it
    return Panel(Text("\n").join(lines), title=title, title_align="left", width=width)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _packed(words: Iterable[str], width: int) -> Iterator[Text]:
    """Words with dots between them, on as many lines as they need; none is broken."""
    line = ""
    for word in words:
        longer = f"{line} · {word}" if line else word
        if line and cell_len(longer) > width:
            yield Text(line)
            longer = word
        line = longer
    yield Text(line)


def _health(findings: Sequence[Mapping[str, Any]] | None) -> Iterator[Text]:
    if findings is None:
        return
    alerts = [finding for finding in findings if finding["until_step"] is None]
    yield Text()
    if not alerts:
        yield Text("✔ health: no alert", "green")
    for finding in alerts[:MAX_FINDINGS]:
        told = f" since step {finding['since_step']:,}: {finding['advice']}"
        yield Text.assemble((f"! {finding['name']}", "bold red"), told)
    if len(alerts) > MAX_FINDINGS:
        yield Text(f"and {len(alerts) - MAX_FINDINGS} more", "bold red")


def _section(title: str, body: list[Row], width: int, noted: str = "") -> list[Text]:
    """An empty line, a title, and rows in ``width`` columns: label, value, mark, and notes where labels leave room."""
    if not body:
        return []
    note, label = max(len(row.note) for row in body), width - VALUE - MARK
    if note + 1 + max(cell_len(row.label) for row in body) > label:
        note = 0
    label -= note and note + 1
    head = f"{noted:>{note}}" if note else ""
    lines = [Text(), Text.assemble((f"{title:<{width - len(head)}}", "bold"), (head, "dim"))]
    for row in body:
        name = row.label if cell_len(row.label) <= label else f"{set_cell_size(row.label, label - 1)}…"
        value = f"{row.value:>{VALUE}}{row.mark:>{MARK}}"
        line = Text.assemble(set_cell_size(name, label), (value, row.style))
        if note:
            line.append(f" {row.note:>{note}}" if noted else f" {row.note:<{note}}", "dim")
        lines.append(line)
    return lines


def _side_by_side(left: list[Text], right: list[Text], width: int) -> Iterator[Text]:
    """Lines beside lines; those on the left take ``width`` columns."""
    for one, other in zip_longest(left, right, fillvalue=Text()):
        yield Text.assemble(one, " " * (width - one.cell_len + GAP), other)


class Picture:
    """The newest frame, drawn as wide as the terminal is by now."""

    def __init__(self) -> None:
        self.frame: Frame | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.frame is not None:
            yield draw(self.frame, options.max_width)


class Dashboard(StepProgressBar):
    """A dashboard in the place of the progress bar: progress, speed, returns, losses, health, hardware.

    It is redrawn between iterations, at most four times per second and for at most a hundredth of the time. What is
    printed meanwhile appears above it. Where no terminal can redraw (a file, a pipe, a notebook, ``TERM=dumb``), it is the
    plain bar.
    """

    INTERVAL_S = 0.25
    SHARE = 0.01
    """Of the time, that drawing may take."""

    def __init__(self) -> None:
        super().__init__()
        self._console: Console | None = None
        self._live: Live | None = None
        self._picture = Picture()
        self._hardware: Hardware | None = None
        self._diagnosis: Diagnoses | None = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._next_draw = 0.0

    @override
    def init_train_tqdm(self) -> Tqdm:
        return super().init_train_tqdm() if self._live is None else Tqdm(disable=True)

    @override
    def on_train_start(self, *args: Any) -> None:
        console = Console()
        self._console = console if self.is_enabled and _redraws(console) else None
        if self._console is not None:
            self._start(self._console)
        super().on_train_start(*args)
        if self._live is not None:
            self._show("training")

    def _start(self, console: Console) -> None:
        others = cast(Any, self.trainer).callbacks
        self._diagnosis = next((one for one in others if isinstance(one, Diagnoses)), None)
        # Two that measure would shorten each other's time.
        self._hardware = next((one.hardware for one in others if isinstance(one, HardwareMonitor)), None)
        if self._hardware is None and find_spec("psutil") is not None:
            self._hardware = Hardware(self.trainer.lightning_module.device)
        self._began = self._mark = time.perf_counter()
        self._origin: tuple[float, int] | None = None
        self._iterations = 0
        self._phases = dict.fromkeys(PHASES, 0.0)
        live = Live(self._picture, console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        out, err = sys.stdout, sys.stderr
        live.start()
        self._live = live
        # Handlers hold the streams that there were; what they print would be drawn over.
        self._streams = [(handler, handler.stream) for handler in _stream_handlers() if handler.stream in (out, err)]
        for handler, stream in self._streams:
            handler.setStream(sys.stdout if stream is out else sys.stderr)

    def _stop(self, status: str) -> None:
        """Leave the last picture where it is, and the terminal as it was."""
        live, self._live = self._live, None
        if live is None:
            return
        try:
            self._picture.frame = self._frame(status)
        finally:
            live.stop()
            for handler, stream in self._streams:
                handler.setStream(stream)
            self._streams = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self._lap("other")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lap("collect")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._live is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._lap("update")
        self._iterations += 1
        if self._iterations == BURN_IN:
            self._origin = self._mark, cast(Described, pl_module).num_env_steps
            self._phases = dict.fromkeys(PHASES, 0.0)
        self._show_if_due("training")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._lap("other")
        self._show_if_due("evaluating")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._lap("evaluate")
        self._show_if_due("training")

    @override
    def on_train_end(self, *args: Any) -> None:
        module = cast(Described, self.trainer.lightning_module)
        self._stop("finished" if module.num_env_steps >= module.total_steps else "stopped")
        super().on_train_end(*args)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop("stopped")

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the picture; without a bar, the inherited method would print nothing."""
        if self._console is None:
            super().print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    @override
    def _draw(self, pl_module: LightningModule) -> None:
        if self._live is None:
            super()._draw(pl_module)

    def _lap(self, phase: str) -> None:
        if self._live is not None:
            now = time.perf_counter()
            self._phases[phase] += now - self._mark
            self._mark = now

    def _show_if_due(self, status: str) -> None:
        if self._live is not None and time.perf_counter() >= self._next_draw:
            self._show(status)

    def _show(self, status: str) -> None:
        assert self._live is not None
        began = time.perf_counter()
        self._picture.frame = self._frame(status)
        self._live.refresh()
        ended = time.perf_counter()
        self._next_draw = ended + max(self.INTERVAL_S, (ended - began) / self.SHARE)

    def _frame(self, status: str) -> Frame:
        module, now = cast(Described, self.trainer.lightning_module), time.perf_counter()
        steps, remaining = module.num_env_steps, None
        if self._origin is not None and self._origin[1] < steps < module.total_steps:
            since, first = self._origin
            remaining = (module.total_steps - steps) * (now - since) / (steps - first)
        return Frame(
            name=module.env_maker.name,
            status=status,
            env_steps=steps,
            total_steps=module.total_steps,
            iteration=module.policy_version,
            elapsed=now - self._began,
            remaining=remaining,
            phases={} if self._origin is None else dict(self._phases),
            metrics={name: value.item() for name, value in self.trainer.callback_metrics.items()},
            hardware={} if self._hardware is None else self._hardware.read(),
            findings=None if self._diagnosis is None else self._diagnosis.findings,
        )

    @override
    def __getstate__(self) -> dict[str, Any]:
        mine = {"_console": None, "_live": None, "_hardware": None, "_streams": [], "_diagnosis": None}
        return {**super().__getstate__(), **mine}  # of this process


def _redraws(console: Console) -> bool:
    """Whether there is a terminal that moves its cursor and shows the characters of the picture."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and not console.is_jupyter
        and console.encoding.startswith("utf")
    )


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Every handler of Python's loggers that writes to a stream."""
    for logger in (logging.root, *logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler
