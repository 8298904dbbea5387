"""``ppo-lightning report``: one page about one run, or about several side by side."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, said_in_one_sentence
from ppo_lightning.parameters import checked
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.runs.history import SUMMARY
from ppo_lightning.tools.figures import (
    CHARTS,
    SERIES,
    Curve,
    can_draw,
    chart_figure,
    document,
    draw_report,
    duration,
    environment,
    grid,
    link,
    number,
    run_page,
    section,
    table,
)
from ppo_lightning.tools.saved_runs import REPORT, Run, read_run

PLACES = ("seed_everything", "ckpt_path", "trainer.default_root_dir", "trainer.logger", "trainer.enable_")
"""Beginnings of settings that make no other experiment."""

POINTS = 200
"""Of the common grid of environment steps."""

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantile of Student's t with 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Group:
    """Runs that are repetitions of one experiment."""

    label: str
    runs: list[Run]


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
    """Run the command: read runs, draw a page, say where it is."""
    parser = PlainParser(
        prog="ppo-lightning report",
        description="Draw a page about one run, or several side by side. Runs that differ in their seed alone are drawn as "
        "one curve, the mean over seeds with its 95 % interval.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a folder of such folders (lightning_logs)",
    )
    parser.add_argument(
        "--out", type=Path, help=f"page to write; default {REPORT} in the run's folder, of several runs in this one"
    )
    parser.add_argument(
        "--group",
        nargs="+",
        metavar="KEY",
        help="settings that tell groups apart, such as clip_range or model.env; default all of them; 'run' takes each run "
        "alone",
    )
    with said_in_one_sentence():
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
    """The folder itself if it is a run's, else those in it that are, in their order.

    Raises:
        InputError: there is none.
    """
    if _is_run(place):
        return [place]
    found = [folder for folder in place.iterdir() if _is_run(folder)] if place.is_dir() else []
    if not found:
        raise InputError(
            f"{place} is not the folder of a run, nor holds any: give one with {SUMMARY} or metrics.csv, such as "
            "lightning_logs/version_0"
        )
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))  # version_2 before version_10


def _is_run(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() or (folder / "metrics.csv").is_file()


def grouped(runs: Sequence[Run], keys: Sequence[str] | None = None) -> list[Group]:
    """Runs by experiment, in the order of their first runs, each named by what tells it from the others.

    Args:
        runs: in order.
        keys: settings that count, by any of their parts or in full (``clip_range`` has ``start`` and ``end``); None is
            all but the seed and places; ``run`` takes each run alone.

    Raises:
        InputError: no run has such a setting.
    """
    if keys == ["run"]:
        return [Group(str(run.folder), [run]) for run in runs]
    all_settings = [settings(run) for run in runs]
    if keys is not None:
        for key in keys:
            if not any(_is_named(name, key) for found in all_settings for name in found):
                raise InputError(f"--group {key}: no run has such a setting; its names are those of config.yaml")
        all_settings = [
            {name: value for name, value in found.items() if any(_is_named(name, key) for key in keys)}
            for found in all_settings
        ]
    groups: dict[str, list[int]] = {}
    for index, found in enumerate(all_settings):
        groups.setdefault(json.dumps(found, sort_keys=True), []).append(index)
    firsts = [all_settings[members[0]] for members in groups.values()]
    names = sorted({name: None for found in firsts for name in found}, key=lambda name: not name.startswith("model."))
    differing = [name for name in names if len({found.get(name) for found in firsts}) > 1]
    return [
        Group(_label(found, differing, runs[members[0]]), [runs[index] for index in members])
        for found, members in zip(firsts, groups.values(), strict=True)
    ]


def settings(run: Run) -> dict[str, str]:
    """What makes a run the experiment that it is, by full name, such as ``model.gamma``; of a run without any its folder."""
    flat = {name: value for name, value in _flat("", run.config) if not name.startswith(PLACES)}
    return flat or {"run": str(run.folder)}


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if not (isinstance(value, dict) and value):
        return [(name, json.dumps(value, sort_keys=True, default=str).strip('"'))]
    return [pair for key, child in value.items() for pair in _flat(f"{name}.{key}" if name else str(key), child)]


def _is_named(name: str, key: str) -> bool:
    return f".{key}." in f".{name}."


def _label(found: dict[str, str], differing: list[str], first: Run) -> str:
    """What tells a group from the others: three settings at most, and a folder where there are more."""
    if not differing:
        return environment(first)
    parts = [f"{name.removeprefix('model.').removesuffix('.class_path')}={found.get(name, '–')}" for name in differing]
    return ", ".join(parts[:3]) + (f", … ({first.folder})" if len(parts) > 3 else "")


def interval(values: Any) -> tuple[Any, Any, Any]:
    """Mean over runs and its 95 % interval by Student's t, of what is not NaN.

    Args:
        values: [runs, P].

    Returns:
        Three arrays [P]: mean, lower and upper end; NaN where there are no runs, the ends also where there is one.
    """
    there = ~np.isnan(values)
    count = there.sum(0)
    mean = np.where(count > 0, np.where(there, values, 0.0).sum(0) / count.clip(1), np.nan)
    squares = np.where(there, values - mean, 0.0) ** 2
    deviation = np.sqrt(squares.sum(0) / (count - 1).clip(1))
    known = np.array([np.nan, np.nan, *T_975])[count.clip(0, len(T_975) + 1)]
    quantile = np.where(count <= len(T_975) + 1, known, 1.96 + 2.372 / (count - 1).clip(1))  # its expansion in 1/n
    half = quantile * deviation / np.sqrt(count.clip(1))
    return mean, mean - half, mean + half


def curves_of(group: Group, metric: str, color: int) -> list[Curve]:
    """The mean over a group's runs of a metric with its interval, on a common grid, and the runs faintly behind it.

    Each grid point takes the runs that have got there; between two of its rows a run is a straight line.
    """
    columns = [run.column(metric) for run in group.runs]
    columns = [column for column in columns if column[0]]
    if not columns:
        return []
    if len(columns) == 1:
        return [Curve(group.label, *columns[0], color=color)]
    first, last = min(steps[0] for steps, _ in columns), max(steps[-1] for steps, _ in columns)
    common = np.linspace(first, last, POINTS if last > first else 1)
    values = [np.interp(common, steps, column, left=np.nan, right=np.nan) for steps, column in columns]
    mean, low, high = interval(np.stack(values))
    runs = [Curve(group.label, steps, column, color=color, faint=True) for steps, column in columns]
    return [*runs, Curve(group.label, common.tolist(), mean, low, high, color)]


def comparison(groups: Sequence[Group], place: Path) -> str:
    """A page about several runs.

    Args:
        groups: of them.
        place: folder in which the page will lie, that its links start from.
    """
    legend = "".join(
        f'<li class="c{index % len(SERIES)}">{html.escape(group.label)} ({_runs(group)})</li>'
        for index, group in enumerate(groups)
    )
    worlds: dict[str, list[tuple[int, Group]]] = {}
    for index, group in enumerate(groups):
        worlds.setdefault(", ".join(dict.fromkeys(map(environment, group.runs))), []).append((index, group))
    charts = {world: grid(_figures(members)) for world, members in worlds.items()}
    several = any(len(group.runs) > 1 for group in groups)
    says = (
        "Thick: the mean over the runs of a group that got so far, in its 95 % interval (Student's t); thin: each run."
        if several
        else "Each run alone."
    )
    count = sum(len(group.runs) for group in groups)
    return document(
        f"{', '.join(worlds)} · {count} runs",
        [
            f'<figure><ul class="groups">{legend}</ul><figcaption>{says}</figcaption></figure>',
            *(charts.values() if len(charts) == 1 else map(section, charts, charts.values())),
            section("Groups", _group_table(groups)),
            section("Runs", _run_table(groups, place)),
        ],
    )


def _figures(groups: Sequence[tuple[int, Group]]) -> list[str]:
    """Charts of groups, which come with their indices, and whose returns can be compared."""
    figures = []
    for chart in CHARTS:
        for metric, meaning in chart.metrics.items():
            curves = [curve for index, group in groups for curve in curves_of(group, metric, index)]
            if curves:
                title = chart.title if len(chart.metrics) == 1 else f"{chart.title}, {meaning.partition(',')[0]}"
                figures.append(chart_figure(replace(chart, title=title, metrics={metric: meaning}), curves))
    return figures


def _runs(group: Group) -> str:
    return f"{len(group.runs)} run{'s' * (len(group.runs) > 1)}"


def _group_table(groups: Sequence[Group]) -> str:
    header = ("group", "runs", "last evaluation", "best evaluation", "return, training")
    found = [
        [
            _estimate(run.summary["last_eval_metrics"].get("eval/mean_reward") for run in group.runs),
            _estimate(run.summary["best_eval_metrics"].get("eval/mean_reward") for run in group.runs),
            _estimate(run.summary["last_train_metrics"].get("rollout/ep_rew_mean") for run in group.runs),
        ]
        for group in groups
    ]
    rows = [
        [_named(group.label, index), str(len(group.runs)), *cells]
        for index, (group, cells) in enumerate(zip(groups, found, strict=True))
    ]
    return table(header, rows)


def _estimate(values: Any) -> str:
    """Mean over runs, and its interval where there are several."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return number(None)
    mean, low, high = interval(known[:, None])
    return number(mean[0]) + (f" ({number(low[0])} to {number(high[0])})" if len(known) > 1 else "")


def _run_table(groups: Sequence[Group], place: Path) -> str:
    header = ("run", "group", "seed", "status", "steps", "time", "steps per second", "best evaluation", "findings")
    rows = []
    for index, group in enumerate(groups):
        for run in group.runs:
            own, name = run.folder / REPORT, html.escape(str(run.folder))
            rows.append(
                [
                    f'<a href="{html.escape(link(own, place))}">{name}</a>' if own.is_file() else name,
                    _named(group.label, index),
                    html.escape(str(run.summary.get("seed", run.config.get("seed_everything", "–")))),
                    html.escape(run.summary["status"].partition(":")[0]),  # its own page has the whole message
                    f"{run.summary['global_step']:,}",
                    duration(run.summary["elapsed_time_sec"]),
                    f"{run.summary['training_fps']:,.0f}",
                    number(run.summary["best_eval_metrics"].get("eval/mean_reward")),
                    html.escape(", ".join(str(finding["name"]) for finding in run.health["findings"]) or "none")
                    if run.health
                    else "–",
                ]
            )
    return table(header, rows)


def _named(label: str, index: int) -> str:
    return f'<span class="c{index % len(SERIES)}">{html.escape(label)}</span>'
