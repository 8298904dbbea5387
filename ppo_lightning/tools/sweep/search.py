"""``python -m ppo_lightning sweep``, and :func:`sweep` from Python: checks, the study, the trials."""

import contextlib
import difflib
import io
import json
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import yaml

from ppo_lightning.arguments import PlainParser, import_from_here
from ppo_lightning.cli import CLI_OPTIONS, PPOCLI
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.parameters import LIMITS, converted, shown
from ppo_lightning.ppo import PPO
from ppo_lightning.tools.sweep.objective import (
    DIRECTIONS,
    PRUNE_POINTS,
    Objective,
    RunFailed,
    SearchSpec,
    SweepOptions,
    SweepStopped,
    counted,
    first_attempts,
)
from ppo_lightning.tools.sweep.results import BASELINE, describe_trial, show, write_best, write_results
from ppo_lightning.tools.sweep.space import Space, check_keys, points_of, read_space, value_at, with_values

if TYPE_CHECKING:
    from optuna import Study, Trial
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


def main(words: list[str]) -> None:
    """Run ``ppo-lightning sweep``; user errors are one sentence, with exit status 1."""
    parser = PlainParser(
        prog="ppo-lightning sweep",
        description="Search for hyperparameters with Optuna. All other options, such as --model.total_steps 50000, are "
        "those of fit. The same command resumes a sweep that was stopped.",
        allow_abbrev=False,
    )
    config_help = "config that fit takes; later ones override it, as with fit"
    parser.add_argument("--config", required=True, action="append", help=config_help)
    space_help = "YAML: key of the config: [value, …] or {distribution, min, max}; or a name in configs/sweeps"
    parser.add_argument("--space", required=True, help=space_help)
    kinds: dict[str, Any] = {
        **{name: {"type": int} for name in ("trials", "seeds", "workers", "seed")},
        "threshold": {"type": float},
        "objective": {"nargs": "+", "choices": DIRECTIONS},
        "sampler": {"choices": ("tpe", "random", "cmaes")},
        "pruner": {"choices": ("median", "none")},
    }
    for item in fields(SweepOptions):
        default = "" if item.default is None else f" (default: {item.default})"
        text = item.metadata["help"] + default
        parser.add_argument(f"--{item.name}", default=item.default, help=text, **kinds.get(item.name, {}))
    with exit_on_user_error():
        _check_spelling(words, [action.option_strings[-1] for action in parser._actions])
        given, flags = parser.parse_known_args(words)
        given.config, flags = given.config[0], [*(f"--config={file}" for file in given.config[1:]), *flags]
        before = signal.signal(signal.SIGTERM, _exit)
        try:
            sweep(**vars(given), flags=flags)
        except KeyboardInterrupt:
            print("\nstopped: the same command resumes", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        finally:
            signal.signal(signal.SIGTERM, before)


def _check_spelling(words: Sequence[str], options: list[str]) -> None:
    """Check the options of the sweep, before ``fit`` suggests keys of its own for a misspelt one.

    Raises:
        InputError: an argument is nearly an option of the sweep; those of ``fit`` have dots, or are --seed_everything.
    """
    for word in words:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, options, 1, cutoff=0.75)
        if name.startswith("--") and "." not in name and near and name not in options:
            raise InputError(f"sweep has no option {name}: did you mean {near[0]}?")


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def sweep(
    config: str | Path | Mapping[str, Any],
    space: str | Path | Mapping[str, Any],
    *,
    flags: Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> SweepResult:
    """Search for the hyperparameters under which a config trains best.

    Every trial is a ``fit``, or one per seed, in a process and a folder of its own. A trial that fails is recorded with its
    message, and the sweep continues. The same call resumes a sweep that was stopped or killed.

    Args:
        config: YAML file that ``fit`` takes, or the same as a mapping.
        space: YAML file or mapping of the values to search, as :func:`read_space` takes it.
        flags: further arguments of ``fit``, as on the command line.
        quiet: print nothing.
        options: the fields of :class:`SweepOptions`, such as ``trials`` and ``objective``.

    Raises:
        InputError: an argument is invalid, or no trial completed.
    """
    given, ranges = SweepOptions(**options), read_space(space)
    base = full_config(config, flags)
    if base["ckpt_path"] is not None:
        raise InputError("a sweep begins new runs: leave ckpt_path out")
    name = given.study or ("sweep" if isinstance(config, Mapping) else Path(config).stem)
    spec = SearchSpec(ranges, base, Path(given.folder or Path("sweeps") / name).resolve(), given)
    _check_space(ranges, base)
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {spec.folder} cannot be created ({error.strerror}): give another one") from error
    with warnings.catch_warnings():
        study = open_study(given.storage or f"sqlite:///{spec.folder / 'study.db'}", name, given.objectives)
        _check_same_search(study, spec)
        baseline = points_of(ranges, base)
        outside = [f"{key} {shown(value_at(base, key))}" for key, point in baseline.items() if point is None]
        if not study.get_trials(deepcopy=False):
            if not outside:
                study.enqueue_trial(baseline, user_attrs={BASELINE: True})  # the result is never worse than the config
            elif not quiet:
                print(f"the config itself is no trial, its {', '.join(outside)} lies outside of the space")
        _run_trials(study, Objective(spec), quiet)
        best_config, best_file = write_results(study, spec)
    if not quiet:
        show(study, spec)
    return SweepResult(best_config, best_file, spec.folder, study)


def _run_trials(study: "Study", objective: Objective, quiet: bool) -> None:
    """Run trials until the study has as many as asked for; an interrupt stops them all and queues each for a retry."""
    from optuna.storages import fail_stale_trials

    options, lock, waits = objective.spec.options, threading.Lock(), False

    def set_sampler() -> None:
        study.sampler = make_sampler(options, first_attempts(study.get_trials(deepcopy=False)))

    def on_trial_end(study: "Study", trial: "FrozenTrial") -> None:
        with lock, objective.stops_on_error():  # each worker is a thread
            if trial.state.name == "COMPLETE":
                write_best(study, objective.spec)
            if not quiet and not objective.stop.is_set():
                print(describe_trial(study, trial.number, objective.spec), flush=True)
            if objective.stop.is_set() or len(counted(study)) >= options.trials:
                study.stop()
            set_sampler()

    while True:
        fail_stale_trials(study)
        missing = options.trials - len(counted(study))
        if missing > 0:
            set_sampler()
            given = {"n_trials": missing, "n_jobs": options.workers, "callbacks": [on_trial_end]}
            try:
                with ThreadPoolExecutor(1) as pool, objective.stops_on_error():  # Ctrl-C interrupts this thread only
                    pool.submit(_optimize, study, objective, **given).result()
            except Exception:  # Optuna raises one of three types when another process has ended the trial
                if not objective.lost:
                    raise
            objective.lost = False
            objective.stop.clear()
        else:
            others = sum(trial.state.name == "RUNNING" for trial in counted(study)[: options.trials])
            if not others or not _has_heartbeat(study):
                return
            if not waits and not quiet:
                print(f"waiting for {others} trials of other processes", flush=True)
            waits = True
            time.sleep(WAIT_S)


def _optimize(study: "Study", objective: Objective, **given: Any) -> None:
    """Run trials; two threads at once would take the same waiting trial from SQLite, so they take them in turn."""
    lock, ask = threading.Lock(), study.ask

    def ask_in_turn(*args: Any, **kwargs: Any) -> "Trial":
        with lock:
            return ask(*args, **kwargs)

    study.ask = ask_in_turn
    try:
        study.optimize(objective, catch=(RunFailed, SweepStopped), **given)
    finally:
        del study.ask


def make_sampler(options: SweepOptions, index: int) -> Any:
    """The sampler of a trial, with a seed of its own, so that a resumed sweep proposes what it would have proposed.

    Args:
        options: of the sweep.
        index: number of trials before it, retries left out.
    """
    from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler

    # Hashed: with seed + index, machines with neighbouring seeds would propose the same trials.
    seed = int(np.random.SeedSequence([options.seed, index]).generate_state(1)[0])
    if options.sampler == "random":
        sampler: Any = RandomSampler(seed=seed)
    elif options.sampler == "cmaes":
        sampler = CmaEsSampler(seed=seed, warn_independent_sampling=False)
    else:
        startup = min(10, max(4, options.trials // 4))
        sampler = TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    sampler.reseed_rng = lambda: None  # Optuna reseeds for each trial of several workers
    return sampler


def full_config(config: str | Path | Mapping[str, Any], flags: Sequence[str] = (), what: str = "") -> dict[str, Any]:
    """A config with all defaults, as ``fit`` has it.

    Args:
        config: YAML file or mapping.
        flags: further arguments of ``fit``.
        what: begins an error message about a mapping.

    Raises:
        InputError: ``fit`` would refuse it.
    """
    if isinstance(config, Mapping):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
            try:
                return full_config(file, flags)
            except InputError as error:
                raise InputError((what or "config: ") + str(error).removeprefix(f"{file}: ")) from error
    import_from_here()
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
        full = full_config(tried, what="space: ")
        try:
            converted(PPO.__init__, {name: full["model"][name] for name in LIMITS}, limits=LIMITS)
        except InputError as error:
            raise InputError(f"space: {error}") from error


def open_study(storage: str, name: str, objectives: Sequence[str]) -> "Study":
    """Create the study, or load it if it is there.

    Args:
        storage: database URL, or a file that ends in .journal.
        name: of the study.
        objectives: keys of :data:`DIRECTIONS`.

    Raises:
        InputError: Optuna is not installed, or cannot open the storage.
    """
    try:
        import optuna
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
        from optuna.storages.journal import JournalFileBackend
        from sqlalchemy.exc import DBAPIError
        from sqlalchemy.pool import NullPool
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
                again = RetryHeartbeatStaleTrialCallback()
                opened = RDBStorage(
                    storage,
                    # Each connection to a file is closed after its use: nothing else would close the last one.
                    {"poolclass": NullPool} if storage.startswith("sqlite") else None,
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=again,
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
            if not (tries and isinstance(error, DBAPIError)):
                message = " ".join(str(error).split())[:200]
                raise InputError(f"storage {storage} cannot be opened ({message}): correct the URL or file") from error
            time.sleep(random.uniform(0.1, 1.0))  # another process that starts at the same moment creates the tables
    if _has_heartbeat(study):
        for trial in study.get_trials(deepcopy=False):  # Optuna never retries a trial killed before its first heartbeat
            if trial.state.name == "RUNNING":
                opened.record_heartbeat(trial._trial_id)
    return study


def _has_heartbeat(study: "Study") -> bool:
    """Whether the storage notices that another process has died."""
    from optuna.storages import JournalStorage

    return not isinstance(study._storage, JournalStorage)


def _check_same_search(study: "Study", spec: SearchSpec) -> None:
    """Store what a new study searches for.

    Raises:
        InputError: the study exists and searches for something else.
    """
    options = spec.options
    search: dict[str, Any] = {
        "objective": options.objectives,
        **{name: getattr(options, name) for name in ("metric", "threshold", "seeds")},
        "space": {key: vars(item) for key, item in spec.space.items()},
        "config": spec.config,
    }
    if "search" not in study.user_attrs:
        study.set_user_attr("search", search)
        return
    before = study.user_attrs["search"]
    different = [name for name, value in json.loads(json.dumps(search)).items() if before[name] != value]
    if different:
        raise InputError(
            f"study {study.study_name} was begun with another {different[0]}: give this one a name of its own (--study), or "
            "resume with the arguments of that study"
        )
