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
from ppo_lightning.callbacks.events import callbacks_of, notify_evaluation
from ppo_lightning.callbacks.processes import KEEPALIVE_S
from ppo_lightning.callbacks.shutdown import GracefulShutdown
from ppo_lightning.callbacks.summary import RunSummary
from ppo_lightning.envs import EnvOverrides
from ppo_lightning.errors import InputError
from ppo_lightning.evaluation.process import EvalProcess, Evaluation, EvaluationFailed
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import SECONDS, Limit, checked
from ppo_lightning.runs.trainer import is_last_iteration


class Snapshot(NamedTuple):
    """Snapshot of a run for an evaluation."""

    step: int
    """Environment steps."""
    seed: int
    """Of the episodes."""
    overrides: EnvOverrides
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
        self.evaluator: EvalProcess | None = None
        """The process, during training, on rank 0."""
        self._packed = b""
        self._running: Snapshot | None = None
        self._waiting: Snapshot | None = None
        self._last_step = -1
        self._limit_val_batches: int | float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn off Lightning's evaluations, which pause training."""
        if stage != "fit":
            return
        module = cast(PPOModule, pl_module)
        if module.env_factory.for_evaluation() is None:
            raise InputError(
                f"AsyncEvaluation needs environments of its own, and {module.env_factory.name} was given as a VectorEnv: give "
                "a callable that makes it instead"
            )
        if callbacks_of(trainer, WeightAveraging):
            raise InputError(
                "AsyncEvaluation evaluates the weights of training, WeightAveraging saves averaged ones: leave "
                "AsyncEvaluation out, so that evaluations and best.ckpt are about the same weights"
            )
        for callback in callbacks_of(trainer, ModelCheckpoint):
            if not isinstance(callback, BestCheckpoint) and (callback.monitor or "").startswith("eval/"):
                raise InputError(
                    f"ModelCheckpoint(monitor={callback.monitor!r}) would save what training has become when a result of "
                    "AsyncEvaluation arrives, not the policy that was evaluated: leave it out, best.ckpt is that policy"
                )
        self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running = self._waiting = None
        self._last_step = -1
        if trainer.is_global_zero:
            self._packed = self._evaluation(trainer, cast(PPOModule, pl_module)).pickled()
            self.evaluator = EvalProcess(self._packed, self.timeout_s)  # its imports take seconds

    def _evaluation(self, trainer: Trainer, module: PPOModule) -> Evaluation:
        factory = module.env_factory.for_evaluation()
        assert factory is not None
        episodes = module.num_eval_episodes if self.episodes is None else self.episodes
        return Evaluation(
            copy.deepcopy(module.policy).cpu().eval(),  # as in a validation
            factory,
            module.observation_space,
            num_envs=min(module.num_envs, episodes),
            num_episodes=episodes,
            deterministic=module.eval_deterministic if self.deterministic is None else self.deterministic,
            timeout_s=module.env_timeout_s,
            restarts=module.env_provider.restarts.limit,
            info_keys=module.info_keys,
            bfloat16=str(trainer.precision) != "32-true",
            max_steps=module.steps_per_eval_episode,
            seed=module.seed or 0,
        )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        last = is_last_iteration(trainer)
        every = module.iterations_between_evaluations if self.every is None else self.every
        due = last or module.policy_version % every == 0
        if due:
            self._take_snapshot(trainer, module)
        if last:
            self._drain(trainer, module)
        elif due or trainer.world_size == 1:  # ranks must agree on what has arrived
            self.poll(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        if self._last_step != module.num_env_steps:  # another callback has ended the run since
            self._take_snapshot(trainer, module)
        self._drain(trainer, module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if trainer.world_size == 1:  # else other ranks may not answer
                self._waiting = None
                self.poll(trainer, time.monotonic() + self.PATIENCE_S)
        except Exception as error:  # the error that ended the run must stay visible, such as a logger's
            rank_zero_warn(f"the last evaluation was not logged ({type(error).__name__}: {error})")
        finally:
            self._shutdown("the run has ended by an error or by force")
            self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def _take_snapshot(self, trainer: Trainer, module: PPOModule) -> None:
        """Take a snapshot of the run: collective, since each rank holds a part of a checkpoint."""
        if module.agreed_stop_signal in GracefulShutdown.SIGNALS:  # there is no time
            return
        self._last_step = module.num_env_steps
        best = _best(trainer)
        checkpoint = None if best is None else trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if trainer.is_global_zero:
            weights = io.BytesIO()
            torch.save({name: tensor.cpu() for name, tensor in module.policy.state_dict().items()}, weights)
            # The checkpoint holds the tensors that training updates in place.
            copied = copy.deepcopy(checkpoint)
            self._waiting = Snapshot(
                self._last_step,
                module.evaluation_seed(),
                module.env_provider.eval_overrides,
                weights.getvalue(),
                copied,
            )

    def _drain(self, trainer: Trainer, module: PPOModule) -> None:
        interrupted = module.agreed_stop_signal in GracefulShutdown.SIGNALS
        try:
            until = time.monotonic() + (self.PATIENCE_S if interrupted else 2 * self.timeout_s)
            if interrupted:
                self._waiting = None
            while self.poll(trainer, until):
                pass
        finally:
            self._shutdown("the run was interrupted")

    def poll(self, trainer: Trainer, until: float = 0.0) -> bool:
        """Log a result that has arrived, and submit the waiting snapshot; collective.

        Waits until that time of ``time.monotonic``. Returns whether another result is pending.
        """
        snapshot = self._running
        statistics = self._receive_and_submit(min(KEEPALIVE_S, until - time.monotonic()))
        step = None if snapshot is None else snapshot.step
        pending = self._running is not None and time.monotonic() < until
        step, statistics, pending = trainer.strategy.broadcast((step, statistics, pending))
        if step is not None and statistics is not None:
            module = cast(PPOModule, trainer.lightning_module)
            module.log_metrics(statistics, step)
            module.records.evaluations.add(step, statistics)
            best = _best(trainer)
            if best is not None:
                checkpoint = None if snapshot is None else _with_evaluation_record(snapshot.checkpoint, trainer)
                best.save_if_best(trainer, checkpoint, {name: trainer.callback_metrics[name] for name in statistics})
            notify_evaluation(trainer, trainer.lightning_module, step, statistics)
        return pending

    def _receive_and_submit(self, wait_s: float) -> dict[str, float] | None:
        statistics = None
        if self._running is not None and self.evaluator is not None:
            try:
                statistics = self.evaluator.poll(max(0.0, wait_s))
            except EvaluationFailed as error:
                _warn(self._running.step, error)
                self.evaluator.close()
                self.evaluator = self._running = None
        if statistics is not None:
            self._running = None
        if self._running is None and self._waiting is not None:
            snapshot, self._waiting = self._waiting, None
            try:
                self.evaluator = self.evaluator or EvalProcess(self._packed, self.timeout_s)
            except OSError as error:  # no process or memory left: training has its own
                _warn(snapshot.step, error)
            else:
                self.evaluator.submit(snapshot.weights, snapshot.seed, snapshot.overrides)
                self._running = snapshot
        return statistics

    def _shutdown(self, reason: str) -> None:
        if self._running is not None:
            rank_zero_warn(f"the evaluation at step {self._running.step:,} was given up: {reason}")
        evaluator, self.evaluator, self._running, self._waiting = self.evaluator, None, None, None
        if evaluator is not None:
            evaluator.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "evaluator": None, "_running": None, "_waiting": None}  # of this process


def _warn(step: int, error: Exception) -> None:
    rank_zero_warn(
        f"the evaluation at step {step:,} has no result ({error}): training continues, and the next evaluation has a new "
        "process"
    )


def _with_evaluation_record(checkpoint: dict[str, Any] | None, trainer: Trainer) -> dict[str, Any] | None:
    """A snapshot's checkpoint with its own evaluation added to the records."""
    if checkpoint is not None:
        for summary in callbacks_of(trainer, RunSummary):
            checkpoint["callbacks"][summary.state_key]["evaluations"] = summary.state_dict()["evaluations"]
    return checkpoint


def _best(trainer: Trainer) -> BestCheckpoint | None:
    return next(iter(callbacks_of(trainer, BestCheckpoint)), None)
