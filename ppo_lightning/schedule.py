"""Coefficients that change over a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from ppo_lightning.errors import InputError


@dataclass(frozen=True)
class Linear:
    """A straight line over the run: ``start`` at its first environment step, ``end`` at ``total_steps``."""

    start: float
    """Value of the first iteration, in the coefficient's own unit."""
    end: float = 0.0
    """Value after the last iteration."""

    def at(self, progress: float) -> float:
        """Value where ``progress`` (0 to 1) of the environment steps are behind."""
        return self.start + (self.end - self.start) * progress


def schedule(name: str, value: float | Linear | Mapping[str, float]) -> Linear:
    """A coefficient as a schedule: a number is constant, ``{start: …, end: …}`` is what a checkpoint holds of a line.

    Raises:
        InputError: a value on the way would be negative.
    """
    if isinstance(value, Mapping):
        if not {"start"} <= value.keys() <= {"start", "end"}:
            raise InputError(f"{name} takes a number or start and end, got {dict(value)}")
        value = Linear(**value)
    line = value if isinstance(value, Linear) else Linear(value, value)
    if not (line.start >= 0 and line.end >= 0):
        raise InputError(f"{name} must be zero or more, got {value}")
    return line
