"""What a checkpoint must hold beyond weights, and how a file is refused."""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from ppo_lightning.errors import InputError

KEY = "ppo_lightning"
"""Where a checkpoint keeps what is ours."""


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
