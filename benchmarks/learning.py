"""Returns over seeds, beside the best published ones.

    python -m benchmarks.learning                                       # every task of learning.yaml, seeds 1 to 10
    python -m benchmarks.learning --tasks half_cheetah hopper --seeds 1 2 3 --jobs 2

Each run is ``python -m ppo_lightning fit`` on a config, in a process and a folder of its own, then 100 deterministic episodes.
A run is a row of results/learning.csv, and its training curve one of learning_curves.csv. Runs that have a row by the same
settings are not repeated; a run that was interrupted resumes. From the rows come the tables in README.md and docs/results.md,
and the pictures there; the best policy of each task is kept in policies/. Two runs at a time, each with one thread.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
POLICIES = HERE / "policies"
ROWS, CURVES = RESULTS / "learning.csv", RESULTS / "learning_curves.csv"
COLUMNS = ("task", "seed", "settings", "steps", "train", "eval", "seconds", "commit", "torch", "gymnasium", "simulator")
POINTS = 40
"""Points of a stored training curve, at equal distances in environment steps."""
SIMULATORS = {"MuJoCo": "mujoco", "Box2D": "box2d", "MiniGrid": "minigrid", "Atari": "ale-py"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A config, what differs from it, and what it is compared with; fields as in learning.yaml."""

    name: str
    family: str
    steps: int
    counts: Literal["train", "eval"]
    config: str = ""
    env: str | None = None
    at_least: float | None = None
    published: float | None = None
    source: str = ""
    seeds: int = 10
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Of the config."""
        return ROOT / "configs" / f"{self.config or self.name}.yaml"

    @property
    def all_flags(self) -> dict[str, Any]:
        """That differ from the config."""
        env = {} if self.env is None else {"model.env": self.env}
        return {"model.total_steps": self.steps, **env, **self.flags}

    @property
    def settings(self) -> str:
        """Digest of all that a run depends on beside seed and versions; comments in the config do not count."""
        contents = [yaml.safe_load(self.path.read_text()), self.all_flags]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def simulator(self) -> str:
        """The library that simulates the environment, with its version."""
        name = next((name for family, name in SIMULATORS.items() if self.family.startswith(family)), "gymnasium")
        return f"{name} {importlib.metadata.version(name)}"


@dataclass(frozen=True)
class Suite:
    """What learning.yaml holds."""

    tasks: dict[str, Task]
    quick: list[str]
    """Names of tasks that take seconds."""
    ablated: list[Task]
    """Tasks whose settings are changed one at a time."""
    changes: dict[str, list[Task]]
    """By the change, each of these with it."""


def load_suite() -> Suite:
    """The tasks of learning.yaml."""
    contents = yaml.safe_load((HERE / "learning.yaml").read_text())
    tasks = {name: Task(name, **entry) for name, entry in contents["tasks"].items()}
    ablation = contents["ablation"]
    ablated = [replace(tasks[name], seeds=ablation["seeds"]) for name in ablation["of"]]
    changes = {
        change: [replace(task, name=f"{task.name}: {change}", config=task.path.stem, flags=flags) for task in ablated]
        for change, flags in ablation["changes"].items()
    }
    return Suite(tasks, contents["quick"], ablated, changes)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        rows: list[Row] = list(csv.DictReader(lines))
    for row in rows:
        row["seed"] = int(row["seed"])
        for name in row.keys() & {"train", "eval", "seconds"}:
            row[name] = float(row[name])
    return rows


def append(path: Path, columns: Sequence[str], row: Row) -> None:
    """Add a row to a CSV file, with a header where it is new."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def current(rows: Iterable[Row], task: Task) -> list[Row]:
    """The rows of a task by its present settings, in the order of their seeds."""
    return sorted(
        (row for row in rows if (row["task"], row["settings"]) == (task.name, task.settings)),
        key=lambda row: row["seed"],
    )


# --- runs --------------------------------------------------------------------------------------------------------------


class RunError(Exception):
    """A run ended with an error."""


def train(task: Task, seed: int, root: Path) -> tuple[Row, Row]:
    """Train and evaluate once, in a process of its own.

    Args:
        task: to train on.
        seed: of the run.
        root: folder; the run's own is below it.

    Returns:
        The rows of the result and of the curve.

    Raises:
        RunError: the process ended with an error.
    """
    folder = run_folder(task, seed, root)
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "result.json", folder / "output.log"
    flags: dict[str, Any] = {
        "config": task.path,
        "seed_everything": seed,
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.limit_val_batches": 0,
        **task.all_flags,
    }
    if any(folder.glob("lightning_logs/version_*/checkpoints/last.ckpt")):
        flags["ckpt_path"] = "last"
    words = [word for name, value in flags.items() for word in (f"--{name}", flag(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        command = [sys.executable, "-m", "benchmarks.one_run", str(result), *words]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RunError(f"{task.name}, seed {seed}: exit status {code}, see {log}")
    installed = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium")}
    own = {"task": task.name, "seed": seed, "settings": task.settings}
    contents = json.loads(result.read_text())
    numbers = {name: f"{contents[name]:.6g}" for name in ("train", "eval")} | {"seconds": round(contents["seconds"])}
    row = {**own, "steps": contents["steps"], **numbers, "commit": commit(), **installed, "simulator": task.simulator}
    return row, {**own, **thinned(read_curve(folder), task.steps)}


def run_folder(task: Task, seed: int, root: Path) -> Path:
    """Of a run below ``root``."""
    return root / task.name.partition(":")[0] / f"{task.settings}_seed_{seed}"


def flag(value: Any) -> str:
    """A value as a word of the command line."""
    return value if isinstance(value, str) else json.dumps(value) if not isinstance(value, Path) else str(value)


def commit() -> str:
    """The repository's commit, with + where files beside the results have changed."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    return name.strip() + "+" * bool(subprocess.run(changed, capture_output=True, text=True, check=True).stdout)


def read_curve(folder: Path) -> list[tuple[float, float]]:
    """Environment steps and mean return of the last 100 episodes, of each iteration of a run and its resumptions."""
    points: dict[float, float] = {}
    for path in sorted(folder.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row.get("rollout/ep_rew_mean"):
                    points[float(row["step"])] = float(row["rollout/ep_rew_mean"])
    return sorted(points.items())


def thinned(curve: list[tuple[float, float]], steps: int) -> Row:
    """A curve at equal distances; empty before its first episode has ended."""
    at, returns = zip(*curve, strict=True)
    grid = np.linspace(steps / POINTS, steps, POINTS)
    values = np.interp(grid, at, returns, left=np.nan)
    return {f"p{place}": "" if np.isnan(value) else f"{value:.5g}" for place, value in enumerate(values, 1)}


def run_all(jobs: list[tuple[Task, int]], root: Path, workers: int) -> list[str]:
    """Run what has no row yet, and write a row for each.

    Args:
        jobs: tasks with seeds.
        root: folder of the runs.
        workers: runs at a time.

    Returns:
        Messages of the runs that failed.
    """
    rows = read_rows(ROWS)
    done = {(row["task"], row["seed"], row["settings"]) for row in rows}
    jobs = [(task, seed) for task, seed in jobs if (task.name, seed, task.settings) not in done]
    expected = {task.name: expected_seconds(task, rows) for task, _ in jobs}
    failures: list[str] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task("training", total=len(jobs), left=time_left(jobs, expected, workers))
        futures: dict[Future[tuple[Row, Row]], tuple[Task, int]] = {
            pool.submit(train, task, seed, root): (task, seed) for task, seed in jobs
        }
        try:
            for future in as_completed(futures):
                task, seed = futures.pop(future)
                try:
                    row, curve = future.result()
                except RunError as error:
                    failures.append(str(error))
                    progress.console.print(f"failed: {error}")
                else:
                    append(ROWS, COLUMNS, row)
                    append(CURVES, list(curve), curve)
                    said = f"{task.name}, seed {seed}: train {row['train']}, eval {row['eval']}, {row['seconds']} s"
                    progress.console.print(said)
                left = time_left(list(futures.values()), expected, workers)
                progress.update(bar, advance=1, left=left)
        finally:  # an interrupt would wait for all runs that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
    return failures


def expected_seconds(task: Task, rows: list[Row]) -> float:
    """Seconds of a run: those of earlier ones, or by 6,000 steps per second."""
    earlier = [row["seconds"] for row in rows if row["task"] == task.name]
    return statistics.fmean(earlier) if earlier else task.steps / 6000


def time_left(jobs: Iterable[tuple[Task, int]], expected: dict[str, float], workers: int) -> str:
    """An estimate in words."""
    minutes = sum(expected[task.name] for task, _ in jobs) / workers / 60
    return f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"


# --- what the rows say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Returns over seeds."""

    mean: float
    iqm: float
    """Mean of the middle half."""
    low: float
    high: float
    """95 % interval of the mean, by 10,000 bootstrap samples of the seeds; the percentiles of the means."""
    lowest: float
    highest: float
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Statistics of the returns of several seeds, as Agarwal et al. 2021 propose them."""
    from scipy.stats import bootstrap, trim_mean

    low = high = values[0]
    if len(set(values)) > 1:
        low, high = bootstrap(
            (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    iqm = float(trim_mean(values, 0.25))
    return Summary(statistics.fmean(values), iqm, float(low), float(high), min(values), max(values), len(values))


def probability_of_improvement(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """That a run of ``one`` has a higher return than one of ``other``, ties count half, with its 95 % interval."""
    from scipy.stats import bootstrap

    def share(one: Any, other: Any) -> float:
        difference = np.subtract.outer(np.asarray(one), np.asarray(other))
        return float((difference > 0).mean() + (difference == 0).mean() / 2)

    estimate = share(one, other)
    if estimate in (0.0, 1.0):
        return estimate, estimate, estimate
    low, high = bootstrap(
        (one, other), share, n_resamples=2000, method="percentile", vectorized=False, rng=np.random.default_rng(0)
    ).confidence_interval
    return estimate, float(low), float(high)


def number(value: float | None) -> str:
    """With the digits that matter."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text.replace("-", "−")


def table(tasks: Iterable[Task], rows: list[Row]) -> str:
    """Markdown: a line per task that has runs."""
    lines = [
        "| task | steps | counts | mean | 95 % interval | IQM | lowest – highest | seeds | eval | minutes | published |",
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
            f"{number(found.low)} – {number(found.high)}",
            number(found.iqm),
            f"{number(found.lowest)} – {number(found.highest)}",
            f"{found.count}",
            number(evaluated.mean),
            f"{statistics.fmean(row['seconds'] for row in own) / 60:.1f}",
            f"{number(task.published)} ({task.source})" if task.published is not None else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ablation_table(suite: Suite, rows: list[Row]) -> str:
    """Markdown: a line per change, with the mean return of each task and the probability that it improves."""
    names = [task.env or task.name for task in suite.ablated]
    lines = [
        "| change | " + " | ".join(names) + " | improves (95 % interval) |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    base = [returns(task, rows) for task in suite.ablated]
    if not all(base):
        return "No runs of it are recorded yet.\n"
    lines.append("| none: mujoco.yaml | " + " | ".join(number(statistics.fmean(one)) for one in base) + " | |")
    for change, tasks in suite.changes.items():
        changed = [returns(task, rows) for task in tasks]
        if all(changed):
            better = [probability_of_improvement(*both) for both in zip(changed, base, strict=True)]
            mean, low, high = (statistics.fmean(part) for part in zip(*better, strict=True))
            cells = [number(statistics.fmean(one)) for one in changed]
            lines.append(f"| {change} | " + " | ".join(cells) + f" | {mean:.2f} ({low:.2f} – {high:.2f}) |")
    return "\n".join(lines) + "\n"


def returns(task: Task, rows: list[Row]) -> list[float]:
    """Of the task's own seeds, what counts."""
    return [row[task.counts] for row in current(rows, task) if row["seed"] <= task.seeds]


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
    from scipy.stats import bootstrap

    curves = {task.name: current(read_rows(CURVES), task) for task in tasks}
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
        if len(values) > 1:
            interval = bootstrap(
                (values,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
            ).confidence_interval
            axis.fill_between(steps, interval.low, interval.high, color="tab:blue", alpha=0.3, linewidth=0)
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


def write_policy(task: Task, rows: list[Row], root: Path) -> None:
    """Keep the weights of a task's best run among seeds 1 to 10, where this machine has trained it, to act by."""
    own = [row for row in current(rows, task) if row["seed"] <= 10]
    if len(own) < task.seeds:
        return
    best = max(own, key=lambda row: row[task.counts])
    found = sorted(run_folder(task, best["seed"], root).glob("lightning_logs/version_*/checkpoints/last.ckpt"))
    if not found:
        return
    import torch

    contents = torch.load(found[-1], weights_only=True)
    kept = {
        name: contents[name] for name in ("pytorch-lightning_version", "state_dict", "hparams_name", "hyper_parameters")
    }
    kept["ppo_lightning"] = {**contents["ppo_lightning"], "processes": [], "episodes": []}
    POLICIES.mkdir(exist_ok=True)
    torch.save(kept, POLICIES / f"{task.name}.ckpt")


# --- documents ---------------------------------------------------------------------------------------------------------


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
    return {
        results: between(
            between(results.read_text(), "learning", table(tasks.values(), rows) + "\n" + said),
            "ablation",
            ablation_table(suite, rows),
        ),
        readme: between(readme.read_text(), "learning", short_table(tasks.values(), rows)),
    }


def short_table(tasks: Iterable[Task], rows: list[Row]) -> str:
    """Markdown for the README: mean and interval beside the published figure, of tasks that have all their runs."""
    lines = ["| task | steps | mean over seeds (95 % interval) | published |", "|---|---|---|---|"]
    for task in tasks:
        own = current(rows, task)
        if len(own) >= task.seeds and task.published is not None:
            found = summarize([row[task.counts] for row in own])
            mean = (
                f"{number(found.mean)} ({number(found.low)} – {number(found.high)}; {found.count} seeds, {task.counts})"
            )
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


def keep_policies(tasks: dict[str, Task], rows: list[Row], root: Path) -> None:
    """Keep a policy of each task that has a published figure."""
    for task in tasks.values():
        if task.published is not None:
            write_policy(task, rows, root)


def parse(words: list[str], suite: Suite) -> argparse.Namespace:
    """The options of the command line."""
    tasks, quick = suite.tasks, suite.quick
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(tasks), metavar="TASK", help=", ".join(tasks))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(quick)}: some minutes")
    parser.add_argument("--ablation", action="store_true", help="the changes to mujoco.yaml, five seeds each")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 to 10, of Pong 1 to 3")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the documents from the rows")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--root", type=Path, default=ROOT / "lightning_logs/learning", help="folder of the runs")
    options = parser.parse_args(words)
    if any(not 1 <= seed <= 100 for seed in options.seeds or []):
        parser.error("--seeds are 1 to 100: 101 and up are those by which hyperparameters are chosen")
    return options


def main() -> None:
    suite = load_suite()
    options, tasks = parse(sys.argv[1:], suite), suite.tasks
    chosen = [tasks[name] for name in options.tasks or (suite.quick if options.quick else tasks)]
    if options.ablation:
        chosen = [*suite.ablated, *(task for changed in suite.changes.values() for task in changed)]
    jobs = [(task, seed) for task in chosen for seed in options.seeds or range(1, task.seeds + 1)]
    jobs = [] if options.tables else jobs
    failures = run_all(jobs, options.root, options.jobs)
    rows = read_rows(ROWS)
    write_documents(suite, rows)
    keep_policies(tasks, rows, options.root)
    print(ablation_table(suite, rows) if options.ablation else table(chosen, rows))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
