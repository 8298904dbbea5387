"""Makes vectors of environments: ids, callables, wrappers, vectorisation."""

import contextlib
import difflib
import importlib.util
import inspect
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import forkserver
from typing import Any, Literal, get_args

import gymnasium as gym
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from ppo_lightning.envs.checked import Env, make_checked
from ppo_lightning.envs.serial import SerialVectorEnv
from ppo_lightning.envs.streams import temporarily_seeded
from ppo_lightning.envs.third_party import adapt
from ppo_lightning.envs.workers import ForkserverAsyncVectorEnv
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import shown

EnvSource = str | VectorEnv | Callable[..., VectorEnv | Env]
Vectorization = Literal["sync", "async", "vector_entry_point"]

EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "ale_py": "atari", "minigrid": "minigrid", "pygame": "classic-control"}
"""Extra of this package that installs a missing module of an environment."""

PACKAGES = {
    "ALE/": "ale_py",
    "MiniGrid-": "minigrid",
    "BabyAI-": "minigrid",
    "dm_control/": "shimmy",
    "Meta-World/": "metaworld",
    "gym_pusht/": "gym_pusht",
}
"""Prefixes of the ids that a package registers when it is imported."""

NORMALIZERS = {"normalize_observation": ("obs",), "normalize_reward": ("rew", "ret")}
"""Our parameters that normalise, with parts of the names of wrappers, or of their attributes, that do the same."""


@dataclass(frozen=True)
class EnvFactory:
    """Factory of vectors of environments; no environment is made until it is called.

    Args:
        env: Gymnasium id (``module:Id-v0`` imports the module first), a VectorEnv, or a callable that makes a VectorEnv
            or a single environment.
        env_kwargs: arguments for ``gymnasium.make`` or the callable.
        wrappers: applied to each environment, first to last, innermost first.
        vectorization: how single environments become a vector (see :class:`PPO`).
        num_workers: processes of ``async``, at most; None is one for each environment.
        restarts: an environment that raises is restarted, and its episode ends there as truncated.

    Raises:
        InputError: the id is unknown, a package is not installed, or wrappers do not apply.
    """

    env: EnvSource
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Callable[[Env], Env]] = ()
    vectorization: Vectorization = "sync"
    num_workers: int | None = None
    restarts: bool = False

    def __post_init__(self) -> None:
        if self.vectorization not in get_args(Vectorization):
            raise InputError(f"vectorization must be one of {get_args(Vectorization)}, got {self.vectorization!r}")
        if self.num_workers is not None and self.vectorization != "async":
            raise InputError(
                f"num_workers={self.num_workers} are processes, which vectorization={self.vectorization} has none of: give "
                "vectorization=async, or leave num_workers out"
            )
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

    def for_evaluation(self) -> "EnvFactory | None":
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

    def infer_spaces(self, num_envs: int) -> tuple[gym.Space[Any], gym.Space[Any], VectorEnv | None]:
        """Spaces of one environment, and the vector itself where it had to be made to get them.

        Raises:
            InputError: a wrapper normalises by its own statistics.
        """
        if isinstance(self.env, VectorEnv):
            made: VectorEnv | Env = adapt(self.env)
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
            return adapt(self.env)
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
            return adapt(made)
        assert not isinstance(self.env, VectorEnv)
        kwargs = dict(self.env_kwargs)
        if "num_envs" not in kwargs and "num_envs" in _parameters(self.env):
            kwargs["num_envs"] = num_envs
        with making(self.name):
            made = adapt(self.env(**kwargs))
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
            # Gymnasium's own passive checker only warns, and costs a call per step: CheckedEnv checks instead.
            env = gym.make(spec, disable_env_checker=True, **self.env_kwargs)
        return self._wrapped(env)

    def _vectorize(self, make: Callable[[], Env], num_envs: int, first: int) -> VectorEnv:
        # Environments that are random when they are made depend on the seed of this process, and differ between workers.
        entropy = None if self.vectorization == "sync" else torch.initial_seed() % 2**64
        makers = [
            partial(make_checked, make, index, self.restarts, entropy) for index in range(first, first + num_envs)
        ]
        if self.vectorization == "sync":
            with contextlib.ExitStack() as made:  # SyncVectorEnv leaves environments open when a later one fails
                envs = [made.enter_context(contextlib.closing(maker())) for maker in makers]
                made.pop_all()
            # SAME_STEP has no dummy steps, and a rollout copies what it stores.
            return SerialVectorEnv(
                [partial(_identity, env) for env in envs], copy=False, autoreset_mode=AutoresetMode.SAME_STEP
            )
        # Forking a process that runs threads can deadlock the child: workers come from a clean server that has
        # imported this package once. Scripts need `if __name__ == "__main__":`, as with any such workers.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["ppo_lightning.envs"])
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server would get it while it imports
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with temporarily_seeded(torch.initial_seed() % 2**64):  # one environment is made here, to ask for its spaces
            return ForkserverAsyncVectorEnv(makers, first, min(self.num_workers or num_envs, num_envs))


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


def _identity(env: Env) -> Env:
    return env


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
