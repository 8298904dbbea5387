"""What a Gymnasium space is as tensors: storage, network input, and the way in and out of nested spaces.

A sample of a basic space is one tensor; a sample of a Dict or Tuple, however nested, is a flat dictionary of tensors, one
per basic space within, by path (``"camera"``, ``"arm.0"``). :func:`tree_map` works on both. :func:`tensor_spec` dispatches on
the type of a basic space: a new kind of space is a new registration there, and a distribution where it is acted in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce, singledispatch
from operator import getitem
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import Tensor
from torch.nn.functional import one_hot

from ppo_lightning.errors import InputError

MASK = "action_mask"
"""Key of the action mask, in a Dict observation or in info."""

Array: TypeAlias = np.ndarray[Any, Any]
Tree: TypeAlias = Any
"""A tensor (or array), or a mapping of names to tensors: what a sample is, of a basic space or of a nested one."""


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Any:
    """``function`` of a tensor, or of each tensor of a mapping, with those of ``others`` in the same place."""
    if type(tree) is not Tensor and isinstance(tree, Mapping):
        return {name: function(leaf, *(other[name] for other in others)) for name, leaf in tree.items()}
    return function(tree, *others)


# --- nested spaces -----------------------------------------------------------------------------------------------------


def subspaces(space: Space[Any]) -> dict[Any, Space[Any]] | None:
    """The spaces that a Dict (by key) or Tuple (by position) is made of; None for a basic space."""
    if isinstance(space, Dict):
        return dict(space.spaces)
    if isinstance(space, Tuple):
        return dict(enumerate(space.spaces))
    return None


def flatten_spaces(space: Space[Any]) -> dict[str, Space[Any]]:
    """The basic spaces within a space, by path; a basic one itself is under the name ``""``."""
    paths = _paths(space)
    named = {_name(path): leaf for path, leaf in paths.items()}
    if len(named) < len(paths) or ("" in named and subspaces(space) is not None):
        raise InputError(f"the parts of {space} cannot be told apart by name: rename its keys (no empty ones, no dots)")
    return named


def flat_specs(space: Space[Any]) -> "dict[str, TensorSpec]":
    """How the basic spaces within a space become tensors, by path."""
    return {name: tensor_spec(leaf) for name, leaf in flatten_spaces(space).items()}


def _paths(space: Space[Any]) -> dict[tuple[Any, ...], Space[Any]]:
    inner = subspaces(space)
    if inner is None:
        return {(): space}
    if not inner:
        raise InputError(f"the space {space!r} holds nothing: correct it")
    return {(key, *path): leaf for key, child in inner.items() for path, leaf in _paths(child).items()}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def flatten_fn(space: Space[Any]) -> Callable[[Any], Tree]:
    """Function from what Gymnasium gives for a space, alone or batched, to a tree of :func:`flatten_spaces`."""
    if subspaces(space) is None:
        return _same
    return partial(_pick, paths={_name(path): path for path in _paths(space)})


def _same(sample: Any) -> Any:
    return sample


def _pick(sample: Any, paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: reduce(getitem, path, sample) for name, path in paths.items()}


def unflatten(space: Space[Any], tree: Tree, path: tuple[Any, ...] = ()) -> Any:
    """The way back from a tree: what Gymnasium takes for a space, dictionaries and tuples as deep as they were."""
    inner = subspaces(space)
    if inner is None:
        return tree[_name(path)] if path else tree
    parts = {key: unflatten(child, tree, (*path, key)) for key, child in inner.items()}
    return parts if isinstance(space, Dict) else tuple(parts.values())


def without_mask(space: Space[Any]) -> Space[Any]:
    """The observation space that a policy sees: a Dict's ``action_mask`` is for the distribution, not the network."""
    if isinstance(space, Dict) and MASK in space.spaces:
        return Dict({key: child for key, child in space.spaces.items() if key != MASK})
    return space


# --- basic spaces ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """A basic space as tensors."""

    signature: str
    """One line that two spaces share exactly when a policy for one fits the other, such as ``Box(4,) float32``."""
    shape: tuple[int, ...]
    """Of one sample as a rollout stores it."""
    dtype: torch.dtype
    """Of a stored sample."""
    feature_shape: tuple[int, ...]
    """Of one observation as a network sees it."""
    encode: Callable[[Tensor], Tensor]
    """From stored observations [B, …] to features [B, …]: numbers become float32, Discrete and MultiDiscrete one-hot.

    Images stay as they are, one byte a pixel: the network's first layer scales them, on its own device."""
    low: Any
    """Lowest values."""
    high: Any
    """Highest values."""
    action_dims: tuple[int, ...] = ()
    """Numbers of alternatives of each discrete choice in an action; a bit of MultiBinary is one between 0 and 1."""


@singledispatch
def tensor_spec(space: Space[Any]) -> TensorSpec:
    """How samples of a basic space are stored and encoded.

    Raises:
        InputError: the space is not supported.
    """
    raise InputError(
        f"the space {space!r} is not supported: PPO takes Box, Discrete, MultiDiscrete and MultiBinary spaces, and Dict or "
        "Tuple of these; convert it with a Gymnasium wrapper (FlattenObservation, FilterObservation, TransformAction, …)"
    )


UNSIGNED = {2: torch.int32, 4: torch.int64, 8: torch.float32}
"""What unsigned integers of so many bytes are stored as: torch has no arithmetic for them, and none wider than 64 bits."""


@tensor_spec.register
def _(space: Box) -> TensorSpec:
    if 0 in space.shape:
        raise InputError(f"the space {space!r} holds nothing: correct its shape")
    if np.issubdtype(space.dtype, np.floating):
        dtype = torch.float32
    elif space.dtype.kind == "u" and space.dtype.itemsize in UNSIGNED:
        dtype = UNSIGNED[space.dtype.itemsize]
    else:
        dtype = torch_dtype(space.dtype)
    encode = Tensor.float if space.shape else _column  # the tensor itself where it is float32 already
    if is_image(space):
        # Convolutions need channels-last memory: converted once per rollout, not in every minibatch.
        encode = _pixels_first if len(space.shape) == 3 and not channels_are_last(space.shape) else _same
    name = f"Box{space.shape} {space.dtype}"
    return TensorSpec(name, space.shape, dtype, space.shape or (1,), encode, space.low, space.high)


@tensor_spec.register
def _(space: Discrete) -> TensorSpec:
    n, start = int(space.n), int(space.start)
    encode = partial(_one_hot, start=start, n=n)
    return TensorSpec(f"Discrete({n})", (), torch.int64, (n,), encode, start, start + n - 1, (n,))


@tensor_spec.register
def _(space: MultiDiscrete) -> TensorSpec:
    nvec, start = (
        space.nvec.astype(np.int64),
        space.start.astype(np.int64),
    )  # sums of smaller integers would wrap around
    encode = partial(_multi_hot, start=start.flatten(), nvec=nvec.flatten())
    dims, name = tuple(nvec.flatten().tolist()), f"MultiDiscrete({nvec.tolist()})"
    return TensorSpec(name, space.shape, torch.int64, (sum(dims),), encode, start, start + nvec - 1, dims)


@tensor_spec.register
def _(space: MultiBinary) -> TensorSpec:
    dims = (2,) * int(np.prod(space.shape))
    return TensorSpec(f"MultiBinary{space.shape}", space.shape, torch.int8, space.shape, Tensor.float, 0, 1, dims)


def _column(observation: Tensor) -> Tensor:
    return observation.float().unsqueeze(-1)


def _pixels_first(observation: Tensor) -> Tensor:
    return observation.contiguous(memory_format=torch.channels_last)


def _one_hot(observation: Tensor, start: int, n: int) -> Tensor:
    return one_hot(observation - start, n).float()


def _multi_hot(observation: Tensor, start: Array, nvec: Array) -> Tensor:
    offset = np.cumsum(nvec) - nvec - start
    index = observation.flatten(1) + torch.from_numpy(offset).to(observation.device)
    # shape[0], since len() would make the batch a constant of an export
    return torch.zeros(index.shape[0], int(nvec.sum()), device=observation.device).scatter_(1, index, 1.0)


def signature(space: Space[Any]) -> str:
    """One line that two spaces, basic or nested, share exactly when a policy for one fits the other."""
    if subspaces(space) is None:
        return tensor_spec(space).signature
    parts = (f"{name}: {spec.signature}" for name, spec in flat_specs(space).items())
    return f"{{{', '.join(parts)}}}"


def action_dims(space: Space[Any]) -> tuple[int, ...]:
    """Numbers of alternatives of each discrete choice in an action; an action mask [M] is their concatenation.

    A Box has none, and a Dict or Tuple those of its parts in the order of :func:`flatten_spaces`.
    """
    return tuple(size for spec in flat_specs(space).values() for size in spec.action_dims)


def channels_are_last(image: Sequence[int]) -> bool:
    """Whether [a, b, c] is height, width, channels: pixels are as many each way, or else channels are fewest."""
    first, middle, last = image
    if (first == middle) != (middle == last):
        return first == middle
    return last <= first


def is_image(space: Space[Any]) -> bool:
    """Whether a Box is an image, or a stack of images: bytes from 0 to 255, in three or four dimensions.

    Two dimensions are a grey image where both have at least 8 pixels.
    """
    if not isinstance(space, Box) or space.dtype != np.uint8 or space.low.min() != 0 or space.high.max() != 255:
        return False
    return len(space.shape) in (3, 4) or (len(space.shape) == 2 and min(space.shape) >= 8)


def example(space: Space[Any]) -> Array:
    """A sample of a basic space, to try a network on."""
    spec = tensor_spec(space)
    return np.broadcast_to(0 if isinstance(space, Box) else spec.low, spec.shape).astype(numpy_dtype(spec.dtype))


# --- samples -----------------------------------------------------------------------------------------------------------


@cache
def torch_dtype(dtype: Any) -> torch.dtype:
    """What torch calls a dtype of NumPy."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


@cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What NumPy calls a dtype of torch."""
    return torch.empty(0, dtype=dtype).numpy().dtype


def empty(space: Space[Any], *batch: int, device: torch.device | None = None) -> Tensor:
    """Storage for samples [*batch, …] of a basic space; images are channels-last in memory, as convolutions need."""
    spec = tensor_spec(space)
    if is_image(space) and len(spec.shape) == 3 and not channels_are_last(spec.shape):
        channels, *pixels = spec.shape
        return torch.empty(*batch, *pixels, channels, dtype=spec.dtype, device=device).movedim(-1, -3)
    return torch.empty(*batch, *spec.shape, dtype=spec.dtype, device=device)


def split_sizes(samples: int, pieces: int) -> list[int]:
    """Sizes of ``pieces`` nearly equal parts."""
    return [samples // pieces + (piece < samples % pieces) for piece in range(pieces)]


def index_rows(leaf: Tensor, order: Tensor) -> Tensor:
    """Samples [B, …] at the indices ``order``: several times as fast for images as indexing, in the same layout."""
    if leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last):
        return leaf.permute(0, 2, 3, 1).index_select(0, order).permute(0, 3, 1, 2)
    return leaf.index_select(0, order)


def to_tensor(given: Any, dtype: torch.dtype) -> Tensor:
    """An array as a tensor of this dtype, whatever dtype of NumPy's it has; the array's own memory where it fits."""
    array, wanted = np.asarray(given), numpy_dtype(dtype)
    if min(array.strides, default=0) < 0:  # a flipped view, which torch does not take
        array = array.copy()
    if array.dtype != wanted:
        with np.errstate(over="ignore"):  # what becomes infinite is refused where observations are checked
            array = array.astype(wanted)
    return torch.from_numpy(array)


def wrong_values(space: Space[Any], samples: Array) -> str | None:
    """What is wrong with samples of a basic space that cannot be of it; None where nothing is.

    Floats may lie outside of the bounds of their space: rollouts take such observations, too, with a warning.
    """
    if samples.dtype.kind not in "biuf":
        return f"what is no number ({samples.dtype})"
    if space.dtype is not None and np.issubdtype(space.dtype, np.floating):
        finite = np.abs(samples) <= np.finfo(np.float32).max if samples.dtype.kind == "f" else np.True_
        return None if finite.all() else f"{samples[~finite].flat[0]}, which is not finite in float32"
    spec = tensor_spec(space)
    whole = samples == np.rint(samples) if samples.dtype.kind == "f" else np.True_
    if not whole.all():
        return f"{samples[~whole].flat[0]}, which is no whole number"
    outside = (samples < spec.low) | (samples > spec.high)
    if not outside.any():
        return None
    value, low, high = (part[outside].flat[0] for part in np.broadcast_arrays(samples, spec.low, spec.high))
    return f"{value}, which lies outside of {low} to {high}"


# --- masks over discrete actions ---------------------------------------------------------------------------------------


def flatten_mask(mask: Any, action_space: Space[Any]) -> Array:
    """A batch of masks as one array [N, M]: concatenated as it is, or in the parts of a Dict or Tuple action space.

    Its values are those that were given: :func:`mask_flags` says whether they are a mask's.
    """
    try:
        if isinstance(mask, Mapping) or is_nested_mask(mask, action_space):
            sizes = _mask_sizes(action_space)
            parts = _pick(mask, {name: path for name, (path, _) in sizes.items()})
            flat = {name: _rows(part, sizes[name][1]) for name, part in parts.items()}
            if any(part.shape[1] != sizes[name][1] for name, part in flat.items()):
                raise ValueError({name: part.shape[1] for name, part in flat.items()})
            return _concatenated(list(flat.values()), 1)
        array = np.asarray(mask)
        if array.dtype == object:  # environments gave lists or tuples
            array = _concatenated([_flat_one(one, action_space)[None] for one in array], 0)
        return array
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"the {MASK} does not have the parts of the action space {signature(action_space)} ({error}): give one array of "
            f"{sum(action_dims(action_space))}, or the parts of a Dict or Tuple, an array each"
        ) from error


def flatten_mask_tensors(mask: Any, action_space: Space[Any], count: int) -> Tensor:
    """A batch of masks as one tensor [B, M] bool: concatenated already, or in the parts of a Dict or Tuple action space.

    Args:
        mask: tensors of bools or integers.
        action_space: of the policy.
        count: B.

    Raises:
        InputError: it is something else.
    """
    if isinstance(mask, Mapping) or is_nested_mask(mask, action_space):
        paths = {name: path for name, (path, _) in _mask_sizes(action_space).items()}
        try:
            parts = list(_pick(mask, paths).values())
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"forward needs an {MASK} with the parts {list(paths)}, got one without {error}"
            ) from error
    else:
        parts = [mask]
    for part in parts:
        if not isinstance(part, Tensor) or part.is_floating_point() or part.ndim < 2 or len(part) != count:
            given = f"{tuple(part.shape)} of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise InputError(
                f"forward needs an {MASK} of tensors with {count} rows of bools or integers, got {given} (what is added to "
                "logits, 0 and -inf, is no mask)"
            )
    flat = torch.cat([part.flatten(1).bool() for part in parts], -1)
    check_mask_length(flat.shape[1], action_space)
    return flat


def is_nested_mask(mask: Any, action_space: Space[Any]) -> bool:
    """Whether a tuple is the parts of a Tuple action space; else it is the choices of a basic one."""
    return isinstance(mask, tuple) and subspaces(action_space) is not None


def _rows(part: Any, size: int) -> Array:
    """The masks [N, size] of one part of a Dict or Tuple, which environments may have given as lists."""
    array = np.asarray(part)
    if array.dtype == object:
        rows = [np.ones(size, dtype=bool) if one is None else np.asarray(one).flatten() for one in array]
        array = _concatenated([row[None] for row in rows], 0)
    return array.reshape(len(array), -1)


def _mask_sizes(action_space: Space[Any]) -> dict[str, tuple[tuple[Any, ...], int]]:
    """The parts of an action space that have masks, by name: path, and entries of the mask."""
    sizes = {path: sum(tensor_spec(leaf).action_dims) for path, leaf in _paths(action_space).items()}
    return {_name(path): (path, size) for path, size in sizes.items() if size}


def _flat_one(mask: Any, action_space: Space[Any]) -> Array:
    """The mask of one environment, from nested or plain lists."""
    if mask is None:
        return np.ones(sum(action_dims(action_space)), dtype=bool)
    if is_nested_mask(mask, action_space):
        paths = {name: path for name, (path, _) in _mask_sizes(action_space).items()}
        parts = list(_pick(mask, paths).values())
    else:
        parts = list(np.atleast_1d(np.asarray(mask, object)))
    return _concatenated([np.asarray(part).flatten() for part in parts], 0)


def _concatenated(parts: list[Array], axis: int) -> Array:
    """Arrays as one; of objects where they are not all of numbers, so that each value stays what it is."""
    if any(part.dtype.kind not in "biuf" for part in parts):
        parts = [part.astype(object) for part in parts]
    return np.concatenate(parts, axis)


def mask_flags(mask: Array) -> tuple[Array, Array | None]:
    """A mask [N, M] as bools, and [N, M] bool where it holds neither 0 nor 1; None where it holds nothing else."""
    if mask.dtype == bool:
        return mask, None
    if mask.dtype.kind in "iuf":
        wrong = (mask != 0) & (mask != 1)
    else:
        each = [not isinstance(one, int | float | np.number | np.bool_) or one not in (0, 1) for one in mask.flat]
        wrong = np.array(each, dtype=bool).reshape(mask.shape)
    return mask == 1, wrong if wrong.any() else None


def mask_error(mask: Array, wrong: Array) -> str:
    """What to say of a mask [N, M] that holds something else than 0 and 1, at ``wrong`` [N, M]."""
    value = mask[wrong].flat[0]
    return (
        f"{value!r} for action {int(np.argwhere(wrong)[0][1])}: a mask has 1 or True where an action is allowed, 0 or False "
        "where it is not (what is added to logits, 0 and -inf, is no mask)"
    )


def check_mask(observation_space: Space[Any], action_space: Space[Any]) -> None:
    """Refuse an ``action_mask`` in the observation that does not fit the action space.

    Raises:
        InputError: it says how long the mask is, and how long it must be.
    """
    deeper = [path for path in _paths(observation_space) if MASK in path[1:]]
    if deeper:
        raise InputError(
            f"the observation has an {MASK} within {deeper[0][0]!r}, where it would be taken for something to see: put it "
            "at the top of the Dict, or into info"
        )
    if not isinstance(observation_space, Dict) or MASK not in observation_space.spaces:
        return
    given = {name: int(np.prod(leaf.shape or ())) for name, leaf in flatten_spaces(observation_space[MASK]).items()}
    if len(observation_space.spaces) == 1:
        raise InputError(f"the observation is nothing but {MASK}: add what the policy is to see")
    check_mask_length(sum(given.values()), action_space)
    wanted = {name: size for name, (_, size) in _mask_sizes(action_space).items()}
    if "" not in given and given != wanted:
        raise InputError(
            f"the environment's {MASK} has the parts {given}, the action space needs {wanted}: correct the mask"
        )


def check_mask_length(length: int, action_space: Space[Any]) -> None:
    """Raise where a mask has not one entry for each alternative of each choice."""
    wanted = sum(action_dims(action_space))
    if length != wanted:
        needs = f"{wanted} (alternatives of its choices: {list(action_dims(action_space))})" if wanted else "none"
        raise InputError(
            f"the environment's {MASK} has {length} entries, the action space {signature(action_space)} needs {needs}: "
            "correct the mask (MultiDiscrete: concatenated; MultiBinary: two per bit; a Box has no mask)"
        )
