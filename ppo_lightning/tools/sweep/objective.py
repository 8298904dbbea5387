"""The objective of a study: trains the runs of one trial and measures them."""

import math
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ppo_lightning.tools.sweep.fit_process import FitProcess, Measurement, RunOptions
from ppo_lightning.tools.sweep.space import Space, with_values

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    "score": "maximize",
    "steps_to": "minimize",
    "steps": "minimize",
    "seconds": "minimize",
}
PRUNE_POINTS = 20
"""Points of a run at which the pruner may stop it, evenly over its environment steps: as often as PPO evaluates by default."""
POLL_S = 0.1


class SweepStopped(Exception):  # noqa: N818 - not an error: the sweep was interrupted
    """The sweep stops before the trial has ended."""


class RunFailed(Exception):  # noqa: N818 - an outcome of a trial, which Optuna records
    """A run of the trial failed."""


@dataclass(frozen=True)
class SearchSpec:
    """What a sweep searches, and for what."""

    space: Space
    config: Mapping[str, Any]
    """The complete base config; a trial replaces its values of the space."""
    objectives: list[str]
    """Keys of :data:`DIRECTIONS`."""
    folder: Path
    """Of all results."""

    @property
    def budget(self) -> int:
        """Environment steps of the longest possible trial."""
        longest = int(self.config["model"]["total_steps"])
        steps = self.space.get("model.total_steps")
        return longest if steps is None else max(longest, *steps.examples())

    def values(self, trial: "FrozenTrial | Trial") -> dict[str, Any]:
        """The config values that a trial searches."""
        return {key: self.space[key].value(point) for key, point in trial.params.items()}


def objective_value(rows: Sequence[Measurement], objective: str, threshold: float | None, budget: int) -> float:
    """The value of one run for one objective.

    A run that never reaches the threshold counts as ``budget`` steps, plus as many times the share that it lacks: worse than
    every run that reaches it, and better the nearer it came.

    Args:
        rows: measurements of the run, the last of them finite.
        objective: a key of :data:`DIRECTIONS`.
        threshold: of steps_to, in the metric's units.
        budget: environment steps of the longest possible trial.
    """
    if objective == "score":
        return rows[-1].value
    if objective == "seconds":
        return rows[-1].seconds
    if objective == "steps" or threshold is None:
        return rows[-1].steps
    reached = [row.steps for row in rows if row.value >= threshold]
    if reached:
        return reached[0]
    values = [row.value for row in rows if math.isfinite(row.value)]
    return budget * (1 + (threshold - max(values)) / (threshold - values[0]))


def retry_history(trial: "FrozenTrial") -> list[int]:
    """Numbers of the trials that this one repeats, oldest first."""
    return trial.system_attrs.get("retry_history", [])


def retried(trials: "Sequence[FrozenTrial]") -> set[int]:
    """Numbers of the trials that were interrupted and that a later trial repeats."""
    return {number for trial in trials for number in retry_history(trial)}


def counted(study: "Study") -> "list[FrozenTrial]":
    """Trials that have ended or are running, without those that a later trial repeats."""
    trials = study.get_trials(deepcopy=False)
    again = retried(trials)
    return [trial for trial in trials if trial.state.name != "WAITING" and trial.number not in again]


def first_attempts(study: "Study") -> "list[FrozenTrial]":
    """Trials that repeat no other one."""
    return [trial for trial in study.get_trials(deepcopy=False) if not retry_history(trial)]


def retry(study: "Study", trial: "FrozenTrial") -> None:
    """Queue a trial that repeats an interrupted one."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    RetryHeartbeatStaleTrialCallback()(study, trial)


class Objective:
    """Trains a trial's runs one after the other and returns the mean of each objective; Optuna calls it from threads.

    Args:
        spec: of the search.
        options: of all runs.
        seed: of the first run of the first trial; every run has its own.
        seeds: runs per trial (count).
        prunes: the pruner may stop trials early.
    """

    def __init__(self, spec: SearchSpec, options: RunOptions, *, seed: int, seeds: int, prunes: bool) -> None:
        self.spec, self.options = spec, options
        self.seed, self.seeds, self.prunes = seed, seeds, prunes
        self.stop = threading.Event()
        """Set to stop all trials; each is queued for a retry."""
        self.lost = False
        """Another process took over a trial of this one, for instance while this machine slept."""

    @contextmanager
    def stops_on_error(self) -> Iterator[None]:
        """Stop all trials when the block raises."""
        try:
            yield
        except BaseException:
            self.stop.set()
            raise

    def __call__(self, trial: "Trial") -> list[float]:
        """Train a trial.

        Raises:
            TrialPruned: the pruner stopped it.
            RunFailed: a run failed; its message is the trial's attribute ``error``.
            SweepStopped: the sweep was interrupted, and the trial will be repeated.
        """
        from optuna.exceptions import TrialPruned

        try:
            runs = self._train(trial)
        except (TrialPruned, RunFailed):
            raise
        except BaseException:
            if self._is_ours(trial):
                self.stop.set()
                retry(trial.study, trial.study.get_trials(deepcopy=False)[trial.number])
            raise
        self._is_ours(trial)
        threshold, budget = self.options.threshold, self.spec.budget
        return [
            statistics.fmean(objective_value(rows, name, threshold, budget) for rows in runs)
            for name in self.spec.objectives
        ]

    def _train(self, trial: "Trial") -> list[list[Measurement]]:
        """Measurements of each of the trial's runs."""
        points = {key: item.suggest(trial, key) for key, item in self.spec.space.items()}
        config = with_values(
            self.spec.config, {key: self.spec.space[key].value(point) for key, point in points.items()}
        )
        folder = self.spec.folder / "trials" / f"{trial.number:04}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        trials = trial.study.get_trials(deepcopy=False)
        first = [*retry_history(trials[trial.number]), trial.number][0]
        index = sum(not retry_history(before) for before in trials[:first])
        runs = []
        for run in range(self.seeds):
            process = FitProcess(folder, self.seed + index * self.seeds + run, self.options)
            try:
                self._follow(trial, process, config["model"]["total_steps"] if self.prunes and run == 0 else None)
            finally:
                process.stop()
            failure = process.failure()
            if failure is not None:
                trial.set_user_attr("error", failure)
                raise RunFailed(failure)
            runs.append(process.measurements())
        return runs

    def _follow(self, trial: "Trial", process: FitProcess, total_steps: int | None) -> None:
        """Wait for a run; with ``total_steps``, report its metric at each prune point to the pruner."""
        from optuna.exceptions import TrialPruned

        sign, reported = 1 if DIRECTIONS[self.spec.objectives[0]] == "maximize" else -1, 0
        while process.is_running():
            if self.stop.wait(POLL_S):
                raise SweepStopped
            rows = [] if total_steps is None else process.measurements()
            point = PRUNE_POINTS * rows[-1].steps // (total_steps or 1) if rows else 0
            if point != reported:
                reported = point
                trial.report(sign * rows[-1].value, point)
                if trial.should_prune():
                    raise TrialPruned

    def _is_ours(self, trial: "Trial") -> bool:
        """Whether no other process has taken over the trial."""
        taken = trial.study.get_trials(deepcopy=False)[trial.number].state.is_finished()
        self.lost = self.lost or taken
        return not taken
