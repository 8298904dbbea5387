"""How a run ends: on signals, with a last evaluation, and without leaving simulators."""

import contextlib
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from ppo_lightning.callbacks.events import callbacks_of
from ppo_lightning.callbacks.run_folder import RunFolder
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.module import PPOModule
from ppo_lightning.runs.trainer import STOP_SIGNALS


class GracefulShutdown(Callback):
    """Ends a run on SIGINT (Ctrl-C, a notebook's stop button) and SIGTERM (a scheduler).

    The first signal lets the iteration end, so that the run can resume bit-exactly from its last checkpoint, and ``fit``
    returns. A second one, or :attr:`GRACE_S` seconds, ends it at once. After SIGTERM the process exits with status 143. This
    replaces Lightning's own handler, which would communicate between ranks in the middle of an iteration. Lightning handles
    SLURM's requeue signal: it saves and requeues, here once the iteration has ended on all ranks.
    """

    GRACE_S = 5.0
    ECHO_S = 1.0
    """Seconds within which a repeated signal is the same one: a rank gets it from the terminal, and from rank 0."""
    SIGNALS = STOP_SIGNALS

    def __init__(self) -> None:
        self._handler: Any = None
        self._requeue: Any = None
        self._timer: threading.Timer | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module = cast(PPOModule, pl_module)
        module.stop_signal = module.agreed_stop_signal = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers after Lightning's; Lightning restores the previous ones."""
        if threading.current_thread() is not threading.main_thread():
            return
        module, main, first = cast(PPOModule, pl_module), threading.get_ident(), 0.0
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            requeue = environment.requeue_signal
            self._requeue = signal.getsignal(requeue)
            signal.signal(requeue, lambda number, frame: setattr(module, "stop_signal", signal.Signals(number)))

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if module.stop_signal in self.SIGNALS:
                if time.monotonic() - first > self.ECHO_S:
                    self._cancel_timer()
                    module.agreed_stop_signal = module.stop_signal
                    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
                return
            module.stop_signal, first = signal.Signals(number), time.monotonic()
            rank_zero_info(f"{module.stop_signal.name}: the run ends after this iteration, at once on another signal")
            launcher = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(module.stop_signal)
            self._timer = threading.Timer(self.GRACE_S, signal.pthread_kill, (main, number))
            self._timer.daemon = True
            self._timer.start()

        self._handler = handle
        for number in self.SIGNALS:
            signal.signal(number, handle)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        if module.agreed_stop_signal is not None and module.agreed_stop_signal not in self.SIGNALS:
            number, module.stop_signal, module.agreed_stop_signal = module.agreed_stop_signal, None, None
            with contextlib.ExitStack() as roots:
                for folder in callbacks_of(trainer, RunFolder):
                    roots.enter_context(folder.root_of_jobs(trainer))
                self._requeue(number, None)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exit on SIGTERM: outside of training there is nothing to save, and Lightning only records the signal."""
        if self._handler is None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._cancel_timer()
        self._handler = None
        module = cast(PPOModule, pl_module)
        # A signal may have come after the last iteration.
        module.agreed_stop_signal = module.agreed_stop_signal or module.stop_signal
        if module.agreed_stop_signal is signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._cancel_timer()
        cast(PPOModule, pl_module).rollback_update()
        for number in self.SIGNALS:
            if self._handler is not None and signal.getsignal(number) is self._handler:
                signal.signal(number, signal.SIG_IGN)  # the run is ending; Lightning restores the handlers

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handler": None, "_requeue": None, "_timer": None}  # of this process


class FinalEvaluation(Callback):
    """Evaluates the last policy at the end of training, unless Lightning has done so.

    Lightning evaluates after a batch. Early stopping on a training metric, a callback's ``on_train_epoch_end`` and
    ``max_time`` end a run after that. A signal leaves no time for an evaluation.
    """

    POSITION = 0  # other callbacks can use the evaluation at the end of training

    def __init__(self) -> None:
        self._evaluated_version = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated_version = -1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluated_version = cast(PPOModule, pl_module).policy_version

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        done = module.agreed_stop_signal is not None or self._evaluated_version == module.policy_version
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
        module = cast(PPOModule, pl_module)
        with contextlib.suppress(EnvironmentFault):  # failed environments have no state to save
            module.rollouts.resume_state = module.rollouts.state()
        module.close_environments()
