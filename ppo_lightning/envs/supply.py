"""Which environments a run trains on and evaluates on, made when they are first needed."""

from functools import partial
from typing import Any

from ppo_lightning.envs.make import EnvMaker
from ppo_lightning.envs.steering import Setting
from ppo_lightning.envs.vector import Environments, Halves, Restarts
from ppo_lightning.errors import InputError
from ppo_lightning.spaces import cut


class Supply:
    """The environments of a run: those of training for whoever closes them, those of evaluations kept here.

    Args:
        maker: recipe for them.
        num_envs: how many are stepped together, where the recipe has no number of its own.
        timeout_s: seconds after which a step or reset of worker processes is an error.
        restarts: how often environments may be made anew.
        log_info: keys of ``info`` whose numbers are added up.

    Raises:
        InputError: they cannot be made, or made anew.
    """

    def __init__(
        self, maker: EnvMaker, num_envs: int, *, timeout_s: float, restarts: int, log_info: tuple[str, ...]
    ) -> None:
        self.maker = maker
        self.observation_space, self.action_space, self._made = maker.probe(num_envs)
        if self._made is not None and restarts:
            raise InputError(
                f"env_restarts={restarts} makes single environments anew, and {maker.name} is a vector: leave it out, or "
                "give single environments (vectorization sync or async)"
            )
        self.num_envs = int(num_envs) if self._made is None else self._made.num_envs
        self.restarts = Restarts(restarts)
        self.setting = self.eval_setting = Setting()
        """How the environments of training and of evaluations differ from the recipe, by callbacks that steer."""
        self._in_halves = maker.vectorization == "async" and self._made is None and self.num_envs > 1
        self._environments = partial(Environments, timeout_s=timeout_s, restarts=self.restarts, log_info=log_info)
        self._evaluating: Environments | None = None
        self._num_evaluating = 0

    def for_training(self) -> Environments | Halves:
        """New environments to train on; worker processes in two halves. The first call takes what the probe has made."""
        made, self._made = self._made, self._made if self.maker.is_instance else None
        maker = self.setting.of(self.maker)
        if made is not None and maker is not self.maker:  # it was made with other arguments
            made.close()
            made = None
        make = partial(self._environments, maker, attributes=self.setting.attributes)
        if not self._in_halves:
            return make(self.num_envs, made=made)
        sizes = cut(self.num_envs, 2)
        first = make(sizes[0])
        try:
            return Halves(first, make(sizes[1], first=sizes[0]))
        except BaseException:  # else its workers would stay
            first.close()
            raise

    def for_evaluation(self, num_envs: int) -> Environments:
        """Environments of their own for evaluations, the same ones until another number or setting is wanted.

        Raises:
            InputError: the one vector that there is, is the user's.
        """
        if self._evaluating is not None and self._num_evaluating != num_envs:
            self.close_evaluation()
        if self._evaluating is None:
            maker = self.maker.again()
            if maker is None:
                raise InputError(
                    f"evaluation needs environments of its own, and {self.maker.name} was given as a VectorEnv: give a "
                    "callable that makes it instead"
                )
            setting = self.eval_setting
            self._evaluating = self._environments(setting.of(maker), num_envs, attributes=setting.attributes)
            self._num_evaluating = num_envs
        return self._evaluating

    def steer_evaluations(self, setting: Setting) -> None:
        """Evaluate on environments that differ so from the recipe."""
        if setting != self.eval_setting:
            self.close_evaluation()
        self.eval_setting = setting

    def close_evaluation(self) -> None:
        """Stop the simulators of evaluations; the next evaluation starts new ones."""
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None

    def check_spaces(self, setting: Setting) -> None:
        """Refuse arguments that make environments of other spaces.

        Raises:
            InputError: so they do.
        """
        observation_space, action_space, made = setting.of(self.maker).probe(self.num_envs)
        if made is not None:
            made.close()
        if (observation_space, action_space) != (self.observation_space, self.action_space):
            raise InputError(
                f"{self.maker.name} made with {dict(setting.env_kwargs)} has the spaces {observation_space} and "
                f"{action_space}, the policy was made for {self.observation_space} and {self.action_space}: change what "
                "leaves them as they are"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Simulators stay where they are; only a vector that the user made goes along."""
        state = {**self.__dict__, "_evaluating": None}
        if not self.maker.is_instance:
            state["_made"] = None
        return state
