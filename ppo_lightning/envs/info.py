"""Metrics from the environments' ``info``, accumulated over a rollout and over whole episodes."""

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from ppo_lightning.spaces import Array

SUCCESS_KEYS = ("is_success", "success")
"""Keys of ``info`` that report an episode's success (Gymnasium-Robotics and SB3; ManiSkill)."""

FAILURE_KEYS = ("is_failure", "failure", "fail")
"""Keys that report its failure: a state from which success is impossible (ManiSkill; LeanRL-style runners)."""

LIFE_LOST = "life_lost"
"""Key under which environments report a lost life within a game."""

REWARD_KEYS = ("reward_components", "rewards")
"""Keys of ``info`` for the components of the reward (ApexRL and LeanRL-style runners; EmbodiChain)."""

METRICS = "metrics"
"""Key of EmbodiChain's metrics, which are evaluated by their value at the end of an episode."""

ENV_KEYS = ("log", METRICS)
"""Keys of other metrics (Isaac Lab and ApexRL; EmbodiChain)."""

FINAL_OBSERVATION, FINAL_INFO = "final_obs", "final_info"
"""Keys of the last observation and info of an episode, in a vector that resets in the same step."""

SumsAndCounts = dict[str, tuple[float, float]]
"""Sum and count of values, by the name under which their mean is logged."""


class InfoAccumulator:
    """Accumulates metrics of N environments from keys of ``info``: scalars [N], or dictionaries of such.

    A component of the reward is logged as ``reward/<name>``, its mean per step, and as ``reward_components/<name>``, its sum
    over an episode, averaged over finished episodes. Anything else is logged as ``env/<name>``, its mean per step and
    environment that reports it. In evaluations, metrics under :data:`METRICS` are averaged over episodes by their value at
    the end, as in EmbodiChain.

    Args:
        keys: of ``info``, beside :data:`REWARD_KEYS` and :data:`ENV_KEYS`.
        num_envs: N.
    """

    def __init__(self, keys: tuple[str, ...], num_envs: int) -> None:
        self.keys = frozenset((*REWARD_KEYS, *ENV_KEYS, *keys))
        self.num_envs = num_envs
        self.episode_sums: dict[str, Any] = {}
        """[N] sums so far of the unfinished episodes, arrays or tensors by name."""
        self._saved: dict[str, Tensor] = {}
        """The same from a checkpoint, until a step shows whether environments give arrays or tensors."""
        self._sums: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[Any]] = {}
        """Metrics of each step under :data:`METRICS`."""
        self._ends: dict[str, list[Any]] = {}
        """The same at the ends of episodes, from :meth:`end_episode`."""
        self.counted: Array | None = None
        """[N] bool, environments whose steps count: in an evaluation those that have episodes left. None counts all."""

    def step(self, info: dict[str, Any], done: Any, valid: Array | None) -> None:
        """Accumulate one step.

        Args:
            info: of the step.
            done: [N] bool array or tensor, the episode ended.
            valid: [N] bool, False where the call was a reset; None where every call was a step.
        """
        if self.keys.isdisjoint(info) and FINAL_INFO not in info and not self.episode_sums and not self._saved:
            return
        if self._saved:
            on_device = isinstance(done, Tensor)
            for name, sums in self._saved.items():
                self.episode_sums[name] = sums.to(done.device, copy=True) if on_device else sums.numpy().copy()
            self._saved = {}
        last, ended, going = final_info(info), done, valid if final_info(info) is None else ~done
        if self.counted is not None:
            ended, going = done & self.counted, self.counted if going is None else going & self.counted
        self._add(info, done, going)
        if last is not None:  # of a finished episode: the other entries are of the reset
            self._add(last, done, ended)
        if isinstance(done, np.ndarray) and not done.any():
            return
        for name, episode_sums in self.episode_sums.items():
            self._accumulate(f"reward_components/{name}", _where(ended, episode_sums), ended.sum(), self._sums)
            episode_sums[done] = 0.0

    def _add(self, info: Mapping[str, Any], like: Any, counts: Any) -> None:
        for key in filter(self.keys.__contains__, info):  # in the order of info: the set's own depends on the hash seed
            for name, value, given in _named(info, key):
                self._take(key, name, to_float_array(value, like), mask_of(given, like), counts)

    def _take(self, key: str, name: str, numbers: Any, given: Any, counts: Any) -> None:
        if numbers is None:
            return
        known: Any = numbers == numbers  # all but NaN
        if numbers.ndim:  # else it is the vector's own mean
            for mask in (given, counts):
                known = known if mask is None else known & mask
        number = known.sum()
        if isinstance(numbers, np.ndarray) and not number:
            return  # texts or objects
        numbers = _where(known, numbers)
        if key not in REWARD_KEYS:
            self._accumulate(f"env/{name}", numbers, number, self._metrics if key == METRICS else self._sums)
            return
        self._accumulate(f"reward/{name}", numbers, number, self._sums)
        if not numbers.ndim:
            return
        if name not in self.episode_sums:
            shape = (self.num_envs,)
            self.episode_sums[name] = (
                torch.zeros(shape).to(numbers.device) if isinstance(numbers, Tensor) else np.zeros(shape)
            )
        self.episode_sums[name] += numbers

    def _accumulate(self, name: str, numbers: Any, number: Any, sums: dict[str, list[Any]]) -> None:
        entry = sums.setdefault(name, [0.0, 0])
        entry[0] = entry[0] + numbers.sum()  # without device synchronisation
        entry[1] = entry[1] + number

    def end_episode(self, metrics: Mapping[str, float]) -> None:
        """Accumulate the final :data:`METRICS` of an evaluation's episode, by name; NaN is left out."""
        for name, value in metrics.items():
            self._accumulate(f"env/{name}", np.nan_to_num(value), value == value, self._ends)

    def pop(self, *, evaluation: bool = False) -> SumsAndCounts:
        """Sums and counts since the last call, of each step; of an evaluation :data:`METRICS` at the ends of episodes."""
        sums = merge_sums([_plain(self._sums), _plain(self._ends if evaluation else self._metrics)])
        self._sums, self._metrics, self._ends = {}, {}, {}
        return sums

    def restart(self) -> None:
        """Reset the sums of episodes; keep those of steps."""
        self.episode_sums, self._saved = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Sums [N] of the unfinished episodes, by name."""
        return {
            **self._saved,
            **{name: torch.as_tensor(sums).cpu().clone() for name, sums in self.episode_sums.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the sums of :meth:`state`."""
        self.episode_sums, self._saved = {}, dict(state)


def final_info(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The info of finished episodes, in a vector that resets in the same step; None without one."""
    last = info.get(FINAL_INFO)
    return last if isinstance(last, dict) else None


def metrics_at_end(info: Mapping[str, Any], done: Array) -> dict[str, Array]:
    """Metrics [N] under ``info["metrics"]`` of the step that ended episodes, by name; NaN where missing.

    Args:
        info: of that step.
        done: [N] bool, the episode ended.
    """
    found = {}
    for name, value, given in _named(info, METRICS):
        numbers, mask = to_float_array(value, done), mask_of(given, done)
        if numbers is not None:
            found[name] = np.where(done if mask is None else done & mask, numbers, np.nan)
    return found


def success_and_failure(info: Mapping[str, Any], like: Any) -> Any:
    """[N, 2] success and failure, each 1.0 or 0.0 where an environment reports it, else NaN; None where none does.

    Args:
        info: of the step.
        like: [N] array or tensor: the result is likewise.
    """
    flags = [_first_reported(info, keys, like) for keys in (SUCCESS_KEYS, FAILURE_KEYS)]
    if all(flag is None for flag in flags):
        return None
    if isinstance(like, Tensor):
        unknown = torch.full_like(like, torch.nan)
        return torch.stack([unknown if flag is None else flag.to(unknown) for flag in flags], -1)
    return np.stack([np.full(len(like), np.nan) if flag is None else flag for flag in flags], -1)


def life_lost(info: Mapping[str, Any], done: Array) -> Array | None:
    """[N] bool, a life was lost; None where no environment reports it."""
    lost = _first_reported(info, (LIFE_LOST,), done) if LIFE_LOST in info else None
    return None if lost is None else np.nan_to_num(lost) != 0


def _first_reported(info: Mapping[str, Any], keys: tuple[str, ...], like: Any) -> Any:
    """[N] value of each environment under the first of ``keys`` that it reports, NaN without; None without any."""
    where: Any = torch.where if isinstance(like, Tensor) else np.where
    reported = None
    for key in keys:
        numbers = to_float_array(info[key], like) if key in info else None
        if numbers is None:
            continue
        mask = mask_of(info.get(f"_{key}"), like)
        if mask is not None or not numbers.ndim:
            numbers = where(like == like if mask is None else mask, numbers, np.nan)
        reported = numbers if reported is None else where(reported == reported, reported, numbers)
    return reported


def _named(info: Mapping[str, Any], key: str) -> list[tuple[str, Any, Any]]:
    """Name, value and mask of what ``info`` has under a key, which is one value or a dictionary of several."""
    given = info.get(key)
    if not isinstance(given, Mapping):
        return [] if given is None else [(key.strip("/"), given, info.get(f"_{key}"))]
    named = [(str(name), value, given.get(f"_{name}")) for name, value in given.items()]
    return [(name.strip("/"), value, mask) for name, value, mask in named if not name.startswith("_")]


def to_float_array(given: Any, like: Any) -> Any:
    """Values of N environments under one key as numbers [N], or [] of a vector as a whole; None where they are neither.

    Values that are no numbers become NaN. An array, tensor or list of one number counts as that number.

    Args:
        given: anything.
        like: [N] array or tensor: the result is an array (float64) or a tensor (float32) likewise.
    """
    if isinstance(given, Tensor):
        if given.is_complex() or given.layout is not torch.strided:
            return None
        numbers: Any = given.detach().float()
    elif isinstance(given, np.ndarray) and given.dtype.kind in "biuf":
        numbers = given.astype(np.float64, copy=False)
    elif isinstance(given, np.ndarray) and given.ndim == 0:
        numbers = np.array(_number(given.item()))
    elif isinstance(given, np.ndarray | list | tuple):
        # Vectors put NumPy's bools, and None for a missing value, into arrays of objects.
        numbers = np.array([_number(one) for one in given], dtype=np.float64)
    else:
        numbers = np.array(_number(given))
    if numbers.ndim and numbers.shape != like.shape:
        flat = numbers.reshape(-1)
        if len(flat) != 1 and (len(flat), len(numbers)) != (len(like), len(like)):
            return None
        numbers = flat if len(flat) == len(like) else flat[0]
    if isinstance(like, Tensor):
        return torch.as_tensor(numbers, dtype=torch.float32, device=like.device)
    return numbers.double().cpu().numpy() if isinstance(numbers, Tensor) else numbers


def mask_of(given: Any, like: Any) -> Any:
    """[N] bool, the environments that gave a value; None where it is unknown."""
    if not isinstance(given, np.ndarray | Tensor) or given.shape != like.shape or given.dtype not in (bool, torch.bool):
        return None
    if isinstance(like, Tensor):
        return torch.as_tensor(given, device=like.device)
    return given.cpu().numpy() if isinstance(given, Tensor) else given


def _number(one: Any) -> float:
    if isinstance(one, list | tuple) and len(one) == 1:
        one = one[0]
    if isinstance(one, np.ndarray | Tensor) and np.prod(one.shape) == 1:
        one = one.item()
    if not isinstance(one, int | float | np.bool_ | np.integer | np.floating | Decimal | Fraction):
        return np.nan
    try:
        return float(one)
    except OverflowError:  # an integer beyond what floats reach
        return np.nan


def _plain(sums: Mapping[str, list[Any]]) -> SumsAndCounts:
    return {name: (float(total), float(number)) for name, (total, number) in sums.items() if number}


def merge_sums(every: list[SumsAndCounts]) -> SumsAndCounts:
    """Merge sums of several logs."""
    together: SumsAndCounts = {}
    for sums in every:
        for name, (total, number) in sums.items():
            have = together.get(name, (0.0, 0.0))
            together[name] = have[0] + total, have[1] + number
    return together


def means(sums: SumsAndCounts) -> dict[str, float]:
    """Means of sums, for loggers."""
    return {name: total / number for name, (total, number) in sums.items()}


def _where(counts: Any, numbers: Any) -> Any:
    return torch.where(counts, numbers, 0.0) if isinstance(numbers, Tensor) else np.where(counts, numbers, 0.0)


# --- from the info of each environment to that of the vector -----------------------------------------------------------


MAX_DEPTH = 8
"""Depth to which nested dictionaries are combined; deeper values are never read."""


_FLOATS = {float: np.dtype(np.float64), np.float64: np.dtype(np.float64), np.float32: np.dtype(np.float32)}


def accept_any_info(env: VectorEnv) -> None:
    """Let a Gymnasium vector combine any values in its environments' ``info``.

    Its own method makes an array by the first environment's value: it truncates another's 0.25 to 0, and raises where types
    or shapes differ.
    """
    inner: Any = env.unwrapped
    if getattr(type(inner), "_add_info", None) is VectorEnv._add_info:
        inner._add_info = partial(add_info, inner.num_envs)


def add_info(
    num_envs: int, together: dict[Any, Any], info: Mapping[Any, Any], index: int, depth: int = 0
) -> dict[Any, Any]:
    """Add one environment's info to that of the vector, as ``VectorEnv._add_info`` does, for any values.

    Numbers, and arrays of one shape, become an array whose dtype holds all of them; anything else becomes an array of
    objects. Where some environments give a dictionary, other values under its key are left out.

    Args:
        num_envs: N.
        together: of the vector so far; it is changed.
        info: of the environment.
        index: which environment it is.
        depth: how many dictionaries ``together`` is in; those at :data:`MAX_DEPTH` are objects.

    Returns:
        ``together``: each key with its values [N], and under ``_`` and the key which environments gave one.
    """
    for key, value in info.items():
        name = f"_{key}"
        held: Any = together.get(key)
        if type(held) is np.ndarray and held.dtype is _FLOATS.get(type(value)) and held.ndim == 1:
            held[index], together[name][index] = value, True  # as below, in a third of the time
            continue
        if isinstance(key, str) and key.startswith("_") and key[1:] in together:
            continue  # the place of a mask
        is_dict = isinstance(value, dict) and key != FINAL_OBSERVATION and depth < MAX_DEPTH
        mask = together[name] if held is not None else None
        if isinstance(held, dict) and not is_dict:
            continue
        if is_dict:
            if not isinstance(held, dict):
                held, mask = {}, None
            held = add_info(num_envs, held, value, index, depth + 1)
        else:
            held = _placed(held, mask, value, index, num_envs, is_object=key == FINAL_OBSERVATION)
        if mask is None:
            mask = np.zeros(num_envs, dtype=np.bool_)
        mask[index] = True
        together[key], together[name] = held, mask
    return together


def _placed(held: Any, mask: Any, value: Any, index: int, num_envs: int, *, is_object: bool) -> Array:
    """An array [N, …] of the held values, with a value at ``index``."""
    given = None if is_object else _array(value)
    if given is not None:
        if held is None:
            held = np.zeros((num_envs, *given.shape), dtype=given.dtype)
        if held.dtype != object and held.shape[1:] == given.shape:
            if held.dtype != given.dtype:
                held = held.astype(np.result_type(held.dtype, given.dtype), copy=False)
            held[index] = given
            return held
    if held is None:
        held = np.full(num_envs, None, dtype=object)
    elif held.dtype != object:
        objects = np.full(num_envs, None, dtype=object)
        for known in np.flatnonzero(mask):
            objects[known] = held[known]
        held = objects
    held[index] = value
    return held


def _array(value: Any) -> Array | None:
    """A number, or an array of numbers, as an array; None of anything else."""
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "biuf" else None
    if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        array = np.asarray(value)
        return array if array.dtype.kind in "biuf" else None
    return None
