"""What a run that goes on takes up of the one before."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info


def described(hyperparameters: Mapping[str, Any], num_envs: int) -> str:
    """What decides whether saved environments fit, as far as a file can hold it."""
    keys = ("env", "env_kwargs", "wrappers", "vectorization")
    plain = {key: hyperparameters[key] for key in keys if key in hyperparameters}
    given = {key: value for key, value in plain.items() if value not in (None, (), [], {})}
    return re.sub(" at 0x[0-9a-f]+", "", str({**given, "num_envs": num_envs}))


def own_state(states: Sequence[Mapping[str, Any]], rank: int, world_size: int, environment: str) -> Any:
    """The saved state of this process; None, with a word about it, where environments have to begin anew.

    Args:
        states: of each process of the run before.
        rank: this process.
        world_size: processes of this run.
        environment: as :func:`described`.
    """
    if len(states) != world_size:
        rank_zero_info(f"environments begin anew: {len(states)} processes were saved, and there are {world_size}")
        return None
    own = states[rank]
    if own["environment"] != environment:
        rank_zero_info(f"environments begin anew: they were {own['environment']}, and are {environment}")
        return None
    return own
