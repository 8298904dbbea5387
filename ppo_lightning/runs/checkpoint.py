"""Contents of a checkpoint beyond weights, and the checks of a file."""

import difflib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.envs.state import as_tensors
from ppo_lightning.errors import InputError
from ppo_lightning.spaces import signature

CHECKPOINT_KEY = "ppo_lightning"
"""Key of our entries in a checkpoint."""

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
"""The newest state of a run, the one before, and the best by evaluation."""

ON_EXCEPTION = "on_exception.ckpt"
"""A newer state than the last, from which a run that failed cannot resume bit-exactly."""

CHOICES = {"last": (LAST, PREVIOUS), "best": (BEST,)}
"""Words that ``ckpt_path`` accepts instead of a path, and the files that they choose from."""

REQUIRED_PARTS = ("state_dict", "hyper_parameters", CHECKPOINT_KEY)
"""Keys that a checkpoint of ours has."""

REQUIRED_ENTRIES = {"observation_space", "action_space", "seed", "episodes", "not_saved"}
"""Keys of our entries that a checkpoint of this version has."""

OLD_HYPERPARAMETERS = {"hparams", "module_arguments"}
"""Further keys where Lightning looks for hyperparameters; we write none."""

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What LightningCLI notes in a checkpoint for making the model again."""


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files atomically, and refuses files that are damaged or not ours."""

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
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getvalue()
        if not self._checked:  # the first file shows what callbacks add
            _load_plain_data(data, f"what {path} was to hold", "cpu")
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
        """Contents of a file, plain data whatever ``weights_only`` says; errors as of :func:`read_checkpoint`."""
        return read_checkpoint(path, map_location)


def verified_io(given: CheckpointIO) -> CheckpointIO:
    """The plugin that writes a run's checkpoints, atomically and as plain data.

    Args:
        given: of the strategy. A plugin that wraps another one, such as AsyncCheckpointIO, keeps its place around ours.

    Raises:
        InputError: the user gave a plugin whose files could not be loaded here.
    """
    if isinstance(given, _WrappingCheckpointIO):
        given._checkpoint_io = verified_io(given.checkpoint_io or TorchCheckpointIO())
        return given
    if isinstance(given, VerifiedCheckpointIO):
        return given
    if type(given) is TorchCheckpointIO:
        return VerifiedCheckpointIO()
    raise InputError(
        f"plugins: {type(given).__name__} writes checkpoints that may be incomplete after a crash, or not loadable: derive it "
        "from ppo_lightning.runs.checkpoint.VerifiedCheckpointIO, or leave it out"
    )


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
        InputError: there is no file, or it is damaged: ``torch.save`` writes a zip archive with a CRC of each record.
    """
    try:
        if isinstance(source, str | Path):
            filesystem, name = url_to_fs(str(source))
            data = filesystem.cat_file(name)
        else:
            data = source.read()
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(source), ("best", "last"), 1)
        hint = f"did you mean {near[0]}?" if near else "give the path of a .ckpt file"
        raise InputError(f"there is no checkpoint at {source}: {hint}") from error
    except Exception as error:  # every file system and protocol has its own errors
        raise InputError(
            f"{source} is no checkpoint that can be read ({type(error).__name__}: {error}): give the path or URL of a .ckpt "
            "file"
        ) from error
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        # Torch does not read a record that its attributes make a folder, and leaves the tensor uninitialised.
        damaged = next((record.filename for record in archive.infolist() if record.external_attr), archive.testzip())
        damage = None if damaged is None else f"the checksum of its record {damaged} is wrong"
    except Exception as error:  # any field of the archive may be damaged
        damage = f"{type(error).__name__}: {error}"
    if damage is not None:
        raise InputError(
            f"{source} is no checkpoint that can be read ({damage}): it is cut short, damaged, or not a checkpoint of "
            "ppo_lightning; use an older checkpoint of the run"
        )
    return data


def read_checkpoint(source: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint file: a path, URL or open file; ``map_location`` as of ``torch.load``.

    Raises:
        InputError: there is no file, it is damaged, or something else wrote it.
    """
    return validated_contents(read_verified(source), source, map_location)


def validated_contents(data: bytes, source: object, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint's bytes, named ``source`` in messages: tensors and plain data; nothing else is loaded.

    Raises:
        InputError: it holds something else, or is not of this version.
    """
    contents = _load_plain_data(data, source, map_location)
    if not isinstance(contents, dict) or not all(isinstance(contents.get(part), dict) for part in REQUIRED_PARTS):
        raise InputError(f"{source} is not a checkpoint of ppo_lightning: give one that PPO wrote")
    hparams = contents["hyper_parameters"]
    are_names = all(isinstance(key, str) and key.isidentifier() for key in hparams)
    if hparams.get("_instantiator", INSTANTIATOR) != INSTANTIATOR or not are_names:
        raise InputError(
            f"{source} names what no PPO writes among its hyperparameters: give a checkpoint that PPO wrote"
        )
    if not contents[CHECKPOINT_KEY].keys() >= REQUIRED_ENTRIES or contents.keys() & OLD_HYPERPARAMETERS:
        raise InputError(f"{source} is a checkpoint of another version of ppo_lightning: use the version that wrote it")
    return contents


def _load_plain_data(data: bytes, source: object, map_location: Any) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except Exception as error:  # a checksum is no signature: the file may hold anything
        raise InputError(
            f"{source} is no checkpoint that can be read ({type(error).__name__}): it is damaged, or it holds more than "
            "tensors and plain data; use an older checkpoint of the run, or callbacks whose state_dict holds nothing else"
        ) from error


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
            rank_zero_warn(f"{choice} passes over a file: {error}")
        else:
            return path
    raise InputError(
        f"{choice}: there is no {names[0]} below {Path(root).resolve()} that can be read; "
        "give the path of a checkpoint, or train first"
    )


def located_checkpoint(given: str) -> Path:
    """The path that was given, or of ``best`` and ``last`` the file of the newest run below this folder."""
    return newest_checkpoint(".", given) if given in CHOICES else Path(given)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another process replaces it
        return 0


def resumes_exactly(checkpoint: Mapping[str, Any], world_size: int) -> bool:
    """Whether a checkpoint has the environments' state of each of ``world_size`` ranks."""
    states = checkpoint[CHECKPOINT_KEY]["processes"]
    return len(states) == world_size and all(state["rollouts"] is not None for state in states)


def check_checkpoint(module: Any, checkpoint: dict[str, Any], *, fits: bool) -> None:
    """Refuse a checkpoint that a module cannot load, or that a run cannot resume (``fits``).

    Weights of a loss that the module lacks are removed, unless a run is resumed.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise InputError("this is not a checkpoint of ppo_lightning: give one that PPO wrote")
    ours = checkpoint[CHECKPOINT_KEY]
    for kind, space in (("observation", module.observation_space), ("action", module.action_space)):
        if (saved := ours[f"{kind}_space"]) != signature(space):
            raise InputError(
                f"the checkpoint was trained with {kind} space {saved}, {module.env_factory.name} has {signature(space)}: "
                "use the environment it was trained on"
            )
    module.hyperparameters.load(ours)
    own = module.state_dict()
    if not fits and not any(name.startswith("loss.") for name in own):
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: one for name, one in weights if not name.startswith("loss.")}
    _check_weights(checkpoint, own, module.policy.distribution.signature())
    if not fits:
        return
    if "optimizer_states" not in checkpoint:
        raise InputError(
            "the checkpoint holds weights alone (save_weights_only), so no run can resume from it: give last.ckpt, or act "
            "with it by PPO.load_from_checkpoint, validate or test"
        )
    trained, max_epochs = checkpoint["global_step"], module.trainer.max_epochs
    if max_epochs not in (None, -1) and trained > max_epochs:
        raise InputError(
            f"the checkpoint has {trained} iterations, and max_epochs={max_epochs} counts all of a run: raise it, or leave it "
            "out"
        )


def _check_weights(checkpoint: Mapping[str, Any], own: Mapping[str, torch.Tensor], distribution: str) -> None:
    """Refuse weights of another network than that of the state ``own``, or of one with another distribution."""
    theirs, saved = checkpoint[CHECKPOINT_KEY].get("distribution", distribution), checkpoint["state_dict"]
    differences = [f"distribution {theirs} against {distribution}"] if theirs != distribution else []
    differences += [f"{name} is {'only' if name in saved else 'not'} in the file" for name in saved.keys() ^ own.keys()]
    differences += [
        f"{name} is {tuple(saved[name].shape)} against {tuple(own[name].shape)}"
        for name in saved.keys() & own.keys()
        if saved[name].shape != own[name].shape
    ]
    if differences:
        raise InputError(
            f"the checkpoint holds another policy ({sorted(differences)[0]}): give policy, normalize_observation, "
            "normalize_reward and popart as they were in the run"
        )


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
        "episodes": list(module.rollouts.episodes.ep_info_buffer),
        "masked": module.trained_with_masks,
    }


def with_run_buffers(module: torch.nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with the module's own counters and statistics: a callback may have replaced them by averages."""
    averaged = dict(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    ).keys()
    return {**weights, **{name: value for name, value in module.state_dict().items() if name not in averaged}}


def checkpoint_paths(trainer: Any) -> dict[str, str | None]:
    """The newest and the best checkpoint of a run, as :class:`ModelCheckpoint` and its like have written them."""
    latest = best = None
    for callback in [] if trainer is None else trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            if callback.monitor is not None:
                best = best or callback.best_model_path or None
            latest = callback.last_model_path or callback.best_model_path or latest
    return {"latest_checkpoint": latest, "best_checkpoint": best}
