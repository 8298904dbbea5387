"""The state from which a run resumes, beside that of the module and its optimizer."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from ppo_lightning.algorithm.optimizer_step import parameters_of
from ppo_lightning.envs.streams import get_rng_state, set_rng_state
from ppo_lightning.runs.checkpoint import KEY
from ppo_lightning.runs.ranks import Ranks
from ppo_lightning.runs.rollback import Rollback


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
        self._loaded, self._refit = checkpoint[KEY]["processes"], None
        self._checkpoint = checkpoint if fits else None

    def take_checkpoint(self) -> dict[str, Any] | None:
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
        self.rollouts.saved = self._refit["rollouts"]

    def resume(self, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], ranks: Ranks) -> None:
        """Restore random state, environments and episodes of a checkpoint, or of the last fit with its optimizer."""
        states, self._loaded = self._loaded, None
        refit, self._refit = self._refit, None
        if refit is not None:
            states = [refit] * ranks.world_size  # each rank has its own
            _continue_optimizer(refit, optimizer, schedulers)
        if states is None:
            return
        self.rollouts.saved = None
        own = state_of_rank(states, ranks, self.environment)
        if own is None:
            return
        set_rng_state(own["random"], self.generator)
        self.rollouts.saved = own["rollouts"]
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
    """The saved state of this rank; None, with a message, where environments must begin new episodes.

    Args:
        states: of each rank of the run before.
        ranks: of this run.
        environment: as of :func:`env_signature`.
    """
    if len(states) != ranks.world_size:
        rank_zero_info(
            f"environments begin new episodes: {len(states)} processes were saved, and there are {ranks.world_size}"
        )
        return None
    own = states[ranks.rank]
    if own["environment"] != environment:
        rank_zero_info(f"environments begin new episodes: they were {own['environment']}, and are {environment}")
        return None
    return own


def _continue_optimizer(refit: Mapping[str, Any], optimizer: torch.optim.Optimizer, schedulers: Sequence[Any]) -> None:
    if type(optimizer) is refit["kind"]:
        carry_over(refit["optimizer"], refit["parameters"], optimizer)
    else:
        kind = type(optimizer).__name__
        rank_zero_info(f"the last fit used {refit['kind'].__name__}, this one uses {kind}: it starts without state")
    for scheduler, state in zip(schedulers, refit["schedulers"], strict=False):
        if state.keys() == scheduler.state_dict().keys():
            scheduler.load_state_dict(state)


def carry_over(saved: Mapping[str, Any], parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Copy the state of another optimizer, for the parameters that both have.

    Args:
        saved: ``state_dict`` of the other.
        parameters: of the other, in their order.
        optimizer: of the same class; parameters that the other one lacks begin without state.
    """
    places = {id(one): place for place, one in enumerate(parameters)}
    groups = optimizer.state_dict()["param_groups"]
    trained = parameters_of(optimizer)
    known = {new: places[id(one)] for new, one in enumerate(trained) if id(one) in places}
    if len(groups) == len(saved["param_groups"]):
        groups = [{**old, "params": new["params"]} for old, new in zip(saved["param_groups"], groups, strict=True)]
    state = {new: saved["state"][old] for new, old in known.items() if old in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
