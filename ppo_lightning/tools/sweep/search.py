"""A sweep from its arguments to its results: checks, the study, the trials."""

import contextlib
import io
import os
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml

from ppo_lightning.cli import CLI_OPTIONS, PPOCLI
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import LIMITS, converted
from ppo_lightning.ppo import PPO
from ppo_lightning.tools.sweep.fit_process import RunOptions
from ppo_lightning.tools.sweep.objective import (
    DIRECTIONS,
    PRUNE_POINTS,
    Objective,
    RunFailed,
    SearchSpec,
    SweepStopped,
    counted,
    first_attempts,
)
from ppo_lightning.tools.sweep.results import BASELINE, describe_trial, show, write_best, write_results
from ppo_lightning.tools.sweep.space import Range, Space, check_keys, points_of, read_space, with_values

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

HEARTBEAT_S, GRACE_S = 5, 120
"""How often a process reports that it works on its trials, and after how long without a report another one retries them."""
WAIT_S = 1.0


class SweepResult(NamedTuple):
    """The outcome of a sweep."""

    best_config: dict[str, Any]
    """Complete, as ``fit --config`` takes it."""
    best_file: Path
    """The same as YAML."""
    folder: Path
    """Of all results."""
    study: "Study"
    """Optuna's, with all trials."""


def sweep(
    config: str | Path | Mapping[str, Any],
    space: str | Path | Mapping[str, Any],
    *,
    trials: int = 20,
    objective: str | Sequence[str] = "score",
    metric: str = "eval/mean_reward",
    threshold: float | None = None,
    sampler: Literal["tpe", "random", "cmaes"] = "tpe",
    pruner: Literal["median", "none"] | None = None,
    seeds: int = 1,
    workers: int = 1,
    seed: int = 0,
    study: str | None = None,
    storage: str | None = None,
    folder: str | Path | None = None,
    flags: Sequence[str] = (),
    quiet: bool = False,
) -> SweepResult:
    """Search for the hyperparameters under which a config trains best.

    Every trial is a ``fit``, or one per seed, in a process and a folder of its own. A trial that fails is recorded with its
    message, and the sweep continues. The same call resumes a sweep that was stopped or killed.

    Args:
        config: YAML file that ``fit`` takes, or the same as a mapping.
        space: YAML file or mapping of the values to search, as :func:`read_space` takes it.
        trials: of the study in total, those of earlier calls included (count).
        objective: one or several of score (highest last value of the metric), steps_to (fewest environment steps until the
            metric reaches the threshold), steps and seconds (least cost of a run). Several give a Pareto front, and the
            first of them selects the best config.
        metric: a name in Lightning's callback_metrics; higher is better.
        threshold: value of the metric at which a run stops; steps_to needs it.
        sampler: Optuna's TPE, random search, or CMA-ES (which samples the values of lists at random).
        pruner: median stops a trial that is worse than the median of earlier trials at a 20th of its steps. It is the
            default with one objective.
        seeds: runs of each trial, one after the other; their mean counts (count).
        workers: trials that run at once on this machine (count).
        seed: of the sampler and the runs; several machines with one storage each need their own.
        study: its name; the default is the config's.
        storage: a database URL that Optuna takes, or a file that ends in .journal, either of which several machines may
            share; the default is an SQLite database in the folder. A journal has no heartbeat, so that trials of a killed
            process are not retried there.
        folder: of results; the default is sweeps/ and the study's name.
        flags: further arguments of ``fit``, as on the command line.
        quiet: print nothing.

    Raises:
        InputError: an argument is invalid, or no trial completed.
    """
    objectives = [objective] if isinstance(objective, str) else list(objective)
    ranges = read_space(space)
    _check(objectives, threshold, sampler, pruner, ranges, trials=trials, seeds=seeds, workers=workers)
    if study is None:
        study = "sweep" if isinstance(config, Mapping) else Path(config).stem
    place = (Path("sweeps") / study if folder is None else Path(folder)).resolve()
    base = _full_config(config, flags)
    _check_space(ranges, base)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {place} cannot be created ({error.strerror}): give another one") from error
    described = {key: vars(item) for key, item in ranges.items()}
    asked = {"objective": objectives, "metric": metric, "threshold": threshold, "seeds": seeds}
    spec = SearchSpec(ranges, base, objectives, place)
    options = RunOptions(metric, threshold, max(1, _cores() // workers) if workers > 1 else None)
    prunes = pruner != "none" and len(objectives) == 1
    with warnings.catch_warnings():
        opened = _open(storage or f"sqlite:///{place / 'study.db'}", study, objectives)
        _check_same_search(opened, {**asked, "space": described, "config": base})
        points = points_of(ranges, base)
        if points is not None and not opened.get_trials(deepcopy=False):
            opened.enqueue_trial(
                points, user_attrs={BASELINE: True}
            )  # so that the result is never worse than the config
        _run_trials(
            opened,
            Objective(spec, options, seed=seed, seeds=seeds, prunes=prunes),
            lambda index: _make_sampler(sampler, seed, index, trials),
            trials=trials,
            workers=workers,
            quiet=quiet,
        )
        best_config, best_file = write_results(opened, spec)
    if not quiet:
        show(opened, spec)
    return SweepResult(best_config, best_file, place, opened)


def _run_trials(
    study: "Study",
    objective: Objective,
    make_sampler: Callable[[int], Any],
    *,
    trials: int,
    workers: int,
    quiet: bool,
) -> None:
    """Run trials until the study has as many as asked for; an interrupt stops them all and queues each for a retry."""
    from optuna.storages import fail_stale_trials

    lock, waits = threading.Lock(), False

    def on_trial_end(study: "Study", trial: "FrozenTrial") -> None:
        with lock, objective.stops_on_error():  # each worker is a thread
            if trial.state.name == "COMPLETE":
                write_best(study, objective.spec)
            if not quiet and not objective.stop.is_set():
                print(describe_trial(study, trial.number, objective.spec), flush=True)
            if objective.stop.is_set() or len(counted(study)) >= trials:
                study.stop()
            study.sampler = make_sampler(len(first_attempts(study)))

    while True:
        fail_stale_trials(study)
        missing = trials - len(counted(study))
        if missing > 0:
            study.sampler = make_sampler(len(first_attempts(study)))
            given = {"n_trials": missing, "n_jobs": workers, "callbacks": [on_trial_end]}
            try:
                with ThreadPoolExecutor(1) as pool, objective.stops_on_error():  # Ctrl-C interrupts this thread only
                    pool.submit(study.optimize, objective, catch=(RunFailed, SweepStopped), **given).result()
            except Exception:  # Optuna raises one of three types when another process has ended the trial
                if not objective.lost:
                    raise
            objective.lost = False
            objective.stop.clear()
        else:
            others = sum(trial.state.name == "RUNNING" for trial in counted(study)[:trials])
            if not others or not _has_heartbeat(study):
                return
            if not waits and not quiet:
                print(f"waiting for {others} trials of other processes", flush=True)
            waits = True
            time.sleep(WAIT_S)


def _make_sampler(name: str, seed: int, index: int, trials: int) -> Any:
    """The sampler of a trial, with a seed of its own, so that a resumed sweep proposes what it would have proposed."""
    from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler

    # Hashed: with seed + index, machines with neighbouring seeds would propose the same trials.
    own = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    if name == "random":
        sampler: Any = RandomSampler(seed=own)
    elif name == "cmaes":
        sampler = CmaEsSampler(seed=own, warn_independent_sampling=False)
    else:
        sampler = TPESampler(seed=own, n_startup_trials=min(10, max(4, trials // 4)), constant_liar=True)
    sampler.reseed_rng = lambda: None  # Optuna reseeds for each trial of several workers
    return sampler


def _check(
    objectives: list[str], threshold: float | None, sampler: str, pruner: str | None, space: Space, **counts: int
) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be 1 or more, got {count}")
    unknown = [name for name in objectives if name not in DIRECTIONS]
    if unknown:
        raise InputError(f"objective {unknown[0]} is not known: take from {', '.join(DIRECTIONS)}")
    if not objectives or objectives[0] not in ("score", "steps_to") or len(set(objectives)) < len(objectives):
        raise InputError(
            f"objective must begin with score or steps_to and name each once, got {' '.join(objectives)!r}"
        )
    if "steps_to" in objectives and threshold is None:
        raise InputError("objective steps_to counts steps until a threshold: give one, such as --threshold 475")
    if sampler not in ("tpe", "random", "cmaes"):
        raise InputError(f"sampler must be tpe, random or cmaes, got {sampler}")
    if pruner not in ("median", "none", None):
        raise InputError(f"pruner must be median or none, got {pruner}")
    if len(objectives) > 1 and pruner == "median":
        raise InputError("pruner median compares one number, and there are several objectives: leave it out")
    if sampler == "cmaes" and len(objectives) > 1:
        raise InputError("sampler cmaes takes one objective, and there are several: take tpe or random")
    if sampler == "cmaes" and sum(isinstance(item, Range) for item in space.values()) < 2:
        raise InputError("sampler cmaes needs two ranges of numbers or more in the space: take tpe or random")


def _full_config(config: str | Path | Mapping[str, Any], flags: Sequence[str] = (), what: str = "") -> dict[str, Any]:
    """A config with all defaults, as ``fit`` has it.

    Raises:
        InputError: ``fit`` would refuse it.
    """
    if isinstance(config, Mapping):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
            try:
                return _full_config(file, flags)
            except InputError as error:
                raise InputError((what or "config: ") + str(error).removeprefix(f"{file}: ")) from error
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):  # --print_config exits
        PPOCLI(PPO, **CLI_OPTIONS, args=["fit", f"--config={config}", *flags, "--print_config"])
    return yaml.safe_load(printed.getvalue())


def _check_space(space: Space, config: dict[str, Any]) -> None:
    """Parse configs at both ends of the ranges, and with every value of the lists.

    Raises:
        InputError: one of them cannot be trained.
    """
    check_keys(space, config)
    examples = {key: item.examples() for key, item in space.items()}
    for index in range(max(map(len, examples.values()))):
        tried = with_values(config, {key: values[index % len(values)] for key, values in examples.items()})
        full = _full_config(tried, what="space: ")
        try:
            converted(PPO.__init__, {name: full["model"][name] for name in LIMITS}, limits=LIMITS)
        except InputError as error:
            raise InputError(f"space: {error}") from error


def _open(storage: str, name: str, objectives: list[str]) -> "Study":
    """Create the study, or load it if it is there."""
    try:
        import optuna
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
        from optuna.storages.journal import JournalFileBackend
        from sqlalchemy.exc import DBAPIError
    except ImportError as error:
        raise InputError('a sweep needs Optuna: pip install "ppo-lightning[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats and plots; :func:`sweep` restores the filters
    tries = 5
    while True:
        tries -= 1
        try:
            if storage.endswith(".journal"):
                opened: Any = JournalStorage(JournalFileBackend(storage))
            else:
                opened = RDBStorage(
                    storage,
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
            study = optuna.create_study(
                storage=opened,
                study_name=name,
                directions=[DIRECTIONS[objective] for objective in objectives],
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_warmup_steps=PRUNE_POINTS // 5),
            )
            break
        except Exception as error:  # each database driver raises errors of its own, also where it is not installed
            if tries and isinstance(error, DBAPIError):
                time.sleep(
                    random.uniform(0.1, 1.0)
                )  # another process that starts at the same moment creates the tables
                continue
            message = " ".join(str(error).split())[:200]
            raise InputError(f"storage {storage} cannot be opened ({message}): correct the URL or file") from error
    if isinstance(opened, RDBStorage):
        for trial in study.get_trials(deepcopy=False):  # Optuna never retries a trial killed before its first heartbeat
            if trial.state.name == "RUNNING":
                opened.record_heartbeat(trial._trial_id)
    return study


def _has_heartbeat(study: "Study") -> bool:
    """Whether the storage notices that another process has died."""
    from optuna.storages import JournalStorage

    return not isinstance(study._storage, JournalStorage)


def _check_same_search(study: "Study", search: dict[str, Any]) -> None:
    """Store what a new study searches for.

    Raises:
        InputError: the study exists and searches for something else.
    """
    if "search" not in study.user_attrs:
        study.set_user_attr("search", search)
        return
    before = study.user_attrs["search"]
    different = [name for name, value in _plain(search).items() if before[name] != value]
    if different:
        raise InputError(
            f"study {study.study_name} was begun with another {different[0]}: give this one a name of its own (--study), or "
            "resume with the arguments of that study"
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON stores them."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
