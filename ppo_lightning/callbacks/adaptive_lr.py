"""A learning rate that adapts to the KL divergence of each update."""

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from ppo_lightning.callbacks.stages import Stages
from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import FINITE, checked


class AdaptiveLearningRate(Callback):
    """Lowers the learning rate where an update's KL divergence is too large, and raises it where it is too small.

    The rule of rsl_rl (Schwarke et al. 2025), once per iteration, by ``train/approx_kl`` (the divergence of the update's
    last epoch, over all ranks): more than twice ``desired_kl`` divides the learning rate by ``factor``, less than half of
    it, but more than 0, multiplies it. It starts at the optimiser's learning rate; a resumed run keeps its last one.

    rsl_rl applies it before each gradient step, to the exact divergence between two Gaussians. Here it applies to any
    distribution, by the estimate E[r − 1 − ln r] (Schulman 2020), and compiled updates know their learning rate beforehand.

    Args:
        desired_kl: divergence per update to aim at (nats).
        factor: by which the learning rate changes (dimensionless, more than 1).
        min_lr: lowest learning rate.
        max_lr: highest learning rate.

    Raises:
        InputError: a number cannot be used, or something else sets the learning rate, too.
    """

    @checked("AdaptiveLearningRate: {}", desired_kl=FINITE, factor=FINITE, min_lr=FINITE, max_lr=FINITE)
    def __init__(
        self, desired_kl: float = 0.01, factor: float = 1.5, min_lr: float = 1e-5, max_lr: float = 1e-2
    ) -> None:
        if not (desired_kl > 0 and factor > 1 and 0 < min_lr <= max_lr):
            raise InputError(
                "AdaptiveLearningRate takes desired_kl above 0, factor above 1 and min_lr between 0 and max_lr, got "
                f"desired_kl={desired_kl}, factor={factor}, min_lr={min_lr}, max_lr={max_lr}"
            )
        self.desired_kl, self.factor, self.min_lr, self.max_lr = desired_kl, factor, min_lr, max_lr
        self.rate: float | None = None
        """Learning rate of the next iteration; None before the first."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rate = state_dict["rate"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = cast(PPOModule, pl_module)
        if module.num_env_steps == 0:  # it has seen another run
            self.rate = None
        module.schedules.check_owner("lr", self)
        others: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if any(isinstance(other, Stages) and other.sets_learning_rate for other in others):
            raise InputError(
                "AdaptiveLearningRate and Stages both set the learning rate: leave AdaptiveLearningRate out, or "
                "learning_rate in all stages"
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rate is None:
            self.rate = float(trainer.optimizers[0].param_groups[0]["initial_lr"])
        cast(PPOModule, pl_module).schedules.override("lr", self.rate, owner=self)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.rate is not None
        kl = float(trainer.callback_metrics["train/approx_kl"])
        if kl > 2 * self.desired_kl:
            self.rate = max(self.min_lr, self.rate / self.factor)
        elif 0 < kl < self.desired_kl / 2:
            self.rate = min(self.max_lr, self.rate * self.factor)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast(PPOModule, pl_module).schedules.release(self)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        cast(PPOModule, pl_module).schedules.release(self)
