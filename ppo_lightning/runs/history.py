"""History of a run's metrics over environment steps, in bounded memory, and its summary."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

SUMMARY = "summary.json"
"""File in a run's folder that holds :func:`summarize_records`."""

LIMIT = 2048
"""Records of a history: more than a plot has pixels."""


class History:
    """Records of metrics over environment steps.

    A record is added per iteration or evaluation. Beyond ``limit``, every second record is dropped, and from then on only
    every second one is added, then every fourth, and so on. Records are never averaged. The last and the best one are kept.

    Args:
        best_by: metric whose highest value makes the best record.
        limit: records that are kept (count).
    """

    def __init__(self, best_by: str, limit: int = LIMIT) -> None:
        self.best_by, self.limit = best_by, limit
        self.every = 1
        """One record of so many is kept."""
        self.count = 0
        """Records that were added."""
        self.last: dict[str, float] | None = None
        """The newest record, with its environment step as ``step``."""
        self.best: dict[str, float] | None = None
        self._kept: list[dict[str, float]] = []

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a record of metrics, which may differ from those of the previous one, at ``step`` environment steps.

        Metrics at the step of the previous record complete that one.
        """
        if self.last is not None and self.last["step"] == step:
            self.last.update(metrics)
            return
        self.count += 1
        self.last = {"step": step, **metrics}
        highest = -math.inf if self.best is None else self.best[self.best_by]
        if highest < metrics.get(self.best_by, math.nan) < math.inf:  # NaN is not
            self.best = self.last
        if self.count % self.every == 0:
            self._kept.append(self.last)
        if len(self._kept) > self.limit:
            self.every *= 2
            self._kept = self._kept[1::2]

    def rows(self) -> list[dict[str, float]]:
        """The records that are kept, and the last one, oldest first, without NaN."""
        rows = self._kept if self.last is None or self.count % self.every == 0 else [*self._kept, self.last]
        return [{name: value for name, value in row.items() if value == value} for row in rows]

    def values(self, metric: str) -> list[float]:
        """A metric of the records that are kept, oldest first, without NaN."""
        values = (row.get(metric, math.nan) for row in self._kept)
        return [value for value in values if value == value]

    def state(self) -> dict[str, Any]:
        """All of it as plain data and one tensor [1 + metrics, R] of float64, which is faster to save than the records."""
        names = ["step", *dict.fromkeys(name for row in self._kept for name in row if name != "step")]
        table = [[row.get(name, math.nan) for row in self._kept] for name in names]
        return {
            "names": names[1:],
            "table": torch.tensor(table, dtype=torch.float64),
            "every": self.every,
            "count": self.count,
            "last": self.last,
            "best": self.best,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state` was taken of."""
        names = ["step", *state["names"]]
        rows = [zip(names, row, strict=True) for row in state["table"].T.tolist()]
        self._kept = [{name: value for name, value in row if value == value} for row in rows]
        self.every, self.count = state["every"], state["count"]
        self.last, self.best = state["last"], state["best"]


PARTS = ("collect", "update", "evaluate")
"""Parts of a run whose time is recorded."""


@dataclass
class Records:
    """Records of a run so far, including those before it was resumed."""

    train: History = field(default_factory=partial(History, "rollout/ep_rew_mean"))
    """One record per iteration."""
    evaluations: History = field(default_factory=partial(History, "eval/mean_reward"))
    """One record per evaluation."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("elapsed", *PARTS), 0.0))
    """Wall-clock time of training, and of each of :data:`PARTS`."""
    begun_at: int | None = None
    """Environment steps that the model had when the records began."""

    def add_iteration(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an iteration, at ``step`` environment steps, or complete its record."""
        is_new = self.train.last is None or self.train.last["step"] != step
        self.train.add(step, metrics)
        for part in ("collect", "update") if is_new else ():
            self.seconds[part] += metrics.get(f"time/{part}", 0.0)

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
    """Summary of a run under EmbodiChain's and ApexRL's keys, as valid JSON: NaN and infinity become None.

    Args:
        records: of the run.
        env_steps: trained so far, over all environments and ranks.
        iterations: so far.
        episodes: (return, length, success) of the last ones.
        latest_checkpoint: path.
        best_checkpoint: path.

    Returns:
        ``global_step``, ``elapsed_time_sec``, ``training_fps`` (environment steps per second, evaluations
        included), ``time_split`` (seconds), ``last_…``, ``best_train_metrics`` and ``…_eval_metrics``, ``train_history``
        and ``eval_history`` (records), ``latest_…`` and ``best_checkpoint_path``; ``history`` (columns), ``final_iteration``,
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
    """A record with its step under EmbodiChain's name, counts as integers; empty for None."""
    if row is None:
        return {}
    numbers = {name: int(value) if name in COUNTS else _finite(value) for name, value in row.items()}
    return {"global_step": numbers.pop("step"), **numbers}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
