"""Makes vectors of environments: ids, callables, wrappers, vectorisation."""

import contextlib
import copy
import difflib
import importlib.util
import inspect
import multiprocessing
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import forkserver
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from ppo_lightning.envs.info import FINAL_INFO, FINAL_OBSERVATION
from ppo_lightning.envs.promise import described, flag, number, old_api, wrong_part, wrong_reset, wrong_step
from ppo_lightning.envs.state import environment_state, restore_environment
from ppo_lightning.envs.streams import move, moved, seed_shared
from ppo_lightning.envs.third_party import adapted
from ppo_lightning.envs.values import set_values, time_limit
from ppo_lightning.envs.workers import Workers
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.parameters import shown
from ppo_lightning.spaces import MASK

Env = gym.Env[Any, Any]
EnvSource = str | VectorEnv | Callable[..., VectorEnv | Env]
Vectorization = Literal["sync", "async", "vector_entry_point"]

EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "ale_py": "atari", "minigrid": "minigrid", "pygame": "classic-control"}
"""Extra of this package that installs a missing module of an environment."""

FLAGS = frozenset({bool, np.bool_})
NUMBERS = frozenset({float, int, np.float64, np.float32, np.int64})
"""Types of flags and rewards that need no further check."""

PACKAGES = {
    "ALE/": "ale_py",
    "MiniGrid-": "minigrid",
    "BabyAI-": "minigrid",
    "dm_control/": "shimmy",
    "Meta-World/": "metaworld",
    "gym_pusht/": "gym_pusht",
}
"""Prefixes of the ids that a package registers when it is imported."""

RESTARTED = "ppo_lightning_restarted"
"""Key of ``info`` under which an environment reports why it was restarted."""

NORMALIZERS = {"normalize_observation": ("obs",), "normalize_reward": ("rew", "ret")}
"""Our parameters that normalise, with parts of the names of wrappers, or of their attributes, that do the same."""

STREAMS = "streams"
"""Key of the process's random state in an environment's state."""

RESERVED = frozenset((FINAL_OBSERVATION, FINAL_INFO))
"""Keys of info that belong to the vector: an environment's own values under them are left out."""


@dataclass(frozen=True)
class EnvFactory:
    """Factory of vectors of environments; no environment is made until it is called.

    Args:
        env: Gymnasium id (``module:Id-v0`` imports the module first), a VectorEnv, or a callable that makes a VectorEnv
            or a single environment.
        env_kwargs: arguments for ``gymnasium.make`` or the callable.
        wrappers: applied to each environment, first to last, innermost first.
        vectorization: how single environments become a vector (see :class:`PPO`).
        restarts: an environment that raises is restarted, and its episode ends there as truncated.

    Raises:
        InputError: the id is unknown, a package is not installed, or wrappers do not apply.
    """

    env: EnvSource
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Callable[[Env], Env]] = ()
    vectorization: Vectorization = "sync"
    restarts: bool = False

    def __post_init__(self) -> None:
        if self.vectorization not in get_args(Vectorization):
            raise InputError(f"vectorization must be one of {get_args(Vectorization)}, got {self.vectorization!r}")
        if isinstance(self.env, gym.Env):
            raise InputError(
                f"env is one {type(self.env).__name__}, of which there are to be several: give its id, or a callable that "
                "makes one"
            )
        if not (isinstance(self.env, str | VectorEnv) or callable(self.env)):
            raise InputError(
                f"env must be a Gymnasium id, a VectorEnv or a callable that makes one, got {shown(self.env)}"
            )
        if self.vectorization == "vector_entry_point" and self.wrappers:
            raise InputError(
                "wrappers go around single environments, vectorization=vector_entry_point has none: "
                "use vectorization=sync, or a callable that makes the wrapped VectorEnv"
            )
        if self.is_instance and (self.wrappers or self.env_kwargs):
            raise InputError("env is a VectorEnv already, wrappers and env_kwargs cannot reach into it: leave them out")

    @property
    def is_instance(self) -> bool:
        """The user made the vector, and closes it."""
        return isinstance(self.env, VectorEnv)

    @property
    def name(self) -> str:
        """Name of the environment in messages."""
        if isinstance(self.env, str):
            return self.env
        made_by = self.env.func if isinstance(self.env, partial) else self.env
        return getattr(made_by, "__name__", type(made_by).__name__)

    @property
    def time_limit_advice(self) -> str:
        """How to give these environments a time limit, in messages."""
        advice = "give the environment a time limit"
        if isinstance(self.env, VectorEnv) or self.vectorization == "vector_entry_point":
            return f"{advice} of its own"
        if isinstance(self.env, str) or "max_episode_steps" in _parameters(self.env):
            return f"{advice} (env_kwargs: max_episode_steps)"
        return f"{advice} (gymnasium.wrappers.TimeLimit among the wrappers, or what {self.name} takes for it)"

    def again(self) -> "EnvFactory | None":
        """A factory for evaluation; None where the user gave an instance that cannot be recreated.

        Wrappers whose class sets ``training_only = True`` are left out.
        """
        if not isinstance(self.env, VectorEnv):
            kept = tuple(wrapper for wrapper in self.wrappers if not _is_for_training(wrapper))
            return self if len(kept) == len(self.wrappers) else replace(self, wrappers=kept)
        spec = self.env.unwrapped.spec
        if spec is None or self.env is not self.env.unwrapped:  # a wrapped vector cannot be made again from its spec
            return None
        kwargs = dict(spec.kwargs)
        mode = kwargs.pop("vectorization_mode", "sync")
        kwargs = {key: value for key, value in kwargs.items() if key not in {"num_envs", "vector_kwargs", "wrappers"}}
        return EnvFactory(spec.id, kwargs, spec.kwargs.get("wrappers", ()), mode)

    def probe(self, num_envs: int) -> tuple[gym.Space[Any], gym.Space[Any], VectorEnv | None]:
        """Spaces of one environment, and the vector itself where it had to be made to get them.

        Raises:
            InputError: a wrapper normalises by its own statistics.
        """
        if isinstance(self.env, VectorEnv):
            made: VectorEnv | Env = adapted(self.env)
        elif isinstance(self.env, str) and self.vectorization != "vector_entry_point":
            made = self._single(find_spec(self.env))
        else:
            made = self._call(num_envs)
        if isinstance(made, VectorEnv):
            try:
                refuse_running_statistics(made, self.name)
            except InputError:
                if not self.is_instance:
                    made.close()
                raise
            return self._space(made, "single_observation_space"), self._space(made, "single_action_space"), made
        made = made if isinstance(self.env, str) else self._wrapped(made)
        made.close()
        refuse_running_statistics(made, self.name)
        return self._space(made, "observation_space"), self._space(made, "action_space"), None

    def _space(self, made: Any, name: str) -> gym.Space[Any]:
        space = getattr(made, name, None)
        if not isinstance(space, gym.Space):
            raise InputError(
                f"env={self.name} has no {name}: set it, to a gymnasium.Space such as Box or Discrete, in its __init__"
            )
        return space

    def __call__(self, num_envs: int, first: int = 0) -> VectorEnv:
        """Make ``num_envs`` environments as one vector; a VectorEnv with its own number keeps it.

        Args:
            num_envs: how many.
            first: number of the first, in messages.
        """
        if isinstance(self.env, VectorEnv):
            return adapted(self.env)
        if isinstance(self.env, str) and self.vectorization != "vector_entry_point":
            spec = find_spec(self.env)
            return self._vectorize(lambda: self._single(spec), num_envs, first)
        made = self._call(num_envs)
        if isinstance(made, VectorEnv):
            return made
        made.close()
        return self._vectorize(self._wrapped_call, num_envs, first)

    def _call(self, num_envs: int) -> VectorEnv | Env:
        if isinstance(self.env, str):
            spec = find_spec(self.env)
            if spec.vector_entry_point is None:
                raise InputError(f"{self.env} has no vector entry point: set vectorization to sync or async")
            with making(self.env):
                made = gym.make_vec(spec, num_envs, vectorization_mode="vector_entry_point", **self.env_kwargs)
            return adapted(made)
        assert not isinstance(self.env, VectorEnv)
        kwargs = dict(self.env_kwargs)
        if "num_envs" not in kwargs and "num_envs" in _parameters(self.env):
            kwargs["num_envs"] = num_envs
        with making(self.name):
            made = adapted(self.env(**kwargs))
        if not isinstance(made, VectorEnv | gym.Env):
            raise InputError(
                f"env={self.name} made a {type(made).__name__}: it must return a gymnasium.vector.VectorEnv or a gymnasium.Env"
            )
        if isinstance(made, VectorEnv) and self.wrappers:
            raise InputError(
                f"env={self.name} makes a VectorEnv, wrappers go around single environments: wrap inside it"
            )
        return made

    def _wrapped_call(self) -> Env:
        made = self._call(1)
        assert isinstance(made, gym.Env)
        return self._wrapped(made)

    def _wrapped(self, env: Env) -> Env:
        for wrapper in self.wrappers:
            with making(self.name):
                made: Any = wrapper(env)
            if not isinstance(made, gym.Env):
                raise InputError(
                    f"{shown(wrapper)} among wrappers returned {shown(made)}: it must return a gymnasium.Env"
                )
            env = made
        return env

    def _single(self, spec: EnvSpec) -> Env:
        with making(spec.id):
            # Gymnasium's own passive checker only warns, and costs a call per step: Watched checks instead.
            env = gym.make(spec, disable_env_checker=True, **self.env_kwargs)
        return self._wrapped(env)

    def _vectorize(self, make: Callable[[], Env], num_envs: int, first: int) -> VectorEnv:
        # Environments that are random when they are made depend on the run's seed, and differ between workers.
        entropy = None if self.vectorization == "sync" else torch.initial_seed() % 2**64
        makers = [partial(_watched, make, index, self.restarts, entropy) for index in range(first, first + num_envs)]
        if self.vectorization == "sync":
            with contextlib.ExitStack() as made:  # SyncVectorEnv leaves environments open when a later one fails
                envs = [made.enter_context(contextlib.closing(maker())) for maker in makers]
                made.pop_all()
            # SAME_STEP has no dummy steps, and a rollout copies what it stores.
            return SyncVectorEnv(
                [partial(_itself, env) for env in envs], copy=False, autoreset_mode=AutoresetMode.SAME_STEP
            )
        # Forking a process that runs threads can deadlock the child: workers come from a clean server that has
        # imported this package once. Scripts need `if __name__ == "__main__":`, as with any such workers.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["ppo_lightning.envs"])
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server would get it while it imports
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Workers(makers, first)


def refuse_running_statistics(env: Any, name: str) -> None:
    """Refuse an environment with a wrapper that normalises by running statistics.

    Evaluations, ``predict`` and checkpoints lack these: they would use other observations, or report normalised returns.

    Args:
        env: environment or vector, just made.
        name: what to call it in messages.

    Raises:
        InputError: it names the wrapper, and the parameter to use instead.
    """
    for layer in _layers(env):
        kept = [key for key, value in vars(layer).items() if _is_running(value)]
        is_gymnasiums = isinstance(layer, gym.wrappers.NormalizeObservation | gym.wrappers.NormalizeReward)
        if not is_gymnasiums and (_is_for_training(type(layer)) or not (kept or hasattr(layer, "update_running_mean"))):
            continue
        words = " ".join([type(layer).__name__, *kept]).lower()
        named = [key for key, parts in NORMALIZERS.items() if any(part in words for part in parts)] or list(NORMALIZERS)
        raise InputError(
            f"{name} is wrapped in {type(layer).__name__}, which normalises by running statistics of its own: evaluations, "
            f"predict and checkpoints do not have them; leave it out and set {' and '.join(f'{key}: true' for key in named)}"
        )


def _layers(env: Any) -> Iterator[Any]:
    """The wrappers of an environment or vector, outermost first, and those of the environments in a vector."""
    for attribute in ("env", "venv"):
        inner = vars(env).get(attribute) if hasattr(env, "__dict__") else None
        if inner is not None:
            yield env
            yield from _layers(inner)
            return
    if isinstance(env, AsyncVectorEnv):  # its environments are in other processes
        with contextlib.closing(env.env_fns[0]()) as one:
            yield from _layers(one)
    elif isinstance(env, SyncVectorEnv):
        for one in env.envs:
            yield from _layers(one)


def _is_running(value: Any) -> bool:
    """Whether a value holds running moments, as Gymnasium's and Stable-Baselines3's ``RunningMeanStd`` do."""
    if isinstance(value, dict):
        return any(_is_running(part) for part in value.values() if not isinstance(part, dict))
    return hasattr(value, "__dict__") and vars(value).keys() >= {"mean", "var", "count"}


def _is_for_training(wrapper: Callable[[Env], Env]) -> bool:
    return getattr(wrapper.func if isinstance(wrapper, partial) else wrapper, "training_only", False) is True


def _itself(env: Env) -> Env:
    return env


def _watched(make: Callable[[], Env], index: int, restarts: bool, entropy: int | None) -> "Watched":
    """A checked environment in this process, or in its own: then ``entropy`` seeds the shared generators."""
    try:
        if entropy is not None:
            seed_shared(entropy, 1 + index)  # a seed that differs from those of resets
        return Watched(make(), index, make if restarts else None, has_process=entropy is not None)
    except Exception as error:
        lines = "".join(traceback.format_exception(error))
        raise EnvironmentFault(f"environment {index} could not be made: {error}\n\n{lines}") from error


class Watched(gym.Wrapper[Any, Any, Any, Any]):
    """One environment whose exceptions, and values outside its spaces, are reported with its name.

    Where it can be restarted, an error in ``step`` truncates the episode, with reward 0 and the last observation before the
    error, which ``info`` reports under :data:`RESTARTED`. A ``reset`` that raises is retried once on a new environment.

    Args:
        env: the environment, wrapped as the user asked.
        index: its place in the vector, from 0.
        make: restarts it; None ends the run.
        has_process: it is alone in a process: resets with a seed also seed the process's shared generators.

    Raises:
        EnvironmentFault: from ``reset`` and ``step``, with the environment's own traceback.
    """

    def __init__(
        self, env: Env, index: int, make: Callable[[], Env] | None = None, *, has_process: bool = False
    ) -> None:
        super().__init__(env)
        self.index, self._make, self._has_process = index, make, has_process
        self._streams_seed: int | None = None
        self._seed: int | None = None
        self._renewals, self._is_new = 0, False
        self._last: Any = None
        self._steered = partial(set_values, values={})
        self._wear(env)

    def _wear(self, env: Env) -> None:
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
        if state is None or self._streams_seed is None:
            return state
        return [{**state[0], STREAMS: moved(self._streams_seed)}, *state[1:]]

    @run_state.setter
    def run_state(self, state: list[Any]) -> None:
        last = self._last
        restore_environment(self, state)
        if STREAMS in state[0] and self._streams_seed is not None:
            move(state[0][STREAMS], self._streams_seed)
        if self._last is None:  # the run that saved it could not restart environments
            self._last = last

    def steer(self, values: Mapping[str, Any]) -> str | None:
        """Set attributes of the environment, now and after each restart; returns the first name that it lacks."""
        self._steered = partial(set_values, values={**self._steered.keywords["values"], **values})
        return set_values(self.env, values)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and name the environment in errors."""
        try:
            observation, info = self._reset(seed, options)
        except EnvironmentFault as fault:
            if self._make is None:
                raise
            self._renew()
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
        except Exception as error:
            fault = self._fault("step", error)
            if self._make is None:
                raise fault from error
            self._renew()
            return self._last, 0.0, False, True, {RESTARTED: str(fault)}
        if type(given) is not tuple or len(given) != 5:
            given = self._five(given)
        observation, reward, terminated, truncated, info = given
        if type(reward) not in NUMBERS:
            reward = self._number(reward)
        if type(terminated) not in FLAGS or type(truncated) not in FLAGS:
            terminated, truncated = self._flag("terminated", terminated), self._flag("truncated", truncated)
        if type(info) is not dict:
            info = self._dict(given)
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

    def _five(self, given: Any) -> Any:
        if not isinstance(given, tuple | list) or len(given) != 5:
            raise EnvironmentFault(f"environment {self.index} {wrong_step(given)}")
        return given

    def _dict(self, given: Any) -> dict[str, Any]:
        if not isinstance(given[4], Mapping):
            raise EnvironmentFault(f"environment {self.index} {wrong_step(given)}")
        return dict(given[4])

    def _number(self, reward: Any) -> float:
        if reward is None:
            return np.nan  # the rollout refuses it, like any reward that is not finite
        given = number(reward)
        if given is None:
            raise EnvironmentFault(
                f"environment {self.index} returned in step the reward {described(reward)}: return one number"
            )
        return given

    def _flag(self, key: str, value: Any) -> bool:
        given = flag(value)
        if given is None:
            raise EnvironmentFault(
                f"environment {self.index} returned in step {key} {described(value)}: return True or False"
            )
        return given

    def _reset(self, seed: int | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._seed = seed
        elif self._is_new and self._seed is not None:  # else its episodes would not depend on the run's seed
            seed = int(np.random.SeedSequence([self._seed, self._renewals]).generate_state(1)[0])
        self._is_new = False
        if self._has_process and seed is not None:
            self._streams_seed = seed
            seed_shared(seed)
        try:
            given: Any = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._fault("reset", error) from error
        if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[1], Mapping):
            raise EnvironmentFault(f"environment {self.index} {wrong_reset(given)}")
        self._check("reset", given[0])
        return given[0], dict(given[1])

    def _renew(self) -> None:
        assert self._make is not None
        with contextlib.suppress(Exception):  # it has failed already
            self.env.close()
        self._wear(self._make())
        self._steered(self.env)
        self._renewals, self._is_new = self._renewals + 1, True

    def _masked(self, where: str, info: dict[str, Any]) -> dict[str, Any]:
        assert self._masks is not None
        try:
            return {MASK: np.asarray(self._masks()), **info}
        except Exception as error:
            raise self._fault(f"action_masks after {where}", error) from error

    def _fault(self, where: str, error: Exception) -> EnvironmentFault:
        old = old_api(error)
        if old is not None:
            return EnvironmentFault(f"environment {self.index} {old}")
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


def resolve(env: EnvSource) -> EnvSource:
    """The function or class that a dotted path names (``package.module.make``); anything else is unchanged."""
    if not isinstance(env, str) or "." not in env or ":" in env or env in gym.registry:
        return env
    module, _, name = env.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two for an invalid module name
        raise InputError(
            f"env={env}: cannot import it ({error}); give a Gymnasium id or the path of a function"
        ) from error


def find_spec(env_id: str) -> EnvSpec:
    """The registered specification of an id such as ``CartPole-v1`` or ``module:Id-v0``.

    Raises:
        InputError: nothing is registered under the id; the message names the nearest ones.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:
            raise InputError(
                f"env={env_id}: cannot import {module} ({error}); install it or correct its name"
            ) from error
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        known = list(gym.registry)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        base = re.sub(r"-v\d+$", "", name).lower()
        versions = [other for other in known if re.sub(r"-v\d+$", "", other).lower() == base]
        prefix = f"{module}:" if module else ""
        matches = ", ".join(f"{prefix}{match}" for match in dict.fromkeys([*versions, *close]))
        package = next((package for begin, package in PACKAGES.items() if name.startswith(begin)), None)
        if package is not None and package != module:
            extra = (
                f"pip install {package}" if package not in EXTRAS else f'pip install "ppo-lightning[{EXTRAS[package]}]"'
            )
            install = "" if importlib.util.find_spec(package) else f" after {extra}"
            raise InputError(
                f"there is no environment {name!r} until {package} is imported: write {package}:{name}{install}"
            ) from error
        hint = f"did you mean {matches}?" if matches else "list what is there with gymnasium.pprint_registry()"
        elsewhere = "" if module else f" (one of another package is written package:{name.strip() or 'Name-v0'})"
        raise InputError(f"there is no environment {name!r}: {hint}{elsewhere}") from error


@contextlib.contextmanager
def making(name: str) -> Iterator[None]:
    """Report why an environment could not be made; for a failed import, the command that installs it."""
    try:
        yield
    except InputError:
        raise
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        text = f"{error} {error.__cause__ or ''}"
        extra = next((extra for module, extra in EXTRAS.items() if module.lower() in text.lower()), None)
        if extra is None:
            raise InputError(f"{name} needs a package that is not installed: {error}") from error
        raise InputError(
            f'{name} needs packages that are not installed: pip install "ppo-lightning[{extra}]"'
        ) from error
    except Exception as error:
        raise InputError(
            f"making {name} raised {type(error).__name__}: {error}; check env, env_kwargs and wrappers"
        ) from error


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:  # builtins have none to show
        return set()
