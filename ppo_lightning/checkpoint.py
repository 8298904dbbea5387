"""What a checkpoint must hold beyond weights, and how a file is refused."""

from collections.abc import Callable, Container, Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import gymnasium as gym
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import Linear, PopArt
from ppo_lightning.spaces import describe

KEY = "ppo_lightning"
"""Where a checkpoint keeps what is ours."""


TRAINING_ONLY = ("optimizer", "lr_scheduler")
"""Hyperparameters that a policy can act without."""


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, with one sentence where a file is damaged or not ours."""

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read_checkpoint(path, lambda: TorchCheckpointIO.load_checkpoint(self, path, map_location, weights_only))


def read_checkpoint(path: str | Path, load: Callable[[], Any] | None = None) -> dict[str, Any]:
    """The contents of a checkpoint file, by ``load`` or else by ``torch.load`` of plain data.

    Raises:
        InputError: there is no file, it is cut or damaged, or something else wrote it.
    """
    try:
        contents = load() if load else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint at {path}: give the path of a .ckpt file") from error
    except (EOFError, RuntimeError, OSError, UnpicklingError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}): it is cut short, damaged, or another "
            "kind of file; use an older checkpoint of the run"
        ) from error
    if not isinstance(contents, dict) or KEY not in contents or "state_dict" not in contents:
        raise InputError(f"{path} is not a checkpoint of ppo_lightning: give one that PPO wrote")
    return contents


def newest_checkpoint(root: str | Path) -> Path:
    """The newest ``last.ckpt`` below a folder that can be read.

    Raises:
        InputError: there is none.
    """
    found = sorted(Path(root).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            read_checkpoint(path)
        except InputError:
            continue
        return path
    raise InputError(
        f"--ckpt_path last: there is no last.ckpt below {Path(root).resolve()} that can be read; "
        "give the path of a checkpoint, or train first"
    )


def refuse_other_spaces(
    checkpoint: Mapping[str, Any], observation_space: gym.Space, action_space: gym.Space, name: str
) -> dict[str, Any]:
    """What is ours in a checkpoint, where its policy fits the environment ``name``.

    Raises:
        InputError: the checkpoint is not ours, or its spaces differ from the environment's.
    """
    if KEY not in checkpoint:
        raise InputError("this is not a checkpoint of ppo_lightning: give one that PPO wrote")
    ours = checkpoint[KEY]
    for kind, space in (("observation", observation_space), ("action", action_space)):
        saved = ours[f"{kind}_space"]
        if saved != describe(space):
            raise InputError(
                f"the checkpoint was trained with {kind} space {saved}, {name} has {describe(space)}: "
                "use the environment it was trained on"
            )
    return ours


def refuse_other_policy(checkpoint: Mapping[str, Any], state: Mapping[str, torch.Tensor], distribution: str) -> None:
    """Refuse weights of another network, or of one whose outputs meant something else.

    Args:
        checkpoint: that is to be loaded.
        state: of the module that it is to be loaded into.
        distribution: what that module's outputs describe.

    Raises:
        InputError: it names the first thing that differs.
    """
    theirs, saved = checkpoint[KEY].get("distribution", distribution), checkpoint["state_dict"]
    differences = [f"distribution {theirs} against {distribution}"] if theirs != distribution else []
    differences += [
        f"{name} is {'only' if name in saved else 'not'} in the file" for name in saved.keys() ^ state.keys()
    ]
    differences += [
        f"{name} is {tuple(saved[name].shape)} against {tuple(state[name].shape)}"
        for name in saved.keys() & state.keys()
        if saved[name].shape != state[name].shape
    ]
    if differences:
        raise InputError(
            f"the checkpoint holds another policy ({sorted(differences)[0]}): give policy, normalize_observation, "
            "normalize_reward and popart as they were in the run"
        )


def refuse_missing(ours: Mapping[str, Any], given: Container[str]) -> list[str]:
    """Hyperparameters that the checkpoint could not hold and that were not given again, and that acting needs not.

    Raises:
        InputError: one that acting needs is missing.
    """
    absent = [name for name in ours["not_saved"] if name not in given]
    for name in absent:
        if name not in TRAINING_ONLY:
            raise missing(name)
    return absent


def missing(name: str) -> InputError:
    """The error that a hyperparameter which no file can hold was not given again."""
    return InputError(
        f"the checkpoint was made with a value of {name} which a file of plain data cannot hold: "
        f"pass {name}=… again, to PPO or to load_from_checkpoint"
    )


def plain_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those hyperparameters that ``weights_only`` loading can bring back, as it can."""
    plain = {name: asdict(value) if isinstance(value, Linear | PopArt) else value for name, value in given.items()}
    return {name: value for name, value in plain.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Whether ``weights_only`` loading can bring a value back."""
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


class RunSettings:
    """The numbers of this run's optimiser and scheduler, to be put back after a checkpoint has replaced them.

    What an optimiser or scheduler has learnt or counted is the checkpoint's; what the user set is this run's.

    Args:
        optimizer: as it was made, before anything is restored.
        scheduler: likewise, where there is one.
    """

    COUNTED = ("last_epoch", "_step_count", "_last_lr", "T_cur", "T_i")

    def __init__(
        self, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None
    ) -> None:
        self.optimizer = optimizer
        self.schedulers = [] if scheduler is None else _with_parts(scheduler)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.groups = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        self.constants = [
            {key: value for key, value in vars(part).items() if key not in self.COUNTED and _is_plain(value)}
            for part in self.schedulers
        ]

    def restore(self, *, scheduled: bool) -> None:
        """Put them back.

        Args:
            scheduled: a scheduler had set the restored learning rate: it keeps its ratio to the initial one. Otherwise
                this run's schedule begins anew.
        """
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            rate = own["lr"]
            if scheduled and group["initial_lr"] != 0:
                rate = group["lr"] * (own["initial_lr"] / group["initial_lr"])
            group.update(own)
            group["lr"] = rate
        for part, constants in zip(self.schedulers, self.constants, strict=True):
            vars(part).update(constants)


def _with_parts(scheduler: Any) -> list[Any]:
    """A scheduler, and those that it is made of (SequentialLR, ChainedScheduler)."""
    return [scheduler] + [part for own in getattr(scheduler, "_schedulers", []) for part in _with_parts(own)]
