"""What a Gymnasium space is as tensors: storage, network input, network output, and the way back.

Every function dispatches on the type of the space, so that a new space is a new registration here and nowhere else.
"""

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.nn.functional import one_hot

from ppo_lightning.errors import InputError

SUPPORTED = "Box and Discrete"


def _unsupported(space: Space[Any]) -> InputError:
    return InputError(
        f"the space {space!r} is not supported: PPO takes {SUPPORTED} spaces; convert it with a Gymnasium wrapper "
        "(FlattenObservation, TransformAction, …)"
    )


@singledispatch
def describe(space: Space[Any]) -> str:
    """One line that two spaces share exactly when a policy for one fits the other, such as ``Box(4,) float32``."""
    raise _unsupported(space)


@describe.register
def _(space: Box) -> str:
    if 0 in space.shape:
        raise InputError(f"the space {space!r} holds nothing: correct its shape")
    return f"Box{space.shape} {space.dtype}"


@describe.register
def _(space: Discrete) -> str:
    return f"Discrete({space.n})"


@singledispatch
def storage(space: Space[Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one sample as a rollout keeps it. Floats are kept as float32, integers as they are."""
    raise _unsupported(space)


@storage.register
def _(space: Box) -> tuple[tuple[int, ...], torch.dtype]:
    if np.issubdtype(space.dtype, np.floating):
        return space.shape, torch.float32
    return space.shape, torch.from_numpy(np.empty(0, space.dtype)).dtype


@storage.register
def _(space: Discrete) -> tuple[tuple[int, ...], torch.dtype]:
    return (), torch.int64


@singledispatch
def feature_shape(space: Space[Any]) -> tuple[int, ...]:
    """Shape of one observation as a network sees it, after :func:`encoder`."""
    raise _unsupported(space)


@feature_shape.register
def _(space: Box) -> tuple[int, ...]:
    return space.shape


@feature_shape.register
def _(space: Discrete) -> tuple[int, ...]:
    return (int(space.n),)


@singledispatch
def encoder(space: Space[Any]) -> Callable[[Tensor], Tensor]:
    """Function from stored observations [B, …] to float32 features [B, …] of ``feature_shape``; Discrete becomes one-hot."""
    raise _unsupported(space)


@encoder.register
def _(space: Box) -> Callable[[Tensor], Tensor]:
    return Tensor.float  # the tensor itself where it is float32 already


@encoder.register
def _(space: Discrete) -> Callable[[Tensor], Tensor]:
    return partial(_one_hot, start=int(space.start), n=int(space.n))


def _one_hot(observation: Tensor, start: int, n: int) -> Tensor:
    return one_hot(observation - start, n).float()


@singledispatch
def num_action_parameters(space: Space[Any]) -> int:
    """Number of outputs P with which a network describes a distribution over the space (see policy/distributions.py)."""
    raise _unsupported(space)


@num_action_parameters.register
def _(space: Box) -> int:
    return 2 * int(np.prod(space.shape))  # mean and log standard deviation


@num_action_parameters.register
def _(space: Discrete) -> int:
    return int(space.n)  # logits


@singledispatch
def action_decoder(space: Space[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Function from stored actions [N, …] to what the environment is given: Box is clipped to its bounds."""
    raise _unsupported(space)


@action_decoder.register
def _(space: Box) -> Callable[[np.ndarray], np.ndarray]:
    if not np.issubdtype(space.dtype, np.floating):
        raise InputError(
            f"the action space {space!r} has integer bounds: make it Discrete, or a Box of floats that the environment rounds"
        )
    return partial(_clip, low=space.low, high=space.high)


def _clip(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.clip(action, low, high).astype(low.dtype, copy=False)


@action_decoder.register
def _(space: Discrete) -> Callable[[np.ndarray], np.ndarray]:
    return partial(np.add, space.start)
