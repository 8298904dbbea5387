"""Charts of runs over environment steps, drawn by matplotlib (the ``plot`` extra)."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.tools.diagnosis import HealthyRange, Thresholds, healthy_ranges
from ppo_lightning.tools.saved_runs import SavedRun, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD = "#2da44e", "#cf222e"
COLORS = ("#0969da", "#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#9a6700", "#57606a", "#0a7ea4")
"""Of curves, in their order."""


@dataclass(frozen=True)
class Curve:
    """A line over environment steps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    """Lower end of a band; empty draws none."""
    high: Sequence[float] = ()
    color: int = 0
    """Index in :data:`COLORS`, modulo their number."""
    faint: bool = False
    """A background line, without a place in the legend."""


@dataclass(frozen=True)
class Chart:
    """A plot of one or several metrics, with the range of healthy values."""

    title: str
    metrics: Mapping[str, str]
    """Names of metrics, with their labels in the legend."""
    caption: str
    healthy: HealthyRange | None = None
    limits: tuple[float | None, float | None] = (None, None)
    """Ends of the y-axis; None follows the values."""

    def with_thresholds(self, run: SavedRun) -> "Chart":
        """The chart with the thresholds of the run's own HealthMonitor, if it had one."""
        given = run.health.get("thresholds", {})
        own = Thresholds(**{item.name: given[item.name] for item in fields(Thresholds) if item.name in given})
        return replace(self, healthy=healthy_ranges(own).get(next(iter(self.metrics))))

    def full_caption(self) -> str:
        """The caption, with the meaning of the green range and the dashed line."""
        if self.healthy is None:
            return self.caption
        low, high, alert = self.healthy
        side = "above" if alert > high else "below"
        return f"{self.caption} Green: healthy, {low:g} to {high:g}. Dashed: alert {side} {alert:g}."

    def curves(self, run: SavedRun) -> list[Curve]:
        """The curves of a run's metrics, without those that it did not log."""
        curves = []
        for index, (metric, label) in enumerate(self.metrics.items()):
            columns = run.evaluations() if metric == "eval/mean_reward" else run.column(metric)
            if columns[0]:
                curves.append(Curve(label, *columns, color=index))
        return curves


HEALTHY = healthy_ranges(Thresholds())
RETURN = Chart(
    "Return",
    {"rollout/ep_rew_mean": "training, mean of 100 episodes", "eval/mean_reward": "evaluation, ± standard deviation"},
    "Sum of rewards per episode.",
)
CHARTS = (
    RETURN,
    Chart(
        "KL divergence",
        {"train/approx_kl": "approx_kl"},
        "Change of the policy per update (nats). If too large: lower the learning rate or clip_range.",
        healthy=HEALTHY["train/approx_kl"],
        limits=(0.0, None),
    ),
    Chart(
        "Clip fraction",
        {"train/clip_fraction": "clip_fraction"},
        "Share of samples beyond clip_range. If too large: lower the learning rate.",
        healthy=HEALTHY["train/clip_fraction"],
        limits=(0.0, None),
    ),
    Chart(
        "Explained variance",
        {"train/explained_variance": "explained_variance"},
        "Share of the returns' variance that the critic predicts, cut off at -1. If too small: a larger critic.",
        healthy=HEALTHY["train/explained_variance"],
        limits=(-1.0, 1.05),
    ),
    Chart("Value loss", {"train/value_loss": "value_loss"}, "Mean squared error of the critic.", limits=(0.0, None)),
    Chart("Policy loss", {"train/policy_gradient_loss": "policy_gradient_loss"}, "The clipped objective, negated."),
    Chart(
        "Entropy loss", {"train/entropy_loss": "entropy_loss"}, "Minus the policy's entropy (nats); 0: deterministic."
    ),
    Chart("Speed", {"time/fps": "fps"}, "Environment steps per second, without evaluations.", limits=(0.0, None)),
)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def new_axes(size: tuple[float, float], xlabel: str = "environment steps") -> Iterator["Axes"]:
    """Axes of a new figure, in the style of all charts.

    Args:
        size: width and height (inches).
        xlabel: of the axis.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context({**style, "axes.axisbelow": True, "grid.linewidth": 0.6, "grid.alpha": 0.5}):
        axes = Figure(figsize=size, layout="constrained").add_subplot()
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        yield axes


def draw(
    chart: Chart, curves: Sequence[Curve], size: tuple[float, float] = (4.8, 2.6), legend: bool = True
) -> "Figure":
    """Draw curves over environment steps: every learning curve of the package.

    Args:
        chart: its range and limits.
        curves: in the order of the legend.
        size: of the figure (inches).
        legend: draw a legend if several curves are not faint.
    """
    with new_axes(size) as axes:
        for curve in curves:
            width, alpha = (0.7, 0.35) if curve.faint else (1.6, 1.0)
            marker, color = "o" if len(curve.steps) == 1 else "", COLORS[curve.color % len(COLORS)]
            style = {"color": color, "linewidth": width, "alpha": alpha, "marker": marker, "markersize": 4}
            axes.plot(curve.steps, curve.values, label=None if curve.faint else curve.label, **style)
        low, high = axes.get_ylim()
        for curve in curves:
            if len(curve.low):
                width, color = 3 * (len(curve.steps) == 1), COLORS[curve.color % len(COLORS)]  # one point: a line
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.18, linewidth=width)
        if not any(curve.faint for curve in curves):  # else the runs set the axis: intervals of few runs are wide
            low, high = axes.get_ylim()
        if chart.healthy is not None:
            low, high = min(low, chart.healthy.low), max(high, chart.healthy.high * 1.1)
            axes.axhspan(chart.healthy.low, chart.healthy.high, color=GOOD, alpha=0.15, linewidth=0)
        bottom, top = chart.limits
        low, high = low if bottom is None else bottom, high if top is None else top
        if chart.healthy is not None and low < chart.healthy.alert < high:
            axes.axhline(chart.healthy.alert, color=BAD, linewidth=1, linestyle="--")
        axes.set_ylim(low, high)
        if legend and sum(not curve.faint for curve in curves) > 1:
            axes.legend(fontsize="small")
        figure: Any = axes.figure
        return figure


def to_svg(figure: "Figure") -> str:
    """A figure as SVG with a transparent background; the same figure is the same text."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ppo_lightning"}):  # text stays text
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def to_png(figure: "Figure", dpi: int) -> bytes:
    """A figure as PNG, with so many dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def draw_learning_curve(run: Path | str) -> Path | None:
    """Draw training and evaluation return over environment steps into a run's folder.

    Args:
        run: folder of the run.

    Returns:
        ``learning_curve.png`` in that folder; None where none was drawn: matplotlib is not installed, or there are no logs.
    """
    file = Path(run) / "learning_curve.png"
    if not can_draw():
        return None
    try:
        found = read_run(Path(run))
        figure = draw(RETURN, RETURN.curves(found), (7, 4))
        figure.axes[0].set(ylabel="return", title=f"{found.environment} · {Path(run).resolve().name}")
        write_atomically(file, to_png(figure, 150))
    except InputError:
        return None
    # A matplotlib that does not fit NumPy, or a full disk, is no reason to fail the run.
    except (ImportError, AttributeError, RuntimeError, ValueError, OSError) as error:
        rank_zero_warn(f"{file} was not drawn ({type(error).__name__}: {error})")
        return None
    return file
