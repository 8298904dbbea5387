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
        self._sums: dict[str, list[Any]] = {}

    def step(self, info: dict[str, Any], done: Any, valid: Array | None) -> None:
        """Take in one step.

        Args:
            info: what the step gave.
            done: [N] bool array or tensor, the episode ended.
            valid: [N] bool, False where the call was a reset; None where every row is a step.
        """
        if self.keys.isdisjoint(info) and "final_info" not in info and not self.carry:
            return
        last = info.get("final_info")
        if last is None or last is info:
            self._add(info, valid)
        else:  # of an episode that ended: the rest tells of the reset
            self._add(info, ~done)
            self._add(last, done)
        for name, carry in self.carry.items():
            self._account(f"reward_components/{name}", carry, done)
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
        numbers = value if isinstance(value, Tensor) else np.asarray(value)
        if isinstance(numbers, np.ndarray) and numbers.dtype.kind not in "biuf":
            return  # a text, or an object: nothing to add up
        if numbers.shape != (self.num_envs,):
            if numbers.ndim == 0:  # the vector's own mean
                self._account(f"{'reward' if key in REWARD_KEYS else 'env'}/{name}", numbers, None)
            return
        if given is not None:
            counts = given if counts is None else counts & given
        if key not in REWARD_KEYS:
            self._account(f"env/{name}", numbers, counts)
            return
        self._account(f"reward/{name}", numbers, counts)
        if name not in self.carry:
            shape = (self.num_envs,)
            self.carry[name] = torch.zeros(shape).to(numbers.device) if isinstance(numbers, Tensor) else np.zeros(shape)
        self.carry[name] += numbers if counts is None else _where(counts, numbers)

    def _account(self, name: str, numbers: Any, counts: Any) -> None:
        if counts is None:
            total, number = numbers.sum(), int(np.prod(numbers.shape))
        else:
            total, number = _where(counts, numbers).sum(), counts.sum()
        entry = self._sums.setdefault(name, [0.0, 0])
        entry[0] = entry[0] + total  # on a device nothing waits for it
        entry[1] = entry[1] + number

    def take(self) -> Sums:
        """What was added up since the last call."""
        sums, self._sums = self._sums, {}
        return {name: (float(total), float(number)) for name, (total, number) in sums.items() if number}

    def restart(self) -> None:
        """All episodes begin anew."""
        self.carry, self._sums = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Sums of the episodes that go on."""
        return {name: torch.as_tensor(carry).cpu().clone() for name, carry in self.carry.items()}

    def restore(self, state: dict[str, Tensor], device: torch.device | None) -> None:
        """Go on from what :meth:`state` gave."""
        self.carry = {
            name: carry.numpy().copy() if device is None else carry.to(device) for name, carry in state.items()
        }


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
