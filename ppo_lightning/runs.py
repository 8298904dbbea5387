"""What a run has left in its folder, read back for pictures."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import restored

SUMMARY, REPORT, HEALTH = "summary.json", "report.html", "health.json"

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    folder: Path
    summary: dict[str, Any]
    """As ``summary.json`` has it; of a run that was killed what ``metrics.csv`` has of it."""
    config: dict[str, Any]
    """The command line's, or the hyperparameters as ``model``; empty where there is none that can be read."""
    health: dict[str, Any]
    """``health.json``; empty where nobody watched."""
    videos: list[Path]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Environment steps and values of a metric, where the run has it."""
        rows = self.summary["eval_history" if name.startswith("eval/") else "train_history"]
        points = [(row["global_step"], row[name]) for row in rows if row.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def evaluations(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """Environment steps and mean returns of evaluations, and the means less and plus a standard deviation."""
        steps, means = self.column("eval/mean_reward")
        spread = dict(zip(*self.column("eval/std_reward"), strict=True))
        low, high = (
            [mean + side * spread.get(step, 0.0) for step, mean in zip(steps, means, strict=True)] for side in (-1, 1)
        )
        return steps, means, low, high


def read_run(folder: Path) -> Run:
    """Read a run.

    Args:
        folder: with ``summary.json``, or at least ``metrics.csv``; of both the one that goes further.

    Raises:
        InputError: there is neither, or a file that cannot be read.
    """
    summary, table = folder / SUMMARY, folder / "metrics.csv"
    if not (summary.is_file() or table.is_file()):
        raise InputError(f"{folder} has neither {SUMMARY} nor metrics.csv: give the folder of a run, such as version_0")
    found = _json(summary) if summary.is_file() else None
    if (folder / "config.yaml").is_file():
        config = _yaml(folder / "config.yaml")
    elif found is not None and "hyperparameters" in found:
        config = {"model": found["hyperparameters"], "seed_everything": found["seed"]}
    else:
        config = {"model": _yaml(folder / "hparams.yaml")} if (folder / "hparams.yaml").is_file() else {}
    if table.is_file():
        rows = _rows(table, config.get("model", {}).get("metric_names", "sb3"))
        if found is None or (rows and rows[-1]["global_step"] > found["global_step"]):  # killed after it had gone on
            found = {**({} if found is None else found), **_summary(rows), **_checkpoints(folder)}
    assert found is not None
    health = _json(folder / HEALTH) if (folder / HEALTH).is_file() else {}
    videos = sorted((folder / "videos").rglob("*.mp4"), key=lambda path: path.stat().st_mtime)
    return Run(folder, found, config, health, videos)


def _rows(table: Path, names: str) -> list[dict[str, float]]:
    """Rows of ``metrics.csv`` under our names, without what is empty or not a number, nor a last line that is cut off."""
    whole = table.read_text(encoding="utf-8").rpartition("\n")[0]
    texts = list(csv.DictReader(whole.splitlines()))
    read = []
    for number, text in enumerate(texts, 1):
        try:
            read.append({name: float(cell) for name, cell in text.items() if cell})
        except (TypeError, ValueError) as error:
            if number < len(texts):
                raise InputError(
                    f"row {number} of {table} is not of numbers ({error}): give the folder of a run"
                ) from error
    return [
        {"global_step": row.pop("step")}
        | {name: value for name, value in restored(row, names).items() if "/" in name and value == value}
        for row in read
        if "step" in row
    ]


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """What rows tell of a run that did not live to write its summary."""
    train = [row for row in rows if "time/iterations" in row]
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    parts = {part: sum(row.get(f"time/{part}", 0.0) for row in train) for part in ("collect", "update", "evaluate")}
    clock = [0.0, *(row["time/time_elapsed"] for row in train)]
    # The clock of a run that goes on begins anew.
    elapsed = sum(now - before if now > before else now for before, now in pairwise(clock))
    steps = int(rows[-1]["global_step"]) if rows else 0
    return {
        "status": "running, or killed",
        "global_step": steps,
        "elapsed_time_sec": elapsed,
        "training_fps": steps / elapsed if elapsed else 0.0,
        "time_split": {**parts, "other": max(0.0, elapsed - sum(parts.values()))},
        "last_train_metrics": train[-1] if train else {},
        "last_eval_metrics": evaluations[-1] if evaluations else {},
        "best_train_metrics": _highest(train, "rollout/ep_rew_mean"),
        "best_eval_metrics": _highest(evaluations, "eval/mean_reward"),
        "train_history": train,
        "eval_history": evaluations,
        "episode_lengths": [],
    }


def _checkpoints(folder: Path) -> dict[str, str | None]:
    """Where every run has its checkpoints, if they are there."""
    files = {name: folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")}
    last, best = (str(file) if file.is_file() else None for file in files.values())
    return {"latest_checkpoint_path": last, "best_checkpoint_path": best}


def _highest(rows: list[dict[str, float]], name: str) -> dict[str, float]:
    return max((row for row in rows if name in row), key=lambda row: row[name], default={})


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is no JSON ({error}): delete it, or let the run go on, which writes it anew"
        ) from error


def _yaml(path: Path) -> dict[str, Any]:
    """A configuration; empty where it names Python objects, which only Python can read."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    return read if isinstance(read, dict) else {}
