"""Closes simulators with the run that started them."""

from typing import cast

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.module import PPOModule


class CloseEnvironments(Callback):
    """Closes the module's environments and their worker processes, however the run ends.

    Lightning calls a callback's ``on_exception`` where it would skip the module's ``teardown``: after an error or an
    interrupt.
    """

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast(PPOModule, pl_module).close_environments()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, EnvironmentFault):  # failed environments have no state to save
            cast(PPOModule, pl_module).save_env_state()
        cast(PPOModule, pl_module).close_environments()
