"""The evaluation of a run's last policy."""

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from ppo_lightning.module import PPOModule


class FinalEvaluation(Callback):
    """Evaluates the last policy at the end of training, unless Lightning has done so.

    Lightning evaluates after a batch. Early stopping on a training metric, a callback's ``on_train_epoch_end`` and
    ``max_time`` end a run after that. A signal leaves no time for an evaluation.
    """

    def __init__(self) -> None:
        self._evaluated = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = -1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluated = cast(PPOModule, pl_module).policy_version

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        done = module.agreed_stop_signal is not None or self._evaluated == module.policy_version
        if done or not trainer.enable_validation:
            return
        loop: Any = trainer.fit_loop
        progress = loop.epoch_progress
        for count in (progress.total, progress.current):
            count.completed -= 1  # the evaluation, and what is saved after it, belongs to the last iteration
        trainer.validating = True
        loop.epoch_loop.val_loop.run()
        trainer.training = True
        for count in (progress.total, progress.current):
            count.completed += 1
