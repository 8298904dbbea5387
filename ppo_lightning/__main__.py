"""``python -m ppo_lightning``: ``report`` and ``sweep`` have doors of their own, all else is LightningCLI's (cli.py)."""

import sys
from importlib import import_module

DOORS = ("report", "sweep")
"""Modules whose ``main`` takes the rest of the words."""


def main() -> None:
    """The console script."""
    words = sys.argv[1:]
    door = words.pop(0) if words and words[0] in DOORS else "cli"
    import_module(f"ppo_lightning.{door}").main(words)


if __name__ == "__main__":
    main()
