"""The results of a sweep: the best config, a table of trials, and plots."""

import csv
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.tools.sweep.objective import SearchSpec, retried
from ppo_lightning.tools.sweep.space import short_names

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BASELINE = "baseline"
"""Attribute of the trial with the values of the config itself."""
SHOWN = 20
"""Trials in the printed table; ``trials.csv`` has all."""
MIN_TRIALS = 4
"""Trials that an estimate of importance needs."""
INTERRUPTED = "interrupted and retried"
LABELS = {
    "score": "score",
    "steps_to": "environment steps to the threshold",
    "steps": "environment steps",
    "seconds": "seconds of training",
}
FILES = {
    "best": "best.yaml",
    "front": "front",
    "trials": "trials.csv",
    "history": "history.png",
    "importance": "importance.png",
    "front plot": "front.png",
}


def _best_first(study: "Study", trials: "list[FrozenTrial]") -> "list[FrozenTrial]":
    """Completed trials by the first objective."""
    return sorted(trials, key=lambda trial: trial.values[0], reverse=study.directions[0].name == "MAXIMIZE")


def write_best(study: "Study", spec: SearchSpec) -> tuple[dict[str, Any], Path]:
    """Write the config of the best trial so far; returns it and its file."""
    best, file = _best_first(study, study.best_trials)[0], spec.folder / "best.yaml"
    write_atomically(file, _with_origin(study, best, spec).encode())
    return spec.config_of(best.params), file


def _with_origin(study: "Study", trial: "FrozenTrial", spec: SearchSpec) -> str:
    """The config of a trial as YAML, with its origin as a comment."""
    numbers = ", ".join(
        f"{name} {_number(value)}" for name, value in zip(spec.options.objectives, trial.values, strict=True)
    )
    values = "".join(f"#   {key}: {_text(value)}\n" for key, value in spec.values(trial.params).items())
    head = f"# Trial {trial.number} of study {study.study_name}: {numbers}. Searched values:\n{values}"
    return head + yaml.safe_dump(spec.config_of(trial.params), sort_keys=False)


def write_results(study: "Study", spec: SearchSpec) -> tuple[dict[str, Any], Path]:
    """Write the best config, the Pareto front's configs, the table of trials and the plots.

    Returns:
        The best config, and its file.

    Raises:
        InputError: no trial completed.
    """
    _write_table(study, spec)
    if not study.best_trials:
        trials = study.get_trials(deepcopy=False)
        errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        why = f"; the last failed: {errors[-1]}" if errors else ""
        raise InputError(f"no trial of study {study.study_name} completed (see {spec.folder / 'trials'}){why}")
    if len(spec.options.objectives) > 1:
        place = spec.folder / "front"
        place.mkdir(exist_ok=True)
        for old in place.glob("*.yaml"):
            old.unlink()
        for trial in study.best_trials:
            (place / f"{trial.number:04}.yaml").write_text(_with_origin(study, trial, spec))
    plot_study(study, spec)
    return write_best(study, spec)


def describe_trial(study: "Study", number: int, spec: SearchSpec) -> str:
    """One line about an ended trial."""
    trials = study.get_trials(deepcopy=False)
    trial, again = trials[number], retried(trials)
    names = short_names(list(spec.space))
    values = "  ".join(f"{names[key]} {_text(value)}" for key, value in spec.values(trial.params).items())
    done = sum(each.state.is_finished() and each.number not in again for each in trials)
    if trial.state.name == "FAIL":
        found = f"failed: {trial.user_attrs['error']}"
    elif trial.state.name == "PRUNED":
        found = "pruned"
    else:
        numbers = zip(spec.options.objectives, _numbers(trial, spec), strict=True)
        found = "  ".join(f"{name} {text}" for name, text in numbers)
    return f"trial {_name(trial)} ({done} ended): {found}  |  {values}"


def show(study: "Study", spec: SearchSpec) -> None:
    """Print the best trials and the paths of all results."""
    trials = study.get_trials(deepcopy=False)
    again, names = retried(trials), short_names(list(spec.space))
    states = [INTERRUPTED if trial.number in again else trial.state.name.lower() for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{study.study_name}: {counts}", title_justify="left"
    )
    for name in ("trial", *spec.options.objectives):
        table.add_column(name, justify="right", no_wrap=True)
    for name in names.values():
        table.add_column(name.replace("_", "_\n").replace(".", ".\n"), justify="right", overflow="fold")
    ended = [trial for trial in trials if trial.state.is_finished() and trial.number not in again]
    ranked = _best_first(study, [trial for trial in ended if trial.state.name == "COMPLETE"])
    ranked += [trial for trial in ended if trial.state.name != "COMPLETE"]
    best = {trial.number for trial in study.best_trials}
    for trial in ranked[:SHOWN]:
        values = spec.values(trial.params)
        table.add_row(
            f"{'★ ' if trial.number in best else ''}{_name(trial)}",
            *_numbers(trial, spec),
            *[_text(values.get(key, "")) for key in names],
            style="bold" if trial.number in best else None,
        )
    console = Console()
    console.print()
    console.print(table)
    if len(ranked) > SHOWN:
        console.print(f"  and {len(ranked) - SHOWN} more in trials.csv")
    for what, file in FILES.items():
        if (spec.folder / file).exists():
            print(f"  {what:<12} {spec.folder / file}")
    print(f"  train it     python -m ppo_lightning fit --config {spec.folder / 'best.yaml'}")


def _name(trial: "FrozenTrial") -> str:
    return "config" if BASELINE in trial.user_attrs else str(trial.number)


def _numbers(trial: "FrozenTrial", spec: SearchSpec) -> list[str]:
    """A trial's objective values as text."""
    objectives = spec.options.objectives
    if trial.state.name != "COMPLETE":
        return [{"PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]] + [""] * (len(objectives) - 1)
    return [
        f">{spec.budget:,}" if name == "steps_to" and value > spec.budget else _number(value)
        for name, value in zip(objectives, trial.values, strict=True)
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _write_table(study: "Study", spec: SearchSpec) -> None:
    objectives, trials = spec.options.objectives, study.get_trials(deepcopy=False)
    again = retried(trials)
    with (spec.folder / "trials.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", *objectives, *spec.space, "seconds_in_all", "error"])
        for trial in trials:
            numbers = trial.values if trial.state.name == "COMPLETE" else [""] * len(objectives)
            values = spec.values(trial.params)
            seconds = "" if trial.duration is None else round(trial.duration.total_seconds(), 1)
            error = trial.user_attrs.get("error", INTERRUPTED if trial.number in again else "")
            cells = [values.get(key, "") for key in spec.space]  # an interrupted trial may lack some
            rows.writerow([trial.number, trial.state.name.lower(), *numbers, *cells, seconds, error])


def plot_study(study: "Study", spec: SearchSpec) -> None:
    """``history.png``, ``importance.png`` from a few trials on, and ``front.png`` of several objectives."""
    import matplotlib
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    labels = [LABELS[name] for name in spec.options.objectives]
    sign = -1 if study.directions[0].name == "MAXIMIZE" else 1
    value: dict[str, Any] = {"target_name": labels[0]}
    loss = dict(value)
    if len(labels) > 1:  # with one objective, Optuna knows the direction
        value["target"] = lambda trial: trial.values[0]
        loss["target"] = lambda trial: sign * trial.values[0]
    drawn = {"history": lambda: plots.plot_optimization_history(study, **value)}
    if sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False)) >= MIN_TRIALS:
        evaluator = PedAnovaImportanceEvaluator()  # of being among the best tenth of trials
        drawn["importance"] = lambda: plots.plot_param_importances(study, evaluator, **loss)
    if len(labels) > 1:
        drawn["front"] = lambda: plots.plot_pareto_front(
            study, targets=lambda trial: trial.values[:2], target_names=labels[:2]
        )
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna sets a style
        warnings.filterwarnings("ignore", message="Target and region quantiles select the same")  # all trials are equal
        warnings.filterwarnings("ignore", message=".*to achieve low `target` values")
        for name, draw in drawn.items():
            figure: Any = draw().figure
            figure.set_size_inches(8, 4)
            figure.savefig(spec.folder / f"{name}.png", dpi=150, bbox_inches="tight")
            pyplot.close(figure)
