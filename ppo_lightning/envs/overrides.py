"""Overrides of environments by a curriculum: attributes between rollouts, or arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from ppo_lightning.envs.make import EnvFactory, Watched
from ppo_lightning.envs.values import layers, set_values
from ppo_lightning.envs.workers import Workers
from ppo_lightning.errors import InputError


@dataclass(frozen=True)
class EnvOverrides:
    """Attributes and arguments of environments that differ from the run's own."""

    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Values of attributes, or arguments of methods, by name."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments to make them with, merged over the run's own."""

    def apply_to(self, factory: EnvFactory) -> EnvFactory:
        """The factory with these arguments."""
        return replace(factory, env_kwargs={**factory.env_kwargs, **self.env_kwargs}) if self.env_kwargs else factory


def steer(
    env: VectorEnv, name: str, values: Mapping[str, Any], ask: Callable[[AsyncVectorEnv, str, Any], Sequence[Any]]
) -> None:
    """Set attributes of all environments of a vector, as :func:`set_values` does.

    Args:
        env: the vector.
        name: of the vector, in messages.
        values: by name.
        ask: calls a method of each environment in a worker process, with one argument.

    Raises:
        InputError: an environment lacks an attribute or method, or cannot be called.
    """
    inner = layers(env)[-1]
    if isinstance(inner, Workers):
        missing = ask(inner, "steer", dict(values))
    elif isinstance(inner, AsyncVectorEnv):
        raise InputError(
            f"{name} is an AsyncVectorEnv of your own, whose environments cannot say which attributes they have: give a "
            "callable that makes one environment, and vectorization async"
        )
    elif isinstance(inner, SyncVectorEnv):
        missing = [one.steer(values) if isinstance(one, Watched) else set_values(one, values) for one in inner.envs]
    else:
        missing = [set_values(env, values)]
    absent = next((one for one in missing if one is not None), None)
    if absent is not None:
        raise InputError(
            f"{name} has no attribute or method {absent!r}, neither itself nor a wrapper around it: correct the name, or set "
            "the attribute in __init__, so that it is there before the first reset"
        )
