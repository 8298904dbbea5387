"""A process's random streams as plain data."""

import random
from typing import Any

import numpy as np
import torch

from ppo_lightning.envs.state import pack, unpack


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Where the random streams of this process are: ours, and those that everybody shares.

    Args:
        generator: that draws actions and shuffles samples.
    """
    return {
        "own": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        # Networks and environments of one's own may draw from it.
        "numpy": pack(np.random.get_state(legacy=False)),  # noqa: NPY002
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Put the random streams where :func:`random_state` found them."""
    generator.set_state(state["own"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(unpack(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
