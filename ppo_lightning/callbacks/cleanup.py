"""Simulators do not outlive the run that started them."""

from typing import Protocol, cast

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from ppo_lightning.errors import EnvironmentFault


class Simulates(Protocol):
    """A module that holds environments."""

    def close_environments(self) -> None:
        """Stop them all."""

    def keep_environments(self) -> None:
        """Keep what they go on from."""


class CloseEnvironments(Callback):
    """Closes the module's environments and their worker processes, however the run ends.

    Lightning calls a callback's ``on_exception`` where it would skip the module's ``teardown``: after an error or an
    interrupt.
    """

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast(Simulates, pl_module).close_environments()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, EnvironmentFault):  # whose environments can tell nothing
            cast(Simulates, pl_module).keep_environments()
        cast(Simulates, pl_module).close_environments()
