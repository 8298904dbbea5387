"""The arguments of a model: those that checkpoints and loggers keep, and those that must be given again."""

import inspect
import io
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import (
    KEY,
    foreign_names,
    missing,
    plain_contents,
    plain_data,
    read_verified,
    refuse_missing,
    refuse_names,
)
from ppo_lightning.runs.loggers import described_run, name_of

_given_to_load: ContextVar[frozenset[str]] = ContextVar("given_to_load", default=frozenset())
"""Hyperparameters that load_from_checkpoint was given, whether they equal the defaults or not."""


class Hyperparameters:
    """The arguments of a model. Checkpoints keep those that are plain data, loggers also the names of the others.

    Under LightningCLI, Lightning keeps the parsed configuration instead, in which classes are paths.

    Args:
        module: that was made with them.
        given: its arguments by name.
    """

    def __init__(self, module: LightningModule, given: Mapping[str, Any]) -> None:
        self._values: Mapping[str, Any] = module.hparams
        self._names: dict[str, str] = {}
        self.unresolved: list[str] = []
        """Those of a checkpoint that were neither saved nor given again, and that only training needs."""
        self.unsaved: list[str] = []
        """Those that differ from their defaults and that no checkpoint can hold."""
        self._explicit = set(given)
        if _given_hyperparameters.get() is not None:
            module.save_hyperparameters()
        else:
            plain = plain_data(given)
            module.save_hyperparameters(plain)
            self._names = {name: name_of(value) for name, value in given.items() if name not in plain}
            defaults = defaults_of(type(module))
            self._explicit = {name for name, value in given.items() if value is not defaults.get(name)}
            self.unsaved = sorted(self._explicit - plain.keys())
        self._values = module.hparams

    def load(self, contents: Mapping[str, Any]) -> None:
        """Compare with a checkpoint's.

        Args:
            contents: that are ours.

        Raises:
            InputError: one that acting needs was neither saved nor given again.
        """
        self.unresolved = refuse_missing(contents, _given_to_load.get().union(self._explicit))

    def check_trainable(self) -> None:
        """Refuse to train without what was not given again.

        Raises:
            InputError: something is missing.
        """
        if self.unresolved:
            raise missing(self.unresolved[0])

    def for_loggers(self, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
        """Hyperparameters for loggers, including the optimizer's, and ``more``."""
        return described_run({**self._values, **self._names}, optimizer, **more)


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
    contents = plain_contents(data, path)
    refuse_missing(contents[KEY], given)
    saved = contents["hyper_parameters"]
    unresolved = (foreign_names(saved).keys() & {"loss", "advantage_estimator"}) - given.keys()
    refuse_names(saved, {*given, *unresolved})
    token = _given_to_load.set(frozenset(given))
    try:
        replaced = {name: defaults[name] for name in unresolved}
        yield io.BytesIO(data), {**given, **replaced, "weights_only": True}, unresolved
    except ArgumentError as error:  # of jsonargparse, which makes what the command line has saved
        raise InputError(
            f"{path} has hyperparameters that PPO cannot use ({' '.join(str(error).split())}): give others"
        ) from error
    finally:
        _given_to_load.reset(token)
