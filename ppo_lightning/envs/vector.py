"""One interface to every vector of environments, with one place for automatic resets."""

import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from ppo_lightning.envs.info import InfoLog, accept_any_info, final_info, mask_of, metrics_at_end, numbers_of
from ppo_lightning.envs.make import RESTARTED, EnvFactory
from ppo_lightning.envs.masks import ActionMasks
from ppo_lightning.envs.overrides import steer
from ppo_lightning.envs.promise import Promise, old_api
from ppo_lightning.envs.state import pack, restore_vector, same_environments, unpack, vector_state
from ppo_lightning.envs.values import layers, time_limit
from ppo_lightning.envs.workers import Watch, WorkerLost, Workers, close
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.spaces import MASK, Array, Tree, flatten_fn, tree_map, without_mask

SUCCESS_KEYS = ("is_success", "success")
"""Keys of ``info`` that report an episode's success (Gymnasium-Robotics and SB3; ManiSkill)."""

FAILURE_KEYS = ("is_failure", "failure", "fail")
"""Keys that report its failure: a state from which success is impossible (ManiSkill; LeanRL-style runners)."""

LIFE_LOST = "life_lost"
"""Key of ``info`` under which environments report a lost life within a game."""


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
    ended: Array
    """[E] indices of the environments whose episode ended."""
    begun: Array
    """[N] bool, ``observation`` is the first of an episode."""
    final_observation: Tree | None
    """[E, …] the last observations of those episodes."""
    life_lost: Array | None
    """[N] bool, terminal for learning though the episode continues (Atari); None where no life was lost."""
    outcome: Array | None
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
    outcome: Tensor | None
    """[N, 2] success and failure, 1 or 0 where the environment reports it, else NaN; valid where an episode ended."""


@dataclass
class Restarts:
    """How often crashed environments were restarted in this run, and how often they may be."""

    limit: int = 0
    """Restarts that the run allows."""
    count: int = 0
    """Restarts so far."""

    def take(self, cause: str) -> None:
        """Count a restart, with a warning.

        Args:
            cause: error and its place, in the first line.

        Raises:
            EnvironmentFault: no restarts are left.
        """
        if self.count >= self.limit:
            raise EnvironmentFault(f"{cause}\n\nall of max_env_restarts = {self.limit} are used up")
        self.count += 1
        told = cause.partition("\n")[0]
        warnings.warn(f"{told}: made anew, restart {self.count} of {self.limit}", stacklevel=2)


class Environments:
    """N environments with automatic resets, in any autoreset mode of their vector.

    ``NEXT_STEP`` spends the call after an episode's end on the reset: ``valid`` is False there. ``SAME_STEP`` resets at once
    and returns the last observation in ``info``. ``DISABLED`` is reset here.

    Where restarts are allowed, only the environment that raises is restarted. Gymnasium cannot replace a single worker
    process: where one dies or hangs in a step, the whole vector is restarted. Unfinished episodes end as truncated, with
    reward 0 and the last observation.

    Args:
        maker: factory of the vector, called at the first reset.
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
        maker: EnvFactory,
        num_envs: int,
        timeout_s: float,
        made: VectorEnv | None = None,
        first: int = 0,
        restarts: Restarts | None = None,
        info_keys: tuple[str, ...] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self._maker, self._first = maker, first
        self._take_over(maker(num_envs, first) if made is None else made)
        self._restarts = Restarts() if restarts is None else restarts
        self._seed: int | None = None
        self._last: Tree | None = None
        self._lost: WorkerLost | None = None
        self.name, self.time_limit_advice = maker.name, maker.time_limit_advice
        self.num_envs = self.env.num_envs
        self.logged = InfoLog(info_keys, self.num_envs)
        """Metrics from the environments' ``info``."""
        self.crashed = np.zeros(self.num_envs, dtype=bool)
        """[N] environments that were restarted in the last step: their episodes did not end by themselves."""
        self.is_endless = False
        """An evaluation has cut an episode here, and has warned of it."""
        self._timeout = timeout_s
        mode = self.env.metadata.get("autoreset_mode")  # a wrong guess would drop steps, or learn from resets
        try:
            self.mode = AutoresetMode(mode)
        except ValueError as error:
            known = [mode.value for mode in AutoresetMode]
            raise InputError(
                f"{self.name} has metadata['autoreset_mode'] = {mode!r}: it must be one of {known}"
            ) from error
        self._flatten = flatten_fn(without_mask(self.env.single_observation_space))
        self._promise = Promise(self.name, self.env.single_observation_space, self.num_envs, first)
        self._masks = ActionMasks(self.name, self.env, first)
        self._done = np.zeros(self.num_envs, dtype=bool)
        self._none_ended = np.zeros(0, dtype=np.int64)
        self._action: Any = None
        self._device: torch.device | None = None
        self.tensors: Tree | None = None
        """[N, …] first observations of a vector for :meth:`step_tensors`; None for any other."""
        self._attributes: dict[str, Any] = {}
        self.steer(attributes or {})

    def _take_over(self, env: VectorEnv) -> None:
        self.env = env
        accept_any_info(env)
        # Gymnasium copies observations into its own arrays: shapes and dtypes are right already.
        self._keeps_promise = type(env) in (SyncVectorEnv, Workers)
        self._watch = Watch(env, self._first) if isinstance(env, AsyncVectorEnv) else None
        self._finalizer = None if self._maker.is_instance else weakref.finalize(self, _close, env)

    def steer(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of all environments, or call their methods: changed ones now, all after a restart.

        Raises:
            InputError: an environment lacks an attribute.
            EnvironmentFault: it raised, or its worker process died.
        """
        before, self._attributes = self._attributes, dict(attributes)
        self._set({name: value for name, value in attributes.items() if not _has(before, name, value)})

    def _set(self, attributes: Mapping[str, Any]) -> None:
        if not attributes or self._lost is not None:
            return
        try:
            self._named("a change of attributes", lambda: steer(self.env, self.name, attributes, self._asked))
        except WorkerLost as lost:
            self._lost = self._bearable(lost)

    @property
    def inserts_rows(self) -> bool:
        """Whether the vector spends a step on every reset, so that a rollout has dummy steps."""
        return self.mode is AutoresetMode.NEXT_STEP

    @property
    def action_mask(self) -> Array | None:
        """[N, M] bool, allowed actions after the last reset or step; None without masks."""
        return self._masks.now

    @property
    def lacks_final_observation(self) -> str:
        """Message for a vector that does not give an episode's last observation."""
        return (
            f"{self.name} resets in the same step but gives no info['final_obs'], without which a time limit cannot "
            "be told from a terminal state: return it, or use another autoreset_mode"
        )

    def reset(self, seed: int | None) -> Tree:
        """Start all episodes: environment i is seeded with ``seed + i``, a native vector with ``seed``.

        Raises:
            EnvironmentFault: an environment raised, died, did not answer in time, or violates its spaces.
            InputError: the environments give masks that do not fit the actions.
        """
        self._done[:] = False
        self.logged.restart()
        self._seed = seed
        given, given_info = self._promise.reset(self._raw_reset(seed=seed))
        self._device = next((leaf.device for leaf in _values(given) if isinstance(leaf, Tensor)), None)
        observation, info = self._promise.observation("reset", self._arrays(given)), self._arrays(given_info)
        self._count(info)
        self._masks.start(observation, info)
        # Resets in the same step, without masks: every step returns the same structure.
        dense = self._device is not None and self.mode is AutoresetMode.SAME_STEP and self._masks.now is None
        self.tensors = self._tensors("reset", given) if dense else None
        observation = self._flatten(observation)
        self._keep(observation)
        return observation

    @property
    def parts(self) -> list[tuple["Environments", slice]]:
        """Groups of environments that step independently, and their indices."""
        return [(self, slice(0, self.num_envs))]

    def step(self, action: Any) -> Transition:
        """Step all environments: :meth:`send` and :meth:`receive` in one."""
        self.send(action)
        return self.receive()

    def send(self, action: Any) -> None:
        """Let worker processes begin a step; other vectors step in :meth:`receive`.

        Args:
            action: as the vector takes them, [N, …].

        Raises:
            EnvironmentFault: a worker process died.
        """
        self._action = action
        if self._watch is not None and self._lost is None:
            try:
                self._ask("step", partial(cast(AsyncVectorEnv, self.env).step_async, action))
            except WorkerLost as lost:
                self._lost = self._bearable(lost)

    def receive(self) -> Transition:
        """Result of the step. Arrays may be the vector's buffers: copy what must outlive the next call.

        Raises:
            EnvironmentFault: an environment raised, died, did not answer in time, or allows no action.
        """
        if self._lost is not None:
            return self._begin_anew(self._lost)
        try:
            observation, reward, terminated, truncated, info = self._stepped()
        except WorkerLost as lost:
            return self._begin_anew(self._bearable(lost))
        if self._restarts.limit:
            self._count(info)
        done = terminated | truncated
        valid = None
        begun = done
        if self.mode is AutoresetMode.NEXT_STEP:
            begun, self._done = self._done, done
            valid = ~begun
        self.logged.step(info, done, valid)
        # After an episode's end comes a reset, for which masks do not matter; SAME_STEP has reset already.
        if self._masks.now is not None or MASK in info:
            self._masks.step(observation, info, free=None if self.mode is AutoresetMode.SAME_STEP else done)
        if not done.any():
            seen = self._flatten(observation)
            self._keep(seen)
            lost = _lives(info, done)
            return Transition(seen, reward, terminated, truncated, valid, self._none_ended, begun, None, lost, None, {})

        ended, lost = np.flatnonzero(done), _lives(info, done)
        if self.mode is AutoresetMode.SAME_STEP:
            final, last = self._rows(info, ended), final_info(info)
            info = info if last is None else last
        else:
            final = tree_map(lambda leaf: leaf[ended], self._flatten(observation))  # a copy: fancy indexing
        outcome = _outcome(info, done, ended)
        metrics = {name: numbers[ended] for name, numbers in metrics_at_end(info, done).items()}
        if self.mode is AutoresetMode.DISABLED:
            observation, info = self._restarted(done)
            self._masks.restart(observation, info, done)
        observation = self._flatten(observation)
        self._keep(observation)
        return Transition(
            observation, reward, terminated, truncated, valid, ended, begun, final, lost, outcome, metrics
        )

    def time_limit(self) -> float | None:
        """Steps after which episodes end at the latest; None where unknown."""
        env = layers(self.env)[-1]
        if isinstance(env, Workers):
            return self._ask("time_limit", lambda: self._asked(env, "time_limit")[0])
        return time_limit(env.envs[0] if isinstance(env, SyncVectorEnv) else self.env)

    def restart(self, which: Array, observation: Tree) -> Tree:
        """Begin new episodes in some environments, where the vector supports it: Gymnasium's do.

        Args:
            which: [N] bool, the environments.
            observation: [N, …] of all of them now.

        Returns:
            [N, …] next policy input; ``observation`` where the vector does not support it.
        """
        if self.mode is not AutoresetMode.DISABLED and not isinstance(self.env, SyncVectorEnv | AsyncVectorEnv):
            return observation
        self.logged.step({}, which, None)
        given, info = self._restarted(which.copy())
        self._masks.restart(given, info, which)
        self._done[which] = False
        return self._flatten(given)

    def _count(self, info: dict[str, Any]) -> None:
        """Count the environments that report a restart."""
        self.crashed[:] = False
        for said in (info, final_info(info) or {}):
            for index, cause in enumerate(said.get(RESTARTED, ())):
                if cause is not None:
                    self._restarts.take(cause)
                    self.crashed[index] = True

    def _keep(self, observation: Tree) -> None:
        """Keep the observation, in case the workers are lost in the next step."""
        if self._restarts.limit and self._watch is not None:
            self._last = tree_map(np.copy, observation)

    def _bearable(self, lost: WorkerLost) -> WorkerLost:
        if self._restarts.limit == 0:
            raise lost
        return lost

    def _begin_anew(self, lost: WorkerLost) -> Transition:
        """Replace the worker processes, and end all of their episodes."""
        self._lost = None
        self._restarts.take(str(lost))
        self.close()
        self._take_over(self._maker(self.num_envs, self._first))
        self._set(self._attributes)
        self.crashed[:] = True
        self.logged.step({}, np.ones(self.num_envs, dtype=bool), None)
        final, seed = self._last, self._seed
        if seed is not None:  # not the same episodes again
            seed = int(np.random.SeedSequence([seed, self._restarts.count]).generate_state(1)[0])
        observation = self.reset(seed)
        none, all_ = np.zeros(self.num_envs, dtype=bool), np.ones(self.num_envs, dtype=bool)
        reward, ended = np.zeros(self.num_envs), np.arange(self.num_envs)
        return Transition(observation, reward, none, all_, None, ended, all_, final, None, None, {})

    def step_tensors(self, action: Any) -> TensorTransition:
        """Step a vector of tensors that resets in the same step, without copies.

        Args:
            action: as the vector takes them, tensors [N, …].

        Raises:
            EnvironmentFault: an environment raised.
        """
        promise, device = self._promise, cast(torch.device, self._device)
        given = self._named("step", lambda: self.env.step(action))
        observation, reward, terminated, truncated, info = promise.step(given)
        reward = promise.tensor_reward(reward, device)
        terminated = promise.tensor_flags("terminated", terminated, device)
        truncated = promise.tensor_flags("truncated", truncated, device)
        final = info.get("final_obs", info.get("final_observation"))  # Gymnasium's name, and ManiSkill's
        last = final_info(info)
        self.logged.step(info, terminated | truncated, None)
        return TensorTransition(
            self._tensors("step", observation),
            reward,
            terminated,
            truncated,
            None if final is None else self._tensors("step", final),
            _tensor_outcome(info if last is None else last, reward),
        )

    def state(self) -> dict[str, Any] | None:
        """State of all environments between two steps, as plain data; None where one cannot be saved."""
        if self._lost is not None:
            return None
        try:
            inner = self._ask("get_state", lambda: vector_state(self.env, self._asked))
        except WorkerLost as lost:
            self._lost, inner = self._bearable(lost), None
        if inner is None:
            return None
        return {
            "env": inner,
            "done": pack(self._done),
            "masks": pack(self._masks.now),
            "last": pack(self._last),
            "seed": self._seed,
            "restarts": self._restarts.count,
            "logged": self.logged.state(),
            "attributes": repr(self._attributes),
        }

    def _asked(self, env: AsyncVectorEnv, name: str, *args: Any) -> Any:
        assert self._watch is not None
        env.call_async(name, *args)
        return self._watch.call(name, env.call_wait, self._timeout)

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore, after a reset, the state of :meth:`state`; False, without effect, if it is of other environments."""
        now = self.state()
        if now is None or not same_environments(now["env"], state["env"]):
            return False
        self._ask("set_state", lambda: restore_vector(self.env, state["env"]))
        self._done, self._masks.now = unpack(state["done"]), unpack(state["masks"])
        self._seed, self._restarts.count = state["seed"], state["restarts"]
        self.logged.restore(state["logged"])
        if state["last"] is not None:
            self._last = unpack(state["last"])
        if state["attributes"] != repr(self._attributes):  # the saved state has replaced the attributes
            self._set(self._attributes)
        return True

    def close(self) -> None:
        """Close the vector and its workers, busy or dead; a vector that the user made stays open."""
        if self._finalizer is not None:
            self._finalizer()

    def disown(self) -> bool:
        """Leave closing to the caller; False where the vector is closed, or the user's."""
        return self._finalizer is not None and self._finalizer.detach() is not None

    def _raw_reset(self, **how: Any) -> Any:
        if self._watch is None:
            return self._named("reset", lambda: self.env.reset(**how))
        env: Any = self.env
        self._ask("reset", lambda: env.reset_async(**how))
        return self._ask("reset", env.reset_wait, self._timeout)

    def _restarted(self, done: Array) -> tuple[Any, dict[str, Any]]:
        """Observation and info of a vector that does not reset by itself, after a reset of the environments [N] bool."""
        given = self._promise.reset(self._raw_reset(options={"reset_mask": done}))
        observation, info = map(self._arrays, given)
        return self._promise.observation("reset", observation), info

    def _stepped(self) -> Any:
        """Result of a step, as arrays of the spaces' shapes and dtypes."""
        env: Any = self.env
        action, device, promise = self._action, self._device, self._promise
        if self._watch is not None:
            given = self._ask("step", env.step_wait, self._timeout)
        elif device is None:
            given = self._named("step", lambda: env.step(action))
        else:
            as_tensors = _map(action, lambda leaf: torch.from_numpy(leaf).to(device))
            given = self._arrays(self._named("step", lambda: env.step(as_tensors)))
        if self._keeps_promise:
            return given
        observation, reward, terminated, truncated, info = promise.step(given)
        return (
            promise.observation("step", observation),
            promise.reward(reward),
            promise.flags("terminated", terminated),
            promise.flags("truncated", truncated),
            info,
        )

    def _tensors(self, where: str, observation: Any) -> Tree:
        return self._flatten(self._promise.tensor_observation(where, observation, cast(torch.device, self._device)))

    def _ask(self, where: str, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """Call the vector; with ``timeout_s``, wait for the answers of worker processes first."""
        watch = self._watch
        return self._named(where, call if watch is None else lambda: watch.call(where, call, timeout_s))

    def _arrays(self, given: Any) -> Any:
        """Values of a vector, tensors as arrays."""
        if self._device is None:
            return given
        return _map(given, lambda leaf: _array(leaf) if isinstance(leaf, Tensor) else leaf)

    def _rows(self, info: dict[str, Any], ended: Array) -> Tree:
        rows = info.get("final_obs", info.get("final_observation"))
        if rows is None:
            raise EnvironmentFault(self.lacks_final_observation)
        if isinstance(rows, np.ndarray) and rows.dtype == object:
            each = [self._flatten(self._promise.row("final_obs", rows[index], index)) for index in ended]
            return tree_map(lambda *leaf: np.stack(leaf), *each)
        return tree_map(lambda leaf: leaf[ended], self._flatten(self._promise.observation("final_obs", rows)))

    def _named(self, where: str, call: Callable[[], Any]) -> Any:
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


class Halves:
    """Worker processes in two halves: one steps while the policy acts for the other.

    Args:
        first: environments 0 to N/2.
        second: the remaining ones.
    """

    def __init__(self, first: Environments, second: Environments) -> None:
        self.halves = first, second
        self.name, self.num_envs = first.name, first.num_envs + second.num_envs
        self.time_limit_advice = first.time_limit_advice
        self.tensors = None

    @property
    def inserts_rows(self) -> bool:
        """As of :class:`Environments`."""
        return self.halves[0].inserts_rows

    @property
    def action_mask(self) -> Array | None:
        """As of :class:`Environments`."""
        masks = [half.action_mask for half in self.halves]
        return None if masks[0] is None or masks[1] is None else np.concatenate([masks[0], masks[1]])

    @property
    def parts(self) -> list[tuple[Environments, slice]]:
        """Both halves."""
        first, second = self.halves
        return [(first, slice(0, first.num_envs)), (second, slice(first.num_envs, self.num_envs))]

    def reset(self, seed: int | None) -> Tree:
        """Start an episode everywhere: environment i is seeded with ``seed + i``."""
        first, second = self.halves
        each = first.reset(seed), second.reset(None if seed is None else seed + first.num_envs)
        return tree_map(lambda *leaf: np.concatenate(leaf), *each)

    def steer(self, attributes: Mapping[str, Any]) -> None:
        """As of :class:`Environments`."""
        for half in self.halves:
            half.steer(attributes)

    def state(self) -> dict[str, Any] | None:
        """As of :class:`Environments`."""
        states = [half.state() for half in self.halves]
        return None if None in states else {"halves": states}

    def restore(self, state: dict[str, Any]) -> bool:
        """As of :class:`Environments`."""
        return all(half.restore(own) for half, own in zip(self.halves, state["halves"], strict=True))

    def close(self) -> None:
        """Close both, at the same time."""
        close(*(cast(AsyncVectorEnv, half.env) for half in self.halves if half.disown()))


def _array(tensor: Tensor) -> Array:
    if tensor.dtype is torch.bfloat16:  # NumPy has none
        tensor = tensor.float()
    return tensor.detach().to_dense().cpu().numpy()


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of everything inside dictionaries and tuples."""
    if isinstance(tree, dict):
        return {key: _map(part, function) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_map(part, function) for part in tree)
    return function(tree)


def _values(tree: Any) -> Iterator[Any]:
    """Everything inside dictionaries and tuples."""
    if isinstance(tree, dict | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _values(part)
    else:
        yield tree


def _outcome(info: dict[str, Any], done: Array, ended: Array) -> Array | None:
    found = [_flag(info, keys, done) for keys in (SUCCESS_KEYS, FAILURE_KEYS)]
    if all(flag is None for flag in found):
        return None
    outcome = np.full((len(ended), 2), np.nan)
    for column, flag in enumerate(found):
        if flag is not None:
            outcome[:, column] = flag[ended]
    return outcome


def _tensor_outcome(info: dict[str, Any], like: Tensor) -> Tensor | None:
    """[N, 2] of :class:`TensorTransition`."""
    found = [_flag(info, keys, like) for keys in (SUCCESS_KEYS, FAILURE_KEYS)]
    if all(flag is None for flag in found):
        return None
    unknown = torch.full_like(like, torch.nan)
    return torch.stack([unknown if flag is None else flag.to(unknown) for flag in found], -1)


def _flag(info: dict[str, Any], keys: tuple[str, ...], like: Any) -> Any:
    """[N] flag of each environment under the first of ``keys`` that it reports, NaN without; None without any."""
    where: Any = torch.where if isinstance(like, Tensor) else np.where
    flag = None
    for key in keys:
        numbers = numbers_of(info[key], like) if key in info else None
        if numbers is None:
            continue
        mask = mask_of(info.get(f"_{key}"), like)
        if mask is not None or not numbers.ndim:
            numbers = where(like == like if mask is None else mask, numbers, np.nan)
        flag = numbers if flag is None else where(flag == flag, flag, numbers)
    return flag


def _lives(info: dict[str, Any], done: Array) -> Array | None:
    """[N] bool, a life was lost; None where no environment reports it."""
    if LIFE_LOST not in info:
        return None
    lost = _flag(info, (LIFE_LOST,), done)
    return None if lost is None else np.nan_to_num(lost) != 0


def _has(attributes: Mapping[str, Any], name: str, value: Any) -> bool:
    return name in attributes and repr(attributes[name]) == repr(value)  # arrays have no single truth value


def _close(env: VectorEnv) -> None:
    if isinstance(env, AsyncVectorEnv):
        close(env)
    else:
        env.close()
