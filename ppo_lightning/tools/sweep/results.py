"""What a sweep leaves: the best config, a table of trials, and pictures."""

import csv
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ppo_lightning.errors import InputError
from ppo_lightning.tools.sweep.space import Space, short_names, with_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna import Study
    from optuna.trial import FrozenTrial

OWN = "own"
"""Attribute of the trial with the values that the config has itself."""
SHOWN = 20
"""Trials in the table that is printed; ``trials.csv`` has all."""
ENOUGH = 4
"""Trials from which on something can be said about importance."""


@dataclass(frozen=True)
class Sought:
    """What is searched, and for what."""

    space: Space
    config: Mapping[str, Any]
    """In full, whose values in the space are replaced."""
    objectives: list[str]
    folder: Path
    """Of all results."""

    @property
    def budget(self) -> int:
        """Environment steps that the longest of all trials may take."""
        longest = int(self.config["model"]["total_steps"])
        steps = self.space.get("model.total_steps")
        return longest if steps is None else max(longest, *steps.examples())

    def values(self, trial: "FrozenTrial") -> dict[str, Any]:
        """A trial's values of the config."""
        return {key: self.space[key].value(point) for key, point in trial.params.items()}


def made_again(trials: "Sequence[FrozenTrial]") -> set[int]:
    """Numbers of the trials that were broken off and are made again: they are no trials of their own."""
    return {trial.user_attrs["again"] for trial in trials if "again" in trial.user_attrs}


def front(study: "Study") -> "list[FrozenTrial]":
    """Trials that no other is better than, the best by the first objective first."""
    sign = -1 if study.directions[0].name == "MAXIMIZE" else 1
    return sorted(study.best_trials, key=lambda trial: sign * trial.values[0])


def write_best(study: "Study", sought: Sought) -> tuple[dict[str, Any], Path]:
    """Write the config of the best trial so far, whole or not at all."""
    best = front(study)[0]
    config = with_values(sought.config, sought.values(best))
    file = sought.folder / "best.yaml"
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(_with_origin(study, best, sought, config))
    unfinished.replace(file)
    return config, file


def _with_origin(study: "Study", trial: "FrozenTrial", sought: Sought, config: dict[str, Any]) -> str:
    numbers = ", ".join(f"{name} {_number(value)}" for name, value in zip(sought.objectives, trial.values, strict=True))
    values = "".join(f"#   {key}: {_text(value)}\n" for key, value in sought.values(trial).items())
    head = f"# Trial {trial.number} of study {study.study_name}: {numbers}. It was searched for\n{values}"
    return head + yaml.safe_dump(config, sort_keys=False)


def leave_results(study: "Study", sought: Sought) -> tuple[dict[str, Any], Path]:
    """Write the best config, the Pareto front's configs, the table of trials and the pictures.

    Returns:
        The best config, and its file.

    Raises:
        InputError: no trial ended well.
    """
    _write_table(study, sought)
    if not study.best_trials:
        said = [trial.user_attrs["error"] for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs]
        why = f"; the last failed: {said[-1]}" if said else ""
        raise InputError(f"no trial of study {study.study_name} ended well (see {sought.folder / 'trials'}){why}")
    if len(sought.objectives) > 1:
        place = sought.folder / "front"
        place.mkdir(exist_ok=True)
        for old in place.glob("*.yaml"):
            old.unlink()
        for trial in front(study):
            config = with_values(sought.config, sought.values(trial))
            (place / f"{trial.number:04}.yaml").write_text(_with_origin(study, trial, sought, config))
    _draw(study, sought)
    return write_best(study, sought)


def describe_trial(study: "Study", number: int, sought: Sought) -> str:
    """A line about a trial that ended."""
    trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    names = short_names(list(sought.space))
    values = "  ".join(f"{names[key]} {_text(value)}" for key, value in sought.values(trial).items())
    again = made_again(trials)
    done = sum(each.state.is_finished() and each.number not in again for each in trials)
    found = "  ".join(f"{name} {text}" for name, text in zip(sought.objectives, _numbers(trial, sought), strict=True))
    if trial.state.name == "FAIL":
        found = f"failed: {trial.user_attrs['error']}"
    elif trial.state.name == "PRUNED":
        found = "pruned"
    return f"trial {_name(trial)} ({done} ended): {found}  |  {values}"


def show(study: "Study", sought: Sought) -> None:
    """Print the best trials, and where everything is."""
    names = short_names(list(sought.space))
    best = {trial.number for trial in front(study)}
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{study.study_name}: {_count(study)}", title_justify="left"
    )
    for name in ("trial", *sought.objectives):
        table.add_column(name, justify="right", no_wrap=True)
    for name in names.values():
        table.add_column(name.replace("_", "_\n").replace(".", ".\n"), justify="right", overflow="fold")
    ranked = _ranked(study)
    for trial in ranked[:SHOWN]:
        values = sought.values(trial)
        table.add_row(
            f"{'★ ' if trial.number in best else ''}{_name(trial)}",
            *_numbers(trial, sought),
            *[_text(values.get(key, "")) for key in names],
            style="bold" if trial.number in best else None,
        )
    console = Console()
    console.print()
    console.print(table)
    if len(ranked) > SHOWN:
        console.print(f"  and {len(ranked) - SHOWN} more in trials.csv")
    for what, file in {
        "best": "best.yaml",
        "front": "front",
        "trials": "trials.csv",
        "history": "history.png",
        "importance": "importance.png",
        "front plot": "front.png",
    }.items():
        if (sought.folder / file).exists():
            print(f"  {what:<12} {sought.folder / file}")
    print(f"  train it     python -m ppo_lightning fit --config {sought.folder / 'best.yaml'}")


def _count(study: "Study") -> str:
    trials = study.get_trials(deepcopy=False)
    again = made_again(trials)
    states = ["broken off and made again" if trial.number in again else trial.state.name.lower() for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _name(trial: "FrozenTrial") -> str:
    return "config" if OWN in trial.user_attrs else str(trial.number)


def _ranked(study: "Study") -> "list[FrozenTrial]":
    """All trials that ended of themselves: completed ones best first, then the rest."""
    sign = -1 if study.directions[0].name == "MAXIMIZE" else 1
    trials = study.get_trials(deepcopy=False)
    again = made_again(trials)
    ended = [trial for trial in trials if trial.state.is_finished() and trial.number not in again]
    complete = [trial for trial in ended if trial.state.name == "COMPLETE"]
    others = [trial for trial in ended if trial.state.name != "COMPLETE"]
    return sorted(complete, key=lambda trial: sign * trial.values[0]) + others


def _numbers(trial: "FrozenTrial", sought: Sought) -> list[str]:
    """What a trial reached, in words."""
    if trial.state.name != "COMPLETE":
        return [{"PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]] + [""] * (len(sought.objectives) - 1)
    return [
        f">{sought.budget:,}" if name == "steps_to" and value > sought.budget else _number(value)
        for name, value in zip(sought.objectives, trial.values, strict=True)
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _write_table(study: "Study", sought: Sought) -> None:
    with (sought.folder / "trials.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", *sought.objectives, *sought.space, "seconds_in_all", "error"])
        trials = study.get_trials(deepcopy=False)
        again = made_again(trials)
        for trial in trials:
            complete = trial.state.name == "COMPLETE"
            numbers = trial.values if complete else [""] * len(sought.objectives)
            values = sought.values(trial)
            seconds = "" if trial.duration is None else round(trial.duration.total_seconds(), 1)
            error = trial.user_attrs.get("error", "broken off and made again" if trial.number in again else "")
            cells = [values.get(key, "") for key in sought.space]  # one broken off may have a part of them
            rows.writerow([trial.number, trial.state.name.lower(), *numbers, *cells, seconds, error])


def _draw(study: "Study", sought: Sought) -> None:
    """``history.png``, ``importance.png`` from a few trials on, and ``front.png`` of several objectives."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    rises = study.directions[0].name == "MAXIMIZE"
    name = sought.objectives[0]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers, values = [trial.number for trial in complete], [trial.values[0] for trial in complete]
    best = [(max if rises else min)(values[: index + 1]) for index in range(len(values))]
    axes.plot(numbers, values, "o", label="trial")
    axes.step(numbers, best, where="post", label="best so far")
    if name == "steps_to" and max(values) > sought.budget:
        axes.axhline(sought.budget, color="grey", linestyle=":", label="above: threshold not reached")
    axes.set(xlabel="trial", ylabel=_label(name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(sought.folder / "history.png", dpi=150)

    if len(complete) >= ENOUGH:
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        with warnings.catch_warnings():  # where all trials are alike, equal bars say what there is to say
            warnings.filterwarnings("ignore", message="Target and region quantiles select the same")
            importance = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        names = short_names(list(sought.space))
        ordered = sorted(importance.items(), key=lambda item: item[1])
        figure = Figure(figsize=(7, 1.2 + 0.35 * len(ordered)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh([names[key] for key, _ in ordered], [share for _, share in ordered])
        axes.set(xlabel="importance for being among the best tenth of trials (PED-ANOVA)")
        axes.grid(alpha=0.3, axis="x")
        figure.savefig(sought.folder / "importance.png", dpi=150)

    if len(sought.objectives) > 1:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([trial.values[1] for trial in complete], values, "o", color="grey", alpha=0.6, label="trial")
        pareto = sorted(front(study), key=lambda trial: trial.values[1])
        axes.plot(
            [trial.values[1] for trial in pareto], [trial.values[0] for trial in pareto], "o-", label="Pareto front"
        )
        for trial in pareto:
            axes.annotate(str(trial.number), trial.values[1::-1], xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel=_label(sought.objectives[1]), ylabel=_label(name))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(sought.folder / "front.png", dpi=150)


def _label(objective: str) -> str:
    return {
        "score": "score",
        "steps_to": "environment steps to the threshold",
        "steps": "environment steps",
        "seconds": "seconds of training",
    }[objective]
