"""Numbers that the user gives: their limits, and coefficients that change over a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, TypeVar, cast, get_args

from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import MetricNames

T = TypeVar("T")


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


@dataclass(frozen=True)
class PopArt:
    """Normalise value targets while preserving the critic's output (van Hasselt et al. 2016)."""

    beta: float = 1e-4
    """Weight of one environment step in the running moments of value targets, 0 to 1 (dimensionless)."""

    def __post_init__(self) -> None:
        """Refuse a weight that is none."""
        if not (_is_number(self.beta) and 0 < self.beta <= 1):
            raise InputError(f"popart.beta must lie between 0 and 1, got {self.beta!r}")


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


def check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside their limits.

    Args:
        given: hyperparameters of PPO by name.

    Raises:
        InputError: the first that cannot be used.
    """
    for name in COUNTS:
        value = given[name]
        if value is not None and not (_is_number(value) and value >= 1 and value == int(value)):
            raise InputError(f"{name} must be a whole number of 1 or more, got {value!r}")
    for name in SHARES:
        if not (_is_number(given[name]) and 0 <= given[name] <= 1):
            raise InputError(f"{name} must lie between 0 and 1, got {given[name]!r}")
    for name in LIMITS:
        if given[name] is not None and not (_is_number(given[name]) and given[name] > 0):
            raise InputError(f"{name} must be more than 0 (or null to turn it off), got {given[name]!r}")
    if not (isinstance(given["normalize_advantage"], bool) or given["normalize_advantage"] == "all_ranks"):
        raise InputError(f"normalize_advantage must be true, false or all_ranks, got {given['normalize_advantage']!r}")
    if not isinstance(given["compile"], bool):
        raise InputError(f"compile must be true or false, got {given['compile']!r}")
    if given["non_finite"] not in ("raise", "skip"):
        raise InputError(f"non_finite must be raise or skip, got {given['non_finite']!r}")
    if given["metric_names"] not in get_args(MetricNames):
        raise InputError(f"metric_names must be one of {get_args(MetricNames)}, got {given['metric_names']!r}")
    if isinstance(given["log_info"], str) or not all(isinstance(key, str) for key in given["log_info"]):
        raise InputError(f"log_info must be a list of keys, got {given['log_info']!r}")
    restarts = given["env_restarts"]
    if not (_is_number(restarts) and restarts >= 0 and restarts == int(restarts)):
        raise InputError(f"env_restarts must be a whole number of 0 or more, got {restarts!r}")
    if not (_is_number(given["vf_coef"]) and given["vf_coef"] >= 0):
        raise InputError(f"vf_coef must be zero or more, got {given['vf_coef']!r}")


def check_samples(num_steps: int, num_envs: int, num_minibatches: int) -> None:
    """Refuse rollouts that have fewer samples than minibatches.

    Raises:
        InputError: so they have.
    """
    samples = num_steps * num_envs
    if num_minibatches > samples:
        raise InputError(
            f"num_steps · num_envs = {num_steps} · {num_envs} = {samples} samples cannot be cut into num_minibatches = "
            f"{num_minibatches}: lower num_minibatches or raise num_steps"
        )


def check_sequences(
    given: int | None, num_steps: int, num_envs: int, num_minibatches: int, *, memory: bool
) -> int | None:
    """Steps of a sequence; None for a policy without memory.

    Args:
        given: ``sequence_length``; None is whole rollouts.
        num_steps: steps of each environment per rollout.
        num_envs: environments of this process.
        num_minibatches: pieces that the sequences are cut into.
        memory: the policy has one.

    Raises:
        InputError: they do not cut the rollout, or into too few.
    """
    if not memory:
        if given is not None:
            raise InputError(
                f"sequence_length={given} cuts rollouts for memory, which this policy has not: leave it out, or give the "
                "policy a memory (ActorCritic: memory: lstm)"
            )
        return None
    length = num_steps if given is None else given
    if num_steps % length:
        raise InputError(
            f"sequence_length = {length} does not cut num_steps = {num_steps} into whole sequences: take a divisor"
        )
    sequences = num_steps // length * num_envs
    if sequences < num_minibatches:
        raise InputError(
            f"num_envs · num_steps / sequence_length = {num_envs} · {num_steps} / {length} = {sequences} sequences cannot "
            f"be cut into num_minibatches = {num_minibatches}: lower sequence_length or num_minibatches"
        )
    return length


def plain_factory(factory: T) -> T:
    """A callable that worker processes can be sent: the class and arguments inside those that a ``class_path`` makes.

    jsonargparse gives a partial of its own machinery, which holds generators and cannot be pickled.
    """
    if isinstance(factory, partial) and str(getattr(factory.func, "__module__", "")).startswith("jsonargparse"):
        own = [argument for argument in factory.args if not type(argument).__module__.startswith("jsonargparse")]
        return cast(T, partial(*own, **factory.keywords))
    return factory


def popart(value: PopArt | Mapping[str, float] | None) -> PopArt | None:
    """PopArt's numbers, from what a checkpoint holds of them too."""
    if isinstance(value, Mapping) and value.keys() <= {"beta"}:
        return PopArt(**value)
    if not isinstance(value, PopArt | None):
        raise InputError(f"popart takes PopArt(beta=…), {{beta: …}} or null, got {value!r}")
    return value


COUNTS = (
    "num_envs",
    "num_steps",
    "total_steps",
    "update_epochs",
    "num_minibatches",
    "minibatch_chunks",
    "sequence_length",
    "eval_interval",
    "num_eval_episodes",
)
SHARES = ("gamma", "gae_lambda")
LIMITS = ("clip_range_vf", "max_grad_norm", "target_kl", "env_timeout_s")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
