"""Seeds of a run, and of what draws random numbers in it."""

import os
import random

import numpy as np


def resolve_seed(seed: int | None) -> int:
    """The seed of a run: the one it had before, else that of ``lightning.seed_everything``, else one that is drawn."""
    if seed is not None:
        return seed
    given = os.environ.get("PL_GLOBAL_SEED")
    return random.SystemRandom().randrange(2**31) if given is None else int(given)


def derive_seed(seed: int, purpose: str, rank: int, step: int) -> int:
    """A seed that no other purpose, rank or environment step of the run shares."""
    entropy = [seed, sum(purpose.encode()), rank, step]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def seed_of_checkpoint(saved: int | None, present: int | None) -> int | None:
    """The seed after a checkpoint was loaded: the checkpoint's, unless ``lightning.seed_everything`` gave another."""
    return present if "PL_GLOBAL_SEED" in os.environ else saved
