"""``report.html``: a page about one run, drawn after training, and the command ``ppo-lightning report``."""

import base64
import html
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.parameters import checked
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.runs.history import SUMMARY
from ppo_lightning.tools.charts import CHARTS, COLORS, can_draw, draw, new_axes, to_svg
from ppo_lightning.tools.comparison import comparison, grouped
from ppo_lightning.tools.page import (
    colored,
    document,
    duration,
    figure,
    grid,
    image,
    link,
    number,
    section,
    table,
)
from ppo_lightning.tools.saved_runs import METRICS, REPORT, SavedRun, read_run

EMBED_BYTES = 8 << 20
"""Size up to which the page contains the newest video itself."""


class RunReport(Callback):
    """Draws ``report.html`` into the run's folder when training has ended, in about a second.

    The first process draws it, unless the run is forced to stop at once, has no logger and so no folder, or matplotlib is
    not installed.

    Args:
        enabled: draw the page. A run without this callback gets one, so this is how to leave out the page.
    """

    POSITION = 7.5
    """Among all callbacks: behind the one that writes ``summary.json``, before the one that unlocks the folder."""

    @checked("RunReport: {}")
    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._folder: Path | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # a broadcast, in which all ranks take part
        self._folder = Path(folder) if trainer.loggers and folder is not None else None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._draw(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):
            self._draw(trainer)
        self._folder = None

    def _draw(self, trainer: Trainer) -> None:
        folder, self._folder = self._folder, None
        if not self.enabled or folder is None or not trainer.is_global_zero:
            return
        try:
            draw_report(folder)
        except Exception as error:  # of matplotlib, or of files that another program wrote: no reason to fail the run
            rank_zero_warn(f"no report was drawn of {folder} ({type(error).__name__}: {error})")


def main(words: list[str]) -> None:
    """Run ``ppo-lightning report``: read runs, write a page, print its path."""
    parser = PlainParser(
        prog="ppo-lightning report",
        description="Draw a page about one run, or about several side by side. Runs that differ only in their seed share one "
        "curve, the mean over seeds with its 95 % interval.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of several runs (lightning_logs)")
    add("--out", type=Path, help=f"page to write (default: {REPORT}, in the folder of a single run, else in this one)")
    add(
        "--group",
        nargs="+",
        metavar="KEY",
        help="settings that distinguish groups, such as clip_range or model.env (default: all); 'run' makes each run a group",
    )
    with exit_on_user_error():
        given = parser.parse_args(words)
        if not can_draw():
            raise InputError('a report is drawn by matplotlib: pip install "ppo-lightning[plot]"')
        folders = [folder for place in given.runs for folder in run_folders(place)]
        runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]  # each once
        alone = len(runs) == 1
        page = given.out or (runs[0].folder / REPORT if alone else Path(REPORT))
        text = run_page(runs[0], page.parent) if alone else comparison(grouped(runs, given.group), page.parent)
        try:
            write_atomically(page, text.encode())
        except OSError as error:
            raise InputError(f"{page} cannot be written ({error}): give another file with --out") from error
        print(f"report of {len(runs)} run{'s' * (not alone)}  {page}")


def run_folders(place: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs in it, in their order.

    Raises:
        InputError: there is none.
    """
    if _is_run(place):
        return [place]
    found = [folder for folder in place.iterdir() if _is_run(folder)] if place.is_dir() else []
    if not found:
        raise InputError(
            f"{place} is not the folder of a run, and contains none: give one with {SUMMARY} or {METRICS}, such as "
            "lightning_logs/version_0"
        )
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))  # version_2 before version_10


def _is_run(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() or (folder / METRICS).is_file()


def draw_report(folder: Path) -> Path | None:
    """Write ``report.html`` into a run's folder.

    Returns:
        Its path; None without matplotlib.

    Raises:
        InputError: the folder is not a run's.
    """
    if not can_draw():
        return None
    page = folder / REPORT
    write_atomically(page, run_page(read_run(folder), page.parent).encode())
    return page


def run_page(run: SavedRun, place: Path) -> str:
    """A page about one run.

    Args:
        run: the run.
        place: folder of the page, to which its links are relative.
    """
    figures = []
    for chart in CHARTS:
        curves = chart.curves(run)
        if curves:
            watched = chart.with_thresholds(run)
            figures.append(
                figure(chart.title, image(to_svg(draw(watched, curves)), chart.title), watched.full_caption())
            )
    if run.summary["episode_lengths"]:
        figures.append(_lengths(run.summary["episode_lengths"]))
    sections = [_facts(run), grid([*figures, _time_split(run.summary["time_split"])])]
    sections.append(section("Health", _health(run)))
    if run.videos:
        sections.append(section("Video", _videos(run.videos, place)))
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        sections.append(f"<details><summary>Config</summary><pre>{html.escape(text)}</pre></details>")
    return document(f"{run.environment} · {run.folder.name}", sections)


def _facts(run: SavedRun) -> str:
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
    wide = ' class="wide"'  # such as an error message
    tiles = "".join(
        f"<div{wide * (len(value) > 20)}><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()
    )
    paths = {"newest": summary["latest_checkpoint_path"], "best": summary["best_checkpoint_path"], "folder": run.folder}
    lines = "".join(f"<li>{name} <code>{html.escape(str(path))}</code></li>" for name, path in paths.items() if path)
    return f'<dl class="facts">{tiles}</dl><ul class="paths">{lines}</ul>'


def _time_split(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    shares = {name: 100 * part / total for name, part in seconds.items()}
    bar = "".join(f'<i class="c{i}" style="width:{share:.2f}%"></i>' for i, share in enumerate(shares.values()))
    keys = "".join(
        colored("li", index, f"{name} {share:.0f} % ({duration(seconds[name])})")
        for index, (name, share) in enumerate(shares.items())
    )
    caption = "Wall-clock time of rollouts, updates, evaluations, and the rest (logs, checkpoints, callbacks)."
    return figure("Time", f'<div class="bar">{bar}</div><ul>{keys}</ul>', caption)


def _lengths(lengths: list[int]) -> str:
    with new_axes((4.8, 2.6), "steps of an episode") as axes:
        width = (max(lengths) - min(lengths)) // 20 + 1  # whole steps
        edges = range(min(lengths), max(lengths) + width + 1, width)
        axes.hist(lengths, bins=[edge - 0.5 for edge in edges], color=COLORS[0])
        axes.set(ylabel="episodes", xlim=(edges[0] - 4 * width, edges[-1] + 3 * width))
        drawn: Any = axes.figure
    title = "Episode lengths"
    return figure(title, image(to_svg(drawn), title), f"The last {len(lengths)} episodes of training.")


def _health(run: SavedRun) -> str:
    """The findings of HealthMonitor, and its interventions."""
    if not run.health:
        return "<p>There is no <code>health.json</code>.</p>"
    findings, acts = run.health["findings"], run.health["acts"]
    if not findings:
        return "<p>No findings.</p>"
    names = ("name", "since_step", "value", "healthy", "advice", "key")
    rows = [[_cell(finding[name]) for name in names] for finding in findings]
    done = "".join(f"<li>{_cell(act)}</li>" for act in acts)
    header = ("finding", "since step", "value", "healthy", "advice", "config key")
    return table(header, rows) + (f"<h3>Interventions</h3><ul>{done}</ul>" if done else "")


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items())
    return html.escape(str(value))


def _videos(videos: list[Path], place: Path) -> str:
    """The newest video, within the page if it is small enough, and links to all."""
    newest = videos[-1]
    if newest.stat().st_size <= EMBED_BYTES:
        source = "data:video/mp4;base64," + base64.b64encode(newest.read_bytes()).decode()
    else:
        source = html.escape(link(newest, place))
    links = "".join(
        f'<li><a href="{html.escape(link(path, place))}">{html.escape(path.name)}</a></li>' for path in videos
    )
    return f'<video controls muted playsinline src="{source}"></video><ul class="paths">{links}</ul>'
