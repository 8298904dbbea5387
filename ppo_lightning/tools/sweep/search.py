"""From what is asked to what is found: checks, the study, the search, its results."""

import contextlib
import io
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from ppo_lightning.cli import OPTIONS, PPOCLI
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import LIMITS, converted
from ppo_lightning.ppo import PPO
from ppo_lightning.tools.sweep.results import OWN, Sought, leave_results, show
from ppo_lightning.tools.sweep.runs import Watched
from ppo_lightning.tools.sweep.space import Range, Space, check_keys, points_of, read_space, with_values
from ppo_lightning.tools.sweep.trials import DIRECTIONS, LOOKS, Proposals, Search

if TYPE_CHECKING:
    from optuna import Study


class Found(NamedTuple):
    """What a sweep has found."""

    best_config: dict[str, Any]
    """In full, as ``fit --config`` takes it."""
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
) -> Found:
    """Search for the hyperparameters under which a config trains best.

    Every trial is a ``fit``, or one per seed, in a process and a folder of its own. A trial that fails is a failed trial, with
    its message, and the sweep goes on. Called again in the same way, a sweep that was stopped or killed goes on.

    Args:
        config: YAML file that ``fit`` takes, or the same as a mapping.
        space: YAML file or mapping of what to search, as :func:`read_space` has it.
        trials: of the study in all, those of earlier calls included (count).
        objective: what is sought, one or several: score (highest last value of the metric), steps_to (fewest environment
            steps until the metric reaches the threshold), steps and seconds (least cost of a run). Several give a Pareto
            front, and the first of them chooses the best config.
        metric: a name in Lightning's callback_metrics; higher is better.
        threshold: value of the metric at which a run ends; steps_to needs it.
        sampler: Optuna's TPE, random search, or CMA-ES (which draws the values of lists at random).
        pruner: median ends a trial that at a 20th of its steps is worse than the median of those before, and is the default
            where there is one objective.
        seeds: runs of each trial, one after the other, whose mean counts (count).
        workers: trials that run at once on this machine (count).
        seed: of proposals and runs; several machines with one storage each take their own.
        study: its name; the default is the config's.
        storage: an URL that Optuna takes, or a file that ends in .journal, which several machines may share; the default is
            a database in the folder.
        folder: of results; the default is sweeps/ and the study's name.
        flags: more words for ``fit``, as on the command line.
        quiet: print nothing.

    Raises:
        InputError: something of this cannot be used, or no trial ended well.
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
        raise InputError(f"folder {place} cannot be made ({error.strerror}): give another one") from error
    opened = _open(storage or f"sqlite:///{place / 'study.db'}", study, objectives)
    described = {key: vars(of) for key, of in ranges.items()}
    search = {"objective": objectives, "metric": metric, "threshold": threshold, "seeds": seeds}
    _refuse_another(opened, {**search, "space": described, "config": base})
    sought = Sought(ranges, base, objectives, place)
    points = points_of(ranges, base)
    if points is not None and not opened.get_trials(deepcopy=False):
        opened.enqueue_trial(points, user_attrs={OWN: True})  # so that nothing found is worse than what there was
    Search(
        opened,
        sought,
        Watched(metric, threshold, threads=max(1, _cores() // workers) if workers > 1 else None),
        Proposals(sampler, seed, trials),
        prunes=pruner != "none" and len(objectives) == 1,
        seeds=seeds,
        workers=workers,
        quiet=quiet,
    ).run()
    best_config, best_file = leave_results(opened, sought)
    if not quiet:
        show(opened, sought)
    return Found(best_config, best_file, place, opened)


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
        raise InputError("sampler cmaes seeks one objective, and there are several: take tpe or random")
    if sampler == "cmaes" and sum(isinstance(of, Range) for of in space.values()) < 2:
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
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):  # which follows the config that it prints
        PPOCLI(PPO, **OPTIONS, args=["fit", f"--config={config}", *flags, "--print_config"])
    return yaml.safe_load(said.getvalue())


def _check_space(space: Space, config: dict[str, Any]) -> None:
    """Try configs at both ends of the ranges, and with every value of the lists.

    Raises:
        InputError: one of them cannot be trained.
    """
    check_keys(space, config)
    examples = {key: of.examples() for key, of in space.items()}
    for index in range(max(map(len, examples.values()))):
        tried = with_values(config, {key: values[index % len(values)] for key, values in examples.items()})
        full = _full_config(tried, what="space: ")
        try:
            converted(PPO.__init__, {name: full["model"][name] for name in LIMITS}, limits=LIMITS)
        except InputError as error:
            raise InputError(f"space: {error}") from error


def _open(storage: str, name: str, objectives: list[str]) -> "Study":
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from sqlalchemy.exc import DBAPIError
    except ImportError as error:
        raise InputError('a sweep needs Optuna: pip install "ppo-lightning[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tries = 5
    while True:
        tries -= 1
        try:
            return optuna.create_study(
                storage=JournalStorage(JournalFileBackend(storage)) if storage.endswith(".journal") else storage,
                study_name=name,
                directions=[DIRECTIONS[objective] for objective in objectives],
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_warmup_steps=LOOKS // 5),
            )
        except Exception as error:  # each database's driver, and its absence, raises its own
            if tries and isinstance(error, DBAPIError):
                time.sleep(random.uniform(0.1, 1.0))  # another that began at the same moment makes the tables
                continue
            message = " ".join(str(error).split())[:200]
            raise InputError(f"storage {storage} cannot be opened ({message}): correct the URL or file") from error


def _refuse_another(study: "Study", search: dict[str, Any]) -> None:
    """Refuse to go on with a study that sought something else; note what a new one seeks."""
    if "search" not in study.user_attrs:
        study.set_user_attr("search", search)
        return
    before = study.user_attrs["search"]
    different = [name for name, value in _plain(search).items() if before[name] != value]
    if different:
        raise InputError(
            f"study {study.study_name} was begun with another {different[0]}: give this one a name of its own (--study), or "
            "go on with what that had"
        )


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
