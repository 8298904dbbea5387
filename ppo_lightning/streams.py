"""A process's random streams as plain data."""

from typing import Any

import torch

from ppo_lightning.envs.streams import restore_shared, shared_state


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Where the random streams of this process are: ours, and those that everybody shares.

    Args:
        generator: that draws actions and shuffles samples.
    """
    return {"own": generator.get_state(), **shared_state()}


def restore_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Put the random streams where :func:`random_state` found them."""
    generator.set_state(state["own"])
    restore_shared(state)
