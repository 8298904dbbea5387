"""Evaluations during training, in a separate process."""

import copy
import io
import time
from typing import Any, NamedTuple, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ppo_lightning.callbacks.checkpoints import BestCheckpoint
from ppo_lightning.callbacks.events import notify_evaluation
from ppo_lightning.callbacks.interrupts import Interrupts
from ppo_lightning.callbacks.processes import BREATH_S
from ppo_lightning.callbacks.summary import RunSummary
from ppo_lightning.envs import EnvOverrides
from ppo_lightning.errors import InputError
from ppo_lightning.evaluation.process import Evaluation, Evaluator, EvaluatorLost
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import SECONDS, Limit, checked


class Taken(NamedTuple):
    """Snapshot of a run for an evaluation."""

    step: int
    """Environment steps."""
    seed: int
    """Of the episodes."""
    setting: EnvOverrides
    """Of the environments."""
    weights: bytes
    """The policy with its normalisers, as ``torch.save`` writes them."""
    checkpoint: dict[str, Any] | None
    """Contents of ``best.ckpt`` if this is the best; None without checkpoints."""


_COUNT = Limit("be more than 0 (a whole number)", lambda value: value > 0)


class AsyncEvaluation(Callback):
    """Evaluates snapshots in another process while training continues, instead of pausing it.

    A snapshot is the policy with its normalisers, and a whole checkpoint. Its ``eval/…`` equal those of ``model.evaluate()``
    at that step. They are logged at that step, reach ``trainer.callback_metrics`` when they arrive, and the snapshot becomes
    ``best.ckpt`` if it is the best. Training is bit-identical with and without this callback.

    One evaluation runs at a time. One snapshot waits, and a newer one replaces it. The last policy is always evaluated, and
    the end of training waits for it. An evaluation that fails or times out gives a warning, and the next one has a new
    process. The process has one thread, on the CPU; rank 0 starts it.

    Args:
        every: iterations between evaluations; None is the model's ``eval_interval``.
        episodes: of an evaluation; None is the model's ``num_eval_episodes``.
        deterministic: take the most probable actions; None is the model's ``eval_deterministic``.
        timeout_s: an evaluation that takes longer is aborted (seconds).

    Raises:
        InputError: one of them is not positive.
    """

    PATIENCE_S = 3.0
    """Seconds that an interrupted or failed run waits for the running evaluation."""

    @checked("AsyncEvaluation: {}", every=_COUNT, episodes=_COUNT, timeout_s=SECONDS)
    def __init__(
        self,
        every: int | None = None,
        episodes: int | None = None,
        deterministic: bool | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.every, self.episodes, self.deterministic, self.timeout_s = every, episodes, deterministic, timeout_s
        self._packed = b""
        self._evaluator: Evaluator | None = None
        self._running: Taken | None = None
        self._waiting: Taken | None = None
        self._taken = -1
        self._limit_val_batches: int | float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn off Lightning's evaluations, which pause training."""
        if stage != "fit":
            return
        module = cast(PPOModule, pl_module)
        if module.env_factory.again() is None:
            raise InputError(
                f"AsyncEvaluation needs environments of its own, and {module.env_factory.name} was given as a VectorEnv: give "
                "a callable that makes it instead"
            )
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, WeightAveraging):
                raise InputError(
                    "AsyncEvaluation evaluates the weights of training, WeightAveraging saves averaged ones: leave "
                    "AsyncEvaluation out, so that evaluations and best.ckpt are about the same weights"
                )
            its_own = isinstance(callback, ModelCheckpoint) and not isinstance(callback, BestCheckpoint)
            if its_own and (callback.monitor or "").startswith("eval/"):
                raise InputError(
                    f"ModelCheckpoint(monitor={callback.monitor!r}) would save what training has become when a result of "
                    "AsyncEvaluation arrives, not the policy that was evaluated: leave it out, best.ckpt is that policy"
                )
        self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running = self._waiting = None
        self._taken = -1
        if trainer.is_global_zero:
            self._packed = self._evaluation(trainer, cast(PPOModule, pl_module)).packed()
            self._evaluator = Evaluator(self._packed, self.timeout_s)  # its imports take seconds

    def _evaluation(self, trainer: Trainer, module: PPOModule) -> Evaluation:
        maker = module.env_factory.again()
        assert maker is not None
        episodes = module.num_eval_episodes if self.episodes is None else self.episodes
        return Evaluation(
            copy.deepcopy(module.policy).cpu().eval(),  # as in a validation
            maker,
            module.observation_space,
            num_envs=min(module.num_envs, episodes),
            num_episodes=episodes,
            deterministic=module.eval_deterministic if self.deterministic is None else self.deterministic,
            timeout_s=module.env_timeout_s,
            restarts=module.env_provider.restarts.limit,
            info_keys=module.info_keys,
            mixed=str(trainer.precision) != "32-true",
            max_steps=module.steps_per_eval_episode,
            seed=module.seed or 0,
        )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        every = module.iterations_between_evaluations if self.every is None else self.every
        due = last or module.policy_version % every == 0
        if due:
            self._take(trainer, module)
        if last:
            self._finish(trainer, module)
        elif due or trainer.world_size == 1:  # ranks must agree on what has arrived
            self._turn(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        if self._taken != module.num_env_steps:  # another callback has ended the run since
            self._take(trainer, module)
        self._finish(trainer, module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if trainer.world_size == 1:  # else other ranks may not answer
                self._waiting = None
                self._turn(trainer, time.monotonic() + self.PATIENCE_S)
        except Exception as error:  # the error that ended the run must stay visible, such as a logger's
            rank_zero_warn(f"the last evaluation was not logged ({type(error).__name__}: {error})")
        finally:
            self._close("the run has ended by an error or by force")
            self._restore(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def _take(self, trainer: Trainer, module: PPOModule) -> None:
        """Take a snapshot of the run: collective, since each rank holds a part of a checkpoint."""
        if module.agreed_stop_signal in Interrupts.SIGNALS:  # there is no time
            return
        self._taken = module.num_env_steps
        best = _best(trainer)
        checkpoint = None if best is None else trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if trainer.is_global_zero:
            weights = io.BytesIO()
            torch.save({name: tensor.cpu() for name, tensor in module.policy.state_dict().items()}, weights)
            # The checkpoint holds the tensors that training updates in place.
            copied = copy.deepcopy(checkpoint)
            self._waiting = Taken(
                self._taken, module.evaluation_seed(), module.env_provider.eval_overrides, weights.getvalue(), copied
            )

    def _finish(self, trainer: Trainer, module: PPOModule) -> None:
        interrupted = module.agreed_stop_signal in Interrupts.SIGNALS
        try:
            until = time.monotonic() + (self.PATIENCE_S if interrupted else 2 * self.timeout_s)
            if interrupted:
                self._waiting = None
            while self._turn(trainer, until):
                pass
        finally:
            self._close("the run was interrupted")

    def _turn(self, trainer: Trainer, until: float = 0.0) -> bool:
        """Receive a result that has arrived, and begin the waiting evaluation; collective.

        Args:
            trainer: of the run.
            until: wait for a result, until that time of ``time.monotonic``.

        Returns:
            Whether another result is pending.
        """
        taken = self._running
        news = self._hear(min(BREATH_S, until - time.monotonic())) if taken is not None else None
        if self._running is None and self._waiting is not None:
            self._begin(self._waiting)
            self._waiting = None
        more = self._running is not None and time.monotonic() < until
        news, more = trainer.strategy.broadcast((news, more))
        if news is not None:
            step, statistics = news
            module = cast(PPOModule, trainer.lightning_module)
            module.log_metrics(statistics, step)
            module.records.evaluations.add(step, statistics)
            best = _best(trainer)
            if best is not None:
                scores = {name: trainer.callback_metrics[name] for name in statistics}
                best.keep(trainer, None if taken is None else _completed(taken.checkpoint, trainer), scores)
            notify_evaluation(trainer, trainer.lightning_module, step, statistics)
        return more

    def _hear(self, wait_s: float) -> tuple[int, dict[str, float]] | None:
        assert self._evaluator is not None
        assert self._running is not None
        step = self._running.step
        try:
            statistics = self._evaluator.answer(max(0.0, wait_s))
        except EvaluatorLost as error:
            self._evaluator.close()
            self._evaluator = self._running = None
            _warn(step, error)
            return None
        if statistics is None:
            return None
        self._running = None
        return step, statistics

    def _begin(self, taken: Taken) -> None:
        if self._evaluator is None:
            try:
                self._evaluator = Evaluator(self._packed, self.timeout_s)
            except OSError as error:  # no process or memory left: training has its own
                _warn(taken.step, error)
                return
        self._evaluator.ask(taken.weights, taken.seed, taken.setting)
        self._running = taken

    def _close(self, reason: str) -> None:
        if self._running is not None:
            rank_zero_warn(f"the evaluation at step {self._running.step:,} was given up: {reason}")
        evaluator, self._evaluator, self._running, self._waiting = self._evaluator, None, None, None
        if evaluator is not None:
            evaluator.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_evaluator": None, "_running": None, "_waiting": None}  # of this process


def _warn(step: int, error: Exception) -> None:
    rank_zero_warn(
        f"the evaluation at step {step:,} has no result ({error}): training goes on, and the next evaluation has a new "
        "process"
    )


def _completed(checkpoint: dict[str, Any] | None, trainer: Trainer) -> dict[str, Any] | None:
    """A snapshot's checkpoint with its own evaluation added to the records."""
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, RunSummary) and checkpoint is not None:
            checkpoint["callbacks"][callback.state_key]["evaluations"] = callback.state_dict()["evaluations"]
    return checkpoint


def _best(trainer: Trainer) -> BestCheckpoint | None:
    callbacks = cast(Any, trainer).callbacks
    return next((callback for callback in callbacks if isinstance(callback, BestCheckpoint)), None)
