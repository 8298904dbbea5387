"""One interface to every vector of environments, with one place for automatic resets."""

import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from ppo_lightning.envs.attributes import set_attributes, time_limit, wrapper_chain
from ppo_lightning.envs.checked import RESTARTED, CheckedEnv
from ppo_lightning.envs.conversion import SpaceConverter, old_api
from ppo_lightning.envs.info import (
    InfoAccumulator,
    SumsAndCounts,
    accept_any_info,
    final_info,
    life_lost,
    metrics_at_end,
    success_and_failure,
)
from ppo_lightning.envs.make import EnvFactory
from ppo_lightning.envs.masks import ActionMasks
from ppo_lightning.envs.serial import SerialVectorEnv
from ppo_lightning.envs.state import deserialize, restore_vector, same_signature, serialize, vector_state
from ppo_lightning.envs.workers import ForkserverAsyncVectorEnv, WorkerDied, WorkerMonitor, close
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.spaces import MASK, Array, Tree, flatten_fn, tree_map, without_mask


class Transition(NamedTuple):
    """Result of one step of N environments, in any autoreset mode."""

    observation: Tree
    """[N, …] next policy input: the first observation of the new episode where one ended."""
    reward: Array
    """[N]"""
    terminated: Array
    """[N] bool, the episode reached a terminal state."""
    truncated: Array
    """[N] bool, the episode was cut, by a time limit usually."""
    valid: Array | None
    """[N] bool, False where NEXT_STEP spent the call on a reset; None where every call was a step."""
    done_indices: Array
    """[E] indices of the environments whose episode ended."""
    is_first: Array
    """[N] bool, ``observation`` is the first of an episode."""
    final_observation: Tree | None
    """[E, …] the last observations of those episodes."""
    life_lost: Array | None
    """[N] bool, terminal for learning though the episode continues (Atari); None where no life was lost."""
    success_failure: Array | None
    """[E, 2] success and failure, each 1.0 or 0.0 where the environment reports it, else NaN."""
    metrics: dict[str, Array]
    """[E] metrics under ``info["metrics"]`` at the end of those episodes, by name; NaN where missing."""


class TensorTransition(NamedTuple):
    """Result of one step of N environments as tensors, without device synchronisation."""

    observation: Tree
    """[N, …] next policy input."""
    reward: Tensor
    """[N]"""
    terminated: Tensor
    """[N] bool"""
    truncated: Tensor
    """[N] bool"""
    final_observation: Tree | None
    """[N, …] observations after the step, valid where an episode ended; None where not given."""
    success_failure: Tensor | None
    """[N, 2] success and failure, 1 or 0 where the environment reports it, else NaN; valid where an episode ended."""


@dataclass
class RestartBudget:
    """How often crashed environments were restarted in this run, and how often they may be."""

    limit: int = 0
    """Restarts that the run allows."""
    count: int = 0
    """Restarts so far."""

    def consume(self, cause: str) -> None:
        """Count a restart, with a warning.

        Args:
            cause: error and its place, in the first line.

        Raises:
            EnvironmentFault: no restarts are left.
        """
        if self.count >= self.limit:
            raise EnvironmentFault(f"{cause}\n\nall of max_env_restarts = {self.limit} are used up")
        self.count += 1
        error = cause.partition("\n")[0]
        warnings.warn(f"{error}: restarted ({self.count} of {self.limit})", stacklevel=2)


class VectorEnvAdapter:
    """N environments with automatic resets, in any autoreset mode of their vector.

    ``NEXT_STEP`` spends the call after an episode's end on the reset: ``valid`` is False there. ``SAME_STEP`` resets at once
    and returns the last observation in ``info``. ``DISABLED`` is reset here.

    Where restarts are allowed, only the environment that raises is restarted. Gymnasium cannot replace a single worker
    process: where one dies or hangs in a step, the whole vector is restarted. Unfinished episodes end as truncated, with
    reward 0 and the last observation.

    Args:
        factory: makes the vector.
        num_envs: how many environments, where the vector does not set its own number.
        timeout_s: seconds after which a step or reset of worker processes is an error.
        made: the vector, where it exists already.
        first: number of the first environment, in messages.
        restarts: how often a crashed environment may be restarted.
        info_keys: further keys of ``info`` whose values are accumulated.
        attributes: of the environments, to be set whenever they are made.
    """

    def __init__(
        self,
        factory: EnvFactory,
        num_envs: int,
        timeout_s: float,
        made: VectorEnv | None = None,
        first: int = 0,
        restarts: RestartBudget | None = None,
        info_keys: tuple[str, ...] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self._factory, self._first = factory, first
        self._attach(factory(num_envs, first) if made is None else made)
        self._restarts = RestartBudget() if restarts is None else restarts
        self._seed: int | None = None
        self._last_observation: Tree | None = None
        self._worker_error: WorkerDied | None = None
        self.name, self.time_limit_advice = factory.name, factory.time_limit_advice
        self.num_envs, self.timeout_s = self.env.num_envs, timeout_s
        self.info_accumulator = InfoAccumulator(info_keys, self.num_envs)
        """Metrics from the environments' ``info``."""
        self.crashed = np.zeros(self.num_envs, dtype=bool)
        """[N] environments that were restarted in the last step: their episodes did not end by themselves."""
        self.has_cut_episodes = False
        """An evaluation has cut an episode here, and has warned of it."""
        mode = self.env.metadata.get("autoreset_mode")  # a wrong guess would drop steps, or learn from resets
        try:
            self.mode = AutoresetMode(mode)
        except ValueError as error:
            known = [mode.value for mode in AutoresetMode]
            raise InputError(
                f"{self.name} has metadata['autoreset_mode'] = {mode!r}: it must be one of {known}"
            ) from error
        self._flatten = flatten_fn(without_mask(self.env.single_observation_space))
        self._converter = SpaceConverter(self.name, self.env.single_observation_space, self.num_envs, first)
        self._masks = ActionMasks(self.name, self.env, first)
        self._done = np.zeros(self.num_envs, dtype=bool)
        self._none_done = np.zeros(0, dtype=np.int64)
        self._action: Any = None
        self._device: torch.device | None = None
        self.tensor_observation: Tree | None = None
        """[N, …] first observations of a vector for :meth:`step_tensors`; None for any other."""
        self._attributes: dict[str, Any] = {}
        self.set_env_attributes(attributes or {})

    def _attach(self, env: VectorEnv) -> None:
        self.env = env
        accept_any_info(env)
        # Gymnasium copies observations into its own arrays: shapes and dtypes are right already.
        self._needs_conversion = type(env) not in (SyncVectorEnv, SerialVectorEnv, ForkserverAsyncVectorEnv)
        self._monitor = WorkerMonitor(env, self._first) if isinstance(env, AsyncVectorEnv) else None
        self._finalizer = None if self._factory.is_instance else weakref.finalize(self, _close, env)

    @property
    def groups(self) -> list[tuple[slice, "VectorEnvAdapter"]]:
        """Environments that step independently, and their indices: here all of them together."""
        return [(slice(0, self.num_envs), self)]

    @property
    def resets_take_a_step(self) -> bool:
        """Whether the vector spends a step on every reset, so that a rollout has dummy steps."""
        return self.mode is AutoresetMode.NEXT_STEP

    @property
    def action_mask(self) -> Array | None:
        """[N, M] bool, allowed actions after the last reset or step; None without masks."""
        return self._masks.current

    @property
    def missing_final_obs_message(self) -> str:
        """Message for a vector that does not give an episode's last observation."""
        return (
            f"{self.name} resets in the same step but gives no info['final_obs'], without which a time limit cannot "
            "be told from a terminal state: return it, or use another autoreset_mode"
        )

    def set_env_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of all environments, or call their methods: changed ones now, all after a restart.

        Raises:
            InputError: an environment lacks an attribute.
            EnvironmentFault: it raised, or its worker process died.
        """
        before, self._attributes = self._attributes, dict(attributes)
        same = {name for name, value in attributes.items() if name in before and before[name] == value}
        self._set_attributes({name: value for name, value in attributes.items() if name not in same})

    def _set_attributes(self, attributes: Mapping[str, Any]) -> None:
        if not attributes or self._worker_error is not None:
            return
        try:
            missing = self._wrap_errors("a change of attributes", lambda: self._missing_attributes(attributes))
        except WorkerDied as error:
            self._defer(error)
            return
        absent = next((name for name in missing if name is not None), None)
        if absent is not None:
            raise InputError(
                f"{self.name} has no attribute or method {absent!r}, neither itself nor a wrapper around it: correct the "
                "name, or set the attribute in __init__, so that it is there before the first reset"
            )

    def _missing_attributes(self, values: Mapping[str, Any]) -> list[str | None]:
        """Set attributes, and return the first name that each environment, or the vector, lacks."""
        *outer, inner = wrapper_chain(self.env)
        own = {name for name in values for layer in outer if name in vars(layer)}  # of a wrapper around the vector
        if own and isinstance(inner, SyncVectorEnv | AsyncVectorEnv):
            set_attributes(self.env, {name: values[name] for name in own})
            values = {name: value for name, value in values.items() if name not in own}
        if isinstance(inner, ForkserverAsyncVectorEnv):
            return self._call_each_worker(inner, "set_env_attributes", dict(values))
        if isinstance(inner, AsyncVectorEnv):
            raise InputError(
                f"{self.name} is an AsyncVectorEnv of your own, whose environments cannot say which attributes they have: "
                "give a callable that makes one environment, and vectorization async"
            )
        if not isinstance(inner, SyncVectorEnv):
            return [set_attributes(self.env, values)]
        return [
            env.set_env_attributes(values) if isinstance(env, CheckedEnv) else set_attributes(env, values)
            for env in inner.envs
        ]

    def time_limit(self) -> float | None:
        """Steps after which episodes end at the latest; None where unknown."""
        env = wrapper_chain(self.env)[-1]
        if isinstance(env, ForkserverAsyncVectorEnv):
            return self._wrap_errors("time_limit", lambda: self._call_each_worker(env, "time_limit")[0])
        return time_limit(env.envs[0] if isinstance(env, SyncVectorEnv) else self.env)

    def reset(self, seed: int | None) -> Tree:
        """Start all episodes: environment i is seeded with ``seed + i``, a native vector with ``seed``.

        Raises:
            EnvironmentFault: an environment raised, died, did not answer in time, or violates its spaces.
            InputError: the environments give masks that do not fit the actions.
        """
        self._done[:] = False
        self.info_accumulator.restart()
        self._seed = seed
        given, given_info = self._converter.reset(self._raw_reset(seed=seed))
        devices: list[torch.device] = []
        _map(given, lambda leaf: devices.append(leaf.device) if isinstance(leaf, Tensor) else None)
        self._device = devices[0] if devices else None
        observation, info = self._converter.observation("reset", self._arrays(given)), self._arrays(given_info)
        self._consume_restarts(info)
        self._masks.reset(observation, info)
        # Resets in the same step, without masks: every step returns the same structure.
        dense = self._device is not None and self.mode is AutoresetMode.SAME_STEP and self._masks.current is None
        self.tensor_observation = self._tensors("reset", given) if dense else None
        return self._flat(observation)

    def reset_envs(self, reset_mask: Array, observation: Tree) -> Tree:
        """Begin new episodes in some environments, where the vector supports it: Gymnasium's do.

        Args:
            reset_mask: [N] bool, the environments.
            observation: [N, …] of all of them now.

        Returns:
            [N, …] next policy input; ``observation`` where the vector does not support it.
        """
        if self.mode is not AutoresetMode.DISABLED and not isinstance(self.env, SyncVectorEnv | AsyncVectorEnv):
            return observation
        self.info_accumulator.step({}, reset_mask, None)
        given, info = self._reset_masked(reset_mask.copy())
        self._consume_restarts(info)
        self._masks.reset_envs(given, info, reset_mask)
        self._done[reset_mask] = False
        return self._flatten(given)

    def step(self, action: Any) -> Transition:
        """Step all environments: :meth:`step_async` and :meth:`step_wait` in one."""
        self.step_async(action)
        return self.step_wait()

    def step_async(self, action: Any) -> None:
        """Let worker processes begin a step; other vectors step in :meth:`step_wait`.

        Args:
            action: as the vector takes them, [N, …].

        Raises:
            EnvironmentFault: a worker process died.
        """
        self._action = action
        if self._monitor is not None and self._worker_error is None:
            try:
                self._call_workers("step", partial(cast(AsyncVectorEnv, self.env).step_async, action))
            except WorkerDied as error:
                self._defer(error)

    def step_wait(self) -> Transition:
        """Result of the step. Arrays may be the vector's buffers: copy what must outlive the next call.

        Raises:
            EnvironmentFault: an environment raised, died, did not answer in time, or allows no action.
        """
        if self._worker_error is not None:
            return self._restart_all(self._worker_error)
        try:
            observation, reward, terminated, truncated, info = self._step_result()
        except WorkerDied as error:
            self._defer(error)
            return self._restart_all(error)
        if self._restarts.limit:
            self._consume_restarts(info)
        done = terminated | truncated
        valid, is_first = None, done
        if self.mode is AutoresetMode.NEXT_STEP:
            is_first, self._done = self._done, done
            valid = ~is_first
        self.info_accumulator.step(info, done, valid)
        # After an episode's end comes a reset, for which masks do not matter; SAME_STEP has reset already.
        if self._masks.current is not None or MASK in info:
            self._masks.step(observation, info, ignore=None if self.mode is AutoresetMode.SAME_STEP else done)
        lost = life_lost(info, done)
        if not done.any():
            observation = self._flat(observation)
            return Transition(
                observation, reward, terminated, truncated, valid, self._none_done, is_first, None, lost, None, {}
            )

        ended = np.flatnonzero(done)
        if self.mode is AutoresetMode.SAME_STEP:
            final, last = self._final_observations(info, ended), final_info(info)
            info = info if last is None else last
        else:
            final = tree_map(lambda leaf: leaf[ended], self._flatten(observation))  # a copy: fancy indexing
        outcome = success_and_failure(info, done)
        metrics = {name: numbers[ended] for name, numbers in metrics_at_end(info, done).items()}
        if self.mode is AutoresetMode.DISABLED:
            observation, info = self._reset_masked(done)
            self._masks.reset_envs(observation, info, done)
        return Transition(
            self._flat(observation),
            reward,
            terminated,
            truncated,
            valid,
            ended,
            is_first,
            final,
            lost,
            None if outcome is None else outcome[ended],
            metrics,
        )

    def step_tensors(self, action: Any) -> TensorTransition:
        """Step a vector of tensors that resets in the same step, without copies.

        Args:
            action: as the vector takes them, tensors [N, …].

        Raises:
            EnvironmentFault: an environment raised.
        """
        converter, device = self._converter, cast(torch.device, self._device)
        given = self._wrap_errors("step", lambda: self.env.step(action))
        observation, reward, terminated, truncated, info = converter.step(given)
        reward = converter.tensor_reward(reward, device)
        terminated = converter.tensor_flags("terminated", terminated, device)
        truncated = converter.tensor_flags("truncated", truncated, device)
        final = info.get("final_obs", info.get("final_observation"))  # Gymnasium's name, and ManiSkill's
        last = final_info(info)
        self.info_accumulator.step(info, terminated | truncated, None)
        return TensorTransition(
            self._tensors("step", observation),
            reward,
            terminated,
            truncated,
            None if final is None else self._tensors("step", final),
            success_and_failure(info if last is None else last, reward),
        )

    def pop_info(self) -> SumsAndCounts:
        """Metrics from ``info`` since the last call."""
        return self.info_accumulator.pop()

    def state(self) -> dict[str, Any] | None:
        """State of all environments between two steps, as plain data; None where one cannot be saved."""
        if self._worker_error is not None:
            return None
        try:
            env = self._wrap_errors("get_state", lambda: vector_state(self.env, self._call_each_worker))
        except WorkerDied as error:
            self._defer(error)
            return None
        if env is None:
            return None
        return {
            "env": env,
            "done": serialize(self._done),
            "masks": serialize(self._masks.current),
            "last_observation": serialize(self._last_observation),
            "seed": self._seed,
            "restarts": self._restarts.count,
            "info": self.info_accumulator.state(),
            "attributes": repr(self._attributes),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore, after a reset, the state of :meth:`state`; False, without effect, if it is of other environments."""
        now = self.state()
        if now is None or not same_signature(now["env"], state.get("env", [])):
            return False
        self._call_workers("set_state", lambda: restore_vector(self.env, state["env"]))
        self._done, self._masks.current = deserialize(state["done"]), deserialize(state["masks"])
        self._seed, self._restarts.count = state["seed"], state["restarts"]
        self.info_accumulator.restore(state["info"])
        if state["last_observation"] is not None:
            self._last_observation = deserialize(state["last_observation"])
        if state["attributes"] != repr(self._attributes):  # the saved state has replaced the attributes
            self._set_attributes(self._attributes)
        return True

    def close(self) -> None:
        """Close the vector and its workers, busy or dead; a vector that the user made stays open."""
        if self._finalizer is not None:
            self._finalizer()

    def detach_finalizer(self) -> bool:
        """Leave closing to the caller; False where the vector is closed, or the user's."""
        return self._finalizer is not None and self._finalizer.detach() is not None

    # --- restarts ------------------------------------------------------------------------------------------------------

    def _consume_restarts(self, info: dict[str, Any]) -> None:
        """Count the environments that report a restart."""
        self.crashed[:] = False
        for reported in (info, final_info(info) or {}):
            for index, cause in enumerate(reported.get(RESTARTED, ())):
                if cause is not None:
                    self._restarts.consume(cause)
                    self.crashed[index] = True

    def _defer(self, error: WorkerDied) -> None:
        """Restart the worker processes in the next :meth:`step_wait`, where restarts are allowed."""
        if self._restarts.limit == 0:
            raise error
        self._worker_error = error

    def _restart_all(self, error: WorkerDied) -> Transition:
        """Replace the worker processes, and end all of their episodes."""
        self._worker_error = None
        self._restarts.consume(str(error))
        self.close()
        self._attach(self._factory(self.num_envs, self._first))
        self._set_attributes(self._attributes)
        none, everyone = np.zeros(self.num_envs, dtype=bool), np.ones(self.num_envs, dtype=bool)
        self.info_accumulator.step({}, everyone, None)
        final, seed = self._last_observation, self._seed
        if seed is not None:  # not the same episodes again
            seed = int(np.random.SeedSequence([seed, self._restarts.count]).generate_state(1)[0])
        observation, reward = self.reset(seed), np.zeros(self.num_envs)
        self.crashed[:] = True
        ended = np.arange(self.num_envs)
        return Transition(observation, reward, none, everyone, None, ended, everyone, final, None, None, {})

    # --- calls of the vector -------------------------------------------------------------------------------------------

    def _raw_reset(self, **how: Any) -> Any:
        if self._monitor is None:
            return self._wrap_errors("reset", lambda: self.env.reset(**how))
        env: Any = self.env
        self._call_workers("reset", lambda: env.reset_async(**how))
        return self._call_workers("reset", env.reset_wait, self.timeout_s)

    def _reset_masked(self, reset_mask: Array) -> tuple[Any, dict[str, Any]]:
        """Observation and info of all environments, after a reset of some [N] bool."""
        given = self._converter.reset(self._raw_reset(options={"reset_mask": reset_mask}))
        observation, info = map(self._arrays, given)
        return self._converter.observation("reset", observation), info

    def _step_result(self) -> Any:
        """Result of a step, as arrays of the spaces' shapes and dtypes."""
        env: Any = self.env
        action, device, converter = self._action, self._device, self._converter
        if self._monitor is not None:
            given = self._call_workers("step", env.step_wait, self.timeout_s)
        elif device is None:
            given = self._wrap_errors("step", lambda: env.step(action))
        else:
            as_tensors = _map(action, lambda leaf: torch.from_numpy(leaf).to(device))
            given = self._arrays(self._wrap_errors("step", lambda: env.step(as_tensors)))
        if not self._needs_conversion:
            return given
        observation, reward, terminated, truncated, info = converter.step(given)
        return (
            converter.observation("step", observation),
            converter.reward(reward),
            converter.flags("terminated", terminated),
            converter.flags("truncated", truncated),
            info,
        )

    def _flat(self, observation: Any) -> Tree:
        """The next policy input, which is kept where the workers may be lost in the next step."""
        tree = self._flatten(observation)
        if self._restarts.limit and self._monitor is not None:
            self._last_observation = tree_map(np.copy, tree)
        return tree

    def _final_observations(self, info: dict[str, Any], ended: Array) -> Tree:
        """[E, …] the last observations of the episodes that ended, from ``info``."""
        rows = info.get("final_obs", info.get("final_observation"))
        if rows is None:
            raise EnvironmentFault(self.missing_final_obs_message)
        if isinstance(rows, np.ndarray) and rows.dtype == object:
            each = [self._flatten(self._converter.row("final_obs", rows[index], index)) for index in ended]
            return tree_map(lambda *leaf: np.stack(leaf), *each)
        return tree_map(lambda leaf: leaf[ended], self._flatten(self._converter.observation("final_obs", rows)))

    def _tensors(self, where: str, observation: Any) -> Tree:
        return self._flatten(self._converter.tensor_observation(where, observation, cast(torch.device, self._device)))

    def _arrays(self, given: Any) -> Any:
        """Values of a vector, tensors as arrays."""
        return given if self._device is None else _map(given, _to_array)

    def _call_each_worker(self, env: AsyncVectorEnv, name: str, *args: Any) -> Any:
        """Get an attribute of each environment in its worker process, or call its method."""
        assert self._monitor is not None
        self._monitor.call(name, lambda: env.call_async(name, *args))
        return self._monitor.call(name, env.call_wait, self.timeout_s)

    def _call_workers(self, where: str, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """Call the vector; with ``timeout_s``, wait for the answers of worker processes first."""
        monitor = self._monitor
        return self._wrap_errors(where, call if monitor is None else lambda: monitor.call(where, call, timeout_s))

    def _wrap_errors(self, where: str, call: Callable[[], Any]) -> Any:
        """Call, and name the vector in errors."""
        try:
            return call()
        except (EnvironmentFault, InputError):
            raise
        except Exception as error:
            old = old_api(error)
            if old is not None:
                raise EnvironmentFault(f"{self.name} {old}") from error
            lines = "".join(traceback.format_exception(error))
            raise EnvironmentFault(
                f"{self.name} raised {type(error).__name__} in {where}: {error}\n\n{lines}"
            ) from error


def _to_array(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.dtype is torch.bfloat16:  # NumPy has none
        leaf = leaf.float()
    return leaf.detach().to_dense().cpu().numpy()


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of everything inside dictionaries and tuples."""
    if isinstance(tree, dict):
        return {key: _map(part, function) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_map(part, function) for part in tree)
    return function(tree)


def _close(env: VectorEnv) -> None:
    if isinstance(env, AsyncVectorEnv):
        close(env)
    else:
        env.close()
