"""The command line in this process, quickly: what it prints, writes and refuses is the same."""

from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib.figure import Figure

from ppo_lightning import cli


def main(words: list[str], *, paints: bool = False) -> None:
    """Run ``fit``, ``validate`` or ``test`` with a parser of this command alone, and with pictures that are not painted.

    The parsers of the other commands and the pictures take half of the time of a short run.

    Args:
        words: of the command line, the command first.
        paints: the pictures are painted all the same.
    """
    known = cli.PPOCLI.subcommands()
    with pytest.MonkeyPatch.context() as patch:
        if not paints:
            patch.setattr(Figure, "savefig", save_empty)
        patch.setattr(cli.PPOCLI, "subcommands", staticmethod(lambda: {words[0]: known[words[0]]}))
        cli.main(words)


def save_empty(figure: Figure, file: Path | IO[Any], **how: Any) -> None:
    """Stands for ``Figure.savefig``: the picture is there, and empty."""
    if isinstance(file, Path):
        file.touch()
    elif how.get("format") == "svg":
        file.write("<svg></svg>")
