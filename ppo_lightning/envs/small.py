"""Small environments of the configs memory, masked and multi_discrete: each needs one thing of a policy."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from typing_extensions import override


class Recall(gym.Env):
    """A cue at the first step, a question at the last: the right answer is the cue. Only memory can know it.

    Args:
        delay: steps between the cue and the question.
        masked: give a mask, under which one more action is never allowed.
    """

    def __init__(self, delay: int = 4, masked: bool = False) -> None:
        self.delay, self.masked = delay, masked
        self.observation_space = Box(
            -1.0, 1.0, (2,), np.float32
        )  # the cue while it is shown, and whether it is asked for
        self.action_space = Discrete(3 if masked else 2)

    def _info(self) -> dict[str, Any]:
        return {"action_mask": np.array([1, 1, 0], np.int8)} if self.masked else {}

    @override
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self.cue = int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 0], np.float32), self._info()

    @override
    def step(self, action: Any) -> Any:
        assert action < 2, "a masked action was taken"
        asked = self.steps == self.delay
        self.steps += 1
        right = bool(asked and action == self.cue)
        info = {**self._info(), **({"is_success": right} if asked else {})}
        return np.array([0, self.steps == self.delay], np.float32), float(right), asked, False, info


class Lock(gym.Env):
    """Of ``n`` actions a tenth is allowed at each step; the right one of them opens the next lock, any other ends it.

    Args:
        n: actions.
        locks: that must be opened one after another.
        masked: give the mask; without it a wrong or forbidden action ends the episode, too.
    """

    def __init__(self, n: int = 100, locks: int = 10, masked: bool = True) -> None:
        self.n, self.locks, self.masked = n, locks, masked
        keys = np.random.default_rng(0).permuted(np.tile(np.arange(n), (locks, 1)), axis=1)[:, : n // 10]
        self.allowed = np.zeros((locks, n), dtype=np.int8)
        np.put_along_axis(self.allowed, keys, 1, axis=1)
        self.right = keys[:, 0]
        self.observation_space = Discrete(locks)
        self.action_space = Discrete(n)

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.allowed[self.lock]} if self.masked else {}

    @override
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.lock = 0
        return self.lock, self._info()

    @override
    def step(self, action: Any) -> Any:
        assert not self.masked or self.allowed[self.lock, action], "a masked action was taken"
        if action != self.right[self.lock]:
            return self.lock, 0.0, True, False, {**self._info(), "is_success": False}
        done = self.lock == self.locks - 1
        self.lock += not done
        return self.lock, 1.0, done, False, {**self._info(), **({"is_success": True} if done else {})}


class Dials(gym.Env):
    """Set each dial to the number that is shown for it: a reward for each that is right, episodes of ten steps.

    Args:
        sizes: positions of each dial.
    """

    def __init__(self, sizes: Sequence[int] = (3, 5, 7)) -> None:
        self.sizes = list(sizes)
        self.action_space = MultiDiscrete(self.sizes)
        self.observation_space = MultiDiscrete(self.sizes)

    def _see(self) -> Any:
        self.shown = self.np_random.integers(self.sizes)
        return self.shown

    @override
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._see(), {}

    @override
    def step(self, action: Any) -> Any:
        right = np.asarray(action) == self.shown
        self.steps += 1
        over = self.steps == 10
        return self._see(), float(right.mean()), False, over, {"is_success": bool(right.all())} if over else {}
