"""``python -m ppo_lightning``: see cli.py."""

from ppo_lightning.cli import main

if __name__ == "__main__":
    main()
