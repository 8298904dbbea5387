"""Trials: which are begun, what their runs tell, when they end, and whose they are."""

import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ppo_lightning.tools.sweep.results import OWN, Sought, describe_trial, made_again, write_best
from ppo_lightning.tools.sweep.runs import Row, Run, Watched, end_all, prepare
from ppo_lightning.tools.sweep.space import with_values

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    "score": "maximize",
    "steps_to": "minimize",
    "steps": "minimize",
    "seconds": "minimize",
}
LOOKS = 20
"""Times in a run at which a pruner may end it, evenly over its environment steps: when PPO evaluates by default."""
POLL_S = 0.1
STAMP_S, STALE_S = 20.0, 120.0
"""How often a machine says that it works on its trials, and without that for how long a trial is left behind."""


class Proposals(NamedTuple):
    """How trials are proposed."""

    sampler: str
    seed: int
    trials: int
    """In all (count)."""

    def next(self, index: int) -> Any:
        """Optuna's sampler for a trial, with random numbers of its own: a sweep that goes on proposes what it would have."""
        from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler

        # Of the pair: machines whose seeds are neighbours would otherwise propose the same, one index apart.
        seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        if self.sampler == "random":
            return RandomSampler(seed=seed)
        if self.sampler == "cmaes":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return TPESampler(seed=seed, n_startup_trials=min(10, max(4, self.trials // 4)), constant_liar=True)


def measure(rows: Sequence[Row], objective: str, threshold: float | None, budget: int) -> float:
    """One run's number for one objective.

    A run that never reaches the threshold counts as ``budget`` steps, and as many again times the share that it lacks: worse
    than every run that does, and better the nearer it came.

    Args:
        rows: what the run has told, the last of them finite.
        objective: a key of :data:`DIRECTIONS`.
        threshold: of steps_to, in the metric's units.
        budget: environment steps that the longest of all trials may take.
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


def counted(study: "Study") -> "list[FrozenTrial]":
    """Trials that train or have trained: those that were broken off count when they are made again."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    again = made_again(trials)
    return [trial for trial in trials if trial.state != TrialState.WAITING and trial.number not in again]


def put_back(study: "Study", trial: "FrozenTrial | Trial") -> None:
    """Note that a trial was broken off, and that it is to be made again, unless another machine has done so."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):  # Optuna's, of a trial that has ended
        return
    own = {OWN: True} if OWN in trial.user_attrs else {}
    study.enqueue_trial(trial.params, user_attrs={"again": trial.number, **own})


def put_back_what_is_left(study: "Study") -> None:
    """Put back the trials of processes that are gone."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_left(trial):
            put_back(study, trial)


def is_left(trial: "FrozenTrial") -> bool:
    """Whether nobody works on a running trial any more: a dead process of this machine, or one long silent."""
    began = trial.datetime_start
    seen = trial.user_attrs["seen"] if "seen" in trial.user_attrs else began.timestamp() if began else 0.0
    if time.time() - seen > STALE_S:
        return True
    host, _, process = trial.user_attrs["owner"].partition(" ") if "owner" in trial.user_attrs else ("", "", "")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@dataclass
class _Running:
    """A trial that trains."""

    trial: "Trial"
    index: int
    """How many trials were begun before it; of one that is made again, the first time."""
    total_steps: int
    """Environment steps of each of its runs."""
    run: Run
    looked: int = 0
    """The last of the looks at its first run."""
    done: list[list[Row]] = field(default_factory=list)
    """What each of its ended runs has told."""


class Search:
    """Begins trials and follows them until there are as many as were asked for.

    Args:
        study: with all trials of all machines.
        sought: what is searched, and for what.
        watched: what each run is to tell.
        proposals: of hyperparameters.
        prunes: trials may be ended early.
        seeds: runs of each trial (count).
        workers: trials at once (count).
        quiet: print nothing.
    """

    def __init__(
        self,
        study: "Study",
        sought: Sought,
        watched: Watched,
        proposals: Proposals,
        *,
        prunes: bool,
        seeds: int,
        workers: int,
        quiet: bool,
    ) -> None:
        self.study, self.sought, self.watched, self.proposals = study, sought, watched, proposals
        self.prunes, self.seeds, self.workers, self.quiet = prunes, seeds, workers, quiet
        self.running: list[_Running] = []
        self.stamped, self.waits = time.monotonic(), False

    def run(self) -> None:
        """Train all trials; what ends this early, ends their runs, and they are put back."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            put_back_what_is_left(self.study)
            while True:
                while len(self.running) < self.workers and len(counted(self.study)) < self.proposals.trials:
                    self._begin()
                if not self.running and not self._others():
                    return
                time.sleep(POLL_S)
                stamps = self._is_time_to_stamp()
                for each in list(self.running):
                    try:
                        if stamps or each.run.process.poll() is not None:
                            each.trial.set_user_attr("seen", time.time())
                        self._follow(each)
                    except UpdateFinishedTrialError:
                        # After a long silence, such as sleep: another machine has put it back.
                        end_all([each.run])
                        self.running.remove(each)
                if stamps:
                    put_back_what_is_left(self.study)
        except BaseException:
            end_all([each.run for each in self.running])
            for each in self.running:
                put_back(self.study, each.trial)
            raise

    def _others(self) -> bool:
        """Whether other processes train the last of the trials: what they leave unfinished is made here."""
        from optuna.trial import TrialState

        others = sum(trial.state == TrialState.RUNNING for trial in counted(self.study)[: self.proposals.trials])
        if others and not self.waits and not self.quiet:
            print(f"waiting for {others} of other processes", flush=True)
        self.waits = others > 0
        return self.waits

    def _begin(self) -> None:
        sought, index = self.sought, len(counted(self.study))
        self.study.sampler = self.proposals.next(index)
        trial = self.study.ask({key: of.distribution() for key, of in sought.space.items()})
        trial.set_user_attr("owner", f"{socket.gethostname()} {os.getpid()}")
        trial.set_user_attr("seen", time.time())
        config = with_values(sought.config, {key: of.value(trial.params[key]) for key, of in sought.space.items()})
        prepare(self._folder(trial), config)
        self.running.append(_Running(trial, index, config["model"]["total_steps"], self._train(trial, index, 0)))

    def _folder(self, trial: "Trial") -> Path:
        return self.sought.folder / "trials" / f"{trial.number:04}"

    def _train(self, trial: "Trial", index: int, run: int) -> Run:
        return Run(self._folder(trial), self.proposals.seed + index * self.seeds + run, self.watched)

    def _is_time_to_stamp(self) -> bool:
        """Whether to tell other machines that this one works on its trials, and to see whether they work on theirs."""
        if time.monotonic() - self.stamped < STAMP_S:
            return False
        self.stamped = time.monotonic()
        return True

    def _follow(self, each: _Running) -> None:
        """See what a trial's run has told, and whether it has ended."""
        ended = each.run.process.poll() is not None
        rows = each.run.rows()
        if not ended:
            if self._is_hopeless(each, rows):
                end_all([each.run])
                self._tell(each, "PRUNED")
            return
        failure = each.run.failure()
        each.run.close()
        if failure is not None:
            each.trial.set_user_attr("error", failure)
            self._tell(each, "FAIL")
            return
        each.done.append(rows)
        if len(each.done) < self.seeds:
            each.run = self._train(each.trial, each.index, len(each.done))
        else:
            self._tell(each, "COMPLETE")

    def _is_hopeless(self, each: _Running, rows: list[Row]) -> bool:
        """Report the first run at each look to the pruner, and ask it."""
        if not self.prunes or each.done or not rows:
            return False
        look = LOOKS * rows[-1].steps // each.total_steps
        if look == each.looked:
            return False
        each.looked = look
        sign = 1 if DIRECTIONS[self.sought.objectives[0]] == "maximize" else -1
        each.trial.report(sign * rows[-1].value, look)
        return each.trial.should_prune()

    def _tell(self, each: _Running, state: Literal["COMPLETE", "PRUNED", "FAIL"]) -> None:
        from optuna.trial import TrialState

        numbers = None
        if state == "COMPLETE":
            numbers = [
                sum(measure(rows, name, self.watched.threshold, self.sought.budget) for rows in each.done)
                / len(each.done)
                for name in self.sought.objectives
            ]
        self.study.tell(each.trial, numbers, TrialState[state])
        self.running.remove(each)
        if state == "COMPLETE":
            write_best(self.study, self.sought)
        if not self.quiet:
            print(describe_trial(self.study, each.trial.number, self.sought), flush=True)
