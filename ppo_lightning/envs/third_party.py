"""Vector environments of other packages behind Gymnasium's interface."""

import difflib
import functools
import importlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Space
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor
from typing_extensions import override

from ppo_lightning.errors import EnvironmentFault, InputError


def adapt(env: Any) -> Any:
    """Adapt another package's vector to Gymnasium's interface; return any other environment unchanged."""
    if isinstance(env, VectorEnv):
        inner: Any = env
        while isinstance(inner, VectorWrapper) and not isinstance(inner, AtariFullGames):
            inner = inner.env
        package = type(inner).__module__.partition(".")[0]
        if package == "ale_py":
            return AtariFullGames(env)
        vector: Any = inner
        if package == "mani_skill":  # it resets in the same step without declaring it
            if not vector.auto_reset:
                raise InputError("ManiSkillVectorEnv must reset by itself: give it auto_reset=True")
            vector.metadata = {**inner.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        return env
    is_vector = all(hasattr(env, name) for name in ("num_envs", "device", "step", "reset"))
    if is_vector and (hasattr(env, "get_observations") or hasattr(env, "single_action_space")):
        return IsaacLabVectorEnv(env)
    return env


LOGS = ("log", "episode")
"""Keys of simulators' metrics."""

FINAL_OBSERVATIONS = ("final_obs", "final_observation")
"""Keys of the last observations of episodes (Isaac Lab; ApexRL), of all environments in the order of observations."""

NOT_INFO = frozenset((*LOGS, *FINAL_OBSERVATIONS, "observations", "time_outs"))
"""Extras that are logged elsewhere, or that are never read and not worth copying."""


class IsaacLabVectorEnv(VectorEnv):
    """A simulator of many environments on tensors: Isaac Lab's environments, or any VecEnv of rsl_rl.

    They reset in the same step. An episode's last observation is ``extras["final_obs"]``, which Isaac Lab's environments give
    with ``cfg.compute_final_obs = True``, or ``extras["final_observation"]``. Without it, as in rsl_rl, a time limit bootstraps
    from the value of the previous observation, which counts one step twice. Where ``cfg.is_finite_horizon``, it is terminal.

    ``extras["log"]``, and rsl_rl's older ``extras["episode"]``, are logged as those of any environment; other extras are
    its ``info``. A value that is not one number per environment is replaced by its mean, as in rsl_rl.

    Observations in several groups ("policy", "critic") are a Dict of them: ``actor_keys`` and ``critic_keys`` of
    :class:`ActorCritic` choose among them.

    Args:
        simulator: the environment.
    """

    def __init__(self, simulator: Any) -> None:
        self.simulator = simulator
        self.num_envs = int(simulator.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._is_gymnasium = hasattr(simulator, "single_action_space")
        self._is_finite = bool(getattr(getattr(simulator, "cfg", None), "is_finite_horizon", False))
        if self._is_gymnasium:
            self.single_observation_space = _gymnasium_space(simulator.single_observation_space)
            self.single_action_space = _gymnasium_space(simulator.single_action_space)
        else:
            self.single_action_space = _unbounded((int(simulator.num_actions),))
            given = _groups(simulator.get_observations())
            if isinstance(given, dict):
                self.single_observation_space = _space(given)
            elif isinstance(given, Tensor):
                self.single_observation_space = _unbounded(given.shape[1:])
            else:
                raise InputError(
                    f"{type(simulator).__name__}.get_observations returned {given!r}: it must return a tensor, or a "
                    "TensorDict of groups"
                )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._before: Any = None

    @override
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin all episodes; rsl_rl's interface has no seed: give it to the simulator itself."""
        seed = seed % 2**31 if isinstance(seed, int) else seed  # as their generators take it
        self._before = _groups(self.simulator.reset(seed=seed) if self._is_gymnasium else self.simulator.reset())
        if self._before is None:  # some resets return nothing
            self._before = _groups(self.simulator.get_observations())
        return self._before, {}

    @override
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments."""
        if self._is_gymnasium:
            given, reward, terminated, truncated, extras = self.simulator.step(actions)
            if self._is_finite:
                terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        else:
            given, reward, done, extras = self.simulator.step(actions)
            done = done.bool()
            limited = extras.get("time_outs", extras.get("truncated"))
            truncated = done.new_zeros(done.shape) if limited is None else limited.bool() & done
            terminated = done & ~truncated
        before, self._before = self._before, _groups(given)
        shown = next((extras[name] for name in FINAL_OBSERVATIONS if extras.get(name) is not None), None)
        info = {key: value for key, value in extras.items() if key not in NOT_INFO}
        log = {
            name: _mean(value, self.num_envs)
            for key in LOGS
            if isinstance(extras.get(key), Mapping)
            for name, value in extras[key].items()
        }
        if log:
            info["log"] = log
        info["final_obs"] = before if shown is None else self._final(shown, before)
        return self._before, reward, terminated, truncated, info

    def _final(self, shown: Any, before: Any, path: str = "") -> Any:
        """Last observations of episodes, in the groups of the observation; missing groups keep the previous observation."""
        if isinstance(shown, np.ndarray) and shown.dtype == object:  # a tensor, or groups, per finished environment
            return self._joined(shown, before)
        shown = _groups(shown)
        if isinstance(before, dict) and isinstance(shown, dict):
            return {
                name: self._final(shown[name], part, f"{path}.{name}".strip(".")) if name in shown else part
                for name, part in before.items()
            }
        if isinstance(before, Tensor) and isinstance(shown, Tensor) and shown.shape == before.shape:
            return shown.to(before)
        got = f"{tuple(shown.shape)}" if isinstance(shown, Tensor) else type(shown).__name__
        promised = f"a tensor {tuple(before.shape)}" if isinstance(before, Tensor) else f"groups {list(before)}"
        raise EnvironmentFault(
            f"{type(self.simulator).__name__} gave final observations {path and path + ' '}{got} in its extras: give "
            f"{promised}, as it observes"
        )

    def _joined(self, shown: Any, before: Any) -> Any:
        """Stack observations of environments, None where no episode ended, into one batch."""
        if isinstance(before, dict):
            parts = {name: np.full(self.num_envs, None, dtype=object) for name in before}
            for index, row in enumerate(shown):
                for name, part in {} if row is None else row.items():
                    if name in parts:
                        parts[name][index] = part
            return {name: self._joined(parts[name], part) for name, part in before.items()}
        joined = before.clone()
        for index, row in enumerate(shown):
            if row is not None:
                joined[index] = torch.as_tensor(row)
        return joined

    @override
    def close_extras(self, **kwargs: Any) -> None:
        """Close it, if it can be closed."""
        getattr(self.simulator, "close", lambda: None)()


def _mean(value: Any, num_envs: int) -> Any:
    """A value to log: one number per environment unchanged, other numeric tensors and arrays as their mean."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.is_complex() or not value.ndim or value.shape == (num_envs,):
        return value
    return value.float().mean()  # NaN for an empty one, which is left out


def _groups(given: Any) -> Any:
    """Observations as one tensor, or a dictionary of groups, copied: simulators overwrite them."""
    if isinstance(given, tuple):  # with extras
        given = given[0]
    if isinstance(given, Tensor):
        return given.clone() if given.dtype != torch.float64 else given.float()
    if hasattr(given, "items"):
        return {str(name): _groups(leaf) for name, leaf in given.items()}
    return given


def _space(groups: dict[str, Any]) -> Dict:
    return Dict(
        {name: _space(leaf) if isinstance(leaf, dict) else _unbounded(leaf.shape[1:]) for name, leaf in groups.items()}
    )


def _gymnasium_space(space: Any) -> Space[Any]:
    """A space as Gymnasium's: mjlab has classes of its own, with the same fields."""
    if isinstance(space, Space):
        return space
    if hasattr(space, "spaces"):
        return Dict({name: _gymnasium_space(part) for name, part in space.spaces.items()})
    low, high = (np.broadcast_to(np.asarray(bound, space.dtype), space.shape) for bound in (space.low, space.high))
    return Box(low, high, dtype=np.dtype(space.dtype).type)


def _unbounded(shape: Any) -> Box:
    return Box(-np.inf, np.inf, tuple(shape), dtype=np.float32)


def mjlab_env(task: str, num_envs: int, *, device: str | None = None) -> IsaacLabVectorEnv:
    """A task of mjlab, simulated by MuJoCo Warp.

    Args:
        task: its name, such as ``Mjlab-Velocity-Flat-Unitree-Go1`` (``list_tasks`` of ``mjlab.tasks.registry``).
        num_envs: how many environments.
        device: of the simulation; null is this rank's GPU, or the CPU where there is none.

    Raises:
        InputError: mjlab is not installed, or has no such task.
    """
    try:
        importlib.import_module("mjlab.tasks")  # which registers them
    except ImportError as error:
        raise InputError(f"{task} needs mjlab: pip install mjlab ({error})") from error
    registry: Any = importlib.import_module("mjlab.tasks.registry")
    envs: Any = importlib.import_module("mjlab.envs")
    _known_task(task, registry.list_tasks(), "mjlab")
    config = registry.load_env_cfg(task)
    config.scene.num_envs, config.seed = num_envs, _seed()
    return IsaacLabVectorEnv(envs.ManagerBasedRlEnv(config, device=device or _device()))


def isaac_lab_env(task: str, num_envs: int, *, device: str | None = None) -> IsaacLabVectorEnv:
    """A task of Isaac Lab. The first call starts Isaac Sim without a window; a process has one simulation.

    Args:
        task: its id, such as ``Isaac-Velocity-Flat-Anymal-C-v0``.
        num_envs: how many environments.
        device: of the simulation; null is this rank's GPU, or the CPU where there is none.

    Raises:
        InputError: Isaac Lab is not installed, or has no such task.
    """
    device = device or _device()
    try:
        _start_isaac_sim()
    except ImportError as error:
        raise InputError(f"{task} needs Isaac Lab, and to be run by its Python (isaaclab.sh -p): {error}") from error
    tasks: Any = importlib.import_module("isaaclab_tasks.utils")
    _known_task(task, gym.registry, "Isaac Lab")
    config = tasks.parse_env_cfg(task, device=device, num_envs=num_envs)
    config.seed = _seed()
    if hasattr(
        config, "compute_final_obs"
    ):  # from 3.0 on: time limits bootstrap from the observation at which they cut
        config.compute_final_obs = True
    return IsaacLabVectorEnv(gym.make(task, cfg=config).unwrapped)


@functools.cache
def _start_isaac_sim() -> Any:
    """Start it once in a process: all other modules of Isaac Lab can be imported only after it."""
    app: Any = importlib.import_module("isaaclab.app")
    return app.AppLauncher(headless=True, device=_device())


def _known_task(task: str, known: Iterable[str], package: str) -> None:
    if task not in (names := list(known)):
        near = difflib.get_close_matches(task, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(names)[:5])} …"
        raise InputError(f"{package} has no task {task}: {hint}")


def _device() -> str:
    return f"cuda:{_rank('LOCAL_RANK', 'SLURM_LOCALID')}" if torch.cuda.is_available() else "cpu"


def _seed() -> int:
    """For what a simulator draws while it is made, before its first reset: another one on each rank."""
    return (torch.initial_seed() + _rank("RANK", "SLURM_PROCID", "LOCAL_RANK")) % 2**31


def _rank(*variables: str) -> int:
    """From the first variable that the launcher of ranks has set: environments are made before ranks are connected."""
    return int(next((os.environ[name] for name in variables if name in os.environ), 0))


class AtariFullGames(VectorWrapper):
    """``ale_py.vector_env.AtariVectorEnv`` whose episodes are games.

    With ``life_loss_info`` it reports a lost life as terminal within a game. Here ``terminated`` is the end of a game, and
    ``info["life_lost"]`` [N] reports a lost life: terminal for learning, but not the end of an episode.

    Args:
        env: the vector.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        mode: Any = getattr(env.unwrapped, "autoreset_mode", env.metadata["autoreset_mode"])
        # All its instances write to one dictionary of the base class.
        self._metadata = {**env.metadata, "autoreset_mode": AutoresetMode(mode)}
        self._same_step = self._metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        self._begun = np.zeros(env.num_envs, dtype=np.int64)
        self._lost = np.zeros(env.num_envs, dtype=bool)

    @override
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start all games; environment i is seeded with ``seed + i``."""
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
                "AtariVectorEnv restarted the game after a lost life, since episodic_life is true: leave that out, and "
                "give life_loss_info: true, which makes lost lives terminal while the game continues"
            )
        self._lost = terminated
        if terminated.any():
            # In the same step, info is already that of the new game, which has begun at another frame.
            over = begun != self._begun if self._same_step else info["lives"] == 0
            info["life_lost"] = self._lost = terminated & ~over
            terminated = terminated & over
        self._begun = begun
        return observation, reward, terminated, truncated, info


class EnvPool(VectorEnv):
    """A vector of the package envpool, with Gymnasium's seeding and batched spaces.

    Args:
        task: its name, such as ``Pong-v5``.
        num_envs: how many environments.
        options: further arguments of ``envpool.make_gymnasium``.

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
        """Start all episodes. envpool is seeded when it is made, so another seed recreates it."""
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
