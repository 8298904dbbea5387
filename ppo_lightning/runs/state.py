"""State of a run beside its module: seeds, the state to resume from, and the state before an update."""

import copy
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ppo_lightning.algorithm.optimizer_step import parameters_of
from ppo_lightning.envs.state import as_arrays
from ppo_lightning.envs.streams import get_rng_state, set_rng_state
from ppo_lightning.runs.checkpoint import CHECKPOINT_KEY
from ppo_lightning.runs.optimizer import continue_optimizer
from ppo_lightning.runs.ranks import Ranks


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


class Rollback:
    """Copies of tensors, restored where an update does not finish."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._slots: list[tuple[Tensor, str]] = []
        """Parameter and name of each tensor of the optimizer's state, whose copies are the last."""
        self._saved = False

    @torch.no_grad()
    def save(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Copy tensors, and those of the optimizer's state."""
        self._slots = _slots(optimizer)
        found = [*tensors, *_at(optimizer, self._slots)]
        if [id(one) for one in found] != [id(one) for one in self._tensors]:
            self._copies = [torch.empty_like(one) for one in found]
        torch._foreach_copy_(self._copies, found)  # pyright: ignore[reportPrivateImportUsage]
        self._tensors, self._optimizer, self._saved = found, optimizer, True

    def discard(self) -> None:
        """Drop the copies: the update has ended."""
        self._saved = False

    @torch.no_grad()
    def rollback(self) -> None:
        """Restore the tensors, unless :meth:`discard` was called since."""
        if not self._saved:
            return
        if self._optimizer is not None:
            had_state = {parameter for parameter, _ in self._slots}
            for parameter in [one for one in self._optimizer.state if one not in had_state]:
                del self._optimizer.state[parameter]  # it had taken no step
        # The state's tensors may have been replaced: a compiled update lays them out flat.
        own = len(self._tensors) - len(self._slots)
        tensors = [*self._tensors[:own], *_at(self._optimizer, self._slots)]
        torch._foreach_copy_(tensors, self._copies)  # pyright: ignore[reportPrivateImportUsage]
        self._saved = False


def _slots(optimizer: torch.optim.Optimizer | None) -> list[tuple[Tensor, str]]:
    states = [] if optimizer is None else optimizer.state.items()
    return [(parameter, name) for parameter, state in states for name, one in state.items() if isinstance(one, Tensor)]


def _at(optimizer: torch.optim.Optimizer | None, slots: list[tuple[Tensor, str]]) -> list[Tensor]:
    return [] if optimizer is None else [optimizer.state[parameter][name] for parameter, name in slots]


class RunState:
    """State of environments, episodes and random generators of each rank, and of the optimizer between two fits.

    Args:
        rollouts: whose environments and episodes it holds.
        generator: samples actions and shuffles.
        environment: decides whether saved environments fit (:func:`env_signature`).
        name: of the environment, in messages.
    """

    def __init__(self, rollouts: Any, generator: torch.Generator, environment: str, name: str) -> None:
        self.rollouts, self.generator, self.environment, self.name = rollouts, generator, environment, name
        self.rollback = Rollback()
        self._loaded: list[dict[str, Any]] | None = None
        """State of each rank of a checkpoint, until training starts."""
        self._refit: dict[str, Any] | None = None
        """State of the optimizer and of this rank after the last fit."""
        self._checkpoint: dict[str, Any] | None = None
        """The checkpoint that a fit resumes, until the optimizer exists."""
        self._local_rank_only = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "generator": None}  # the module sets its own again

    def of_this_rank(self) -> dict[str, Any]:
        """The state that this rank's next rollout depends on, as plain data."""
        return {
            "environment": self.environment,
            "random": get_rng_state(self.generator),
            "rollouts": self.rollouts.state(),
        }

    def of_all_ranks(self, ranks: Ranks) -> list[dict[str, Any]]:
        """The same of each rank; collective, but within :meth:`local_rank_only`."""
        own = self.of_this_rank()
        return [own] if self._local_rank_only else ranks.gather_objects(own)

    @contextmanager
    def local_rank_only(self) -> Iterator[None]:
        """Save the state of this rank alone, where other ranks may not answer."""
        self._local_rank_only = True
        try:
            yield
        finally:
            self._local_rank_only = False

    def load(self, checkpoint: dict[str, Any], *, fits: bool) -> None:
        """Keep the states of a checkpoint for the next fit, or all of it where a fit is resuming (``fits``)."""
        self._loaded, self._refit = as_arrays(checkpoint[CHECKPOINT_KEY]["processes"]), None
        self._checkpoint = checkpoint if fits else None

    def pop_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint that this fit resumes, once."""
        checkpoint, self._checkpoint = self._checkpoint, None
        return checkpoint

    def save_for_refit(self, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], ranks: Ranks) -> None:
        """Save the state from which another fit of this model continues."""
        loaded, self._loaded = self._loaded, None  # it is set where training has not started
        started = loaded is None or len(loaded) != ranks.world_size
        self._refit = {
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "parameters": parameters_of(optimizer),
            "kind": type(optimizer),
            "schedulers": [scheduler.state_dict() for scheduler in schedulers],
            **(self.of_this_rank() if started or loaded is None else loaded[ranks.rank]),
        }
        self.rollouts.resume_state = self._refit["rollouts"]

    def resume(self, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], ranks: Ranks) -> None:
        """Restore random state, environments and episodes of a checkpoint, or of the last fit with its optimizer."""
        states, self._loaded = self._loaded, None
        refit, self._refit = self._refit, None
        if refit is not None:
            states = [refit] * ranks.world_size  # each rank has its own
            continue_optimizer(refit, optimizer, schedulers)
        if states is None:
            return
        self.rollouts.resume_state = None
        own = state_of_rank(states, ranks, self.environment)
        if own is None:
            return
        set_rng_state(own["random"], self.generator)
        self.rollouts.resume_state = own["rollouts"]
        if own["rollouts"] is None:
            rank_zero_info(
                f"environments begin new episodes: {self.name} has no get_state and set_state, or was saved within a rollout"
            )


def env_signature(hyperparameters: Mapping[str, Any], num_envs: int) -> str:
    """Decides whether saved environments fit, as far as a file can hold it."""
    keys = ("env", "env_kwargs", "wrappers", "vectorization")
    plain = {key: hyperparameters[key] for key in keys if key in hyperparameters}
    given = {key: value for key, value in plain.items() if value not in (None, (), [], {})}
    return re.sub(" at 0x[0-9a-f]+", "", str({**given, "num_envs": num_envs}))


def state_of_rank(states: Sequence[Mapping[str, Any]], ranks: Ranks, environment: str) -> Any:
    """The saved state of this rank; None, with a message, where environments must begin new episodes."""
    if len(states) != ranks.world_size:
        rank_zero_info(
            f"environments begin new episodes: {len(states)} ranks were saved, and there are {ranks.world_size}"
        )
        return None
    own = states[ranks.rank]
    if own["environment"] != environment:
        rank_zero_info(f"environments begin new episodes: they were {own['environment']}, and are {environment}")
        return None
    return own
