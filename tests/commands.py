"""Commands in this process, quickly."""

from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure


def save_empty(figure: Figure, file: Path | IO[Any], **how: Any) -> None:
    """Stands for ``Figure.savefig``, which takes a third of the time of a short command: the picture is there, and empty."""
    if isinstance(file, Path):
        file.touch()
    elif how.get("format") == "svg":
        file.write("<svg></svg>")
