"""Runs as their folders store them, read for reports."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import from_names
from ppo_lightning.runs.history import PARTS, SUMMARY, Records, summarize_records

REPORT, HEALTH, METRICS = "report.html", "health.json", "metrics.csv"

ELAPSED_KEY = "time/time_elapsed"
"""Only iterations log this metric, under every system's names."""


@dataclass(frozen=True)
class SavedRun:
    """The contents of a run's folder."""

    folder: Path
    summary: dict[str, Any]
    """``summary.json``; of a killed run, the same computed from ``metrics.csv``."""
    config: dict[str, Any]
    """The command line's config, or the hyperparameters as ``model``; empty if neither is readable."""
    health: dict[str, Any]
    """``health.json``; empty if the run had no HealthMonitor."""
    videos: list[Path]
    """Oldest first."""

    @property
    def environment(self) -> str:
        """The name of the environment."""
        env = self.config.get("model", {}).get("env", "run")
        return str(env.get("class_path", env) if isinstance(env, dict) else env)

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Environment steps and values of a metric; empty if the run did not log it."""
        rows = self.summary["eval_history" if name.startswith("eval/") else "train_history"]
        points = [(row["global_step"], row[name]) for row in rows if row.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def evaluations(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """Environment steps and mean returns of evaluations, and the means minus and plus a standard deviation."""
        steps, means = self.column("eval/mean_reward")
        spread = dict(zip(*self.column("eval/std_reward"), strict=True))
        low, high = (
            [mean + side * spread.get(step, 0.0) for step, mean in zip(steps, means, strict=True)] for side in (-1, 1)
        )
        return steps, means, low, high


def read_run(folder: Path) -> SavedRun:
    """Read a run.

    Args:
        folder: with ``summary.json`` or ``metrics.csv``; if both are there, the one with more steps wins.

    Raises:
        InputError: neither is there, or a file is unreadable.
    """
    summary, table = folder / SUMMARY, folder / METRICS
    if not (summary.is_file() or table.is_file()):
        raise InputError(
            f"{folder} has neither {SUMMARY} nor {METRICS}: give the folder of a run, such as cartpole-v1_s1_0"
        )
    found = _json(summary) if summary.is_file() else None
    if (folder / "config.yaml").is_file():
        config = _yaml(folder / "config.yaml")
    elif (folder / "hparams.yaml").is_file():
        values = _yaml(folder / "hparams.yaml")
        config = {"seed_everything": values.pop("seed", None), "model": values} if values else {}
        values.pop("processes", None)
    elif found is not None and "hyperparameters" in found:
        config = {"model": found["hyperparameters"], "seed_everything": found["seed"]}
    else:
        config = {}
    if table.is_file():
        logged = _logged(table, config.get("model", {}).get("metric_names", "sb3"))
        if found is None or logged["global_step"] > found["global_step"]:  # killed after a resume
            found = {**({} if found is None else found), **logged}
    assert found is not None
    health = _json(folder / HEALTH) if (folder / HEALTH).is_file() else {}
    videos = sorted((folder / "videos").rglob("*.mp4"), key=lambda path: path.stat().st_mtime)
    return SavedRun(folder, found, config, health, videos)


def _logged(table: Path, names: str) -> dict[str, Any]:
    """The summary of a killed run, computed from ``metrics.csv``."""
    text = table.read_text(encoding="utf-8").rpartition("\n")[0]  # the last line may be incomplete
    kinds = [(row["step"], ELAPSED_KEY in row) for row in _rows(table, text, names)]
    kept, ahead = [], math.inf
    for step, trained in reversed(kinds):  # a resumed run repeats steps
        kept.append(step < ahead)
        ahead = min(ahead, step) if trained else ahead
    records, steps, iterations, clock = Records(begun_at=0), 0, 0, 0.0
    for row, keep, (_, trained) in zip(_rows(table, text, names), reversed(kept), kinds, strict=True):
        if not keep:
            continue
        step = int(row.pop("step"))
        steps = max(steps, step)
        if not trained:
            records.evaluations.add(step, row)
            continue
        if not iterations:
            records.begun_at = round(step - step / row["time/iterations"])
        iterations, before, clock = int(row["time/iterations"]), clock, row[ELAPSED_KEY]
        records.train.add(step, row)
        records.seconds["elapsed"] += clock - before if clock > before else clock  # a resume resets it
        for part in PARTS:
            records.seconds[part] += row.get(f"time/{part}", 0.0)
    files = {name: table.parent / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")}
    latest, best = (str(file) if file.is_file() else None for file in files.values())
    summary = summarize_records(
        records, env_steps=steps, iterations=iterations, episodes=[], latest_checkpoint=latest, best_checkpoint=best
    )
    return {"status": "running, or killed", **summary}


def _rows(table: Path, text: str, names: str) -> Iterator[dict[str, float]]:
    """Rows of iterations and evaluations under our names, without empty cells and NaN."""
    for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 1):
        try:
            row = {name: float(cell) for name, cell in cells.items() if cell}
        except (TypeError, ValueError) as error:
            raise InputError(f"row {number} of {table} contains text ({error}): give the folder of a run") from error
        if "step" in row:
            found = {name: value for name, value in from_names(row, names).items() if "/" in name and value == value}
            if ELAPSED_KEY in found or any(name.startswith("eval/") for name in found):
                yield {"step": row["step"], **found}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}): delete it, or resume the run, which rewrites it"
        ) from error


def _yaml(path: Path) -> dict[str, Any]:
    """A configuration; empty if it contains Python objects, which YAML cannot load safely."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    return read if isinstance(read, dict) else {}
