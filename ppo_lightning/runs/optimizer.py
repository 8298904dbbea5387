"""Settings and state of an optimizer across checkpoints and fits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LRScheduler

from ppo_lightning.algorithm.optimizer_step import parameters_of
from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import CHECKPOINT_KEY
from ppo_lightning.runs.hyperparameters import is_plain
from ppo_lightning.runs.schedules import SCHEDULED_LR


class OptimizerHparams:
    """Settings of this run's optimizer and scheduler, to restore after a checkpoint has replaced them.

    The optimizer's and scheduler's moments and counts come from the checkpoint; what the user set is this run's,
    but for momentum that a scheduler cycles, and attributes of schedulers that are not torch's.

    Args:
        optimizer: as it was made, before anything is restored.
        scheduler: likewise, where there is one.
        checkpoint: that is resumed.

    Raises:
        InputError: they cannot continue the checkpoint's state.
    """

    COUNTED = ("last_epoch", "_step_count", "_last_lr", "T_cur", "T_i")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        checkpoint: Mapping[str, Any] | None,
    ) -> None:
        if checkpoint is not None:
            _check_optimizer(checkpoint, optimizer, scheduler)
        self.had_scheduler = checkpoint is not None and bool(checkpoint.get("lr_schedulers"))
        self.scheduled = checkpoint is None or self.had_scheduler
        self.optimizer = optimizer
        self.schedulers = [] if scheduler is None else _with_parts(scheduler)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group[SCHEDULED_LR] = group["lr"]
        cycles = self.scheduled and any(getattr(part, "cycle_momentum", False) for part in self.schedulers)
        not_ours = {"params", *(("betas", "momentum") if cycles else ())}
        self.groups = [{key: group[key] for key in group if key not in not_ours} for group in optimizer.param_groups]
        # A scheduler that is not torch's may count in any attribute.
        self.constants = [
            {key: value for key, value in vars(part).items() if key not in self.COUNTED and is_plain(value)}
            if type(part).__module__.startswith("torch.")
            else {}
            for part in self.schedulers
        ]

    def restore(self) -> None:
        """Restore them. A learning rate that a scheduler had set keeps its ratio to the initial one."""
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            is_a_callbacks = not self.had_scheduler and group.get(SCHEDULED_LR, group["lr"]) != group["lr"]
            rate = own["lr"]
            if (self.scheduled or is_a_callbacks) and group["initial_lr"] != 0:
                rate = group["lr"] * (own["initial_lr"] / group["initial_lr"])
            group.update(own)
            group["lr"], group[SCHEDULED_LR] = rate, None if is_a_callbacks and not self.schedulers else rate
        for part, constants in zip(self.schedulers, self.constants, strict=True):
            vars(part).update(constants)


def _with_parts(scheduler: Any) -> list[Any]:
    """A scheduler, and those that it is made of (SequentialLR, ChainedScheduler)."""
    return [scheduler] + [part for own in getattr(scheduler, "_schedulers", []) for part in _with_parts(own)]


def _check_optimizer(
    checkpoint: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
) -> None:
    """Refuse to resume with an optimizer or scheduler whose class or parameter groups are not the checkpoint's.

    A run may add or leave out a scheduler.
    """
    ours, (state, *_) = checkpoint[CHECKPOINT_KEY], checkpoint["optimizer_states"]
    kind, theirs = type(optimizer).__name__, next(iter(ours.get("optimizer", [])), None)
    # Older files do not name the class, but classes have different numbers.
    numbers = {key for key, value in optimizer.defaults.items() if not isinstance(value, bool | None)}
    if theirs != kind if theirs else not numbers <= state["param_groups"][0].keys():
        raise InputError(
            f"the checkpoint was trained with {f'optimizer {theirs}' if theirs else 'another optimizer'}, this run has {kind}, "
            "which cannot continue its state: resume with the same optimizer, or give the weights alone to a new fit by "
            "PPO.load_from_checkpoint"
        )
    names = ("amsgrad", "centered", *(["momentum"] if isinstance(optimizer, torch.optim.RMSprop) else []))
    lacking = [name for name in names if optimizer.defaults.get(name) and not state["param_groups"][0].get(name)]
    if lacking:
        raise InputError(
            f"the checkpoint's {kind} was trained without {lacking[0]}, whose state this run's needs: resume with the same "
            "options, or give the weights alone to a new fit by PPO.load_from_checkpoint"
        )
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the checkpoint's optimizer has parameter groups of {sizes[0]} tensors, this run's has {sizes[1]}: give the "
            "optimizer and the modules of the run"
        )
    if scheduler is not None and checkpoint["lr_schedulers"]:
        kind, theirs = type(scheduler).__name__, next(iter(ours.get("lr_scheduler", [])), None)
        if theirs != kind if theirs else checkpoint["lr_schedulers"][0].keys() != scheduler.state_dict().keys():
            raise InputError(
                f"the checkpoint was trained with {f'lr_scheduler {theirs}' if theirs else 'another lr_scheduler'}, this "
                f"run has {kind}, which cannot continue its state: resume with the same lr_scheduler"
            )


def continue_optimizer(refit: Mapping[str, Any], optimizer: torch.optim.Optimizer, schedulers: Sequence[Any]) -> None:
    """Continue the optimizer and schedulers of the last fit.

    Args:
        refit: their state, their class and the parameters in their order (:meth:`RunState.save_for_refit`).
        optimizer: of this fit; parameters that the last one did not have begin without state.
        schedulers: of this fit.
    """
    if type(optimizer) is refit["kind"]:
        saved, places = refit["optimizer"], {id(one): place for place, one in enumerate(refit["parameters"])}
        groups = optimizer.state_dict()["param_groups"]
        if len(groups) == len(saved["param_groups"]):
            groups = [{**old, "params": new["params"]} for old, new in zip(saved["param_groups"], groups, strict=True)]
        known = {new: places[id(one)] for new, one in enumerate(parameters_of(optimizer)) if id(one) in places}
        state = {new: saved["state"][old] for new, old in known.items() if old in saved["state"]}
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    else:
        kind = type(optimizer).__name__
        rank_zero_info(f"the last fit used {refit['kind'].__name__}, this one uses {kind}: it starts without state")
    for scheduler, state in zip(schedulers, refit["schedulers"], strict=False):
        if state.keys() == scheduler.state_dict().keys():
            scheduler.load_state_dict(state)
