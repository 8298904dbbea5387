"""The arguments of a model: those that checkpoints and loggers keep, and those that must be given again."""

import importlib
import inspect
import io
import re
import sys
from argparse import ArgumentError
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from lightning import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

from ppo_lightning.algorithm.advantage import gae
from ppo_lightning.envs import isaac_lab_env, mjlab_env
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import Linear, PopArt, plain_values
from ppo_lightning.runs.checkpoint import CHECKPOINT_KEY, read_verified, validated_contents

LIGHTNING_KEYS = ("_instantiator", "_class_path")
"""Lightning's internal entries among the hyperparameters."""

ALLOWED_CLASSES = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, gym.Env, VectorEnv)
ALLOWED_FUNCTIONS = (gae, mjlab_env, isaac_lab_env)
TRUSTED_PACKAGES = ("ppo_lightning", "torch", "gymnasium", "ale_py", "minigrid")
"""Kinds of classes and the functions that a checkpoint may name, and the packages that it may import."""

PATH_ARGUMENT = re.compile(r"(path|dir|directory|directorie|folder|filename)s?(_|$)|(^|_)(file|url|uri)s?(_|$)")
"""In names of arguments that take files or folders."""

TRAINING_ONLY = ("optimizer", "lr_scheduler", "loss", "advantage_estimator")
"""Hyperparameters that a policy can act without."""

_given_to_load: ContextVar[frozenset[str]] = ContextVar("given_to_load", default=frozenset())
"""Hyperparameters that load_from_checkpoint was given, whether they equal the defaults or not."""

_configuration: ContextVar[dict[str, Any] | None] = ContextVar("configuration", default=None)
"""The parsed configuration in a checkpoint of the command line that is being loaded, with what was given instead."""


class Hyperparameters:
    """The arguments of a model. Checkpoints keep those that are plain data, loggers also the names of the others.

    Under LightningCLI, and in a model that is loaded from what it has saved, they are the parsed configuration instead, in
    which classes are paths.

    Args:
        module: that was made with them.
        given: its arguments by name.
        of_subclass: what a subclass was called with (:func:`subclass_arguments`).
    """

    def __init__(self, module: LightningModule, given: Mapping[str, Any], of_subclass: Mapping[str, Any]) -> None:
        self._names: dict[str, str] = {}
        self.unresolved: list[str] = []
        """Those of a checkpoint that were neither saved nor given again, and that only training needs."""
        self.unsaved: list[str] = []
        """Those that differ from their defaults and that no checkpoint can hold."""
        self._explicit, self._defaults = set(given), defaults_of(type(module))
        configuration = _configuration.get()
        if _given_hyperparameters.get() is not None:
            module.save_hyperparameters()
        else:
            if configuration is None:
                given = {**given, **of_subclass}
                self._explicit = self._changed(given)
            else:
                _configuration.set(None)  # it is of this model alone
                given, self._explicit = configuration, set(_given_to_load.get())
            plain = serializable_hparams(given)
            module.save_hyperparameters(plain)
            self._names = {name: qualified_name(value) for name, value in given.items() if name not in plain}
            self.unsaved = sorted(self._explicit - plain.keys())
        self._values: Mapping[str, Any] = module.hparams

    def load(self, contents: Mapping[str, Any]) -> None:
        """Compare with a checkpoint's contents that are ours.

        Raises:
            InputError: one that acting needs was neither saved nor given again.
        """
        self.unresolved = check_unsaved(contents, _given_to_load.get().union(self._explicit))

    def _changed(self, given: Mapping[str, Any]) -> set[str]:
        return {name for name, value in given.items() if value is not self._defaults.get(name)}

    def for_checkpoint(self, saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What a file can hold of hyperparameters, and the names of the others.

        Args:
            saved: by Lightning; a subclass may have called ``save_hyperparameters``.
        """
        plain = serializable_hparams(saved)
        lost = self._changed({name: value for name, value in saved.items() if name not in plain})
        return plain, sorted({*self.unsaved, *self.unresolved, *lost})

    def check_trainable(self) -> None:
        """Refuse to train without what was not given again."""
        if self.unresolved:
            raise missing_hparam_error(self.unresolved[0])

    def for_loggers(self, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
        """Hyperparameters for loggers, including the optimizer's, and ``more``; objects by their names, tuples as lists."""
        values = {name: one for name, one in self._values.items() if name not in LIGHTNING_KEYS}
        return {
            **tuples_to_lists({**values, **self._names}),
            "optimizer": {
                "class_path": qualified_name(type(optimizer)),
                "init_args": tuples_to_lists(optimizer.defaults),
            },
            **more,
        }


def subclass_arguments(kind: type, base: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a class was called with, by name, where its constructor is one of a user's.

    Args:
        kind: the class.
        base: whose direct subclass is the last with a constructor of ours.
        args: positional arguments of the call.
        kwargs: by keyword.
    """
    ours = kind.__mro__[kind.__mro__.index(base) - 1]
    if kind.__init__ is ours.__init__:
        return {}
    bound = inspect.signature(kind).bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= bound.arguments[name]
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found[name] = bound.arguments[name]
    return found


def qualified_name(value: Any) -> str:
    """Of a class or function its own name; of an object its class's."""
    named = value if inspect.isclass(value) or inspect.isfunction(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def tuples_to_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that plain YAML can hold."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def defaults_of(kind: type) -> dict[str, Any]:
    """Default values of the parameters of a class and its bases."""
    found: dict[str, Any] = {}
    for one in reversed(kind.__mro__):
        parameters = inspect.signature(vars(one).get("__init__", object.__init__)).parameters.values()
        found |= {
            parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
        }
    return found


@contextmanager
def loading(
    path: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[io.BytesIO, dict[str, Any], set[str]]]:
    """Check a checkpoint that ``load_from_checkpoint`` loads within.

    Args:
        path: of the file.
        given: hyperparameters that replace the checkpoint's.
        defaults: of all.

    Yields:
        The file's bytes, the arguments to load it with, and the names of hyperparameters that only training needs, which no
        file may choose, and which therefore have their defaults.

    Raises:
        InputError: the file is damaged, not ours, needs something that it cannot hold, or names something that no file may.
    """
    data = read_verified(path)
    contents = validated_contents(data, path)
    check_unsaved(contents[CHECKPOINT_KEY], given)
    saved = contents["hyper_parameters"]
    unresolved = (disallowed_names(saved).keys() & {"loss", "advantage_estimator"}) - given.keys()
    check_names(saved, {*given, *unresolved})
    token = _given_to_load.set(frozenset(given))
    is_configuration = "_instantiator" in saved
    outer = _configuration.set({**saved, **given} if is_configuration else None)
    try:
        replaced = {name: defaults[name] for name in unresolved}
        yield io.BytesIO(data), {**given, **replaced, "weights_only": True}, unresolved
    except ArgumentError as error:  # of jsonargparse, which makes what the command line has saved
        raise InputError(
            f"{path} has hyperparameters that PPO cannot use ({' '.join(str(error).split())}): give others"
        ) from error
    finally:
        _given_to_load.reset(token)
        _configuration.reset(outer)


def check_names(hparams: Mapping[str, Any], given: Container[str] = ()) -> None:
    """Refuse hyperparameters that would import or call what a checkpoint may not choose.

    A checkpoint is untrusted, and under the command line its hyperparameters hold names that are imported and called. It may
    name registered environments, and classes of networks, optimisers, schedulers, environments and wrappers from
    :data:`TRUSTED_PACKAGES` or from modules that are imported already. It may not name files or folders.

    Args:
        hparams: of a checkpoint.
        given: names of those that the user has given again, which replace the checkpoint's.
    """
    for name, strings in disallowed_names(hparams).items():
        if name not in given:
            raise InputError(
                f"the checkpoint's {name} is {strings[0]!r}, which no checkpoint may choose: if you trust it, give {name} "
                f"again, by --model.{name}, in a config, or to load_from_checkpoint; export, enjoy and push take --trust"
            )


def names_to_trust(path: Any) -> dict[str, Any]:
    """The hyperparameters of a checkpoint that no checkpoint may choose, to be given again by a user who trusts it.

    Args:
        path: of the file.

    Raises:
        InputError: the file is damaged or not ours.
    """
    saved = validated_contents(read_verified(path), path)["hyper_parameters"]
    return {name: saved[name] for name in disallowed_names(saved)}


def disallowed_names(hparams: Mapping[str, Any]) -> dict[str, list[str]]:
    """Strings that a checkpoint may not choose, by hyperparameter, which the user must give again."""
    found = {
        name: [
            text
            for text, is_path in _strings(value, has_keys=name == "policy")
            if is_path or not _is_allowed(text, inert=name == "env_kwargs")
        ]
        for name, value in hparams.items()
        if name != "_instantiator" and not (name == "info_keys" and _are_strings(value))
    }
    if not isinstance(hparams.get("env_kwargs"), dict | None):  # jsonargparse would read a file of this name
        found["env_kwargs"] = [str(hparams["env_kwargs"])]
    return {name: strings for name, strings in found.items() if strings}


def _are_strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _strings(value: object, *, is_path: bool = False, has_keys: bool = False) -> Iterator[tuple[str, bool]]:
    """The strings in a hyperparameter, and whether an argument takes it as a file or folder.

    Keys are never imported or opened, nor are those of observations that a policy names (``has_keys``); one that holds a
    class's path counts, since jsonargparse would import that.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if has_keys and key in ("actor_keys", "critic_keys") and _are_strings(item):
                continue
            if "class_path" in str(key):
                yield str(key), is_path
            takes_path = key != "class_path" and PATH_ARGUMENT.search(str(key).lower()) is not None
            is_file = is_path or (takes_path and not isinstance(item, Mapping))
            yield from _strings(item, is_path=is_file, has_keys=has_keys)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _strings(item, is_path=is_path, has_keys=has_keys)
    elif isinstance(value, str | bytes):
        yield str(value), is_path


def _is_allowed(text: str, *, inert: bool) -> bool:
    """Whether a checkpoint may choose a string; an inert one is an argument of an environment."""
    if inert:  # jsonargparse imports what a class_path names
        return "class_path" not in text and (text in gym.registry or re.search(r"[/\\]|^~|^\.+$", text) is None)
    if text in gym.registry or re.fullmatch(r"[\w +-]*", text):
        return True
    module, colon, _ = text.rpartition(":")
    if colon:
        return re.fullmatch(r"[\w.]+:[\w./-]+", text) is not None and (_is_trusted(module) or module in sys.modules)
    module, _, name = text.rpartition(".")
    if _is_trusted(module):
        try:
            importlib.import_module(module)
        except ImportError:
            return False
    named = getattr(sys.modules.get(module), name, None)
    return named in ALLOWED_FUNCTIONS or (isinstance(named, type) and issubclass(named, ALLOWED_CLASSES))


def _is_trusted(module: str) -> bool:
    """Whether a checkpoint may import a module."""
    parts = module.split(".")
    return parts[0] in TRUSTED_PACKAGES and all(re.fullmatch(r"[A-Za-z]\w*", part) for part in parts)


def check_unsaved(ours: Mapping[str, Any], given: Container[str]) -> list[str]:
    """Hyperparameters that were neither saved nor given again, and that only training needs.

    Raises:
        InputError: one that acting needs is missing.
    """
    absent = [name for name in ours["not_saved"] if name not in given]
    for name in absent:
        if name not in TRAINING_ONLY:
            raise missing_hparam_error(name)
    return absent


def missing_hparam_error(name: str) -> InputError:
    """The error for a hyperparameter that was neither saved nor given again."""
    return InputError(
        f"the checkpoint was made with a value of {name} which a file of plain data cannot hold: "
        f"pass {name}=… again, to PPO or to load_from_checkpoint"
    )


def serializable_hparams(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those hyperparameters that ``weights_only`` loading can restore, converted to plain data."""
    plain = {
        name: asdict(value) if isinstance(value, Linear | PopArt) else plain_values(value)
        for name, value in given.items()
    }
    return {name: value for name, value in plain.items() if is_plain(value)}


def is_plain(value: object) -> bool:
    """Whether ``weights_only`` loading can restore a value."""
    if isinstance(value, Mapping):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
