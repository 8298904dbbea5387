"""What the rows of learning.py say: statistics, tables, pictures, and the documents that show them."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.learning_tasks import CURVES, POINTS, RESULTS, ROOT, Row, Suite, Task, current, read_rows


@dataclass(frozen=True)
class Summary:
    """Returns over seeds."""

    mean: float
    iqm: float
    """Mean without the lowest and the highest quarter."""
    interval: tuple[float, float] | None
    """95 % interval of the mean; None below three seeds, of which a bootstrap gives nothing but their returns."""
    lowest: float
    highest: float
    count: int

    @property
    def interval_text(self) -> str:
        """In words."""
        return "–" if self.interval is None else " – ".join(map(number, self.interval))


def summarize(values: Sequence[float]) -> Summary:
    """Statistics of the returns of several seeds, as Agarwal et al. 2021 propose them."""
    from scipy.stats import trim_mean

    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(means, (2.5, 97.5)).tolist()
    interval = (low, high) if len(values) > 2 else None
    return Summary(
        statistics.fmean(values), float(trim_mean(values, 0.25)), interval, min(values), max(values), len(values)
    )


def probability_of_improvement(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float, float]:
    """That a run of the first has a higher return than one of the second, with its 95 % interval (Agarwal et al. 2021).

    Args:
        pairs: of each task, the returns of both. Tasks count alike, and of equal returns one half counts.
    """

    def share(scores: list[NDArray[Any]]) -> float:
        differences = [np.subtract.outer(one, other) for one, other in zip(scores[::2], scores[1::2], strict=True)]
        return float(np.mean([(own > 0).mean() + (own == 0).mean() / 2 for own in differences]))

    return stratified(share, [returns for pair in pairs for returns in pair])


SHARES = 0.5, 0.75, 0.9, 1.0
"""Of the published figure, for which the table over all tasks says how many runs reach them."""


def normalized(tasks: Iterable[Task], rows: list[Row]) -> list[list[float]]:
    """Returns of each task that has all its runs: 0 is the mean of uniformly random actions, 1 the published figure."""
    found: list[list[float]] = []
    for task in tasks:
        values = returns(task, rows)
        if task.published is not None and task.random is not None and len(values) >= task.seeds:
            found.append([(value - task.random) / (task.published - task.random) for value in values])
    return found


def stratified(
    statistic: Callable[[list[NDArray[Any]]], Any], scores: Sequence[ArrayLike], samples: int = 2000
) -> tuple[Any, Any, Any]:
    """A statistic of all tasks' scores, with its 95 % interval: seeds are resampled within each task (Agarwal et al. 2021).

    Args:
        statistic: of one array of scores per task.
        scores: of each task, one per seed.
        samples: of the bootstrap.

    Returns:
        The statistic, and the percentiles 2.5 and 97.5 of the samples.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(one) for one in scores]
    found = [statistic([rng.choice(one, len(one)) for one in arrays]) for _ in range(samples)]
    return (statistic(arrays), *np.percentile(found, (2.5, 97.5), axis=0))


def performance_profile(shares: Sequence[float] | NDArray[Any]) -> Callable[[list[NDArray[Any]]], NDArray[Any]]:
    """Statistic: the fraction of runs that reach each share of the published figure, the mean over tasks."""
    thresholds = np.asarray(shares)[:, None]
    return lambda scores: np.mean([(one >= thresholds).mean(1) for one in scores], 0)


def table_over_tasks(scores: list[list[float]]) -> str:
    """Markdown: mean, interquartile mean and performance profile of all tasks together."""
    from scipy.stats import trim_mean

    lines = ["| over all tasks | | 95 % interval |", "|---|---|---|"]
    mean = stratified(lambda one: np.mean([own.mean() for own in one]), scores)
    middle = stratified(lambda one: trim_mean(np.concatenate(one), 0.25), scores)
    for name, (value, low, high) in {"mean": mean, "interquartile mean": middle}.items():
        lines.append(f"| {name} | {value:.2f} | {low:.2f} – {high:.2f} |")
    for share, *found in zip(SHARES, *stratified(performance_profile(SHARES), scores), strict=True):
        value, low, high = (f"{100 * one:.0f} %" for one in found)
        lines.append(f"| runs that reach {100 * share:.0f} % of the published figure | {value} | {low} – {high} |")
    return "\n".join(lines) + "\n"


def draw_profile(scores: list[list[float]], path: Path) -> None:
    """Picture of the performance profile, with its 95 % interval."""
    import matplotlib.pyplot as plt

    shares = np.linspace(0, 1.5, 151)
    value, low, high = stratified(performance_profile(shares), scores, samples=500)
    figure, axis = plt.subplots(figsize=(4.5, 2.8))
    axis.plot(shares, value, color="tab:blue")
    axis.fill_between(shares, low, high, color="tab:blue", alpha=0.3, linewidth=0)
    axis.axvline(1, color="black", linestyle="--", linewidth=0.8)
    axis.set_xlabel("normalised return (0 random, 1 published)", fontsize=9)
    axis.set_ylabel("fraction of runs above", fontsize=9)
    axis.set_title(f"{len(scores)} tasks, {sum(map(len, scores))} runs", fontsize=9)
    axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def number(value: float | None) -> str:
    """With the digits that matter."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text.replace("-", "−")


def table(tasks: Iterable[Task], rows: list[Row]) -> str:
    """Markdown: a line per task that has runs."""
    lines = [
        "| task | steps | counts | mean | 95 % interval | IQM | lowest – highest | seeds | eval | time | published |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        own = current(rows, task)
        if not own:
            continue
        found, evaluated = (summarize([row[key] for row in own]) for key in (task.counts, "eval"))
        cells = [
            f"{task.name} ({task.env})" if task.env else task.name,
            f"{task.steps:,}",
            task.counts,
            f"**{number(found.mean)}**",
            found.interval_text,
            number(found.iqm),
            f"{number(found.lowest)} – {number(found.highest)}",
            f"{found.count}",
            number(evaluated.mean),
            duration(own),
            f"{number(task.published)} ({task.source})" if task.published is not None else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ablation_table(suite: Suite, rows: list[Row]) -> str:
    """Markdown: a line per change, with the mean return of each task and the probability that it improves.

    Tasks on which not all seeds of a change have been run are left open.
    """
    names = [task.env or task.name for task in suite.ablated]
    base = [returns(task, rows) for task in suite.ablated]
    lines: list[str] = []
    for change, tasks in suite.changes.items():
        changed = [returns(task, rows) for task in tasks]
        pairs = [
            (one, before) if before and len(one) == task.seeds else None
            for one, before, task in zip(changed, base, tasks, strict=True)
        ]
        if any(pairs):
            mean, low, high = probability_of_improvement([pair for pair in pairs if pair is not None])
            cells = ["" if pair is None else number(statistics.fmean(pair[0])) for pair in pairs]
            lines.append(f"| {change} | " + " | ".join(cells) + f" | {mean:.2f} ({low:.2f} – {high:.2f}) |")
    if not lines:
        return "No runs of it are recorded yet.\n"
    header = [
        "| change | " + " | ".join(names) + " | improves (95 % interval) |",
        "|---|" + "---|" * (len(names) + 1),
        "| none: mujoco.yaml | " + " | ".join(number(statistics.fmean(one)) if one else "" for one in base) + " | |",
    ]
    return "\n".join([*header, *lines]) + "\n"


def returns(task: Task, rows: list[Row]) -> list[float]:
    """What counts, of each seed."""
    return [row[task.counts] for row in current(rows, task)]


def versions(rows: list[Row]) -> str:
    """The versions that the rows were made with, in words."""
    names = {f"torch {row['torch']}, gymnasium {row['gymnasium']}" for row in rows}
    return "; ".join(sorted(names | {row["simulator"] for row in rows if not row["simulator"].startswith("gymnasium")}))


def draw(tasks: Sequence[Task], path: Path) -> bool:
    """One picture of a family: training curves, their mean and its 95 % interval over seeds, and the published figure.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib.pyplot as plt

    curves = {task.name: current(read_rows(RESULTS / CURVES), task) for task in tasks}
    tasks = [task for task in tasks if curves[task.name]]
    if not tasks:
        return False
    columns = min(4, len(tasks))
    figure, axes = plt.subplots(
        -(-len(tasks) // columns), columns, figsize=(3.2 * columns, 2.6 * -(-len(tasks) // columns)), squeeze=False
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for task, axis in zip(tasks, axes.flat, strict=False):
        rows = [[float(row[f"p{i}"] or "nan") for i in range(1, POINTS + 1)] for row in curves[task.name]]
        values = np.array(rows)
        steps = np.linspace(task.steps / POINTS, task.steps, POINTS)
        known = ~np.isnan(values).any(0)
        steps, values = steps[known], values[:, known]
        axis.plot(steps, values.T, color="tab:blue", alpha=0.2, linewidth=0.7)
        axis.plot(steps, values.mean(0), color="tab:blue")
        if len(values) > 2:
            _, low, high = stratified(lambda curves: curves[0].mean(0), [values])
            axis.fill_between(steps, low, high, color="tab:blue", alpha=0.3, linewidth=0)
        if task.published is not None:
            axis.axhline(task.published, color="black", linestyle="--", linewidth=0.8)
        axis.set_title(f"{task.env or task.name} ({len(values)} seeds)", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k")
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("mean training return", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def families(tasks: Iterable[Task]) -> Iterator[tuple[str, list[Task]]]:
    """The tasks by their family."""
    grouped: dict[str, list[Task]] = {}
    for task in tasks:
        grouped.setdefault(task.family, []).append(task)
    yield from grouped.items()


def between(text: str, mark: str, contents: str) -> str:
    """The text with other contents between ``<!-- mark -->`` and ``<!-- end of mark -->``."""
    before, start, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- end of {mark} -->")
    if not start or not end:
        raise ValueError(f"the document has no marks for {mark}")
    return f"{before}{start}\n{contents}\n{end}{after}"


def documents(suite: Suite, rows: list[Row]) -> dict[Path, str]:
    """The documents that show results, as the rows have them."""
    tasks = suite.tasks
    everything = [row for task in tasks.values() for row in current(rows, task)]
    said = f"Versions: {versions(everything)}.\n"
    results, readme = ROOT / "docs/results.md", ROOT / "README.md"
    parts = {
        "learning": table(tasks.values(), rows) + "\n" + said,
        "over all tasks": table_over_tasks(normalized(tasks.values(), rows)),
        "ablation": ablation_table(suite, rows),
    }
    text = results.read_text()
    for mark, contents in parts.items():
        text = between(text, mark, contents)
    configs = {
        path: with_figures(path.read_text(), [task for task in tasks.values() if task.path == path], rows)
        for path in {task.path: None for task in tasks.values()}
    }
    return {
        results: text,
        readme: between(readme.read_text(), "learning", short_table(tasks.values(), rows)),
        **configs,
    }


REACHES = "# Reaches "


def duration(rows: list[Row]) -> str:
    """The median of the runs' times, in words."""
    seconds = statistics.median(row["seconds"] for row in rows)
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def with_figures(config: str, tasks: Iterable[Task], rows: list[Row]) -> str:
    """A config whose comment says what it reaches, in how many steps and minutes, for each task that has all its runs."""
    lines = [line for line in config.splitlines() if not line.startswith(REACHES)]
    first = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    said: list[str] = []
    for task in tasks:
        own = current(rows, task)
        if len(own) >= task.seeds:
            found = summarize(returns(task, rows))
            kind = {"train": "training return", "eval": "evaluation"}[task.counts]
            said.append(
                f"{REACHES}{number(found.mean)} ({kind}, mean of {found.count} seeds) in {task.steps:,} steps"
                f"{f' of {task.env}' if task.env else ''}, {duration(own)} on one core."
            )
    return "\n".join([*lines[:first], *said, *lines[first:]]) + "\n"


def short_table(tasks: Iterable[Task], rows: list[Row]) -> str:
    """Markdown for the README: mean and interval beside the published figure, of tasks that have all their runs."""
    lines = ["| task | steps | mean over seeds (95 % interval) | published |", "|---|---|---|---|"]
    for task in tasks:
        own = current(rows, task)
        if len(own) >= task.seeds and task.published is not None:
            found = summarize(returns(task, rows))
            mean = f"{number(found.mean)} ({found.interval_text}; {found.count} seeds, {task.counts})"
            lines.append(
                f"| {task.env or task.name} | {task.steps:,} | {mean} | {number(task.published)} ({task.source}) |"
            )
    return "\n".join(lines) + "\n"


def write_documents(suite: Suite, rows: list[Row]) -> None:
    """Write the tables into the documents, and draw the pictures."""
    for path, text in documents(suite, rows).items():
        path.write_text(text)
    for family, own in families(suite.tasks.values()):
        draw(own, RESULTS / f"learning_{family.lower().replace(' ', '_')}.png")
    draw_profile(normalized(suite.tasks.values(), rows), RESULTS / "learning_profile.png")
