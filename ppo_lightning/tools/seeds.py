"""``ppo-lightning fit --seeds N``: one config on several seeds, side by side where cores allow, and one report of all."""

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.parameters import usable_cores
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.tools.charts import can_draw
from ppo_lightning.tools.comparison import comparison, grouped
from ppo_lightning.tools.saved_runs import read_run

FIT = [sys.executable, "-m", "ppo_lightning", "fit"]
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@dataclass(frozen=True)
class Ended:
    """A run in a process of its own."""

    seed: int
    status: int
    said: str
    """The last line that it printed to its standard error."""
    folder: Path | None
    """Of the run; None where it has none."""


def fit_seed(words: Sequence[str], seed: int, name: str | None = None) -> Ended:
    """Train on a seed, in a process of its own, on one thread unless OMP_NUM_THREADS is set.

    Args:
        words: of ``fit``.
        seed: of the run.
        name: of the run's folder, which also has the seed, so that runs side by side do not choose the same one.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment.pop("PL_GLOBAL_SEED", None)
    named = [] if name is None else ["--name", f"{name}_s{seed}"]
    command = [*FIT, *words, *named, "--seed_everything", str(seed), *QUIET]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"^  logs +(.+)$", done.stdout, re.MULTILINE)
    said = next(iter(done.stderr.strip().splitlines()[-1:]), "")
    return Ended(seed, done.returncode, said, Path(found[1]) if found else None)


def fit_seeds(words: Sequence[str], seeds: Sequence[int], jobs: int, name: str | None = None) -> list[Path]:
    """Train on each seed, and print each run's return.

    Args:
        words: of ``fit``.
        seeds: one run for each.
        jobs: runs at a time.
        name: of the runs' folders, before the seed; None is the task's.

    Returns:
        The runs' folders, in the order of the seeds.

    Raises:
        InputError: a run failed; the others have ended.
    """
    ended: list[Ended] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("seeds", total=len(seeds))
        futures = [pool.submit(fit_seed, words, seed, name) for seed in seeds]
        try:
            for future in as_completed(futures):
                run = future.result()
                ended.append(run)
                progress.advance(bar)
                where = "no folder" if run.folder is None else str(run.folder)
                what = f"exit status {run.status}" if run.status else f"mean return {_returned(run.folder)}"
                progress.console.print(f"seed {run.seed}: {what}, {where}", highlight=False)
        finally:  # an interrupt would wait for all runs that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
    failed = sorted((run for run in ended if run.status), key=lambda run: run.seed)
    if failed:
        seeds_of = ", ".join(str(run.seed) for run in failed)
        raise InputError(f"of seeds {seeds_of}: {failed[0].said.removeprefix('error: ')}")
    ended.sort(key=lambda run: run.seed)
    return [run.folder for run in ended if run.folder is not None]


def _returned(folder: Path | None) -> str:
    returns = [] if folder is None else read_run(folder).summary["episode_returns"]
    return f"{statistics.fmean(returns):.1f}" if returns else "unknown"


def main(words: list[str]) -> None:
    """Run ``ppo-lightning fit --seeds N``: the runs, then one page about all."""
    parser = PlainParser(prog="ppo-lightning fit", add_help=False)
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--seed_everything", type=int, default=1)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--name")
    with exit_on_user_error():
        given, rest = parser.parse_known_args(words)
        _check(given, rest)
        seeds = range(given.seed_everything, given.seed_everything + given.seeds)
        folders = fit_seeds(rest, seeds, given.jobs or min(len(seeds), usable_cores()), given.name)
        if not folders or not can_draw():
            return
        name = re.sub(r"(_s\d+)?_\d+$", "", folders[0].name)
        page = folders[0].parent / f"{name}_s{seeds[0]}-{seeds[-1]}.html"
        runs = [read_run(folder) for folder in folders]
        write_atomically(page, comparison(grouped(runs), page.parent).encode())
        returns = [statistics.fmean(run.summary["episode_returns"]) for run in runs if run.summary["episode_returns"]]
        if returns:
            mean, low, high = (f"{value:.1f}" for value in (statistics.fmean(returns), min(returns), max(returns)))
            print(f"\n{len(returns)} seeds: mean return {mean} ({low} to {high})")
        print(f"  report       {page}")


def _check(given: argparse.Namespace, rest: Sequence[str]) -> None:
    for name in ("seeds", "jobs"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be 1 or more, got {value}")
    if given.seed_everything < 0:
        raise InputError(
            f"--seed_everything must be 0 or more beside --seeds, whose first it is, got {given.seed_everything}"
        )
    if re.search(r"--trainer\.logger[ =](false|False)\b", " ".join(rest)):
        raise InputError("--seeds reports from the runs' folders, and --trainer.logger false makes none: leave it out")
    if given.ckpt_path is not None:
        raise InputError("--seeds begins new runs: leave --ckpt_path out, or resume each run by itself")
