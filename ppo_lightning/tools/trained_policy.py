"""What the commands on a trained policy have in common: the checkpoint that they are given, and the file that they write."""

import argparse
import tempfile
from pathlib import Path

from ppo_lightning.arguments import import_from_here
from ppo_lightning.errors import InputError
from ppo_lightning.ppo import PPO
from ppo_lightning.runs.checkpoint import located_checkpoint
from ppo_lightning.runs.hyperparameters import names_to_trust


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument, and the option to trust the file."""
    what = "path of a checkpoint, or best or last: of the newest run below this folder"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=what)
    parser.add_argument(
        "--trust", action="store_true", help="import the environment, network and functions of your own that it names"
    )


def checkpoint_path(given: argparse.Namespace) -> Path:
    """The path of the file."""
    if not given.checkpoint:
        raise InputError("the checkpoint's name is empty: give a path, or best or last")
    return located_checkpoint(given.checkpoint)


def trusted(given: argparse.Namespace, checkpoint: Path) -> dict[str, object]:
    """Hyperparameters to load the checkpoint with: those that no checkpoint may choose, where the user trusts it."""
    if not given.trust:
        return {}
    import_from_here()
    return names_to_trust(checkpoint)


def load(given: argparse.Namespace, checkpoint: Path) -> PPO:
    """The model of the checkpoint."""
    return PPO.load_from_checkpoint(checkpoint, **trusted(given, checkpoint))


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a file that cannot be written.

    Raises:
        InputError: it exists and is not to be replaced, is a folder, or lies in none that can be written to.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file")
    if path.exists() and not force:
        raise InputError(f"{path} exists: give another name, or force (--force) to replace it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"the folder {path.parent} does not exist or cannot be written to: create it") from error
