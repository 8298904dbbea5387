"""Acting outside of training: NumPy or tensors in and out, in the environment's units."""

from typing import Any

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from ppo_lightning.errors import InputError
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import (
    MASK,
    TensorSpec,
    Tree,
    action_dims,
    check_mask_length,
    flat_specs,
    flatten_fn,
    flatten_mask,
    flatten_mask_tensors,
    flatten_spaces,
    is_nested_mask,
    mask_error,
    mask_flags,
    to_tensor,
    tree_map,
    without_mask,
    wrong_values,
)


def act(
    policy: Policy, observation: Tree, state: Tensor | None, mask: Tensor | None, noise: Tensor | None
) -> tuple[Tree, Tensor | None]:
    """Actions as the environment takes them, and the recurrent state after them: what exported policies compute.

    Args:
        policy: that acts.
        observation: [B, …] as rollouts store it; of a Dict or Tuple its parts, by path.
        state: [B, S] of a recurrent policy; rows of zeros are starts of episodes.
        mask: [B, M] bool, what is allowed; None is everything.
        noise: [B, Z] that draws the actions; None takes the most probable ones.

    Returns:
        Actions [B, …], of a Dict or Tuple by path; state [B, S], None where the policy is not recurrent.
    """
    start = None if state is None else (state == 0).all(-1)
    step = policy.act(observation, noise, mask, state, start)
    return policy.distribution.to_env_action(step.action), step.state


def act_on_tensors(
    policy: Policy,
    observation_space: Space[Any],
    action_space: Space[Any],
    observation: Any,
    state: Tensor | None,
    action_mask: Any,
    noise: Tensor | None,
) -> Any:
    """Actions for tensors that are nested as the spaces are (see :meth:`PPO.forward`)."""
    space = without_mask(observation_space)
    try:
        tree = flatten_fn(space)(observation)
        specs: Any = flat_specs(space)
        rows = tree_map(_stored, tree, specs.get("", specs))
        if space is not observation_space:
            action_mask = observation[MASK]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        given = type(observation).__name__
        what = f" without {error}" if isinstance(error, KeyError) else ""
        raise InputError(f"forward needs tensors of {observation_space}, batched, got {given}{what}") from error
    count, device = len(next(iter(rows.values())) if isinstance(rows, dict) else rows), policy_device(policy)
    mask = None if action_mask is None else flatten_mask_tensors(action_mask, action_space, count)
    if noise is not None and noise.shape != (count, policy.distribution.num_noise):
        needed = (count, policy.distribution.num_noise)
        raise InputError(f"forward needs noise of {needed}, got {tuple(noise.shape)}: take policy.distribution.noise")
    if policy.state_size and state is None:
        state = torch.zeros(count, policy.state_size, device=device)
    elif state is not None and not policy.state_size:
        raise InputError("forward was given a state, this policy is not recurrent: leave it out")
    if state is not None and state.shape != (count, policy.state_size):
        needed = (count, policy.state_size)
        raise InputError(f"forward needs a state of {needed}, got {tuple(state.shape)}: pass on what it returned")
    action, state = act(policy, rows, state, mask, noise)
    action = policy.distribution.unflatten(action)
    return action if state is None else (action, state)


def _stored(leaf: Tensor, spec: TensorSpec) -> Tensor:
    if leaf.shape[1:] != spec.shape:
        raise InputError(f"forward needs a batch of observations {('B', *spec.shape)}, got {tuple(leaf.shape)}")
    return leaf.to(spec.dtype)


def policy_device(policy: Policy) -> torch.device:
    """Of its parameters."""
    return next(policy.parameters()).device


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
    device = policy_device(policy)
    space = without_mask(observation_space)
    rows, single = observations(observation, space, device)
    count = len(next(iter(rows.values())) if isinstance(rows, dict) else rows)
    if space is not observation_space:
        if MASK not in observation:
            raise InputError(f"predict needs observations of {observation_space}, got one without {MASK}")
        action_mask = observation[MASK]
    mask = None if action_mask is None else masks(action_mask, action_space, count, single, device)
    recurrent_state = noise = None
    if policy.state_size:
        recurrent_state = recurrent_states(state, count, policy.state_size, device)
    elif state is not None:
        raise InputError("predict was given a state, this policy is not recurrent: leave it out")
    if not deterministic:
        noise = policy.distribution.noise(count, generator=torch.default_generator).to(device)
    action, recurrent_state = act(policy, rows, recurrent_state, mask, noise)

    def out(leaf: Tensor) -> np.ndarray:
        return leaf.cpu().numpy()[0] if single else leaf.cpu().numpy()

    action = policy.distribution.unflatten(tree_map(out, action))
    return action if recurrent_state is None else (action, out(recurrent_state))


def observations(observation: Any, space: Space[Any], device: torch.device) -> tuple[Tree, bool]:
    """Observations as a batch of tensors, and whether it was a single one.

    Raises:
        InputError: they are not of the space.
    """
    spaces, specs = flatten_spaces(space), flat_specs(space)
    try:
        tree = flatten_fn(space)(observation)
        arrays = {name: np.asarray(tree[name] if name else tree) for name in spaces}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:  # the last of tensors with gradients
        raise InputError(f"predict needs observations of {space}, got {observation!r}") from error
    counts: set[int | None] = set()
    for name, leaf in spaces.items():
        shape, array = specs[name].shape, arrays[name]
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
    tensors = {name: to_tensor(array, specs[name].dtype).to(device) for name, array in arrays.items()}
    return tensors.get("", tensors), single


def masks(given: Any, action_space: Space[Any], count: int, single: bool, device: torch.device) -> Tensor:
    """Masks as rows [B, M] bool.

    Raises:
        InputError: they do not fit the action space, or allow nothing.
    """
    if not count:
        return torch.ones(0, sum(action_dims(action_space)), dtype=torch.bool, device=device)
    flat = flatten_mask(_batch_of_one(given, action_space) if single else given, action_space)
    values = flat.reshape(1, -1) if count == 1 else flat
    if len(np.atleast_1d(values)) != count:
        raise InputError(f"predict needs an {MASK} for each of {count} observations, got {flat.shape}")
    values = values.reshape(count, -1)
    check_mask_length(values.shape[1], action_space)
    mask, wrong = mask_flags(values)
    if wrong is not None:
        raise InputError(f"the {MASK} given to predict has {mask_error(values, wrong)}")
    begin = 0
    for size in action_dims(action_space):
        if not mask[:, begin : begin + size].any(1).all():
            raise InputError(f"the {MASK} given to predict allows no action: {given!r}")
        begin += size
    return torch.from_numpy(mask).to(device)


def _batch_of_one(masks: Any, space: Space[Any]) -> Any:
    if isinstance(masks, dict):
        return {key: _batch_of_one(part, space) for key, part in masks.items()}
    if is_nested_mask(masks, space):
        return tuple(_batch_of_one(part, space) for part in masks)
    try:
        return np.asarray(masks)[None]
    except ValueError:  # lists of several lengths, one for each choice
        one = np.empty(1, dtype=object)
        one[0] = masks
        return one


def recurrent_states(state: Any, count: int, size: int, device: torch.device) -> Tensor:
    """States as rows [B, S]; zeros for None.

    Raises:
        InputError: they are of another shape, or not finite.
    """
    if state is None:
        return torch.zeros(count, size, device=device)
    try:
        array = np.array(state, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"predict needs a state of {(count, size)}, got {state!r}: pass on what it returned"
        ) from error
    if array.shape != (count, size) and not (count == 1 and array.shape == (size,)):
        raise InputError(f"predict needs a state of {(count, size)}, got {array.shape}: pass on what it returned")
    if not np.isfinite(array).all():
        raise InputError("predict needs a state of finite numbers: pass on what it returned")
    return torch.from_numpy(array).view(count, size).to(device)
