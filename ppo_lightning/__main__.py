"""``python -m ppo_lightning``: the command line."""

import gc
import os
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from types import FrameType, ModuleType

from ppo_lightning.help import OVERVIEW

COMMANDS = {
    "configs": "tools.configs",
    "enjoy": "tools.enjoy",
    "export": "tools.export",
    "push": "tools.hub",
    "report": "tools.report",
    "sweep": "tools.sweep",
}
"""Modules of commands of their own, whose ``main`` takes the rest of the words; all others are LightningCLI's."""


def run(words: list[str]) -> None:
    """Run a command.

    Args:
        words: of the command line, without the program's name.
    """
    if words[:1] in (["-h"], ["--help"]):
        print(OVERVIEW, end="")
        sys.exit(0)
    if words[:1] == ["--version"]:
        print(f"ppo-lightning {version('ppo-lightning')}")
        sys.exit(0)
    module = COMMANDS.get(words[0]) if words else None
    asks = any(word in ("-h", "--print_config") or word.startswith(("--help", "--print_config=")) for word in words)
    if words[:1] == ["fit"] and not asks and any(word.partition("=")[0] == "--seeds" for word in words):
        module = "tools.seeds"
    main = import_for_good(f"ppo_lightning.{module or 'cli'}").main
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main(words if module is None else words[1:])


def import_for_good(name: str) -> ModuleType:
    """Import a module that stays until the process ends.

    Garbage collections, meanwhile and of what was imported, would be a third of the time of ``fit --help``, and find nothing.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def main() -> None:
    """The console script; an interrupt ends it with status 130 at any time."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in a shell's background
    if interruptible:
        signal.signal(
            signal.SIGINT, _end
        )  # imports have nothing to clean up, and some libraries catch KeyboardInterrupt
    if sys.argv[1:2] and sys.argv[1] in ("enjoy", "export", "push"):  # they remove what they have begun to write
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning has shut the run down, with status 1
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, _end)  # only the interpreter's own end is left


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
