"""A page about several runs side by side: groups of repetitions, interquartile means over seeds and their intervals."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ppo_lightning.errors import InputError
from ppo_lightning.tools.charts import CHARTS, COLORS, Curve, draw, to_svg
from ppo_lightning.tools.page import duration, link, number, render
from ppo_lightning.tools.saved_runs import REPORT, SavedRun

IGNORED_SETTINGS = (
    "seed_everything",
    "name",
    "ckpt_path",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.enable_",
)
"""Prefixes of settings that do not distinguish experiments."""

POINTS = 200
"""Environment steps of the common grid (count)."""

RESAMPLES = 1000
"""Samples of the bootstrap (count)."""


@dataclass(frozen=True)
class Group:
    """Runs that repeat one experiment."""

    label: str
    runs: list[SavedRun]


def grouped(runs: Sequence[SavedRun], keys: Sequence[str] | None = None) -> list[Group]:
    """Group runs by experiment, in the order of their first runs; the differing settings are a group's label.

    Args:
        runs: in order.
        keys: settings that distinguish groups, by full name or any part of it (``clip_range`` has ``start`` and ``end``);
            None takes all but :data:`IGNORED_SETTINGS`; ``run`` makes each run a group.

    Raises:
        InputError: no run has such a setting.
    """
    if keys == ["run"]:
        return [Group(str(run.folder), [run]) for run in runs]
    all_settings = [settings(run) for run in runs]
    if keys is not None:
        for key in keys:
            if not any(_matches(name, key) for found in all_settings for name in found):
                raise InputError(f"--group {key}: no run has such a setting; its names are those of config.yaml")
        all_settings = [
            {name: value for name, value in found.items() if any(_matches(name, key) for key in keys)}
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


def settings(run: SavedRun) -> dict[str, str]:
    """The settings that identify an experiment, by full name, such as ``model.gamma``; the folder of a run without any."""
    flat = {name: value for name, value in _flat("", run.config) if not name.startswith(IGNORED_SETTINGS)}
    return flat or {"run": str(run.folder)}


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if not (isinstance(value, dict) and value):
        return [(name, json.dumps(value, sort_keys=True, default=str).strip('"'))]
    return [pair for key, child in value.items() for pair in _flat(f"{name}.{key}" if name else str(key), child)]


def _matches(name: str, key: str) -> bool:
    return f".{key}." in f".{name}."


def _label(found: dict[str, str], differing: list[str], first: SavedRun) -> str:
    """The differing settings of a group: three at most, and the folder if there are more."""
    if not differing:
        return first.environment
    parts = [f"{name.removeprefix('model.').removesuffix('.class_path')}={found.get(name, '–')}" for name in differing]
    return ", ".join(parts[:3]) + (f", … ({first.folder})" if len(parts) > 3 else "")


def middle_mean(values: Any) -> Any:
    """Interquartile mean over the first axis: without the lowest and the highest quarter, rounded down to whole runs."""
    cut = len(values) // 4
    return np.sort(values, 0)[cut : len(values) - cut].mean(0)


def interval(values: Any) -> tuple[Any, Any, Any]:
    """Interquartile mean over runs, and its 95 % interval by the percentiles of a bootstrap (Agarwal et al. 2021), without NaN.

    Args:
        values: [runs, P].

    Returns:
        Three arrays [P]: interquartile mean, lower and upper end. They are NaN without runs, and the ends also with two runs,
        of which a bootstrap gives nothing but the two values.
    """
    found = np.full((3, values.shape[1]), np.nan)
    there = ~np.isnan(values)
    for known in np.unique(there, axis=1).T if values.shape[1] else ():
        points, count = (there == known[:, None]).all(0), int(known.sum())
        own = values[np.ix_(known, points)]
        if count:
            found[0, points] = middle_mean(own)
        if count > 2:
            drawn = np.random.default_rng(0).integers(count, size=(count, RESAMPLES))
            found[1:, points] = np.percentile(middle_mean(own[drawn]), (2.5, 97.5), axis=0)
    return found[0], found[1], found[2]


def curves_of(group: Group, metric: str, color: int) -> list[Curve]:
    """The interquartile mean of a metric over a group's runs with its interval, on a common grid, and the runs as faint curves.

    Each grid point takes the runs that got that far, linearly interpolated between their own points.
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
        groups: of the runs.
        place: folder of the page, to which its links are relative.
    """
    environments: dict[str, list[tuple[int, Group]]] = {}
    for index, group in enumerate(groups):
        names = dict.fromkeys(run.environment for run in group.runs)
        environments.setdefault(", ".join(names), []).append((index, group))
    several = any(len(group.runs) > 1 for group in groups)
    caption = (
        "Thick: the interquartile mean over the runs of a group that got so far, from three runs on with its 95 % interval "
        "(bootstrap); thin: each run."
        if several
        else "Each curve is one run."
    )
    return render(
        "comparison.html",
        title=f"{', '.join(environments)} · {sum(len(group.runs) for group in groups)} runs",
        labels=[f"{group.label} ({len(group.runs)} run{'s' * (len(group.runs) > 1)})" for group in groups],
        caption=caption,
        charts={name: _figures(members) for name, members in environments.items()},
        groups=[_group_row(index, group) for index, group in enumerate(groups)],
        runs=[_run_row(index, group, run, place) for index, group in enumerate(groups) for run in group.runs],
    )


def _figures(groups: Sequence[tuple[int, Group]]) -> list[tuple[str, str, str]]:
    """Title, SVG and caption of the charts of groups and their indices, whose returns are comparable."""
    figures = []
    for chart in CHARTS:
        for metric, meaning in chart.metrics.items():
            curves = [curve for index, group in groups for curve in curves_of(group, metric, index)]
            if curves:
                title = chart.title if len(chart.metrics) == 1 else f"{chart.title}, {meaning.partition(',')[0]}"
                one = replace(chart, title=title, metrics={metric: meaning})
                figures.append((title, to_svg(draw(one, curves, legend=False)), one.full_caption()))
    return figures


def _colored(index: int, label: str) -> str:
    """A group's label in the color of its curve."""
    return Markup('<span class="c{}">{}</span>').format(index % len(COLORS), label)


def _group_row(index: int, group: Group) -> list[str]:
    metrics = {
        "last_eval_metrics": "eval/mean_reward",
        "best_eval_metrics": "eval/mean_reward",
        "last_train_metrics": "rollout/ep_rew_mean",
    }
    cells = [_estimate(run.summary[part].get(name) for run in group.runs) for part, name in metrics.items()]
    return [_colored(index, group.label), str(len(group.runs)), *cells]


def _estimate(values: Iterable[float | None]) -> str:
    """Interquartile mean over runs, and its interval from three runs on."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return number(None)
    mean, low, high = interval(known[:, None])
    return number(mean[0]) + (f" ({number(low[0])} to {number(high[0])})" if low[0] == low[0] else "")


def _run_row(index: int, group: Group, run: SavedRun, place: Path) -> list[str]:
    page, summary = run.folder / REPORT, run.summary
    findings = ", ".join(finding["name"] for finding in run.health["findings"]) or "none" if run.health else "–"
    return [
        Markup('<a href="{}">{}</a>').format(link(page, place), run.folder) if page.is_file() else str(run.folder),
        _colored(index, group.label),
        str(summary.get("seed", run.config.get("seed_everything", "–"))),
        summary["status"].partition(":")[0],  # the run's own page has the whole message
        f"{summary['global_step']:,}",
        duration(summary["elapsed_time_sec"]),
        f"{summary['training_fps']:,.0f}",
        number(summary["best_eval_metrics"].get("eval/mean_reward")),
        findings,
    ]
