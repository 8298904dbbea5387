"""Pictures of runs: charts as SVG, and pages of HTML that need nothing beside themselves."""

import base64
import html
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.tools.diagnosis import Thresholds
from ppo_lightning.tools.saved_runs import REPORT, Run, read_run

INK, GRID, GOOD, BAD = "#1f2328", "#d8dee4", "#2da44e", "#cf222e"
SERIES = ("#0969da", "#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#9a6700", "#57606a", "#0a7ea4")
"""Colours of curves on white paper; a page has others in the dark (:data:`STYLE`)."""

VARIABLES = {INK: "ink", GRID: "grid", GOOD: "good", BAD: "bad", **{color: f"c{i}" for i, color in enumerate(SERIES)}}

EMBED_BYTES = 8 << 20
"""Size up to which a video is put into the page itself."""


@dataclass(frozen=True)
class Curve:
    """A line over environment steps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    """Of a band around it; none where empty."""
    high: Sequence[float] = ()
    color: int = 0
    """Index in :data:`SERIES`."""
    faint: bool = False
    """One of many, behind the others: it has no place in the legend."""


@dataclass(frozen=True)
class Chart:
    """What is drawn of a metric, and what is healthy."""

    title: str
    metrics: dict[str, str]
    """Names of metrics, with what they are called in the legend."""
    says: str
    healthy: tuple[float, float] | None = None
    """Range of values that an update in order has."""
    alert: float | None = None
    """Beyond this something is wrong."""
    limits: tuple[float | None, float | None] = (None, None)
    """Ends of the axis; None where the values say."""

    def as_watched(self, run: Run) -> "Chart":
        """With the thresholds by which the run was watched, where it was."""
        thresholds = run.health.get("thresholds", {})
        name = next(iter(self.metrics)).partition("/")[2]
        if self.healthy is None or name not in thresholds:
            return self
        given = thresholds[name]
        healthy = tuple(given) if isinstance(given, list) else (given, self.healthy[1])
        return replace(self, healthy=healthy, alert=thresholds[f"{name}_alert"])


USUAL = Thresholds()

CHARTS = (
    Chart(
        "Return",
        {
            "rollout/ep_rew_mean": "training, mean of 100 episodes",
            "eval/mean_reward": "evaluation, ± standard deviation",
        },
        "Sum of rewards per episode.",
    ),
    Chart(
        "KL divergence",
        {"train/approx_kl": "approx_kl"},
        "How far an update moved the policy (nats). Too far: lower the learning rate or clip_range.",
        healthy=USUAL.approx_kl,
        alert=USUAL.approx_kl_alert,
        limits=(0.0, None),
    ),
    Chart(
        "Clip fraction",
        {"train/clip_fraction": "clip_fraction"},
        "Share of samples beyond clip_range. Too many: lower the learning rate.",
        healthy=USUAL.clip_fraction,
        alert=USUAL.clip_fraction_alert,
        limits=(0.0, None),
    ),
    Chart(
        "Explained variance",
        {"train/explained_variance": "explained_variance"},
        "How much of the returns the critic foresees: 1 is all. Too little: a larger critic. What is below -1 is cut off.",
        healthy=(USUAL.explained_variance, 1.0),
        alert=USUAL.explained_variance_alert,
        limits=(-1.0, 1.05),
    ),
    Chart("Value loss", {"train/value_loss": "value_loss"}, "Mean squared error of the critic.", limits=(0.0, None)),
    Chart("Policy loss", {"train/policy_gradient_loss": "policy_gradient_loss"}, "The clipped objective, negated."),
    Chart(
        "Entropy loss", {"train/entropy_loss": "entropy_loss"}, "Minus the policy's entropy (nats): 0 draws nothing."
    ),
    Chart("Speed", {"time/fps": "fps"}, "Environment steps per second, evaluations left out.", limits=(0.0, None)),
)


def can_draw() -> bool:
    """Whether matplotlib is installed, which the plot extra brings."""
    return find_spec("matplotlib") is not None


def draw_report(folder: Path) -> Path | None:
    """Draw ``report.html`` into a run's folder.

    Returns:
        its path; None without matplotlib.

    Raises:
        InputError: the folder is not of a run.
    """
    if not can_draw():
        return None
    page = folder / REPORT
    write_atomically(page, run_page(read_run(folder), page.parent).encode())
    return page


def run_page(run: Run, place: Path) -> str:
    """A page about one run.

    Args:
        run: what it has left.
        place: folder in which the page will lie, that its links start from.
    """
    sections = [_facts(run)]
    figures = [chart_figure(chart.as_watched(run), _curves(run, chart)) for chart in CHARTS if has(run, chart)]
    if run.summary["episode_lengths"]:
        figures.append(_lengths(run.summary["episode_lengths"]))
    sections.append(grid([*figures, _time_split(run.summary["time_split"])]))
    sections.append(section("Health", health_log(run)))
    if run.videos:
        sections.append(section("Video", _videos(run.videos, place)))
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        sections.append(f"<details><summary>Config</summary><pre>{html.escape(text)}</pre></details>")
    return document(f"{environment(run)} · {run.folder.name}", sections)


def environment(run: Run) -> str:
    """Name of what a run was trained on."""
    env = run.config.get("model", {}).get("env", "run")
    return str(env.get("class_path", env) if isinstance(env, dict) else env)


def has(run: Run, chart: Chart) -> bool:
    """Whether a run has anything of a chart."""
    return any(run.column(metric)[0] for metric in chart.metrics)


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page, legible in narrow windows, in the light and in the dark."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of a page under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, as many as there is room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def figure(title: str, body: str, says: str) -> str:
    """A picture with its title and what it says."""
    return f"<figure><h3>{html.escape(title)}</h3>{body}<figcaption>{html.escape(says)}</figcaption></figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML; in a narrow window each row stands as a list."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{html.escape(name)}">{cell}</td>' for name, cell in zip(header, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def chart_figure(chart: Chart, curves: Sequence[Curve]) -> str:
    """A chart with its legend."""
    shown = [curve for curve in curves if not curve.faint]
    keys = "".join(f'<li class="c{curve.color % len(SERIES)}">{html.escape(curve.label)}</li>' for curve in shown)
    legend = f"<ul>{keys}</ul>" if len(shown) > 1 else ""
    says = chart.says
    if chart.healthy is not None:
        low, high = chart.healthy
        says += f" Green: healthy, {low:g} to {high:g}."
        if chart.alert is not None:
            says += f" Dashed: alert {'above' if chart.alert > high else 'below'} {chart.alert:g}."
    return figure(chart.title, draw_curves(chart, curves) + legend, says)


def draw_curves(chart: Chart, curves: Sequence[Curve]) -> str:
    """The SVG of a chart."""
    with _Sheet(chart.title) as sheet:
        axes = sheet.axes
        for curve in curves:
            width, alpha = (0.7, 0.35) if curve.faint else (1.6, 1.0)
            marker = "o" if len(curve.steps) == 1 else ""
            color = SERIES[curve.color % len(SERIES)]
            axes.plot(curve.steps, curve.values, color=color, linewidth=width, alpha=alpha, marker=marker, markersize=4)
        low, high = axes.get_ylim()
        for curve in curves:
            if len(curve.low):
                color = SERIES[curve.color % len(SERIES)]
                width = 3 if len(curve.steps) == 1 else 0  # of a lone point the band is a line
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.18, linewidth=width)
        if not any(curve.faint for curve in curves):  # else the runs themselves say how far the axis goes
            axes.autoscale_view()
            low, high = axes.get_ylim()
        if chart.healthy is not None:
            low, high = min(low, chart.healthy[0]), max(high, chart.healthy[1] * 1.1)
            axes.axhspan(*chart.healthy, color=GOOD, alpha=0.15, linewidth=0)
        bottom, top = chart.limits
        low, high = low if bottom is None else bottom, high if top is None else top
        if chart.alert is not None and low < chart.alert < high:
            axes.axhline(chart.alert, color=BAD, linewidth=1, linestyle="--")
        axes.set_ylim(low, high)
    return sheet.svg


@dataclass
class _Sheet:
    """A drawing of one pair of axes over environment steps, in colours that the page decides."""

    name: str
    xlabel: str = "environment steps"
    svg: str = field(default="", init=False)

    def __enter__(self) -> "_Sheet":
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator

        self._context = matplotlib.rc_context(
            {
                "svg.fonttype": "none",  # text stays text: small, and in the page's font
                "svg.hashsalt": self.name,  # the same picture is the same file
                "font.size": 11,  # legible where a chart is 300 pixels wide
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": INK,
                "xtick.color": INK,
                "ytick.color": INK,
                "grid.color": GRID,
                "axes.spines.top": False,
                "axes.spines.right": False,
            }
        )
        self._context.__enter__()
        self._figure = Figure(figsize=(4.8, 2.6), layout="constrained")
        self.axes = self._figure.add_subplot()
        self.axes.set_xlabel(self.xlabel)
        self.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        self.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        self.axes.set_axisbelow(True)
        self.axes.grid(visible=True, linewidth=0.6)
        return self

    def __exit__(self, *_: Any) -> None:
        file = io.StringIO()
        try:
            self._figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            self._context.__exit__(None, None, None)
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # the same in each picture, and nobody asks for them
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{html.escape(self.name)}"', text)
        self.svg = re.sub("#[0-9a-f]{6}", lambda color: _variable(color[0]), text)


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color


def _curves(run: Run, chart: Chart) -> list[Curve]:
    curves = []
    for index, (metric, label) in enumerate(chart.metrics.items()):
        lines = run.evaluations() if metric == "eval/mean_reward" else run.column(metric)
        if lines[0]:
            curves.append(Curve(label, *lines, color=index))
    return curves


def _facts(run: Run) -> str:
    summary = run.summary
    facts = {
        "status": html.escape(summary["status"]),
        "environment steps": f"{summary['global_step']:,}",
        "time": duration(summary["elapsed_time_sec"]),
        "steps per second": f"{summary['training_fps']:,.0f}",
        "return, training": number(summary["last_train_metrics"].get("rollout/ep_rew_mean")),
        "return, best evaluation": number(summary["best_eval_metrics"].get("eval/mean_reward")),
        "return, last evaluation": number(summary["last_eval_metrics"].get("eval/mean_reward")),
    }
    if "seed" in summary:
        facts["seed"] = str(summary["seed"])
    wide = ' class="wide"'  # such as the message of an error
    tiles = "".join(
        f"<div{wide * (len(value) > 20)}><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()
    )
    paths = {"newest": summary["latest_checkpoint_path"], "best": summary["best_checkpoint_path"], "folder": run.folder}
    lines = "".join(f"<li>{name} <code>{html.escape(str(path))}</code></li>" for name, path in paths.items() if path)
    return f'<dl class="facts">{tiles}</dl><ul class="paths">{lines}</ul>'


def number(value: float | None) -> str:
    """A value in at most nine characters, as many digits as tell it from its like; a dash where there is none."""
    if value is None:
        return "–"
    size = abs(value)
    if size < 0.1 or size >= 1e6:
        return f"{value:.2g}" if size < 1e-3 else f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _time_split(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    shares = {name: 100 * part / total for name, part in seconds.items()}
    bar = "".join(f'<i class="c{i}" style="width:{share:.2f}%"></i>' for i, share in enumerate(shares.values()))
    keys = "".join(
        f'<li class="c{i}">{name} {share:.0f} % ({duration(seconds[name])})</li>'
        for i, (name, share) in enumerate(shares.items())
    )
    says = "What the wall-clock time went into: rollouts, updates, evaluations, and the rest (logs, checkpoints, callbacks)."
    return figure("Time", f'<div class="bar">{bar}</div><ul>{keys}</ul>', says)


def _lengths(lengths: list[int]) -> str:
    with _Sheet("Episode lengths", "steps of an episode") as sheet:
        width = (max(lengths) - min(lengths)) // 20 + 1  # whole steps
        edges = range(min(lengths), max(lengths) + width + 1, width)
        sheet.axes.hist(lengths, bins=[edge - 0.5 for edge in edges], color=SERIES[0])
        sheet.axes.set(ylabel="episodes", xlim=(edges[0] - 4 * width, edges[-1] + 3 * width))
    return figure("Episode lengths", sheet.svg, f"The last {len(lengths)} episodes of training.")


def health_log(run: Run) -> str:
    """What was found to be wrong with a run, and what was done about it."""
    if not run.health:
        return "<p>There is no <code>health.json</code>.</p>"
    findings, acts = run.health["findings"], run.health["acts"]
    if not findings:
        return "<p>Nothing was found.</p>"
    names = ("name", "since_step", "value", "healthy", "advice", "key")
    rows = [[_cell(finding[name]) for name in names] for finding in findings]
    done = "".join(f"<li>{_cell(act)}</li>" for act in acts)
    header = ("finding", "since step", "value", "healthy", "advice", "config key")
    return table(header, rows) + (f"<h3>Done about it</h3><ul>{done}</ul>" if done else "")


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = " to ".join(map(str, value))
        return html.escape(str(value))
    return f"{value:,}" if isinstance(value, int) else number(value)


def _videos(videos: list[Path], place: Path) -> str:
    """The newest within the page, where it is small enough; links to the others."""
    newest = videos[-1]
    if newest.stat().st_size <= EMBED_BYTES:
        source = "data:video/mp4;base64," + base64.b64encode(newest.read_bytes()).decode()
    else:
        source = html.escape(link(newest, place))
    links = "".join(
        f'<li><a href="{html.escape(link(path, place))}">{html.escape(path.name)}</a></li>' for path in videos
    )
    return f'<video controls muted playsinline src="{source}"></video><ul class="paths">{links}</ul>'


def link(path: Path, place: Path) -> str:
    """A path as the address by which a page in the folder ``place`` reaches it."""
    return quote(Path(os.path.relpath(path, place)).as_posix())


_DARK = (
    "--paper:#0d1117;--card:#161b22;--ink:#e6edf3;--soft:#9198a1;--grid:#30363d;--good:#3fb950;--bad:#f85149;"
    "--c0:#58a6ff;--c1:#f0883e;--c2:#bc8cff;--c3:#3fb950;--c4:#f778ba;--c5:#d29922;--c6:#8b949e;--c7:#39c5cf;"
)
STYLE = (
    ":root{color-scheme:light dark;--paper:#fff;--card:#f6f8fa;--soft:#59636e;"
    + "".join(f"--{name}:{color};" for color, name in VARIABLES.items())
    + "}@media(prefers-color-scheme:dark){:root{"
    + _DARK
    + """}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:16px}
h1{font-size:1.4rem;overflow-wrap:anywhere;margin:.2em 0 .6em}h2{font-size:1.1rem}h3{font-size:1rem;margin:0 0 .3em}
section>h3{margin-top:1em}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:12px;margin:12px 0}
figure{margin:0;padding:12px;background:var(--card);border-radius:8px;min-width:0}
figcaption{color:var(--soft);font-size:.85rem}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,sans-serif!important}
ul{list-style:none;padding:0;margin:.4em 0;font-size:.85rem}
figure li{display:inline-block;margin-right:1em}
figure li::before{content:"";display:inline-block;width:.8em;height:.8em;border-radius:2px;
margin-right:.4em;background:currentColor}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:8px;margin:0}
.facts div{background:var(--card);border-radius:8px;padding:8px 12px}
.facts .wide{grid-column:1/-1}.wide dd{font-size:1rem;font-weight:400;white-space:pre-line}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.15rem;font-weight:600;overflow-wrap:anywhere}
.paths li{margin:.2em 0;overflow-wrap:anywhere}
.bar{display:flex;height:28px;border-radius:6px;overflow:hidden;margin:.4em 0}.bar i{background:currentColor}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{text-align:left;color:var(--soft);font-weight:500}
th,td{padding:6px 8px;border-bottom:1px solid var(--grid);vertical-align:top}td{overflow-wrap:anywhere;min-width:5em}
pre{background:var(--card);padding:12px;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}
summary{cursor:pointer;font-size:1.1rem;font-weight:600}
video{max-width:100%;border-radius:8px}
a{color:var(--c0)}
@media(max-width:800px){thead{display:none}tr{display:block;padding:8px 0;border-bottom:1px solid var(--grid)}
td{display:block;border:0;padding:2px 0}td::before{content:attr(data-name) ": ";color:var(--soft)}}
"""
    + "".join(f".c{i}{{color:var(--c{i})}}" for i in range(len(SERIES)))
)
