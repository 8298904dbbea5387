"""One environment of a vector: its errors name it, what it returns is checked, and it can be restarted."""

import contextlib
import copy
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from ppo_lightning.envs.attributes import set_attributes, time_limit
from ppo_lightning.envs.conversion import as_flag, as_number, described, old_api, wrong_part, wrong_reset, wrong_step
from ppo_lightning.envs.info import FINAL_INFO, FINAL_OBSERVATION
from ppo_lightning.envs.state import environment_state, restore_environment
from ppo_lightning.envs.streams import changed_rng_state, restore_changed_rng_state, seed_shared
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.spaces import MASK

Env = gym.Env[Any, Any]

FLAGS = frozenset({bool, np.bool_})
NUMBERS = frozenset({float, int, np.float64, np.float32, np.int64})
"""Types of flags and rewards that need no further check."""

RESTARTED = "ppo_lightning_restarted"
"""Key of ``info`` under which an environment reports why it was restarted."""

RNG = "rng"
"""Key of the process's random state in an environment's state."""

RESERVED = frozenset((FINAL_OBSERVATION, FINAL_INFO))
"""Keys of ``info`` that belong to the vector: an environment's own values under them are left out."""


def make_checked(make: Callable[[], Env], index: int, restarts: bool, entropy: int | None) -> "CheckedEnv":
    """A checked environment in this process, or in a worker's: then ``entropy`` seeds the shared generators."""
    try:
        if entropy is not None:
            seed_shared(entropy, 1 + index)  # a seed that differs from those of resets
        return CheckedEnv(make(), index, make if restarts else None, has_process=entropy is not None)
    except Exception as error:  # of the user's own environment
        lines = "".join(traceback.format_exception(error))
        raise EnvironmentFault(f"environment {index} could not be made: {error}\n\n{lines}") from error


class CheckedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """One environment whose exceptions, and values outside its spaces, are reported with its name.

    Where it can be restarted, an error in ``step`` truncates the episode, with reward 0 and the last observation before the
    error, which ``info`` reports under :data:`RESTARTED`. A ``reset`` that raises is retried once on a new environment.

    Args:
        env: the environment, wrapped as the user asked.
        index: its place in the vector, from 0.
        make: restarts it; None ends the run.
        has_process: it is in a worker process: resets with a seed also seed the process's shared generators.

    Raises:
        EnvironmentFault: from ``reset`` and ``step``, with the environment's own traceback.
    """

    def __init__(
        self, env: Env, index: int, make: Callable[[], Env] | None = None, *, has_process: bool = False
    ) -> None:
        super().__init__(env)
        self.index, self._make, self._has_process = index, make, has_process
        self._rng_seed: int | None = None
        self._seed: int | None = None
        self._num_restarts, self._is_new = 0, False
        self._last: Any = None
        self._overrides: dict[str, Any] = {}
        self._attach(env)

    def _attach(self, env: Env) -> None:
        self.env = env
        self._step = env.step
        self._shape, self._dtype = env.observation_space.shape, env.observation_space.dtype
        self._is_array = isinstance(env.observation_space, gym.spaces.Box)
        # Stable-Baselines3's contributed MaskablePPO calls this method.
        self._masks = env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None

    @property
    def time_limit(self) -> float | None:
        """Steps after which episodes end at the latest; None where unknown."""
        return time_limit(self.env)

    @property
    def run_state(self) -> list[Any] | None:
        """State of the environment; worker processes get and set it under this name."""
        state = environment_state(self)
        if state is None or self._rng_seed is None:
            return state
        return [{**state[0], RNG: changed_rng_state(self._rng_seed)}, *state[1:]]

    @run_state.setter
    def run_state(self, state: list[Any]) -> None:
        last = self._last
        restore_environment(self, state)
        if RNG in state[0] and self._rng_seed is not None:
            restore_changed_rng_state(state[0][RNG], self._rng_seed)
        if self._last is None:  # the run that saved it could not restart environments
            self._last = last

    def set_env_attributes(self, values: Mapping[str, Any]) -> str | None:
        """Set attributes of the environment, now and after each restart; returns the first name that it lacks."""
        self._overrides = {**self._overrides, **values}
        return set_attributes(self.env, values)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and name the environment in errors."""
        try:
            observation, info = self._reset(seed, options)
        except EnvironmentFault as fault:
            if self._make is None:
                raise
            self._recreate()
            observation, info = self._reset(None, options)
            info = {**info, RESTARTED: str(fault)}
        info = _unreserved(info)
        if self._make is not None:
            self._last = copy.deepcopy(observation)
        return observation, info if self._masks is None else self._masked("reset", info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and name the environment in errors."""
        try:
            given = self._step(action)
        except Exception as error:  # of the user's own environment
            fault = self._fault("step", error)
            if self._make is None:
                raise fault from error
            self._recreate()
            return self._last, 0.0, False, True, {RESTARTED: str(fault)}
        if type(given) is not tuple or len(given) != 5 or type(given[4]) is not dict:
            if not isinstance(given, tuple | list) or len(given) != 5 or not isinstance(given[4], Mapping):
                raise EnvironmentFault(f"environment {self.index} {wrong_step(given)}")
            given = *given[:4], dict(given[4])
        observation, reward, terminated, truncated, info = given
        if type(reward) not in NUMBERS:
            reward = self._reward(reward)
        if type(terminated) not in FLAGS or type(truncated) not in FLAGS:
            terminated, truncated = self._flag("terminated", terminated), self._flag("truncated", truncated)
        if info:
            info = _unreserved(info)
        if (
            type(observation) is not np.ndarray
            or observation.shape != self._shape
            or observation.dtype != self._dtype
            or not self._is_array
        ):
            self._check("step", observation)
        if self._make is not None:
            self._last = copy.deepcopy(observation)
        if terminated or truncated:
            observation, info = copy.deepcopy(observation), copy.copy(info)  # a reset may overwrite them
        elif self._masks is not None:
            info = self._masked("step", info)
        return observation, reward, terminated, truncated, info

    def _reward(self, reward: Any) -> float:
        if reward is None:
            return np.nan  # the rollout refuses it, like any reward that is not finite
        given = as_number(reward)
        if given is None:
            raise EnvironmentFault(
                f"environment {self.index} returned in step the reward {described(reward)}: return one number"
            )
        return given

    def _flag(self, key: str, value: Any) -> bool:
        given = as_flag(value)
        if given is None:
            raise EnvironmentFault(
                f"environment {self.index} returned in step {key} {described(value)}: return True or False"
            )
        return given

    def _reset(self, seed: int | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._seed = seed
        elif self._is_new and self._seed is not None:  # else its episodes would not depend on the run's seed
            seed = int(np.random.SeedSequence([self._seed, self._num_restarts]).generate_state(1)[0])
        self._is_new = False
        if self._has_process and seed is not None:
            self._rng_seed = seed
            seed_shared(seed)
        try:
            given: Any = self.env.reset(seed=seed, options=options)
        except Exception as error:  # of the user's own environment
            raise self._fault("reset", error) from error
        if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[1], Mapping):
            raise EnvironmentFault(f"environment {self.index} {wrong_reset(given)}")
        self._check("reset", given[0])
        return given[0], dict(given[1])

    def _recreate(self) -> None:
        assert self._make is not None
        with contextlib.suppress(Exception):  # it has failed already
            self.env.close()
        self._attach(self._make())
        set_attributes(self.env, self._overrides)
        self._num_restarts, self._is_new = self._num_restarts + 1, True

    def _masked(self, where: str, info: dict[str, Any]) -> dict[str, Any]:
        assert self._masks is not None
        try:
            return {MASK: np.asarray(self._masks()), **info}
        except Exception as error:  # of the user's own environment
            raise self._fault(f"action_masks after {where}", error) from error

    def _fault(self, where: str, error: Exception) -> EnvironmentFault:
        old = old_api(error)
        if old is not None:
            return EnvironmentFault(f"environment {self.index} {old}")
        if isinstance(error, gym.error.DependencyNotInstalled):  # it names the command that installs it
            return EnvironmentFault(f"environment {self.index} needs a package in {where}: {error}")
        # The traceback goes into the text, since a worker process can only send text.
        lines = "".join(traceback.format_exception(error))
        return EnvironmentFault(
            f"environment {self.index} raised {type(error).__name__} in {where}: {error}\n\n{lines}"
        )

    def _check(self, where: str, observation: Any) -> None:
        problem = wrong_part(observation, self.observation_space)
        if problem is not None:
            raise EnvironmentFault(
                f"environment {self.index} returned in {where} an observation {problem}: make the environment return what its "
                "space says, or correct the space"
            )


def _unreserved(info: dict[str, Any]) -> dict[str, Any]:
    if RESERVED.isdisjoint(info):
        return info
    return {key: value for key, value in info.items() if key not in RESERVED}
