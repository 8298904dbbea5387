"""What a Gymnasium space is as tensors: storage, network input, and the way in and out of nested spaces.

A sample of a basic space is one tensor; a sample of a Dict or Tuple, however nested, is a flat dictionary of tensors, one
per basic space within, by path (``"camera"``, ``"arm.0"``). :func:`tree_map` works on both. Every function dispatches on
the type of the space, so that a new space is a new registration here, and a distribution where it is acted in.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, singledispatch
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import Tensor
from torch.nn.functional import one_hot

from ppo_lightning.errors import InputError

SUPPORTED = "Box, Discrete, MultiDiscrete and MultiBinary spaces, and Dict or Tuple of these"

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


def _unsupported(space: Space[Any]) -> InputError:
    return InputError(
        f"the space {space!r} is not supported: PPO takes {SUPPORTED}; convert it with a Gymnasium wrapper "
        "(FlattenObservation, FilterObservation, TransformAction, …)"
    )


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
    named = {".".join(map(str, path)): leaf for path, leaf in paths.items()}
    if len(named) < len(paths) or ("" in named and subspaces(space) is not None):
        raise InputError(f"the parts of {space} cannot be told apart by name: rename its keys (no empty ones, no dots)")
    return named


def _paths(space: Space[Any]) -> dict[tuple[Any, ...], Space[Any]]:
    inner = subspaces(space)
    if inner is None:
        return {(): space}
    if not inner:
        raise InputError(f"the space {space!r} holds nothing: correct it")
    return {(key, *path): leaf for key, child in inner.items() for path, leaf in _paths(child).items()}


def flatten_fn(space: Space[Any]) -> Callable[[Any], Tree]:
    """Function from what Gymnasium gives for a space, alone or batched, to a tree of :func:`flatten_spaces`."""
    if subspaces(space) is None:
        return _same
    return partial(_pick, paths={".".join(map(str, path)): path for path in _paths(space)})


def _same(sample: Any) -> Any:
    return sample


def _pick(sample: Any, paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    picked = {}
    for name, path in paths.items():
        leaf = sample
        for key in path:
            leaf = leaf[key]
        picked[name] = leaf
    return picked


def unflatten(space: Space[Any], tree: Tree, path: tuple[Any, ...] = ()) -> Any:
    """The way back from a tree: what Gymnasium takes for a space, dictionaries and tuples as deep as they were."""
    inner = subspaces(space)
    if inner is None:
        return tree[".".join(map(str, path))] if path else tree
    parts = {key: unflatten(child, tree, (*path, key)) for key, child in inner.items()}
    return parts if isinstance(space, Dict) else tuple(parts.values())


def without_mask(space: Space[Any]) -> Space[Any]:
    """The observation space that a policy sees: a Dict's ``action_mask`` is for the distribution, not the network."""
    if isinstance(space, Dict) and MASK in space.spaces:
        return Dict({key: child for key, child in space.spaces.items() if key != MASK})
    return space


# --- basic spaces ------------------------------------------------------------------------------------------------------


@singledispatch
def signature(space: Space[Any]) -> str:
    """One line that two spaces share exactly when a policy for one fits the other, such as ``Box(4,) float32``."""
    raise _unsupported(space)


@signature.register
def _(space: Box) -> str:
    if 0 in space.shape:
        raise InputError(f"the space {space!r} holds nothing: correct its shape")
    return f"Box{space.shape} {space.dtype}"


@signature.register
def _(space: Discrete) -> str:
    return f"Discrete({space.n})"


@signature.register
def _(space: MultiDiscrete) -> str:
    return f"MultiDiscrete({space.nvec.tolist()})"


@signature.register
def _(space: MultiBinary) -> str:
    return f"MultiBinary{space.shape}"


@signature.register(Dict)
@signature.register(Tuple)
def _(space: Dict | Tuple) -> str:
    return "{" + ", ".join(f"{name}: {signature(leaf)}" for name, leaf in flatten_spaces(space).items()) + "}"


@singledispatch
def storage(space: Space[Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one sample as a rollout keeps it.

    Floats are kept as float32, integers as they are. Torch has no arithmetic for unsigned integers of more than a byte:
    they are kept as the next signed ones, and those of 64 bits, of which there are no next ones, as float32.
    """
    raise _unsupported(space)


UNSIGNED = {2: torch.int32, 4: torch.int64, 8: torch.float32}
"""What unsigned integers of so many bytes are kept as."""


@storage.register
def _(space: Box) -> tuple[tuple[int, ...], torch.dtype]:
    if np.issubdtype(space.dtype, np.floating):
        return space.shape, torch.float32
    if space.dtype.kind == "u" and space.dtype.itemsize in UNSIGNED:
        return space.shape, UNSIGNED[space.dtype.itemsize]
    return space.shape, torch.from_numpy(np.empty(0, space.dtype)).dtype


@storage.register
def _(space: Discrete) -> tuple[tuple[int, ...], torch.dtype]:
    return (), torch.int64


@storage.register
def _(space: MultiDiscrete) -> tuple[tuple[int, ...], torch.dtype]:
    return space.shape, torch.int64


@storage.register
def _(space: MultiBinary) -> tuple[tuple[int, ...], torch.dtype]:
    return space.shape, torch.int8


def empty(space: Space[Any], *batch: int, device: torch.device | None = None) -> Tensor:
    """Storage for samples [*batch, …] of a basic space; images are channels-last in memory, as convolutions need."""
    shape, dtype = storage(space)
    if is_image(space) and len(shape) == 3 and not channels_are_last(shape):
        return torch.empty(*batch, *shape[1:], shape[0], dtype=dtype, device=device).movedim(-1, -3)
    return torch.empty(*batch, *shape, dtype=dtype, device=device)


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
    array, wanted = np.asarray(given), ARRAY_DTYPES[dtype]
    if array.dtype != wanted:
        with np.errstate(over="ignore"):  # what becomes infinite is refused where observations are checked
            array = array.astype(wanted)
    return torch.from_numpy(array)


ARRAY_DTYPES = {
    dtype: torch.empty(0, dtype=dtype).numpy().dtype
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32)
}


def to_tensors_fn(space: Space[Any], device: torch.device) -> Callable[[Tree], Tree]:
    """Function from observations of Gymnasium to what a rollout keeps: tensors of the right dtype, on ``device``."""
    kept = {name: storage(leaf)[1] for name, leaf in flatten_spaces(space).items()}

    def stored(tree: Tree) -> Tree:
        if "" in kept:
            return to_tensor(tree, kept[""]).to(device)
        return {name: to_tensor(tree[name], dtype).to(device) for name, dtype in kept.items()}

    return stored


@singledispatch
def feature_shape(space: Space[Any]) -> tuple[int, ...]:
    """Shape of one observation as a network sees it, after :func:`encoder`."""
    raise _unsupported(space)


@feature_shape.register
def _(space: Box) -> tuple[int, ...]:
    return space.shape or (1,)


@feature_shape.register
def _(space: Discrete) -> tuple[int, ...]:
    return (int(space.n),)


@feature_shape.register
def _(space: MultiDiscrete) -> tuple[int, ...]:
    return (int(space.nvec.sum()),)


@feature_shape.register
def _(space: MultiBinary) -> tuple[int, ...]:
    return space.shape


@singledispatch
def encoder(space: Space[Any]) -> Callable[[Tensor], Tensor]:
    """Function from stored observations [B, …] to features [B, …] of ``feature_shape``.

    Numbers become float32, Discrete and MultiDiscrete one-hot. Images stay as they are, one byte a pixel: the network's
    first layer scales them, on its own device.
    """
    raise _unsupported(space)


@encoder.register
def _(space: Box) -> Callable[[Tensor], Tensor]:
    if not is_image(space):
        return Tensor.float if space.shape else _column  # the tensor itself where it is float32 already
    # Convolutions need channels-last memory: converted once per rollout, not in every minibatch.
    return _pixels_first if len(space.shape) == 3 and not channels_are_last(space.shape) else _same


@encoder.register
def _(space: Discrete) -> Callable[[Tensor], Tensor]:
    return partial(_one_hot, start=int(space.start), n=int(space.n))


@encoder.register
def _(space: MultiDiscrete) -> Callable[[Tensor], Tensor]:
    return partial(_multi_hot, start=as_int64(space.start).flatten(), nvec=as_int64(space.nvec).flatten())


@encoder.register
def _(space: MultiBinary) -> Callable[[Tensor], Tensor]:
    return Tensor.float


def _column(observation: Tensor) -> Tensor:
    return observation.float().unsqueeze(-1)


def _pixels_first(observation: Tensor) -> Tensor:
    return observation.contiguous(memory_format=torch.channels_last)


def _one_hot(observation: Tensor, start: int, n: int) -> Tensor:
    return one_hot(observation - start, n).float()


def _multi_hot(observation: Tensor, start: Array, nvec: Array) -> Tensor:
    offset = np.cumsum(nvec) - nvec - start
    index = observation.flatten(1) + torch.from_numpy(offset).to(observation.device)
    return torch.zeros(len(index), int(nvec.sum()), device=observation.device).scatter_(1, index, 1.0)


FLOAT_MAX = np.finfo(np.float32).max


def wrong_values(space: Space[Any], samples: Array) -> str | None:
    """What is wrong with samples of a basic space that cannot be of it; None where nothing is.

    Floats may lie outside of the bounds of their space: rollouts take such observations, too, with a warning.
    """
    if samples.dtype.kind not in "biuf":
        return f"what is no number ({samples.dtype})"
    if space.dtype is not None and np.issubdtype(space.dtype, np.floating):
        finite = np.abs(samples) <= FLOAT_MAX if samples.dtype.kind == "f" else np.True_
        return None if finite.all() else f"{samples[~finite].flat[0]}, which is not finite in float32"
    low, high = integer_bounds(space)
    whole = samples == np.rint(samples) if samples.dtype.kind == "f" else True
    fits = (samples >= low) & (samples <= high) & whole
    if fits.all():
        return None
    if not np.all(whole):
        return f"{samples[~np.asarray(whole)].flat[0]}, which is no whole number"
    value, least, greatest = (part[~fits].flat[0] for part in np.broadcast_arrays(samples, low, high))
    return f"{value}, which lies outside of {least} to {greatest}"


def as_int64(numbers: Array) -> Array:
    """Numbers of a space as int64: sums of small or unsigned integers would wrap around."""
    return numbers.astype(np.int64)


def integer_bounds(space: Space[Any]) -> tuple[Any, Any]:
    """Least and greatest values of a basic space of whole numbers."""
    if isinstance(space, Discrete):
        return int(space.start), int(space.start) + int(space.n) - 1
    if isinstance(space, MultiDiscrete):
        return as_int64(space.start), as_int64(space.start) + as_int64(space.nvec) - 1
    return (space.low, space.high) if isinstance(space, Box) else (0, 1)


def example(space: Space[Any]) -> Array:
    """A sample of a basic space, to try a network on."""
    start = getattr(space, "start", 0)
    shape, dtype = storage(space)
    return np.broadcast_to(start, shape).astype(torch.empty(0, dtype=dtype).numpy().dtype)


def channels_are_last(picture: Sequence[int]) -> bool:
    """Whether [a, b, c] is height, width, channels: pixels are as many each way, or else channels are fewest."""
    first, middle, last = picture
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


# --- discrete choices, and masks over them -----------------------------------------------------------------------------


@singledispatch
def action_dims(space: Space[Any]) -> tuple[int, ...]:
    """Numbers of alternatives of each discrete choice in an action; an action mask [M] is their concatenation.

    Discrete is one choice, MultiDiscrete several, a bit of MultiBinary one between 0 and 1; a Box has none, and a Dict or
    Tuple those of its parts in the order of :func:`flatten_spaces`.
    """
    raise _unsupported(space)


@action_dims.register
def _(space: Box) -> tuple[int, ...]:
    return ()


@action_dims.register
def _(space: Discrete) -> tuple[int, ...]:
    return (int(space.n),)


@action_dims.register
def _(space: MultiDiscrete) -> tuple[int, ...]:
    return tuple(space.nvec.flatten().tolist())


@action_dims.register
def _(space: MultiBinary) -> tuple[int, ...]:
    return (2,) * int(np.prod(space.shape))


@action_dims.register(Dict)
@action_dims.register(Tuple)
def _(space: Dict | Tuple) -> tuple[int, ...]:
    return tuple(size for leaf in flatten_spaces(space).values() for size in action_dims(leaf))


def flatten_mask(mask: Any, action_space: Space[Any]) -> Array:
    """A batch of masks as one array [N, M]: concatenated as it is, or in the parts of a Dict or Tuple action space.

    Its values are those that were given: :func:`mask_flags` says whether they are a mask's.
    """
    try:
        if isinstance(mask, Mapping | tuple):
            named = {".".join(map(str, path)): (path, leaf) for path, leaf in _paths(action_space).items()}
            named = {name: (path, action_dims(leaf)) for name, (path, leaf) in named.items() if action_dims(leaf)}
            parts = _pick(mask, {name: path for name, (path, _) in named.items()})
            flat = {name: np.asarray(part).reshape(len(part), -1) for name, part in parts.items()}
            if any(part.shape[1] != sum(named[name][1]) for name, part in flat.items()):
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


def _flat_one(mask: Any, action_space: Space[Any]) -> Array:
    """The mask of one environment, from nested or plain lists."""
    if isinstance(mask, tuple) and subspaces(action_space) is not None:
        parts = _pick(mask, {str(path): path for path, leaf in _paths(action_space).items() if action_dims(leaf)})
        return _concatenated([np.asarray(part).flatten() for part in parts.values()], 0)
    if mask is None:
        return np.ones(sum(action_dims(action_space)), dtype=bool)
    return _concatenated([np.asarray(part).flatten() for part in np.atleast_1d(np.asarray(mask, object))], 0)


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
    return (mask == 1) if wrong.any() else mask.astype(bool), wrong if wrong.any() else None


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
    if without_mask(observation_space) is observation_space:
        return
    assert isinstance(observation_space, Dict)
    given = {
        name: int(np.prod(leaf.shape or ())) for name, leaf in flatten_spaces(observation_space.spaces[MASK]).items()
    }
    if len(observation_space.spaces) == 1:
        raise InputError(f"the observation is nothing but {MASK}: add what the policy is to see")
    check_mask_length(sum(given.values()), action_space)
    wanted = {name: sum(action_dims(leaf)) for name, leaf in flatten_spaces(action_space).items() if action_dims(leaf)}
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
