"""The search space: keys of a config, each with a list of values or a range on a scale."""

import contextlib
import copy
import difflib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ppo_lightning.errors import InputError
from ppo_lightning.shipped import located, near_name, shipped_configs

if TYPE_CHECKING:
    from optuna import Trial


class Scale(NamedTuple):
    """A transformation of config values to points, over which the search is uniform."""

    forward: Callable[[float], float]
    """From values to points."""
    inverse: Callable[[float], float]
    """From points to values."""
    whole: bool
    """Points are integers."""
    limit: str
    """The condition on bounds, in words."""
    allows: Callable[[float], bool]
    """Whether a value fulfils the condition."""


def _sigmoid(x: float) -> float:
    return float(f"{1 / (1 + math.exp(-x)):.12g}")  # so that inverse(forward(x)) == x


SCALES = {
    "uniform": Scale(float, float, False, "numbers", lambda x: True),
    "int_uniform": Scale(int, int, True, "whole numbers", lambda x: x == int(x)),
    "uniform_pow2": Scale(
        lambda x: int(x).bit_length() - 1,
        lambda x: 2 ** int(x),
        True,
        "powers of two",
        lambda x: x >= 1 and x == int(x) and int(x).bit_count() == 1,
    ),
    "log_uniform": Scale(math.log, lambda x: float(f"{math.exp(x):.12g}"), False, "more than 0", lambda x: x > 0),
    "logit_uniform": Scale(
        lambda x: math.log(x / (1 - x)), _sigmoid, False, "between 0 and 1, both left out", lambda x: 0 < x < 1
    ),
}
OTHER_NAMES = {"log_normal": "log_uniform", "logit_normal": "logit_uniform"}
"""PufferLib's names of these scales."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included, searched uniformly on a scale."""

    scale: str
    low: float
    high: float

    def suggest(self, trial: "Trial", key: str) -> Any:
        """The point that Optuna suggests for a trial."""
        scale = SCALES[self.scale]
        suggest: Any = trial.suggest_int if scale.whole else trial.suggest_float
        return suggest(key, scale.forward(self.low), scale.forward(self.high))

    def value(self, point: Any) -> Any:
        """The config value of a point."""
        return min(max(SCALES[self.scale].inverse(point), self.low), self.high)

    def point(self, value: Any) -> Any:
        """The point of a config value; None if the range does not contain it."""
        scale = SCALES[self.scale]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not self.low <= value <= self.high
            or not scale.allows(value)
        ):
            return None
        return scale.forward(value)

    def examples(self) -> list[Any]:
        """Both ends, and a value between them, which reveals a scale that does not suit the key."""
        scale = SCALES[self.scale]
        middle = (scale.forward(self.low) + scale.forward(self.high)) / 2
        return [self.low, self.high, self.value(int(middle) if scale.whole else middle)]


@dataclass(frozen=True)
class Choice:
    """One of several values, of any YAML type."""

    values: tuple[Any, ...]

    def suggest(self, trial: "Trial", key: str) -> Any:
        """The value that Optuna suggests for a trial, as JSON: Optuna stores no lists or mappings."""
        return trial.suggest_categorical(key, [json.dumps(value) for value in self.values])

    def value(self, point: Any) -> Any:
        """The config value of its JSON text."""
        return json.loads(point)

    def point(self, value: Any) -> Any:
        """The JSON text of a config value; None if it is not among the values."""
        text = json.dumps(value)
        return text if text in map(json.dumps, self.values) else None

    def examples(self) -> list[Any]:
        """All values."""
        return list(self.values)


Space = Mapping[str, Range | Choice]
"""Dotted keys of the config, with the values that each may take."""


def read_space(space: str | Path | Mapping[str, Any]) -> dict[str, Range | Choice]:
    """Parse a space, from a YAML file or a mapping.

    Args:
        space: ``{key: [value, …]}`` or ``{key: {distribution, min, max}}``, keys as in a config, with dots; a YAML file of
            that, or the name of one in ``configs/sweeps``.

    Raises:
        InputError: it is malformed; the message names the key and the remedy.
    """
    where = "space" if isinstance(space, Mapping) else str(space)
    if not isinstance(space, Mapping):
        try:
            space = yaml.safe_load(Path(located(where, "sweeps")).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            near = near_name(where, "sweeps")
            hint = (
                f"did you mean {near}?"
                if near
                else f"give the path of a YAML file, or one of {', '.join(shipped_configs('sweeps'))}"
            )
            raise InputError(f"there is no space {where}: {hint}") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{where} cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(space, Mapping) or not space:
        raise InputError(
            f"{where} must map keys of the config to what they may be, as in 'model.gamma: [0.98, 0.99]', got {space!r}"
        )
    return {str(key): _range(f"{where}: {key}", given) for key, given in space.items()}


def _range(where: str, given: Any) -> Range | Choice:
    try:
        json.dumps(given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} may hold text, numbers, lists and mappings, got {given!r}: {error}") from error
    if isinstance(given, list | tuple):
        if not given or len({json.dumps(value) for value in given}) < len(given):
            raise InputError(f"{where} must list values that differ, got {list(given)}")
        return Choice(tuple(given))
    wanted = {"distribution", "min", "max"}
    if not isinstance(given, Mapping) or set(given) != wanted:
        raise InputError(
            f"{where} must be a list of values, or a mapping of distribution, min and max and nothing else, got {given!r}"
        )
    name = OTHER_NAMES.get(str(given["distribution"]), str(given["distribution"]))
    if name not in SCALES:
        known = ", ".join([*SCALES, *OTHER_NAMES])
        raise InputError(f"{where} has no distribution {name!r}: take one of {known}, or a list of values")
    scale, low, high = SCALES[name], _number(where, given["min"]), _number(where, given["max"])
    if not (scale.allows(low) and scale.allows(high)):
        raise InputError(f"{where}: min and max of {name} must be {scale.limit}, got {low} and {high}")
    if not low < high:
        raise InputError(f"{where}: min must be less than max, got {low} and {high}")
    return Range(name, *((int(low), int(high)) if scale.whole else (low, high)))


def _number(where: str, value: Any) -> float:
    """A finite number; PyYAML reads 1e-4 as text."""
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # other text is refused below
            number = float(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise InputError(f"{where}: min and max must be numbers, got {value!r}")
    return number


def check_keys(space: Space, config: Mapping[str, Any]) -> None:
    """Check that the config has every key of the space.

    Args:
        space: of the search.
        config: complete, with all defaults.

    Raises:
        InputError: it lacks one; the message suggests the nearest key.
    """
    for key, part in itertools.permutations(space, 2):
        if part.startswith(f"{key}."):
            raise InputError(f"space: {part} is a part of {key}, which is searched as a whole: leave out one of them")
    for key in space:
        first, *path = key.split(".")
        if first not in ("model", "trainer") or not path:
            near = difflib.get_close_matches(key, config["model"], 1)
            hint = f"model.{near[0]}" if near else "model.gamma"
            raise InputError(f"space: {key} is not searched: keys begin with model. or trainer., as {hint} does")
        node, seen = config[first], first
        for depth, name in enumerate(path):
            if not isinstance(node, Mapping):
                raise InputError(
                    f"space: {key} cannot be set, since {seen} is {json.dumps(node)} in the config: name there what has "
                    f"{'.'.join(path[depth:])} first"
                )
            if name not in node:
                near = difflib.get_close_matches(name, node, 1)
                hint = f"did you mean {seen}.{near[0]}?" if near else f"there are {', '.join(node)}"
                raise InputError(f"space: {seen} has no {name}: {hint}")
            node, seen = node[name], f"{seen}.{name}"


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with the values of dotted keys replaced."""
    changed = copy.deepcopy(dict(config))
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        value_at(changed, parent)[last] = value
    return changed


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getitem, key.split("."), config)


def points_of(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """The points of a config in a space; None for keys whose value lies outside."""
    return {key: of.point(value_at(config, key)) for key, of in space.items()}


def short_names(keys: list[str]) -> dict[str, str]:
    """The last word of each key, or the whole key where two keys share that word."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
