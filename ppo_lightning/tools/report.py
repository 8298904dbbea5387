"""``report.html``: a page about one run, drawn after training, and the command ``ppo-lightning report``."""

import base64
import re
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
from ppo_lightning.tools.page import cell, duration, link, number, render
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
        self._folder = None if not trainer.loggers or folder is None or "://" in folder else Path(folder)

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
        "curve, the interquartile mean over seeds with its 95 % interval.",
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
            "lightning_logs/cartpole-v1_s1_0"
        )
    return sorted(
        found, key=lambda folder: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", folder.name)]
    )


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
    summary, figures = run.summary, []
    for chart in CHARTS:
        curves, own = chart.curves(run), chart.with_thresholds(run)
        if curves:
            figures.append((chart.title, to_svg(draw(own, curves)), own.full_caption()))
    if summary["episode_lengths"]:
        figures.append(_draw_lengths(summary["episode_lengths"]))
    facts = {
        "status": summary["status"],
        "environment steps": f"{summary['global_step']:,}",
        "time": duration(summary["elapsed_time_sec"]),
        "steps per second": f"{summary['training_fps']:,.0f}",
        "return, training": number(summary["last_train_metrics"].get("rollout/ep_rew_mean")),
        "return, best evaluation": number(summary["best_eval_metrics"].get("eval/mean_reward")),
        "return, last evaluation": number(summary["last_eval_metrics"].get("eval/mean_reward")),
    }
    if "seed" in summary:
        facts["seed"] = str(summary["seed"])
    paths = {"newest": summary["latest_checkpoint_path"], "best": summary["best_checkpoint_path"], "folder": run.folder}
    columns = ("name", "since_step", "value", "healthy", "advice", "key")
    return render(
        "report.html",
        title=f"{run.environment} · {run.folder.name}",
        facts=facts,
        paths=paths,
        figures=figures,
        seconds=summary["time_split"],
        health=run.health,
        findings=[[cell(finding[name]) for name in columns] for finding in run.health.get("findings", ())],
        videos=[(path.name, link(path, place)) for path in run.videos],
        newest_video=_video_address(run.videos[-1], place) if run.videos else None,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


def _draw_lengths(lengths: list[int]) -> tuple[str, str, str]:
    """Title, SVG and caption of a histogram of episode lengths."""
    with new_axes((4.8, 2.6), "steps of an episode") as axes:
        width = (max(lengths) - min(lengths)) // 20 + 1  # whole steps
        edges = range(min(lengths), max(lengths) + width + 1, width)
        axes.hist(lengths, bins=[edge - 0.5 for edge in edges], color=COLORS[0])
        axes.set(ylabel="episodes", xlim=(edges[0] - 4 * width, edges[-1] + 3 * width))
        drawn: Any = axes.figure
    return "Episode lengths", to_svg(drawn), f"The last {len(lengths)} episodes of training."


def _video_address(video: Path, place: Path) -> str:
    """A video as a data URI if it is small enough, else its relative address."""
    if video.stat().st_size > EMBED_BYTES:
        return link(video, place)
    return "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
