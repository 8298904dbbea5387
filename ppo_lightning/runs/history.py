"""What a run was like: its metrics over environment steps, in bounded space, and the summary of them."""

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

SUMMARY = "summary.json"
"""File in a run's folder that holds :func:`summarize_records`."""

LIMIT = 2048
"""Rows of a history: more than a picture has pixels, half a megabyte of numbers at the most."""


class History:
    """Columns of metrics over environment steps.

    Rows are added one per iteration, or one per evaluation. Where there are more than ``limit``, every second one goes,
    and from then on every second one is taken, then every fourth, and so on: what is kept is what was added, never a
    mean of it. The last row and the best one are kept in any case.

    Args:
        best_by: metric whose highest value makes the best row.
        limit: rows that are kept (count).
    """

    def __init__(self, best_by: str, limit: int = LIMIT) -> None:
        self.best_by = best_by
        self.limit = limit
        self.steps = array("d")
        """[R] environment steps of the rows that are kept."""
        self.columns: dict[str, array[float]] = {}
        """[R] values of each metric; NaN where a row has none."""
        self.every = 1
        """One row of so many is kept."""
        self.count = 0
        """Rows that were added."""
        self.last: dict[str, float] | None = None
        """The newest row, with its environment step as ``step``."""
        self.best: dict[str, float] | None = None

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row.

        Args:
            step: environment steps so far.
            metrics: values by name; others than in the row before are no error.
        """
        self.count += 1
        self.last = {"step": step, **metrics}
        highest = -math.inf if self.best is None else self.best[self.best_by]
        if highest < metrics.get(self.best_by, math.nan) < math.inf:  # NaN is not
            self.best = self.last
        if self.count % self.every:
            return
        for name in metrics:  # in this order, which a set would not have: files do not depend on the hash seed
            if name in self.columns:
                continue
            self.columns[name] = array("d", [math.nan] * len(self.steps))
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(metrics.get(name, math.nan))
        if len(self.steps) > self.limit:
            self.every *= 2
            self.steps = self.steps[1::2]
            self.columns = {name: column[1::2] for name, column in self.columns.items()}

    def rows(self) -> list[dict[str, float]]:
        """The rows that are kept, and the last one, oldest first; without what is not a number."""
        names = ["step", *self.columns]
        rows = [dict(zip(names, row, strict=True)) for row in zip(self.steps, *self.columns.values(), strict=True)]
        if self.last is not None and self.count % self.every:
            rows.append(self.last)
        return [{name: value for name, value in row.items() if value == value} for row in rows]

    def state(self) -> dict[str, Any]:
        """All of it as plain data and one tensor [1 + metrics, R] of float64."""
        table = [self.steps, *self.columns.values()]
        return {
            "names": list(self.columns),
            "table": torch.tensor([column.tolist() for column in table], dtype=torch.float64),
            "every": self.every,
            "count": self.count,
            "last": self.last,
            "best": self.best,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state` was taken of."""
        steps, *columns = state["table"].tolist()
        self.steps = array("d", steps)
        self.columns = {name: array("d", column) for name, column in zip(state["names"], columns, strict=True)}
        self.every, self.count = state["every"], state["count"]
        self.last, self.best = state["last"], state["best"]


PARTS = ("collect", "update", "evaluate")
"""What a run's time is spent on, beside the rest."""


@dataclass
class Records:
    """What a run was like so far, over all its parts if it was stopped and went on."""

    train: History = field(default_factory=partial(History, "rollout/ep_rew_mean"))
    """One row per iteration."""
    evaluations: History = field(default_factory=partial(History, "eval/mean_reward"))
    """One row per evaluation."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("elapsed", *PARTS), 0.0))
    """Wall-clock time in training, and of it what went into :data:`PARTS`."""
    begun_at: int | None = None
    """Environment steps that the model had when the records began."""

    def state(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "train": self.train.state(),
            "evaluations": self.evaluations.state(),
            "seconds": dict(self.seconds),
            "begun_at": self.begun_at,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state` was taken of."""
        self.train.load_state(state["train"])
        self.evaluations.load_state(state["evaluations"])
        self.seconds, self.begun_at = dict(state["seconds"]), state["begun_at"]


def summarize_records(
    records: Records,
    *,
    env_steps: int,
    iterations: int,
    episodes: Iterable[tuple[float, ...]],
    latest_checkpoint: str | None,
    best_checkpoint: str | None,
) -> dict[str, Any]:
    """Summary of a run under EmbodiChain's keys and ApexRL's, in numbers that JSON has: None stands for NaN and infinity.

    Args:
        records: of the run.
        env_steps: trained so far, over all environments and processes.
        iterations: so far.
        episodes: (return, length, success) of the last ones.
        latest_checkpoint: path.
        best_checkpoint: path.

    Returns:
        ``global_step``, ``elapsed_time_sec``, ``training_fps`` (environment steps per second of all that, evaluations
        included), ``time_split`` (seconds), ``last_…``, ``best_train_metrics`` and ``…_eval_metrics``, ``train_history``
        and ``eval_history`` (rows), ``latest_…`` and ``best_checkpoint_path``; ``history`` (columns), ``final_iteration``,
        ``total_timesteps``; ``episode_returns`` and ``episode_lengths`` of the last 100 episodes.
    """
    rows = [_row(row) for row in records.train.rows()]
    elapsed = records.seconds["elapsed"]
    parts = {part: records.seconds[part] for part in PARTS}
    trained = env_steps - (records.begun_at or 0)
    window = list(episodes)
    return {
        "global_step": env_steps,
        "elapsed_time_sec": elapsed,
        "training_fps": trained / elapsed if elapsed else 0.0,
        "time_split": {**parts, "other": max(0.0, elapsed - sum(parts.values()))},
        "last_train_metrics": _row(records.train.last),
        "last_eval_metrics": _row(records.evaluations.last),
        "best_train_metrics": _row(records.train.best),
        "best_eval_metrics": _row(records.evaluations.best),
        "train_history": rows,
        "eval_history": [_row(row) for row in records.evaluations.rows()],
        "latest_checkpoint_path": latest_checkpoint,
        "best_checkpoint_path": best_checkpoint,
        "history": {name: [row.get(metric) for row in rows] for name, metric in APEXRL.items()},
        "final_iteration": iterations,
        "total_timesteps": env_steps,
        "episode_returns": [_finite(episode[0]) for episode in window],
        "episode_lengths": [int(episode[1]) for episode in window],
    }


APEXRL = {
    "iterations": "time/iterations",
    "timesteps": "global_step",
    "episode_rewards": "rollout/ep_rew_mean",
    "episode_lengths": "rollout/ep_len_mean",
    "policy_losses": "train/policy_gradient_loss",
    "value_losses": "train/value_loss",
}
"""Columns that ApexRL's ``learn`` returns, by the metric that each is."""

COUNTS = {"step", "time/iterations", "time/total_timesteps", "train/n_updates"}


def _row(row: Mapping[str, float] | None) -> dict[str, float | int | None]:
    """A row with its step under EmbodiChain's name, counts as whole numbers; empty where there is none."""
    if row is None:
        return {}
    numbers = {name: int(value) if name in COUNTS else _finite(value) for name, value in row.items()}
    return {"global_step": numbers.pop("step"), **numbers}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
