"""The shared random generators of a process: ``random``, ``numpy.random`` and torch's defaults.

A user's environments and networks may use them.
"""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ppo_lightning.envs.state import deserialize, serialize


def seed_shared(*entropy: int) -> None:
    """Seed the shared generators of this process, each differently, from non-negative integers."""
    for_python, for_numpy, for_torch = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(for_python))
    np.random.seed(int(for_numpy))  # noqa: NPY002 - the shared one is meant
    torch.default_generator.manual_seed(int(for_torch))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(for_torch))


def shared_state() -> dict[str, Any]:
    """State of the shared generators, as plain data."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": serialize(np.random.get_state(legacy=False)),  # noqa: NPY002
        "python": random.getstate(),
    }


def restore_shared(state: dict[str, Any]) -> None:
    """Restore the state of :func:`shared_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(deserialize(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])


def get_rng_state(generator: torch.Generator) -> dict[str, Any]:
    """State of a generator and of the shared generators of this process, as plain data."""
    return {"own": generator.get_state(), **shared_state()}


def set_rng_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Restore what :func:`get_rng_state` returned."""
    generator.set_state(state["own"])
    restore_shared(state)


@contextmanager
def temporarily_seeded(*entropy: int) -> Iterator[None]:
    """Seed the shared generators within the context, and restore them afterwards."""
    before = shared_state()
    seed_shared(*entropy)
    try:
        yield
    finally:
        restore_shared(before)


def changed_rng_state(*entropy: int) -> dict[str, Any]:
    """States of the shared generators used since :func:`seed_shared`, as plain data that can be pickled."""
    now = _plain()
    with temporarily_seeded(*entropy):
        fresh = _plain()
    return {name: state for name, state in now.items() if pickle.dumps(state) != pickle.dumps(fresh[name])}


def restore_changed_rng_state(state: dict[str, Any], *entropy: int) -> None:
    """Seed the shared generators, and restore the states of :func:`changed_rng_state`."""
    seed_shared(*entropy)
    state = {**_plain(), **state}
    restore_shared({**state, "torch": torch.from_numpy(deserialize(state["torch"])), "cuda": None})


def _plain() -> dict[str, Any]:
    state = shared_state()
    return {"torch": serialize(state["torch"].numpy()), "numpy": state["numpy"], "python": state["python"]}
