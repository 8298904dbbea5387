"""Action masks: read once per step, and checked on input."""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv

from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.spaces import (
    MASK,
    Array,
    action_dims,
    check_mask,
    check_mask_length,
    flatten_mask,
    mask_error,
    mask_flags,
    without_mask,
)


class ActionMasks:
    """The masks of N environments, from their observations (a Dict with ``action_mask``) or from ``info["action_mask"]``.

    Args:
        name: of the environment, for messages.
        env: the vector that gives them.
        first: number of its first environment, in messages.

    Raises:
        InputError: the observation's mask does not fit the action space.
    """

    def __init__(self, name: str, env: VectorEnv, first: int) -> None:
        self.name, self._first = name, first
        self.num_envs = env.num_envs
        self.action_space = env.single_action_space
        self.observed = without_mask(env.single_observation_space) is not env.single_observation_space
        check_mask(env.single_observation_space, env.single_action_space)
        self._methods = _mask_methods(env)
        sizes = action_dims(env.single_action_space)
        self._begins, self._free = np.cumsum([0, *sizes])[:-1], np.ones(sum(sizes), dtype=bool)
        self.current: Array | None = None
        """[N, M] bool; None where the environments give none."""

    def reset(self, observation: Any, info: dict[str, Any]) -> None:
        """Read the masks after a reset of all environments, which decides whether there are masks.

        Raises:
            InputError: they do not fit the action space.
            EnvironmentFault: an environment gives none, or one without an allowed action.
        """
        self.current = None
        if self.observed or MASK in info or self._methods:
            self._read(observation, info, np.ones(self.num_envs, dtype=bool), "reset")

    def step(self, observation: Any, info: dict[str, Any], ignore: Array | None) -> None:
        """Read the masks after a step.

        Args:
            observation: of the vector.
            info: of the vector.
            ignore: [N] bool, environments whose next action does not matter.
        """
        if self.current is not None:
            self._read(observation, info, np.ones(self.num_envs, dtype=bool) if ignore is None else ~ignore, "step")
        elif MASK in info:
            raise EnvironmentFault(
                f"{self.name} gives info['{MASK}'] in step but not in reset: give it in both, an episode's first action "
                "is masked too"
            )

    def reset_envs(self, observation: Any, info: dict[str, Any], begun: Array) -> None:
        """Read the masks of the new episodes, [N] bool."""
        if self.current is not None:
            kept = self.current
            self._read(observation, info, begun, "reset")
            self.current[~begun] = kept[~begun]

    def _read(self, observation: Any, info: dict[str, Any], needed: Array, where: str) -> None:
        if not needed.any():  # all episodes are over: no mask is needed
            self.current = np.tile(self._free, (self.num_envs, 1))
            return
        if self._methods and MASK not in info:
            each = zip(self._methods, needed, strict=True)
            info = {MASK: np.stack([method() if own else self._free for method, own in each])}
        given = observation[MASK] if self.observed else info.get(MASK)
        there = np.ones(self.num_envs, dtype=bool) if self.observed else info.get(f"_{MASK}", given is not None)
        absent = needed & ~np.broadcast_to(there, self.num_envs)
        if given is None or absent.any():
            raise EnvironmentFault(
                f"environment {self._numbers(absent)} of {self.name} gave no info['{MASK}'] in {where}: give it "
                "in every reset and step, or never"
            )
        values = flatten_mask(given, self.action_space).reshape(self.num_envs, -1)
        if values.shape[1] != len(self._free):
            check_mask_length(values.shape[1], self.action_space)
        mask, wrong = mask_flags(values)
        if wrong is not None and wrong[needed].any():
            wrong &= needed[:, None]
            index = self._first + int(np.argwhere(wrong)[0][0])
            raise EnvironmentFault(
                f"environment {index} of {self.name} gave an {MASK} in {where} with {mask_error(values, wrong)}"
            )
        mask = np.where(needed[:, None], mask, True)
        nothing = ~np.logical_or.reduceat(mask, self._begins, axis=1).all(1)
        if nothing.any():
            raise EnvironmentFault(
                f"environment {self._numbers(nothing)} of {self.name} allows no action after {where}: its "
                f"{MASK} has a choice with nothing valid; end the episode before, or allow an action that does nothing"
            )
        self.current = mask

    def _numbers(self, which: Any) -> list[int]:
        """Numbers of the environments [N] bool, in messages."""
        return (self._first + np.flatnonzero(which)).tolist()


def _mask_methods(env: VectorEnv) -> list[Callable[[], Array]]:
    """``action_masks`` of each environment in a vector without our wrapper, where they have it."""
    inner = env.unwrapped
    if not isinstance(inner, SyncVectorEnv) or not all(one.has_wrapper_attr("action_masks") for one in inner.envs):
        return []
    return [one.get_wrapper_attr("action_masks") for one in inner.envs]
