"""Returns over seeds, beside the best published ones.

    python -m benchmarks.learning                                       # every task of learning.yaml, seeds 1 to 10
    python -m benchmarks.learning --tasks half_cheetah hopper --seeds 1 2 3 --jobs 2

Each run is ``python -m ppo_lightning fit`` on a config, in a process and a folder of its own, then 100 deterministic episodes.
A run is a row of results/learning.csv, and its training curve one of learning_curves.csv. Runs that have a row by the same
settings are not repeated, unless --results names a folder without them; a run that was interrupted resumes. From the rows
come the tables in README.md and docs/results.md, and the pictures there. Of each task with a published figure the best
policy is kept in policies/. Two runs at a time, each with one thread.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.learning_report import ablation_table, table, write_documents
from benchmarks.learning_tasks import (
    COLUMNS,
    CURVES,
    HERE,
    POINTS,
    RESULTS,
    ROOT,
    ROWS,
    Row,
    Suite,
    Task,
    append,
    current,
    load_suite,
    read_rows,
)

POLICIES = HERE / "policies"


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
    if any(folder.glob("lightning_logs/*/checkpoints/last.ckpt")):
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
    for path in sorted(folder.glob("lightning_logs/*/metrics.csv"), key=lambda path: path.stat().st_mtime):
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


def run_all(jobs: list[tuple[Task, int]], root: Path, workers: int, results: Path) -> list[str]:
    """Run what has no row yet, and write a row for each.

    Args:
        jobs: tasks with seeds.
        root: folder of the runs.
        workers: runs at a time.
        results: folder of the rows.

    Returns:
        Messages of the runs that failed.
    """
    rows = read_rows(results / ROWS)
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
                    append(results / ROWS, COLUMNS, row)
                    append(results / CURVES, list(curve), curve)
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


def write_policy(task: Task, rows: list[Row], root: Path) -> None:
    """Keep the weights of a task's best run, where this machine has trained it, to act by."""
    own = current(rows, task)
    if len(own) < task.seeds:
        return
    best = max(own, key=lambda row: row[task.counts])
    found = sorted(run_folder(task, best["seed"], root).glob("lightning_logs/*/checkpoints/last.ckpt"))
    if not found:
        return
    import torch

    contents = torch.load(found[-1], weights_only=True)
    kept = {
        name: contents[name] for name in ("pytorch-lightning_version", "state_dict", "hparams_name", "hyper_parameters")
    }
    # Copies, since compiled parameters are views of one tensor; half precision, since all policies together have 2 MB.
    weights: dict[str, torch.Tensor] = kept["state_dict"]
    kept["state_dict"] = {
        name: one.half() if one.ndim > 1 and one.dtype == torch.float32 else one.clone()
        for name, one in weights.items()
    }
    kept["ppo_lightning"] = {**contents["ppo_lightning"], "processes": [], "episodes": []}
    POLICIES.mkdir(exist_ok=True)
    torch.save(kept, POLICIES / f"{task.name}.ckpt")


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
    parser.add_argument(
        "--ablation", action="store_true", help="the changes to mujoco.yaml, five seeds each (--tasks: on these alone)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those that tables count, 1 to 10 or fewer")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the documents from the rows")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument(
        "--root", type=Path, help="folder of the runs (default: lightning_logs/learning, or runs in that of --results)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="of the rows, to train again what this repository has; its documents and policies then stay as they are",
    )
    options = parser.parse_args(words)
    here = options.results.resolve() == RESULTS
    options.root = options.root or (ROOT / "lightning_logs/learning" if here else options.results / "runs")
    ablated = [task.name for task in suite.ablated]
    if options.ablation and not set(options.tasks or ablated) <= set(ablated):
        parser.error(f"--ablation changes mujoco.yaml alone: take --tasks of {', '.join(ablated)}")
    if any(not 1 <= seed <= 100 for seed in options.seeds or []):
        parser.error("--seeds are 1 to 100: 101 and up are those by which hyperparameters are chosen")
    return options


def main() -> None:
    suite = load_suite()
    options, tasks = parse(sys.argv[1:], suite), suite.tasks
    chosen = [tasks[name] for name in options.tasks or (suite.quick if options.quick else tasks)]
    if options.ablation:
        among = options.tasks or [task.name for task in suite.ablated]
        every = [*suite.ablated, *(task for changed in suite.changes.values() for task in changed)]
        chosen = [task for task in every if task.name.partition(":")[0] in among]
    jobs = [(task, seed) for task in chosen for seed in options.seeds or range(1, task.seeds + 1)]
    jobs = [] if options.tables else jobs
    failures = run_all(jobs, options.root, options.jobs, options.results)
    rows = read_rows(options.results / ROWS)
    if options.results.resolve() == RESULTS:
        write_documents(suite, rows)
        keep_policies(tasks, rows, options.root)
    print(ablation_table(suite, rows) if options.ablation else table(chosen, rows))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
