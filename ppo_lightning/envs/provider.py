"""The environments for training and evaluation, made when they are first needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ppo_lightning.envs.double_buffered import DoubleBufferedEnvs, VectorEnvs
from ppo_lightning.envs.make import EnvFactory
from ppo_lightning.envs.vector import RestartBudget, VectorEnvAdapter
from ppo_lightning.errors import InputError
from ppo_lightning.spaces import split_sizes


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


class EnvProvider:
    """Makes the environments of a run: the caller closes those of training; those of evaluations are kept here.

    Args:
        factory: makes them.
        num_envs: how many are stepped together, where the factory does not set its own number.
        timeout_s: seconds after which a step or reset of worker processes is an error.
        restarts: how often environments may be restarted.
        info_keys: keys of ``info`` whose values are accumulated.

    Raises:
        InputError: they cannot be made or restarted.
    """

    def __init__(
        self, factory: EnvFactory, num_envs: int, *, timeout_s: float, restarts: int, info_keys: tuple[str, ...]
    ) -> None:
        self.factory = factory
        self.observation_space, self.action_space, self._probed = factory.infer_spaces(num_envs)
        if self._probed is not None and restarts:
            raise InputError(
                f"max_env_restarts={restarts} restarts single environments, and {factory.name} is a vector: leave it out, or "
                "give single environments (vectorization sync or async)"
            )
        if factory.num_workers is not None:
            if self._probed is not None:
                raise InputError(
                    f"num_workers={factory.num_workers} are processes of single environments, and {factory.name} is a vector: "
                    "leave it out"
                )
            if factory.num_workers > num_envs:
                raise InputError(
                    f"num_workers={factory.num_workers} are more than num_envs={num_envs}: give {num_envs} or fewer"
                )
        self.num_envs = int(num_envs) if self._probed is None else self._probed.num_envs
        self.restarts = RestartBudget(restarts)
        self.overrides = self.eval_overrides = EnvOverrides()
        """Overrides by callbacks, of the environments of training and of evaluations."""
        self._double_buffered = (
            factory.vectorization == "async" and self._probed is None and self.num_envs > 1 and factory.num_workers != 1
        )
        self._make = partial(VectorEnvAdapter, timeout_s=timeout_s, restarts=self.restarts, info_keys=info_keys)
        self._eval_envs: VectorEnvAdapter | None = None
        self._num_eval_envs = 0

    def train_envs(self) -> VectorEnvs:
        """New environments to train on; worker processes double-buffered. The first call reuses the probed vector."""
        made, self._probed = self._probed, self._probed if self.factory.is_instance else None
        factory = self.overrides.apply_to(self.factory)
        if made is not None and factory is not self.factory:  # it was made with other arguments
            made.close()
            made = None
        make = partial(self._make, attributes=self.overrides.attributes)
        if not self._double_buffered:
            return make(factory, self.num_envs, made=made)
        sizes, workers = split_sizes(self.num_envs, 2), (None, None)
        if factory.num_workers is not None:
            workers = split_sizes(factory.num_workers, 2)
        first = make(replace(factory, num_workers=workers[0]), sizes[0])
        try:
            return DoubleBufferedEnvs(first, make(replace(factory, num_workers=workers[1]), sizes[1], first=sizes[0]))
        except BaseException:  # else its workers would stay
            first.close()
            raise

    def eval_envs(self, num_envs: int) -> VectorEnvAdapter:
        """Separate environments for evaluations, reused until another number or other overrides are requested.

        Raises:
            InputError: the user gave a vector that cannot be recreated.
        """
        if self._eval_envs is not None and self._num_eval_envs != num_envs:
            self.close_eval_envs()
        if self._eval_envs is None:
            factory = self.factory.for_evaluation()
            if factory is None:
                raise InputError(
                    f"evaluation needs environments of its own, and {self.factory.name} was given as a VectorEnv: give a "
                    "callable that makes it instead"
                )
            overrides = self.eval_overrides
            self._eval_envs = self._make(overrides.apply_to(factory), num_envs, attributes=overrides.attributes)
            self._num_eval_envs = num_envs
        return self._eval_envs

    def set_eval_overrides(self, overrides: EnvOverrides) -> None:
        """Evaluate on environments with these overrides."""
        if overrides != self.eval_overrides:
            self.close_eval_envs()
        self.eval_overrides = overrides

    def close_eval_envs(self) -> None:
        """Stop the simulators of evaluations; the next evaluation starts new ones."""
        if self._eval_envs is not None:
            self._eval_envs.close()
            self._eval_envs = None

    def check_spaces(self, overrides: EnvOverrides) -> None:
        """Refuse arguments that make environments of other spaces.

        Raises:
            InputError: the spaces differ.
        """
        observation_space, action_space, made = overrides.apply_to(self.factory).infer_spaces(self.num_envs)
        if made is not None:
            made.close()
        if (observation_space, action_space) != (self.observation_space, self.action_space):
            raise InputError(
                f"{self.factory.name} made with {dict(overrides.env_kwargs)} has the spaces {observation_space} and "
                f"{action_space}, the policy was made for {self.observation_space} and {self.action_space}: change what "
                "does not change them"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Exclude simulators, except a vector that the user made."""
        state = {**self.__dict__, "_eval_envs": None}
        if not self.factory.is_instance:
            state["_probed"] = None
        return state
