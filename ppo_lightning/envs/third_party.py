"""Vector environments of other packages, as Gymnasium's interface promises them."""

import importlib
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from typing_extensions import override

from ppo_lightning.errors import EnvironmentFault, InputError


def adapted(env: VectorEnv) -> VectorEnv:
    """The vector, wrapped where its package is known to say something else than it does."""
    inner: Any = env
    while isinstance(inner, VectorWrapper) and not isinstance(inner, Games):
        inner = inner.env
    return Games(env) if type(inner).__module__.startswith("ale_py") else env


class Games(VectorWrapper):
    """``ale_py.vector_env.AtariVectorEnv`` whose episodes are games.

    With ``life_loss_info`` it calls a lost life terminal though the game goes on. Here ``terminated`` is the end of a game,
    and ``info["life_lost"]`` [N] says that a life was lost: terminal for what is learnt, but no episode's end.

    Args:
        env: the vector.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        mode: Any = getattr(env.unwrapped, "autoreset_mode", env.metadata["autoreset_mode"])
        # All its instances write into one dictionary, that of the base class.
        self._metadata = {**env.metadata, "autoreset_mode": AutoresetMode(mode)}
        self._same_step = self._metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        self._begun = np.zeros(env.num_envs, dtype=np.int64)
        self._lost = np.zeros(env.num_envs, dtype=bool)

    @override
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a game everywhere; environment i is seeded with ``seed + i``."""
        observation, info = self.env.reset(seed=seed % 2**31 if isinstance(seed, int) else seed, options=options)
        self._begun = info["frame_number"] - info["episode_frame_number"]
        return observation, info

    @override
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, with lost lives in ``info``."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        begun = info["frame_number"] - info["episode_frame_number"]
        if (self._lost & (begun != self._begun)).any() and not self._same_step:
            raise EnvironmentFault(
                "AtariVectorEnv started the game anew after a lost life, as episodic_life: true has it: leave that out, and "
                "give life_loss_info: true, which makes lost lives terminal in a game that goes on"
            )
        self._lost = terminated
        if terminated.any():
            # In the same step, what info says is of the new game already: one that has begun at another frame.
            over = begun != self._begun if self._same_step else info["lives"] == 0
            info["life_lost"] = self._lost = terminated & ~over
            terminated = terminated & over
        self._begun = begun
        return observation, reward, terminated, truncated, info


class EnvPool(VectorEnv):
    """A vector of the package envpool, with seeds and batched spaces as Gymnasium has them.

    Args:
        task: its name, such as ``Pong-v5``.
        num_envs: how many environments.
        options: what else ``envpool.make_gymnasium`` takes.

    Raises:
        InputError: envpool is not installed.
    """

    def __init__(self, task: str, num_envs: int, **options: Any) -> None:
        try:
            envpool: Any = importlib.import_module("envpool")
        except ImportError as error:
            raise InputError(f'{task} needs envpool: pip install "ppo-lightning[envpool]"') from error
        self._make = lambda seed: envpool.make_gymnasium(task, num_envs=num_envs, seed=seed % 2**31, **options)
        self._env, self._seed, self._fresh = self._make(0), 0, True
        self.num_envs = num_envs
        self.single_observation_space = self._env.observation_space
        self.single_action_space = self._env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    @override
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode everywhere. envpool is seeded when it is made, so another seed makes it anew."""
        if seed is not None and not (self._fresh and seed == self._seed):
            self._env.close()
            self._env, self._seed = self._make(int(seed)), seed
        self._fresh = False
        observation, info = self._env.reset()
        return observation, _without_players(info)

    @override
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments."""
        observation, reward, terminated, truncated, info = self._env.step(
            np.asarray(actions, dtype=self.single_action_space.dtype)
        )
        return observation, reward, terminated, truncated, _without_players(info)

    @override
    def close_extras(self, **kwargs: Any) -> None:
        """Close it."""
        self._env.close()


def _without_players(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key != "players"}
