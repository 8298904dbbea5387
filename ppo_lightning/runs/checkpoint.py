"""Contents of a checkpoint beyond weights, and the checks of a file."""

import hashlib
import importlib
import io
import os
import re
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import gymnasium as gym
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from gymnasium.vector import VectorEnv
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.algorithm.advantage import gae
from ppo_lightning.envs.state import as_tensors
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import Linear, PopArt
from ppo_lightning.runs.schedules import SCHEDULED_LR
from ppo_lightning.spaces import signature

KEY = "ppo_lightning"
"""Key of our entries in a checkpoint."""


LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
"""The newest state of a run, the one before, and the best by evaluation."""

ON_EXCEPTION = "on_exception.ckpt"
"""A newer state than the last, from which a run that failed cannot resume bit-exactly."""

CHOICES = {"last": (LAST, PREVIOUS), "best": (BEST,)}
"""Words that ``ckpt_path`` accepts instead of a path, and the files that they choose from."""

PARTS = ("state_dict", "hyper_parameters", KEY)
OURS = {"observation_space", "action_space", "seed", "episodes", "not_saved"}
OLD_HYPERPARAMETERS = {"hparams", "module_arguments"}
"""Further keys where Lightning looks for hyperparameters; we write none."""

SEAL = b"ppo_lightning sha256 "
SEAL_BYTES = len(SEAL) + 64
"""Length of a digest as it stands at the end of a file."""

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
KINDS = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, gym.Env, VectorEnv)
PACKAGES = ("ppo_lightning", "torch", "gymnasium", "ale_py", "minigrid")
"""Kinds of classes that a checkpoint may name, and the packages that it may import."""

PLACE = re.compile(r"(path|dir|directory|directorie|folder|filename)s?(_|$)|(^|_)(file|url|uri)s?(_|$)")
"""In names of arguments that take files or folders."""

TRAINING_ONLY = ("optimizer", "lr_scheduler", "loss", "advantage_estimator")
"""Hyperparameters that a policy can act without."""


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files atomically, and refuses files that are damaged or not ours.

    A file is what ``torch.save`` writes, with a SHA-256 digest of itself as the comment of the zip archive: ``torch.load``
    and ``zipfile`` read it as any other.
    """

    _checked = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file such that a process killed at any time leaves the old one or the new one.

        Raises:
            InputError: ``storage_options`` are given, which are not supported; or a value is no plain data, which could not
                be loaded.
            OSError: the file cannot be written; the old file is unchanged.
        """
        if storage_options is not None:
            raise InputError("save_checkpoint has no storage_options here: write to a path or URL without them")
        data = sealed(checkpoint)
        if not self._checked:  # the first file shows what callbacks add
            _plain(data, f"what {path} was to hold", "cpu")
            self._checked = True
        filesystem, name = url_to_fs(str(path))
        if isinstance(filesystem, LocalFileSystem):
            write_atomically(Path(name), data)
        else:  # an object appears whole, or not at all
            filesystem.pipe_file(name, data)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Contents of a file, plain data whatever ``weights_only`` says.

        Raises:
            InputError: as :func:`read_checkpoint`.
        """
        return read_checkpoint(path, map_location)


def verified(given: CheckpointIO) -> CheckpointIO:
    """The plugin that writes a run's checkpoints, such that each file ends with its digest.

    Args:
        given: of the strategy. A plugin that wraps another one, such as AsyncCheckpointIO, keeps its place around ours.

    Raises:
        InputError: the user gave a plugin whose files could not be loaded here.
    """
    if isinstance(given, _WrappingCheckpointIO):
        given._checkpoint_io = verified(given.checkpoint_io or TorchCheckpointIO())
        return given
    if isinstance(given, VerifiedCheckpointIO):
        return given
    if type(given) is TorchCheckpointIO:
        return VerifiedCheckpointIO()
    raise InputError(
        f"plugins: {type(given).__name__} writes checkpoints without the digest by which they are verified when they are "
        "loaded: derive it from ppo_lightning.runs.checkpoint.VerifiedCheckpointIO, or leave it out"
    )


def sealed(contents: Mapping[str, Any]) -> bytes:
    """What a checkpoint file holds: a zip archive whose comment is the digest of all bytes before it."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    archive = buffer.getvalue()[:-2] + SEAL_BYTES.to_bytes(2, "little")  # an archive ends with its comment's length
    return archive + _seal(archive)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file atomically, even on power loss; a killed process leaves a hidden file, which the next save replaces.

    Raises:
        OSError: it cannot be written; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")  # renaming is atomic within a folder only
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_verified(source: str | Path | IO[bytes]) -> bytes:
    """The bytes of a checkpoint file, from a path, a URL or an open file; executes no code.

    Raises:
        InputError: there is no file, or its digest is not that of its bytes.
    """
    try:
        data = _bytes_of(source)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint at {source}: give the path of a .ckpt file") from error
    except Exception as error:  # every file system and protocol has its own errors
        raise InputError(
            f"{source} is no checkpoint that can be read ({type(error).__name__}: {error}): give the path or URL of a .ckpt "
            "file"
        ) from error
    archive, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    if seal != _seal(archive):
        found = "its digest is another" if seal.startswith(SEAL) else "it does not end with a digest"
        raise InputError(
            f"{source} is no checkpoint that can be read ({found}): it is cut short, damaged, or not a checkpoint of "
            "ppo_lightning; use an older checkpoint of the run"
        )
    return data


def read_checkpoint(source: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint file.

    Args:
        source: path, URL or open file.
        map_location: as that of ``torch.load``.

    Raises:
        InputError: there is no file, it is damaged, or something else wrote it.
    """
    return plain_contents(read_verified(source), source, map_location)


def plain_contents(data: bytes, source: object, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint: tensors and plain data; nothing else is loaded.

    Args:
        data: bytes of the file.
        source: what to call it in messages.
        map_location: as that of ``torch.load``.

    Raises:
        InputError: it holds something else, or is not of this version.
    """
    contents = _plain(data, source, map_location)
    if not isinstance(contents, dict) or not all(isinstance(contents.get(part), dict) for part in PARTS):
        raise InputError(f"{source} is not a checkpoint of ppo_lightning: give one that PPO wrote")
    hyperparameters = contents["hyper_parameters"]
    if hyperparameters.get("_instantiator", INSTANTIATOR) != INSTANTIATOR or not all(map(_is_name, hyperparameters)):
        raise InputError(
            f"{source} names what no PPO writes among its hyperparameters: give a checkpoint that PPO wrote"
        )
    if not contents[KEY].keys() >= OURS or contents.keys() & OLD_HYPERPARAMETERS:
        raise InputError(f"{source} is a checkpoint of another version of ppo_lightning: use the version that wrote it")
    return contents


def _plain(data: bytes, source: object, map_location: Any) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except Exception as error:  # a digest is no signature: the file may hold anything
        raise InputError(
            f"{source} is no checkpoint that can be read ({type(error).__name__}): it holds more than tensors and plain "
            "data; use one that PPO wrote, with callbacks whose state_dict holds nothing else"
        ) from error


def _bytes_of(source: str | Path | IO[bytes]) -> bytes:
    if not isinstance(source, str | Path):
        return source.read()
    filesystem, name = url_to_fs(str(source))
    return filesystem.cat_file(name)


def _seal(archive: bytes) -> bytes:
    return SEAL + hashlib.sha256(archive).hexdigest().encode()


def newest_checkpoint(root: str | Path, choice: str = "last") -> Path:
    """The checkpoint that ``ckpt_path: last`` or ``best`` names: of the newest run below a folder.

    Args:
        root: folder of the runs.
        choice: ``last`` or ``best``. A ``best.ckpt`` is as new as the newest file beside it.

    Raises:
        InputError: no file can be read. Each unreadable file gives a warning.
    """
    names = CHOICES[choice]
    found = {path: _modified(path) for name in names for path in Path(root).rglob(name)}
    if choice == "best":
        found = {path: max(map(_modified, path.parent.glob("*.ckpt")), default=0) for path in found}
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        try:
            read_checkpoint(path)
        except InputError as error:
            rank_zero_warn(f"--ckpt_path {choice} passes over a file: {error}")
        else:
            return path
    raise InputError(
        f"--ckpt_path {choice}: there is no {names[0]} below {Path(root).resolve()} that can be read; "
        "give the path of a checkpoint, or train first"
    )


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another process replaces it
        return 0


def refuse_names(hyperparameters: Mapping[str, Any], given: Container[str] = ()) -> None:
    """Refuse hyperparameters that would import or call what a checkpoint may not choose.

    A checkpoint is untrusted, and under the command line its hyperparameters hold names that are imported and called. It may
    name registered environments, and classes of networks, optimisers, schedulers, environments and wrappers from
    :data:`PACKAGES` or from modules that are imported already. It may not name files or folders.

    Args:
        hyperparameters: of a checkpoint.
        given: names of those that the user has given again, which replace the checkpoint's.

    Raises:
        InputError: one names something else and was not given again.
    """
    for name, words in foreign_names(hyperparameters).items():
        if name not in given:
            raise InputError(
                f"the checkpoint's {name} is {words[0]!r}, which no checkpoint may choose: if you trust it, give {name} again, "
                f"by --model.{name}, in a config, or to load_from_checkpoint"
            )


def foreign_names(hyperparameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """Disallowed names by hyperparameter, which the user must give again."""
    found = {
        name: [word for word in _words(value) if not (_is_inert(word) if name == "env_kwargs" else _may_be_named(word))]
        + list(_places(value))
        for name, value in hyperparameters.items()
        if name != "_instantiator"
    }
    if not isinstance(hyperparameters.get("env_kwargs"), dict | None):  # jsonargparse would read a file of this name
        found["env_kwargs"] = [str(hyperparameters["env_kwargs"])]
    return {name: words for name, words in found.items() if words}


def _places(value: object) -> Iterator[str]:
    """Strings in a hyperparameter for arguments that take a file or folder."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "class_path" and PLACE.search(str(key).lower()) and not isinstance(item, Mapping):
                yield from _words(item)
            yield from _places(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _places(item)


def _words(value: object) -> Iterator[str]:
    """All strings in a hyperparameter, keys as well as values."""
    if isinstance(value, Mapping):
        yield from _words([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str | bytes):
        yield str(value)


def _is_name(key: object) -> bool:
    return isinstance(key, str) and key.isidentifier()


def _is_inert(word: str) -> bool:
    """Whether a string is harmless anywhere: jsonargparse imports what a class_path names."""
    return "class_path" not in word and (word in gym.registry or re.search(r"[/\\]|^~|^\.+$", word) is None)


def _may_be_named(word: str) -> bool:
    if word in gym.registry or re.fullmatch(r"[\w +-]*", word):
        return True
    module, colon, _ = word.rpartition(":")
    if colon:
        return re.fullmatch(r"[\w.]+:[\w./-]+", word) is not None and (_is_ours(module) or module in sys.modules)
    module, _, name = word.rpartition(".")
    if _is_ours(module):
        try:
            importlib.import_module(module)
        except ImportError:
            return False
    kind = getattr(sys.modules.get(module), name, None)
    return kind in FUNCTIONS or (isinstance(kind, type) and issubclass(kind, KINDS))


FUNCTIONS = (gae,)
"""Functions that a checkpoint may name."""


def _is_ours(module: str) -> bool:
    """Whether every run imports a module anyway."""
    parts = module.split(".")
    return parts[0] in PACKAGES and all(re.fullmatch(r"[A-Za-z]\w*", part) for part in parts)


def resumes_exactly(checkpoint: Mapping[str, Any], world_size: int) -> bool:
    """Whether a checkpoint has the environments' state of each of ``world_size`` ranks."""
    states = checkpoint[KEY]["processes"]
    return len(states) == world_size and all(state["rollouts"] is not None for state in states)


def refuse_other_spaces(
    checkpoint: Mapping[str, Any], observation_space: gym.Space, action_space: gym.Space, name: str
) -> dict[str, Any]:
    """Our entries of a checkpoint, whose policy must fit the environment ``name``.

    Raises:
        InputError: the checkpoint is not ours, or its spaces differ from the environment's.
    """
    if KEY not in checkpoint:
        raise InputError("this is not a checkpoint of ppo_lightning: give one that PPO wrote")
    ours = checkpoint[KEY]
    for kind, space in (("observation", observation_space), ("action", action_space)):
        saved = ours[f"{kind}_space"]
        if saved != signature(space):
            raise InputError(
                f"the checkpoint was trained with {kind} space {saved}, {name} has {signature(space)}: "
                "use the environment it was trained on"
            )
    return ours


def check_checkpoint(module: Any, checkpoint: dict[str, Any], *, fits: bool) -> None:
    """Refuse a checkpoint that a module cannot load.

    Args:
        module: a PPO.
        checkpoint: to load. Weights of a loss that the module lacks are removed, unless a run is resumed.
        fits: a run is resumed.

    Raises:
        InputError: the checkpoint is not ours, or of other spaces, another policy, or other hyperparameters.
    """
    spaces = module.observation_space, module.action_space
    module.hyperparameters.load(refuse_other_spaces(checkpoint, *spaces, module.env_factory.name))
    own = module.state_dict()
    if not fits and not any(name.startswith("loss.") for name in own):
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: one for name, one in weights if not name.startswith("loss.")}
    refuse_other_policy(checkpoint, own, module.policy.distribution.signature())
    if fits:
        refuse_weights_alone(checkpoint)
        refuse_fewer_epochs(checkpoint, module.trainer.max_epochs)


def checkpoint_contents(module: Any) -> dict[str, Any]:
    """Contents of a PPO's checkpoint beyond weights: what the policy was trained on, and the state to resume from."""
    trainer = module.trainer
    return {
        "processes": as_tensors(module.run_state.of_all_ranks(module.ranks)),
        "observation_space": signature(module.observation_space),
        "action_space": signature(module.action_space),
        "distribution": module.policy.distribution.signature(),
        "optimizer": [type(one).__name__ for one in trainer.optimizers],
        "lr_scheduler": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
        "seed": module.seed,
        "episodes": list(module.rollouts.episodes.window),
        "not_saved": module.hyperparameters.unsaved,
        "masked": module.trained_with_masks,
    }


def with_run_buffers(module: torch.nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with the module's own counters and statistics: a callback may have replaced them by averages."""
    averaged = dict(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    ).keys()
    return {**weights, **{name: value for name, value in module.state_dict().items() if name not in averaged}}


def refuse_other_policy(checkpoint: Mapping[str, Any], state: Mapping[str, torch.Tensor], distribution: str) -> None:
    """Refuse weights of another network, or of one with another distribution.

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


def refuse_weights_alone(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint that was saved with ``save_weights_only=True``.

    Raises:
        InputError: it has no state of the optimiser.
    """
    if "optimizer_states" not in checkpoint:
        raise InputError(
            "the checkpoint holds weights alone (save_weights_only), so no run can resume from it: give last.ckpt, or act "
            "with it by PPO.load_from_checkpoint, validate or test"
        )


def refuse_fewer_epochs(checkpoint: Mapping[str, Any], max_epochs: int | None) -> None:
    """Refuse to resume a run that has more iterations than ``max_epochs`` of the Trainer allows in all.

    Raises:
        InputError: it has.
    """
    trained = checkpoint["global_step"]
    if max_epochs not in (None, -1) and trained > max_epochs:
        raise InputError(
            f"the checkpoint has {trained} iterations, and max_epochs={max_epochs} counts all of a run: raise it, or leave it "
            "out"
        )


def refuse_other_optimizer(
    checkpoint: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> None:
    """Refuse to resume with an optimizer or scheduler that cannot continue the checkpoint's state.

    Args:
        checkpoint: that is to be resumed.
        optimizer: of this run.
        scheduler: of this run, where there is one. A run may add or leave out a scheduler.

    Raises:
        InputError: the classes differ, or the parameter groups.
    """
    ours, (state, *_) = checkpoint[KEY], checkpoint["optimizer_states"]
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


def refuse_missing(ours: Mapping[str, Any], given: Container[str]) -> list[str]:
    """Hyperparameters that were neither saved nor given again, and that only training needs.

    Raises:
        InputError: one that acting needs is missing.
    """
    absent = [name for name in ours["not_saved"] if name not in given]
    for name in absent:
        if name not in TRAINING_ONLY:
            raise missing(name)
    return absent


def missing(name: str) -> InputError:
    """The error for a hyperparameter that was neither saved nor given again."""
    return InputError(
        f"the checkpoint was made with a value of {name} which a file of plain data cannot hold: "
        f"pass {name}=… again, to PPO or to load_from_checkpoint"
    )


def plain_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those hyperparameters that ``weights_only`` loading can restore, converted to plain data."""
    plain = {name: asdict(value) if isinstance(value, Linear | PopArt) else value for name, value in given.items()}
    return {name: value for name, value in plain.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Whether ``weights_only`` loading can restore a value."""
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


class OptimizerHparams:
    """Settings of this run's optimiser and scheduler, to restore after a checkpoint has replaced them.

    The optimiser's and scheduler's moments and counts come from the checkpoint; what the user set is this run's.

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
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        checkpoint: Mapping[str, Any] | None,
    ) -> None:
        if checkpoint is not None:
            refuse_other_optimizer(checkpoint, optimizer, scheduler)
        self.scheduled = checkpoint is None or bool(checkpoint.get("lr_schedulers"))
        self.optimizer = optimizer
        self.schedulers = [] if scheduler is None else _with_parts(scheduler)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group[SCHEDULED_LR] = group["lr"]
        self.groups = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        self.constants = [
            {key: value for key, value in vars(part).items() if key not in self.COUNTED and _is_plain(value)}
            for part in self.schedulers
        ]

    def restore(self) -> None:
        """Restore them. A learning rate that a scheduler had set keeps its ratio to the initial one."""
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            rate, is_a_callbacks = own["lr"], group.get(SCHEDULED_LR, group["lr"]) != group["lr"]
            if (self.scheduled or is_a_callbacks) and group["initial_lr"] != 0:
                rate = group["lr"] * (own["initial_lr"] / group["initial_lr"])
            group.update(own)
            group["lr"], group[SCHEDULED_LR] = rate, None if is_a_callbacks and not self.schedulers else rate
        for part, constants in zip(self.schedulers, self.constants, strict=True):
            vars(part).update(constants)


def _with_parts(scheduler: Any) -> list[Any]:
    """A scheduler, and those that it is made of (SequentialLR, ChainedScheduler)."""
    return [scheduler] + [part for own in getattr(scheduler, "_schedulers", []) for part in _with_parts(own)]


def checkpoint_paths(trainer: Any) -> dict[str, str | None]:
    """The newest and the best checkpoint of a run, as :class:`ModelCheckpoint` and its like have written them."""
    latest = best = None
    for callback in [] if trainer is None else trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            if callback.monitor is not None:
                best = best or callback.best_model_path or None
            latest = callback.last_model_path or callback.best_model_path or latest
    return {"latest_checkpoint": latest, "best_checkpoint": best}
