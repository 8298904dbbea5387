"""Converts what environments return to the shapes and dtypes of their spaces, or refuses it."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn, SupportsFloat

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Tuple
from torch import Tensor

from ppo_lightning.envs.info import add_info
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.spaces import MASK, Array, subspaces, tensor_spec, without_mask

OLD_API = "the API before Gym 0.26"
"""Name of the interface whose ``step`` returned four values and whose ``reset`` returned only an observation."""

BOOL = np.dtype(bool)

SHOWN = 4
"""Numbers of an array that a message shows, at most."""


class SpaceConverter:
    """Converts what N environments return from ``reset`` and ``step``.

    Values of the right shape and dtype pass through, at two comparisons each. Others are converted where that is
    unambiguous: another dtype that holds the same values, lists, one trailing dimension of size 1 more or less. All else is
    refused, with the environment's number, the key and the value, and so are values outside of a discrete space.

    Args:
        name: of the vector, in messages.
        space: of one observation, with its action mask where it has one.
        num_envs: N.
        first: number of the first environment, in messages.
    """

    def __init__(self, name: str, space: Space[Any], num_envs: int, first: int) -> None:
        self.name, self.num_envs, self.first = name, num_envs, first
        self.space = without_mask(space)
        self._is_masked = self.space is not space
        self._rows = (num_envs,)
        self._seen: set[str] = set()

    def reset(self, given: Any) -> tuple[Any, dict[str, Any]]:
        """Observation and info of a ``reset``."""
        if isinstance(given, tuple | list) and len(given) == 2:
            info = self._info(given[1])
            if info is not None:
                return given[0], info
        raise EnvironmentFault(f"{self.name} {wrong_reset(given)}")

    def step(self, given: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Observation, reward, terminated, truncated and info of a ``step``."""
        if isinstance(given, tuple | list) and len(given) == 5:
            observation, reward, terminated, truncated, info = given
            info = self._info(info)
            if info is not None:
                return observation, reward, terminated, truncated, info
        raise EnvironmentFault(f"{self.name} {wrong_step(given)}")

    def _info(self, given: Any) -> Any:
        """An info unchanged, or a list of one per environment combined; None where it is neither."""
        if isinstance(given, Mapping):
            return given
        if not (isinstance(given, list | tuple) and len(given) == self.num_envs):
            return None
        if not all(isinstance(own, Mapping) for own in given):
            return None
        together: dict[str, Any] = {}
        for index, own in enumerate(given):
            add_info(self.num_envs, together, own, index)
        return together

    def flags(self, key: str, given: Any) -> Array:
        """[N] bool, from anything that is 0 or 1."""
        if type(given) is np.ndarray and given.dtype == BOOL and given.shape == self._rows:
            return given
        array = self._numbers(key, given, self._rows, "True or False")
        self._each(key, array, (array == 0) | (array == 1), "True or False (1 or 0)")
        return array.astype(bool)

    def reward(self, given: Any) -> Array:
        """[N] floating-point numbers."""
        if type(given) is np.ndarray and given.dtype.kind == "f" and given.shape == self._rows:
            return given
        array = self._numbers("reward", given, self._rows, "one number")
        return array if array.dtype.kind == "f" else array.astype(np.float64)

    def observation(self, where: str, given: Any) -> Any:
        """Observations of all environments, nested as their space."""
        if self._is_masked and not (isinstance(given, Mapping) and MASK in given):
            raise EnvironmentFault(
                f"{self.name} returned in {where} an observation that lacks the key '{MASK}' of its space"
            )
        if not self._is_masked:
            return self._nested(where, given, self.space, "")
        seen = {key: part for key, part in given.items() if key != MASK}
        return {**self._nested(where, seen, self.space, ""), MASK: given[MASK]}

    def row(self, where: str, given: Any, index: int) -> Any:
        """One observation of one environment, nested as its space, without its action mask."""
        if self._is_masked and isinstance(given, Mapping):
            given = {key: part for key, part in given.items() if key != MASK}
        return self._nested(where, given, self.space, "", index)

    def tensor_flags(self, key: str, given: Any, device: torch.device) -> Tensor:
        """[N] bool, as :meth:`flags`; values are checked in the first step only, since that synchronises the device."""
        if type(given) is Tensor and given.dtype is torch.bool and given.shape == self._rows:
            return given
        tensor = self._tensor(key, given, self._rows, device, "True or False")
        if key not in self._seen:
            self._seen.add(key)
            array = tensor.cpu().numpy()
            self._each(key, array, (array == 0) | (array == 1), "True or False (1 or 0)")
        return tensor.bool()

    def tensor_reward(self, given: Any, device: torch.device) -> Tensor:
        """[N] floating-point numbers."""
        if type(given) is Tensor and given.is_floating_point() and given.shape == self._rows:
            return given
        tensor = self._tensor("reward", given, self._rows, device, "one number")
        return tensor if tensor.is_floating_point() else tensor.float()

    def tensor_observation(self, where: str, given: Any, device: torch.device) -> Any:
        """Observations of all environments as tensors, nested as their space; the rollout converts their dtype."""
        return self._nested_tensors(where, given, self.space, "", device)

    def _parts(self, where: str, given: Any, space: Space[Any], path: str) -> dict[Any, Any]:
        """The parts of a Dict or Tuple observation, by key or position."""
        problem = wrong_parts(given, space, path)
        if problem is not None:
            raise EnvironmentFault(f"{self.name} returned in {where} an observation {problem}")
        return {key: given[key] for key in subspaces(space) or ()}

    def _nested(self, where: str, given: Any, space: Space[Any], path: str, index: int | None = None) -> Any:
        inner = subspaces(space)
        if inner is not None:
            parts = self._parts(where, given, space, path)
            converted = {key: self._nested(where, parts[key], inner[key], _joined(path, key), index) for key in inner}
            return converted if isinstance(space, Dict) else tuple(converted.values())
        shape, dtype = (*(self._rows if index is None else ()), *(space.shape or ())), space.dtype
        key = f"observation {path}".strip()
        if type(given) is np.ndarray and given.dtype == dtype and given.shape == shape:
            return self._within(key, given, space, index)
        array = _array(given)
        fitting = None if array is None else _aligned(array, shape)
        if fitting is None or array is None:
            got = described(given) if array is None else f"{array.shape} {array.dtype}"
            raise EnvironmentFault(
                f"{self.name} returned from {where} observations {path and path + ' '}{got}, its space says "
                f"{shape} {dtype}: correct the environment or its single_observation_space"
            )
        return self._within(key, self._cast(key, fitting, np.dtype(dtype), index), space, index)

    def _within(self, key: str, array: Array, space: Space[Any], index: int | None = None) -> Array:
        """The same values, if they are of a discrete space; of a Box, a rollout takes those outside with a warning."""
        if not isinstance(space, Box):
            spec = tensor_spec(space)
            self._each(key, array, (array >= spec.low) & (array <= spec.high), f"of {space}", index)
        return array

    def _nested_tensors(self, where: str, given: Any, space: Space[Any], path: str, device: torch.device) -> Any:
        inner = subspaces(space)
        if inner is not None:
            parts = self._parts(where, given, space, path)
            converted = {
                key: self._nested_tensors(where, parts[key], inner[key], _joined(path, key), device) for key in inner
            }
            return converted if isinstance(space, Dict) else tuple(converted.values())
        shape = (*self._rows, *(space.shape or ()))
        if type(given) is not Tensor or given.shape != shape:
            given = self._tensor(f"observation {path}".strip(), given, shape, device, "numbers")
        key, dtype = f"observation {path}".strip(), np.dtype(space.dtype)
        if dtype.kind in "biu" and key not in self._seen:  # once, since it synchronises the device
            self._seen.add(key)
            self._within(key, self._cast(key, given.cpu().numpy(), dtype), space)
        return given

    def _cast(self, key: str, array: Array, dtype: np.dtype[Any], index: int | None = None) -> Array:
        """The same values in another dtype."""
        if array.dtype == dtype:
            return array
        if dtype.kind == "f":
            with np.errstate(over="ignore"):  # what becomes infinite is refused where observations are checked
                return array.astype(dtype)
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = (array >= low) & (array <= high)  # False of NaN
        if array.dtype.kind == "f":
            fits &= array == np.rint(array)
        self._each(key, array, fits, f"whole numbers that {dtype} can hold", index)
        return array.astype(dtype)

    def _numbers(self, key: str, given: Any, shape: tuple[int, ...], promised: str) -> Array:
        array = _array(given)
        if array is None:
            listed = given if isinstance(given, list | tuple | np.ndarray) and len(given) == self.num_envs else []
            index = next((index for index, one in enumerate(listed) if _array(one) is None or np.ndim(one)), None)
            if index is not None:
                self._refuse(key, index, listed[index], promised)
            raise EnvironmentFault(
                f"{self.name} returned in step {key} {described(given)}: return an array {shape}, {promised} for each "
                "environment"
            )
        fitting = _aligned(array, shape)
        if fitting is None:
            raise EnvironmentFault(
                f"{self.name} returned in step {key} of shape {array.shape}: return an array {shape}, {promised} for each "
                "environment"
            )
        return fitting

    def _tensor(self, key: str, given: Any, shape: tuple[int, ...], device: torch.device, promised: str) -> Tensor:
        if not isinstance(given, Tensor):
            given = torch.from_numpy(np.array(self._numbers(key, given, shape, promised))).to(device)
        fitting = _aligned(given, shape)
        if fitting is None or given.is_complex():
            raise EnvironmentFault(
                f"{self.name} returned {key} that is {type(given).__name__} {tuple(given.shape)} {given.dtype}: a vector of "
                f"tensors must return tensors of shape {shape}"
            )
        return fitting

    def _each(self, key: str, array: Array, fits: Array, promised: str, index: int | None = None) -> None:
        if not fits.all():
            wrong = array[~fits].flat[0] if index is not None else array[np.argwhere(~fits)[0][0]]
            self._refuse(key, int(np.argwhere(~fits)[0][0]) if index is None else index, wrong, promised)

    def _refuse(self, key: str, index: int, value: Any, promised: str) -> NoReturn:
        raise EnvironmentFault(
            f"environment {self.first + index} of {self.name} returned the {key} {described(value)}: it must be {promised}"
        )


def wrong_step(given: Any) -> str:
    """Message for a ``step`` that did not return five values with a dictionary at the end."""
    if isinstance(given, tuple | list) and len(given) == 4:
        return (
            f"returned (observation, reward, done, info) from step, {OLD_API}: return (observation, reward, terminated, "
            "truncated, info), or wrap the environment with the package shimmy"
        )
    if isinstance(given, tuple | list) and len(given) == 5:
        return f"returned in step the info {described(given[4])}: return a dict, {{}} where there is nothing to report"
    got = f"{len(given)} values" if isinstance(given, tuple | list) else described(given)
    return f"returned {got} from step: return (observation, reward, terminated, truncated, info)"


def wrong_reset(given: Any) -> str:
    """Message for a ``reset`` that did not return an observation and a dictionary."""
    if isinstance(given, tuple | list) and len(given) == 2:
        return (
            f"returned (observation, info) from reset with the info {described(given[1])}: return a dict, {{}} where there is "
            "nothing to report"
        )
    return (
        f"returned {described(given)} from reset, not (observation, info): return both, with {{}} where there is nothing to "
        f"report; an observation alone is {OLD_API}"
    )


def old_api(error: Exception) -> str | None:
    """Message for an error due to the API before Gym 0.26; None for any other."""
    unknown = re.search(r"reset\(\) got an unexpected keyword argument '(seed|options)'", str(error))
    if isinstance(error, TypeError) and unknown is not None:
        return f"has a reset without {unknown[1]}, {OLD_API}: give it the signature reset(self, *, seed=None, options=None)"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, ValueError):
        return None
    if not trace.tb_frame.f_globals.get("__name__", "").startswith("gymnasium."):  # the environment's own error
        return None
    if "(expected 5, got 4)" in str(error):
        return wrong_step((None,) * 4)
    if "to unpack (expected 2" in str(error):
        return f"did not return (observation, info) from reset: return both; an observation alone is {OLD_API}"
    return None


def wrong_parts(given: Any, space: Space[Any], path: str) -> str | None:
    """How the keys, or the number of parts, of an observation differ from those of its Dict or Tuple space."""
    inner = subspaces(space)
    assert inner is not None
    if isinstance(space, Dict):
        if not isinstance(given, Mapping):
            return f"{_place(path)} {described(given)}, a dict is promised"
        if given.keys() == inner.keys():
            return None
        absent, extra = [key for key in inner if key not in given], [key for key in given if key not in inner]
        name = _joined(path, (absent or extra)[0])
        return (
            f"that lacks the key '{name}' of its space"
            if absent
            else f"that has the key '{name}', which its space lacks"
        )
    if isinstance(given, tuple | list | np.ndarray) and len(given) == len(inner):
        return None
    return f"{_place(path)} {described(given)}, a tuple of {len(inner)} is promised"


def wrong_part(given: Any, space: Space[Any], path: str = "") -> str | None:
    """How one environment's observation differs in structure, shape or dtype from its space: the first part that does."""
    if isinstance(space, Dict | Tuple):
        problem = wrong_parts(given, space, path)
        if problem is not None:
            return problem
        for key, child in space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces):
            problem = wrong_part(given[key], child, _joined(path, key))
            if problem is not None:
                return problem
        return None
    if isinstance(space, Box):
        if isinstance(given, np.ndarray | np.generic) and given.shape == space.shape and given.dtype == space.dtype:
            return None
    elif space.contains(given):
        return None
    its = "its space" if path else "its observation_space"
    return f"{_place(path)} {described(given)}, {its} is {space}"


def as_number(value: Any) -> float | None:
    """One number; None of anything else, arrays of one number included."""
    if (
        isinstance(value, complex | np.complexfloating)
        or getattr(value, "ndim", 0)
        or not isinstance(value, SupportsFloat)
    ):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def as_flag(value: Any) -> bool | None:
    """True or False, of anything that is one number, 0 or 1; None of anything else."""
    given = as_number(value)
    return bool(given) if given in (0.0, 1.0) else None


def _place(path: str) -> str:
    return f"whose part '{path}' is" if path else "that is"


def described(value: Any) -> str:
    """A value in a few words: its type, and its shape and dtype or the value itself."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, np.ndarray | np.generic | Tensor):
        if not value.ndim:
            return f"{value.item()!r} ({kind})"
        shown = f" {value.tolist()}" if np.prod(value.shape) <= SHOWN and value.dtype != object else ""
        return f"{kind} {tuple(value.shape)} {value.dtype}{shown}"
    if isinstance(value, str | int | float):
        return f"{value!r} ({kind})"
    return f"{kind} {reprlib.repr(value)}" if isinstance(value, list | tuple | dict) else kind


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _array(given: Any) -> Array | None:
    """Numbers or flags as an array; None of anything else."""
    try:
        array = np.asarray(given)
        if array.dtype == object:  # numbers of several types
            array = np.array(array.tolist())
    except (ValueError, TypeError, RuntimeError):  # ragged lists; tensors on a device or with gradients
        return None
    return array if array.dtype.kind in "biuf" else None


def _aligned(given: Any, shape: tuple[int, ...]) -> Any:
    """An array or tensor in this shape, where it differs by one trailing dimension of size 1 at most; else None."""
    own = tuple(given.shape)
    if own == shape:
        return given
    return given.reshape(shape) if own == (*shape, 1) or (*own, 1) == shape else None
