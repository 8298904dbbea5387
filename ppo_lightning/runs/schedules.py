"""Coefficients and the learning rate over a run, and who sets them."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import Linear, schedule

SCHEDULED_LR = "scheduled_lr"
"""Key of a parameter group: the learning rate that PPO set last; None where callbacks of Lightning's kind set it."""

NAMES = ("lr", "clip_range", "ent_coef")


class Schedules:
    """Schedules of ``lr``, ``clip_range`` and ``ent_coef`` over the environment steps of a run, each with one owner.

    Args:
        clip_range: of the model.
        ent_coef: of the model.
        lr_scheduler: a scheduler of the user's sets the learning rate.
    """

    def __init__(self, clip_range: Linear, ent_coef: Linear, *, lr_scheduler: bool) -> None:
        self._given: dict[str, Linear | None] = {"lr": None, "clip_range": clip_range, "ent_coef": ent_coef}
        self._overrides: dict[str, tuple[Linear, Any]] = {}
        self.lr_scheduler = lr_scheduler

    def __getitem__(self, name: str) -> Linear | None:
        """The schedule in force; None for the learning rate is linear from the optimizer's own to 0, or lr_scheduler's."""
        return self._overrides[name][0] if name in self._overrides else self._given[name]

    @property
    def changing(self) -> frozenset[str]:
        """Names of the schedules that change over the run."""
        schedules = {name: self[name] for name in NAMES}
        return frozenset(
            name for name, current in schedules.items() if current is not None and current.start != current.end
        )

    def at(self, name: str, progress: float) -> float:
        """Value of a coefficient where ``progress`` (0 to 1) of the environment steps are trained."""
        current = self[name]
        assert current is not None
        return current.at(progress)

    def override(self, name: str, value: float | Linear | None, *, owner: Any) -> None:
        """Replace a schedule; None restores the model's.

        Args:
            name: lr, clip_range or ent_coef. ``lr`` is that of the first parameter group; others keep their ratio to it.
            value: a number is constant.
            owner: who sets it, and alone may set it until it restores it: a callback.

        Raises:
            InputError: something else sets it already, or there is no such schedule.
        """
        self.check_owner(name, owner)
        if value is None:
            self._overrides.pop(name, None)
        else:
            self._overrides[name] = schedule(name, value), owner

    def check_owner(self, name: str, owner: Any) -> None:
        """Refuse an owner of a schedule beside another one.

        Raises:
            InputError: something else sets it already, or there is no such schedule.
        """
        if name not in NAMES:
            raise InputError(f"there is no schedule {name}: take one of {', '.join(NAMES)}")
        other = self._overrides[name][1] if name in self._overrides else None
        label = "lr_scheduler" if name == "lr" and self.lr_scheduler else type(other).__name__
        if label == "lr_scheduler" or other not in (None, owner):
            raise InputError(f"{type(owner).__name__} and {label} both set {_LABELS[name]}: leave one of them out")

    def release(self, owner: Any) -> None:
        """Restore all that an owner has set."""
        self._overrides = {name: one for name, one in self._overrides.items() if one[1] is not owner}

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, progress: float) -> float:
        """Set the learning rate of an iteration, where no scheduler does: by default from its initial value linearly to 0.

        A group whose learning rate something else has set since the last iteration keeps it: the optimizer notes so, and
        checkpoints with it.

        Returns:
            The learning rate of the first parameter group.

        Raises:
            InputError: the schedule has an owner, and something else has set the learning rate too.
        """
        current, groups = self["lr"], optimizer.param_groups
        if current is None and self.lr_scheduler:
            return groups[0]["lr"]
        for index, group in enumerate(groups):
            group.setdefault("initial_lr", group["lr"])
            if group.setdefault(SCHEDULED_LR, group["lr"]) not in (None, group["lr"]):
                if current is not None:
                    owner = type(self._overrides["lr"][1]).__name__
                    raise InputError(
                        f"two callbacks set the learning rate of parameter group {index}: {group[SCHEDULED_LR]:g} was set by "
                        f"{owner}, and {group['lr']:g} by another one; remove one"
                    )
                group[SCHEDULED_LR] = None
                rank_zero_info(
                    f"the learning rate of parameter group {index} was set to {group['lr']:g} by a callback: the linear "
                    "schedule ends here, and the learning rate stays what callbacks set"
                )
            if group[SCHEDULED_LR] is None:
                continue
            if current is None:
                rate = group["initial_lr"] * (1 - progress)
            elif groups[0]["initial_lr"] == 0:
                raise InputError(
                    "the learning rate of the first parameter group is 0, to which no other can keep its ratio: put a group "
                    "with another rate first, or let no callback set the learning rate"
                )
            else:
                rate = current.at(progress) * (group["initial_lr"] / groups[0]["initial_lr"])
            group["lr"] = group[SCHEDULED_LR] = rate
        return groups[0]["lr"]


_LABELS = {"lr": "the learning rate", "clip_range": "clip_range", "ent_coef": "ent_coef"}
