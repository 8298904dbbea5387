"""The state of environments as plain data, so that a run can resume bit-exactly.

An environment with both methods ``get_state() -> data`` and ``set_state(data)`` defines its own state, in plain data:
numbers, strings, arrays, tensors, NumPy's generators, and lists, tuples or dictionaries of them. Gymnasium's classic
control, toy text and MuJoCo environments, and its wrappers, are supported here. The state of any other cannot be saved.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from torch import Tensor

from ppo_lightning.envs.workers import ForkserverAsyncVectorEnv
from ppo_lightning.errors import InputError

SUPPORTED_MODULES = (
    "gymnasium.envs.classic_control.",
    "gymnasium.envs.toy_text.",
    "gymnasium.wrappers.",
    "ppo_lightning.envs.checked.",
)
"""Modules whose objects keep their state in attributes: those that are not plain data do not change."""
MUJOCO = "gymnasium.envs.mujoco."
MUJOCO_PARTS = {"model", "data", "mujoco_renderer"}
NOT_STATE = {"env", "envs", "spec", "metadata", "_overrides"}
"""Attributes that are not part of the layer's own state."""
TYPE_KEY = "~"
"""Key that marks encoded values; no attribute has this name."""
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class _NotPlainError(Exception):
    """A value that cannot be saved as plain data."""


def environment_state(env: gym.Env[Any, Any]) -> list[Any] | None:
    """State of an environment, layer by layer from the outermost wrapper inwards; None where a layer cannot be saved."""
    layers = [_layer_state(layer) for layer in _layers(env)]
    return None if None in layers else layers


def restore_environment(env: gym.Env[Any, Any], state: list[Any]) -> None:
    """Put an environment, which has been reset once, into a state that :func:`environment_state` gave."""
    for layer, own in zip(_layers(env), state, strict=True):
        _restore_layer(layer, own)


def vector_state(env: VectorEnv, ask: Callable[[AsyncVectorEnv, str], Any]) -> list[Any] | None:
    """State of a vector of environments; None where an environment cannot be saved.

    Args:
        env: the vector.
        ask: gets an attribute of each environment in a worker process.

    Raises:
        InputError: an environment's ``get_state`` returned a value that cannot be saved.
    """
    layers: list[Any] = []
    while isinstance(env, gym.vector.VectorWrapper):
        layers.append(_layer_state(env))
        env = env.env
    if isinstance(env, AsyncVectorEnv):  # Gymnasium's own does not report which episodes the next step resets
        inner = {"envs": list(ask(env, "run_state"))} if isinstance(env, ForkserverAsyncVectorEnv) else None
    elif isinstance(env, SyncVectorEnv):
        inner = {"envs": list(map(environment_state, env.envs)), "autoreset": serialize(env._autoreset_envs)}
    else:
        inner = _layer_state(env)
    return None if inner is None or None in layers or None in inner.get("envs", []) else [*layers, inner]


def restore_vector(env: VectorEnv, state: list[Any]) -> None:
    """Put a vector, which has been reset once, into a state that :func:`vector_state` gave."""
    *outer, inner = state
    for own in outer:
        _restore_layer(env, own)
        env = env.env  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(env, AsyncVectorEnv):
        env.set_attr("run_state", as_arrays(inner["envs"]))
    elif isinstance(env, SyncVectorEnv):
        for one, own in zip(env.envs, inner["envs"], strict=True):
            restore_environment(one, own)
        env._autoreset_envs = deserialize(inner["autoreset"])
    else:
        _restore_layer(env, inner)


def _layers(env: gym.Env[Any, Any]) -> list[gym.Env[Any, Any]]:
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    return layers


def same_signature(one: list[Any], other: list[Any]) -> bool:
    """Whether two states are of vectors made alike: the same layers, with the same arguments."""
    return _signature(one) == _signature(other)


def _signature(state: Any) -> Any:
    if isinstance(state, list):
        return [_signature(part) for part in state]
    return state.get("signature", _signature(state.get("envs", [])))


def _layer_state(layer: Any) -> dict[str, Any] | None:
    state = _own_state(layer)
    if state is not None:
        spec = layer.spec if isinstance(layer, gym.Env | VectorEnv) else None
        made = None if spec is None else (spec.id, sorted(map(str, spec.kwargs.items())), spec.max_episode_steps)
        limit = getattr(layer, "_max_episode_steps", None)  # of TimeLimit
        state["signature"] = re.sub(
            " at 0x[0-9a-f]+", "", f"{type(layer).__module__}.{type(layer).__qualname__} {made} {limit}"
        )
    return state


def _own_state(layer: Any) -> dict[str, Any] | None:
    module = f"{type(layer).__module__}."
    if module.startswith(MUJOCO):
        own = _attributes(layer, NOT_STATE | MUJOCO_PARTS)
        return {"attributes": own, "mujoco": _mujoco_state(layer.model, layer.data)}
    if module.startswith(SUPPORTED_MODULES):
        return {"attributes": _attributes(layer, NOT_STATE)}
    methods = _methods(layer)
    if methods is None:
        return None
    try:
        return {"own": serialize(methods[0]()), "random": None if _wraps(layer) else serialize(layer._np_random)}
    except _NotPlainError as error:
        raise InputError(
            f"get_state of {type(layer).__name__} returned {error}: return numbers, strings, arrays, tensors, or lists, tuples "
            "and dictionaries of them"
        ) from None


def _restore_layer(layer: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        methods = _methods(layer)
        assert methods is not None
        if not _wraps(layer):
            layer._np_random = deserialize(state["random"])
        methods[1](deserialize(state["own"]))
        return
    if "mujoco" in state:
        _restore_mujoco(layer.model, layer.data, state["mujoco"])
    _restore_attributes(layer, state["attributes"])


def _wraps(layer: Any) -> bool:
    return isinstance(layer, gym.Wrapper | gym.vector.VectorWrapper)


def _methods(layer: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """The layer's own ``get_state`` and ``set_state``."""
    kind = type(layer)
    if not (hasattr(kind, "get_state") and hasattr(kind, "set_state")):
        return None
    return layer.get_state, layer.set_state


def _attributes(owner: Any, without: set[str]) -> dict[str, Any]:
    """An object's attributes that are plain data; the rest are spaces, functions, windows."""
    plain = {}
    for name, value in vars(owner).items():
        if name in without or isinstance(value, str | bytes):  # names of folders and modes, no state
            continue
        try:
            plain[name] = serialize(value)
        except _NotPlainError:
            if type(value).__module__.startswith("gymnasium.wrappers."):  # running means of a wrapper
                plain[name] = {TYPE_KEY: "attributes", "value": _attributes(value, set())}
    return plain


def _restore_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    """Restore the attributes of :func:`_attributes`, and nothing else from a file."""
    known = _attributes(owner, NOT_STATE | MUJOCO_PARTS)
    for name, value in attributes.items():
        if name not in known:
            continue
        if isinstance(value, dict) and value.get(TYPE_KEY) == "attributes":
            _restore_attributes(getattr(owner, name), value["value"])
            continue
        value = deserialize(value)
        if not isinstance(value, str | bytes):
            setattr(owner, name, value)


def _mujoco_state(model: Any, data: Any) -> dict[str, Any]:
    """All of the simulator's arrays: observed quantities lag behind the integrated state by a step."""
    import mujoco  # pyright: ignore[reportMissingImports]

    whole = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # pyright: ignore[reportAttributeAccessIssue]
    integrated = np.empty(mujoco.mj_stateSize(model, whole))  # pyright: ignore[reportAttributeAccessIssue]
    mujoco.mj_getState(model, data, integrated, whole)  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "integrated": serialize(integrated),
        "arrays": {name: serialize(array) for name, array in _arrays(data).items()},
    }


def _restore_mujoco(model: Any, data: Any, state: dict[str, Any]) -> None:
    import mujoco  # pyright: ignore[reportMissingImports]

    whole = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # pyright: ignore[reportAttributeAccessIssue]
    mujoco.mj_setState(model, data, deserialize(state["integrated"]), whole)  # pyright: ignore[reportAttributeAccessIssue]
    mujoco.mj_forward(model, data)  # pyright: ignore[reportAttributeAccessIssue]
    saved = state["arrays"]
    for name, array in _arrays(data).items():
        if name in saved and saved[name]["value"].shape == array.shape:  # the solver's own vary with contacts
            array[...] = deserialize(saved[name])


def _arrays(data: Any) -> dict[str, np.ndarray]:
    found = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray) and value.dtype != object}


def serialize(value: Any) -> Any:
    """Encode a value for ``torch.load(weights_only=True)``.

    Raises:
        _NotPlainError: it is neither plain data nor an array, tensor or generator.
    """
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufc" or value.dtype.itemsize > (16 if value.dtype.kind == "c" else 8):
            raise _NotPlainError(f"an array of {value.dtype}")
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return {TYPE_KEY: kind, "value": np.array(value)}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.random.Generator):
        return {TYPE_KEY: "generator", "value": serialize(value.bit_generator.state)}
    if isinstance(value, deque):
        return {TYPE_KEY: "deque", "value": [serialize(item) for item in value], "maxlen": value.maxlen}
    if type(value) in (list, tuple):
        return type(value)(serialize(item) for item in value)
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {key: serialize(item) for key, item in value.items()}
    raise _NotPlainError(f"a {type(value).__name__}")


def as_tensors(serialized: Any) -> Any:
    """Packed data with its arrays as tensors, which files of plain data can hold; :func:`deserialize` takes both."""
    if isinstance(serialized, dict):
        return {key: as_tensors(item) for key, item in serialized.items()}
    if type(serialized) in (list, tuple):
        return type(serialized)(as_tensors(item) for item in serialized)
    return torch.from_numpy(serialized.copy()) if isinstance(serialized, np.ndarray) else serialized


def as_arrays(serialized: Any) -> Any:
    """The reverse: a pipe would share a tensor's memory between processes, and torch pickles no unsigned integers."""
    if type(serialized) in (list, tuple):
        return type(serialized)(as_arrays(item) for item in serialized)
    if not isinstance(serialized, dict):
        return serialized
    if TYPE_KEY in serialized and isinstance(serialized.get("value"), Tensor):
        return {**serialized, "value": serialized["value"].numpy()}
    return {key: as_arrays(item) for key, item in serialized.items()}


def deserialize(value: Any) -> Any:
    """Decode a value of :func:`serialize`."""
    if isinstance(value, list | tuple):
        return type(value)(deserialize(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value.get(TYPE_KEY)
    if kind is None:
        return {key: deserialize(item) for key, item in value.items()}
    inner = value["value"]
    if kind == "generator":
        state = deserialize(inner)
        name = BIT_GENERATORS[BIT_GENERATORS.index(state["bit_generator"])]
        bits = getattr(np.random, name)()
        bits.state = state
        return np.random.Generator(bits)
    if kind == "deque":
        return deque(map(deserialize, inner), maxlen=value["maxlen"])
    array = inner.numpy().copy() if isinstance(inner, Tensor) else inner
    if not isinstance(array, np.ndarray):
        raise InputError("the checkpoint's state of an environment is none that PPO wrote: give one that it did")
    return array if kind == "array" else array[()]
