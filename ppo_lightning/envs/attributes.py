"""Attributes of environments by name, through wrappers and adapters."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ppo_lightning.envs.third_party import IsaacLabVectorEnv
from ppo_lightning.errors import InputError


def wrapper_chain(env: Any) -> list[Any]:
    """An environment or vector from the outermost wrapper inwards, including an adapter's inner environment."""
    found = [env]
    while isinstance(found[-1], gym.Wrapper | gym.vector.VectorWrapper):
        found.append(found[-1].env)
    if isinstance(found[-1], IsaacLabVectorEnv):
        found.append(found[-1].simulator)
        if getattr(found[-1], "unwrapped", found[-1]) is not found[-1]:  # in wrappers of its own package
            found.append(found[-1].unwrapped)
    return found


LIMITS = (
    "max_episode_steps", "_max_episode_steps", "max_episode_length", "episode_length", "max_path_length", "max_steps",
    "_max_steps", "horizon", "_horizon",
)  # fmt: skip
"""Attributes in which environments keep their time limit (steps)."""


def time_limit(env: Any) -> float | None:
    """Steps after which the episodes of an environment or vector end at the latest; None where unknown."""
    spec = getattr(env, "spec", None)
    said = [] if spec is None else [spec.max_episode_steps, spec.kwargs.get("max_num_frames_per_episode")]  # of Atari
    said += [getattr(layer, name, None) for layer in wrapper_chain(env) for name in LIMITS]
    known = [limit for limit in said if isinstance(limit, int | float | np.number) and limit > 0]
    return float(min(known)) if known else None


def set_attributes(env: Any, values: Mapping[str, Any]) -> str | None:
    """Set attributes of an environment or vector, or call its methods with a value; a tensor or array is filled.

    Args:
        env: whose outermost layer with the name is changed.
        values: by name; ``cfg.terrain.level`` is an attribute of an attribute.

    Returns:
        The first name that no layer has; None where all were set.

    Raises:
        InputError: an array or tensor of whole numbers or flags cannot hold a value.
    """
    for name, value in values.items():
        *path, last = name.split(".")
        owner = next((found for layer in wrapper_chain(env) if hasattr(found := _follow(layer, path), last)), None)
        if owner is None:
            return name
        now = getattr(owner, last)
        if callable(now):
            now(value)
            continue
        setattr(owner, last, _filled(name, now, value) if isinstance(now, torch.Tensor | np.ndarray) else value)
    return None


def _filled(name: str, now: Any, value: Any) -> Any:
    """A tensor or array like ``now`` with the value in each place."""
    if isinstance(now, torch.Tensor):
        given: Any = torch.as_tensor(value).to(now.device)
        one, holds_fractions = given.to(now.dtype), now.is_floating_point()
        filled: Any = one.expand_as(now).clone()
    else:
        given = np.asarray(value)
        one, holds_fractions = given.astype(now.dtype), now.dtype.kind not in "biu"
        filled = np.broadcast_to(one, now.shape).copy()
    if not holds_fractions and (one != given).any():
        raise InputError(f"the attribute {name} is of {now.dtype}, which does not hold {value}: give another value")
    return filled


def _follow(owner: Any, path: list[str]) -> Any:
    for name in path:
        owner = getattr(owner, name, None)
    return owner
