"""Numbers that environments give in their info beside the reward: added up over a rollout, and over whole episodes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_lightning.spaces import Array

REWARD_KEYS = ("reward_components", "rewards")
"""Where environments say which parts their reward has (ApexRL and LeanRL-style runners; EmbodiChain)."""

ENV_KEYS = ("log", "metrics")
"""Where they say whatever else is worth a curve (Isaac Lab and ApexRL; EmbodiChain)."""

Sums = dict[str, tuple[float, float]]
"""Sum and number of what was added up, by the name under which its mean is logged."""


class InfoLog:
    """Adds up what N environments say in ``info`` under certain keys: numbers [N], or dictionaries of such.

    A part of the reward is logged as ``reward/<name>``, its mean per step, and as ``reward_components/<name>``, the mean
    over the episodes that ended of its sum over all of an episode, whichever rollouts it began in. Anything else is logged
    as ``env/<name>``, its mean per step and environment that gave it.

    Args:
        keys: of ``info``, beside :data:`REWARD_KEYS` and :data:`ENV_KEYS`.
        num_envs: N.
    """

    def __init__(self, keys: tuple[str, ...], num_envs: int) -> None:
        self.keys = frozenset((*REWARD_KEYS, *ENV_KEYS, *keys))
        self.num_envs = num_envs
        self.carry: dict[str, Any] = {}
        """[N] sums so far of the episodes that go on, arrays or tensors by name."""
        self._saved: dict[str, Tensor] = {}
        """The same of a run that goes on, until a step shows whether arrays or tensors are given."""
        self._sums: dict[str, list[Any]] = {}

    def step(self, info: dict[str, Any], done: Any, valid: Array | None) -> None:
        """Take in one step.

        Args:
            info: what the step gave.
            done: [N] bool array or tensor, the episode ended.
            valid: [N] bool, False where the call was a reset; None where every row is a step.
        """
        if self.keys.isdisjoint(info) and "final_info" not in info and not self.carry and not self._saved:
            return
        if self._saved:
            on_device = isinstance(done, Tensor)
            for name, sums in self._saved.items():
                self.carry[name] = sums.to(done.device, copy=True) if on_device else sums.numpy().copy()
            self._saved = {}
        last = info.get("final_info")
        if last is None or last is info:
            self._add(info, valid)
        else:  # of an episode that ended: the rest tells of the reset
            self._add(info, ~done)
            self._add(last, done)
        if isinstance(done, np.ndarray) and not done.any():
            return
        for name, carry in self.carry.items():
            self._account(f"reward_components/{name}", _where(done, carry), done.sum())
            carry[done] = 0.0

    def _add(self, info: dict[str, Any], counts: Any) -> None:
        for key in self.keys.intersection(info):
            given = info[key]
            inside = {key: given} if not isinstance(given, dict) else given
            masks = info if inside is not given else given
            for name, value in inside.items():
                if not name.startswith("_"):
                    self._take(key, name.strip("/"), value, masks.get(f"_{name}"), counts)

    def _take(self, key: str, name: str, value: Any, given: Any, counts: Any) -> None:
        numbers = value.float() if isinstance(value, Tensor) else as_numbers(value)
        known: Any = numbers == numbers  # all but NaN
        if numbers.shape == (self.num_envs,):
            for mask in (given, counts):
                known = known if mask is None else known & mask
        elif numbers.ndim:  # else it is the vector's own mean
            return
        number = known.sum()
        if isinstance(numbers, np.ndarray) and not number:
            return  # texts, or objects: nothing to add up
        numbers = _where(known, numbers)
        if key not in REWARD_KEYS:
            self._account(f"env/{name}", numbers, number)
            return
        self._account(f"reward/{name}", numbers, number)
        if not numbers.ndim:
            return
        if name not in self.carry:
            shape = (self.num_envs,)
            self.carry[name] = torch.zeros(shape).to(numbers.device) if isinstance(numbers, Tensor) else np.zeros(shape)
        self.carry[name] += numbers

    def _account(self, name: str, numbers: Any, number: Any) -> None:
        entry = self._sums.setdefault(name, [0.0, 0])
        entry[0] = entry[0] + numbers.sum()  # on a device nothing waits for it
        entry[1] = entry[1] + number

    def take(self) -> Sums:
        """What was added up since the last call."""
        sums, self._sums = self._sums, {}
        return {name: (float(total), float(number)) for name, (total, number) in sums.items() if number}

    def restart(self) -> None:
        """All episodes begin anew; what was added up of steps stays."""
        self.carry, self._saved = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Sums of the episodes that go on."""
        return {**self._saved, **{name: torch.as_tensor(carry).cpu().clone() for name, carry in self.carry.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        self.carry, self._saved = {}, dict(state)


def as_numbers(given: Any) -> Array:
    """What an environment gave as float64, NaN where it is no number."""
    array = np.asarray(given)
    if array.dtype.kind in "biuf":
        return array.astype(np.float64, copy=False)
    # Gymnasium's vectors put NumPy's own bools, and None where an environment gave nothing, into arrays of objects.
    each = [float(one) if isinstance(one, int | float | np.bool_ | np.number) else np.nan for one in array.flat]
    return np.array(each).reshape(array.shape)


def added(every: list[Sums]) -> Sums:
    """Sums of several logs as one."""
    together: Sums = {}
    for sums in every:
        for name, (total, number) in sums.items():
            have = together.get(name, (0.0, 0.0))
            together[name] = have[0] + total, have[1] + number
    return together


def means(sums: Sums) -> dict[str, float]:
    """What is logged of sums."""
    return {name: total / number for name, (total, number) in sums.items()}


def _where(counts: Any, numbers: Any) -> Any:
    return torch.where(counts, numbers, 0.0) if isinstance(numbers, Tensor) else np.where(counts, numbers, 0.0)
