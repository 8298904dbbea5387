"""The tasks of learning.yaml, and the rows of their runs in results/."""

import csv
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
ROWS, CURVES = "learning.csv", "learning_curves.csv"
"""Files of results."""
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
    published: float | None = None
    source: str = ""
    random: float | None = None
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
        """Digest of the config and of what differs from it; comments in the config do not count."""
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
    """The rows of a task by its present settings, of the seeds that count, in their order."""
    wanted = task.name, task.settings  # once: the digest reads the config
    own = [row for row in rows if (row["task"], row["settings"]) == wanted and 1 <= row["seed"] <= task.seeds]
    return sorted(own, key=lambda row: row["seed"])
