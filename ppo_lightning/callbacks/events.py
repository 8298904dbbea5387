"""Events within an iteration, for callbacks."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from tensordict import TensorDict
from typing_extensions import override

from ppo_lightning.algorithm.update import UpdateResult

T = TypeVar("T")


class PPOCallback(Callback):
    """A Lightning callback with the events of PPO, to subclass or to make from functions: ``PPOCallback(event=f)``.

    Their order is: iteration start, rollout start, rollout end, update start, update end, iteration end. An exception in
    one ends the run.

    Args:
        on_iteration_start: function that is called instead of the method of that name, with its arguments but ``self``.
        on_rollout_start: the same, and so on.
        on_rollout_end: the same.
        on_update_start: the same.
        on_update_end: the same.
        on_iteration_end: the same.
    """

    def __init__(
        self,
        on_iteration_start: Callable[[Trainer, Any], Any] | None = None,
        on_rollout_start: Callable[[Trainer, Any], Any] | None = None,
        on_rollout_end: Callable[[Trainer, Any, TensorDict], Any] | None = None,
        on_update_start: Callable[[Trainer, Any, TensorDict], Any] | None = None,
        on_update_end: Callable[[Trainer, Any, UpdateResult], Any] | None = None,
        on_iteration_end: Callable[[Trainer, Any, dict[str, float]], Any] | None = None,
    ) -> None:
        super().__init__()
        for name, function in list(locals().items()):
            if name in EVENTS and function is not None:
                setattr(self, name, function)

    def on_iteration_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An iteration begins: before its rollout."""

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The rollout begins; in the first iteration the environments do not exist yet."""

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: TensorDict) -> None:
        """The rollout [T, N] is collected, without advantages; it may be changed in place."""

    def on_update_start(self, trainer: Trainer, pl_module: LightningModule, rollout: TensorDict) -> None:
        """The rollout has advantages and value targets; they may be changed in place.

        With ``recompute_advantages`` that holds for the first epoch: give an ``advantage_estimator`` then.
        """

    def on_update_end(self, trainer: Trainer, pl_module: LightningModule, update: UpdateResult) -> None:
        """The policy is updated on the rollout."""

    def on_iteration_end(self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        """The iteration is counted and logged; an evaluation may follow."""


EVENTS = tuple(name for name in vars(PPOCallback) if name.startswith("on_"))


def call_event(module: Any, event: str, *given: Any) -> None:
    """Call an event of all callbacks of the module's Trainer that have it, in their order."""
    for callback in [] if module._trainer is None else callbacks_of(module.trainer, PPOCallback):
        getattr(callback, event)(module.trainer, module, *given)


def callbacks_of(trainer: Any, kind: type[T]) -> list[T]:
    """A Trainer's callbacks of some type, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


class EvaluationCallback(Callback):
    """A callback that receives a run's evaluations, whether these pause training or not."""

    def on_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, step: int, statistics: dict[str, float]
    ) -> None:
        """An evaluation has finished; ``trainer.callback_metrics`` has its metrics, too.

        Args:
            trainer: of the run.
            pl_module: of the run.
            step: environment steps of the evaluated policy, which training may have passed.
            statistics: its ``eval/…``.
        """

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            found = trainer.callback_metrics
            statistics = {name: found[name].item() for name in found if name.startswith("eval/")}
            self.on_evaluation(trainer, pl_module, cast(Any, pl_module).num_env_steps, statistics)


def notify_evaluation(trainer: Trainer, module: LightningModule, step: int, statistics: dict[str, float]) -> None:
    """Notify callbacks of an asynchronous evaluation, :class:`EarlyStopping` included."""
    before = dict(trainer.callback_metrics)
    for callback in callbacks_of(trainer, Callback):
        if isinstance(callback, EvaluationCallback):
            callback.on_evaluation(trainer, module, step, statistics)
    now = trainer.callback_metrics
    logged = {*statistics, *(name for name in now if now[name] is not before.get(name))}  # by these callbacks
    for callback in callbacks_of(trainer, EarlyStopping):
        if callback.monitor in logged:
            callback.on_validation_end(trainer, module)
