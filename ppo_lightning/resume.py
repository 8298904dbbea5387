"""What a run that goes on takes up of the one before."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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


def carry_over(saved: Mapping[str, Any], parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state of another one, for those parameters that both have.

    Args:
        saved: ``state_dict`` of the other.
        parameters: of the other, in their order.
        optimizer: of the same class; parameters that the other one did not have begin without state.
    """
    places = {id(one): place for place, one in enumerate(parameters)}
    groups = optimizer.state_dict()["param_groups"]
    learnt = [one for group in optimizer.param_groups for one in group["params"]]
    known = {new: places[id(one)] for new, one in enumerate(learnt) if id(one) in places}
    if len(groups) == len(saved["param_groups"]):
        groups = [{**old, "params": new["params"]} for old, new in zip(saved["param_groups"], groups, strict=True)]
    state = {new: saved["state"][old] for new, old in known.items() if old in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
