"""Seeds of a run and of its random generators."""

import os
import random

import numpy as np


def resolve_seed(seed: int | None) -> int:
    """The seed of a run: its previous one, else that of ``lightning.seed_everything``, else a random one."""
    if seed is not None:
        return seed
    given = os.environ.get("PL_GLOBAL_SEED")
    return random.SystemRandom().randrange(2**31) if given is None else int(given)


def derive_seed(seed: int, purpose: str, rank: int, step: int) -> int:
    """A seed that is unique to a purpose, rank and environment step of the run."""
    entropy = [seed, sum(purpose.encode()), rank, step]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def seed_of_checkpoint(saved: int | None, present: int | None) -> int | None:
    """The seed after a checkpoint was loaded: the checkpoint's, unless ``lightning.seed_everything`` gave another."""
    return present if "PL_GLOBAL_SEED" in os.environ else saved
