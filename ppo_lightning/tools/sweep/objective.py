"""The options of a sweep, and the objective of its study: trains the runs of a trial and measures them."""

import math
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import ONE_OR_MORE, check_fields, usable_cores
from ppo_lightning.tools.sweep.fit_process import FitProcess, Measurement
from ppo_lightning.tools.sweep.space import Range, Space, with_values

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
class SweepOptions:
    """What to search for, and how.

    Raises:
        InputError: an option is invalid, or does not go with another one.
    """

    trials: int = field(default=20, metadata={"help": "of the study in total, those of earlier calls included (count)"})
    objective: str | Sequence[str] = field(
        default="score",
        metadata={
            "help": "one or several of score (highest last value of the metric), steps_to (fewest environment steps until "
            "the metric reaches the threshold), steps and seconds (least cost of a run). Several give a Pareto front, and "
            "the first of them selects the best config"
        },
    )
    metric: str = field(
        default="eval/mean_reward", metadata={"help": "a name in Lightning's callback_metrics; higher is better"}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "value of the metric at which a run stops; steps_to needs it"}
    )
    sampler: Literal["tpe", "random", "cmaes"] = field(
        default="tpe",
        metadata={"help": "Optuna's TPE, random search, or CMA-ES, which samples the values of lists at random"},
    )
    pruner: Literal["median", "none"] | None = field(
        default=None,
        metadata={
            "help": "median stops a trial that is worse than the median of earlier ones, asked at each 20th of its steps "
            "from the fourth on (default: median with one objective)"
        },
    )
    seeds: int = field(default=1, metadata={"help": "runs of each trial, whose mean counts (count)"})
    workers: int = field(default=1, metadata={"help": "trials at once on this machine (count)"})
    seed: int = field(default=0, metadata={"help": "of the sampler and the runs; machines that share a storage differ"})
    study: str | None = field(default=None, metadata={"help": "name (default: the config's)"})
    storage: str | None = field(
        default=None,
        metadata={
            "help": "database URL that Optuna takes, or a file.journal; machines may share either. A journal has no "
            "heartbeat: trials of a killed process are not retried there (default: an SQLite database in the folder)"
        },
    )
    folder: str | Path | None = field(default=None, metadata={"help": "of results (default: sweeps/STUDY)"})

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: one is invalid.
        """
        check_fields(self, trials=ONE_OR_MORE, seeds=ONE_OR_MORE, workers=ONE_OR_MORE)
        names = self.objectives
        unknown = [name for name in names if name not in DIRECTIONS]
        if unknown:
            raise InputError(f"objective {unknown[0]} is not known: take from {', '.join(DIRECTIONS)}")
        if not names or names[0] not in ("score", "steps_to") or len(set(names)) < len(names):
            raise InputError(f"objective must begin with score or steps_to and name each once, got {' '.join(names)!r}")
        if "steps_to" in names and self.threshold is None:
            raise InputError("objective steps_to counts steps until a threshold: give one, such as --threshold 475")
        if len(names) > 1 and self.pruner == "median":
            raise InputError("pruner median compares one number, and there are several objectives: leave it out")
        if len(names) > 1 and self.sampler == "cmaes":
            raise InputError("sampler cmaes takes one objective, and there are several: take tpe or random")

    @property
    def objectives(self) -> list[str]:
        """Keys of :data:`DIRECTIONS`."""
        return [self.objective] if isinstance(self.objective, str) else list(self.objective)

    @property
    def prunes(self) -> bool:
        """Whether the pruner may stop trials early."""
        return self.pruner != "none" and len(self.objectives) == 1


@dataclass(frozen=True)
class SearchSpec:
    """What a sweep searches, and for what."""

    space: Space
    config: Mapping[str, Any]
    """The complete base config; a trial replaces its values of the space."""
    folder: Path
    """Of all results."""
    options: SweepOptions

    def __post_init__(self) -> None:
        """Check the sampler.

        Raises:
            InputError: it does not suit the space.
        """
        ranges = sum(isinstance(item, Range) for item in self.space.values())
        if self.options.sampler == "cmaes" and ranges < 2:
            raise InputError("sampler cmaes needs two ranges of numbers or more in the space: take tpe or random")

    @property
    def budget(self) -> int:
        """The most environment steps that a trial may ask for."""
        longest = int(self.config["model"]["total_steps"])
        steps = self.space.get("model.total_steps")
        return longest if steps is None else max(longest, *steps.examples())

    def values(self, points: Mapping[str, Any]) -> dict[str, Any]:
        """Config values of the points that Optuna suggested."""
        return {key: self.space[key].value(point) for key, point in points.items()}

    def config_of(self, points: Mapping[str, Any]) -> dict[str, Any]:
        """The complete config of a trial with these points."""
        return with_values(self.config, self.values(points))


def objective_value(rows: Sequence[Measurement], objective: str, threshold: float | None, budget: int) -> float:
    """The value of one run for one objective.

    A run that never reaches the threshold counts as more than ``budget`` steps, and as fewer the nearer it came: as ``budget``
    · (2 - 1 / (1 + d)), where d is the distance of its best value from the threshold, in thresholds. One that reaches it counts
    as ``budget`` steps at most, though its last iteration may end beyond these.

    Args:
        rows: measurements of the run, the last of them finite.
        objective: a key of :data:`DIRECTIONS`.
        threshold: of steps_to, in the metric's units.
        budget: the most environment steps that a trial may ask for.
    """
    if objective == "score":
        return rows[-1].value
    if objective == "seconds":
        return rows[-1].seconds
    if objective == "steps" or threshold is None:
        return rows[-1].steps
    reached = [row.steps for row in rows if row.value >= threshold]
    if reached:
        return min(reached[0], budget)
    best = max(row.value for row in rows if math.isfinite(row.value))
    return budget * (2 - 1 / (1 + (threshold - best) / (abs(threshold) or 1)))


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


def first_attempts(trials: "Sequence[FrozenTrial]") -> int:
    """Number of trials that repeat no other one."""
    return sum(not retry_history(trial) for trial in trials)


def retry(study: "Study", trial: "FrozenTrial") -> None:
    """Queue a trial that repeats an interrupted one."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    RetryHeartbeatStaleTrialCallback()(study, trial)


class Objective:
    """Trains a trial's runs one after the other and returns the mean of each objective; Optuna calls it from threads.

    Args:
        spec: of the search. Every run of the study has a seed of its own.
    """

    def __init__(self, spec: SearchSpec) -> None:
        self.spec = spec
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
        threshold, budget = self.spec.options.threshold, self.spec.budget
        return [
            statistics.fmean(objective_value(rows, name, threshold, budget) for rows in runs)
            for name in self.spec.options.objectives
        ]

    def _train(self, trial: "Trial") -> list[list[Measurement]]:
        """Measurements of each of the trial's runs."""
        options = self.spec.options
        threads = max(1, usable_cores() // options.workers) if options.workers > 1 else None
        config = self.spec.config_of({key: item.suggest(trial, key) for key, item in self.spec.space.items()})
        folder = self.spec.folder / "trials" / f"{trial.number:04}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        trials = trial.study.get_trials(deepcopy=False)
        original = [*retry_history(trials[trial.number]), trial.number][0]
        first_seed = options.seed + first_attempts(trials[:original]) * options.seeds
        runs = []
        for index in range(options.seeds):
            process = FitProcess(folder, first_seed + index, options.metric, options.threshold, threads)
            try:
                self.follow(trial, process, config["model"]["total_steps"] if options.prunes and index == 0 else None)
            finally:
                process.stop()
            failure = process.failure()
            if failure is not None:
                trial.set_user_attr("error", failure)
                raise RunFailed(failure)
            runs.append(process.measurements())
        return runs

    def follow(self, trial: "Trial", process: FitProcess, total_steps: int | None) -> None:
        """Wait for a run; with ``total_steps``, report its metric at each prune point to the pruner.

        Raises:
            TrialPruned: the pruner stopped the trial.
            SweepStopped: the sweep was interrupted.
        """
        from optuna.exceptions import TrialPruned

        sign, reported = 1 if DIRECTIONS[self.spec.options.objectives[0]] == "maximize" else -1, 0
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
