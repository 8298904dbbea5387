"""Acting outside of training: numpy in, numpy out, one observation or many."""

from typing import Any

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from ppo_lightning.errors import InputError
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import (
    MASK,
    Tree,
    action_dims,
    check_mask_length,
    flatten_fn,
    flatten_mask,
    flatten_spaces,
    mask_error,
    mask_flags,
    tensor_spec,
    to_tensors_fn,
    tree_map,
    without_mask,
    wrong_values,
)


@torch.no_grad()
def predict(
    policy: Policy,
    observation_space: Space[Any],
    action_space: Space[Any],
    observation: Any,
    *,
    deterministic: bool,
    state: Any,
    action_mask: Any,
) -> Any:
    """Actions for observations, and the state of a recurrent policy (see :meth:`PPO.predict`)."""
    device = next(policy.parameters()).device
    space = without_mask(observation_space)
    rows, single = observations(observation, space, device)
    count = len(next(iter(rows.values())) if isinstance(rows, dict) else rows)
    if space is not observation_space:
        if MASK not in observation:
            raise InputError(f"predict needs observations of {observation_space}, got one without {MASK}")
        action_mask = observation[MASK]
    mask = None if action_mask is None else masks(action_mask, action_space, count, single, device)
    recurrent_state = start = None
    if policy.state_size:
        recurrent_state = recurrent_states(state, count, policy.state_size, device)
        start = torch.full((count,), state is None, device=device)
    elif state is not None:
        raise InputError("predict was given a state, this policy is not recurrent: leave it out")
    noise = None
    if not deterministic:
        noise = policy.distribution.noise(count, generator=torch.default_generator).to(device)
    step = policy.act(rows, noise, mask, recurrent_state, start)

    def out(leaf: Tensor) -> np.ndarray:
        return leaf.cpu().numpy()[0] if single else leaf.cpu().numpy()

    distribution = policy.distribution
    action = distribution.unflatten(tree_map(out, distribution.to_env_action(step.action)))
    return action if step.state is None else (action, out(step.state))


def observations(observation: Any, space: Space[Any], device: torch.device) -> tuple[Tree, bool]:
    """Observations as a batch of tensors, and whether it was a single one.

    Raises:
        InputError: they are not of the space.
    """
    spaces = flatten_spaces(space)
    try:
        tree = flatten_fn(space)(observation)
        arrays = {name: np.asarray(tree[name] if name else tree) for name in spaces}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:  # the last of tensors with gradients
        raise InputError(f"predict needs observations of {space}, got {observation!r}") from error
    counts: set[int | None] = set()
    for name, leaf in spaces.items():
        shape, array = tensor_spec(leaf).shape, arrays[name]
        if array.shape != shape and array.shape[1:] != shape:
            raise InputError(
                f"predict needs an observation of shape {shape} or a batch of them, got {array.shape}"
                + (f" for {name}" if name else "")
            )
        wrong = wrong_values(leaf, array)
        if wrong is not None:
            raise InputError(
                f"predict needs observations of {leaf}, got {wrong}{name and f' for {name}'}: give them as the environment "
                "does, neither scaled nor normalised"
            )
        counts.add(None if array.shape == shape else len(array))
    if len(counts) > 1:
        raise InputError(f"predict needs as many of each part of an observation, got {observation!r}")
    single = counts == {None}
    arrays = {name: (array[None] if single else array).copy() for name, array in arrays.items()}
    return to_tensors_fn(space, device)(arrays.get("", arrays)), single


def masks(given: Any, action_space: Space[Any], count: int, single: bool, device: torch.device) -> Tensor:
    """Masks as rows [B, M] bool.

    Raises:
        InputError: they do not fit the action space, or allow nothing.
    """
    flat = flatten_mask(_batch_of_one(given) if single else given, action_space)
    length, rest = divmod(flat.size, count)
    if rest:
        raise InputError(f"predict needs an {MASK} for each of {count} observations, got {flat.shape}")
    check_mask_length(length, action_space)
    values = flat.reshape(count, -1)
    mask, wrong = mask_flags(values)
    if wrong is not None:
        raise InputError(f"the {MASK} given to predict has {mask_error(values, wrong)}")
    begin = 0
    for size in action_dims(action_space):
        if not mask[:, begin : begin + size].any(1).all():
            raise InputError(f"the {MASK} given to predict allows no action: {given!r}")
        begin += size
    return torch.from_numpy(mask).to(device)


def _batch_of_one(masks: Any) -> Any:
    if isinstance(masks, dict):
        return {key: _batch_of_one(part) for key, part in masks.items()}
    if isinstance(masks, tuple):
        return tuple(map(_batch_of_one, masks))
    try:
        return np.asarray(masks)[None]
    except ValueError:  # lists of several lengths, one for each choice
        one = np.empty(1, dtype=object)
        one[0] = masks
        return one


def recurrent_states(state: Any, count: int, size: int, device: torch.device) -> Tensor:
    """States as rows [B, S]; zeros for None.

    Raises:
        InputError: they are of another size.
    """
    if state is None:
        return torch.zeros(count, size, device=device)
    array = np.array(state, dtype=np.float32)
    if array.size != count * size:
        raise InputError(f"predict needs a state of {(count, size)}, got {array.shape}: pass on what it returned")
    return torch.from_numpy(array).view(count, size).to(device)
